"""Training on text alone: noisy embeddings of captions stand in for images (CapDec, Nukrai et al. 2022).

CLIP puts an image and its caption at nearby places, so a decoder of captions' embeddings decodes images', once noise
has taught it that a caption may be some way off (sec. 3.2).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from clipcap.data.dataset import CaptionedImage
from clipcap.data.embeddings import clip_fingerprint
from clipcap.data.readers.captioned import hash_share
from common.checks import UserError, require_file
from common.files import alone, write_json
from common.pretrained import saving

if TYPE_CHECKING:
    from common.clip import FrozenCLIP

NOWHERE = Path()
"""Path of an item that has no image."""


def inject_noise(embeddings: Float[Tensor, "b e"], variance: float) -> Float[Tensor, "b e"]:
    """normalise(normalise(embedding) + n), n ~ N(0, variance) in every component (Nukrai et al. 2022, eq. 1)."""
    unit = F.normalize(embeddings.float(), dim=-1)
    return F.normalize(unit + variance**0.5 * torch.randn_like(unit), dim=-1)


def read_captions(path: Path, *, val_share: float = 0.1) -> list[CaptionedImage]:
    """A text file with a caption a line, as items without images; a share is held out by a hash of the caption.

    Raises:
        UserError: the file is missing, empty or not UTF-8.
    """
    try:
        lines = require_file(path, "caption file").read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"caption file {str(path)!r}, line {line} is not UTF-8: convert it.") from None
    texts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not texts:
        raise UserError(f"caption file {str(path)!r} holds no caption: write one a line.")
    return [
        CaptionedImage(f"line {number}", NOWHERE, (text,), "val" if hash_share(text) < val_share else "train")
        for number, text in enumerate(texts, 1)
    ]


def one_item_a_caption(items: Sequence[CaptionedImage]) -> list[CaptionedImage]:
    """Each caption as an item of its own, because each has an embedding of its own."""
    return [
        CaptionedImage(f"{item.image_id}#{number}", NOWHERE, (text,), item.split)
        for item in items
        for number, text in enumerate(item.captions)
    ]


class TextStore:
    """CLIP's embeddings of captions, memory-mapped; to a data set, an embedding store whose images are captions."""

    def __init__(self, ids: Sequence[str], array: Float[np.ndarray, "n e"]) -> None:
        self.array, self.skipped = array, dict[str, str]()
        self._rows = {caption_id: row for row, caption_id in enumerate(ids)}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, caption_id: str) -> bool:
        return caption_id in self._rows

    def row(self, caption_id: str) -> int:
        """Row of a caption."""
        return self._rows[caption_id]

    def __getitem__(self, row: int) -> Float[Tensor, " e"]:
        """One row as float32."""
        return torch.from_numpy(self.array[row].astype(np.float32))


def build_text_store(
    items: Sequence[CaptionedImage],
    clip: FrozenCLIP,
    directory: Path,
    *,
    batch_size: int = 256,
    progress: Callable[[int], object] = lambda done: None,
) -> TextStore:
    """Encode the first caption of each item, or resume an interrupted call.

    Several processes may call this for one directory: one works, the others wait.

    Args:
        items: as `one_item_a_caption` gives them.
        clip: whose text tower.
        directory: where the store is kept; one of other captions or another CLIP there is replaced.
        batch_size: captions encoded at once.
        progress: called with the number of captions done.

    Raises:
        UserError: the encoder has no text tower or gives NaN or infinity, or there is no room for all rows.
    """
    clip.require_text("--text-only")
    directory.mkdir(parents=True, exist_ok=True)
    texts = [item.captions[0] for item in items]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    shape = (len(texts), clip.width)
    key = {"weights": clip_fingerprint(clip), "captions": digest, "shape": list(shape)}
    state_path, path = directory / "text.json", directory / "text.npy"
    with alone(directory):
        done = _rows_done(state_path, key) if _holds(path, shape) else 0
        if done:
            array = np.lib.format.open_memmap(path, mode="r+")
        else:
            state_path.unlink(missing_ok=True)  # before the rows that it counts
            with saving(path, "store of captions' embeddings"):
                path.unlink(missing_ok=True)
                array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
                with open(path, "r+b") as file:  # a map of a file that finds no room kills the process
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        progress(done)
        for begin in range(done, len(texts), batch_size):
            rows = clip.encode_texts(texts[begin : begin + batch_size]).float()
            if not torch.isfinite(rows).all():
                raise UserError(f"{clip.name!r} gives NaN or infinity for captions like {texts[begin]!r}.")
            array[begin : begin + len(rows)] = F.normalize(rows, dim=-1).cpu().numpy()
            array.flush()
            write_json(state_path, {"key": key, "done": begin + len(rows)})
            progress(begin + len(rows))
    return TextStore([item.image_id for item in items], array)


def _rows_done(path: Path, key: dict[str, Any]) -> int:
    """How many rows the state at `path` counts; 0 when it is damaged or of other captions."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        done = state["done"] if state["key"] == key else 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0
    return done if type(done) is int and 0 <= done <= key["shape"][0] else 0


def _holds(path: Path, shape: tuple[int, int]) -> bool:
    """Whether a file is a whole array of `shape`."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # absent or cut short
        return False
    return array.shape == shape and array.dtype == np.float16
