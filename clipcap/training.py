"""Train a captioner: the LightningModule, and `train`, which goes from a data set on disk to a saved model."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import Callback, LightningModule
from torch import Tensor, distributed
from torch.utils.data import DataLoader
from tqdm import tqdm

from clipcap.capdec import TextStore, build_text_store, inject_noise, one_item_a_caption, read_captions
from clipcap.data import CaptionDataset, CaptionedImage, collate
from clipcap.embeddings import EmbeddingStore, build_store
from clipcap.lora import add_lora, merge_lora
from clipcap.model import ClipCapConfig, ClipCapModel, absolute
from clipcap.readers import Format, is_plain_text, read_dataset
from clipcap.retrieval import Datastore, PromptedDataset, number_images
from clipcap.scst import (
    CorpusCider,
    ReferencedImages,
    join_images,
    rewarded_samples,
    self_critical_loss,
    token_log_probs,
)
from clipcap.validation import CaptionValidation, Subset
from common.checks import UserError, require_at_least
from common.clip import FrozenCLIP, load_clip
from common.files import require_own_directory, whole_directory, write_json
from common.gpt2 import load_gpt2
from common.language import IGNORE
from common.processes import is_first_process, sole_run
from common.runtime import RuntimeConfig, hardware, own_gpu, resolve_device, start, versions
from common.training import (
    BatchOrder,
    ResumableLoader,
    TrainerConfig,
    build_trainer,
    fit,
    fused,
    load_best,
    mean_over_processes,
    require_same_run,
    settings_of,
    validation_interval,
    warmup_cosine,
    warmup_linear,
)

FREE = (
    "data", "images", "out", "embeddings", "format", "skip_missing", "workers", "epochs", "steps", "val_every",
    "val_captions", "val_beams", "monitor", "patience", "resume", "devices", "num_nodes", "strategy",
)  # fmt: skip
"""Settings that may be others when a run is gone on with; its captions must be the same wherever they are."""
SCHEDULES: dict[str, Callable[[int, int], Callable[[int], float]]] = {"cosine": warmup_cosine, "linear": warmup_linear}


@dataclass(frozen=True)
class TrainConfig:
    """Train a captioner on your images.

    DATA is a Karpathy JSON file (COCO, Flickr8k, Flickr30k), or a folder of images with captions.csv or
    captions.jsonl (columns file_name and caption), or with a text file of captions beside each image, or one of the
    other layouts that --format names.

    The captions of images that are held out are written to OUT/samples.html while it trains, the losses and scores to
    OUT/metrics.csv and OUT/tensorboard. The same command goes on with a run that was interrupted.
    """

    data: Path
    """Captions with their images; with --text-only also captions without them, or a .txt file with a caption a line."""
    images: Path | None = None
    """Directory of the images, when they are not beside the captions."""
    out: Path = Path("out/captioner")
    """Where the run goes; the trained captioner is in its folder `model`."""
    embeddings: Path | None = None
    """Directory of the embedding store, OUT/embeddings when not given; runs with the same images and CLIP share it."""
    format: Format = "auto"
    """Layout of DATA, where it should not be guessed from its content."""
    skip_missing: bool = False
    """Leave out captions whose image is missing, instead of stopping."""
    workers: int = 2
    """Processes that read images; 0 reads them in this one."""
    init: Path | None = None
    """Trained captioner to go on from; its sizes, CLIP and GPT-2, frozen or not, are then used."""
    clip: str = "tiny"
    """CLIP: tiny, a Hugging Face id or directory, or open_clip:ARCH/TAG-or-path."""
    gpt2: str = "tiny"
    """GPT-2: tiny, tiny-medium, a Hugging Face id or directory."""
    mapper: Literal["mlp", "transformer"] = "transformer"
    """Mapping network."""
    tune_gpt2: bool = False
    """Train GPT-2 with the mapper (the paper's fine-tuned variant), instead of keeping it frozen."""
    lora: int = 0
    """Rank of low-rank updates of GPT-2 (LoRA), between frozen and fine-tuned; 0 for none."""
    prefix_length: int = 10
    """Prefix embeddings per image (the paper's K)."""
    clip_length: int = 10
    """Tokens that the Transformer mapper makes of the embedding."""
    mapper_layers: int = 8
    """Layers of the Transformer mapper."""
    mapper_heads: int = 8
    """Attention heads of the Transformer mapper."""
    inputs: Literal["embedding", "patches"] = "embedding"
    """What the mapper reads: the pooled embedding (the paper), or the patch features."""
    normalize_embeddings: bool = False
    """Scale embeddings to length 1 before the mapper."""
    epochs: int = 10
    """Passes over the captions."""
    steps: int = 0
    """Optimizer steps, when not 0, instead of epochs."""
    batch_size: int = 40
    """Captions in a batch of each process."""
    accumulate: int = 1
    """Batches whose gradients make one step: the mean over all their tokens."""
    lr: float = 2e-5
    """AdamW's peak learning rate."""
    warmup: int = 5000
    """Steps of linear warm-up; at most a tenth of the run."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the rate falls to 0 after warm-up; linear is the paper's."""
    clip_gradients: float = 1.0
    """Largest norm of the gradient; 0 never clips."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    max_tokens: int = 67
    """Longest caption, its end token included."""
    val_every: int = 0
    """Steps between validations; 0 is a tenth of the run, at most 500."""
    val_captions: int = 200
    """Images that are captioned at each validation, for CIDEr and OUT/samples.html; 0 for none."""
    val_beams: int = 1
    """Beams of these captions; 1 is greedy."""
    monitor: Literal["auto", "loss", "cider"] = "auto"
    """What the best checkpoint is the best in, on the validation split; auto is cider with --scst, else loss."""
    patience: int = 0
    """Validations without improvement after which the run ends; 0 never ends it early."""
    text_only: bool = False
    """Train on the captions alone, no images: noisy CLIP embeddings of captions stand in for images (CapDec)."""
    text_noise: float = 0.016
    """Variance of that noise."""
    scst: bool = False
    """Self-critical training on CIDEr of a captioner given by --init: use a low rate, such as 1e-5."""
    scst_samples: int = 5
    """Captions sampled for each image of a batch with --scst."""
    retrieval: int = 0
    """Captions of similar images (from the training captions, by CLIP) put as text before each caption; 0 for none."""
    resume: bool = True
    """Go on from last.ckpt in OUT when there is one; --no-resume begins anew."""
    devices: int = 1
    """Processes or GPUs on each machine; a step then has as many times --batch-size captions."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp"] = "auto"
    """How several processes train together."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


class Captioning(LightningModule):
    """Optimizer, schedule and logging around `ClipCapModel`'s loss; checkpoints hold trained parameters alone.

    The loss of a step is the mean over all its tokens, however they are spread over batches and processes: batches
    give sums, which are divided by the step's tokens just before the optimizer takes them.

    Args:
        model: captioner.
        lr: peak rate.
        warmup, total: steps.
        weight_decay: AdamW's.
        schedule: "cosine" or "linear".
        text_noise: variance of noise on the embeddings of training batches, which are then of length 1.
    """

    strict_loading = False

    def __init__(
        self,
        model: ClipCapModel,
        *,
        lr: float,
        warmup: int,
        total: int,
        weight_decay: float,
        schedule: str = "cosine",
        text_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.lr, self.warmup, self.total, self.weight_decay = lr, warmup, total, weight_decay
        self.schedule, self.text_noise = schedule, text_noise
        self._sums: Tensor | None = None  # nats and tokens of the step so far
        self._valid = np.zeros(2)  # and of the validation

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = fused(torch.optim.AdamW, trained, lr=self.lr, weight_decay=self.weight_decay)
        factor = SCHEDULES[self.schedule](self.warmup, self.total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self.text_noise:
            batch = batch | {"clip_embeddings": inject_noise(batch["clip_embeddings"], self.text_noise)}
        tokens = (batch["labels"] != IGNORE).sum()
        return self._add(self._loss(batch) * tokens, tokens)

    def _add(self, nats: Tensor, tokens: Tensor) -> Tensor:
        """Count a batch's sum as part of the step; returns the sum, whose gradient is accumulated."""
        sums = torch.stack([nats.detach().float(), tokens.float()])
        self._sums = sums if self._sums is None else self._sums + sums
        return nats

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self._sums is not None
        sums, world = self._sums, self.trainer.world_size
        if world > 1:
            distributed.all_reduce(sums)
        # Lightning has divided by the batches of a step, and DDP by the processes.
        factor = self.trainer.accumulate_grad_batches * world / sums[1]
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        self.log("train/loss", sums[0] / sums[1], prog_bar=True)
        self._sums = None

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        tokens = int((batch["labels"] != IGNORE).sum())  # the mean over tokens, not over batches
        self._valid += np.array([float(self._loss(batch)) * tokens, tokens])

    def on_validation_epoch_start(self) -> None:
        self._valid = np.zeros(2)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", mean_over_processes(self, *self._valid), prog_bar=True)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        # Padding is on the right and unlabelled, so causal attention needs no mask.
        loss = self.model(
            batch["clip_embeddings"],
            batch["input_ids"],
            labels=batch["labels"],
            prompts=batch.get("prompts"),
            return_logits=False,
        ).loss
        assert loss is not None
        return loss

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Trained parameters only: a frozen backbone is kept by its name."""
        trained = {f"model.{name}" for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}


class SelfCritical(Captioning):
    """Self-critical training: batches are of images with references, the loss that of `clipcap.scst`."""

    def __init__(
        self, model: ClipCapModel, cider: CorpusCider, *, samples: int, max_new_tokens: int, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self.cider, self.samples, self.max_new_tokens = cider, samples, max_new_tokens

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        embeddings = batch["clip_embeddings"]
        ids, labels, advantage, greedy = rewarded_samples(
            self.model, embeddings, batch["references"], self.cider,
            samples=self.samples, max_new_tokens=self.max_new_tokens,
        )
        log_probs = token_log_probs(self.model, embeddings.repeat_interleave(self.samples, 0), ids, labels)
        counted = (labels != IGNORE).float()
        self.log("train/greedy_cider", greedy.mean(), prog_bar=True)
        self.log("train/sampled_cider", greedy.mean() + advantage.mean())
        return self._add(self_critical_loss(log_probs, counted, advantage), counted.sum())


def embed_with_progress(
    items: list[CaptionedImage], config: TrainConfig, clip: FrozenCLIP, directory: Path
) -> EmbeddingStore:
    """Encode all images once, with a progress bar, and name what was skipped."""
    with _bar(len(items), f"embedding images with CLIP {config.clip}", " images") as bar:
        store = build_store(
            items,
            clip,
            directory,
            inputs=config.inputs,
            precision=config.runtime.precision,
            progress=lambda done: bar.update(done - bar.n),
            workers=config.workers,
        )
    if store.skipped and is_first_process():
        print(f"skipped {len(store.skipped)} of {len(items)} images:", file=sys.stderr)
        for reason in list(store.skipped.values())[:10]:
            print(f"  {reason}", file=sys.stderr)
    return store


def _bar(total: int, what: str, unit: str) -> Any:
    return tqdm(total=total, desc=what, unit=unit, disable=not is_first_process())


def _embed_texts(items: list[CaptionedImage], clip: FrozenCLIP, directory: Path) -> TextStore:
    with _bar(len(items), f"embedding captions with CLIP {clip.name}", " captions") as bar:
        return build_text_store(items, clip, directory, progress=lambda done: bar.update(done - bar.n))


@dataclass(frozen=True)
class Material:
    """What a captioner is trained and validated on."""

    items: dict[str, list[CaptionedImage]]
    """By split; "val" may be empty."""
    stores: dict[str, Any]
    """Embedding store of each split that has items."""
    datastore: Datastore | None = None
    """Captions to retrieve."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Images that could not be read, with the reason."""

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return int(self.stores["train"].array.shape[-1])


