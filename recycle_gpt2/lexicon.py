"""A bilingual lexicon: the source words nearest to each target word in one embedding space."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from common.checks import UserError, printable, require_at_least, require_file, require_one_of, require_place
from common.files import write_json, write_text
from common.runtime import resolve_device
from common.words import has_unspaced, is_word
from recycle_gpt2.records import MALFORMED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEASURES: tuple[str, ...] = ("csls", "cosine")


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
    """Words of the lexicon that the dictionary has, with a translation that could be a candidate."""


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
    """File of word, tab, English word in each line, to measure precision at 1 and 5; not one that the model's rows
    were made of (relearn --dictionary), which would only be found again."""
    words: int = 10_000
    """Words in the table at most, the most frequent (by token id) first; 0 takes all."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


def run(config: LexiconConfig) -> None:
    """Make the lexicon that `config` describes, write it, and print its first lines."""
    from common.gpt2 import load_gpt2, token_table

    if config.dictionary is not None:
        require_at_least("k (with a dictionary, for precision at 5)", config.k, 5)
    if config.out.suffix == ".json":
        raise UserError(f"out is {str(config.out)!r}, where the precision goes: use another ending, such as .tsv.")
    require_place(config.out)
    _require_own(config.out)
    pairs = [] if config.dictionary is None else read_dictionary(config.dictionary)
    device = resolve_device(config.device)
    model, tokenizer = load_gpt2(config.model, device=device)
    source, source_tokenizer = load_gpt2(config.source, device=device)
    lexicon = build_lexicon(
        token_table(model),
        tokenizer,
        token_table(source),
        source_tokenizer,
        k=config.k,
        measure=config.measure,
        words=config.words,
    )
    lines = []
    for entry in lexicon:
        scored = zip(entry.candidates, entry.scores, strict=True)
        lines.append("\t".join([entry.word, *(f"{word}\t{score:.4f}" for word, score in scored)]))
    write_text(config.out, "\n".join(lines) + "\n")
    for entry in lexicon[:10]:
        print(printable(f"{entry.word:>16}  {', '.join(entry.candidates[:5])}"))
    found = None
    if config.dictionary is not None:
        require_direction(
            pairs,
            config.dictionary,
            word_tokens(tokenizer, unspaced=True),
            word_tokens(source_tokenizer),
        )
        found = precision(lexicon, config.dictionary, source_words=word_tokens(source_tokenizer))
        print(f"precision at 1: {found.at_1:.3f}, at 5: {found.at_5:.3f} ({found.words:,} words)")
    write_json(config.out.with_suffix(".json"), {"config": config, "words": len(lexicon), "precision": found})
    print(f"{len(lexicon):,} words written to {config.out}")


def _require_own(out: Path) -> None:
    """Raise UserError where the table or its .json would take the place of what no lexicon wrote."""
    if out.is_dir():
        raise UserError(f"out is {str(out)!r}, a directory: give the name of a file.")
    path = out.with_suffix(".json")
    try:
        own = not path.exists() or {"config", "words", "precision"} <= json.loads(path.read_bytes()).keys()
    except MALFORMED:
        own = False
    if not own:
        raise UserError(
            f"out is {str(out)!r}, beside which {str(path)!r} would be replaced, which no lexicon wrote: "
            f"give another name, or move that file away."
        )


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
    require_one_of("measure", measure, MEASURES)
    require_at_least("k", k, 1)
    require_at_least("neighbourhood", neighbourhood, 1)
    if target_table.ndim != 2 or source_table.ndim != 2 or target_table.shape[1] != source_table.shape[1]:
        raise UserError(
            f"tables have shapes {tuple(target_table.shape)} and {tuple(source_table.shape)}: "
            f"they need rows of one width (the English model must be the one that was recycled)."
        )
    if k > len(source_table):
        raise UserError(f"k is {k} but the source has {len(source_table)} rows: use at most that.")
    target, source = F.normalize(target_table.float(), dim=-1), F.normalize(source_table.float(), dim=-1)
    crowding = torch.zeros(len(source), device=source.device)  # r(y)
    if measure == "csls":
        near = min(neighbourhood, len(target))
        crowding = torch.cat([(y @ target.T).topk(near).values.mean(-1) for y in source.split(chunk)])
    indices, scores = [], []
    for x in target.split(chunk):
        similar = x @ source.T  # (c, v)
        if measure == "csls":
            own = similar.topk(min(neighbourhood, len(source))).values.mean(-1, keepdim=True)  # r(x)
            similar = 2 * similar - own - crowding
        best = similar.topk(k)
        indices.append(best.indices)
        scores.append(best.values)
    return Neighbours(torch.cat(indices), torch.cat(scores))


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
    """Entries of the target tokens that begin a word, their candidates among the source's.

    Of a script without spaces between words, every token of its letters has an entry.

    Raises:
        UserError: a tokenizer has no such token.
    """
    target_words, source_words = word_tokens(target_tokenizer, unspaced=True), word_tokens(source_tokenizer)
    if not target_words or not source_words:
        raise UserError(
            "a tokenizer has no token that begins a word of two letters, which a lexicon needs: take more tokens."
        )
    chosen = list(target_words)[: words or None]
    names = list(source_words)
    found = nearest(
        target_table[[target_words[word] for word in chosen]],
        source_table[list(source_words.values())],
        k=min(k, len(names)),
        measure=measure,
    )
    return [
        Entry(word, tuple(names[index] for index in indices), tuple(scores))
        for word, indices, scores in zip(chosen, found.indices.tolist(), found.scores.tolist(), strict=True)
    ]


