"""What every reader gives: an image with its captions, checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clipcap.data.readers.text import whole_characters
from common.checks import UserError

SPLITS = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class CaptionedImage:
    """An image file with its reference captions."""

    image_id: str
    path: Path
    captions: tuple[str, ...]
    split: str
    """train, val or test."""
    domain: str = ""
    """nocaps: in-domain, near-domain or out-domain."""
    embedding_row: int | None = None
    """Where the source holds CLIP embeddings instead of images: the row in it; `path` is the source itself."""
    view: int = 0
    """0 for the image as it is, else the number of a random view of it (`clipcap.data.views`)."""


def hash_share(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def check_captions(captions: Iterable[str], where: str) -> tuple[str, ...]:
    kept = tuple(whole_characters(caption).strip() for caption in captions if caption.strip())
    if not kept:
        raise UserError(f"{where}: the image has no caption that is not empty.")
    return kept
