"""Text in a new language: documents without duplicates, split, packed into memory-mapped token blocks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from common.checks import UserError, require_at_least, require_between, require_file, require_one_of
from common.files import claimed, sync_directory, whole_file, write_json, write_text
from common.language import IGNORE
from recycle_gpt2.documents import Document, files_of, find_texts, read_documents, read_with_positions, size_of
from recycle_gpt2.records import MALFORMED, read_json, reading
from recycle_gpt2.tokenizer import load_tokenizer, tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CorpusConfig", "Document", "TokenBlocks", "build_corpus", "labels", "load_documents", "read_documents"]

SPLITS: tuple[str, ...] = ("train", "valid", "test")
FORMAT = 1
COUNTED: tuple[str, ...] = ("documents", "paragraphs", "bytes", "characters", "tokens")
REBUILD = "delete the directory of the corpus and build it again; what was trained on it goes on"
SHARD_FILE = re.compile(r"\d{6,}\.(json|(train|valid|test)\.(bin|jsonl))|\..*\.tmp")
"""Names of what a corpus's directory of shards holds."""
CHUNK = 4 << 20
"""UTF-8 bytes of text whose documents make a shard."""


@dataclass(frozen=True)
class CorpusConfig:
    """Turn text into packed token blocks, split into train, valid and test documents."""

    text: tuple[Path, ...]
    """Files or directories of text: .txt, .jsonl, .html (also .xz and .gz), or a Hugging Face dataset on disk."""
    tokenizer: Path
    """Directory of the tokenizer (`recycle-gpt2 tokenizer`)."""
    out: Path
    """Directory that the corpus is written to; an interrupted build goes on there."""
    block: int = 1024
    """Tokens in a block: the model's positions."""
    shares: tuple[float, float, float] = (0.98, 0.01, 0.01)
    """Shares of the documents in train, valid and test."""
    workers: int = 1
    """Processes that tokenize."""
    seed: int = 0
    """Another seed holds out other documents."""


def run(config: CorpusConfig) -> None:
    """Build the corpus that `config` describes and say what is in it."""
    require_outside(config.out, config.text)
    tokenizer = load_tokenizer(config.tokenizer)
    with claimed(config.out):
        directory = build_corpus(
            config.text,
            tokenizer,
            config.out,
            block=config.block,
            shares=config.shares,
            workers=config.workers,
            seed=config.seed,
        )
    manifest = read_manifest(directory)
    for split in SPLITS:
        counts = manifest["splits"][split]
        print(f"{split}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, {counts['tokens']:,} tokens")
    dropped = manifest["dropped"]
    print(f"duplicates dropped: {dropped['documents']:,} documents, {dropped['paragraphs']:,} paragraphs")


