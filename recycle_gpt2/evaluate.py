"""Score GPT-2 models on text, by genre and comparable between tokenizers, and let them write samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from common.checks import (
    UserError,
    printable,
    require_at_least,
    require_between,
    require_one_of,
    require_place,
    require_share,
    require_temperature,
    require_text,
)
from common.files import write_json, write_text
from common.language import Score, score
from common.runtime import (
    RuntimeConfig,
    autocast,
    fork_generators,
    hardware,
    require_memory,
    require_seed,
    start,
    versions,
)
from recycle_gpt2.corpus import Document, load_documents, read_documents

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

__all__ = ["DocumentScore", "Score", "Summary", "sample", "score", "score_documents", "summarise"]

STRATEGIES: tuple[str, ...] = ("greedy", "beam", "top_k", "nucleus")
MOST_RESAMPLES = 1_000_000
ALL = "all"
"""Name of the group of all documents."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Score models on text: perplexity, bits per byte and per character, with intervals.

    Every token counts once, after as much context as the windows give. Bits per byte compare models whose tokenizers
    differ; perplexities do so only with the same tokenizer.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    """Models: directories, hub ids (gpt2, GroNLP/gpt2-small-dutch), tiny or tiny-medium."""
    text: tuple[Path, ...] = ()
    """Files or directories of text, as `recycle-gpt2 corpus` reads them."""
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
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class SampleConfig:
    """Let a model write."""

    model: tyro.conf.Positional[str]
    """Directory, hub id, tiny or tiny-medium."""
    prompts: tuple[str, ...] = ()
    """Beginnings to continue; none lets the model begin by itself."""
    strategy: Literal["greedy", "beam", "top_k", "nucleus"] = "nucleus"
    """How tokens are chosen."""
    count: int = 1
    """Samples of each prompt (more than one only with top_k and nucleus)."""
    max_new_tokens: int = 60
    """Longest continuation."""
    top_k: int = 50
    """Likeliest tokens that top_k samples from."""
    top_p: float = 0.9
    """Probability that nucleus samples from."""
    temperature: float = 1.0
    """Temperature of top_k and nucleus."""
    num_beams: int = 5
    """Beams."""
    out: Path | None = None
    """JSON Lines file (text, prompt, strategy, seed), which `recycle-gpt2 judge` reads, instead of standard output."""
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
    bits_per_byte_interval: tuple[float, float]
    bits_per_character: float


