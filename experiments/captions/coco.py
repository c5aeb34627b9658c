"""ClipCap's COCO table (Mokady et al. 2021, table 1): both captioners on Karpathy's test split, beside the published.

    python -m experiments.captions.coco --data dataset_coco.json --images coco
    python -m experiments.captions.coco --small

At full size: CLIP ViT-B/32 and GPT-2 (124M), 10 epochs over 567,000 captions for each captioner, which wants a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.checks import require_one_of, run_command
from experiments import from_command_line
from experiments.captions.tables import VARIANTS, TableConfig, paper_rows, prepare, write_table

PUBLISHED = {
    "transformer-frozen": {"BLEU-4": "33.53", "METEOR": "27.45", "CIDEr": "113.08", "SPICE": "21.05"},
    "mlp-tuned": {"BLEU-4": "32.15", "METEOR": "27.1", "CIDEr": "108.35", "SPICE": "20.12"},
}


@dataclass(frozen=True)
class Config(TableConfig):
    """Train the paper's two captioners on COCO and score them on Karpathy's test split."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which captioners: transformer-frozen, mlp-tuned."""


def main(config: Config) -> None:
    """Train, score, and print and write the table."""
    for name in config.variants:
        require_one_of("variant", name, tuple(VARIANTS))
    setting = prepare("clipcap_coco", config, epochs=10, layout="Karpathy's dataset_coco.json, with --images")
    rows, tokenizer, absent = paper_rows(setting, config.variants, PUBLISHED)
    text = ["Scores times 100 with 95% intervals over the test images.", *absent]
    write_table(setting, "COCO, Karpathy's test split", text, rows, tokenizer=tokenizer)


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
