"""A bilingual lexicon: the source words nearest to each target word in one embedding space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from common.checks import UserError, require_at_least, require_file, require_one_of
from common.report import write_json, write_text
from common.runtime import RuntimeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Neighbours(NamedTuple):
    """Rows of the source table nearest to each target row, best first."""

    indices: Int[Tensor, "n k"]
    scores: Float[Tensor, "n k"]


@dataclass(frozen=True)
class Entry:
    """A target word with its nearest source words, best first."""

    word: str
    candidates: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Precision:
    """Share of the dictionary's words whose translation is first, and among the first five."""

    at_1: float
    at_5: float
    words: int
    """Words of the lexicon that the dictionary has, with a translation that the lexicon could give."""


@dataclass(frozen=True)
class LexiconConfig:
    """Write the English words nearest to each word of a recycled model."""

    model: Path
    """Directory of the recycled model."""
    source: str = "gpt2"
    """The English model that it was made from: its embeddings are the same space."""
    out: Path = Path("lexicon.tsv")
    """The table: word, then candidates, each with its score; a .json of the same name holds the precision."""
    k: int = 10
    """Candidates of each word."""
    measure: Literal["csls", "cosine"] = "csls"
    """csls lowers words that are near to everything (Conneau et al. 2018); cosine is plain."""
    dictionary: Path | None = None
    """File of word, tab, English word in each line, to measure precision at 1 and 5."""
    words: int = 10_000
    """Words in the table at most, the most frequent (by token id) first; 0 takes all."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def run(config: LexiconConfig) -> None:
    """Make the lexicon that `config` describes, write it, and print its first lines."""
    raise NotImplementedError


def nearest(
    target_table: Float[Tensor, "n d"],
    source_table: Float[Tensor, "v d"],
    *,
    k: int = 10,
    measure: str = "csls",
    neighbourhood: int = 10,
    chunk: int = 1024,
) -> Neighbours:
    """The `k` source rows nearest to each target row, in chunks of target rows.

    CSLS(x, y) = 2 cos(x, y) - r(x) - r(y), r the mean cosine to the `neighbourhood` nearest rows of the other table
    (Conneau et al. 2018, sec. 2.3).
    """
    raise NotImplementedError


def build_lexicon(
    target_table: Float[Tensor, "n d"],
    target_tokenizer: PreTrainedTokenizerBase,
    source_table: Float[Tensor, "v d"],
    source_tokenizer: PreTrainedTokenizerBase,
    *,
    k: int = 10,
    measure: str = "csls",
    words: int = 0,
) -> list[Entry]:
    """Entries of the target tokens that begin a word, their candidates among the source's."""
    raise NotImplementedError


def precision(lexicon: Sequence[Entry], dictionary_path: Path) -> Precision:
    """How often a dictionary's translation is the first candidate, and among the first five; case does not matter."""
    raise NotImplementedError


def read_dictionary(path: Path) -> list[tuple[str, str]]:
    """Pairs of target word and source word: one pair a line, separated by a tab.

    Raises:
        UserError: the file is missing, empty, not UTF-8 or a line is not a pair (it is named).
    """
    raise NotImplementedError


def word_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens that begin a word (a space, then letters, at least two) by their word, in the order of their ids."""
    raise NotImplementedError
