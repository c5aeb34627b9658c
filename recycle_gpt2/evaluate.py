"""Score GPT-2 models on text, by genre and comparable between tokenizers, and let them write samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro

from common.checks import UserError, printable, require_at_least, require_between, require_one_of, require_place
from common.decoders.families import positions
from common.files import write_json
from common.language import MOST_RESAMPLES, score_texts
from common.language import score as score  # one of the public names
from common.progress import Progress
from common.runtime import RuntimeConfig, autocast, provenance, start
from recycle_gpt2.bad_rows import TextOptions
from recycle_gpt2.corpus import load_documents
from recycle_gpt2.documents import Document, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BATCHED = 64
"""Documents whose windows are batched together, those of similar length."""
ALL = "all"
"""Name of the group of all documents."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Score models on text: perplexity, bits per byte and per character, with intervals.

    Every token counts once, after as much context as the windows give. Bits per byte compare models whose tokenizers
    differ; perplexities do so only with the same tokenizer. Further models are compared with the first, document by
    document.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    """Models: directories, hub ids (gpt2, GroNLP/gpt2-small-dutch), tiny or tiny-medium."""
    text: tuple[Path, ...] = ()
    """Files or directories of text, as `recycle-gpt2 corpus` reads them; of a saved DatasetDict its split test."""
    corpus: Path | None = None
    """A corpus that `recycle-gpt2 corpus` wrote, instead of text: its test documents are scored."""
    by: Literal["genre", "file"] = "genre"
    """What the scores are split by."""
    out: Path | None = None
    """JSON file for the scores, beside the printed table."""
    block: int = 1024
    """Tokens in a window, at most the model's positions."""
    stride: int = 512
    """Tokens between windows; half the window where that is smaller."""
    max_documents: int = 0
    """Documents to score, when not 0: the first ones."""
    resamples: int = 1000
    """Bootstrap resamples over documents, for 95% intervals."""
    reading: TextOptions = field(default_factory=TextOptions)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class DocumentScore:
    """How well a model predicts one document, all of whose tokens are counted."""

    source: str
    genre: str
    nats: float
    tokens: int
    num_bytes: int
    """UTF-8 bytes of the text."""
    characters: int


@dataclass(frozen=True)
class Summary:
    """Scores of a group of documents; intervals are (low, high), 95%, by bootstrap over documents."""

    documents: int
    tokens: int
    num_bytes: int
    nats: float
    perplexity: float
    bits_per_byte: float
    bits_per_byte_interval: tuple[float, float] | None
    """None of one document, which says nothing of others."""
    bits_per_character: float


@dataclass(frozen=True)
class Difference:
    """Bits per byte of one model minus another's on the same documents; below 0 it is better."""

    bits_per_byte: float
    interval: tuple[float, float] | None
    """95%, by paired bootstrap: each resample draws documents, and both models' scores of them (Koehn 2004). None of
    one document."""