def with_end(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text` after an end token, so that its first token is predicted too."""
    if tokenizer.eos_token_id is None:
        raise UserError("the model's tokenizer has no end token, after which every text is scored: give it one.")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # no warning about long texts
        backend.no_truncation()
        backend.no_padding()
        return [tokenizer.eos_token_id, *backend.encode(text, add_special_tokens=False).ids]
    return [tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]


def document_score(document: Document, nats: float, tokens: int) -> DocumentScore:
    """The score of a document whose `tokens` cost `nats`."""
    text = document.text
    return DocumentScore(document.source, document.genre, nats, tokens, len(text.encode()), len(text))


def score_documents(
    model: GPT2LMHeadModel,
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
    block = min(block, model.config.n_positions)
    stride = min(stride, max(1, block // 2))
    scores = []
    with tqdm(desc="scoring", unit=" tokens", disable=not progress, leave=False) as bar:
        for document in documents:
            ids = with_end(tokenizer, document.text)
            if len(ids) < 2:
                continue
            found = score(model, ids, block=block, stride=stride)
            scores.append(document_score(document, found.nats, found.tokens))
            bar.update(found.tokens)
    return scores


def summarise(scores: Sequence[DocumentScore], *, resamples: int = 1000, seed: int = 0) -> Summary:
    """Sums over documents, and the interval of their ratio when the documents are drawn anew with replacement.

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
    low, high = np.quantile(ratios, [0.025, 0.975])
    total = float(nats.sum())
    return Summary(
        documents=len(scores),
        tokens=tokens,
        num_bytes=int(size.sum()),
        nats=total,
        perplexity=math.exp(min(total / tokens, 700)),
        bits_per_byte=total / math.log(2) / float(size.sum()),
        bits_per_byte_interval=(float(low), float(high)),
        bits_per_character=total / math.log(2) / characters,
    )


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


def sample(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = "",
    *,
    strategy: str = "nucleus",
    count: int = 1,
    max_new_tokens: int = 60,
    top_k: int = 50,
    top_p: float = 0.9,
    temperature: float = 1.0,
    num_beams: int = 5,
    seed: int = 0,
) -> list[str]:
    """Continuations of `prompt` (prompt included), up to the end token; the same seed gives the same texts.

    Raises:
        UserError: an unknown strategy, a setting out of its range, or a prompt that leaves no position free.
    """
    import torch

    require_one_of("strategy", strategy, STRATEGIES)
    for name, value in (
        ("count", count),
        ("max_new_tokens", max_new_tokens),
        ("top_k", top_k),
        ("num_beams", num_beams),
    ):
        require_at_least(name, value, 1)
    require_share("top_p", top_p)
    require_temperature(temperature)
    require_seed(seed)
    require_text("prompt", prompt)
    if count > 1 and strategy in ("greedy", "beam"):
        raise UserError(f"count is {count} but {strategy} always writes the same: use 1, or top_k or nucleus.")
    ids = with_end(tokenizer, prompt)
    room = model.config.n_positions - len(ids)
    if room < 1:
        raise UserError(
            f"the prompt has {len(ids) - 1} tokens but the model {model.config.n_positions} positions: "
            f"shorten the prompt."
        )
    width = max(count, num_beams if strategy == "beam" else 1)
    size = width * 4 * (2 * model.config.n_layer * model.config.n_embd * model.config.n_positions + 4 * len(tokenizer))
    require_memory(f"{width} texts are written at once", size, model.device, "use a smaller count, or fewer beams")
    how: dict[str, Any] = {
        "greedy": dict(do_sample=False),
        "beam": dict(do_sample=False, num_beams=num_beams),
        "top_k": dict(do_sample=True, top_k=min(top_k, len(tokenizer)), temperature=temperature),
        "nucleus": dict(do_sample=True, top_k=0, top_p=top_p, temperature=temperature),
    }
    chosen = how[strategy]
    inputs = torch.tensor([ids], device=model.device)
    end = tokenizer.eos_token_id
    model.eval()
    with fork_generators(seed), torch.no_grad():
        found = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=min(max_new_tokens, room),
            num_return_sequences=count,
            eos_token_id=end,
            pad_token_id=end,
            **chosen,
        )
    return [tokenizer.decode(row[1:], skip_special_tokens=True) for row in found]


def run(config: EvaluateConfig) -> int:
    """`recycle-gpt2 evaluate`: print the scores of every model as a table."""
    from common.gpt2 import load_gpt2

    if not config.models:
        raise UserError("no model is given: name a directory, a hub id, tiny or tiny-medium.")
    if bool(config.text) == bool(config.corpus):
        raise UserError("give either --text or --corpus, to say what is scored.")
    require_between("resamples", config.resamples, 1, MOST_RESAMPLES)
    for name, least in (("max_documents", 0), ("block", 2), ("stride", 1)):
        require_at_least(name, getattr(config, name), least)
    if config.out:
        require_place(config.out)
    device = start(config.runtime)
    found = load_documents(config.corpus, "test") if config.corpus else read_documents(config.text)
    documents = list(islice(found, config.max_documents or None))
    results = {}
    for name in config.models:
        model, tokenizer = load_gpt2(name, device=device, frozen=True)
        with autocast(device, config.runtime.precision):
            scores = score_documents(
                model, tokenizer, documents, block=config.block, stride=config.stride, progress=True
            )
        results[name] = summarise_by(scores, config.by, resamples=config.resamples, seed=config.runtime.seed)
        print(printable(table(name, results[name]), lines=True), flush=True)
    if config.out:
        write_json(
            config.out,
            {"models": results, "config": asdict(config), "hardware": hardware(), "versions": versions()},
        )
        print(f"written to {config.out}")
    return 0


def table(name: str, summaries: dict[str, Summary]) -> str:
    """The scores of one model, a line for each group."""
    width = max(map(len, [*summaries, "documents of"]))
    lines = [name, f"  {'documents of':<{width}}  documents     tokens  perplexity  bits/char  bits/byte  95% interval"]
    for group, found in summaries.items():
        low, high = found.bits_per_byte_interval
        lines.append(
            f"  {group:<{width}}  {found.documents:>9,}  {found.tokens:>9,}  {found.perplexity:>10,.2f}  "
            f"{found.bits_per_character:>9.4f}  {found.bits_per_byte:>9.4f}  {low:.4f} to {high:.4f}"
        )
    return "\n".join(lines)


def run_sample(config: SampleConfig) -> int:
    """`recycle-gpt2 sample`: print or write what the model continues."""
    from common.gpt2 import load_gpt2

    if config.out:
        require_place(config.out)
    device = start(config.runtime)
    model, tokenizer = load_gpt2(config.model, device=device, frozen=True)
    lines = []
    for number, prompt in enumerate(config.prompts or ("",)):
        with autocast(device, config.runtime.precision):
            texts = sample(
                model,
                tokenizer,
                prompt,
                strategy=config.strategy,
                count=config.count,
                max_new_tokens=config.max_new_tokens,
                top_k=config.top_k,
                top_p=config.top_p,
                temperature=config.temperature,
                num_beams=config.num_beams,
                seed=config.runtime.seed + number,
            )
        for text in texts:
            record = {"text": text, "prompt": prompt, "strategy": config.strategy, "seed": config.runtime.seed}
            lines.append(json.dumps(record, ensure_ascii=False))
            if config.out is None:
                print(printable(text, lines=True), end="\n\n")
    if config.out:
        write_text(config.out, "\n".join(lines) + "\n")
        print(f"{len(lines)} samples written to {config.out}")
    return 0
