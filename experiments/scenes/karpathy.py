"""Writes rendered scenes as an ordinary captioning data set: image files and Karpathy's JSON."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from common.report import write_json
from experiments.scenes.dataset import load_split
from experiments.scenes.graph import has_held_out
from experiments.scenes.records import ViewRecord


def filename(record: ViewRecord) -> str:
    """A view's file name, the same in every run."""
    return f"{record.split}-{record.family:05d}-{record.scene_index}-{record.view}.png"


def export(scenes: Path, out: Path, splits: Iterable[str] = ("train", "val")) -> Path:
    """Write the images of some splits and `dataset.json` to `out` and return the JSON's path; images there are kept."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for split in splits:
        images, records = load_split(scenes, split)
        for image, record in zip(images, records, strict=True):
            path = out / "images" / filename(record)
            if not path.exists():
                Image.fromarray(image).save(path, compress_level=1)
            first = 5 * len(rows)
            rows.append(
                {
                    "filename": path.name,
                    "imgid": len(rows),
                    "split": "test" if split == "test_unseen" else split,
                    "unseen": has_held_out(record.scene),
                    "sentids": list(range(first, first + len(record.captions))),
                    "sentences": [
                        {"raw": text, "tokens": text.split(), "imgid": len(rows), "sentid": first + i}
                        for i, text in enumerate(record.captions)
                    ],
                }
            )
    return write_json(out / "dataset.json", {"dataset": "scenes", "images": rows})