def read_items(config: TrainConfig) -> dict[str, list[CaptionedImage]]:
    """The captions by split.

    Raises:
        UserError: nothing to train on, or anything in the data that cannot be read.
    """
    if config.text_only and config.format == "auto" and is_plain_text(config.data):
        items = read_captions(config.data)
    else:
        items = read_dataset(
            config.data,
            images=config.images,
            skip_missing=config.skip_missing,
            format=config.format,
            need_images=not config.text_only,
        )
    by_split = {split: [item for item in items if item.split == split] for split in ("train", "val")}
    if not by_split["train"]:
        raise UserError(f"{str(config.data)!r} has nothing in its train split: check its 'split' fields.")
    return by_split


def encode_items(config: TrainConfig, by_split: dict[str, list[CaptionedImage]], clip: FrozenCLIP) -> Material:
    """Encode images, or with --text-only captions, once."""
    directory = config.embeddings or config.out / "embeddings"
    directory.parent.mkdir(parents=True, exist_ok=True)
    if not config.text_only:
        store = embed_with_progress(by_split["train"] + by_split["val"], config, clip, directory)
        stores = {split: store for split, part in by_split.items() if part}
        datastore = _build_datastore(by_split["train"], store, config, clip) if config.retrieval else None
        return Material(by_split, stores, datastore, store.skipped)
    train, val = one_item_a_caption(by_split["train"]), by_split["val"]
    if val and all(item.path.is_file() for item in val):  # judged on images all the same
        texts = _embed_texts(train, clip, directory)
        images = embed_with_progress(val, config, clip, directory / "val")
        return Material({"train": train, "val": val}, {"train": texts, "val": images}, skipped=images.skipped)
    val = one_item_a_caption(val)
    texts = _embed_texts(train + val, clip, directory)
    return Material({"train": train, "val": val}, {"train": texts} | ({"val": texts} if val else {}))


