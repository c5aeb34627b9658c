"""A byte-level tokenizer for the new language, trained on its text: BPE as GPT-2's, or Unigram, for any script."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common import pretrained
from common.checks import UserError, require_between, require_place, require_text
from common.files import move_into, require_own_directory, whole_directory
from common.words import mark_share
from recycle_gpt2.bad_rows import TextOptions
from recycle_gpt2.documents import Document, read_documents
from recycle_gpt2.extend import extend_tokenizer
from recycle_gpt2.splits import SHARES, require_shares, split_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "<|endoftext|>"
NUM_BYTES = 256
BYTES_A_TOKEN, FEWEST, VOCAB_SIZE = 800, 512, 40_000
"""Of a new tokenizer unless its size is given: text for each token, and the fewest and most tokens (the paper's for
Dutch). A token that a text has less often than some two hundred times is hardly learnt."""
MOST_TOKENS = 1 << 24
"""Above, the training itself would ask for more memory than there is."""
LOOKED_AT = 1 << 20
"""Characters at the beginning of the text that tell "auto" how many combining marks there are."""
MANY_MARKS = 0.02
"""Share of combining marks above which "auto" keeps them with their letters."""
_LETTERS = r"\p{L}\p{M}" + "\u200c\u200d"
MARKS = rf"'(?:[sdmt]|ll|ve|re)| ?[{_LETTERS}]+| ?\p{{N}}+| ?[^\s\p{{N}}{_LETTERS}]+|\s+(?!\S)|\s+"
"""GPT-2's pattern with combining marks and joiners among the letters."""
LINES = r"\n+"


@dataclass(frozen=True)
class TokenizerOptions:
    """What kind of tokenizer is trained."""

    pieces: Literal["bpe", "unigram"] = "bpe"
    """bpe merges frequent pairs, as GPT-2's; unigram keeps the likeliest pieces (Kudo 2018). Both are of bytes."""
    split_pattern: Literal["auto", "gpt2", "marks", "none"] = "auto"
    """Where no token reaches over: gpt2 (words, cut at every combining mark), marks (words with their marks: Hindi,
    Tamil, Thai, pointed Hebrew), none (ends of lines only), or auto: marks where the text has many, otherwise gpt2."""
    nfc: bool = False
    """Put text into Unicode's form NFC first: letters with accents become one character, and text in another form is
    not given back as it was."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Train a byte-level tokenizer on text."""

    text: tuple[Path, ...]
    """Files or directories of text: .txt, .md, .html, .jsonl, .json, .csv, .parquet (also .xz, .gz, .bz2, .zst), or a
    Hugging Face dataset on disk or, as hf:NAME or hf:NAME:CONFIGURATION, streamed from the hub; a split named test is
    left out."""
    out: Path
    """Directory that the tokenizer is saved in; AutoTokenizer loads it."""
    vocab_size: int | None = None
    """Tokens, of which 256 are bytes and one is the end token (the paper: 40,000 for Dutch, 30,000 for Italian). Left
    out, one for every 800 bytes of text, but at least 512 and at most 40,000."""
    shares: tuple[float, float, float] = SHARES
    """Shares of the documents in train, valid and test, as the corpus will have them: test documents are not read."""
    seed: int = 0
    """The corpus's: it decides which documents are test documents."""
    model: str = ""
    """English model whose tokenizer is extended (with --extend), instead of a new one."""
    extend: int = 0
    """Tokens that are added to that model's, instead of a new tokenizer of vocab_size."""
    english: tuple[Path, ...] = ()
    """With extend: English text that is tokenized as before, because no pair of tokens in it is merged."""
    options: TokenizerOptions = field(default_factory=TokenizerOptions)
    reading: TextOptions = field(default_factory=TextOptions)


def run(config: TokenizerConfig) -> None:
    """Train the tokenizer on the text that `config` names and save it."""
    require_text("out", config.out)
    require_place(config.out, directory=True)
    require_own_directory(config.out, "tokenizer")
    require_shares(config.shares)
    if bool(config.model) != bool(config.extend) or (config.english and not config.extend):
        raise UserError(
            f"model is {config.model!r} and extend {config.extend}: give both to extend its tokenizer, with English "
            f"text or without, or none of them."
        )
    texts = texts_but_test(read_documents(config.text, config.reading), config.shares, config.seed)
    if config.extend:
        english = read_documents(config.english, config.reading) if config.english else ()
        tokenizer = extended(config.model, texts, config.extend, english, config.vocab_size, config.options)
    else:
        tokenizer = train_tokenizer(texts, config.vocab_size, options=config.options, progress=True)
    with whole_directory(config.out, "tokenizer") as partial:
        tokenizer.save_pretrained(partial)
    print(f"{len(tokenizer):,} tokens ({describe(tokenizer)}) written to {config.out}")


def extended(
    model: str,
    texts: Iterable[str],
    count: int,
    english: Iterable[Document],
    vocab_size: int | None,
    options: TokenizerOptions,
) -> PreTrainedTokenizerFast:
    """The tokenizer of an English model with `count` tokens more; see `recycle_gpt2.extend`.

    Raises:
        UserError: size or options of a new tokenizer are given too.
    """
    from common.gpt2 import load_gpt2

    require_extended(vocab_size, options)
    keep = (document.text for document in english)
    return extend_tokenizer(load_gpt2(model)[1], _counted(texts, True), count, keep=keep)


def require_extended(vocab_size: int | None, options: TokenizerOptions) -> None:
    """Raise UserError where what decides a new tokenizer stands beside an extended one."""
    if vocab_size is not None or options != TokenizerOptions():
        raise UserError(
            "vocab_size, pieces, split_pattern and nfc are of a new tokenizer, and an extended one keeps those of the "
            "English one: leave them out, or leave out extend."
        )


