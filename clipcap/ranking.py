"""Captions in the order of what both models say of them: the language model's probability and CLIP's similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from clipcap.search import Caption
from common.checks import UserError
from common.clip import FrozenCLIP

WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Of CLIP's similarity, among which `clipcap calibrate` chooses."""
BEAMS = ("beam", "beam_original")
"""Strategies that find more captions than they are asked for."""


@torch.inference_mode()
def similarities(
    clip: FrozenCLIP, embeddings: Float[Tensor, "b e"], texts: Sequence[Sequence[str]]
) -> list[Float[Tensor, " c"]]:
    """Cosines of each image with its texts, on the CPU.

    Args:
        clip: has a text tower.
        embeddings: of the images, CLIP's.
        texts: of each image.
    """
    counts = [len(several) for several in texts]
    words = F.normalize(clip.encode_texts([text for several in texts for text in several]).float(), dim=-1)
    owners = [image for image, count in enumerate(counts) for _ in range(count)]
    images = F.normalize(embeddings.float(), dim=-1)[owners]
    return list((words * images).sum(dim=1).cpu().split(counts))


def reranked(
    captions: Sequence[Caption], similarity: Float[Tensor, " c"] | Sequence[float], weight: float
) -> list[Caption]:
    """By mean log-probability of a token + weight x cosine of image and caption, best first; ties stay in order."""
    known = [replace(caption, similarity=float(one)) for caption, one in zip(captions, similarity, strict=True)]
    return sorted(known, key=lambda caption: -(caption.score + weight * (caption.similarity or 0.0)))


def pool_of(options: dict[str, Any]) -> dict[str, Any]:
    """`decode`'s options with all that the search finds instead of the best alone."""
    if options.get("strategy", "beam") not in BEAMS:
        return options
    return options | {"num_captions": max(options.get("num_captions", 1), options.get("num_beams", 5))}


def require_ranker(clip: FrozenCLIP, weight: float) -> None:
    """Raise UserError for a negative weight, or one that is not 0 with a CLIP that has no text tower."""
    if not 0 <= weight < float("inf"):
        raise UserError(f"rerank is {weight}: use 0, which leaves the order to the language model, or more.")
    if weight and not clip.has_text:
        raise UserError(f"rerank is {weight} but CLIP {clip.name!r} has no text tower: leave it out, or give 0.")
