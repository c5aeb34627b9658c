"""Does English help? GPT-2 recycled for Dutch and Italian against every control (de Vries & Nissim 2021, sec. 4 and 5).

    python -m experiments.languages.recycle --text DIR --language nld \
        --parts baselines tune main seeds alignment medium data_size budgets initialisations

DIR holds LANG.train.txt(.xz) and LANG.valid.txt(.xz), made by experiments/backbones/build_corpus.py. Every run writes a
JSON file when it is finished and is not made again; one that was stopped resumes from its checkpoint. Tables are made
of the runs that exist, by experiments/languages/report.py.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Subset

from common.checks import require_at_least, require_one_of, run_command
from common.files import write_json
from common.gpt2 import load_gpt2, token_table
from common.ngram import WittenBell
from common.runtime import RuntimeConfig, fork_generators, hardware, provenance, start
from experiments import from_command_line
from experiments.languages.arms import (
    ARMS,
    FRESH,
    FROZEN,
    MEDIUM,
    METHODS,
    SHUFFLED_RANDOM,
    UNFROZEN,
    WHOLE,
    Config,
    Language,
    begin,
    first_rows,
    slug,
)
from experiments.languages.text import held_out, write_texts
from recycle_gpt2.alignment import align, choose_options, held_out_error, neighbour_overlap
from recycle_gpt2.baseline import name_of, score_ngrams
from recycle_gpt2.blocks import TokenBlocks
from recycle_gpt2.corpus import build_corpus
from recycle_gpt2.documents import read_documents
from recycle_gpt2.evaluate import compare, score_documents, summarise
from recycle_gpt2.lexical import cooccurrence_embeddings, replace_lexical, train_only
from recycle_gpt2.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from recycle_gpt2.training import StageConfig, train_stage

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


MAIN = ("frozen English", "frozen shuffled English", "scratch", "all from English")
RATES: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(FROZEN, (0.003, 0.01, 0.03, 0.1)),
    **dict.fromkeys(WHOLE, (0.005, 0.01, 0.02)),
}
"""Learning rates tried, of AdamW; Muon's is twice that."""
UNFROZEN_SHARES = (0.25, 0.5, 1.0)
"""Rates tried after unfreezing, as shares of the best when all trains from English."""
PARTS = ("tune", "main", "seeds", "alignment", "medium", "data_size", "budgets", "initialisations", "baselines")
SHARES = (0.01, 0.1)


def prepare(config: Config) -> Language:
    """Texts, tokenizer, corpus and auxiliary embeddings; made once."""
    directory = config.out / config.language
    texts = write_texts(config.text, config.language, directory)
    if not (directory / "tokenizer" / "tokenizer.json").exists():
        made = train_tokenizer((d.text for d in read_documents([texts["train"]])), config.vocab_size)
        save_tokenizer(made, directory / "tokenizer")
    tokenizer = load_tokenizer(directory / "tokenizer")
    corpus = build_corpus(
        [texts["train"]],
        tokenizer,
        directory / "corpus",
        block=config.block,
        shares=(0.98, 0.015, 0.005),
        duplicates="paragraphs",
    )
    train, valid = (TokenBlocks(corpus, split) for split in ("train", "valid"))
    path = directory / "auxiliary.npy"
    if not path.exists():
        ids = train.tokens(0, train.num_tokens)
        made_rows = cooccurrence_embeddings(ids, len(tokenizer), end=tokenizer.eos_token_id)
        np.save(directory / "auxiliary.part.npy", np.asarray(made_rows))
        (directory / "auxiliary.part.npy").rename(path)
    return Language(directory, tokenizer, train, valid, held_out(directory), torch.from_numpy(np.load(path)))