def require_vocab_size(vocab_size: int | None) -> None:
    """Raise UserError for a number of tokens that no tokenizer can have."""
    if vocab_size is not None:
        require_between("vocab_size", vocab_size, NUM_BYTES + 1, MOST_TOKENS)


def texts_but_test(documents: Iterable[Document], shares: tuple[float, float, float], seed: int) -> Iterator[str]:
    """The texts of the documents that a corpus of these shares and seed does not hold out for its test."""
    return (document.text for document in documents if split_of(document.text, shares, seed) != "test")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int | None = None,
    *,
    end_token: str = END,
    options: TokenizerOptions | None = None,
    progress: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of `vocab_size` tokens: every byte, `end_token` (id 0), and what `options` say.

    Any Unicode text survives it, but for the form of text that `nfc` normalises.

    Args:
        texts: documents, read once and not kept.
        vocab_size: tokens, at least 257; None for as many as suit the texts (`TokenizerConfig`), where they support
            them.
        end_token: stands between documents.
        options: kind, split pattern and normalisation.
        progress: show how many documents have been read.

    Raises:
        UserError: `vocab_size` is below 257, or more than what the texts support (BPE merges a pair if it occurs
            twice).
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

    require_vocab_size(vocab_size)
    options = options or TokenizerOptions()
    chosen, texts = _split_for(options.split_pattern, _counted(texts, progress))
    size, texts = (vocab_size, texts) if vocab_size is not None else _size_for(texts)
    common: dict[str, Any] = dict(
        vocab_size=size,
        special_tokens=[end_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trainer: Any
    if options.pieces == "bpe":
        backend, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(min_frequency=2, **common)
    else:
        backend, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(**common)
    if options.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(chosen)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.train_from_iterator(texts, trainer)
    found = backend.get_vocab_size()
    if vocab_size is not None and found < vocab_size:
        raise UserError(
            f"vocab_size is {vocab_size} but the text supports {found} tokens: leave it out for as many as suit it."
        )
    # GPT-2's own class would come back from the disk with GPT-2's split pattern and no normalisation.
    as_gpt2 = options.pieces == "bpe" and chosen == "gpt2" and not options.nfc
    # clean_up_tokenization_spaces would change what decode gives back.
    return (GPT2TokenizerFast if as_gpt2 else PreTrainedTokenizerFast)(
        tokenizer_object=backend,
        bos_token=end_token,
        eos_token=end_token,
        unk_token=end_token,
        clean_up_tokenization_spaces=False,
    )


def _split_for(split: str, texts: Iterator[str]) -> tuple[str, Iterator[str]]:
    """The split pattern's name, "auto" decided by the first of `texts`, and all of them."""
    if split != "auto":
        return split, texts
    first, _ = _first(texts, LOOKED_AT, len)
    marks = mark_share("".join(first)[:LOOKED_AT])
    return "marks" if marks > MANY_MARKS else "gpt2", chain(first, texts)


def _size_for(texts: Iterator[str]) -> tuple[int, Iterator[str]]:
    """The number of tokens that suits `texts`, and all of them."""
    first, size = _first(texts, VOCAB_SIZE * BYTES_A_TOKEN, lambda text: len(text.encode("utf-8", "surrogatepass")))
    return min(max(FEWEST, size // BYTES_A_TOKEN), VOCAB_SIZE), chain(first, texts)


def _first(texts: Iterator[str], enough: int, measure: Callable[[str], int]) -> tuple[list[str], int]:
    """Take from `texts` until they measure `enough` together or are all taken; returns what was taken and its sum."""
    taken: list[str] = []
    size = 0
    for text in texts:
        taken.append(text)
        size += measure(text)
        if size >= enough:
            break
    return taken, size


def _pre_tokenizer(split: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if split == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(MARKS if split == "marks" else LINES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def describe(tokenizer: PreTrainedTokenizerBase) -> str:
    """Kind, split pattern and normalisation of a tokenizer in a few words, for people."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = {"BPE": "byte-level BPE", "Unigram": "byte-level Unigram"}.get(
        state["model"]["type"], state["model"]["type"]
    )
    parts = (state["pre_tokenizer"] or {}).get("pretokenizers", [state["pre_tokenizer"]])
    patterns = [part["pattern"].get("Regex") for part in parts if part and part["type"] == "Split"]
    if not patterns and any(part and part["type"] == "ByteLevel" and part["use_regex"] for part in parts):
        words = "GPT-2's split into words"
    elif patterns == [MARKS]:
        words = "split into words that keep their combining marks"
    elif patterns == [LINES]:
        words = "split at the ends of lines only"
    else:
        words = "a split of its own"
    form = (state["normalizer"] or {}).get("type", "no normalisation")
    return f"{kind}, {words}, {form}"


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> Path:
    """Save `tokenizer` in `directory` so that a stop leaves the old files or the new ones; returns `directory`."""
    directory = Path(directory)
    with whole_directory(directory / ".new-tokenizer", "tokenizer") as new:
        tokenizer.save_pretrained(new)
    new = directory / ".new-tokenizer"
    move_into(new, directory, last="tokenizer.json")
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
    if state["model"]["type"] == "Unigram":
        rules.append(state["model"]["vocab"])  # with each piece's log-probability
    return hashlib.sha256(json.dumps(rules).encode()).hexdigest()


def _counted(texts: Iterable[str], progress: bool) -> Iterator[str]:
    from common.progress import Progress

    empty = True
    for text in Progress(texts, desc="tokenizer", unit="document", disable=not progress):
        empty = False
        yield text
    if empty:
        raise UserError("the tokenizer's text has 0 documents: give at least 1.")