def build_corpus(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    block: int = 1024,
    shares: tuple[float, float, float] = (0.98, 0.01, 0.01),
    workers: int = 1,
    seed: int = 0,
    progress: bool = True,
    chunk: int = CHUNK,
) -> Path:
    """Write the documents of `paths` as token ids in shards, with the texts of held-out documents and a manifest.

    Documents and paragraphs that have occurred before (byte for byte, white space at the ends aside) are dropped. The
    split of a document depends on its text and `seed` alone. After every document comes an end token. The files do not
    depend on `workers`; a call that was stopped goes on where it was and ends in the same bytes; a finished corpus of
    the same files and settings is used again.

    Args:
        paths: what `read_documents` takes.
        tokenizer: a fast one with an end token.
        out: directory of the corpus.
        block: tokens in a block of `TokenBlocks`.
        shares: of the documents in train, valid and test; they sum to 1.
        workers: processes that tokenize.
        seed: another seed holds out other documents.
        progress: show a bar of bytes read, with tokens per second.
        chunk: UTF-8 bytes of text in a shard.

    Returns:
        `out`.

    Raises:
        UserError: what `read_documents` raises, a split without a document, or less text than one block.
    """
    require_at_least("block", block, 2)
    require_between("workers", workers, 1, 1024)
    require_at_least("seed", seed, 0)
    require_at_least("chunk", chunk, 1)
    if len(shares) != len(SPLITS) or min(shares) < 0 or shares[0] == 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"shares are {shares}: use three for train, valid and test that sum to 1, train's above 0.")
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError("the tokenizer is not a fast one with an end token: train one with `recycle-gpt2 tokenizer`.")
    out = Path(out)
    _require_own(out)
    key = {
        "format": FORMAT,
        "tokenizer": tokenizer_hash(tokenizer),
        "vocab_size": len(tokenizer),
        "end": tokenizer.eos_token_id,
        "dtype": "uint16" if len(tokenizer) <= 1 << 16 else "uint32",
        "block": block,
        "shares": list(shares),
        "seed": seed,
        "chunk": chunk,
        "text": text_hash(paths, progress=progress),
    }
    finished = out / "manifest.json"
    if finished.is_file():
        old = read_json(finished, REBUILD)
        if "sources" in old and old["sources"] == _sources_of(paths):  # of version 0.1, which knew texts by these
            old["text"] = key["text"]
        if all(old.get(name) == value for name, value in key.items()):
            read_manifest(out)
            return out
        finished.unlink()
        sync_directory(out)  # or a power cut might bring it back beside other shards
    shards = out / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    for leftover in shards.glob(".*.tmp"):  # of a call that was killed while it wrote
        leftover.unlink()

    selection = _Selection(shares, seed)
    setup = (tokenizer.backend_tokenizer.to_str(), key["end"], key["dtype"])
    metas = _write_shards(paths, selection, shards, key["tokenizer"], setup, workers, chunk, progress)
    for file in shards.iterdir():  # of another, longer corpus
        if int(file.name.split(".")[0]) >= len(metas):
            file.unlink()

    totals = {split: dict.fromkeys(COUNTED, 0) for split in SPLITS}
    for meta in metas:
        for split in SPLITS:
            for name in COUNTED:
                totals[split][name] += meta["counts"][split][name]
    for split, share in zip(SPLITS, shares, strict=True):
        documents = sum(counts["documents"] for counts in totals.values())
        if share and not totals[split]["documents"]:
            raise UserError(
                f"none of the {documents} documents falls to {split} (share {share:g}): give more documents "
                f"(an empty line separates them in .txt), a larger share, or another seed."
            )
    if totals["train"]["tokens"] < block:
        raise UserError(
            f"the corpus has {totals['train']['tokens']} training tokens, less than a block of {block}: "
            f"give more text or a smaller block."
        )
    dropped = {"documents": selection.duplicates, "emptied": selection.emptied, "paragraphs": selection.repeated}
    lengths = [{split: meta["counts"][split]["tokens"] for split in SPLITS} for meta in metas]
    write_json(finished, {**key, "splits": totals, "dropped": dropped, "shards": lengths})
    return out


def text_hash(paths: Sequence[Path], *, progress: bool = False) -> str:
    """SHA-256 of all that the text files hold, in the order that they are read in, whatever they are called.

    Args:
        paths: what `read_documents` takes.
        progress: show a bar where there is a gigabyte or more.

    Raises:
        UserError: what `find_texts` raises.
    """
    from tqdm import tqdm

    texts = [path for path, _ in find_texts(paths)]
    total, digest = sum(map(size_of, texts)), hashlib.sha256()
    with tqdm(total=total, desc="text", unit="B", unit_scale=True, disable=not progress or total < 1 << 30) as bar:
        for path in texts:
            if not path.is_dir():
                require_file(path, "text file")
            for file in files_of(path):
                content = hashlib.sha256()
                with open(file, "rb") as stream:
                    while part := stream.read(1 << 20):
                        content.update(part)
                        bar.update(len(part))
                digest.update(content.digest())
    return digest.hexdigest()


def _sources_of(paths: Sequence[Path]) -> list[list[Any]]:
    """Name, bytes and time of change (ns) of each text file."""
    return [[str(path), size_of(path), path.stat().st_mtime_ns] for path, _ in find_texts(paths)]


def require_outside(out: Path, paths: Sequence[Path]) -> None:
    """Raise UserError when what is written would be read as text the next time."""
    place = Path(os.path.realpath(out))
    for path in paths:
        if Path(path).is_dir() and Path(os.path.realpath(path)) in (place, *place.parents):
            raise UserError(f"out is {str(out)!r}, inside the text {str(path)!r}: give another, or name folders in it.")


def _require_own(out: Path) -> None:
    """Raise UserError when something lies in the directory of a corpus where its own files go."""
    shards = out / "shards"
    foreign = [] if not shards.is_dir() else [name for name in os.listdir(shards) if not SHARD_FILE.fullmatch(name)]
    if foreign:
        raise UserError(
            f"{str(shards)!r} holds {min(foreign)!r}, which is no part of a corpus: move it away or give another out."
        )
    if (out / "manifest.json").exists():
        manifest = read_json(out / "manifest.json", REBUILD)
        if "format" not in manifest or "shards" not in manifest:
            raise UserError(f"{str(out / 'manifest.json')!r} is not of a corpus: move it away or give another out.")