def stage(config: Config, *, rate: float, tokens: int, whole: bool, validations: int = 10) -> StageConfig:
    """AdamW on the token table; Muon beside it where the layers train; cosine to zero."""
    steps = math.ceil(tokens / (config.batch_size * config.block))
    return StageConfig(
        tokens=tokens,
        batch_size=config.batch_size,
        optimizer="muon" if whole else "adamw",
        lr=rate,
        lr_muon=2 * rate,
        weight_decay=0.01,
        schedule="cosine",
        warmup=max(1, min(100, steps // 10)),
        val_every=max(1, steps // validations),
    )


def score_held_out(model: GPT2LMHeadModel, tokenizer: Any, language: Language) -> dict[str, Any]:
    """Summaries of both held-out genres, each with the difference from the Kneser-Ney model of the same tokens."""
    found = {}
    for split, documents in language.documents.items():
        scores = score_documents(model, tokenizer, documents)
        difference = compare(scores, language.ngram_scores[split])
        found[split] = asdict(summarise(scores)) | {"minus_ngrams": asdict(difference)}
    return found


def finished(path: Path) -> dict[str, Any] | None:
    """The result of a run that is finished."""
    return json.loads(path.read_text()) if path.exists() else None


def run_arm(
    arm: str,
    config: Config,
    language: Language,
    *,
    seed: int,
    rate: float,
    tokens: int,
    name: str,
    share: float = 1.0,
    unfrozen_rate: float = 0.0,
    report: bool = True,
    keep: bool = False,
) -> dict[str, Any]:
    """Train and score one arm, unless its result exists.

    Args:
        name: of the run's folder.
        share: of the training blocks that are used.
        unfrozen_rate: of the second half, in which everything trains, of the arm that has one.
        report: score the held-out documents; without it, only validation (to tune).
        keep: keep the model.
    """
    directory = language.directory / "runs" / name
    asked = {"rate": rate, "unfrozen_rate": unfrozen_rate, "tokens_asked": tokens}
    done = finished(directory / "result.json")
    if done is not None and all(done.get(key, value) == value for key, value in asked.items()):
        return done
    begun = time.process_time()
    runtime = RuntimeConfig(config.runtime.device, config.runtime.precision, seed, config.runtime.threads)
    start(runtime)
    model = begin(arm, config, language, seed)
    train: Any = language.train
    if share < 1:
        chosen = np.random.default_rng(0).permutation(len(train))[: max(config.batch_size, round(share * len(train)))]
        train = Subset(train, sorted(chosen.tolist()))
    first = tokens // 2 if arm == UNFROZEN else tokens
    records = [
        train_stage(
            model,
            train,
            language.valid,
            directory / "train",
            stage(config, rate=rate, tokens=first, whole=arm in (*WHOLE, *MEDIUM), validations=8 if report else 3),
            runtime=runtime,
            progress=False,
        )
    ]
    if arm == UNFROZEN:
        train_only(model, layers="all")
        records.append(
            train_stage(
                model,
                train,
                language.valid,
                directory / "unfrozen",
                stage(config, rate=unfrozen_rate, tokens=tokens - first, whole=True),
                runtime=runtime,
                progress=False,
            )
        )
    result = {
        "arm": arm,
        "language": config.language,
        "seed": seed,
        "share": share,
        **asked,
        "tokens": sum(record.tokens for record in records),
        "flops": sum(record.flops for record in records),
        "train_tokens_available": language.train.num_tokens,
        "val_loss": records[-1].val_loss,
        "stages": [asdict(record) for record in records],
        "initialisation": _initialisation(arm, config),
        "vocab_size": len(language.tokenizer),
        "held_out": score_held_out(model, language.tokenizer, language) if report else None,
        "cpu_seconds": round(time.process_time() - begun, 1),
        **provenance(),
    }
    if keep:
        model.save_pretrained(directory / "model")
        language.tokenizer.save_pretrained(directory / "model")
    write_json(directory / "result.json", result)
    for folder in ("train", "unfrozen"):
        shutil.rmtree(directory / folder, ignore_errors=True)
    shown: Any = result["held_out"]
    scores = ", ".join(f"{split} {found['bits_per_byte']:.4f}" for split, found in shown.items()) if shown else ""
    print(
        f"{time.strftime('%H:%M:%S')} {config.language} {name}: val {result['val_loss']:.4f} {scores} "
        f"({result['cpu_seconds']:.0f} s)",
        flush=True,
    )
    return result


def _initialisation(arm: str, config: Config) -> str:
    """What the record says of an arm's rows."""
    if arm in FRESH:
        return "GPT-2's own"
    return "random" if arm == SHUFFLED_RANDOM else config.initialisation


def tuned(arm: str, config: Config, language: Language) -> float:
    """The rate with the lowest validation loss after a short run of seed 0 (the test documents have no part in it)."""
    if config.rates_of is not None:
        return json.loads((config.rates_of / "rates.json").read_text())[arm]
    return best_rate(arm, RATES[arm], partial(run_arm, arm, config, language, tokens=config.tune_tokens))


def best_rate(arm: str, rates: Sequence[float], run: Callable[..., Mapping[str, Any]]) -> float:
    """The rate with the lowest validation loss after a short run of seed 0; a single one needs none.

    Args:
        arm: names the runs.
        rates: to choose from.
        run: `run_arm`, but for seed, rate, name and report.
    """
    if len(rates) == 1:
        return rates[0]
    losses = {
        rate: run(seed=0, rate=rate, name=f"tune-{slug(arm)}-{rate:g}", report=False)["val_loss"] for rate in rates
    }
    return min(losses, key=lambda rate: losses[rate])


def tuned_unfrozen(config: Config, language: Language, relearning: float, whole: float) -> float:
    """The rate after unfreezing with the lowest validation loss, among shares of the best when all trains."""
    if config.rates_of is not None:
        return json.loads((config.rates_of / "rates.json").read_text())[UNFROZEN]
    if len(UNFROZEN_SHARES) == 1:
        return UNFROZEN_SHARES[0] * whole
    losses = {
        share * whole: run_arm(
            UNFROZEN,
            config,
            language,
            seed=0,
            rate=relearning,
            unfrozen_rate=share * whole,
            tokens=config.tune_tokens,
            name=f"tune-{slug(UNFROZEN)}-{share * whole:g}",
            report=False,
        )["val_loss"]
        for share in UNFROZEN_SHARES
    }
    return min(losses, key=lambda rate: losses[rate])


def rates(config: Config, language: Language) -> dict[str, float]:
    """The tuned rate of every arm, written to rates.json."""
    found = {arm: tuned(arm, config, language) for arm in (*FROZEN, *WHOLE)}
    found[UNFROZEN] = tuned_unfrozen(config, language, found["frozen English"], found["all from English"])
    write_json(language.directory / "rates.json", found)
    return found


def run_baselines(config: Config, language: Language) -> None:
    """n-gram models over the same tokens, and the English model as it is."""
    path = language.directory / "baselines.json"
    if path.exists():
        return
    ids = language.train.tokens(0, language.train.num_tokens)
    results: dict[str, Any] = {}
    trigram = WittenBell(ids, order=3, vocab_size=len(language.tokenizer))
    grams = {
        "trigram (Witten-Bell)": {
            split: score_ngrams(trigram, language.tokenizer, documents)
            for split, documents in language.documents.items()
        },
        name_of(language.train): language.ngram_scores,
    }
    for name, scores in grams.items():
        results[name] = {split: asdict(summarise(several)) for split, several in scores.items()}
    for name in ("tiny", "tiny-medium"):
        english, tokenizer = load_gpt2(name, frozen=True)
        results[f"untouched English ({name})"] = score_held_out(english, tokenizer, language)
    write_json(path, results)
    for name, found in results.items():
        print(
            f"{config.language} {name}: " + ", ".join(f"{k} {v['bits_per_byte']:.4f}" for k, v in found.items()),
            flush=True,
        )


def run_alignment(config: Config, language: Language, rate: float) -> None:
    """The medium model with rows aligned from the relearned small one, before and after a brief relearning."""
    relearned, _ = load_gpt2(language.directory / "runs" / "frozen-English-seed0" / "model", frozen=True)
    small, english = load_gpt2("tiny", frozen=True)
    large, _ = load_gpt2("tiny-medium", frozen=True)
    tables = token_table(small), token_table(large)
    target = token_table(relearned)
    generator = torch.Generator().manual_seed(0)
    runtime = RuntimeConfig(config.runtime.device, config.runtime.precision, 0, config.runtime.threads)
    for name in config.methods:
        settings = METHODS[name]
        if name == "least squares, chosen options":
            settings = settings | choose_options(*tables, method="least_squares", generator=generator).arguments()
        budgets = [0, config.brief_tokens]
        if not settings:
            budgets += [2 * config.brief_tokens, 4 * config.brief_tokens]
        for tokens in budgets:
            directory = language.directory / "alignment" / f"{slug(name)}-{tokens}"
            if (directory / "result.json").exists():
                continue
            begun = time.process_time()
            start(runtime)
            model, _ = load_gpt2("tiny-medium")
            if settings:
                rows = align(*tables, target, **settings)
                overlap = neighbour_overlap(target, rows)
                error = held_out_error(*tables, generator=torch.Generator().manual_seed(0), **settings)
            else:
                how = config.initialisation if name == "FOCUS rows" else "random"
                rows = first_rows(how, large, english, language, torch.Generator().manual_seed(0))
                overlap = error = None  # type: ignore[assignment]
            replace_lexical(model, language.tokenizer, rows)
            record = None
            if tokens:
                train_only(model)
                record = train_stage(
                    model,
                    language.train,
                    language.valid,
                    directory / "train",
                    stage(config, rate=rate, tokens=tokens, whole=False, validations=5),
                    runtime=runtime,
                    progress=False,
                )
            result: dict[str, Any] = {
                "method": name,
                "settings": settings,
                "tokens": tokens,
                "rate": rate,
                "overlap": overlap,
                "held_out_error": error,
                "record": asdict(record) if record else None,
                "held_out": score_held_out(model, language.tokenizer, language),
                "cpu_seconds": round(time.process_time() - begun, 1),
                "hardware": hardware(),
            }
            write_json(directory / "result.json", result)
            shutil.rmtree(directory / "train", ignore_errors=True)
            print(
                f"{time.strftime('%H:%M:%S')} {config.language} align {name} {tokens}: "
                + ", ".join(f"{k} {v['bits_per_byte']:.4f}" for k, v in result["held_out"].items())
                + f" overlap {overlap} error {error} ({result['cpu_seconds']:.0f} s)",
                flush=True,
            )


def main(config: Config) -> None:
    """Run the parts asked for, what is finished excepted."""
    for part in config.parts:
        require_one_of("part", part, PARTS)
    for method in config.methods:
        require_one_of("rows", method, tuple(METHODS))
    for arm in config.arms:
        require_one_of("arm", arm, ARMS)
    for arm in config.budget_arms:
        require_one_of("arm", arm, ARMS)
    require_at_least("tokens", config.tokens, 2)
    start(config.runtime)
    with fork_generators(config.runtime.seed):
        language = prepare(config)
    if "baselines" in config.parts:
        run_baselines(config, language)
    if config.parts == ("baselines",):
        return
    best = rates(config, language)

    def run(arm: str, name: str, **changes: Any) -> dict[str, Any]:
        first = {
            UNFROZEN: "frozen English",
            SHUFFLED_RANDOM: "frozen shuffled English",
            **dict.fromkeys(MEDIUM, "all from English"),
        }.get(arm, arm)
        settings = dict(
            seed=0, tokens=config.tokens, rate=best[first], unfrozen_rate=best[UNFROZEN] if arm == UNFROZEN else 0.0
        )
        return run_arm(arm, config, language, name=name, **settings | changes)

    for part in config.parts:
        if part == "main":
            for arm in config.arms:
                run(arm, f"{slug(arm)}-seed0", keep=True)
        if part == "seeds":
            for seed in (1, 2):
                for arm in MAIN:
                    run(arm, f"{slug(arm)}-seed{seed}", seed=seed)
        if part == "alignment":
            run("frozen English", "frozen-English-seed0", keep=True)
            run_alignment(config, language, best["frozen English"])
        if part == "data_size":
            for share in SHARES:
                # Few texts are passed over at most ten times.
                tokens = min(config.tokens, round(10 * share * language.train.num_tokens))
                for arm in MAIN:
                    run(arm, f"{slug(arm)}-share{share:g}", share=share, tokens=tokens)
        if part == "medium":
            run("frozen English", "frozen-English-seed0", keep=True)
            for arm in MEDIUM:
                run(arm, f"{slug(arm)}-seed0", keep=True)
            run(MEDIUM[0], f"{slug(MEDIUM[0])}-{max(config.budgets)}", tokens=max(config.budgets), keep=True)
        if part == "initialisations":
            for name in config.initialisations:
                if name != config.initialisation:
                    run_arm(
                        "frozen English",
                        replace(config, initialisation=name),
                        language,
                        seed=0,
                        tokens=config.tokens,
                        rate=best["frozen English"],
                        name=f"frozen-English-from-{name}",
                    )
        if part == "budgets":
            for tokens in config.budgets:
                for arm in config.budget_arms:
                    run(arm, f"{slug(arm)}-{tokens}", tokens=tokens, keep=tokens == max(config.budgets))


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