def _settings(config: TrainConfig, items: list[CaptionedImage]) -> dict[str, Any]:
    """What a run that goes on must have in common with its beginning."""
    texts = "\0".join(text for item in items for text in (item.image_id, *item.captions))
    digest = hashlib.sha256(texts.encode("utf-8", "surrogatepass"))
    captions = f"{sum(len(item.captions) for item in items)} with hash {digest.hexdigest()[:12]}"
    return settings_of(config, FREE) | {"captions": captions}


def _build_datastore(
    items: list[CaptionedImage], store: EmbeddingStore, config: TrainConfig, clip: FrozenCLIP
) -> Datastore:
    """The training captions with their embeddings; images that share an embedding are one."""
    kept = [item for item in items if item.image_id in store]
    numbers = number_images([store[store.row(item.image_id)] for item in kept])
    texts = one_item_a_caption(kept)
    owners = [number for number, item in zip(numbers, kept, strict=True) for _ in item.captions]
    embeddings = _embed_texts(texts, clip, config.out / "datastore").array
    gpt2, tokenizer = load_gpt2(config.gpt2)
    captions = [item.captions[0] for item in texts]
    datastore = Datastore.build(captions, owners, torch.from_numpy(embeddings[:]), tokenizer)
    taken = datastore.prompt_length(config.retrieval)
    if taken + config.prefix_length >= gpt2.config.n_positions:
        raise UserError(
            f"retrieval is {config.retrieval}: the captions and the prefix of {config.prefix_length} take "
            f"{taken + config.prefix_length} of GPT-2's {gpt2.config.n_positions} positions, use fewer."
        )
    return datastore


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
        if model.config.retrieval:
            raise UserError(f"init {str(config.init)!r} retrieves captions: train it anew, without --init.")
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


