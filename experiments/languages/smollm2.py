"""Does a really pre-trained model help? SmolLM2-135M in Dutch and Italian, with every control.

    python -m experiments.languages.smollm2 --model out/smollm2 --text DIR --languages nld ita

The model is made by experiments/backbones/smollm2.py, DIR by experiments/backbones/build_corpus.py. Every run writes a
JSON file when it is finished and is not made again; one that was stopped resumes from its checkpoint. After each run
smollm2.md, its figure and smollm2.json are written again, in --docs. The arms that keep SmolLM2's own tokenizer read
the same share of the text as the others, which are other tokens of theirs.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Subset

from common.checks import require_above, require_fields_at_least, require_one_of, run_command
from common.decoders.families import base_model, is_norm
from common.files import write_json
from common.gpt2 import load_gpt2
from common.runtime import RuntimeConfig, autocast, fork_generators, provenance, start
from experiments import from_command_line
from experiments.languages import arms as small
from experiments.languages.recycle import finished, prepare, stage
from experiments.languages.smollm2_page import write_page
from experiments.languages.text import read_split
from recycle_gpt2.baseline import name_of
from recycle_gpt2.blocks import TokenBlocks
from recycle_gpt2.corpus import build_corpus, read_manifest
from recycle_gpt2.documents import Document
from recycle_gpt2.evaluate import DocumentScore, compare, score_documents, summarise
from recycle_gpt2.lexical import replace_lexical, shuffle_weights, train_only
from recycle_gpt2.training import train_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

UNTOUCHED = "untouched"
CONTINUED = "untouched tokenizer, trained on"
FROZEN = "frozen layers, FOCUS-like rows"
RANDOM = "frozen layers, random rows"
FRESH = "frozen fresh layers of the same scale"
SHUFFLED = "frozen shuffled layers, same logit scale"
WHOLE = "everything trained, FOCUS-like rows"
ARMS = (UNTOUCHED, FROZEN, RANDOM, FRESH, SHUFFLED, WHOLE, CONTINUED)
PAIR = (FROZEN, RANDOM)
"""Arms of more than one seed."""
OWN_TOKENIZER = (UNTOUCHED, CONTINUED)
VALIDATIONS = 5
MOST_TRIALS = 6


@dataclass(frozen=True)
class Config:
    """Recycle SmolLM2-135M, or another decoder, for Dutch and Italian, with all controls."""

    model: Path
    """Directory of the model."""
    text: Path
    """Directory of LANG.train.txt(.xz) and LANG.valid.txt(.xz), of eng too."""
    languages: tuple[str, ...] = ("nld", "ita")
    """nld, ita."""
    out: Path = Path("out/smollm2_languages")
    """Where texts, corpora and runs go."""
    docs: Path = Path("out/smollm2_languages")
    """Where smollm2.md, its figure and smollm2.json go."""
    arms: tuple[str, ...] = ARMS
    """Which are run, in this order."""
    tokens: int = 250_000
    """Training tokens of each run."""
    tune_tokens: int = 30_000
    """Training tokens of each rate that is tried; 0 tries none and takes --rate."""
    rate: float = 1e-3
    """Learning rate of AdamW that is tried first in the first language: it is doubled, or else halved, as long as that
    is better on validation blocks. The other languages take the rates of the first."""
    seeds: int = 2
    """Seeds of the main pair, FOCUS-like and random rows in frozen layers."""
    vocab_size: int = 4096
    """Tokens of the new language's tokenizer."""
    block: int = 256
    """Tokens in a block."""
    batch_size: int = 4
    """Blocks in a step."""
    valid_blocks: int = 16
    """Blocks that are validated."""
    held_out_bytes: int = 40_000
    """Bytes of each held-out genre, and of English, that are scored: the first documents."""
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(device="cpu", precision="bf16", threads=1))


@dataclass
class Setting:
    """One language: its texts and both corpora."""

    config: Config
    language: small.Language
    own: tuple[TokenBlocks, TokenBlocks]
    """Train and valid in the model's own tokens."""
    valid_bytes: tuple[float, float]
    """Bytes of a validation token: of the new tokenizer, and of the model's own."""
    documents: dict[str, list[Document]]
    """Held out: test, second and English."""


def first_documents(documents: list[Document], num_bytes: int) -> list[Document]:
    """The first documents of at least `num_bytes` together."""
    taken, size = [], 0
    for document in documents:
        if size >= num_bytes:
            break
        taken.append(document)
        size += len(document.text.encode())
    return taken


