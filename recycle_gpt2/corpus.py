"""Text in a new language: files of any size to packed, memory-mapped token blocks."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from common.checks import UserError, require_at_least, require_file, require_one_of
from common.language import IGNORE
from common.report import write_json, write_text
from recycle_gpt2.tokenizer import load_tokenizer, tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES: tuple[str, ...] = (".txt", ".jsonl", ".html", ".htm", ".xhtml")
"""Files that are read in a directory; each also with .xz or .gz."""
COMPRESSED: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
SPLITS: tuple[str, ...] = ("train", "valid", "test")
FORMAT = 1
CHUNK = 4 << 20
"""UTF-8 bytes of text whose documents make a shard."""


@dataclass(frozen=True)
class Document:
    """A text, its paragraphs separated by line breaks."""

    text: str
    source: str
    """The file that it is from."""
    genre: str
    """The top folder below the directory that was given, or the file's name without suffixes, or the jsonl's own."""


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
    directory = build_corpus(
        config.text,
        load_tokenizer(config.tokenizer),
        config.out,
        block=config.block,
        shares=config.shares,
        workers=config.workers,
        seed=config.seed,
    )
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    for split in SPLITS:
        counts = manifest["splits"][split]
        print(f"{split}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, {counts['tokens']:,} tokens")
    dropped = manifest["dropped"]
    print(f"duplicates dropped: {dropped['documents']:,} documents, {dropped['paragraphs']:,} paragraphs")


def read_documents(paths: Sequence[Path], *, suffixes: Sequence[str] = SUFFIXES) -> Iterator[Document]:
    """Stream the documents of files and directories, in an order that is always the same.

    `.txt` has a paragraph a line and an empty line between documents; `.jsonl` an object a line with "text" and
    perhaps "genre"; `.html` is one document of its running text; a directory that `datasets` has saved gives its column
    "text". `.xz` and `.gz` are unpacked on the way. Any other file that is named itself is read as `.txt`.

    Args:
        paths: files or directories; inside directories, files with one of `suffixes` are read.
        suffixes: with their dots.

    Raises:
        UserError: a file is missing, empty, binary, damaged or not UTF-8 (the line is named), or holds no text.
    """
    for document, _ in _read_all(paths, suffixes):
        yield document


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
    raise NotImplementedError


def load_documents(directory: Path, split: str) -> list[Document]:
    """The documents that were held out of training, with their genres; split is "valid" or "test"."""
    raise NotImplementedError


class TokenBlocks(Dataset[Tensor]):
    """Token ids (block,) int64 of one split, from the memory map; every token of the corpus is in exactly one block.

    The last block is filled up with end tokens where the tokens do not fill it; `labels` leaves these out of the loss.

    Attributes:
        num_tokens: tokens of the split, without the fill.
        vocab_size: of the tokenizer.
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
            UserError: the corpus is not finished or damaged, or the split has fewer tokens than one block
                (for train) or none.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Int[Tensor, " block"]:
        raise NotImplementedError

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Token ids int64 (end - begin,) of the split's one long stream."""
        raise NotImplementedError

    def counts(self) -> Int[Tensor, " v"]:
        """How often each token of the vocabulary occurs."""
        raise NotImplementedError


def labels(blocks: Int[Tensor, "*b t"], end: int) -> Int[Tensor, "*b t"]:
    """`blocks` with IGNORE at the fill of a last block: end tokens that follow an end token."""
    fill = torch.zeros_like(blocks, dtype=torch.bool)
    fill[..., 1:] = (blocks[..., 1:] == end) & (blocks[..., :-1] == end)
    return blocks.masked_fill(fill, IGNORE)
