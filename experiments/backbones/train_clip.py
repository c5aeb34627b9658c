"""Train the packaged tiny CLIP on rendered scenes: symmetric contrastive loss with a learned temperature.

    python -m experiments.backbones.train_clip --scenes out/scenes

Image and text Transformers as Radford et al. 2021, sec. 2.3-2.4, in Hugging Face's format. Added to the published
loss: batches of families that differ in one attribute; captions with one wrong attribute as further negatives for
each image; and two cameras per scene as positives of each other, for an embedding that depends little on the view.
Hidden matrices are trained by Muon (Jordan et al. 2024), the rest by AdamW.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Bool, Float, Int
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from common.batches import BatchOrder, ResumableLoader
from common.checks import require_at_least, run_command
from common.optimizers import MuonAndAdam, scheduled, warmup_cosine
from common.runtime import RuntimeConfig, provenance, start
from common.training import TrainerConfig, build_trainer, fit
from experiments.scenes.captions import caption, counterfactual
from experiments.scenes.dataset import load_split
from experiments.scenes.graph import COLOURS, HELD_OUT, SHAPES, Scene
from experiments.scenes.wording import ENGLISH

MEAN = STD = (0.5, 0.5, 0.5)
IMAGE_SIZE = 96
CONTEXT = 64
WARMUP = 100


@dataclass(frozen=True)
class Config:
    """Contrastive training of the tiny CLIP."""

    scenes: Path = Path("out/scenes")
    """Directory written by experiments/scenes/render.py."""
    out: Path = Path("out/clip")
    """Where the run and the model go."""
    init: Path | None = None
    """Trained model to continue from, instead of random weights."""
    steps: int = 1300
    """Optimizer steps."""
    families: int = 16
    """Families of 4 scenes, each seen by 2 cameras, in a batch."""
    negatives: int = 1
    """Captions with one wrong attribute for each image."""
    lr_muon: float = 0.02
    """Muon's rate, for hidden matrices."""
    lr_adam: float = 0.002
    """AdamW's rate, for embeddings, projections, norms and biases."""
    weight_decay: float = 0.02
    """Weight decay of matrices."""
    view_weight: float = 0.5
    """Weight of the loss between two cameras of one scene."""
    phrase_weight: float = 1.0
    """Weight of the loss between phrases that differ in an object's shape."""
    full_captions: float = 0.8
    """Share of captions that name every attribute."""
    max_objects: int = 3
    """Train on scenes of at most this many objects."""
    augmentation: float = 1.0
    """Strength of the random zoom, shift, blur, noise and light; 0 leaves images as they are."""
    zoom_out: float = 1.12
    """Largest factor by which the random zoom shrinks what an image shows."""
    max_shards: int | None = None
    """Read only the first shards of the training split."""
    val_every: int = 100
    """Steps between validations."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of matrix products."""
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1))


def train_tokenizer(captions: Sequence[str], directory: Path, *, vocab_size: int = 1200) -> CLIPTokenizer:
    """CLIP's byte-level BPE with end-of-word marks, trained on `captions`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in trained["merges"]]
    # CLIP's order: characters, characters that end a word, merges, start, end.
    tokens = [*alphabet, *(c + "</w>" for c in alphabet)]
    tokens += [joined for joined in ("".join(m) for m in merges) if joined not in set(tokens)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)
    tokenizer.save_pretrained(directory)
    return tokenizer


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of 1.6 million parameters with random weights."""
    config = CLIPConfig(
        projection_dim=128,
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=3,
            max_position_embeddings=CONTEXT,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        ),
        vision_config=dict(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=12,
            projection_dim=128,
        ),
    )
    return CLIPModel(config)


