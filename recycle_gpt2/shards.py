"""Documents tokenized in chunks by several processes, each chunk a shard that is written whole and kept."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common.checks import UserError
from common.files import whole_file, write_json, write_text
from common.parts import Part
from recycle_gpt2.documents import Document
from recycle_gpt2.duplicates import Selection
from recycle_gpt2.records import MALFORMED
from recycle_gpt2.splits import SPLITS
from recycle_gpt2.texts import Text

COUNTED: tuple[str, ...] = ("documents", "paragraphs", "bytes", "characters", "tokens")
SHARD_FILE = re.compile(r"\d{6,}\.(json|(train|valid|test)\.(bin|jsonl))|\.\d{6,}\..*\.tmp")
"""Names of what a corpus's directory of shards holds."""
MOST_WORKERS = 1024
CHUNK = 4 << 20
"""UTF-8 bytes of text whose documents make a shard."""


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


_Row = tuple[str, str, str, str]
"""Split, text, source and genre of a document."""


def write_shards(
    text: Text,
    selection: Selection,
    shards: Path,
    tokenizer: str,
    setup: tuple[str, int, str],
    workers: int,
    chunk: int,
    progress: bool,
    part: Part,
) -> list[dict[str, Any]] | None:
    """Write the shards that are missing; returns what is known of each, in order.

    The documents are read and chosen here, in one process; the workers tokenize and write. At most two chunks for each
    worker wait, so that memory does not grow with the corpus. Of several processes, each reads and chooses all, since
    what is new depends on all that came before, and writes every so many shards; what is returned is None until those
    of the others are written, too.
    """
    import multiprocessing

    from common.progress import Progress

    digests: list[str] = []
    waiting: deque[tuple[int, int, Future[None] | None]] = deque()  # None: it exists already, or is another process's
    encoder = Encoder(*setup)
    begun, tokens = time.monotonic(), 0
    # Started afresh and not forked: a fork would copy the threads' locks of torch and of the tokenizer.
    pool = (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=setup)
        if workers > 1
        else None
    )
    bar = Progress(total=text.size(), desc="corpus", unit="B", unit_scale=True, disable=not progress or part.rank > 0)
    try:

        def finish() -> None:
            nonlocal tokens
            number, position, future = waiting.popleft()
            if future is not None:
                future.result()
                tokens += sum(counts["tokens"] for counts in _meta(shards, number)["counts"].values())
            bar.set_postfix_str(f"{tokens / max(time.monotonic() - begun, 1e-9):,.0f} tokens/s", refresh=False)
            bar.update(position - bar.n)

        for number, (rows, position) in enumerate(_chunks(text, selection, chunk)):
            known = [tokenizer, *setup[1:]]
            digest = _sha256([*known, rows])
            digests.append(digest)
            future: Future[None] | None = None
            if number % part.world == part.rank and not _is_written(shards, number, digest, setup[2]):
                content = _sha256([*known, [row[:2] for row in rows]])
                if pool is None:
                    _write_shard(encoder, shards, number, digest, content, rows)
                    future = Future()
                    future.set_result(None)
                else:
                    future = pool.submit(_work, shards, number, digest, content, rows)
            waiting.append((number, position, future))
            if len(waiting) > (2 * workers if pool else 0):
                finish()
        while waiting:
            finish()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for want of memory: use fewer workers; what is done is kept."
        ) from None
    finally:
        bar.close()
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    missing = sum(not _is_written(shards, number, digest, setup[2]) for number, digest in enumerate(digests))
    if missing:
        done = f"part {part.rank + 1} of {part.world} is done"
        print(
            f"{done}; {missing} of {len(digests)} shards are not: whoever finishes last completes the corpus",
            file=sys.stderr,
        )
        return None
    return [_meta(shards, number) for number in range(len(digests))]


def _meta(shards: Path, number: int) -> dict[str, Any]:
    return json.loads(shard_path(shards, number, "json").read_text(encoding="utf-8"))