def load_documents(directory: Path, split: str) -> list[Document]:
    """The documents that were held out of training, with their genres, in the corpus's order.

    Args:
        directory: of the corpus.
        split: valid or test; the texts of train are not kept.

    Raises:
        UserError: the corpus is not finished, or the split is another.
    """
    require_one_of("split", split, SPLITS[1:])
    manifest = read_manifest(directory)
    documents = []
    for number, lengths in enumerate(manifest["shards"]):
        if lengths[split]:
            path = _shard(Path(directory) / "shards", number, f"{split}.jsonl")
            with reading(path, REBUILD), open(path, encoding="utf-8") as lines:
                found = [Document(**json.loads(line)) for line in lines]
                if not all(isinstance(value, str) for document in found for value in asdict(document).values()):
                    raise TypeError
            documents += found
    return documents


def corpus_hash(directory: Path) -> str | None:
    """SHA-256 of a corpus's documents, tokenizer and block; None while it is not finished.

    Raises:
        UserError: the corpus is damaged.
    """
    if not (Path(directory) / "manifest.json").is_file():
        return None
    digest = hashlib.sha256(str(read_manifest(directory)["block"]).encode())
    for shard in sorted((Path(directory) / "shards").glob("*.json")):
        content = read_json(shard, REBUILD).get("content")
        digest.update(str(content).encode() if content else shard.read_bytes())  # version 0.1 had no content
    return digest.hexdigest()


class TokenBlocks(Dataset[Tensor]):
    """Token ids (block,) int64 of one split, from the memory map; every token of the corpus is in exactly one block.

    The last block is filled up with end tokens where the tokens do not fill it; `labels` leaves these out of the loss.

    Attributes:
        num_tokens: tokens of the split, without the fill.
        vocab_size: of the tokenizer.
        tokenizer: its `tokenizer_hash`.
        end: id of the end token.
        block: tokens in a block.
    """

    def __init__(self, directory: Path, split: str, *, block: int | None = None) -> None:
        """Open a split of a corpus that `build_corpus` has written.

        Args:
            directory: of the corpus.
            split: train, valid or test.
            block: tokens in a block; None takes the corpus's own.

        Raises:
            UserError: the corpus is not finished or a shard is cut short, train is shorter than a block, or the
                split has no token.
        """
        require_one_of("split", split, SPLITS)
        manifest = read_manifest(directory)
        self.block = manifest["block"] if block is None else block
        require_at_least("block", self.block, 2)
        self.vocab_size, self.end, self.tokenizer = manifest["vocab_size"], manifest["end"], manifest.get("tokenizer")
        self._dtype = np.dtype(manifest["dtype"])
        lengths = [(number, shard[split]) for number, shard in enumerate(manifest["shards"]) if shard[split]]
        self._files = [_shard(Path(directory) / "shards", number, f"{split}.bin") for number, _ in lengths]
        self._begins = np.cumsum([0, *(length for _, length in lengths)])
        self.num_tokens = int(self._begins[-1])
        if not self.num_tokens:
            raise UserError(f"corpus {str(directory)!r} has no token in {split}: build it with a share for {split}.")
        if split == "train" and self.num_tokens < self.block:
            raise UserError(
                f"corpus {str(directory)!r} has {self.num_tokens} training tokens, less than a block of {self.block}: "
                f"give more text or a smaller block."
            )
        for file, (_, length) in zip(self._files, lengths, strict=True):
            size, whole = file.stat().st_size if file.is_file() else 0, length * self._dtype.itemsize
            if size != whole:
                raise UserError(f"{str(file)!r} has {size} bytes instead of {whole}: {REBUILD}.")
        self._maps: dict[int, np.memmap] = {}

    def __len__(self) -> int:
        return -(-self.num_tokens // self.block)

    def __getitem__(self, index: int) -> Int[Tensor, " block"]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        begin = index * self.block
        ids = self.tokens(begin, min(begin + self.block, self.num_tokens))
        fill = self.block - len(ids)
        return torch.from_numpy(np.pad(ids, (0, fill), constant_values=self.end) if fill else ids)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a memory map would be pickled with all its values

    def tokens(self, begin: int, end: int) -> Int[np.ndarray, " n"]:
        """Token ids int64 (end - begin,) of the split as one long stream, an end token after each document."""
        parts = []
        shard = int(np.searchsorted(self._begins, begin, side="right")) - 1
        while begin < end:
            first = int(self._begins[shard])
            stop = min(end, int(self._begins[shard + 1]))
            parts.append(self._map(shard)[begin - first : stop - first].astype(np.int64))
            begin, shard = stop, shard + 1
        found = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        if found.size and found.max() >= self.vocab_size:
            raise self._damaged()
        return found

    def counts(self) -> Int[Tensor, " v"]:
        """How often each token of the vocabulary occurs."""
        total = np.zeros(self.vocab_size, dtype=np.int64)
        for shard in range(len(self._files)):
            counted = np.bincount(self._map(shard), minlength=self.vocab_size)
            if len(counted) > self.vocab_size:
                raise self._damaged()
            total += counted
        return torch.from_numpy(total)

    def _damaged(self) -> UserError:
        return UserError(
            f"a shard in {str(self._files[0].parent)!r} holds tokens that are not in the vocabulary: {REBUILD}."
        )

    def _map(self, shard: int) -> np.memmap:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self._files[shard], dtype=self._dtype, mode="r")
        return self._maps[shard]