def with_end(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text` after an end token, so that its first token is predicted too.

    A tokenizer that puts a token of its own before every text (Llama's and Gemma's) begins with that one.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is not None and begin != end and tokenizer("").input_ids[:1] == [begin]:
        end = begin
    if end is None:
        raise UserError("the model's tokenizer has no end token, after which every text is scored: give it one.")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # no warning about long texts
        backend.no_truncation()
        backend.no_padding()
        before = backend.encode_special_tokens
        backend.encode_special_tokens = True  # as in the corpus, a text that spells the end token does not end there
        try:
            return [end, *backend.encode(text, add_special_tokens=False).ids]
        finally:
            backend.encode_special_tokens = before
    return [end, *tokenizer.encode(text, add_special_tokens=False)]


def document_score(document: Document, nats: float, tokens: int) -> DocumentScore:
    """The score of a document whose `tokens` cost `nats`."""
    text = document.text
    return DocumentScore(document.source, document.genre, nats, tokens, len(text.encode()), len(text))


def score_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    *,
    block: int = 1024,
    stride: int = 512,
    progress: bool = False,
) -> list[DocumentScore]:
    """Score every document by itself, each of its tokens once; the end token before it is context only.

    `block` is cut to the model's positions and `stride` to half of that, so that short windows have context too.
    Empty documents are left out.
    """
    block = min(block, positions(model.config))
    stride = min(stride, max(1, block // 2))
    scores = []
    remaining = iter(documents)
    with Progress(desc="scoring", unit=" tokens", disable=not progress, leave=False) as bar:
        while some := list(islice(remaining, BATCHED)):
            pairs = [(document, with_end(tokenizer, document.text)) for document in some]
            pairs = [(document, ids) for document, ids in pairs if len(ids) > 1]
            found = score_texts(model, [ids for _, ids in pairs], block=block, stride=stride)
            for (document, _), one in zip(pairs, found, strict=True):
                scores.append(document_score(document, one.nats, one.tokens))
                bar.update(one.tokens)
    return scores


def summarise(scores: Sequence[DocumentScore], *, resamples: int = 1000, seed: int = 0) -> Summary:
    """Sums over documents, and the interval of their ratio when the documents are redrawn with replacement.

    Raises:
        UserError: no document.
    """
    if not scores:
        raise UserError("there are 0 documents to score: give text that holds at least one.")
    nats, size = (np.array([getattr(s, name) for s in scores], dtype=float) for name in ("nats", "num_bytes"))
    tokens, characters = sum(s.tokens for s in scores), sum(s.characters for s in scores)
    generator = np.random.default_rng(seed)
    ratios = []
    for _ in range(max(1, resamples)):
        drawn = generator.integers(0, len(scores), len(scores))
        ratios.append(nats[drawn].sum() / math.log(2) / size[drawn].sum())
    low, high = map(float, np.quantile(ratios, [0.025, 0.975]))
    total = float(nats.sum())
    return Summary(
        documents=len(scores),
        tokens=tokens,
        num_bytes=int(size.sum()),
        nats=total,
        perplexity=math.exp(min(total / tokens, 700)),
        bits_per_byte=total / math.log(2) / float(size.sum()),
        bits_per_byte_interval=(low, high) if len(scores) > 1 else None,
        bits_per_character=total / math.log(2) / characters,
    )


def compare(
    scores: Sequence[DocumentScore], others: Sequence[DocumentScore], *, resamples: int = 1000, seed: int = 0
) -> Difference:
    """How much better or worse `scores` are than `others`, document by document.

    Raises:
        UserError: they are not of the same documents, or there are none.
    """
    if not scores or [(s.source, s.num_bytes) for s in scores] != [(s.source, s.num_bytes) for s in others]:
        raise UserError(f"scores of {len(scores)} and {len(others)} documents: compare those of the same ones.")
    difference = np.array([one.nats - two.nats for one, two in zip(scores, others, strict=True)]) / math.log(2)
    size = np.array([score.num_bytes for score in scores], dtype=float)
    generator = np.random.default_rng(seed)
    ratios = []
    for _ in range(max(1, resamples)):
        drawn = generator.integers(0, len(scores), len(scores))
        ratios.append(difference[drawn].sum() / size[drawn].sum())
    low, high = map(float, np.quantile(ratios, [0.025, 0.975]))
    return Difference(float(difference.sum() / size.sum()), (low, high) if len(scores) > 1 else None)


def summarise_by(
    scores: Sequence[DocumentScore], by: str = "genre", *, resamples: int = 1000, seed: int = 0
) -> dict[str, Summary]:
    """A summary of all documents, and one of each genre or file where there is more than one."""
    require_one_of("by", by, ("genre", "file"))
    groups: dict[str, list[DocumentScore]] = {}
    for item in scores:
        groups.setdefault(item.genre if by == "genre" else item.source, []).append(item)
    found = {ALL: summarise(scores, resamples=resamples, seed=seed)}
    if len(groups) > 1:
        found |= {name: summarise(part, resamples=resamples, seed=seed) for name, part in sorted(groups.items())}
    return found


def run(config: EvaluateConfig) -> int:
    """`recycle-gpt2 evaluate`: print the scores of every model as a table."""
    from common.gpt2 import load_gpt2, require_decoder

    if not config.models:
        raise UserError("no model is given: name a directory, a hub id, tiny or tiny-medium.")
    if bool(config.text) == bool(config.corpus):
        raise UserError("give either --text or --corpus, to say what is scored.")
    require_between("resamples", config.resamples, 1, MOST_RESAMPLES)
    for name, least in (("max_documents", 0), ("block", 2), ("stride", 1)):
        require_at_least(name, getattr(config, name), least)
    if config.out:
        require_place(config.out)
    for name in config.models:  # before the first one is scored
        require_decoder(name)
    device = start(config.runtime)
    found = (
        load_documents(config.corpus, "test")
        if config.corpus
        else read_documents(config.text, config.reading, held_out=True)
    )
    documents = list(islice(found, config.max_documents or None))
    results, differences = {}, {}
    first: list[DocumentScore] = []
    for name in config.models:
        model, tokenizer = load_gpt2(name, device=device, frozen=True)
        with autocast(device, config.runtime.precision):
            scores = score_documents(
                model, tokenizer, documents, block=config.block, stride=config.stride, progress=True
            )
        results[name] = summarise_by(scores, config.by, resamples=config.resamples, seed=config.runtime.seed)
        print(printable(table(name, results[name]), lines=True), flush=True)
        if first:
            differences[name] = compare(scores, first, resamples=config.resamples, seed=config.runtime.seed)
            print(printable(f"  minus {config.models[0]}, paired: {shown(differences[name])}"), flush=True)
        first = first or scores
    if config.out:
        write_json(
            config.out,
            {
                "models": results,
                "differences": differences,
                "config": asdict(config),
                **provenance(),
            },
        )
        print(f"written to {config.out}")
    return 0


def table(name: str, summaries: dict[str, Summary]) -> str:
    """The scores of one model, a line for each group."""
    width = max(map(len, [*summaries, "documents of"]))
    lines = [name, f"  {'documents of':<{width}}  documents     tokens  perplexity  bits/char  bits/byte  95% interval"]
    for group, found in summaries.items():
        lines.append(
            f"  {group:<{width}}  {found.documents:>9,}  {found.tokens:>9,}  {found.perplexity:>10,.2f}  "
            f"{found.bits_per_character:>9.4f}  {found.bits_per_byte:>9.4f}  {interval(found.bits_per_byte_interval)}"
        )
    return "\n".join(lines)


def interval(ends: Sequence[float] | None) -> str:
    """An interval for people."""
    return "none: one document" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


def shown(difference: Difference) -> str:
    """A difference for people."""
    return f"{difference.bits_per_byte:+.4f} bits/byte ({interval(difference.interval)})"