class Families(Dataset[dict[str, Any]]):
    """One item per family: images (8, 96, 96, 3) uint8, a caption for each, captions with one attribute wrong, looks.

    Captions are redrawn in every epoch, from a seed that is a function of (seed, item, draw).
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        *,
        negatives: int,
        full: float,
        seed: int,
        most: int = 3,
        max_shards: int | None = None,
    ) -> None:
        self.images, self.records = load_split(directory, split, max_shards=max_shards)
        self.negatives, self.full, self.seed, self.draws = negatives, full, seed, 0
        rows: dict[int, list[int]] = {}
        for row, record in enumerate(self.records):  # a scene's two views follow one another
            if len(record.scene.objects) <= most:
                rows.setdefault(record.family, []).append(row)
        self.rows = list(rows.values())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> dict[str, Any]:
        self.draws += 1
        rng = random.Random(f"{self.seed}/{item}/{self.draws // len(self)}")
        captions, wrong, full = [], [], []
        for row in self.rows[item]:
            record = self.records[row]
            full.append(rng.random() < self.full)
            captions.append(caption(record.scene, record.camera, rng, detail="full" if full[-1] else "some"))
            wrong += [
                caption(counterfactual(record.scene, rng), record.camera, rng, detail="full")
                for _ in range(self.negatives)
            ]
        return {
            "images": self.images[self.rows[item]],
            "captions": captions,
            "wrong": wrong,
            "full": full,
            "looks": [looks(self.records[row].scene) for row in self.rows[item]],
            "scenes": [
                4 * record.family + record.scene_index for record in map(self.records.__getitem__, self.rows[item])
            ],
            "family": item,
        }


def looks(scene: Scene) -> list[int]:
    """For each colour, the index of the shape of the scene's only object of that colour, or -1."""
    found = []
    for colour in COLOURS:
        shapes = [thing.shape for thing in scene.objects if thing.colour == colour]
        found.append(SHAPES.index(shapes[0]) if len(shapes) == 1 else -1)
    return found


