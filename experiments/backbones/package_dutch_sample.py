"""Package the Dutch sample of the demo: whole documents of LibreOffice's Dutch help.

    python -m experiments.backbones.package_dutch_sample --text DIR

DIR holds nld.train.txt(.xz) and nld.valid.txt(.xz), made by experiments/backbones/build_corpus.py.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from pathlib import Path

from common.checks import run_command
from common.files import write_text
from common.pretrained import ASSETS
from experiments import from_command_line
from experiments.languages.text import read_split, second_genre

CARD = """# Dutch sample

{train} documents ({train_bytes:,} bytes) for training and {test} ({test_bytes:,} bytes) for scoring: pages of
LibreOffice's help in Dutch (Debian package libreoffice-help-nl), one paragraph a line, with an empty line between
documents and without paragraphs in English. They are complete documents of the corpus that
experiments/backbones/build_corpus.py makes, chosen because they name LibreOffice.

Licence: Mozilla Public License 2.0 (https://mozilla.org/MPL/2.0/), like LibreOffice's help; copyright by the
LibreOffice contributors.

Made by `python -m experiments.backbones.package_dutch_sample --text DIR`, where experiments/backbones/build_corpus.py
made DIR.
"""


@dataclass(frozen=True)
class Config:
    """Choose the documents and compress them."""

    text: Path
    """Directory of nld.train.txt(.xz) and nld.valid.txt(.xz)."""
    out: Path = ASSETS / "samples" / "dutch"
    """Where the sample goes."""


def main(config: Config) -> None:
    """Write train.txt.xz, test.txt.xz and README.md."""
    config.out.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    for split, source in (("train", "train"), ("test", "valid")):
        chosen = [
            text
            for text in read_split(config.text, "nld", source)
            if "LibreOffice" in text and "GIMP" not in text and not second_genre(text)
        ]
        content = ("\n\n".join(chosen) + "\n").encode()
        path = config.out / f"{split}.txt.xz"
        path.write_bytes(lzma.compress(content, preset=9))
        counts |= {split: len(chosen), f"{split}_bytes": len(content)}
        print(f"{path.name}: {len(chosen)} documents, {len(content):,} bytes, {path.stat().st_size:,} compressed")
    write_text(config.out / "README.md", CARD.format(**counts))


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
