"""Scores of the tiny CLIP on held-out scenes: retrieval, zero-shot attributes and similarity between views.

    python -m experiments.backbones.evaluate_clip --clip out/clip/clip-tiny --split test

Choices are made with `--split val`; the numbers on the model's card are those of `--split test`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from common.checks import run_command
from common.clip import FrozenCLIP, load_clip
from common.files import write_json
from experiments import from_command_line
from experiments.scenes.dataset import load_split
from experiments.scenes.graph import ATTRIBUTES, HELD_OUT
from experiments.scenes.records import ViewRecord

MOST_CANDIDATES = 500
PHRASES: dict[str, Callable[[str, str, str, str], str]] = {
    "plain": lambda size, colour, material, shape: f"a {size} {colour} {material} {shape}",
    "photo": lambda size, colour, material, shape: f"a photo of a {size} {colour} {material} {shape}",
    "picture": lambda size, colour, material, shape: f"the picture shows a {size} {colour} {material} {shape}",
    "there is": lambda size, colour, material, shape: f"there is a {size} {colour} {material} {shape}",
}
"""Prompt templates; the first is used alone where templates are not ensembled."""


@dataclass(frozen=True)
class Config:
    """Score a CLIP on held-out scenes."""

    clip: str = "tiny"
    """CLIP to score."""
    scenes: Path = Path("out/scenes")
    """Directory written by experiments/scenes/render.py."""
    split: Literal["val", "test"] = "test"
    """Split to score on."""
    out: Path = Path("out/clip/scores.json")
    """JSON file to write."""


@torch.no_grad()
def embed_images(clip: FrozenCLIP, images: np.ndarray, batch: int = 100) -> Float[Tensor, "n e"]:
    """Unit embeddings of images (n, h, w, 3) uint8."""
    parts = [
        clip.encode_images(clip.preprocess([Image.fromarray(image) for image in images[i : i + batch]]))
        for i in range(0, len(images), batch)
    ]
    return F.normalize(torch.cat(parts).float(), dim=-1)


@torch.no_grad()
def embed_texts(clip: FrozenCLIP, texts: Sequence[str], batch: int = 500) -> Float[Tensor, "n e"]:
    """Unit embeddings of texts."""
    parts = [clip.encode_texts(list(texts[i : i + batch])) for i in range(0, len(texts), batch)]
    return F.normalize(torch.cat(parts).float(), dim=-1)


def recall(similarity: Float[Tensor, "q c"], k: int) -> float:
    """Share of queries whose own candidate (the same index) is among the k most similar."""
    top = similarity.topk(min(k, similarity.shape[1]), dim=1).indices  # (q, k)
    own = torch.arange(len(similarity))[:, None]
    return (top == own).any(1).float().mean().item()


def distinct_rows(records: Sequence[ViewRecord], most: int) -> list[int]:
    """One view of each of up to `most` scenes, no two of which have the same objects."""
    seen: set[Any] = set()
    rows: list[int] = []
    for row, record in enumerate(records):
        key = tuple(sorted((o.shape, o.colour, o.material, o.size) for o in record.scene.objects))
        if key not in seen and len(rows) < most:
            seen.add(key)
            rows.append(row)
    return rows


def class_embeddings(clip: FrozenCLIP, attribute: str, *, ensemble: bool) -> Float[Tensor, "c e"]:
    """One embedding per value of an attribute: the mean over prompts with all values of the other attributes."""
    templates = list(PHRASES.values())[: None if ensemble else 1]
    classes = []
    for value in ATTRIBUTES[attribute]:
        prompts = []
        for template in templates:
            for colour in ATTRIBUTES["colour"]:
                for shape in ATTRIBUTES["shape"]:
                    for material in ATTRIBUTES["material"]:
                        for size in ATTRIBUTES["size"]:
                            named = {"colour": colour, "shape": shape, "material": material, "size": size}
                            looks = (named["colour"], named["shape"])
                            if named[attribute] == value and looks not in HELD_OUT:
                                prompts.append(template(size, colour, material, shape))
        classes.append(F.normalize(embed_texts(clip, prompts).mean(0), dim=0))
    return torch.stack(classes)


def zero_shot(images: Float[Tensor, "n e"], classes: Float[Tensor, "c e"], labels: Int[Tensor, " n"]) -> float:
    """Share of images whose most similar class is theirs."""
    return ((images @ classes.T).argmax(1) == labels).float().mean().item()


def view_similarity(images: Float[Tensor, "n e"], records: Sequence[ViewRecord]) -> dict[str, float]:
    """Cosine similarity between the two views of a scene, and between different families' scenes."""
    family = torch.tensor([record.family for record in records])
    within = (images[0::2] * images[1::2]).sum(-1)  # (s,)
    across = (images @ images.T)[family[:, None] != family[None]]
    return {
        "within_scene": within.mean().item(),
        "across_scenes": across.mean().item(),
        "within_scene_5th_percentile": within.quantile(0.05).item(),
        "separation_auc": _auc(within, across),
    }


def _auc(positive: Tensor, negative: Tensor) -> float:
    """Chance that a value of `positive` is above one of `negative`."""
    ordered = negative.sort().values
    return (torch.searchsorted(ordered, positive).float() / len(ordered)).mean().item()


def evaluate(clip: FrozenCLIP, images: np.ndarray, records: Sequence[ViewRecord]) -> dict[str, Any]:
    """All scores of one split."""
    embeddings = embed_images(clip, images)
    with torch.no_grad():
        tokens = torch.cat(
            [
                clip.encode_image_features(
                    clip.preprocess([Image.fromarray(x) for x in images[i : i + 100]])
                ).class_token
                for i in range(0, len(images), 100)
            ]
        )
    rows = distinct_rows(records, MOST_CANDIDATES)
    texts = embed_texts(clip, [records[row].full_caption for row in rows])
    similarity = embeddings[rows] @ texts.T
    result: dict[str, Any] = {
        "candidates": len(rows),
        "image_to_text": {f"recall@{k}": recall(similarity, k) for k in (1, 5)},
        "text_to_image": {f"recall@{k}": recall(similarity.T, k) for k in (1, 5)},
        "chance": {f"recall@{k}": k / len(rows) for k in (1, 5)},
        "zero_shot": {},
    }
    single = [row for row, record in enumerate(records) if len(record.scene.objects) == 1]
    for attribute, values in ATTRIBUTES.items():
        labels = torch.tensor([values.index(getattr(records[row].scene.objects[0], attribute)) for row in single])
        result["zero_shot"][attribute] = {
            "one_template": zero_shot(embeddings[single], class_embeddings(clip, attribute, ensemble=False), labels),
            "ensemble": zero_shot(embeddings[single], class_embeddings(clip, attribute, ensemble=True), labels),
            "chance": 1 / len(values),
            "images": len(single),
        }
    result["view_similarity"] = {
        "embedding": view_similarity(embeddings, records),
        "class_token": view_similarity(F.normalize(tokens.float(), dim=-1), records),
    }
    return result


def main(config: Config) -> None:
    """Score, print and write."""
    clip = load_clip(config.clip, device="cpu")
    clip.require_text("zero-shot classification")
    images, records = load_split(config.scenes, config.split)
    result: dict[str, Any] = {"clip": config.clip, "split": config.split, "images": len(images)}
    result |= evaluate(clip, images, records)
    write_json(config.out, result)
    for name in ("image_to_text", "text_to_image", "zero_shot", "view_similarity"):
        print(
            name,
            {
                k: {a: round(b, 3) for a, b in v.items()} if isinstance(v, dict) else round(v, 3)
                for k, v in result[name].items()
            },
        )


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
