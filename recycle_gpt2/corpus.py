"""Text in a new language: documents without duplicates, split, packed into memory-mapped token blocks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.checks import UserError, require_at_least, require_between, require_one_of
from common.files import claimed, clear_leftovers, sync_directory, write_json
from common.parts import Part, ProcessesConfig, own_part, start_processes
from recycle_gpt2.bad_rows import TextOptions
from recycle_gpt2.documents import Document, find_texts, size_of
from recycle_gpt2.duplicates import DUPLICATES, DuplicatesConfig, Selection
from recycle_gpt2.hub import is_hub
from recycle_gpt2.records import MALFORMED, read_json, reading
from recycle_gpt2.shards import CHUNK, COUNTED, MOST_WORKERS, SHARD_FILE, shard_path, write_shards
from recycle_gpt2.splits import SHARES, SPLITS, require_shares
from recycle_gpt2.texts import Text
from recycle_gpt2.tokenizer import load_tokenizer, tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FORMAT = 1
REBUILD = "delete the directory of the corpus and build it again; what was trained on it resumes"


@dataclass(frozen=True)
class CorpusConfig:
    """Turn text into packed token blocks, split into train, valid and test documents.

    On one machine, --workers tokenizes faster. With --num-nodes (or --devices) and torchrun or srun, each process
    reads all of the text and writes a part of the shards, and the one that finishes last completes the corpus, which is
    the same.
    """

    text: tuple[Path, ...]
    """Files or directories of text: .txt, .md, .html, .jsonl, .json, .csv, .parquet (also .xz, .gz, .bz2, .zst), or a
    Hugging Face dataset on disk or, as hf:NAME or hf:NAME:CONFIGURATION, streamed from the hub; a split named test is
    left out."""
    tokenizer: Path
    """Directory of the tokenizer (`recycle-gpt2 tokenizer`)."""
    out: Path
    """Directory that the corpus is written to; an interrupted build resumes there."""
    block: int = 1024
    """Tokens in a block: the model's positions."""
    shares: tuple[float, float, float] = SHARES
    """Shares of the documents in train, valid and test."""
    workers: int = 1
    """Processes that tokenize, for each of --devices."""
    seed: int = 0
    """Another seed holds out other documents."""
    drop: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    reading: TextOptions = field(default_factory=TextOptions)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)


def run(config: CorpusConfig) -> int:
    """Build the corpus that `config` describes, or this process's part of it, and say what is in it."""
    part = own_part(config.processes)
    if part is None:
        return start_processes(run, config, config.processes.devices)
    require_outside(config.out, config.text)
    tokenizer = load_tokenizer(config.tokenizer)
    with claimed(config.out) if part.rank == 0 else contextlib.nullcontext():
        directory = build_corpus(
            config.text,
            tokenizer,
            config.out,
            block=config.block,
            shares=config.shares,
            workers=config.workers,
            seed=config.seed,
            duplicates=config.drop.duplicates,
            reading=config.reading,
            part=part,
        )
    if not (directory / "manifest.json").is_file():  # other processes have yet to write their parts
        return 0
    manifest = read_manifest(directory)
    for split in SPLITS:
        counts = manifest["splits"][split]
        print(f"{split}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, {counts['tokens']:,} tokens")
    dropped = manifest["dropped"]
    print(
        f"duplicates dropped: {dropped['documents']:,} documents, {dropped.get('near', 0):,} near duplicates, "
        f"{dropped['paragraphs']:,} paragraphs"
    )
    return 0


def build_corpus(
    text: Sequence[Path] | Text,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    block: int = 1024,
    shares: tuple[float, float, float] = SHARES,
    workers: int = 1,
    seed: int = 0,
    duplicates: str = "documents",
    reading: TextOptions | None = None,
    progress: bool = True,
    chunk: int = CHUNK,
    part: Part | None = None,
) -> Path:
    """Write the documents of a text as token ids in shards, with the texts of held-out documents and a manifest.

    Documents that have occurred before (byte for byte, white space at the ends of lines aside) are dropped, and more if
    `duplicates` says so. The split of a document depends on its text and `seed` alone. After every document comes an
    end token. The files do not depend on `workers`; a stopped call resumes and ends in the same
    bytes; a finished corpus of the same files and settings is used again.

    Args:
        text: what `read_documents` takes, or a text that is read already.
        tokenizer: a fast one with an end token.
        out: directory of the corpus.
        block: tokens in a block of `TokenBlocks`.
        shares: of the documents in train, valid and test; they sum to 1.
        workers: processes that tokenize.
        seed: another seed holds out other documents.
        duplicates: what is dropped; see `DuplicatesConfig`.
        reading: the column of the text, and the share that may be bad; a text that is read already has its own.
        progress: show a bar of bytes read, with tokens per second.
        chunk: UTF-8 bytes of text in a shard.
        part: of this process, when several build the corpus from the same text at the same paths.

    Returns:
        `out`; while shards of other processes are missing, it holds no manifest.

    Raises:
        UserError: what `read_documents` raises, a split without a document, or less text than one block.
    """
    require_at_least("block", block, 2)
    require_between("workers", workers, 1, MOST_WORKERS)
    require_at_least("seed", seed, 0)
    require_at_least("chunk", chunk, 1)
    require_shares(shares)
    require_one_of("duplicates", duplicates, DUPLICATES)
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError("the tokenizer is not a fast one with an end token: train one with `recycle-gpt2 tokenizer`.")
    out, text = Path(out), text if isinstance(text, Text) else Text(text, reading)
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
        "text": text.hash(progress=progress),
        "column": text.options.column,
        "duplicates": duplicates,
    }
    finished = out / "manifest.json"
    if finished.is_file():
        old = read_json(finished, REBUILD)
        if "sources" in old and old["sources"] == _sources_of(text.paths):  # of version 0.1, which knew texts by these
            old["text"] = key["text"]
        old.setdefault("column", TextOptions().column)  # of an earlier version, which read no other
        old.setdefault("duplicates", "paragraphs")  # which it always dropped
        if all(old.get(name) == value for name, value in key.items()):
            read_manifest(out)
            return out
        finished.unlink(missing_ok=True)  # another process may have
        sync_directory(out)  # or a power cut might bring it back beside other shards
    shards = out / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    clear_leftovers(shards)  # `_require_own` knows them all

    selection = Selection(shares, seed, duplicates)
    setup = (tokenizer.backend_tokenizer.to_str(), key["end"], key["dtype"])
    metas = write_shards(text, selection, shards, key["tokenizer"], setup, workers, chunk, progress, part or Part())
    if metas is None:
        return out
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
    dropped = {
        "documents": selection.duplicates,
        "near": selection.near,
        "emptied": selection.emptied,
        "paragraphs": selection.repeated,
    }
    lengths = [{split: meta["counts"][split]["tokens"] for split in SPLITS} for meta in metas]
    write_json(finished, {**key, "splits": totals, "dropped": dropped, "shards": lengths})
    return out


def _sources_of(paths: Sequence[Path]) -> list[list[Any]]:
    """Name, bytes and time of change (ns) of each text file."""
    return [[str(path), size_of(path), path.stat().st_mtime_ns] for path, _ in find_texts(paths) if not is_hub(path)]


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
            path = shard_path(Path(directory) / "shards", number, f"{split}.jsonl")
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