def prepare_language(config: Config, name: str) -> Setting:
    """Texts, tokenizer and corpora of one language; made once."""
    require_one_of("language", name, ("nld", "ita"))
    asked = small.Config(
        text=config.text,
        language=name,  # type: ignore[arg-type]
        out=config.out,
        vocab_size=config.vocab_size,
        block=config.block,
        batch_size=config.batch_size,
    )
    language = prepare(asked)
    _, tokenizer = load_gpt2(config.model, frozen=True)
    corpora = language.directory / "corpus", language.directory / "corpus-own"
    train_text = language.directory / "train.txt"
    build_corpus(
        [train_text],
        tokenizer,
        corpora[1],
        block=config.block,
        shares=(0.98, 0.015, 0.005),
        duplicates="paragraphs",
    )
    own = TokenBlocks(corpora[1], "train"), TokenBlocks(corpora[1], "valid")
    counts = [read_manifest(corpus)["splits"]["valid"] for corpus in corpora]
    english = [Document(text, "eng", "English") for text in read_split(config.text, "eng", "valid")]
    documents = {
        split: first_documents(found, config.held_out_bytes)
        for split, found in {**language.documents, "English": english}.items()
    }
    new, old = (count["bytes"] / count["tokens"] for count in counts)
    return Setting(config, language, own, (new, old), documents)


@torch.no_grad()
def logit_scale(model: PreTrainedModel, blocks: torch.Tensor) -> float:
    """Standard deviation of the logits over the vocabulary, its mean over the positions of `blocks` (b, t)."""
    return float(model(input_ids=blocks).logits.float().std(-1).mean())


@torch.no_grad()
def match_logit_scale(model: PreTrainedModel, wanted: float, blocks: torch.Tensor) -> None:
    """Scale the last norm, in place, so that the model's `logit_scale` is `wanted`."""
    norm = [module for module in base_model(model).modules() if is_norm(module)][-1]
    factor = wanted / logit_scale(model, blocks)
    for parameter in norm.parameters():
        parameter.mul_(factor)


