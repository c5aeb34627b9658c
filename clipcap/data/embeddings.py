"""Embedding store: each image encoded once, memory-mapped in shards, with a manifest that makes a mismatch an error."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipcap.data.images import ImageError, read_image
from clipcap.data.members import status_of
from clipcap.data.readers import Format, read_dataset
from clipcap.data.readers.captioned import CaptionedImage
from clipcap.data.store import ROWS_PER_SHARD, EmbeddingStore, Source, StoreWriter, file_hash, pickle_source
from clipcap.data.views import random_view
from common.checks import UserError, printable, require_at_least, require_place
from common.files import alone
from common.images import MAX_PIXELS, ImageLimit
from common.parts import Part, Parts, ProcessesConfig, digest_of, is_begun, own_part, require_no_parts, start_processes
from common.runtime import RuntimeConfig, autocast, own_gpu, start

if TYPE_CHECKING:
    from common.clip import FrozenCLIP
    from common.encoders.interface import ImageFeatures
    from common.encoders.preprocess import Preprocess


Inputs = Literal["embedding", "patches"]
PARTS = "parts"
"""Directory in a store of what several processes have encoded, until it is joined."""

KEPT = ("dtype", "precision", "rows_per_shard")
"""Options of `build_store` that a store holds on to."""


@dataclass(frozen=True)
class EmbedConfig:
    """Encode every image once with CLIP, for `clipcap train --embeddings OUT`.

    Started again, it resumes where it stopped; images that are new since are added. DATA is anything that
    `clipcap train` reads; the original project's pickle needs no images: its embeddings are taken over.

    With --devices, or --num-nodes and torchrun or srun, each process embeds a part of the images, and the one that
    finishes last joins the parts: the store is the same. A part that was interrupted is continued when it is run again.
    """

    data: tyro.conf.Positional[Path]
    """Captions: a file or a folder."""
    out: Path
    """Directory of the embedding store."""
    clip: str = "photo"
    """Image encoder: photo or tiny (packaged, of photographs and of rendered scenes), a Hugging Face id or directory,
    open_clip:ARCH/TAG-or-path, timm:NAME[/PATH] or torchvision:NAME[/PATH]."""
    images: Path | None = None
    """Directory of the images, when they are not beside the captions."""
    format: Format = "auto"
    """Layout of DATA, when it should not be guessed."""
    skip_missing: bool = False
    """Leave out captions whose image is missing and images without a caption, instead of stopping."""
    inputs: Inputs = "embedding"
    """The pooled embedding (the paper), or the patch features."""
    dtype: Literal["float16", "float32"] = "float16"
    """Numbers in the store."""
    batch_size: int = 32
    """Images encoded at once."""
    workers: int = 2
    """Processes that read images; 0 reads them in this one."""
    limit: ImageLimit = field(default_factory=ImageLimit)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def encode(clip: FrozenCLIP, pixels: Float[Tensor, "b 3 s s"], inputs: Inputs) -> Float[Tensor, "b ..."]:
    """The mapper's input for preprocessed images: the embedding (b, e) or the patch features (b, p, w).

    No gradients flow; on a CPU the encoder is packed (`FrozenCLIP.encode_image_features`).
    """
    return mapper_input(clip.encode_image_features(pixels, packed=True), inputs)


def mapper_input(features: ImageFeatures, inputs: Inputs) -> Float[Tensor, "b ..."]:
    """What a mapper reads of an image's features: the embedding (b, e) or the patches (b, p, w)."""
    return features.patches if inputs == "patches" else features.embedding