def _resolve_init(config: TrainConfig) -> TrainConfig:
    """The settings with the sizes and backbones of --init; one that was given and differs is an error."""
    if config.init is None:
        return config
    saved = ClipCapConfig.from_pretrained(config.init) if (config.init / "config.json").is_file() else None
    if saved is None or saved.model_type != "clipcap":
        raise UserError(f"init {str(config.init)!r} is no trained captioner: give the directory `model` of a run.")
    plain = TrainConfig(data=config.data)
    taken: dict[str, Any] = {"tune_gpt2": config.tune_gpt2 or saved.tune_gpt2}
    if config.text_only and not saved.normalize_embeddings:
        raise UserError(
            f"init {str(config.init)!r} reads embeddings of any length and text_only trains on those of length 1: give "
            f"a captioner trained with --text-only or --normalize-embeddings."
        )
    for name in ("mapper", "inputs", "prefix_length", "clip_length", "mapper_layers", "mapper_heads", "clip", "gpt2",
                 "normalize_embeddings"):
        ours, theirs = getattr(config, name), getattr(saved, name)
        if theirs is None:
            continue
        if name in ("clip", "gpt2"):
            ours = absolute(ours)
        if ours not in (getattr(plain, name), theirs):
            raise UserError(f"{name} is {ours!r} but init {str(config.init)!r} has {theirs!r}: leave it out.")
        taken[name] = theirs
    return replace(config, **taken)


def _check(config: TrainConfig) -> None:
    """Raise UserError for settings that cannot work."""
    least_one = ("batch_size", "max_tokens", "accumulate", "mapper_layers", "prefix_length", "val_beams",
                 "devices", "num_nodes", "epochs", "scst_samples")
    for name in least_one:
        require_at_least(name, getattr(config, name), 1)
    least_zero = ("lora", "retrieval", "val_every", "val_captions", "patience", "clip_gradients", "text_noise",
                  "warmup", "steps", "weight_decay", "workers")
    for name in least_zero:
        require_at_least(name, getattr(config, name), 0)
    if config.embeddings is not None and config.embeddings.resolve() == config.out.resolve():
        raise UserError(f"embeddings and out are both {str(config.out)!r}: give each a directory of its own.")
    if not config.lr > 0:
        raise UserError(f"lr is {config.lr}: use a rate above 0.")
    ways = [name for name in ("text_only", "scst", "retrieval") if getattr(config, name)]
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)} are given together: choose one.")
    if config.scst and config.init is None:
        raise UserError("scst is given without --init: name a trained captioner to go on from.")
    if config.retrieval and config.init is not None:
        raise UserError("retrieval is given with --init: a captioner with retrieval is trained from the start.")
    if config.lora and config.tune_gpt2:
        raise UserError("lora and tune_gpt2 are given together: choose one.")
    if config.inputs == "patches" and ways and not config.scst:
        raise UserError(f"{ways[0]} is given with inputs 'patches': texts have no patches, use 'embedding'.")


