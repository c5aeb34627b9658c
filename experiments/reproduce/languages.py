"""The published comparison of recycled models (de Vries & Nissim 2021, sec. 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from common.runtime import start
from experiments.reproduce.config import GPT2, MEDIUM, Config, conclude
from experiments.reproduce.needs import Need, find_weights, missing_weights
from experiments.reproduce.rehearsal import clock, sizes_of, two_steps

LANGUAGES: dict[str, dict[str, Any]] = {
    "nld": {"name": "dutch", "vocab_size": 40_000},
    "ita": {"name": "italian", "vocab_size": 30_000},
}
"""De Vries & Nissim 2021, sec. 3.1."""


def text_needs(language: str) -> Callable[[Config], list[Need]]:
    def needs(config: Config) -> list[Need]:
        name = LANGUAGES[language]["name"].capitalize()
        about = f"{name} text: .txt, .jsonl, .html (also .xz, .gz) or a Hugging Face dataset on disk, some gigabytes"
        return [
            Need(config.data / "text" / language, about),
            *(
                replace(missing_weights(config.weights, hub), optional=f"without it '{what}' is not measured")
                for what, hub in released(language).items()
                if find_weights(config.weights, hub) is None
            ),
        ]

    return needs


def released(language: str) -> dict[str, str]:
    """The models that the authors released, by what they are."""
    name = LANGUAGES[language]["name"]
    return {
        "released, small relearned": f"GroNLP/gpt2-small-{name}-embeddings",
        "released, small fine-tuned": f"GroNLP/gpt2-small-{name}",
        "released, medium relearned": f"GroNLP/gpt2-medium-{name}-embeddings",
    }


def run_language(language: str) -> Callable[[Config, dict[str, str]], None]:
    def run(config: Config, weights: dict[str, str]) -> None:
        from common.gpt2 import load_gpt2
        from recycle_gpt2.alignment import AlignmentConfig
        from recycle_gpt2.corpus import load_documents
        from recycle_gpt2.evaluate import interval, score_documents, summarise
        from recycle_gpt2.lexical import RowsConfig
        from recycle_gpt2.run import RunConfig, recycle
        from recycle_gpt2.stages import FinetuneConfig, finetune
        from recycle_gpt2.training import PUBLISHED

        stage = replace(PUBLISHED, tokens=config.steps * PUBLISHED.batch_size * 1024)
        medium = recycle(
            RunConfig(
                text=(config.data / "text" / language,),
                out=config.place / "medium",
                language=language,
                small=weights[GPT2],
                large=weights[MEDIUM],
                vocab_size=LANGUAGES[language]["vocab_size"],
                rows=RowsConfig(initialisation="random"),
                alignment=AlignmentConfig(choose=False),
                unfreeze="none",
                stage=stage,
                runtime=config.runtime,
            )
        )
        stages = config.place / "medium.stages"
        relearned = stages / "relearn" / "model"
        tuned = finetune(
            FinetuneConfig(
                model=relearned,
                corpus=stages / "corpus",
                out=config.place / "small-fine-tuned",
                stage=replace(stage, lr=1e-4),
                runtime=config.runtime,
            )
        )
        models: dict[str, str | None] = {
            "small relearned": str(relearned), "small fine-tuned": str(tuned), "medium relearned": str(medium),
        }  # fmt: skip
        models |= {name: find_weights(config.weights, hub) for name, hub in released(language).items()}
        documents, device = load_documents(stages / "corpus", "test"), start(config.runtime)
        lines = ["| model | bits per byte | 95% interval | perplexity |", "|---|--:|--:|--:|"]
        for name, source in models.items():
            if source is None:
                lines.append(f"| {name} | not measured: its weights are not at hand | | |")
                continue
            model, tokenizer = load_gpt2(source, device=device, frozen=True)
            found = summarise(score_documents(model, tokenizer, documents, progress=True), seed=config.runtime.seed)
            ends = interval(found.bits_per_byte_interval)
            figures = f"{found.bits_per_byte:.4f} | {ends} | {found.perplexity:.2f}"
            lines.append(f"| {name} | {figures} |")
        lines += [
            "",
            f"{len(documents)} held-out documents of this text. The papers' perplexities are of texts that are not "
            f"public, so what stands beside ours is the authors' released models on the same documents; bits per byte "
            f"compare them, perplexities only models with one tokenizer.",
        ]
        conclude(config, lines)

    return run


def rehearse_language(language: str) -> Callable[[Config], Iterator[str]]:
    def rehearse(config: Config) -> Iterator[str]:
        from transformers import GPT2Config, GPT2LMHeadModel

        from common.gpt2 import replace_token_table, token_table
        from common.language import score
        from recycle_gpt2.alignment import align
        from recycle_gpt2.lexical import train_only
        from recycle_gpt2.training import PUBLISHED, Plan, Recycling

        def train(model: GPT2LMHeadModel, lr: float = 1e-3) -> float:
            batch = torch.randint(vocab_size, (1, 64))
            return two_steps(Recycling(model, replace(PUBLISHED, lr=lr), Plan(2, 2, 64), 1024), batch, config.runtime)

        vocab_size, sizes = LANGUAGES[language]["vocab_size"], GPT2Config()
        step = "s a step of 64 tokens (published: 8 blocks of 1,024)"
        small = GPT2LMHeadModel(sizes)
        english = token_table(small)
        replace_token_table(small, torch.randn(vocab_size, 768) * sizes.initializer_range)
        train_only(small)
        yield f"relearning small: {sizes_of(small)}, {train(small):.2f} {step}"
        train_only(small, layers="all")
        yield f"fine-tuning small: {sizes_of(small)}, {train(small, 1e-4):.2f} {step}"
        nats = score(small.eval().cpu(), torch.randint(vocab_size, (96,)), block=64, stride=32).nats
        yield f"scoring: {nats / 96:.2f} nats a token"
        target = token_table(small).clone()
        del small
        medium = GPT2LMHeadModel(GPT2Config(n_layer=24, n_embd=1024, n_head=16))
        begun = clock()
        replace_token_table(medium, align(english, token_table(medium), target))
        yield f"alignment by least squares: {len(english):,} rows, {clock() - begun:.1f} s"
        train_only(medium)
        yield f"relearning medium: {sizes_of(medium)}, {train(medium):.2f} {step}"

    return rehearse