def labels(blocks: Int[Tensor, "*b t"], end: int) -> Int[Tensor, "*b t"]:
    """`blocks` with IGNORE at the fill of a last block: end tokens that follow an end token."""
    fill = torch.zeros_like(blocks, dtype=torch.bool)
    fill[..., 1:] = (blocks[..., 1:] == end) & (blocks[..., :-1] == end)
    return blocks.masked_fill(fill, IGNORE)


class _Selection:
    """Which documents and paragraphs are new, and which split a document is in. Holds 64 bits of each one's hash."""

    def __init__(self, shares: Sequence[float], seed: int) -> None:
        self.shares, self.seed = shares, seed
        self.duplicates = self.emptied = self.repeated = 0
        self._documents: set[int] = set()
        self._paragraphs: set[int] = set()

    def take(self, document: Document) -> tuple[str, str] | None:
        """The split and the new paragraphs of a document, or None when nothing of it is new."""
        whole = _hash(document.text)
        if whole in self._documents:
            self.duplicates += 1
            return None
        self._documents.add(whole)
        kept = []
        for paragraph in document.text.split("\n"):
            digest = _hash(paragraph)
            if digest in self._paragraphs:
                self.repeated += 1
            else:
                self._paragraphs.add(digest)
                kept.append(paragraph)
        if not kept:
            self.emptied += 1
            return None
        place = _hash(f"{self.seed}\n{document.text}") / 2**64
        if place < self.shares[1]:
            split = "valid"
        else:
            split = "test" if place < self.shares[1] + self.shares[2] else "train"
        return split, "\n".join(kept)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


_Row = tuple[str, str, str, str]
"""Split, text, source and genre of a document."""


def _write_shards(
    paths: Sequence[Path],
    selection: _Selection,
    shards: Path,
    tokenizer: str,
    setup: tuple[str, int, str],
    workers: int,
    chunk: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """Write the shards that are not there yet; returns what is known of each, in order.

    The documents are read and chosen here, in one process; the workers tokenize and write. At most two chunks for each
    worker wait, so that memory does not grow with the corpus.
    """
    import multiprocessing

    from tqdm import tqdm

    metas: list[dict[str, Any]] = []
    waiting: deque[tuple[int, int, Future[None] | None]] = deque()  # None: it is there already
    encoder = _Encoder(*setup)
    begun, tokens = time.monotonic(), 0
    # Started afresh and not forked: a fork would copy the threads' locks of torch and of the tokenizer.
    pool = (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=setup)
        if workers > 1
        else None
    )
    size = sum(size_of(path) for path, _ in find_texts(paths))
    bar = tqdm(total=size, desc="corpus", unit="B", unit_scale=True, disable=not progress)
    try:

        def finish() -> None:
            nonlocal tokens
            number, position, future = waiting.popleft()
            if future is not None:
                future.result()
            meta = json.loads(_shard(shards, number, "json").read_text(encoding="utf-8"))
            metas.append(meta)
            if future is not None:
                tokens += sum(counts["tokens"] for counts in meta["counts"].values())
            bar.set_postfix_str(f"{tokens / max(time.monotonic() - begun, 1e-9):,.0f} tokens/s", refresh=False)
            bar.update(position - bar.n)

        for number, (rows, position) in enumerate(_chunks(paths, selection, chunk)):
            known = [tokenizer, *setup[1:]]
            digest = _sha256([*known, rows])
            content = _sha256([*known, [row[:2] for row in rows]])
            future: Future[None] | None = None
            if not _is_written(shards, number, digest, setup[2]):
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
    return metas


