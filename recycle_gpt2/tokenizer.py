"""A byte-level BPE tokenizer for the new language, as GPT-2's, trained on its text."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import pretrained
from common.checks import UserError, require_between, require_place, require_text
from common.files import MARKER, require_own_directory, whole_directory
from recycle_gpt2.documents import read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "<|endoftext|>"
NUM_BYTES = 256
MOST_TOKENS = 1 << 24
"""Above, the training itself would ask for more memory than there is."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Train a byte-level BPE tokenizer on text."""

    text: tuple[Path, ...]
    """Files or directories of text: .txt, .jsonl, .html (also .xz and .gz), or a Hugging Face dataset on disk."""
    out: Path
    """Directory that the tokenizer is saved in; AutoTokenizer loads it."""
    vocab_size: int = 40_000
    """Tokens, of which 256 are bytes and one is the end token (the paper: 40,000 for Dutch, 30,000 for Italian)."""


def run(config: TokenizerConfig) -> None:
    """Train the tokenizer on the text that `config` names and save it."""
    require_text("out", config.out)
    require_place(config.out, directory=True)
    require_own_directory(config.out, "tokenizer")
    tokenizer = train_tokenizer(
        (document.text for document in read_documents(config.text)), config.vocab_size, progress=True
    )
    with whole_directory(config.out, "tokenizer") as partial:
        tokenizer.save_pretrained(partial)
    print(f"{len(tokenizer):,} tokens written to {config.out}")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, end_token: str = END, progress: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` tokens: every byte, `end_token` (id 0) and merges; any Unicode text survives it.

    Args:
        texts: documents, read once and not kept.
        vocab_size: tokens, at least 257.
        end_token: stands between documents.
        progress: show how many documents have been read.

    Raises:
        UserError: `vocab_size` is below 257, or more than what the texts support (a pair is merged if it occurs
            twice).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import GPT2TokenizerFast

    require_between("vocab_size", vocab_size, NUM_BYTES + 1, MOST_TOKENS)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[end_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_counted(texts, progress), trainer)
    found = bpe.get_vocab_size()
    if found < vocab_size:
        raise UserError(
            f"vocab_size is {vocab_size} but the text supports {found} tokens: use at most that, or give more text."
        )
    # clean_up_tokenization_spaces would change what decode gives back.
    return GPT2TokenizerFast(
        tokenizer_object=bpe,
        bos_token=end_token,
        eos_token=end_token,
        unk_token=end_token,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> Path:
    """Save `tokenizer` in `directory` so that a stop leaves the old files or the new ones; returns `directory`."""
    directory = Path(directory)
    with whole_directory(directory / ".new-tokenizer", "tokenizer") as new:
        tokenizer.save_pretrained(new)
    new = directory / ".new-tokenizer"
    # tokenizer.json last: it is what tells that a tokenizer is there.
    names = sorted({file.name for file in new.iterdir()} - {MARKER}, key=lambda name: name == "tokenizer.json")
    for name in names:
        os.replace(new / name, directory / name)
    shutil.rmtree(new)
    return directory


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that is saved in `directory`, alone or beside a model.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not (Path(directory) / "tokenizer.json").is_file():
        raise UserError(f"{str(directory)!r} holds no tokenizer.json: train one with `recycle-gpt2 tokenizer`.")
    try:
        return pretrained.load_tokenizer(directory)
    except Exception as error:  # the Rust parser raises plain Exception
        raise UserError(
            f"the tokenizer in {str(directory)!r} cannot be read ({error}): delete that directory and train it again."
        ) from None


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides a text's ids: vocabulary, merges, added tokens, normalisation and word splitting.

    Not of the whole file: saving and loading writes some of the rest in another way.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = [[token["content"], token["id"]] for token in state["added_tokens"]]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"].get("merges", [])]
    rules = [sorted(tokenizer.get_vocab().items()), merges, added, state["normalizer"], state["pre_tokenizer"]]
    return hashlib.sha256(json.dumps(rules).encode()).hexdigest()


def _counted(texts: Iterable[str], progress: bool) -> Iterator[str]:
    from tqdm import tqdm

    empty = True
    for text in tqdm(texts, desc="tokenizer", unit="document", disable=not progress):
        empty = False
        yield text
    if empty:
        raise UserError("the tokenizer's text has 0 documents: give at least 1.")
