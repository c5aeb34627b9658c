"""Captioned images: readers for Karpathy JSON and folders, and the data set of (embedding, caption) pairs."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipcap.images import IMAGE_SUFFIXES
from common.checks import UserError, require_directory, require_file
from common.language import IGNORE
from common.training import BatchOrder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from clipcap.embeddings import EmbeddingStore

TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
SPLITS = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_IMAGE_KEYS = ("file_name", "filename", "image", "path")
_CAPTION_KEYS = ("caption", "text", "captions", "description")


@dataclass(frozen=True)
class CaptionedImage:
    """An image file with its reference captions."""

    image_id: str
    path: Path
    captions: tuple[str, ...]
    split: str
    """train, val or test."""


def read_dataset(
    source: Path, *, images: Path | None = None, val_share: float = 0.1, skip_missing: bool = False
) -> list[CaptionedImage]:
    """Read a Karpathy JSON file, or a folder of images with a CSV, JSON Lines or sidecar text files.

    A folder holds `captions.csv` or `captions.jsonl` (columns file_name and caption; several rows may name one image;
    an optional column split), or next to each image a text file of the same stem with a caption a line.

    Args:
        source: the JSON file or the folder.
        images: directory of the images, when it is not beside `source`.
        val_share: share of the images held out for validation where the source names no splits (by a hash of the id).
        skip_missing: leave out captions whose image is not there, instead of an error.

    Raises:
        UserError: a file cannot be read (the row is named), an image is missing, or nothing is left.
    """
    source = Path(source)
    if images is not None:
        require_directory(images, "image directory")
    if source.is_dir():
        found = list(_read_folder(source, images or source))
    else:
        require_file(source, "caption file")
        found = list(_read_karpathy(source, images))
    if not found:
        raise UserError(f"{str(source)!r} holds no captioned image: see `clipcap train --help` for the layouts.")
    seen: set[str] = set()
    for item in found:
        if item.image_id in seen:
            raise UserError(f"{str(source)!r}: image id {item.image_id!r} occurs twice: make the ids distinct.")
        seen.add(item.image_id)
    missing = [item for item in found if not item.path.is_file()]
    if missing and not skip_missing:
        raise UserError(
            f"{str(source)!r} names {len(missing)} images that are not there, the first {str(missing[0].path)!r}: "
            f"give their directory with --images, or leave them out with --skip-missing."
        )
    if len(missing) == len(found):
        raise UserError(f"none of the {len(found)} images that {str(source)!r} names is there: check --images.")
    absent = {item.image_id for item in missing}
    kept = [item for item in found if item.image_id not in absent]
    if any(item.split for item in kept):
        return [item if item.split else _with_split(item, "train") for item in kept]
    return [_with_split(item, "val" if _hash_share(item.image_id) < val_share else "train") for item in kept]


def _with_split(item: CaptionedImage, split: str) -> CaptionedImage:
    return CaptionedImage(item.image_id, item.path, item.captions, split)


def _hash_share(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _read_karpathy(path: Path, images: Path | None) -> Iterator[CaptionedImage]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"caption file {str(path)!r} is not UTF-8 (byte {error.start}): convert it.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"caption file {str(path)!r} is not JSON, line {error.lineno}: {error.msg}.") from None
    rows = data.get("images") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "sentences" in row for row in rows):
        raise UserError(
            f"caption file {str(path)!r} is not Karpathy's layout: it needs a list 'images' of objects with "
            f"'filename' and 'sentences'."
        )
    root = images or (path.parent / "images" if (path.parent / "images").is_dir() else path.parent)
    for number, row in enumerate(rows):
        try:
            name = str(row["filename"])
            captions = tuple(str(sentence["raw"]).strip() for sentence in row["sentences"])
            split = SPLITS[row.get("split", "train")]
        except (KeyError, TypeError) as error:
            raise UserError(f"caption file {str(path)!r}, images[{number}]: no or unknown {error}.") from None
        captions = _check_captions(captions, f"caption file {str(path)!r}, images[{number}]")
        # The id is the file's name: COCO's cocoid and Flickr's imgid are not in every file.
        yield CaptionedImage(name, root / row.get("filepath", "") / name, captions, split)


def _read_folder(folder: Path, images: Path) -> Iterator[CaptionedImage]:
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is None:
        files = sorted(p for p in images.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UserError(f"folder {str(images)!r} holds no image: put images and captions in it.")
        for file in files:
            sidecar = file.with_suffix(".txt")
            if sidecar.is_file():
                lines = tuple(_read_text(sidecar).splitlines())
                captions = _check_captions(lines, f"caption file {str(sidecar)!r}")
                yield CaptionedImage(str(file.relative_to(images)), file, captions, "")
        return
    grouped: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for number, row in _rows(table):
        where = f"caption file {str(table)!r}, line {number}"
        name = next((row[key] for key in _IMAGE_KEYS if row.get(key)), None)
        text = next((row[key] for key in _CAPTION_KEYS if row.get(key)), None)
        if name is None or text is None:
            raise UserError(f"{where}: it needs a {_IMAGE_KEYS[0]!r} and a {_CAPTION_KEYS[0]!r}.")
        texts = text if isinstance(text, list) else [text]
        grouped.setdefault(str(name), []).extend(_check_captions(tuple(map(str, texts)), where))
        if row.get("split"):
            if row["split"] not in SPLITS:
                raise UserError(f"{where}: split is {row['split']!r}: use train, val or test.")
            splits[str(name)] = SPLITS[row["split"]]
    for name, several in grouped.items():
        yield CaptionedImage(name, images / name, tuple(several), splits.get(name, ""))


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV or JSON Lines file with their line numbers."""
    text = _read_text(table)
    if table.suffix == ".csv":
        reader = csv.DictReader(text.splitlines())
        for row in reader:
            yield reader.line_num, row
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"caption file {str(table)!r}, line {number} is not JSON: {error.msg}.") from None
            if not isinstance(row, dict):
                raise UserError(f"caption file {str(table)!r}, line {number} is not a JSON object.")
            yield number, row


