"""Which documents are new: byte for byte, by their paragraphs, or nearly the same by MinHash."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

from common.words import words
from recycle_gpt2.splits import split_of, text_key

if TYPE_CHECKING:
    from recycle_gpt2.formats import Document

Duplicates = Literal["documents", "near", "paragraphs"]
DUPLICATES: tuple[str, ...] = get_args(Duplicates)
BANDS, ROWS = 9, 13
"""Of a MinHash: two documents whose word sequences have the Jaccard similarity s meet in a band with the probability
1 - (1 - s^13)^9, which is 0.1% at 0.5, 40% at 0.8, 93% at 0.9 and 99.8% at 0.95."""
SHINGLE = 5
"""Words in a sequence (Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better")."""
MOST_DOCUMENTS = 4_000_000
"""Whose MinHashes are held, about 0.9 kB each: documents after them are compared with these only."""


@dataclass(frozen=True)
class DuplicatesConfig:
    """What is dropped because it has occurred before."""

    duplicates: Duplicates = "documents"
    """What is dropped: documents (the same text as an earlier one; 0.1 kB of memory a document), near (also those that
    are almost an earlier one, by MinHash; 0.9 kB a document more, 4 GB at most), or paragraphs (also each line that has
    occurred before, 0.1 kB a line: for prose of manuals and web pages, not for dialogue, code or verse)."""


class NearDuplicates:
    """MinHashes of the documents so far (Broder 1997), as a hash of each band."""

    def __init__(self) -> None:
        self._bands: list[set[int]] = [set() for _ in range(BANDS)]
        self._held = 0

    def is_new(self, text: str) -> bool:
        """Whether no earlier document has a band of this one's; it is then held."""
        from datasketch import MinHash

        tokens = words(text, "")
        shingles = {" ".join(tokens[begin : begin + SHINGLE]) for begin in range(max(1, len(tokens) - SHINGLE + 1))}
        minhash = MinHash(num_perm=BANDS * ROWS, seed=1)
        minhash.update_batch([shingle.encode() for shingle in sorted(shingles)])
        ends = range(0, BANDS * ROWS + 1, ROWS)
        keys = [hash(minhash.hashvalues[begin:end].tobytes()) for begin, end in pairwise(ends)]
        if any(key in band for key, band in zip(keys, self._bands, strict=True)):
            return False
        if self._held == MOST_DOCUMENTS:
            said = f"near duplicates after the first {MOST_DOCUMENTS:,} documents are only those of them."
            print(said, file=sys.stderr)
        self._held += 1
        if self._held <= MOST_DOCUMENTS:
            for key, band in zip(keys, self._bands, strict=True):
                band.add(key)
        return True


class Selection:
    """Which documents and paragraphs are new, and which split a document is in.

    Holds 64 bits of each one's hash, 0.1 kB in Python.
    """

    def __init__(self, shares: Sequence[float], seed: int, duplicates: str = "documents") -> None:
        self.shares, self.seed = shares, seed
        self.duplicates = self.emptied = self.repeated = self.near = 0
        self._documents: set[int] = set()
        self._paragraphs: set[int] | None = set() if duplicates == "paragraphs" else None
        self._near = NearDuplicates() if duplicates == "near" else None

    def take(self, document: Document) -> tuple[str, str] | None:
        """The split and the new text of a document, or None when nothing of it is new."""
        whole = text_key(document.text)
        if whole in self._documents:
            self.duplicates += 1
            return None
        self._documents.add(whole)
        if self._near is not None and not self._near.is_new(document.text):
            self.near += 1
            return None
        text = document.text if self._paragraphs is None else self._new_paragraphs(document.text, self._paragraphs)
        if not text:
            self.emptied += 1
            return None
        return split_of(document.text, self.shares, self.seed), text

    def _new_paragraphs(self, text: str, known: set[int]) -> str:
        kept = []
        for paragraph in text.split("\n"):
            digest = text_key(paragraph)
            if digest in known:
                self.repeated += 1
            else:
                known.add(digest)
                kept.append(paragraph)
        return "\n".join(kept)