def precision(
    lexicon: Sequence[Entry], dictionary_path: Path, *, source_words: Collection[str] | None = None
) -> Precision:
    """How often a dictionary's translation is the first candidate, and among the first five; case does not matter.

    Args:
        lexicon: entries with at least five candidates each.
        dictionary_path: see `read_dictionary`.
        source_words: words that can be candidates; a dictionary's other translations do not count. None takes all.

    Raises:
        UserError: the dictionary and the lexicon share no word.
    """
    translations: dict[str, set[str]] = {}
    possible = None if source_words is None else {word.casefold() for word in source_words}
    for target, translation in read_dictionary(dictionary_path):
        if possible is None or translation.casefold() in possible:
            translations.setdefault(target.casefold(), set()).add(translation.casefold())
    first = five = words = 0
    for entry in lexicon:
        right = translations.get(entry.word.casefold())
        if right is not None:
            candidates = [word.casefold() for word in entry.candidates[:5]]
            words += 1
            first += candidates[0] in right
            five += not right.isdisjoint(candidates)
    if not words:
        raise UserError(f"no word of the lexicon is in dictionary {str(dictionary_path)!r}: give target words first.")
    return Precision(first / words, five / words, words)


def read_dictionary(path: Path) -> list[tuple[str, str]]:
    """Pairs of target word and source word: one pair a line, separated by a tab.

    Raises:
        UserError: the file is missing, empty, not UTF-8 or a line is not a pair (it is named).
    """
    require_file(path, "dictionary")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = Path(path).read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"dictionary {str(path)!r}, line {number} is not UTF-8: convert the file.") from None
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            parts = [part.strip() for part in line.split("\t")]
            if len(parts) != 2 or not all(parts):
                raise UserError(f"dictionary {str(path)!r}, line {number} is not a word, a tab and its translation.")
            pairs.append((parts[0], parts[1]))
    if not pairs:
        raise UserError(f"dictionary {str(path)!r} has no pair: give a word, a tab and its translation in each line.")
    return pairs


def require_direction(
    pairs: Sequence[tuple[str, str]], path: Path, target_words: Collection[str], source_words: Collection[str]
) -> None:
    """Raise UserError for a dictionary with the source's words first, told by which of its words are tokens.

    Args:
        pairs: of the dictionary.
        path: its file.
        target_words: words that are tokens of the new language.
        source_words: words that are tokens of the source's.
    """
    target, source = ({word.casefold() for word in words} for words in (target_words, source_words))
    folded = [(first.casefold(), second.casefold()) for first, second in pairs]
    folded = [pair for pair in folded if pair[0] != pair[1]]  # the others stand either way
    right = sum(first in target and second in source for first, second in folded)
    wrong = sum(first in source and second in target for first, second in folded)
    if wrong > 2 * right:
        raise UserError(
            f"dictionary {str(path)!r} looks the wrong way round: {right:,} of its {len(folded):,} pairs are a word of "
            f"the new language and an English one, {wrong:,} the reverse: put the new language's words first."
        )


def word_tokens(tokenizer: PreTrainedTokenizerBase, *, unspaced: bool = False) -> dict[str, int]:
    """Tokens that are words or begin one, by their word, in the order of their ids.

    A space, then letters and their marks, at least two. With `unspaced` also tokens with or without a space that are of
    letters of a script without spaces between words, where a token is as near to a word as can be had.
    """
    words: dict[str, int] = {}
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        text = tokenizer.convert_tokens_to_string([token])
        word = text.removeprefix(" ")
        begins = len(text) > 2 and text != word
        if (begins or (unspaced and has_unspaced(word))) and is_word(word):
            words.setdefault(word, index)
    return words
