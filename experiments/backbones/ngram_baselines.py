"""Bits per byte of Witten-Bell unigram, bigram and trigram models: what a trained GPT-2 has to beat.

    python -m experiments.backbones.ngram_baselines --corpus DIR --tokenizer DIR

DIR as for experiments/backbones/train_gpt2.py, whose tokens and bytes are counted the same way here.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import GPT2TokenizerFast

from common.checks import require_at_least, require_file, run_command
from common.files import write_json
from common.ngram import WittenBell
from common.runtime import provenance
from experiments import from_command_line
from experiments.backbones.train_gpt2 import encode, read_documents


@dataclass(frozen=True)
class Config:
    """n-gram baselines on the validation split."""

    corpus: Path
    """Directory of eng.train.txt(.xz) and eng.valid.txt(.xz)."""
    tokenizer: Path
    """Directory of the tokenizer."""
    out: Path = Path("out/ngram.json")
    """JSON file of the results."""
    order: int = 3
    """Longest n-gram."""


def main(config: Config) -> None:
    """Fit every order up to `order` on the training split and score the validation split."""
    require_at_least("order", config.order, 1)
    require_file(config.tokenizer / "tokenizer.json", "tokenizer")
    tokenizer = GPT2TokenizerFast.from_pretrained(config.tokenizer)
    train, documents = (read_documents(config.corpus, split) for split in ("train", "valid"))
    train_ids, valid_ids = encode(tokenizer, train), encode(tokenizer, documents)
    # The bytes that the scored tokens spell: every end token but the first counts as one byte, a line break.
    num_bytes = sum(len(text.encode()) + 1 for text in documents)
    scores = {}
    for order in range(1, config.order + 1):
        begun = time.process_time()
        model = WittenBell(train_ids, order=order, vocab_size=len(tokenizer))
        nats = float(model.score(valid_ids)[1:].sum())  # the first token is context only
        scores[str(order)] = {
            "nats": nats,
            "bits_per_byte": nats / math.log(2) / num_bytes,
            "perplexity": math.exp(nats / (len(valid_ids) - 1)),
            "cpu_seconds": round(time.process_time() - begun, 2),
        }
        print(f"order {order}: {scores[str(order)]['bits_per_byte']:.4f} bits per byte")
    write_json(
        config.out,
        {
            "config": {"corpus": config.corpus.name, "tokenizer": config.tokenizer.name, "order": config.order},
            "smoothing": "interpolated Witten-Bell",
            "train_tokens": len(train_ids),
            "valid_tokens": len(valid_ids) - 1,
            "valid_bytes": num_bytes,
            "orders": scores,
            **provenance(),
        },
    )
    print(f"written to {config.out}")


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