def build_store(
    items: Sequence[CaptionedImage],
    clip: FrozenCLIP,
    directory: Path,
    *,
    inputs: Inputs = "embedding",
    batch_size: int = 32,
    dtype: Literal["float16", "float32"] | None = None,
    precision: str = "fp32",
    progress: Callable[[int], object] = lambda done: None,
    workers: int = 0,
    rows_per_shard: int = ROWS_PER_SHARD,
    max_pixels: int = MAX_PIXELS,
) -> EmbeddingStore:
    """Encode every image that is not in the store yet, once, and return the store.

    An interrupted call resumes where it stopped; what exists for other images stays. An image that cannot be read
    is left out, listed in `EmbeddingStore.skipped`, and tried again by the next call. Items of the original project's
    pickle bring their embeddings with them. Several processes may call this for one directory: one works, the others
    wait; `build_store_part` has each do a part.

    Args:
        items: images; their ids are the keys.
        clip: backbone.
        directory: where the store is kept.
        inputs: embedding or patch features.
        batch_size: images encoded at once.
        dtype: of a new store, float16 when not given; None takes an old one as it is.
        precision: of the encoder for a new store, fp32 or bf16; rows are added to an old one in its own, and one of
            fp32 serves both.
        progress: called with the number of images done.
        workers: processes that read images; 0 reads them in this one.
        rows_per_shard: rows in each file of a new store.
        max_pixels: of an image; a larger one counts as one that cannot be read.

    Raises:
        UserError: the encoder has no patches, and `inputs` asks for them; the store was made with another CLIP, other
            preprocessing or inputs, or of an image that has changed since; rows are missing that would be of fp32 among
            those of bf16; a file of it is cut short; no image can be read; the disk is full; a worker was killed.
    """
    require_at_least("batch_size", batch_size, 1)
    require_at_least("workers", workers, 0)
    directory.mkdir(parents=True, exist_ok=True)
    with alone(directory):
        require_no_parts(directory / PARTS)
        writer = _writer(items, clip, directory, inputs, dtype, precision, rows_per_shard)
        todo = writer.missing(items)
        _require_precision(writer, precision, todo)
        skipped: dict[str, str] = {}
        done = len(items) - len(todo)
        if not todo:
            progress(done)
        try:
            for batch in _encoded(todo, clip, inputs, batch_size, writer.state["precision"], workers, max_pixels):
                skipped |= batch.skipped
                if batch.rows is not None:
                    writer.append(batch.names, batch.rows, batch.sources)
                done += len(batch.names) + len(batch.skipped)
                progress(done)
            if not writer.rows:
                raise NoneReadable(items, skipped)
            writer.finish(skipped, tried={item.image_id for item in todo})
        except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: killed while it handed a batch over
            if not workers or isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            # While its frames hold the loader, torch raises this again whenever another child process ends.
            traceback.clear_frames(error.__traceback__)
            raise UserError(
                f"a worker was killed after {done} of {len(items)} images (memory may have run out): the embeddings "
                f"so far are kept; run it again, with fewer workers or smaller batches."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise UserError(
                f"no room for embedding store {str(directory)!r} after {done} of {len(items)} images "
                f"({error.strerror}): those are kept; free some space and run it again."
            ) from error
        finally:
            writer.close()
    return EmbeddingStore(directory)


def build_store_part(
    items: Sequence[CaptionedImage], clip: FrozenCLIP, directory: Path, part: Part, **options: Any
) -> EmbeddingStore | None:
    """Encode one process's part of the images that are not in the store yet, each in batches that one process makes.

    Whoever finishes last joins the parts to the store, whose bytes are those of `build_store`. Images that the store
    lists as skipped are not tried again.

    Args:
        items, clip, directory: as `build_store` takes them; all processes must be given the same.
        part: of this process.
        options: those of `build_store`; of all but progress, workers and max_pixels, the same for all processes.

    Returns:
        The store; None while other parts are missing.

    Raises:
        UserError: what `build_store` raises, or parts were begun there with other images, batches or processes.
    """
    call = inspect.signature(build_store).bind(items, clip, directory, **options)
    call.apply_defaults()
    options, batch_size, precision = call.kwargs, call.kwargs["batch_size"], call.kwargs["precision"]
    require_at_least("batch_size", batch_size, 1)
    directory.mkdir(parents=True, exist_ok=True)

    def missing() -> list[CaptionedImage]:
        todo = [item for item in writer.missing(items) if item.image_id not in writer.state["skipped"]]
        _require_precision(writer, precision, todo)
        return todo

    with alone(directory):
        writer = _writer(items, clip, directory, *(options[name] for name in ("inputs", *KEPT)))
        todo = None if is_begun(directory / PARTS) else missing()
        if writer.finished and todo == []:
            return EmbeddingStore(directory)
        settings = {"images": digest_of(item.image_id for item in items), "batch_size": batch_size}
        settings |= writer.state["key"] | {name: writer.state[name] for name in ("dtype", "precision")}
        parts = Parts(directory / PARTS, part, settings, {"rows": writer.rows})
    writer.rewind(parts.plan["rows"])
    if not parts.is_done():
        with parts.own():
            rows, skipped = 0, dict[str, str]()
            try:
                if own := part.take(missing() if todo is None else todo, batch_size):
                    options |= {name: writer.state[name] for name in KEPT}
                    store = build_store(own, clip, parts.place(part.rank) / "store", **options)
                    rows, skipped = len(store), store.skipped
            except NoneReadable as error:
                skipped = error.skipped
            parts.finish(rows, skipped)
    skipped = {}
    with parts.joined() as found, contextlib.closing(writer):
        for rank, mark in enumerate(found or ()):
            skipped |= mark["skipped"]
            if mark["rows"]:
                store = EmbeddingStore(parts.place(rank) / "store")
                parts.require_rows(rank, len(store), mark["rows"])
                writer.extend(store)
        if found and writer.rows:
            writer.finish(skipped)
    if found and not writer.rows:
        raise NoneReadable(items, skipped)
    return None if parts.exist() else EmbeddingStore(directory)


class NoneReadable(UserError):
    """No image can be read.

    Attributes:
        skipped: the reason for each.
    """

    def __init__(self, items: Sequence[CaptionedImage], skipped: dict[str, str]) -> None:
        super().__init__(f"none of the {len(items)} images can be read: {next(iter(skipped.values()))}")
        self.skipped = skipped


def _writer(
    items: Sequence[CaptionedImage],
    clip: FrozenCLIP,
    directory: Path,
    inputs: Inputs,
    dtype: str | None,
    precision: str,
    rows_per_shard: int,
) -> StoreWriter:
    """What writes a store of these images, with what was written there before."""
    if inputs == "patches":
        clip.require_patches("--inputs patches")
    key = {
        "weights": clip_fingerprint(clip),
        "preprocessing": _described(clip.preprocess),
        "inputs": inputs,
        "normalization": "none",
    }
    if all(item.embedding_row is not None for item in items):
        precision = "fp32"  # nothing is computed
    return StoreWriter(directory, key, clip.name, dtype=dtype, precision=precision, rows_per_shard=rows_per_shard)


def _require_precision(writer: StoreWriter, precision: str, todo: Sequence[CaptionedImage]) -> None:
    """Raise UserError when rows that must be of fp32 would be added to others."""
    before = writer.state["precision"]
    if before != precision == "fp32" and any(item.embedding_row is None for item in todo):
        raise UserError(
            f"embedding store {str(writer.directory)!r} was computed in {before}, not fp32: give another directory, "
            f"use --precision {before}, or delete this one."
        )


def _described(preprocess: Preprocess) -> dict[str, Any]:
    """Preprocessing as a manifest holds it; half a pixel beside the crop's centre makes no other store."""
    fields = json.loads(json.dumps(preprocess.to_dict()))
    fields.pop("crop_down", None)
    return fields


def clip_fingerprint(clip: FrozenCLIP) -> str:
    """Hash of a CLIP's weights (a sample of every tensor), the same wherever its files are and who loads them."""
    digests = []
    for value in clip.backbone.state_dict().values():
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy()
        digests.append(hashlib.sha256(str(tuple(value.shape)).encode() + sample.tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:32]


class _Batch(NamedTuple):
    names: list[str]
    rows: np.ndarray | None
    sources: list[Source]
    skipped: dict[str, str]


def _encoded(
    items: Sequence[CaptionedImage],
    clip: FrozenCLIP,
    inputs: Inputs,
    batch_size: int,
    precision: str,
    workers: int,
    max_pixels: int,
) -> Iterator[_Batch]:
    """Batches of what is to be appended."""
    ready = [item for item in items if item.embedding_row is not None]
    for path in sorted({item.path for item in ready}):
        yield from _taken_over([item for item in ready if item.path == path], path, clip, inputs, batch_size)
    items = [item for item in items if item.embedding_row is None]
    workers = min(workers, len(items))  # none is started for nothing
    loader = DataLoader(
        Pixels(items, clip.preprocess, max_pixels), batch_size, num_workers=workers, collate_fn=join_pixels
    )
    for pixels, found in loader:
        names = [name for name, source, _ in found if source is not None]
        skipped = {name: reason for name, source, reason in found if source is None}
        rows = None
        if pixels is not None:
            with autocast(clip.device, precision):
                rows = encode(clip, pixels, inputs).float().cpu().numpy()
            if not np.isfinite(rows).all():
                raise UserError(f"{clip.name!r} gives NaN or infinity for images like {names[0]!r}.")
        yield _Batch(names, rows, [source for _, source, _ in found if source is not None], skipped)


def _taken_over(
    items: Sequence[CaptionedImage], path: Path, clip: FrozenCLIP, inputs: Inputs, batch_size: int
) -> Iterator[_Batch]:
    """Embeddings that the original project's pickle holds."""
    from clipcap.data.untrusted import read_pickle

    if inputs != "embedding":
        raise UserError(f"pickle {str(path)!r} holds embeddings, no {inputs}: use inputs embedding.")
    embeddings = read_pickle(path)["clip_embedding"]
    if embeddings.shape[1] != clip.width:
        raise UserError(
            f"pickle {str(path)!r} holds embeddings of width {embeddings.shape[1]}, {clip.name!r} gives {clip.width}: "
            f"name the CLIP that they were made with."
        )
    for begin in range(0, len(items), batch_size):
        batch = items[begin : begin + batch_size]
        rows = embeddings[[item.embedding_row for item in batch]].float().numpy()
        if not np.isfinite(rows).all():
            raise UserError(f"pickle {str(path)!r} holds NaN or infinity: make it again.")
        yield _Batch([item.image_id for item in batch], rows, [pickle_source(path) for _ in batch], {})


class Pixels(Dataset[Any]):
    """Preprocessed images; what cannot be read is a reason."""

    def __init__(self, items: Sequence[CaptionedImage], preprocess: Preprocess, max_pixels: int = MAX_PIXELS) -> None:
        self.items, self.preprocess, self.max_pixels = items, preprocess, max_pixels

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, Source | None, str]:
        item = self.items[index]
        try:
            image = read_image(item.path, max_pixels=self.max_pixels, side=self.preprocess.size)
            if item.view:
                image = random_view(image, item.image_id)
            pixels = self.preprocess(image)[0]
        except ImageError as error:
            return item.image_id, None, None, str(error)
        return item.image_id, pixels, Source(*status_of(item.path), file_hash(item.path)), ""


def join_pixels(batch: list[Any]) -> tuple[Tensor | None, list[tuple[str, Source | None, str]]]:
    pixels = [pixels for _, pixels, _, _ in batch if pixels is not None]
    return torch.stack(pixels) if pixels else None, [(name, source, reason) for name, _, source, reason in batch]


def run(config: EmbedConfig) -> int:
    """`clipcap embed`: build the store, or this process's part of it, and say what is in it."""
    from common.clip import load_clip
    from common.progress import Progress

    require_at_least("batch_size", config.batch_size, 1)
    require_at_least("workers", config.workers, 0)
    require_place(config.out, directory=True)
    part = own_part(config.processes)
    if part is None:
        return start_processes(run, config, config.processes.devices)
    device = own_gpu(start(config.runtime))
    items = read_dataset(config.data, images=config.images, skip_missing=config.skip_missing, format=config.format)
    clip = load_clip(config.clip, device=device)
    total, desc = len(part.take(items, config.batch_size)), f"embedding images with CLIP {config.clip}"
    with Progress(total=total, desc=desc, unit=" images", disable=part.rank > 0) as bar:
        options: dict[str, Any] = {
            "max_pixels": config.limit.max_pixels,
            "inputs": config.inputs,
            "batch_size": config.batch_size,
            "dtype": config.dtype,
            "precision": config.runtime.precision,
            "progress": lambda done: bar.update(done - bar.n),
            "workers": config.workers,
        }
        if part.world > 1:
            store = build_store_part(items, clip, config.out, part, **options)
        else:
            store = build_store(items, clip, config.out, **options)
    if store is None:
        return 0
    if store.skipped:
        print(f"skipped {len(store.skipped)} images, which cannot be read:", file=sys.stderr)
        for reason in list(store.skipped.values())[:10]:
            print(f"  {printable(reason)}", file=sys.stderr)
    shape = "x".join(map(str, store.array.shape[1:]))
    print(f"{len(store)} images, {shape} {store.array.dtype} each, are in {config.out}.")
    return 0
