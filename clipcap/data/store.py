"""A store of embeddings on disk: rows in shards, known by what their images hold; written and read in parts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clipcap.data.members import open_file, status_of
from clipcap.data.readers.captioned import CaptionedImage
from common.checks import UserError
from common.files import hash_content, write_json
from common.runtime import PRECISIONS, versions

FORMAT = 2
ROWS_PER_SHARD = 16_384
ROWS_AT_ONCE = 512
"""Of a store that is added to another."""
CURE = "copy it again, or delete the store and embed the images again"
RECORD = np.dtype([("id", "<u8"), ("size", "<i8"), ("mtime", "<i8"), ("content", "<u8"), ("name_end", "<i8")])
"""What is kept of each row's image: hashes of its id and content, size, time, and where its id ends in names.bin."""


class ShardedRows:
    """Rows of several memory-mapped files as one array: `shape`, `dtype`, rows by number."""

    def __init__(self, shards: Sequence[np.ndarray], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shards, self.shape, self.dtype = list(shards), shape, dtype
        self._rows = len(shards[0])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard, row = divmod(index % len(self), self._rows)
        return self.shards[shard][row]


class EmbeddingStore:
    """CLIP embeddings of a set of images: (n, e), or patch features (n, p, w), in memory-mapped files.

    Raises:
        UserError: the directory holds no finished store, or its files have not the sizes that its manifest asks for.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory / "manifest.json")
        rows, shape = self.manifest["rows"], tuple(self.manifest["row_shape"])
        per_shard, dtype = self.manifest["rows_per_shard"], np.dtype(self.manifest["dtype"])
        path = self.directory / "rows.bin"
        _require_size(path, rows * RECORD.itemsize)  # first: nothing else bounds the number of shards
        exact = _is_at_rest(self.directory, rows)
        self.records = np.asarray(np.memmap(path, dtype=RECORD, mode="r", shape=(rows,)))
        ends = self.records["name_end"]
        if ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] > _size(self.directory / "names.bin"):
            raise UserError(f"{str(path)!r} does not fit names.bin: {CURE}.")
        shards = []
        for number, begin in enumerate(range(0, rows, per_shard)):
            part = (min(per_shard, rows - begin), *shape)
            path = _shard(self.directory, number)
            _require_size(path, math.prod(part) * dtype.itemsize, exact=exact)
            shards.append(np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=part)))
        self.array = ShardedRows(shards, (rows, *shape), dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return EmbeddingStore, (self.directory,)  # another process maps the files itself

    def __len__(self) -> int:
        return len(self.records)

    def __contains__(self, image_id: str) -> bool:
        return self._find(image_id) is not None

    def row(self, image_id: str) -> int:
        """Row of an image.

        Raises:
            KeyError: it is not in the store.
        """
        row = self._find(image_id)
        if row is None:
            raise KeyError(image_id)
        return row

    def __getitem__(self, row: int) -> Float[Tensor, "..."]:
        """One row as float32: (e,) or (p, w)."""
        return torch.from_numpy(self.array[row].astype(np.float32))

    @property
    def ids(self) -> list[str]:
        """The images' ids by row."""
        names, ends = (self.directory / "names.bin").read_bytes(), self.records["name_end"].tolist()
        try:
            return [names[a:b].decode("utf-8", "surrogatepass") for a, b in zip([0, *ends], ends, strict=False)]
        except UnicodeDecodeError:
            raise UserError(f"names.bin of {str(self.directory)!r} is damaged: {CURE}.") from None

    @property
    def skipped(self) -> dict[str, str]:
        """Images that could not be read, with the reason."""
        return self.manifest["skipped"]

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of the ids in order, and their rows: found by halving, without an object for each image."""
        order = np.argsort(self.records["id"])
        return self.records["id"][order], order

    def _find(self, image_id: str) -> int | None:
        hashes, order = self._sorted
        key = np.uint64(_hash(image_id.encode("utf-8", "surrogatepass")))
        at = int(np.searchsorted(hashes, key))
        return int(order[at]) if at < len(hashes) and hashes[at] == key else None


class Source(NamedTuple):
    """An image file as it was when it was encoded."""

    size: int
    mtime: int
    content: int


class StoreWriter:
    """Appends rows to a store, in the order data, names, records: a row counts once its record is whole.

    Args:
        directory: of the store; what an earlier writer left there is kept when it fits.
        key: what must be equal for two embeddings to belong in one store.
        clip: the backbone's name, for people.
        dtype: of the numbers; None takes what exists, or float16.
        precision: in which the rows of a new store are computed.
        rows_per_shard: rows in each file of a new store.

    Raises:
        UserError: the store there has another key, dtype or format, or a file is cut short.
    """

    def __init__(
        self,
        directory: Path,
        key: dict[str, Any],
        clip: str,
        *,
        dtype: str | None = None,
        precision: str = "fp32",
        rows_per_shard: int = ROWS_PER_SHARD,
    ) -> None:
        self.directory = directory
        self._files: dict[str, Any] = {}
        self._began = False
        finished, begun = directory / "manifest.json", directory / "progress.json"
        self.state: dict[str, Any] = {
            "format": FORMAT, "clip": clip, "key": key, "dtype": dtype or "float16", "precision": precision,
            "row_shape": None, "rows_per_shard": rows_per_shard, "rows": 0, "skipped": {},
        }  # fmt: skip
        self.finished = finished.is_file()
        if not self.finished and not begun.is_file():
            self._take(np.zeros(0, RECORD))
            return
        self.state = _read_manifest(finished if self.finished else begun)
        for name, value in key.items():
            if (held := self.state["key"].get(name)) != value:
                theirs, ours = _difference(held, value)
                raise UserError(
                    f"embedding store {str(directory)!r} holds embeddings of {self.state['clip']!r} with other {name} "
                    f"({theirs} instead of {ours} of {clip!r}): give another directory, or delete this one."
                )
        if dtype is not None and dtype != self.state["dtype"]:
            raise UserError(
                f"embedding store {str(directory)!r} is {self.state['dtype']}, not {dtype}: give another directory, "
                f"or delete this one."
            )
        self.state.setdefault("precision", precision)
        path = directory / "rows.bin"
        count = path.stat().st_size // RECORD.itemsize if path.is_file() else 0
        if count < self.state["rows"]:
            _require_size(path, self.state["rows"] * RECORD.itemsize)
        self._take(np.fromfile(path, RECORD, count) if count else np.zeros(0, RECORD))
        exact = self.finished and _is_at_rest(directory, self.state["rows"])
        for number, begin in enumerate(range(0, count, self.state["rows_per_shard"])):
            rows = min(self.state["rows_per_shard"], count - begin)
            _require_size(_shard(directory, number), rows * self._row_bytes, exact=exact)

    def _take(self, records: np.ndarray) -> None:
        self.records = records
        self.rows = len(records)  # those safely written, with what `append` adds
        self._names_end = int(records["name_end"][-1]) if len(records) else 0

    def rewind(self, rows: int) -> None:
        """Begin after the first `rows` rows; those behind them are written again."""
        self._take(self.records[:rows])

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.state["row_shape"]) * np.dtype(self.state["dtype"]).itemsize

    def missing(self, items: Sequence[CaptionedImage]) -> list[CaptionedImage]:
        """The items, each id once, that have no row yet.

        Raises:
            UserError: an image's content has changed since its row was written.
        """
        hashes = np.fromiter(
            (_hash(item.image_id.encode("utf-8", "surrogatepass")) for item in items), np.uint64, len(items)
        )
        order = np.argsort(self.records["id"])
        known = self.records["id"][order]
        places = np.searchsorted(known, hashes)
        todo, changed, touched = [], [], []
        first = set(np.unique(hashes, return_index=True)[1].tolist())
        for number, (item, place) in enumerate(zip(items, places.tolist(), strict=True)):
            if place == len(known) or known[place] != hashes[number]:
                todo += [item] if number in first else []
                continue
            row = int(order[place])
            found = source_of(item, self.records[row])
            if found is None:
                continue  # the image is gone, its embedding is not
            if (found.size, found.content) != (self.records["size"][row], self.records["content"][row]):
                changed.append(item)
            elif found.mtime != self.records["mtime"][row]:
                touched.append((row, found.mtime))
        if changed:
            raise UserError(
                f"{len(changed)} images have changed since they were embedded in {str(self.directory)!r}, the first "
                f"{str(changed[0].path)!r}: give another directory, or delete this one."
            )
        if touched:  # copied with a new time: do not read them all again the next time
            with contextlib.suppress(OSError), open(self.directory / "rows.bin", "r+b") as file:
                for row, mtime in touched:
                    self.records["mtime"][row] = mtime
                    file.seek(row * RECORD.itemsize)
                    file.write(self.records[row].tobytes())
        return todo

    def append(self, names: Sequence[str], rows: np.ndarray, sources: Sequence[Source]) -> None:
        """Add rows (b, ...) with their images' ids and files."""
        if self.state["row_shape"] is None:
            self.state["row_shape"] = list(rows.shape[1:])
        if not self._began:  # from here to `finish` the files hold more than a manifest says
            write_json(self.directory / "progress.json", self.state)
            self._began = True
        if list(rows.shape[1:]) != self.state["row_shape"]:
            raise UserError(
                f"embedding store {str(self.directory)!r} has rows of shape {tuple(self.state['row_shape'])}, the new "
                f"ones {rows.shape[1:]}: give another directory."
            )
        per_shard, row = self.state["rows_per_shard"], self.rows
        with np.errstate(over="ignore"):
            data = np.ascontiguousarray(rows.astype(self.state["dtype"]))
        if not np.isfinite(data).all():
            raise UserError(f"embeddings up to {np.abs(rows).max():.3g} do not fit {data.dtype}: use dtype float32.")
        begin = 0
        while begin < len(data):
            shard, place = divmod(row + begin, per_shard)
            part = data[begin : begin + per_shard - place]
            self._write(_shard(self.directory, shard).name, place * self._row_bytes, part.tobytes())
            begin += len(part)
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        self._write("names.bin", self._names_end, b"".join(encoded))
        new = np.zeros(len(data), RECORD)
        new["id"] = [_hash(name) for name in encoded]
        new["name_end"] = self._names_end + np.cumsum([len(name) for name in encoded])
        new["size"], new["mtime"], new["content"] = np.array(sources, dtype=object).T
        self._write("rows.bin", row * RECORD.itemsize, new.tobytes())
        self.rows, self._names_end = row + len(new), int(new["name_end"][-1])

    def extend(self, store: EmbeddingStore) -> None:
        """Add the rows of another store, in their order."""
        ids = store.ids
        for begin in range(0, len(store), ROWS_AT_ONCE):
            end = min(begin + ROWS_AT_ONCE, len(store))
            columns = (store.records[name][begin:end].tolist() for name in Source._fields)
            rows = np.stack([store.array[row] for row in range(begin, end)])
            self.append(ids[begin:end], rows, list(map(Source, *columns)))

    def _write(self, name: str, place: int, data: bytes) -> None:
        """Write at `place`, where an interrupted call may have left more."""
        file = self._files.get(name)
        if file is None:
            path = self.directory / name
            for old in [old for old in self._files if old.startswith("shard") and name.startswith("shard")]:
                self._files.pop(old).close()
            file = self._files[name] = open(path, "r+b" if path.exists() else "w+b", buffering=0)
        file.truncate(place)
        file.seek(place)
        left = memoryview(data)
        while left:  # a nearly full disk takes a part
            left = left[file.write(left) :]

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def finish(self, skipped: dict[str, str] | None = None, *, tried: set[str] | None = None) -> None:
        """Write the manifest, which makes the rows so far a store.

        Args:
            skipped: images that cannot be read, with the reason.
            tried: ids whose earlier entries in the list of the skipped are void now.
        """
        old = {name: reason for name, reason in self.state["skipped"].items() if name not in (tried or set())}
        everything = self.state | {"rows": self.rows, "skipped": old | (skipped or {})}
        if self.finished and everything == self.state:
            return
        write_json(self.directory / "manifest.json", everything | {"versions": versions()})
        (self.directory / "progress.json").unlink(missing_ok=True)


def source_of(item: CaptionedImage, record: np.void) -> Source | None:
    """The image file as it is now; its content is read only when its time differs from the record's."""
    if item.embedding_row is not None:
        return pickle_source(item.path)
    try:
        status = status_of(item.path)
        same = status == (int(record["size"]), int(record["mtime"]))
        return Source(*status, int(record["content"]) if same else file_hash(item.path))
    except FileNotFoundError:
        return None


def pickle_source(path: Path) -> Source:
    status = path.stat()
    return Source(status.st_size, status.st_mtime_ns, 0)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def file_hash(path: Path) -> int:
    with open_file(path) as file:
        return int.from_bytes(hash_content(file, hashlib.blake2b(digest_size=8)).digest(), "little")


def _difference(first: Any, second: Any) -> tuple[str, str]:
    """Two values as short text; of two mappings, only the fields in which they differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
        first, second = ({name: fields.get(name) for name in names} for fields in (first, second))
    return json.dumps(first)[:80], json.dumps(second)[:80]


def _shard(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:05}.bin"


def _is_at_rest(directory: Path, rows: int) -> bool:
    """Whether nothing has been added to a finished store since its manifest, so that its files have exact sizes."""
    return not (directory / "progress.json").exists() and _size(directory / "rows.bin") == rows * RECORD.itemsize


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _require_size(path: Path, expected: int, *, exact: bool = False) -> None:
    """Raise UserError when a file is shorter; longer is what an interrupted call has added, unless it must be exact."""
    actual = _size(path)
    if actual < expected:
        raise UserError(f"{str(path)!r} is cut short ({actual} bytes instead of {expected}): {CURE}.")
    if exact and actual > expected:
        raise UserError(f"{str(path)!r} does not fit its manifest.json ({actual} bytes instead of {expected}): {CURE}.")


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"embedding store {str(path.parent)!r} has no manifest.json: embed the images first.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest.get("format", manifest.get("key", {}).get("format"))
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{str(path)!r} is damaged: delete the store and embed the images again.") from None
    if found != FORMAT:
        raise UserError(
            f"embedding store {str(path.parent)!r} has format {found} instead of {FORMAT}: delete it and embed the "
            f"images again."
        )
    if not _is_whole(manifest, finished=path.name == "manifest.json"):
        raise UserError(f"{str(path)!r} is damaged: delete the store and embed the images again.")
    return manifest


def _is_whole(manifest: dict[str, Any], *, finished: bool) -> bool:
    """Whether a manifest has all that is read of it."""
    rows, per_shard, shape, key = (manifest.get(name) for name in ("rows", "rows_per_shard", "row_shape", "key"))
    sides = {"embedding": 1, "patches": 2}.get(str(key.get("inputs"))) if isinstance(key, dict) else None
    if shape is None and not finished:  # before the first row
        shape = [1] * (sides or 0)
    skipped = manifest.get("skipped")
    return (
        sides is not None
        and isinstance(manifest.get("clip"), str)
        and isinstance(skipped, dict)
        and all(isinstance(reason, str) for reason in skipped.values())
        and manifest.get("dtype") in ("float16", "float32")
        and manifest.get("precision", "fp32") in PRECISIONS
        and type(rows) is int
        and rows >= finished
        and type(per_shard) is int
        and per_shard >= 1
        and isinstance(shape, list)
        and len(shape) == sides
        and all(type(side) is int and side >= 1 for side in shape)
    )
