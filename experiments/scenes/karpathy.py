"""Scenes as ordinary captioning data sets: image files and Karpathy's JSON, in any language; the packaged ones too."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import write_json
from common.pretrained import ASSETS
from experiments.scenes.captions import view_captions
from experiments.scenes.dataset import load_split
from experiments.scenes.graph import has_held_out
from experiments.scenes.records import ViewRecord, family_records
from experiments.scenes.wording import WORDINGS

SAMPLES = ASSETS / "samples" / "scenes"
"""The packaged scenes, whose graphs follow from seed 0 and their place."""


def filename(record: ViewRecord) -> str:
    """A view's file name, the same in every run."""
    return f"{record.split}-{record.family:05d}-{record.scene_index}-{record.view}.png"


def export(scenes: Path, out: Path, splits: Iterable[str] = ("train", "val")) -> Path:
    """Write the images of some splits and `dataset.json` to `out` and return the JSON's path; images there are kept."""
    written: dict[str, ViewRecord] = {}
    for split in splits:
        images, records = load_split(scenes, split)
        written |= save_images(images, records, out / "images")
    return write_dataset(out / "dataset.json", written)


def save_images(images: np.ndarray, records: Iterable[ViewRecord], directory: Path) -> dict[str, ViewRecord]:
    """Write images (n, height, width, 3) as PNG files that are missing; returns the records by file name."""
    directory.mkdir(parents=True, exist_ok=True)
    named = {filename(record): record for record in records}
    for name, image in zip(named, images, strict=True):
        path = directory / name
        if not path.exists():
            temporary = path.with_suffix(".partial")
            Image.fromarray(image).save(temporary, format="PNG", compress_level=1)
            temporary.rename(path)
    return named


def write_dataset(path: Path, records: Mapping[str, ViewRecord]) -> Path:
    """Write views by file name, with their captions, in Karpathy's layout and return the path."""
    rows: list[dict[str, object]] = []
    for name, record in records.items():
        first = 5 * len(rows)
        rows.append(
            {
                "filename": name,
                "imgid": len(rows),
                "split": "test" if record.split == "test_unseen" else record.split,
                "unseen": has_held_out(record.scene),
                "sentids": list(range(first, first + len(record.captions))),
                "sentences": [
                    {"raw": text, "tokens": text.split(), "imgid": len(rows), "sentid": first + i}
                    for i, text in enumerate(record.captions)
                ],
            }
        )
    return write_json(path, {"dataset": "scenes", "images": rows})


def packaged_records(split: str) -> dict[str, ViewRecord]:
    """The packaged scenes of a split, test_unseen as part of test, by file name."""
    found = {}
    for row in json.loads((SAMPLES / "dataset.json").read_text(encoding="utf-8"))["images"]:
        if row["split"] != split:
            continue
        views = family_records(0, "test_unseen" if row["filename"].startswith("test_unseen") else split, row["family"])
        place = row["scene_index"], row["view"]
        found[row["filename"]] = next(view for view in views if (view.scene_index, view.view) == place)
    return found


def captioned_in(language: str, records: Mapping[str, ViewRecord]) -> dict[str, ViewRecord]:
    """The same views with as many captions in a language ("nld"), the same in every run; English ones stay."""
    if language == "eng":
        return dict(records)
    return {
        name: replace(
            record,
            captions=tuple(
                view_captions(
                    record.scene,
                    record.camera,
                    random.Random(f"{language}/{filename(record)}"),
                    count=len(record.captions),
                    wording=WORDINGS[language],
                )
            ),
        )
        for name, record in records.items()
    }