def train(config: TrainConfig) -> Path:
    """Train a captioner and return the directory of the model that was the best in validation.

    Steps: read the captions, encode each image once, train the mapper (and GPT-2), save. An interrupted run goes on
    from its last checkpoint, exactly. With several processes, all of them call this, and the first one writes.

    Raises:
        UserError: anything in the data or the settings that cannot work, with its cure; another run uses OUT.
    """
    _check(config)
    config = _resolve_init(config)
    with sole_run(config.out):
        return _train(config)


def _train(config: TrainConfig) -> Path:
    """`train`, alone in its directory and with settings that can work."""
    directory = config.out / "model"
    require_own_directory(directory)
    device = start(config.runtime)
    items = read_items(config)
    settings = _settings(config, items["train"])
    if config.resume:
        require_same_run(config.out, settings)
    material = encode_items(config, items, load_clip(config.clip, device=own_gpu(device)))
    model = build_model(config, material)
    assert model.tokenizer is not None
    longest = min(config.max_tokens, model.gpt2.config.n_positions - model.config.prefix_length)
    data = {
        split: CaptionDataset(
            material.items[split], store, model.tokenizer, max_tokens=longest, cache=config.out / "tokens"
        )
        for split, store in material.stores.items()
    }
    pairs, join, world = _training_pairs(config, material, model, data["train"]), _join(model), _world(config)
    lengths = None if config.scst else data["train"].lengths
    options: dict[str, Any] = {"seed": config.runtime.seed, "lengths": lengths, "accumulate": config.accumulate}
    in_an_epoch = len(BatchOrder(len(pairs), config.batch_size, rank=0, world=world, **options))
    steps = config.steps or config.epochs * in_an_epoch // config.accumulate

    monitor = {"auto": "cider" if config.scst else "loss"}.get(config.monitor, config.monitor)
    callbacks: list[Callback] = []
    if config.val_captions and "val" in data:
        subset = Subset.draw(material.items["val"], material.stores["val"], config.val_captions, config.runtime.seed)
        callbacks.append(
            CaptionValidation(
                subset, config.out, beams=config.val_beams, max_new_tokens=longest, batch_size=config.batch_size
            )
        )
    elif monitor == "cider":
        raise UserError("monitor is 'cider' but no validation images are captioned: set --val-captions and give some.")
    trainer = build_trainer(
        TrainerConfig(
            max_steps=steps,
            val_every=validation_interval(config.val_every, steps, most=500) * config.accumulate,
            accumulate=config.accumulate,
            clip_gradients=config.clip_gradients,
            precision=config.runtime.precision,
            device=str(device),
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=config.strategy,
            patience=config.patience if "val" in data else 0,
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
        model.float().eval().save_pretrained(whole)
    record = config.out / "training.json"
    if record.is_file() and not trainer.callback_metrics:  # all its steps were made before
        return directory
    write_json(
        record,
        {
            "config": asdict(config),
            "images": {split: len(part) for split, part in material.items.items()},
            "captions": {split: len(part) for split, part in data.items()},
            "skipped": material.skipped,
            "steps": trainer.global_step,
            "stopped_early": trainer.global_step < steps,
            "trained_parameters": trained,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "cpu_seconds": round(cpu_seconds),
            "hardware": hardware(),
            "versions": versions(),
        },
    )
    return directory


def _world(config: TrainConfig) -> int:
    """Processes that train together."""
    return config.devices * config.num_nodes


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
    with _bar(len(rows), f"retrieving captions for {split} images", " images") as bar:
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
) -> Captioning:
    options: dict[str, Any] = {
        "lr": config.lr,
        "warmup": min(config.warmup, steps // 10),
        "total": steps,
        "weight_decay": config.weight_decay,
        "schedule": config.schedule,
    }
    if config.scst:
        cider = CorpusCider([item.captions for item in material.items["train"]])
        return SelfCritical(model, cider, samples=config.scst_samples, max_new_tokens=longest, **options)
    return Captioning(model, text_noise=config.text_noise if config.text_only else 0.0, **options)


def run(config: TrainConfig) -> int:
    """`clipcap train`: train a captioner and say where it is."""
    directory = train(config)
    if is_first_process():
        print(f"captioner written to {directory}; try: clipcap caption IMAGE --model {directory}")
    return 0