def _read_text(path: Path) -> str:
    try:
        return require_file(path, "caption file").read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"caption file {str(path)!r}, line {line} is not UTF-8: convert it.") from None


def _check_captions(captions: Sequence[str], where: str) -> tuple[str, ...]:
    kept = tuple(caption.strip() for caption in captions if caption.strip())
    if not kept:
        raise UserError(f"{where}: the image has no caption that is not empty.")
    return kept


class CaptionDataset(Dataset[dict[str, Any]]):
    """One item per caption: the image's embedding and the caption's token ids, which end with the end token."""

    def __init__(
        self,
        items: Sequence[CaptionedImage],
        store: EmbeddingStore,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
    ) -> None:
        self.store = store
        self.pairs: list[tuple[int, list[int]]] = []
        kept = [item for item in items if item.image_id in store]
        texts = [caption for item in kept for caption in item.captions]
        rows = [store.row(item.image_id) for item in kept for _ in item.captions]
        if not texts:
            raise UserError("no captioned image is left to train on: check the messages about skipped images.")
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for row, ids in zip(rows, encoded, strict=True):
            self.pairs.append((row, [*ids[: max_tokens - 1], tokenizer.eos_token_id]))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, ids = self.pairs[index]
        return {"embedding": self.store[row], "ids": ids}


class BucketedOrder(BatchOrder):
    """Batches of captions of similar length, in random order, so that little of a batch is padding."""

    POOL = 50
    """Batches whose captions are sorted by length together."""

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int = 0) -> None:
        super().__init__(len(lengths), batch_size, seed=seed)
        self.lengths = np.asarray(lengths)

    def order(self) -> np.ndarray:
        """A random permutation, sorted by length within pools; then the batches change places."""
        shuffled = super().order()
        pool = self.POOL * self.batch_size
        pools = [shuffled[i : i + pool] for i in range(0, len(shuffled), pool)]
        ordered = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in pools])
        whole = len(ordered) // self.batch_size * self.batch_size
        batches = ordered[:whole].reshape(-1, self.batch_size)
        mixed = np.random.default_rng((self.seed, self.epoch, 1)).permutation(batches)
        return np.concatenate([mixed.ravel(), ordered[whole:]])


def collate(pad_id: int) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Join items into `clip_embeddings`, `input_ids` padded to the longest, `attention_mask` and `labels`."""

    def join(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(item["ids"]) for item in items)
        ids = torch.full((len(items), longest), pad_id)
        mask = torch.zeros(len(items), longest, dtype=torch.long)
        for row, item in enumerate(items):
            ids[row, : len(item["ids"])] = torch.tensor(item["ids"])
            mask[row, : len(item["ids"])] = 1
        return {
            "clip_embeddings": torch.stack([item["embedding"] for item in items]),
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, IGNORE),
        }

    return join
