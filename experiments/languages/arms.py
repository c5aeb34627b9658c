"""The ways to a new language that are compared, and the model that each begins with."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from common.gpt2 import load_gpt2, token_table
from common.runtime import RuntimeConfig
from recycle_gpt2.alignment import align
from recycle_gpt2.baseline import fit_ngrams, score_ngrams
from recycle_gpt2.blocks import TokenBlocks
from recycle_gpt2.documents import Document
from recycle_gpt2.evaluate import DocumentScore
from recycle_gpt2.lexical import (
    INITIALISATIONS,
    initialise,
    reinitialise_layers,
    replace_lexical,
    shuffle_weights,
    train_only,
)

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast


MEDIUM = ("aligned medium, all", "medium from FOCUS rows, all", "medium from random rows, all")
"""The larger model with everything trained: rows carried over from the relearned small model, or begun there."""
METHODS: dict[str, dict[str, Any]] = {
    "least squares": {"method": "least_squares"},
    "least squares, chosen options": {"method": "least_squares"},
    "Procrustes": {"method": "procrustes"},
    "Procrustes with scale": {"method": "procrustes", "scale": True},
    "kNN, 1": {"method": "knn", "k": 1},
    "kNN, 10": {"method": "knn", "k": 10},
    "random rows": {},
    "FOCUS rows": {},
}
"""Where the medium model's rows come from, with the arguments of `align`."""
FROZEN = ("frozen English", "frozen shuffled English", "frozen fresh layers")
WHOLE = ("scratch", "all from English")
UNFROZEN = "relearned, then unfrozen"
SHUFFLED_RANDOM = "frozen shuffled English, random rows"
ARMS = ("frozen English", "frozen shuffled English", *WHOLE, UNFROZEN, "frozen fresh layers", SHUFFLED_RANDOM)
FRESH = ("frozen fresh layers", "scratch")
"""Arms that begin as GPT-2's own initialisation does, layers and rows."""


@dataclass(frozen=True)
class Config:
    """Recycle the packaged English models for one language, with all controls."""

    text: Path
    """Directory of LANG.train.txt(.xz) and LANG.valid.txt(.xz)."""
    language: Literal["nld", "ita"] = "nld"
    """nld or ita."""
    out: Path = Path("out/recycle")
    """Where texts, corpora and runs go."""
    parts: tuple[str, ...] = ("baselines", "tune", "main", "seeds")
    """What to run: baselines, tune, main (seed 0 of every arm), seeds (1, 2 of the main arms), alignment (methods),
    medium (what alignment saves when all trains), data_size (1 and 10 %), budgets (of training tokens),
    initialisations (of rows)."""
    arms: tuple[str, ...] = ARMS
    """Arms of the part main."""
    vocab_size: int = 4096
    """Tokens of the new language's tokenizer."""
    initialisation: str = "focus"
    """How the new token tables begin in English (or shuffled) layers; fresh ones have GPT-2's own initialisation."""
    tokens: int = 250_000
    """Training tokens of each arm."""
    tune_tokens: int = 150_000
    """Training tokens of each learning rate that is tried."""
    initialisations: tuple[str, ...] = INITIALISATIONS
    """Of the part initialisations."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Rows of the part alignment."""
    budgets: tuple[int, ...] = (62_500, 1_000_000)
    """Training tokens of the part budgets, beside --tokens."""
    budget_arms: tuple[str, ...] = ("all from English", "scratch")
    """Arms of the part budgets."""
    brief_tokens: int = 50_000
    """Training tokens of the medium model after its alignment."""
    block: int = 256
    """Tokens in a block."""
    batch_size: int = 4
    """Blocks in a step."""
    rates_of: Path | None = None
    """Take the learning rates that were tuned in this directory (another language's), instead of tuning."""
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(device="cpu", precision="bf16", threads=1))


@dataclass
class Language:
    """The data of one language."""

    directory: Path
    tokenizer: PreTrainedTokenizerFast
    train: TokenBlocks
    valid: TokenBlocks
    documents: dict[str, list[Document]]
    auxiliary: torch.Tensor

    @cached_property
    def ngram_scores(self) -> dict[str, list[DocumentScore]]:
        """Of the Kneser-Ney model of the training tokens on each genre's documents."""
        model = fit_ngrams(self.train)
        return {split: score_ngrams(model, self.tokenizer, documents) for split, documents in self.documents.items()}


def first_rows(
    initialisation: str,
    model: GPT2LMHeadModel,
    english: PreTrainedTokenizerFast,
    language: Language,
    generator: torch.Generator,
) -> torch.Tensor:
    """Rows of the new language, made of an English model's."""
    return initialise(
        initialisation,
        token_table(model),
        english,
        language.tokenizer,
        generator=generator,
        auxiliary=language.auxiliary,
        target_counts=language.train.counts(),
    )


def begin(arm: str, config: Config, language: Language, seed: int) -> GPT2LMHeadModel:
    """The model that an arm begins with, and the tensors that it trains first."""
    generator = torch.Generator().manual_seed(seed)
    if arm in MEDIUM:
        return begin_medium(arm, config, language, generator)
    model, english = load_gpt2("tiny")
    if arm in FRESH:  # English rows are much too large for fresh layers: a loss of 36 nats
        shape = len(language.tokenizer), model.config.n_embd
        rows = model.config.initializer_range * torch.randn(shape, generator=generator)
    else:
        how = "random" if arm == SHUFFLED_RANDOM else config.initialisation
        rows = first_rows(how, model, english, language, generator)
    if arm in ("frozen shuffled English", SHUFFLED_RANDOM):
        shuffle_weights(model, generator)
    if arm in FRESH:
        reinitialise_layers(model, generator)
    replace_lexical(model, language.tokenizer, rows)
    train_only(model, layers="all" if arm in WHOLE else ())
    return model


def begin_medium(arm: str, config: Config, language: Language, generator: torch.Generator) -> GPT2LMHeadModel:
    """The larger model with a table of the new language, all of it to be trained."""
    model, english = load_gpt2("tiny-medium")
    if arm == MEDIUM[0]:
        relearned, _ = load_gpt2(language.directory / "runs" / "frozen-English-seed0" / "model", frozen=True)
        small, _ = load_gpt2("tiny", frozen=True)
        rows = align(token_table(small), token_table(model), token_table(relearned), method="least_squares")
    else:
        rows = first_rows(config.initialisation if arm == MEDIUM[1] else "random", model, english, language, generator)
    replace_lexical(model, language.tokenizer, rows)
    train_only(model, layers="all")
    return model


def slug(arm: str) -> str:
    """An arm's name as a folder's."""
    return arm.replace(" ", "-").replace(",", "")
