"""What a run of all stages is asked for, and which of it cannot work."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common.checks import (
    UserError,
    require_at_least,
    require_between,
    require_fields_at_least,
    require_language,
    require_rate,
)
from common.runtime import RuntimeConfig
from recycle_gpt2.alignment import AlignmentConfig
from recycle_gpt2.bad_rows import TextOptions
from recycle_gpt2.duplicates import DuplicatesConfig
from recycle_gpt2.extend import EnglishConfig
from recycle_gpt2.lexical import RowsConfig
from recycle_gpt2.rows import require_rows
from recycle_gpt2.shards import MOST_WORKERS
from recycle_gpt2.splits import SHARES, require_shares
from recycle_gpt2.tokenizer import TokenizerOptions, require_extended, require_vocab_size
from recycle_gpt2.training import StageConfig


@dataclass(frozen=True)
class RunConfig:
    """Make a GPT-2 of a new language from an English one.

    The stages are text, tokenizer, corpus, english (with replay), relearn, align, relearn-large, finetune,
    evaluate, lexicon and card. Each has a directory in OUT.stages; a stopped run resumes when the
    same command is given again. A stage that was deleted, or whose text has changed, is made again with all that was
    made of it; earlier training is kept beside it. OUT is an ordinary Hugging Face directory with the tokenizer and a
    card.
    """

    text: tuple[Path, ...]
    """Files or directories of text: .txt, .md, .html, .jsonl, .json, .csv, .parquet (also .xz, .gz, .bz2, .zst), or a
    Hugging Face dataset on disk or, as hf:NAME or hf:NAME:CONFIGURATION, streamed from the hub; a split named test is
    left out."""
    out: Path
    """Directory of the finished model."""
    language: Annotated[str | tuple[str, ...], tyro.conf.arg(metavar="CODE [CODE ...]")]
    """Code of the new language, such as nld or ita. Of several, all other settings are the same: {language} in the
    names of text, dictionary and vectors stands for the code, and the models are OUT/NAME-CODE, NAME being OUT's."""
    small: str = "gpt2"
    """English model whose embeddings are relearned: tiny, gpt2, distilgpt2, or a directory."""
    large: str = ""
    """Larger English model of the same vocabulary that the embeddings are carried over to; nothing stays small."""
    vocab_size: int | None = None
    """Tokens of the new tokenizer (the paper: 40,000 for Dutch, 30,000 for Italian). Left out, one for every 800 bytes
    of text, but at least 512 and at most 40,000."""
    block: int = 1024
    """Tokens in a block; at most the models' positions."""
    shares: tuple[float, float, float] = SHARES
    """Shares of the documents in train, valid and test, each above 0."""
    workers: int = 1
    """Processes that tokenize the corpus."""
    dictionary: Path | None = None
    """File of target word, tab, English word in each line: with focus and transplant, these words take their
    translations' rows; with any other initialisation, it measures the lexicon."""
    large_share: float = 0.25
    """Length of relearning in the large model, as a share of that in the small one; 0 leaves it out."""
    unfreeze: Literal["all", "top", "none"] = "all"
    """Last training of the whole model: all at once, top (layer by layer from the output), or none."""
    finetune_share: float = 1.0
    """Length of that training, as a share of relearning."""
    finetune_lr: float | None = None
    """Its learning rate (the paper: 1e-4); left out, chosen like lr."""
    push_to_hub: str = ""
    """Upload the finished model to this repository (user/name, or user/name-{language}) of the Hugging Face hub."""
    options: TokenizerOptions = field(default_factory=TokenizerOptions)
    kept: EnglishConfig = field(default_factory=EnglishConfig)
    drop: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    reading: TextOptions = field(default_factory=TextOptions)
    rows: RowsConfig = field(default_factory=RowsConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def check(self) -> None:
        """Raise UserError for values that cannot work, before any file is opened but the vectors."""
        one_language(self.language)
        require_fields_at_least(self, 0, "large_share", "finetune_share")
        if not min(self.shares) > 0:
            raise UserError(f"shares are {self.shares}: use three above 0, each of train, valid and test is needed.")
        require_shares(self.shares)
        require_at_least("block", self.block, 2)
        require_between("workers", self.workers, 1, MOST_WORKERS)
        require_rows(self.rows)
        self.kept.check()
        if self.kept.extend:
            require_extended(self.vocab_size, self.options)
        else:
            require_vocab_size(self.vocab_size)
        if self.large:
            require_at_least("k", self.alignment.k, 1)
        self.stage.check()
        require_rate("finetune_lr", self.finetune_lr)
        if self.kept.replay and (self.unfreeze == "none" or self.finetune_share == 0):
            raise UserError(f"replay is {self.kept.replay:g} but nothing is fine-tuned: leave it out, or fine-tune.")
        if self.out.name in ("", ".."):
            raise UserError(f"out is {str(self.out)!r}, which names no new directory: give one that does, as out/gpt2.")


def one_language(code: str | tuple[str, ...]) -> str:
    """Return the code of one language, which also stands in the names of files, or raise UserError."""
    if isinstance(code, tuple):
        if len(code) != 1:
            raise UserError(f"language names {len(code)} languages: `recycle` makes one, `recycle_each` several.")
        code = code[0]
    require_language(code)
    return code
