"""Structure from motion with COLMAP, in a process of its own: `python -m dietnerf.structure JOB.json`.

COLMAP's library brings its own zlib and its own handlers of signals, which are not to be mixed with Pillow's, torch's
and ours; it is imported here only, and this file imports nothing else of the toolkit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

ALL_PAIRS = 100
"""Up to so many photographs, each is matched with each other one."""
NEIGHBOURS = 10
"""Of more, each is matched with so many that follow it, and with every `STRIDE`-th one of all."""
STRIDE = 10
LEAST_MATCHES = 15
"""Fewer say nothing about two photographs: COLMAP's own."""
LEAST_IMAGES = 3
"""Fewer are no model."""
Tell = Callable[[str, int, int], None]


def pairs_of(count: int) -> list[tuple[int, int]]:
    """Which of `count` photographs are compared, (first, second) with first < second.

    Up to `ALL_PAIRS` photographs all pairs; of more, which come in the order in which they were taken, each one and the
    `NEIGHBOURS` that follow it, and each one and every `STRIDE`-th, which closes loops.
    """
    if count <= ALL_PAIRS:
        return list(combinations(range(count), 2))
    near = ((i, j) for i in range(count) for j in range(i + 1, min(i + 1 + NEIGHBOURS, count)))
    far = ((min(i, j), max(i, j)) for i in range(count) for j in range(0, count, STRIDE) if i != j)
    return sorted({*near, *far})


def reconstruct(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Find cameras and points, and write the largest model in COLMAP's binary form; what is in the database is kept.

    Args:
        job: `images` (folder), `cameras` (list of `names`, `focal` in pixels or None), `database` and `model` (paths),
            `features` a photograph, `threads`, `seed`.
        tell: called with a stage's name, what is done of it and how much there is.

    Returns:
        `placed` (names of images), `points`, `error` in pixels, the number of `models` and of `pairs` of photographs
        that show the same things; `placed` is empty where none show enough.
    """
    import pycolmap

    pycolmap.logging.minloglevel = int(pycolmap.logging.Level.ERROR)
    names = [name for camera in job["cameras"] for name in camera["names"]]
    _import(pycolmap, job, names)
    _extract(pycolmap, job, names, tell)
    _match(pycolmap, job, sorted(names, key=job["order"].index), tell)
    return _map(pycolmap, job, len(names), tell)


def _import(pycolmap: Any, job: dict[str, Any], names: Sequence[str]) -> None:
    """Write the photographs and their cameras into the database, unless all are there, by a job that was stopped."""
    with pycolmap.Database.open(job["database"]) as database:
        if {image.name for image in database.read_all_images()} == set(names):
            return
        database.clear_all_tables()
    for camera in job["cameras"]:
        options = pycolmap.ImageReaderOptions()
        options.camera_model = "SIMPLE_RADIAL"
        if camera["focal"]:
            middle = [side / 2 for side in camera["size"]]
            options.camera_params = ",".join(map(str, (camera["focal"], *middle, 0.0)))
        pycolmap.import_images(
            job["database"], job["images"], pycolmap.CameraMode.SINGLE, image_names=camera["names"], options=options
        )


def _extract(pycolmap: Any, job: dict[str, Any], names: Sequence[str], tell: Tell) -> None:
    options = pycolmap.FeatureExtractionOptions()
    options.use_gpu, options.num_threads = False, job["threads"]
    options.sift.max_num_features = job["features"]
    for begin in range(0, len(names), job["threads"]):
        tell("features", begin, len(names))
        pycolmap.extract_features(
            job["database"],
            job["images"],
            image_names=names[begin : begin + job["threads"]],
            extraction_options=options,
            device=pycolmap.Device.cpu,
        )
    tell("features", len(names), len(names))


def _match(pycolmap: Any, job: dict[str, Any], names: Sequence[str], tell: Tell) -> None:
    matching, verification = pycolmap.FeatureMatchingOptions(), pycolmap.TwoViewGeometryOptions()
    matching.use_gpu, matching.num_threads = False, job["threads"]
    verification.ransac.random_seed = job["seed"]
    pairing = pycolmap.ImportedPairingOptions()
    pairing.match_list_path = Path(job["database"]).with_name("pairs.txt")
    pairs, batch = pairs_of(len(names)), 8 * job["threads"]
    for begin in range(0, len(pairs), batch):
        tell("matches", begin, len(pairs))
        lines = [f"{names[i]} {names[j]}\n" for i, j in pairs[begin : begin + batch]]
        pairing.match_list_path.write_text("".join(lines), encoding="utf-8")
        pycolmap.match_image_pairs(
            job["database"],
            matching_options=matching,
            pairing_options=pairing,
            verification_options=verification,
            device=pycolmap.Device.cpu,
        )
    tell("matches", len(pairs), len(pairs))


def _map(pycolmap: Any, job: dict[str, Any], count: int, tell: Tell) -> dict[str, Any]:
    options = pycolmap.IncrementalPipelineOptions()
    options.min_model_size, options.min_num_matches = LEAST_IMAGES, LEAST_MATCHES
    options.num_threads = 1  # sums over threads differ in their last digits from run to run
    for part in (options, options.mapper, options.triangulation):
        part.random_seed = job["seed"]
    placed = [0]

    def begin() -> None:
        placed[0] = 2
        tell("poses", 2, count)

    def another() -> None:
        placed[0] = min(placed[0] + 1, count)
        tell("poses", placed[0], count)

    with pycolmap.Database.open(job["database"]) as database:
        inliers = database.read_two_view_geometry_num_inliers()[1]
    pairs = sum(count >= LEAST_MATCHES for count in inliers)
    models = Path(job["database"]).with_name("models")
    models.mkdir(exist_ok=True)
    found = pycolmap.incremental_mapping(
        job["database"],
        job["images"],
        models,
        options=options,
        initial_image_pair_callback=begin,
        next_image_callback=another,
    )
    if not found:
        return {"placed": [], "points": 0, "error": None, "models": 0, "pairs": pairs}
    best = max(found.values(), key=lambda model: (model.num_reg_images(), model.num_points3D()))
    model = Path(job["model"])
    model.mkdir(parents=True, exist_ok=True)
    best.write_binary(model)
    return {
        "placed": sorted(best.image(number).name for number in best.reg_image_ids()),
        "points": best.num_points3D(),
        "error": best.compute_mean_reprojection_error(),
        "models": len(found),
        "pairs": pairs,
    }


def main() -> None:
    """Read a job's file; write its progress and then its outcome to standard output, a line of JSON each."""

    def tell(stage: str, done: int, of: int) -> None:
        print(json.dumps({"stage": stage, "done": done, "of": of}), flush=True)

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps({"outcome": reconstruct(job, tell)}), flush=True)


if __name__ == "__main__":
    main()
