"""The demo's part on recycling: English made into Dutch in two minutes, on the packaged sample.

    python -m experiments.demo.recycling

The tiny English GPT-2 relearns its embeddings for Dutch, and they are carried over to the larger one.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.checks import run_command
from common.files import write_json
from common.gpt2 import load_gpt2, token_table
from common.pretrained import ASSETS
from common.report import Page, plot_bars, plot_lines
from common.runtime import RuntimeConfig, provenance, start
from experiments import from_command_line
from experiments.languages.text import surest_new_words
from recycle_gpt2.alignment import align, choose_options, held_out_error
from recycle_gpt2.baseline import fit_ngrams, name_of, score_ngrams
from recycle_gpt2.blocks import TokenBlocks
from recycle_gpt2.corpus import build_corpus
from recycle_gpt2.documents import read_documents
from recycle_gpt2.evaluate import score_documents, summarise
from recycle_gpt2.lexical import cooccurrence_embeddings, initialise, replace_lexical, train_only
from recycle_gpt2.lexicon import build_lexicon
from recycle_gpt2.sampling import sample
from recycle_gpt2.tokenizer import train_tokenizer
from recycle_gpt2.training import StageConfig, train_stage

DUTCH = ASSETS / "samples" / "dutch"
VOCAB = 3000
BLOCK = 128
PROMPTS = ("Klik op", "In dit dialoogvenster", "U kunt een tabel")


@dataclass(frozen=True)
class Config:
    """Recycle the tiny English GPT-2 for Dutch and write a page."""

    out: Path = Path("out/demo-recycling")
    """Where the page and results.json go."""
    tokens: int = 250_000
    """Training tokens of the small model."""
    brief_tokens: int = 60_000
    """Training tokens of the larger model after the alignment."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def stage(tokens: int) -> StageConfig:
    """A short stage: the embeddings alone by AdamW, cosine to zero."""
    return StageConfig(
        tokens=tokens,
        batch_size=8,
        optimizer="adamw",
        lr=1e-2,
        weight_decay=0.01,
        schedule="cosine",
        warmup=20,
        val_every=max(1, tokens // (6 * 8 * BLOCK)),
    )


def recycle_sample(
    out: Path, *, device: torch.device | str, tokens: int, brief_tokens: int, seed: int = 0, documents: int = 0
) -> dict[str, Any]:
    """Every stage on the sample; returns scores, samples, the lexicon's first entries and the curves.

    Args:
        out: for the corpus and the checkpoints.
        device: to train on.
        tokens: of relearning in the small model.
        brief_tokens: of relearning in the larger one.
        seed: of all.
        documents: to train on, when not 0, and a twentieth of that to score.
    """
    runtime = RuntimeConfig(device=str(device), seed=seed)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    text = [document.text for document in read_documents([DUTCH / "train.txt.xz"])]
    (out / "train.txt").write_text("\n\n".join(text[: documents or None]), encoding="utf-8")
    held_out = list(read_documents([DUTCH / "test.txt.xz"]))[: documents // 20 or None]
    tokenizer = train_tokenizer((document.text for document in read_documents([out / "train.txt"])), VOCAB)
    corpus = build_corpus(
        [out / "train.txt"], tokenizer, out / "corpus", block=BLOCK, shares=(0.94, 0.03, 0.03), progress=False
    )
    train, valid = TokenBlocks(corpus, "train"), TokenBlocks(corpus, "valid")
    scores: dict[str, float] = {}
    curves: dict[str, tuple[list[float], list[float]]] = {}

    def bits(name: str, model: Any, spoken: Any = tokenizer) -> None:
        scores[name] = summarise(score_documents(model, spoken, held_out)).bits_per_byte

    def train_embeddings(name: str, model: Any, length: int) -> None:
        train_only(model)
        record = train_stage(model, train, valid, out / name, stage(length), runtime=runtime, progress=False)
        curves[name] = (
            [point["tokens"] for point in record.curve],
            [point["val_loss"] / math.log(2) for point in record.curve],
        )

    english, english_tokenizer = load_gpt2("tiny", device=device, frozen=True)
    larger, _ = load_gpt2("tiny-medium", device=device, frozen=True)
    bits("small English model, untouched", english, english_tokenizer)
    ids = train.tokens(0, train.num_tokens)
    rows = initialise(
        "focus",
        token_table(english).cpu(),
        english_tokenizer,
        tokenizer,
        generator=torch.Generator().manual_seed(seed),
        auxiliary=cooccurrence_embeddings(ids, len(tokenizer), end=tokenizer.eos_token_id),
    )
    small, _ = load_gpt2("tiny", device=device)
    replace_lexical(small, tokenizer, rows)
    bits("small, first Dutch embeddings", small)
    train_embeddings("small", small, tokens)
    bits("small, relearned", small)
    tables = token_table(english).cpu(), token_table(larger).cpu()
    options = choose_options(*tables, method="procrustes", generator=torch.Generator().manual_seed(seed)).arguments()
    large, _ = load_gpt2("tiny-medium", device=device)
    replace_lexical(large, tokenizer, align(*tables, token_table(small).cpu(), method="procrustes", **options))
    bits("medium, aligned, not trained", large)
    lexicon = build_lexicon(token_table(small).cpu(), tokenizer, tables[0], english_tokenizer, k=3, words=800)
    train_embeddings("medium", large, brief_tokens)
    bits("medium, aligned, relearned briefly", large)
    scores[name_of(train)] = summarise(score_ngrams(fit_ngrams(train), tokenizer, held_out)).bits_per_byte
    samples = {
        prompt: {
            name: sample(model, tokenizer, prompt, strategy="nucleus", max_new_tokens=30, temperature=0.8, seed=seed)[0]
            for name, model in (("small", small), ("medium", large))
        }
        for prompt in PROMPTS
    }
    best = surest_new_words(lexicon, english_tokenizer)
    return {
        "bits_per_byte": scores,
        "curves": curves,
        "samples": samples,
        "lexicon": [{"Dutch": e.word, "nearest English": ", ".join(e.candidates)} for e in best[:15]],
        "alignment_error": held_out_error(
            *tables, method="procrustes", generator=torch.Generator().manual_seed(seed), **options
        ),
        "train_tokens": train.num_tokens,
        "tokens": tokens,
        "brief_tokens": brief_tokens,
        "test_bytes": sum(len(document.text.encode()) for document in held_out),
        "seed": seed,
    }


def recycling_section(
    page: Page,
    out: Path,
    *,
    device: torch.device | str,
    tokens: int = 250_000,
    brief_tokens: int = 60_000,
    documents: int = 0,
) -> dict[str, Any]:
    """Recycle the packaged English models for Dutch and add a section to `page`; returns the results.

    About two minutes on two cores, with the settings as they are. `out` gets a folder `recycling`.
    """
    begun = time.monotonic()
    result = recycle_sample(
        out / "recycling", device=device, tokens=tokens, brief_tokens=brief_tokens, documents=documents
    )
    result["seconds"] = time.monotonic() - begun
    page.section(
        "English recycled for Dutch",
        "The tiny English GPT-2 keeps its layers and relearns its token embeddings for Dutch. A linear map between the "
        "English embeddings of the small and the larger model then carries the Dutch rows over, so the larger model "
        "speaks Dutch before it has seen any.",
    )
    page.figure(
        plot_bars(result["bits_per_byte"], x="bits per byte of held-out Dutch (lower is better)"),
        f"Held-out pages of LibreOffice's Dutch help, {result['test_bytes']:,} bytes. The small model was trained on "
        f"{tokens:,} tokens, the medium one on {brief_tokens:,}. The 5-gram model, which only counts sequences of "
        "tokens, is there for comparison.",
    )
    page.figure(
        plot_lines(result["curves"], x="training tokens", y="bits per token, validation"),
        "Only the embeddings are trained.",
    )
    rows = [
        {"prompt": prompt, "small, relearned": texts["small"], "medium, aligned and relearned": texts["medium"]}
        for prompt, texts in result["samples"].items()
    ]
    page.table(rows, caption="Samples (nucleus 0.9, temperature 0.8, one seed)")
    page.table(
        result["lexicon"],
        caption="Dutch words and the English words nearest to them in the shared embedding space, most certain first "
        "(words that are also English tokens are left out: they start from the same row)",
    )
    page.note(
        "This is two minutes of training on one program's manual, and the sentences show it. Longer runs, every "
        "control and both languages are in docs/recycling.md."
    )
    page.command("python -m experiments.demo.recycling")
    return result


def main(config: Config) -> None:
    """Write a page with this section alone."""
    device = start(config.runtime)
    page = Page("English recycled for Dutch", "The packaged sample, on this machine")
    result = recycling_section(page, config.out, device=device, tokens=config.tokens, brief_tokens=config.brief_tokens)
    page.details(
        "hardware, versions and time",
        {**provenance(), "seconds": round(result["seconds"], 1)},
    )
    write_json(config.out / "results.json", result | provenance())
    for name, value in result["bits_per_byte"].items():
        print(f"{value:.3f} bits per byte: {name}")
    print(f"page: {page.write(config.out / 'index.html')} ({result['seconds']:.0f} s)")


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