def collate(tokenizer: CLIPTokenizer) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """A function that joins families into tensors for `losses`."""

    def tokens(texts: list[str]) -> Tensor:
        return tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]

    rng = random.Random(0)

    def phrases() -> list[str]:
        template = rng.choice(ENGLISH.alone)
        nouns = [rng.choice(ENGLISH.shapes[shape])[0] for shape in SHAPES]
        named = [f"{ENGLISH.indefinite('', colour)} {colour} {noun}" for colour in COLOURS for noun in nouns]
        return [template.format(phrase) for phrase in named]

    def join(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = torch.from_numpy(np.concatenate([item["images"] for item in items]))
        return {
            "pixels": images.permute(0, 3, 1, 2).float() / 255,
            "tokens": tokens([text for item in items for text in item["captions"]]),
            "wrong_tokens": tokens([text for item in items for text in item["wrong"]]),
            "phrase_tokens": tokens(phrases()),
            "looks": torch.tensor([row for item in items for row in item["looks"]]),
            "full": torch.tensor([flag for item in items for flag in item["full"]]),
            "scene": torch.tensor([index for item in items for index in item["scenes"]]),
            "family": torch.tensor([item["family"] for item in items for _ in item["captions"]]),
        }

    return join


def augment(
    pixels: Float[Tensor, "b 3 h w"], strength: float = 1.0, zoom_out: float = 1.12
) -> Float[Tensor, "b 3 h w"]:
    """Random zoom and shift, brightness, contrast, blur and noise; no flips, which would turn left into right."""
    b = len(pixels)
    if strength == 0:
        return pixels
    with pixels.device:  # random numbers are made there
        zoom = torch.empty(b, 1, 1).uniform_(1 - 0.28 * strength, zoom_out)
        shift = torch.empty(b, 2, 1).uniform_(-1, 1) * (0.08 * strength + 0.8 * (1 - zoom).abs())
        theta = torch.cat([torch.eye(2).expand(b, 2, 2) * zoom, shift], dim=2)  # (b, 2, 3)
        grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
        pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
        blurred = F.interpolate(
            F.interpolate(pixels, scale_factor=0.4, mode="area"), size=pixels.shape[2:], mode="bilinear"
        )
        share = (torch.rand(b, 1, 1, 1) < 0.25 * strength).float() * torch.rand(b, 1, 1, 1)
        pixels = torch.lerp(pixels, blurred, share)
        light = torch.empty(b, 1, 1, 1).uniform_(-0.2, 0.2) + torch.empty(b, 3, 1, 1).uniform_(-0.05, 0.05)
        gain = 1 + strength * light
        mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
        pixels = mean + (pixels - mean) * (1 + strength * torch.empty(b, 1, 1, 1).uniform_(-0.2, 0.2))
        pixels = pixels * gain + torch.randn_like(pixels) * (0.04 * strength * torch.rand(b, 1, 1, 1))
    return pixels.clamp(0, 1)


def encode_images(model: CLIPModel, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
    """Unit embeddings of images in [0, 1]."""
    normalised = (pixels - MEAN[0]) / STD[0]
    pooled = model.vision_model(pixel_values=normalised).pooler_output
    return F.normalize(model.visual_projection(pooled).float(), dim=-1)


def encode_texts(model: CLIPModel, tokens: Tensor) -> Float[Tensor, "b e"]:
    """Unit embeddings of padded token ids (b, t)."""
    pooled = model.text_model(input_ids=tokens).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=-1)


def symmetric_cross_entropy(similarity: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """Mean cross entropy of the right column for each row and the right row for each column: those of its number."""
    target = torch.arange(len(similarity), device=similarity.device)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


def contrastive_loss(
    images: Float[Tensor, "n e"],
    texts: Float[Tensor, "n e"],
    wrong: Float[Tensor, "n m e"],
    scale: Float[Tensor, ""],
    comparable: Bool[Tensor, "n n"],
) -> Float[Tensor, ""]:
    """Mean cross entropy of the right text for each image and the right image for each text (Radford et al. 2021).

    Args:
        wrong: further wrong texts of each image.
        scale: factor on the cosine similarities, the inverse temperature.
        comparable: False where text j may also be true of image i, which then counts neither way.
    """
    similarity = (scale * images @ texts.T).masked_fill(~comparable, -torch.inf)  # (images, texts)
    further = scale * torch.einsum("ne,nme->nm", images, wrong)
    target = torch.arange(len(images), device=images.device)
    to_text = F.cross_entropy(torch.cat([similarity, further], dim=1), target)
    return (to_text + F.cross_entropy(similarity.T, target)) / 2


def view_loss(first: Float[Tensor, "s e"], second: Float[Tensor, "s e"], temperature: float = 0.1) -> Float[Tensor, ""]:
    """Symmetric cross entropy that tells a scene's second view among the other scenes' (Chen et al. 2020, eq. 1)."""
    return symmetric_cross_entropy(first @ second.T / temperature)


def phrase_loss(
    images: Float[Tensor, "n e"],
    phrases: Float[Tensor, "c s e"],
    looks: Int[Tensor, "n c"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Mean cross entropy of the right shape for every object, among phrases of its colour with each of the shapes.

    Args:
        phrases: one for each colour and shape; pairs that are held out of training count neither way.
        looks: index of the shape that the image shows in each colour, or -1.
    """
    similarity = scale * torch.einsum("ne,cse->ncs", images, phrases)
    held_out = torch.tensor([[(c, s) in HELD_OUT for s in SHAPES] for c in COLOURS], device=images.device)
    similarity = similarity.masked_fill(held_out, -torch.inf)
    return F.cross_entropy(similarity.flatten(0, 1), looks.flatten(), ignore_index=-1)


def losses(model: CLIPModel, batch: dict[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The image-text, view and phrase losses of one batch, whose rows alternate between the two views of a scene."""
    images = encode_images(model, pixels)  # (n, e)
    texts = encode_texts(model, batch["tokens"])  # (n, e)
    wrong = encode_texts(model, batch["wrong_tokens"]).unflatten(0, (len(texts), -1))  # (n, m, e)
    same_scene = batch["scene"][:, None] == batch["scene"][None]
    same_family = batch["family"][:, None] == batch["family"][None]
    ambiguous = same_scene | (same_family & ~batch["full"][None])  # a short caption may fit its whole family
    comparable = ~ambiguous | torch.eye(len(images), dtype=torch.bool, device=images.device)
    scale = model.logit_scale.exp().clamp(max=100)
    phrases = encode_texts(model, batch["phrase_tokens"]).unflatten(0, (len(COLOURS), len(SHAPES)))
    return (
        contrastive_loss(images, texts, wrong, scale, comparable),
        view_loss(images[0::2], images[1::2]),
        phrase_loss(images, phrases, batch["looks"], scale),
    )


class Contrastive(LightningModule):
    """Optimizer, schedule and logging around the losses of a CLIP."""

    def __init__(self, model: CLIPModel, config: Config) -> None:
        super().__init__()
        self.model, self.config = model, config

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = MuonAndAdam(
            self.model,
            hidden=".layers.",
            lr_muon=self.config.lr_muon,
            lr=self.config.lr_adam,
            weight_decay=self.config.weight_decay,
            betas=(0.9, 0.98),
        )
        return scheduled(optimizer, warmup_cosine(WARMUP, self.config.steps))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        text, view, phrase = losses(
            self.model, batch, augment(batch["pixels"], self.config.augmentation, self.config.zoom_out)
        )
        loss = text + self.config.view_weight * view + self.config.phrase_weight * phrase
        scores = {"train/text": text, "train/view": view, "train/phrase": phrase}
        self.log_dict(scores | {"train/scale": self.model.logit_scale.exp()}, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        text, view, phrase = losses(self.model, batch, batch["pixels"])
        scores = {"val/loss": text, "val/view": view, "val/phrase": phrase}
        self.log_dict(scores, prog_bar=True, batch_size=len(batch["pixels"]))


def main(config: Config) -> None:
    """Train the tokenizer and the model; write them with the run's record."""
    start(config.runtime)
    require_at_least("zoom_out", config.zoom_out, 1)
    train = Families(
        config.scenes,
        "train",
        negatives=config.negatives,
        full=config.full_captions,
        seed=config.runtime.seed,
        most=config.max_objects,
        max_shards=config.max_shards,
    )
    valid = Families(
        config.scenes, "val", negatives=config.negatives, full=1.0, seed=config.runtime.seed, most=config.max_objects
    )
    directory = config.out / "clip-tiny"
    if config.init:
        tokenizer = CLIPTokenizer.from_pretrained(config.init)
        tokenizer.save_pretrained(directory)
        model = CLIPModel.from_pretrained(config.init, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(
            [text for record in train.records for text in (*record.captions, record.full_caption)], directory
        )
        model = build_model(tokenizer)
    model.train()
    join = collate(tokenizer)
    order = BatchOrder(len(train), config.families, seed=config.runtime.seed)
    trainer = build_trainer(
        TrainerConfig(
            max_steps=config.steps,
            val_every=config.val_every,
            precision=config.precision,
            device=config.runtime.device,
        ),
        config.out / "run",
    )
    print(
        f"{len(train.images):,} images, {model.num_parameters():,} parameters, {config.steps:,} steps "
        f"= {config.steps / len(order):.1f} epochs"
    )
    begun = time.process_time()
    fit(
        trainer,
        Contrastive(model, config),
        config.out / "run",
        train_dataloaders=ResumableLoader(train, order, collate_fn=join),
        val_dataloaders=torch.utils.data.DataLoader(valid, batch_size=config.families, collate_fn=join),
    )
    record = {
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "parameters": model.num_parameters(),
        "images": len(train.images),
        "epochs": round(config.steps / len(order), 2),
        "cpu_seconds": round(time.process_time() - begun),
        "temperature": math.exp(-model.logit_scale.item()),
        **provenance(),
    }
    model.half().save_pretrained(directory)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    ).save_pretrained(directory)
    (directory / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(tyro.cli(Config))))