def _chunks(paths: Sequence[Path], selection: _Selection, chunk: int) -> Iterator[tuple[list[_Row], int]]:
    """New documents in lists of at least `chunk` bytes of text, with the position in the files after each."""
    rows: list[_Row] = []
    size = position = 0
    for document, position in read_with_positions(paths):
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


def _shard(shards: Path, number: int, suffix: str) -> Path:
    return shards / f"{number:06}.{suffix}"


def _is_written(shards: Path, number: int, digest: str, dtype: str) -> bool:
    """Whether a shard of exactly these documents is there, whole. Its json is written last."""
    try:
        meta = json.loads(_shard(shards, number, "json").read_text(encoding="utf-8"))
        files = [(_shard(shards, number, f"{split}.bin"), meta["counts"][split]["tokens"]) for split in SPLITS]
    except (FileNotFoundError, *MALFORMED):
        return False
    return meta["digest"] == digest and all(
        (file.stat().st_size if file.is_file() else 0) == length * np.dtype(dtype).itemsize for file, length in files
    )


class _Encoder:
    """What a shard is written with: the tokenizer (as JSON), its end token's id and the type of the ids."""

    def __init__(self, tokenizer: str, end: int, dtype: str) -> None:
        from tokenizers import Tokenizer

        self.tokenizer, self.end, self.dtype = Tokenizer.from_str(tokenizer), end, np.dtype(dtype)
        self.tokenizer.encode_special_tokens = True  # a text that spells the end token does not end there
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()


_worker_encoder: _Encoder
"""A worker process's: too large to be sent with each chunk."""


def _begin_worker(tokenizer: str, end: int, dtype: str) -> None:
    import multiprocessing
    from multiprocessing import connection

    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    _worker_encoder = _Encoder(tokenizer, end, dtype)
    parent = multiprocessing.parent_process()

    def leave() -> None:  # with a parent that was killed, or the worker would wait for work for ever
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _work(shards: Path, number: int, digest: str, content: str, rows: list[_Row]) -> None:
    _write_shard(_worker_encoder, shards, number, digest, content, rows)


def _write_shard(encoder: _Encoder, shards: Path, number: int, digest: str, content: str, rows: list[_Row]) -> None:
    """Tokenize documents and write each split's ids and held-out texts, then what is known of the shard.

    Its `digest` is of all of the documents, its `content` not of the names of their files.
    """
    # First, or after a stop it might vouch for files that were written since.
    _shard(shards, number, "json").unlink(missing_ok=True)
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
        binary, held_out = (_shard(shards, number, f"{split}.{suffix}") for suffix in ("bin", "jsonl"))
        for path in (binary, held_out):
            path.unlink(missing_ok=True)
        if not ids:
            continue
        with whole_file(binary) as file:
            file.write(np.asarray(ids, dtype=encoder.dtype).tobytes())
        if split != "train":
            lines = (json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in texts)
            write_text(held_out, "".join(lines))
    write_json(_shard(shards, number, "json"), {"digest": digest, "content": content, "counts": counts})


def read_manifest(directory: Path) -> dict[str, Any]:
    """What is known of a corpus.

    Raises:
        UserError: it is not finished, damaged, or of another version.
    """
    path = Path(directory) / "manifest.json"
    if not path.is_file():
        raise UserError(f"corpus {str(directory)!r} has no manifest.json: build it with `recycle-gpt2 corpus`.")
    manifest = read_json(path, REBUILD)
    if manifest.get("format") != FORMAT:
        raise UserError(f"corpus {str(directory)!r} is of another version of this program: build it again.")
    if not _is_whole(manifest):
        raise UserError(f"{str(path)!r} is damaged: {REBUILD}.")
    return manifest


def _is_whole(manifest: dict[str, Any]) -> bool:
    """Whether a manifest has all that is read of it."""
    block, vocab_size, end, shards = (manifest.get(name) for name in ("block", "vocab_size", "end", "shards"))
    if not all(isinstance(value, int) for value in (block, vocab_size, end)) or not isinstance(shards, list):
        return False
    counts = [shard.get(split) if isinstance(shard, dict) else None for shard in shards for split in SPLITS]
    try:
        counts += [manifest["splits"][split][name] for split in SPLITS for name in COUNTED]
        counts += [manifest["dropped"][name] for name in ("documents", "paragraphs")]
    except MALFORMED:
        return False
    return (
        manifest.get("dtype") in ("uint16", "uint32")
        and 0 <= end < vocab_size  # type: ignore[operator]
        and all(isinstance(count, int) and count >= 0 for count in counts)
    )
