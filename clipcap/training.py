"""Train a captioner: the LightningModule, and `train`, which goes from a data set on disk to a saved model."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from clipcap.data import BucketedOrder, CaptionDataset, CaptionedImage, collate, read_dataset
from clipcap.embeddings import EmbeddingStore, build_store
from clipcap.model import ClipCapConfig, ClipCapModel
from common.checks import UserError, require_at_least
from common.clip import load_clip
from common.runtime import RuntimeConfig, hardware, start, versions
from common.training import ResumableLoader, TrainerConfig, build_trainer, fit, warmup_cosine


@dataclass(frozen=True)
class TrainConfig:
    """Train a captioner on your images.

    DATA is a Karpathy JSON file (COCO, Flickr8k, Flickr30k), or a folder of images with captions.csv or
    captions.jsonl (columns file_name and caption), or with a text file of captions beside each image.
    """

    data: Path
    """Karpathy JSON file or folder."""
    images: Path | None = None
    """Directory of the images, when they are not beside the captions."""
    out: Path = Path("out/captioner")
    """Where the run goes; the trained captioner is in its folder `model`."""
    embeddings: Path | None = None
    """Directory of the embedding store, OUT/embeddings when not given; runs with the same images and CLIP share it."""
    skip_missing: bool = False
    """Leave out captions whose image is missing, instead of stopping."""
    clip: str = "tiny"
    """CLIP: tiny, a Hugging Face id or directory, or open_clip:ARCH/TAG-or-path."""
    gpt2: str = "tiny"
    """GPT-2: tiny, tiny-medium, a Hugging Face id or directory."""
    mapper: Literal["mlp", "transformer"] = "transformer"
    """Mapping network."""
    tune_gpt2: bool = False
    """Train GPT-2 with the mapper (the paper's fine-tuned variant), instead of keeping it frozen."""
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
    """Captions in a step."""
    lr: float = 2e-5
    """AdamW's peak learning rate."""
    warmup: int = 5000
    """Steps of linear warm-up; at most a tenth of the run."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    max_tokens: int = 67
    """Longest caption, its end token included."""
    val_every: int = 500
    """Steps between validations."""
    resume: bool = True
    """Go on from last.ckpt in OUT when there is one."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


class Captioning(LightningModule):
    """Optimizer, schedule and logging around `ClipCapModel`'s loss; checkpoints hold trained parameters alone."""

    strict_loading = False

    def __init__(self, model: ClipCapModel, *, lr: float, warmup: int, total: int, weight_decay: float) -> None:
        super().__init__()
        self.model = model
        self.lr, self.warmup, self.total, self.weight_decay = lr, warmup, total, weight_decay

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(self.warmup, self.total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        tokens = int((batch["labels"] >= 0).sum())  # the mean over tokens, not over batches
        self.log("val/loss", self._loss(batch), prog_bar=True, batch_size=tokens, sync_dist=True)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        # Padding is on the right and unlabelled, so causal attention needs no mask.
        loss = self.model(
            batch["clip_embeddings"], batch["input_ids"], labels=batch["labels"], return_logits=False
        ).loss
        assert loss is not None
        return loss

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Trained parameters only: a frozen backbone is kept by its name."""
        trained = {f"model.{name}" for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}


def embed_with_progress(items: list[CaptionedImage], config: TrainConfig, directory: Path) -> EmbeddingStore:
    """Encode all images once, with a progress bar, and name what was skipped."""
    clip = load_clip(config.clip, device=config.runtime.device)
    with tqdm(total=len(items), desc=f"embedding images with CLIP {config.clip}", unit=" images") as bar:
        store = build_store(
            items,
            clip,
            directory,
            inputs=config.inputs,
            precision=config.runtime.precision,
            progress=lambda done: bar.update(done - bar.n),
        )
    if store.skipped:
        print(f"skipped {len(store.skipped)} of {len(items)} images:", file=sys.stderr)
        for reason in list(store.skipped.values())[:10]:
            print(f"  {reason}", file=sys.stderr)
    return store


def train(config: TrainConfig) -> Path:
    """Train a captioner and return the directory of the model with the lowest validation loss.

    Steps: read the captions, encode each image once, train the mapper (and GPT-2), save. An interrupted run goes on
    from its last checkpoint, exactly.

    Raises:
        UserError: anything in the data or the settings that cannot work, with its cure.
    """
    for name in ("batch_size", "max_tokens", "val_every", "accumulate", "mapper_layers", "prefix_length"):
        require_at_least(name, getattr(config, name), 1)
    if not config.lr > 0:
        raise UserError(f"lr is {config.lr}: use a rate above 0.")
    device = start(config.runtime)
    items = read_dataset(config.data, images=config.images, skip_missing=config.skip_missing)
    by_split = {split: [item for item in items if item.split == split] for split in ("train", "val")}
    if not by_split["train"]:
        raise UserError(f"{str(config.data)!r} has no image in its train split: check its 'split' fields.")
    config.out.mkdir(parents=True, exist_ok=True)
    store = embed_with_progress(
        by_split["train"] + by_split["val"], config, config.embeddings or config.out / "embeddings"
    )

    model = ClipCapModel.from_backbones(
        ClipCapConfig(
            mapper=config.mapper,
            inputs=config.inputs,
            clip_width=int(store.array.shape[-1]),
            prefix_length=config.prefix_length,
            clip_length=config.clip_length,
            mapper_layers=config.mapper_layers,
            mapper_heads=config.mapper_heads,
            normalize_embeddings=config.normalize_embeddings,
            tune_gpt2=config.tune_gpt2,
            gpt2=config.gpt2,
            clip=config.clip,
        )
    )
    assert model.tokenizer is not None
    longest = min(config.max_tokens, model.gpt2.config.n_positions - config.prefix_length)
    data = {
        split: CaptionDataset(part, store, model.tokenizer, max_tokens=longest)
        for split, part in by_split.items()
        if split == "train" or part
    }
    join = collate(model.tokenizer.eos_token_id)
    order = BucketedOrder([len(ids) for _, ids in data["train"].pairs], config.batch_size, seed=config.runtime.seed)
    steps = config.steps or config.epochs * len(order) // config.accumulate
    require_at_least("number of steps", steps, 1)
    trainer = build_trainer(
        TrainerConfig(
            max_steps=steps,
            val_every=min(config.val_every * config.accumulate, steps * config.accumulate),
            accumulate=config.accumulate,
            precision=config.runtime.precision,
            device=device.type,
        ),
        config.out,
        monitor="val/loss" if "val" in data else "train/loss",
    )
    module = Captioning(
        model, lr=config.lr, warmup=min(config.warmup, steps // 10), total=steps, weight_decay=config.weight_decay
    )
    loaders: dict[str, Any] = {"train_dataloaders": ResumableLoader(data["train"], order, collate_fn=join)}
    if "val" in data:
        loaders["val_dataloaders"] = DataLoader(data["val"], batch_size=config.batch_size, collate_fn=join)
    begun = time.process_time()
    fit(trainer, module, config.out, resume=config.resume, **loaders)
    cpu_seconds = time.process_time() - begun

    best = config.out / "best.ckpt"
    if best.is_file():
        weights = torch.load(best, map_location="cpu", weights_only=False)["state_dict"]
        module.load_state_dict(weights, strict=False)
    directory = config.out / "model"
    model.float().eval().save_pretrained(directory)
    record = {
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "images": {split: len(part) for split, part in by_split.items()},
        "captions": {split: len(part) for split, part in data.items()},
        "skipped": store.skipped,
        "steps": trainer.global_step,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "cpu_seconds": round(cpu_seconds),
        "hardware": hardware(),
        "versions": versions(),
    }
    (config.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return directory


def run(config: TrainConfig) -> int:
    """`clipcap train`: train a captioner and say where it is."""
    directory = train(config)
    print(f"captioner written to {directory}; try: clipcap caption IMAGE --model {directory}")
    return 0
