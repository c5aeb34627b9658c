"""Captions as token ids, tokenized once: two flat arrays, memory-mapped when they are kept in a directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.files import whole_file
from common.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 10_000
"""Captions tokenized at once."""


class CaptionTokens(Sequence[list[int]]):
    """Token ids of captions, uncut and without an end token.

    Args:
        ids: all captions' ids one after the other.
        offsets: (n + 1,) where each begins and the last ends.
    """

    def __init__(self, ids: np.ndarray, offsets: np.ndarray) -> None:
        self.ids, self.offsets = np.asarray(ids), np.asarray(offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.ids[self.offsets[index] : self.offsets[index + 1]].tolist()

    @property
    def lengths(self) -> np.ndarray:
        """(n,) ids of each caption."""
        return np.diff(self.offsets)


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, cache: Path | None = None) -> CaptionTokens:
    """Token ids of texts, from the files that an earlier call left in `cache` for this tokenizer and these texts.

    Args:
        texts: captions.
        tokenizer: any; its whole vocabulary and rules are part of the key.
        cache: directory of the files, which may be deleted at any time; None keeps the ids in memory.
    """
    if cache is None:
        return _tokenize(texts, tokenizer)
    key = _key(texts, tokenizer)
    files = cache / f"{key}.ids.npy", cache / f"{key}.offsets.npy"
    try:
        ids, offsets = (np.load(file, mmap_mode="r", allow_pickle=False) for file in files)
        if len(offsets) == len(texts) + 1 and offsets[-1] == len(ids):
            return CaptionTokens(ids, offsets)
    except (OSError, ValueError, EOFError):  # absent or cut short: made again
        pass
    found = _tokenize(texts, tokenizer)
    for file, values in zip(files, (found.ids, found.offsets), strict=True):
        with whole_file(file) as opened:
            np.save(opened, values)
    return CaptionTokens(*(np.load(file, mmap_mode="r") for file in files))


def _tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> CaptionTokens:
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    parts: list[np.ndarray] = [np.empty(0, dtype)]
    lengths: list[np.ndarray] = [np.zeros(1, np.int64)]
    # The bar shows where it takes more than a moment.
    for begin in Progress(
        range(0, len(texts), CHUNK), desc="tokenizing captions", unit_scale=CHUNK, delay=2, leave=False
    ):
        part = tokenizer(list(texts[begin : begin + CHUNK]), add_special_tokens=False, verbose=False)["input_ids"]
        lengths.append(np.fromiter(map(len, part), np.int64, len(part)))
        parts.append(np.fromiter((token for ids in part for token in ids), dtype, int(lengths[-1].sum())))
    return CaptionTokens(np.concatenate(parts), np.cumsum(np.concatenate(lengths)))


def _key(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the tokenizer's vocabulary and rules, and of the texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(rules, dict):  # a call's padding and truncation stay behind in there
        rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
    digest = hashlib.sha256(json.dumps([type(tokenizer).__name__, rules]).encode())
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]
