"""Embedding store: each image encoded once, memory-mapped, with a manifest that makes a mismatch an error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clipcap.images import ImageError, read_image
from common.checks import UserError
from common.runtime import autocast

if TYPE_CHECKING:
    from clipcap.data import CaptionedImage
    from common.clip import FrozenCLIP

Inputs = Literal["embedding", "patches"]
FORMAT = 1


class EmbeddingStore:
    """CLIP embeddings of a set of images: (n, e), or patch features (n, p, w), in one memory-mapped file.

    Raises:
        UserError: the directory holds no finished store, or its file is cut short.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        manifest = self.directory / "manifest.json"
        if not manifest.is_file():
            raise UserError(f"embedding store {str(directory)!r} has no manifest.json: embed the images first.")
        self.manifest: dict[str, Any] = json.loads(manifest.read_text())
        shape = tuple(self.manifest["shape"])
        path = self.directory / "embeddings.bin"
        expected = int(np.prod(shape)) * np.dtype(self.manifest["dtype"]).itemsize
        actual = path.stat().st_size if path.exists() else 0
        if actual != expected:
            raise UserError(f"{str(path)!r} has {actual} bytes instead of {expected}: embed the images again.")
        self.array = np.memmap(path, dtype=self.manifest["dtype"], mode="r", shape=shape)
        self._rows = {image_id: row for row, image_id in enumerate(self.manifest["ids"]) if image_id is not None}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._rows

    def row(self, image_id: str) -> int:
        """Row of an image."""
        return self._rows[image_id]

    def __getitem__(self, row: int) -> Float[Tensor, "..."]:
        """One row as float32: (e,) or (p, w)."""
        return torch.from_numpy(self.array[row].astype(np.float32))

    @property
    def skipped(self) -> dict[str, str]:
        """Images that could not be read, with the reason."""
        return self.manifest["skipped"]


def encode(clip: FrozenCLIP, pixels: Float[Tensor, "b 3 s s"], inputs: Inputs) -> Float[Tensor, "b ..."]:
    """The mapper's input for preprocessed images: the embedding (b, e) or the patch features (b, p, w)."""
    if inputs == "patches":
        return clip.encode_image_features(pixels).patches
    return clip.encode_images(pixels)


def build_store(
    items: Sequence[CaptionedImage],
    clip: FrozenCLIP,
    directory: Path,
    *,
    inputs: Inputs = "embedding",
    batch_size: int = 32,
    dtype: Literal["float16", "float32"] = "float16",
    precision: str = "fp32",
    progress: Callable[[int], object] = lambda done: None,
) -> EmbeddingStore:
    """Encode every image once and return the store; a store of the same images and backbone is used again.

    An interrupted call goes on where it stopped. An image that cannot be read is left out and listed in
    `EmbeddingStore.skipped`.

    Args:
        items: images; their ids are the keys.
        clip: backbone.
        directory: where the store is kept.
        inputs: embedding or patch features.
        batch_size: images encoded at once.
        dtype: of the file.
        precision: of the encoder, fp32 or bf16.
        progress: called with the number of images done.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sources = [[item.image_id, str(item.path), *_stat(item.path)] for item in items]
    key = {"format": FORMAT, "clip": clip.name, "image_size": clip.image_size, "inputs": inputs, "dtype": dtype}
    finished = directory / "manifest.json"
    if finished.is_file():
        manifest = json.loads(finished.read_text())
        if manifest["key"] == key and manifest["sources"] == sources:
            progress(len(items))
            return EmbeddingStore(directory)
        finished.unlink()

    state_path, data_path = directory / "progress.json", directory / "embeddings.bin"
    state: dict[str, Any] = {"key": key, "sources": sources, "done": 0, "skipped": {}, "row_shape": None}
    if state_path.is_file() and data_path.is_file():
        old = json.loads(state_path.read_text())
        if old["key"] == key and old["sources"] == sources:
            state = old
    mode = "r+b" if state["done"] else "wb"
    with open(data_path, mode) as file:
        if state["row_shape"]:
            file.truncate(state["done"] * int(np.prod(state["row_shape"])) * np.dtype(dtype).itemsize)
            file.seek(0, os.SEEK_END)
        for begin in range(state["done"], len(items), batch_size):
            batch = items[begin : begin + batch_size]
            images, good = [], []
            for position, item in enumerate(batch):
                try:
                    images.append(read_image(item.path))
                    good.append(position)
                except ImageError as error:
                    state["skipped"][item.image_id] = str(error)
            rows: Tensor | None = None
            if images:
                with torch.no_grad(), autocast(clip.device, precision):
                    rows = encode(clip, clip.preprocess(images), inputs).float().cpu()
                if not torch.isfinite(rows).all():
                    raise UserError(f"{clip.name!r} gives NaN or infinity for images like {str(batch[0].path)!r}.")
                state["row_shape"] = list(rows.shape[1:])
            if state["row_shape"] is None and begin + batch_size >= len(items):
                raise UserError(f"none of the {len(items)} images can be read: {next(iter(state['skipped'].values()))}")
            if state["row_shape"] is None:
                raise UserError(f"none of the first {len(batch)} images can be read: check the image directory.")
            block = np.zeros((len(batch), *state["row_shape"]), dtype=dtype)
            if rows is not None:
                block[good] = rows.numpy()
            block.tofile(file)
            file.flush()
            state["done"] = begin + len(batch)
            _write_json(state_path, state)
            progress(state["done"])
    ids = [None if item.image_id in state["skipped"] else item.image_id for item in items]
    shape = [len(items), *state["row_shape"]]
    manifest = {"key": key, "sources": sources, "ids": ids, "shape": shape, "dtype": dtype, "skipped": state["skipped"]}
    _write_json(finished, manifest)
    state_path.unlink(missing_ok=True)
    return EmbeddingStore(directory)


def _stat(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)
