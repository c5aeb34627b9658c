"""What every reader gives: an image with its captions, checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipcap.data.readers.text import whole_characters
from common.checks import UserError

SPLITS = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SPLIT_WORD = re.compile(rf"(?<![a-z0-9])({'|'.join(SPLITS)})\d*(?![a-z0-9])", re.IGNORECASE)


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


def split_in(name: str) -> tuple[str, str]:
    """The split that a file's or folder's name says as a word of its own ("captions_val2014"), and that word.

    Both are empty where the name says none ("latest", "carnival") or several ("train_val").
    """
    words = list(_SPLIT_WORD.finditer(name))
    splits = {SPLITS[word[1].lower()] for word in words}
    return (splits.pop(), words[0][0]) if len(splits) == 1 else ("", "")


def split_of_folder(name: str) -> str:
    """The split that a folder is for by its whole name ("Test", "val2017"), or nothing."""
    word = _SPLIT_WORD.fullmatch(name)
    return SPLITS[word[1].lower()] if word else ""


def check_captions(captions: Iterable[object], where: str) -> tuple[str, ...]:
    """The captions that are not empty, nor null or NaN, which tables hold where there is none.

    Raises:
        UserError: something else than text, or nothing left.
    """
    kept = []
    for caption in captions:
        if caption is None or isinstance(caption, float) and caption != caption:
            continue
        if not isinstance(caption, str):
            raise UserError(f"{where}: a caption is {str(caption)[:60]!r}, a {type(caption).__name__}: give text.")
        if caption.strip():
            kept.append(whole_characters(caption).strip())
    if not kept:
        raise NoCaption(f"{where}: the image has no caption that is not empty: add one, or use --skip-missing.")
    return tuple(kept)


class NoCaption(UserError):
    """An image without a caption."""


@dataclass
class Gaps:
    """What to do with an image, or a row of one, without a caption: an error, or leave it out and count it."""

    skip: bool = False
    count: int = 0
    first: str = ""

    def check(self, captions: Iterable[object], where: str) -> tuple[str, ...]:
        """As `check_captions`, but empty where there is none and that is no error."""
        try:
            return check_captions(captions, where)
        except NoCaption:
            if not self.skip:
                raise
        self.count += 1
        self.first = self.first or where
        return ()


def place_of(name: str, roots: Sequence[Path], folders: Sequence[str]) -> Path:
    """The first place where a file is; the first of all where it is nowhere."""
    places = [root / folder / name for root in roots for folder in folders]
    return next((place for place in places if place.is_file()), places[0])
