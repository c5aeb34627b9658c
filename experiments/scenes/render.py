"""Render the synthetic scenes: `python experiments/scenes/render.py --output out/scenes`.

Needs `bpy`, `numpy` and `pillow` only. Each split becomes shards `train-00012.npy` (images, uint8, n x 96 x 96 x 3)
beside `train-00012.jsonl` (one record an image). A shard's images are renamed into place after its records, so
whatever `.npy` exists is complete, and a second run renders what is missing. The same seed gives the same scenes,
cameras and captions for any number of workers, and the same images up to render noise around some glowing objects.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs beside Blender, where nothing is installed

from experiments.scenes.records import family_records, record_to_json

if TYPE_CHECKING:
    from experiments.scenes.blender import Renderer

FAMILIES = {"val": 75, "test": 250, "test_unseen": 75, "train": 2400}  # in the order of rendering
FAMILIES_PER_SHARD = 25


def main() -> None:
    """Render every missing shard, or packaged samples."""
    options = _parse_options()
    if options.samples:
        from experiments.scenes.samples import write_samples

        write_samples(options.seed)
        return
    if options.walk:
        from experiments.scenes.room import write_walk

        write_walk(options.walk)
        return
    if options.still_life:
        from experiments.scenes.samples import write_multiview

        if options.still_life.exists():
            raise SystemExit(f"{str(options.still_life)!r} exists: give a directory that does not.")
        write_multiview(options.still_life, options.seed, resolution=options.resolution)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    if options.workers > 1:
        _run_workers(options)
        return
    shards = [
        (split, shard)
        for split, families in FAMILIES.items()
        for shard in range(-(-(options.train_families if split == "train" else families) // FAMILIES_PER_SHARD))
    ]
    shards = shards[options.worker :: options.of_workers]
    missing = [s for s in shards if not _images_file(options.output, *s).exists()]
    print(f"{len(shards)} shards, {len(missing)} to render", flush=True)
    if missing:
        _render_shards(missing, options)


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("out/scenes"), help="directory of the shards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--train-families", type=int, default=FAMILIES["train"], help="8 images each")
    parser.add_argument("--resolution", type=int, default=96, help="pixels")
    parser.add_argument("--render-samples", type=int, default=8, help="light paths a pixel")
    parser.add_argument("--samples", action="store_true", help="write the packaged samples instead")
    parser.add_argument("--walk", type=Path, metavar="DIRECTORY", help="write the photographs of a room instead")
    parser.add_argument("--still-life", type=Path, metavar="DIRECTORY", help="write the scene for dietnerf instead")
    parser.add_argument("--worker", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--of-workers", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_workers(options: argparse.Namespace) -> None:
    command = [sys.executable, __file__, *sys.argv[1:], "--workers", "1", "--of-workers", str(options.workers)]
    workers = [subprocess.Popen([*command, "--worker", str(i)]) for i in range(options.workers)]
    failed = sum([worker.wait() != 0 for worker in workers])
    if failed:
        raise SystemExit(f"{failed} of {options.workers} workers failed: run the same command again to resume.")


def _render_shards(shards: list[tuple[str, int]], options: argparse.Namespace) -> None:
    from experiments.scenes.blender import Renderer

    with _quiet_stdout() as progress:
        renderer = Renderer(options.resolution, options.render_samples)
        started, rendered = time.monotonic(), 0
        for i, (split, shard) in enumerate(shards):
            rendered += _render_shard(renderer, split, shard, options)
            elapsed = time.monotonic() - started
            minutes = elapsed / (i + 1) * (len(shards) - i - 1) / 60
            rate = f"{rendered} images  {elapsed / rendered:.3f} s/image  {minutes:.1f} min left"
            print(f"{split}-{shard:05d}  {rate}", file=progress, flush=True)


def _render_shard(renderer: Renderer, split: str, shard: int, options: argparse.Namespace) -> int:
    families = options.train_families if split == "train" else FAMILIES[split]
    first = shard * FAMILIES_PER_SHARD
    views = [
        record
        for index in range(first, min(first + FAMILIES_PER_SHARD, families))
        for record in family_records(options.seed, split, index)
    ]
    images = [renderer.render(view.scene, view.camera) for view in views]
    target = _images_file(options.output, split, shard)
    lines = "".join(json.dumps(record_to_json(view)) + "\n" for view in views)
    with _replacing(target.with_suffix(".jsonl")) as file:
        file.write(lines.encode())
    with _replacing(target) as file:
        np.save(file, np.stack(images))
    return len(images)


def _images_file(directory: Path, split: str, shard: int) -> Path:
    return directory / f"{split}-{shard:05d}.npy"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        yield file
    part.replace(path)


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[TextIO]:
    """Sends what Blender prints for every image to nowhere; gives the real output."""
    sys.stdout.flush()
    real = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        with os.fdopen(os.dup(real), "w") as output:
            yield output
    finally:
        os.dup2(real, 1)
        os.close(real)


if __name__ == "__main__":
    main()