def _chunks(text: Text, selection: Selection, chunk: int) -> Iterator[tuple[list[_Row], int]]:
    """New documents in lists of at least `chunk` bytes of text, with the position in the files after each."""
    rows: list[_Row] = []
    size = position = 0
    for document, position in text.documents():
        taken = selection.take(document)
        if taken is None:
            continue
        rows.append((*taken, document.source, document.genre))
        size += len(taken[1].encode())
        if size >= chunk:
            yield rows, position
            rows, size = [], 0
    if rows:
        yield rows, position


def shard_path(shards: Path, number: int, suffix: str) -> Path:
    return shards / f"{number:06}.{suffix}"


def _is_written(shards: Path, number: int, digest: str, dtype: str) -> bool:
    """Whether a shard of exactly these documents is there, whole. Its json is written last."""
    try:
        meta = _meta(shards, number)
        files = [(shard_path(shards, number, f"{split}.bin"), meta["counts"][split]["tokens"]) for split in SPLITS]
    except (FileNotFoundError, *MALFORMED):
        return False
    return meta["digest"] == digest and all(
        (file.stat().st_size if file.is_file() else 0) == length * np.dtype(dtype).itemsize for file, length in files
    )


class Encoder:
    """What a shard is written with: the tokenizer (as JSON), its end token's id and the type of the ids."""

    def __init__(self, tokenizer: str, end: int, dtype: str) -> None:
        from tokenizers import Tokenizer

        self.tokenizer, self.end, self.dtype = Tokenizer.from_str(tokenizer), end, np.dtype(dtype)
        self.tokenizer.encode_special_tokens = True  # a text that spells the end token does not end there
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()


_worker_encoder: Encoder
"""A worker process's: too large to be sent with each chunk."""


def _begin_worker(tokenizer: str, end: int, dtype: str) -> None:
    import multiprocessing
    from multiprocessing import connection

    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    _worker_encoder = Encoder(tokenizer, end, dtype)
    parent = multiprocessing.parent_process()

    def leave() -> None:  # with a parent that was killed, or the worker would wait for work for ever
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _work(shards: Path, number: int, digest: str, content: str, rows: list[_Row]) -> None:
    _write_shard(_worker_encoder, shards, number, digest, content, rows)


def _write_shard(encoder: Encoder, shards: Path, number: int, digest: str, content: str, rows: list[_Row]) -> None:
    """Tokenize documents and write each split's ids and held-out texts, then what is known of the shard.

    Its `digest` is of all of the documents, its `content` not of the names of their files.
    """
    # First, or after a stop it might vouch for files that were written since.
    shard_path(shards, number, "json").unlink(missing_ok=True)
    encodings = encoder.tokenizer.encode_batch([row[1] for row in rows], add_special_tokens=False)
    counts = {split: dict.fromkeys(COUNTED, 0) for split in SPLITS}
    for split in SPLITS:
        ids: list[int] = []
        texts = []
        for (own, text, source, genre), encoding in zip(rows, encodings, strict=True):
            if own == split:
                ids += [*encoding.ids, encoder.end]
                texts.append(Document(text, source, genre))
        sizes = (
            len(texts),
            sum(document.text.count("\n") + 1 for document in texts),
            sum(len(document.text.encode()) for document in texts),
            sum(len(document.text) for document in texts),
            len(ids),
        )
        counts[split] = dict(zip(COUNTED, sizes, strict=True))
        binary, held_out = (shard_path(shards, number, f"{split}.{suffix}") for suffix in ("bin", "jsonl"))
        for path in (binary, held_out):
            path.unlink(missing_ok=True)
        if not ids:
            continue
        with whole_file(binary) as file:
            file.write(np.asarray(ids, dtype=encoder.dtype).tobytes())
        if split != "train":
            lines = (json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in texts)
            write_text(held_out, "".join(lines))
    write_json(shard_path(shards, number, "json"), {"digest": digest, "content": content, "counts": counts})