@torch.no_grad()
def redraw_layers(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw each parameter but the token table from the normal distribution of its own mean and deviation, in place."""
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for parameter in model.parameters():
        if id(parameter) not in tables:
            mean, std = parameter.mean(), parameter.std(correction=0)
            parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))


def begin(arm: str, setting: Setting, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model that an arm begins with, what it trains asked for, and its tokenizer."""
    model, own = load_gpt2(setting.config.model)
    if arm in OWN_TOKENIZER:
        train_only(model, layers="all")
        return model, own  # type: ignore[return-value]
    language, generator = setting.language, torch.Generator().manual_seed(seed)
    rows = small.first_rows("random" if arm == RANDOM else "focus", model, own, language, generator)  # type: ignore[arg-type]
    replace_lexical(model, language.tokenizer, rows)
    if arm in (FRESH, SHUFFLED):
        blocks = torch.stack([language.train[index] for index in range(min(2, len(language.train)))])
        wanted = logit_scale(model, blocks)
        (redraw_layers if arm == FRESH else shuffle_weights)(model, generator)
        match_logit_scale(model, wanted, blocks)
    train_only(model, layers="all" if arm == WHOLE else ())
    return model, language.tokenizer


def run_arm(arm: str, setting: Setting, *, seed: int, rate: float, tokens: int, name: str, report: bool) -> Any:
    """Train one arm for `tokens` of the new tokenizer, or as much text, and score it, unless its result exists."""
    config, language = setting.config, setting.language
    directory = language.directory / "runs" / name
    asked = {"arm": arm, "rate": rate, "tokens_asked": tokens, "block": config.block, "batch_size": config.batch_size}
    done = finished(directory / "result.json")
    if done is not None and all(done.get(key) == value for key, value in asked.items()):
        return done
    begun = time.process_time()
    runtime = replace(config.runtime, seed=seed)
    device = start(runtime)
    model, tokenizer = begin(arm, setting, seed)
    model.to(device)
    own = arm in OWN_TOKENIZER
    train, valid = setting.own if own else (language.train, language.valid)
    if own:  # the same text
        tokens = round(tokens * train.num_tokens / language.train.num_tokens)
    record = None
    if arm != UNTOUCHED:
        asked_stage = stage(_small(config), rate=rate, tokens=tokens, whole=False, validations=VALIDATIONS)
        record = train_stage(
            model,
            train,
            Subset(valid, range(min(config.valid_blocks, len(valid)))),
            directory / "train",
            asked_stage,
            runtime=runtime,
            progress=False,
        )
    held_out: dict[str, Any] = {}
    if report:
        with autocast(device, runtime.precision):
            for split, documents in setting.documents.items():
                scores = score_documents(model, tokenizer, documents, block=config.block, stride=config.block // 2)
                held_out[split] = asdict(summarise(scores)) | {"scores": [asdict(score) for score in scores]}
    bytes_a_token = setting.valid_bytes[own]
    curve = record.curve if record else ()
    result = {
        **asked,
        "seed": seed,
        "tokens": record.tokens if record else 0,
        "flops": record.flops if record else 0.0,
        "val_loss": record.val_loss if record else None,
        "curve": [(point["tokens"], point["val_loss"] / math.log(2) / bytes_a_token) for point in curve],
        "train_tokens_available": train.num_tokens,
        "vocab_size": len(tokenizer),
        "trained_parameters": record.trained_parameters if record else 0,
        "held_out": held_out,
        "precision": runtime.precision,
        "cpu_seconds": round(time.process_time() - begun, 1),
        **provenance(),
    }
    write_json(directory / "result.json", result)
    shutil.rmtree(directory / "train", ignore_errors=True)
    bits = ", ".join(f"{split} {found['bits_per_byte']:.4f}" for split, found in held_out.items())
    print(
        f"{time.strftime('%H:%M:%S')} {name}: val {result['val_loss']} {bits} ({result['cpu_seconds']:.0f} s)",
        flush=True,
    )
    return result


def _small(config: Config) -> small.Config:
    """What of the settings `stage` reads, in the form that it reads."""
    return small.Config(text=config.text, block=config.block, batch_size=config.batch_size)


def tuned(arm: str, setting: Setting) -> float:
    """The rate with the lowest validation loss after a short run of seed 0."""
    config = setting.config
    if arm == UNTOUCHED or not config.tune_tokens:
        return config.rate

    def loss(rate: float) -> float:
        name = f"tune-{small.slug(arm)}-{rate:g}"
        return run_arm(arm, setting, seed=0, rate=rate, tokens=config.tune_tokens, name=name, report=False)["val_loss"]

    return climb(config.rate, loss)


def climb(first: float, loss: Callable[[float], float]) -> float:
    """The best of the rates that are `first` times powers of 2, for a loss with one valley.

    A loss that is not a number is worse than any. At most `MOST_TRIALS` rates are tried in each direction.
    """
    best, lowest = first, loss(first)
    for factor in (2.0, 0.5):
        for _ in range(MOST_TRIALS):
            found = loss(best * factor)
            if not (found < lowest or math.isnan(lowest)):
                break
            best, lowest = best * factor, found
        if best != first:
            break
    return best


def ngram_row(setting: Setting) -> dict[str, Any]:
    """The Kneser-Ney model of the training tokens on the held-out genres; made once."""
    path = setting.language.directory / "ngrams.json"
    if not path.exists():
        found: dict[str, Any] = {"name": name_of(setting.language.train)}
        for split in setting.language.documents:
            count = len(setting.documents[split])
            scores = setting.language.ngram_scores[split][:count]
            found[split] = asdict(summarise(scores)) | {"scores": [asdict(score) for score in scores]}
        write_json(path, found)
    return json.loads(path.read_text())


def differences(result: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Bits per byte of one run minus another's, by paired bootstrap, of each group of documents that both have."""
    found = {}
    for split, part in result["held_out"].items():
        if split in other:
            pair = [[DocumentScore(**score) for score in scores["scores"]] for scores in (part, other[split])]
            found[split] = asdict(compare(*pair))
    return found


def main(config: Config) -> None:
    """Make the runs asked for, those finished excepted, and write the page after each."""
    for arm in config.arms:
        require_one_of("arm", arm, ARMS)
    require_fields_at_least(config, 1, "tokens", "seeds", "valid_blocks", "held_out_bytes")
    require_fields_at_least(config, 0, "tune_tokens")
    require_above("rate", config.rate, 0)
    start(config.runtime)
    results: dict[str, dict[str, Any]] = {}
    rates: dict[str, float] = {}
    for name in config.languages:
        with fork_generators(config.runtime.seed):
            setting = prepare_language(config, name)
        found = results[name] = {"ngrams": ngram_row(setting), "runs": {}}
        for seed in range(config.seeds):
            for arm in config.arms:
                if seed and arm not in PAIR:
                    continue
                label = f"{small.slug(arm)}-{config.tokens}-seed{seed}"
                if arm not in rates:
                    rates[arm] = tuned(arm, setting)
                run = run_arm(arm, setting, seed=seed, rate=rates[arm], tokens=config.tokens, name=label, report=True)
                base = found["runs"].get(f"{small.slug(UNTOUCHED)}-{config.tokens}-seed0")
                if base is not None:
                    run = run | {"minus_untouched": differences(run, base["held_out"])}
                found["runs"][label] = run | {"minus_ngrams": differences(run, found["ngrams"])}
                write_page(results, config.docs)


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
