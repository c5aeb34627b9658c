"""Reads rendered scenes: the images of a split in one array, and their records."""

import json
from pathlib import Path

import numpy as np

from experiments.scenes.graph import SPLITS
from experiments.scenes.records import ViewRecord, record_from_json


def load_split(
    directory: str | Path, split: str, *, max_shards: int | None = None
) -> tuple[np.ndarray, list[ViewRecord]]:
    """All images of a split, (n, height, width, 3) uint8, and their records in the same order.

    Views of a scene and scenes of a family follow one another. Only complete shards are read, so this works while
    the split is being rendered. An image takes 28 kB (600 MB for all of train); `max_shards` reads fewer.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: use one of {', '.join(SPLITS)}.")
    files = shard_files(directory, split)[:max_shards]
    if not files:
        raise FileNotFoundError(
            f"{directory} has no rendered scenes of split {split!r}: run experiments/scenes/render.py first."
        )
    shards = [np.load(file, mmap_mode="r") for file in files]
    images = np.empty((sum(map(len, shards)), *shards[0].shape[1:]), np.uint8)
    records: list[ViewRecord] = []
    for file, shard in zip(files, shards, strict=True):
        images[len(records) : len(records) + len(shard)] = shard
        with open(file.with_suffix(".jsonl"), encoding="utf-8") as lines:
            records.extend(record_from_json(json.loads(line)) for line in lines)
    return images, records


def shard_files(directory: str | Path, split: str) -> list[Path]:
    """The image files of a split's complete shards, in order."""
    return sorted(Path(directory).glob(f"{split}-[0-9]*.npy"))
