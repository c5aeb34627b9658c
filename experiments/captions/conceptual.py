"""ClipCap's Conceptual Captions table (Mokady et al. 2021, table 1), beside the published numbers.

    clipcap download ...                            # the images, by URL
    python -m experiments.captions.conceptual --data DATA [--images DIR] [--test VALIDATION --test-images DIR]
    python -m experiments.captions.conceptual --small

Without --test, the test split of DATA is scored, or its val split. In small, each rendered scene keeps one caption, as
each image of Conceptual Captions has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from clipcap.data.dataset import read_dataset
from common.checks import UserError, require_one_of, run_command
from common.files import write_json
from experiments import from_command_line
from experiments.captions.tables import (
    VARIANTS,
    Setting,
    TableConfig,
    last_split,
    paper_rows,
    prepare,
    write_table,
)

PUBLISHED = {
    "transformer-frozen": {"ROUGE-L": "25.12", "CIDEr": "71.82", "SPICE": "16.07"},
    "mlp-tuned": {"ROUGE-L": "26.71", "CIDEr": "87.26", "SPICE": "18.5"},
}


@dataclass(frozen=True)
class Config(TableConfig):
    """Train the paper's two captioners on Conceptual Captions and score them."""

    test: Path | None = None
    """Captioned images to score on (the validation TSV), when they are not a split of DATA."""
    test_images: Path | None = None
    """Directory of the images of --test."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which captioners: transformer-frozen, mlp-tuned."""


def one_caption_each(setting: Setting) -> Setting:
    """The same data with the first caption of each image alone."""
    items = read_dataset(setting.data, images=setting.images)
    rows = [
        {
            "filename": item.image_id,
            "split": item.split,
            "sentences": [{"raw": item.captions[0]}],
        }
        for item in items
    ]
    data = write_json(setting.out / "data" / "one_caption.json", {"images": rows})
    return replace(setting, data=data, images=items[0].path.parent)


def main(config: Config) -> None:
    """Train, score, and print and write the table."""
    for name in config.variants:
        require_one_of("variant", name, tuple(VARIANTS))
    if config.test is not None and not config.test.exists():
        raise UserError(f"test {str(config.test)!r} does not exist: give the validation TSV, or leave --test out.")
    setting = prepare(
        "clipcap_conceptual", config, epochs=10, layout="Conceptual Captions' TSV (after `clipcap download`)"
    )
    if config.small:
        setting = one_caption_each(setting)
    split = "all"
    if config.test is None:
        split = last_split(setting.data, setting.images, skip_missing=config.skip_missing)
    rows, tokenizer, absent = paper_rows(
        setting, config.variants, PUBLISHED, data=config.test, images=config.test_images, split=split
    )
    text = [f"Scores times 100 with 95% intervals over the images (split: {split}), one reference each.", *absent]
    write_table(setting, "Conceptual Captions", text, rows, tokenizer=tokenizer)


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
