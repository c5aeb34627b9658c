"""The command `clipcap bundle`: a captioner's directory that holds its CLIP and its GPT-2 too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from common.files import require_own_directory, whole_directory
from common.pretrained import saving


@dataclass(frozen=True)
class BundleConfig:
    """Copy a captioner together with its CLIP and its GPT-2, to take it to another machine."""

    source: tyro.conf.Positional[str]
    """Captioner: a packaged name, a directory that `clipcap train` or `clipcap convert` wrote, or a hub id."""
    out: tyro.conf.Positional[Path]
    """Directory to write; it works wherever it is moved to."""


def run(config: BundleConfig) -> int:
    """`clipcap bundle`: write a captioner that needs nothing outside its directory.

    Raises:
        UserError: there is no such captioner, a backbone is in no file here, or `out` holds something else.
    """
    from clipcap.model import ClipCapModel

    require_own_directory(config.out, "captioner")
    model = ClipCapModel.from_pretrained(config.source, dtype="auto")
    with saving(config.out, "captioner"), whole_directory(config.out, "captioner") as directory:
        model.save_pretrained(directory, bundle=True)
    print(f"captioner with its backbones written to {config.out}")
    return 0
