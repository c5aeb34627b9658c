"""Embeddings of image files and texts by a frozen encoder, in batches, with progress; what cannot be read is named."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from common.checks import UserError, printable, require_at_least
from common.images import ImageLimit, decode_image
from common.probes import class_weights, fill
from common.runtime import RuntimeConfig, autocast, start

if TYPE_CHECKING:
    from common.clip import FrozenCLIP

Features = Literal["embedding", "class_token"]
TEXTS = 256
"""Texts encoded at once."""
NAMED = 10
"""Images that cannot be read, named on standard error; results.json names all."""


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder, and how it runs."""

    clip: str = "photo"
    """Encoder: photo or tiny (packaged, of photographs and of rendered scenes), a Hugging Face id or directory,
    open_clip:ARCH/TAG-or-path, timm:NAME[/PATH] or torchvision:NAME[/PATH]."""
    batch_size: int = 32
    """Images encoded at once."""
    limit: ImageLimit = field(default_factory=ImageLimit)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def load(config: EncoderConfig, *, text_for: str = "") -> FrozenCLIP:
    """The encoder, on its device.

    Args:
        config: its name and where it runs.
        text_for: what needs a text tower.

    Raises:
        UserError: it cannot be loaded, or has no text tower that is needed.
    """
    from common.clip import load_clip

    require_at_least("batch_size", config.batch_size, 1)
    clip = load_clip(config.clip, device=start(config.runtime))
    if text_for:
        clip.require_text(text_for)
    return clip


def embed_images(
    clip: FrozenCLIP, paths: Sequence[Path], config: EncoderConfig, features: Features = "embedding"
) -> tuple[Float[Tensor, "n w"], list[int], dict[str, str]]:
    """Features of image files, as the encoder gives them, on the CPU.

    Returns:
        The features of those that can be read, their rows in `paths`, and reasons by path for the others, of which
        the first are named on standard error.

    Raises:
        UserError: none can be read, or the encoder gives NaN.
    """
    from common.progress import Progress

    parts: list[Tensor] = []
    kept: list[int] = []
    skipped: dict[str, str] = {}
    with Progress(total=len(paths), desc=f"embedding images with {printable(clip.name)}", unit=" images") as bar:
        for begin in range(0, len(paths), config.batch_size):
            images = []
            for row, path in enumerate(paths[begin : begin + config.batch_size], start=begin):
                try:
                    pixels = decode_image(
                        path, f"image {str(path)!r}", max_pixels=config.limit.max_pixels, side=clip.image_size
                    )
                except OSError as error:
                    skipped[str(path)] = f"image {str(path)!r} cannot be read ({error.strerror or error})."
                except UserError as error:
                    skipped[str(path)] = str(error)
                else:
                    images.append(clip.preprocess(pixels))
                    kept.append(row)
            if images:
                with autocast(clip.device, config.runtime.precision):
                    found = clip.encode_image_features(torch.cat(images), packed=True)
                parts.append(getattr(found, features).float().cpu())
                if not parts[-1].isfinite().all():
                    raise UserError(f"{clip.name!r} gives NaN or infinity for images like {str(paths[kept[-1]])!r}.")
            bar.update(len(paths[begin : begin + config.batch_size]))
    if skipped:
        print(f"skipped {len(skipped)} of {len(paths)} images:", file=sys.stderr)
        for reason in list(skipped.values())[:NAMED]:
            print(f"  {printable(reason)}", file=sys.stderr)
    if not parts:
        raise UserError(
            f"none of the {len(paths)} images can be read: {next(iter(skipped.values()), 'there are none')}"
        )
    return torch.cat(parts), kept, skipped


def embed_texts(clip: FrozenCLIP, texts: Sequence[str]) -> Float[Tensor, "t e"]:
    """Unit embeddings of texts, on the CPU.

    Raises:
        UserError: no texts, or an encoder without a text tower.
    """
    from common.progress import Progress

    parts = []
    with Progress(total=len(texts), desc="embedding texts", unit=" texts", delay=2) as bar:
        for begin in range(0, max(1, len(texts)), TEXTS):
            some = texts[begin : begin + TEXTS]
            parts.append(F.normalize(clip.encode_texts(some).float(), dim=-1).cpu())
            bar.update(len(some))
    return torch.cat(parts)


def embed_classes(clip: FrozenCLIP, classes: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "c e"]:
    """A unit vector for each class: its prompts by all templates, ensembled (`common.probes.class_weights`)."""
    prompts = [prompt for name in classes for prompt in fill(templates, name)]
    return class_weights(embed_texts(clip, prompts).unflatten(0, (len(classes), len(templates))))
