"""Train a captioner: the LightningModule, and `train`, which goes from a data set on disk to a saved model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from clipcap.config import ClipCapConfig, require_prefix_fits
from clipcap.data.dataset import CaptionDataset, collate
from clipcap.model import ClipCapModel
from clipcap.retrieval import Datastore, PromptedDataset, number_images
from clipcap.training.lora import add_lora, merge_lora
from clipcap.training.material import Material, encode_items, progress_bar, read_items
from clipcap.training.module import CaptionTraining, SelfCriticalTraining
from clipcap.training.scst import CorpusCider, ReferencedImages, join_images
from clipcap.training.settings import TrainConfig, check, resolve_init, resolve_rate, settings_of_run
from clipcap.training.validation import CaptionValidation, Subset
from common.batches import BatchOrder, ResumableLoader
from common.checks import UserError
from common.clip import load_clip
from common.decoders.configs import require_decoder
from common.decoders.families import positions
from common.files import clear_leftovers, require_own_directory, whole_directory, write_json
from common.processes import is_first_process, sole_run
from common.runtime import own_gpu, provenance, resolve_device, start
from common.training import TrainerConfig, build_trainer, fit, flat, load_best, require_same_run, validation_interval


def build_model(config: TrainConfig, material: Material) -> ClipCapModel:
    """The captioner to train: new, or the one that --init names; with LoRA where asked for.

    Raises:
        UserError: a size that --init does not have, or a backbone that cannot be loaded.
    """
    store, extra = material.datastore, 0
    if store is not None:
        extra = store.prompt_length(config.retrieval)
    sizes: dict[str, Any] = {
        "mapper": config.mapper,
        "inputs": config.inputs,
        "prefix_length": config.prefix_length + extra,
        "clip_length": config.clip_length,
        "mapper_layers": config.mapper_layers,
        "mapper_heads": config.mapper_heads,
        "normalize_embeddings": config.normalize_embeddings or config.text_only,
    }
    if config.init is None:
        model = ClipCapModel.from_backbones(
            ClipCapConfig(
                **sizes,
                clip_width=material.width,
                retrieval=config.retrieval,
                retrieval_tokens=extra,
                tune_gpt2=config.tune_gpt2,
                gpt2=config.gpt2,
                clip=config.clip,
            )
        )
        model.datastore = store
    else:
        model = ClipCapModel.from_pretrained(config.init)
        model.calibration = None  # the new captioner will be right about other pictures
        if model.config.retrieval:
            raise UserError(f"init {str(config.init)!r} retrieves captions: train it again, without --init.")
        if model.config.clip_width != material.width:
            raise UserError(
                f"init {str(config.init)!r} reads {model.config.inputs} of width {model.config.clip_width} but the "
                f"embeddings have width {material.width}: use the CLIP it was trained on ({model.config.clip})."
            )
        if not config.scst:  # captions that it learns end so, whatever the ones before ended with
            assert model.tokenizer is not None
            model.config.eos_token_id = model.tokenizer.eos_token_id
        if config.tune_gpt2 and not model.config.tune_gpt2:
            model.config.tune_gpt2 = True
            model.gpt2.requires_grad_(True)
    if config.lora:
        add_lora(model, config.lora)
    return model.train()


def train(config: TrainConfig) -> Path:
    """Train a captioner and return the directory of the model that was the best in validation.

    Steps: read the captions, encode each image once, train the mapper (and GPT-2), save. An interrupted run resumes
    from its last checkpoint, exactly. With several processes, all of them call this, and the first one writes.

    Raises:
        UserError: anything in the data or the settings that cannot work, with its cure; another run uses OUT.
    """
    check(config)
    config = resolve_rate(resolve_init(config))
    with sole_run(config.out):
        clear_leftovers(config.out / "tokens")
        return _train(config)


def _train(config: TrainConfig) -> Path:
    """`train`, alone in its directory and with settings that can work."""
    directory = config.out / "model"
    require_own_directory(directory)
    device = start(config.runtime)
    if config.init is None:  # a decoder that will not do is refused before images are embedded
        require_prefix_fits(config.prefix_length, require_decoder(config.gpt2))
    clip = load_clip(config.clip, device=own_gpu(device))
    if config.text_only or config.retrieval:
        clip.require_text("--text-only" if config.text_only else "--retrieval")
    if config.inputs == "patches":
        clip.require_patches("--inputs patches")
    items = read_items(config)
    settings = settings_of_run(config, items["train"])
    if config.resume:
        require_same_run(config.out, settings)
    material = encode_items(config, items, clip)
    model = build_model(config, material)
    assert model.tokenizer is not None
    longest = min(config.max_tokens, positions(model.gpt2.config) - model.config.prefix_length)
    data = {
        split: CaptionDataset(
            material.items[split], store, model.tokenizer, max_tokens=longest, cache=config.out / "tokens"
        )
        for split, store in material.stores.items()
    }
    pairs, join, world = _training_pairs(config, material, model, data["train"]), _join(model), config.scale.world
    accumulate = config.gradients.accumulate
    lengths = None if config.scst else data["train"].lengths
    options: dict[str, Any] = {"seed": config.runtime.seed, "lengths": lengths, "accumulate": accumulate}
    in_an_epoch = len(BatchOrder(len(pairs), config.batch_size, rank=0, world=world, **options))
    steps = config.steps or config.epochs * in_an_epoch // accumulate

    monitor = {"auto": "cider" if config.scst else "loss"}.get(config.monitor, config.monitor)
    callbacks: list[Callback] = []
    if config.val_captions and "val" in data:
        subset = Subset.draw(material.items["val"], material.stores["val"], config.val_captions, config.runtime.seed)
        callbacks.append(
            CaptionValidation(
                subset,
                config.out,
                beams=config.val_beams,
                max_new_tokens=longest,
                batch_size=config.batch_size,
                max_pixels=config.limit.max_pixels,
            )
        )
    elif monitor == "cider":
        raise UserError("monitor is 'cider' but no validation images are captioned: set --val-captions and give some.")
    trainer = build_trainer(
        TrainerConfig(
            max_steps=steps,
            val_every=validation_interval(config.val_every, steps, most=500) * accumulate,
            precision=config.runtime.precision,
            device=str(device),
            patience=config.patience if "val" in data else 0,
            **vars(config.gradients),
            **vars(config.scale),
        ),
        config.out,
        monitor=f"val/{monitor}",
        mode="max" if monitor == "cider" else "min",
        settings=settings,
        callbacks=callbacks,
    )
    module = _build_module(config, material, model, steps, longest)
    loaders: dict[str, Any] = {
        "train_dataloaders": ResumableLoader(
            pairs,
            BatchOrder(len(pairs), config.batch_size, **options),
            collate_fn=join_images if config.scst else join,
        )
    }
    if "val" in data:
        known: Any = data["val"]
        if model.datastore is not None:
            known = _with_prompts(known, "val", config, material, model.datastore)
        order = BatchOrder(len(known), config.batch_size, shuffle=False)
        loaders["val_dataloaders"] = DataLoader(known, batch_sampler=order, collate_fn=join)
    begun = time.process_time()
    fit(trainer, module, config.out, resume=config.resume, **loaders)
    cpu_seconds = time.process_time() - begun

    if not is_first_process():
        return directory
    if "val" in data and (config.out / "best.ckpt").is_file():
        load_best(module, config.out)
    else:
        print(f"{str(config.data)!r} has no validation split: the last weights are kept", file=sys.stderr)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if config.lora:
        merge_lora(model)
    with whole_directory(directory) as whole:
        model.float().eval().save_pretrained(whole, bundle=config.bundle)
    record = config.out / "training.json"
    if record.is_file() and not trainer.callback_metrics:  # all its steps were made before
        return directory
    write_json(
        record,
        {
            "config": flat(asdict(config)),
            "images": {split: len(part) for split, part in material.items.items()},
            "captions": {split: len(part) for split, part in data.items()},
            "skipped": material.skipped,
            "steps": trainer.global_step,
            "stopped_early": trainer.global_step < steps,
            "trained_parameters": trained,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "cpu_seconds": round(cpu_seconds),
            **provenance(),
        },
    )
    return directory


def _training_pairs(config: TrainConfig, material: Material, model: ClipCapModel, plain: CaptionDataset) -> Any:
    """What the training batches are made of: captions, captions with prompts, or images with references."""
    if config.scst:
        return ReferencedImages(material.items["train"], material.stores["train"])
    return plain if model.datastore is None else _with_prompts(plain, "train", config, material, model.datastore)


def _with_prompts(
    plain: CaptionDataset, split: str, config: TrainConfig, material: Material, datastore: Datastore
) -> PromptedDataset:
    """The items of a split with captions of other images: to images of the training split, theirs are unknown."""
    store = material.stores[split]
    rows = [store[store.row(item.image_id)] for item in material.items[split] if item.image_id in store]
    numbers = torch.tensor(number_images(rows)) if split == "train" else None
    prompts, device = [], own_gpu(resolve_device(config.runtime.device))
    at_once = 1024  # the whole datastore is converted for each such part
    with progress_bar(len(rows), f"retrieving captions for {split} images", " images") as bar:
        for begin in range(0, len(rows), at_once):
            part = torch.stack(rows[begin : begin + at_once]).to(device)
            own = None if numbers is None else numbers[begin : begin + at_once]
            prompts.append(datastore.prompts(part, config.retrieval, own).int())
            bar.update(len(part))
    return PromptedDataset(plain, rows, torch.cat(prompts))


def _join(model: ClipCapModel) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Joins items into a batch, with their prompts when they have some."""
    assert model.tokenizer is not None
    plain = collate(model.tokenizer.eos_token_id)

    def join(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = plain(items)
        if "prompt" in items[0]:
            batch["prompts"] = torch.stack([item["prompt"] for item in items])
        return batch

    return join


def _build_module(
    config: TrainConfig, material: Material, model: ClipCapModel, steps: int, longest: int
) -> CaptionTraining:
    options: dict[str, Any] = {
        "lr": config.lr,
        "warmup": min(config.warmup, steps // 10),
        "total": steps,
        "weight_decay": config.weight_decay,
        "schedule": config.schedule,
    }
    if config.scst:
        cider = CorpusCider([item.captions for item in material.items["train"]])
        return SelfCriticalTraining(model, cider, samples=config.scst_samples, max_new_tokens=longest, **options)
    return CaptionTraining(model, text_noise=config.text_noise if config.text_only else 0.0, **options)


def run(config: TrainConfig) -> int:
    """`clipcap train`: train a captioner and say where it is."""
    directory = train(config)
    if is_first_process():
        print(f"captioner written to {directory}; try: clipcap caption IMAGE --model {directory}")
    return 0
