"""From photographs to a scene: finds where each was taken, with COLMAP, and writes what nerfstudio reads."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from common.checks import UserError, printable, require_between, require_place, require_text
from common.files import LOCK, alone, clear_leftovers, require_own_directory, whole_directory, write_json
from common.images import ImageLimit, image_suffixes
from common.processes import is_first_process
from common.progress import Progress
from common.runtime import MOST_THREADS
from dietnerf.layouts import find_scene
from dietnerf.photographs import Camera, Photograph, Sharing, cameras_of, find_photographs, prepare
from dietnerf.structure import ALL_PAIRS, LEAST_IMAGES, NEIGHBOURS, STRIDE

RECORD = "posing.json"
"""What a scene was posed from, and how it went."""
STAGES = {
    "photographs": "scaling photographs",
    "features": "finding features",
    "matches": "matching pairs",
    "poses": "placing photographs",
}
SHOWN = 10
"""Names in a message, at most."""
MOST_SEEDS = 2**31


@dataclass(frozen=True)
class PoseConfig:
    """Find where photographs were taken, and write a scene that dietnerf train and ns-train open.

    PHOTOGRAPHS is a folder of JPEG or PNG files. SCENE gets transforms.json with poses and intrinsics, sparse_pc.ply
    with the points that COLMAP found, images/ with the photographs that the poses are of (upright, scaled down, with
    their lens's distortion) and colmap/sparse/0 with COLMAP's own model.
    """

    photographs: Annotated[Path, tyro.conf.Positional]
    """Folder of photographs."""
    scene: Annotated[Path, tyro.conf.Positional]
    """Where the scene goes."""
    image_size: int = 1600
    """Longest side in pixels to which photographs are scaled down. Smaller is faster."""
    cameras: Sharing = "auto"
    """auto: photographs of one size, by one lens at one zoom (as their EXIF tags say) have one set of intrinsics;
    shared: all of one size do; each: none do."""
    features: int = 8192
    """Most SIFT features of a photograph; fewer are faster to match."""
    seed: int = 0
    """Seed of every random choice."""
    threads: int = 0
    """CPU threads; 0 is one for each core. They do not change the result."""
    resume: bool = True
    """Go on from what an interrupted call left, and keep a scene that was posed from the same photographs with the same
    settings; --no-resume starts over."""
    limit: ImageLimit = field(default_factory=ImageLimit)


@dataclass(frozen=True)
class Posed:
    """How it went."""

    scene: Path
    placed: Sequence[str]
    """Names of the photographs that have a pose."""
    unplaced: Sequence[str]
    """Names of those that could not be placed."""
    skipped: Mapping[str, str]
    """Names of those that cannot be read, and why."""
    points: int
    """3D points."""
    error: float
    """Mean distance in pixels between where points were seen and where the cameras say."""
    before: bool
    """Whether the scene was there already."""


def pose(config: PoseConfig) -> Posed:
    """Pose photographs; the scene appears at once, when it is complete.

    Raises:
        UserError: a setting that cannot work, no photographs, too few that can be read or placed, SCENE holds something
            else, or pycolmap is missing.
    """
    require_between("image_size", config.image_size, 64, 20_000)
    require_between("features", config.features, 64, 100_000)
    require_between("seed", config.seed, 0, MOST_SEEDS - 1)
    require_between("threads", config.threads, 0, max(os.cpu_count() or 1, MOST_THREADS))
    require_text("scene", config.scene)
    require_place(config.scene, "scene", directory=True)
    sources = find_photographs(config.photographs)
    target = require_own_directory(config.scene, "scene")
    begun = _begun(config, sources)
    work = target.with_name(f".{target.name}.posing")
    work.mkdir(parents=True, exist_ok=True)
    with alone(work):
        work.mkdir(exist_ok=True)  # whoever had it before may have finished
        record = _read(config.scene / RECORD)
        if config.resume and record.get("begun") == begun and (config.scene / "transforms.json").is_file():
            shutil.rmtree(work)
            return _posed(config.scene, record, before=True)
        if importlib.util.find_spec("pycolmap") is None:
            shutil.rmtree(work)
            raise UserError("pycolmap is missing, which finds poses: pip install 'clip-gpt-toolkit[dietnerf]'.")
        return _pose(config, sources, begun, work)


def _begun(config: PoseConfig, sources: Sequence[Path]) -> dict[str, Any]:
    """What must be the same for a scene to be the same."""
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sources}
    shown = {printable(name): stamp for name, stamp in files.items()}
    found = {name: getattr(config, name) for name in ("image_size", "cameras", "features", "seed")}
    return {**found, "max_megapixels": config.limit.max_megapixels, "photographs": shown}


def _read(path: Path) -> dict[str, Any]:
    """A record, or an empty one where there is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if isinstance(record, dict) else {}
    except (OSError, ValueError):
        return {}


def _posed(scene: Path, record: Mapping[str, Any], *, before: bool) -> Posed:
    outcome = {name: record[name] for name in ("placed", "unplaced", "skipped", "points", "error")}
    return Posed(scene, **outcome, before=before)


def _pose(config: PoseConfig, sources: Sequence[Path], begun: Mapping[str, Any], work: Path) -> Posed:
    """`pose`, alone in its working directory."""
    _take_up(work, begun, config.resume)
    started = time.perf_counter()
    if len(sources) > ALL_PAIRS:
        print(
            f"{len(sources)} photographs are many: each is matched with the {NEIGHBOURS} before and after it, by name, "
            f"and with every {STRIDE}th of all.",
            file=sys.stderr,
        )
    with _bars() as tell:
        photographs, skipped = prepare(
            sources,
            work / "images",
            image_size=config.image_size,
            max_pixels=config.limit.max_pixels,
            progress=lambda done, of: tell("photographs", done, of),
        )
        if len(photographs) < LEAST_IMAGES:
            shutil.rmtree(work)
            why = f" ({next(iter(skipped.values())).rstrip('.')})" if skipped else ""
            raise UserError(
                f"folder {str(config.photographs)!r} has {len(photographs)} photographs that can be read{why}: take at "
                f"least {LEAST_IMAGES}, better 20 or more."
            )
        outcome = _structure(config, photographs, work, tell)
    placed = set(outcome["placed"])
    if len(placed) < LEAST_IMAGES:
        shutil.rmtree(work)
        raise UserError(
            f"of {len(photographs)} photographs {len(placed)} could be placed ({outcome['pairs']} pairs of them show "
            f"the same things): walk around the scene in small steps, so that what one shows is in the next ones too, "
            f"and have something with texture in each."
        )
    by_name = {one.name: one.source.name for one in photographs}
    record = {
        "begun": begun,
        "placed": [by_name[one.name] for one in photographs if one.name in placed],
        "unplaced": [by_name[one.name] for one in photographs if one.name not in placed],
        "skipped": {path.name: reason for path, reason in skipped.items()},
        "points": outcome["points"],
        "error": outcome["error"],
        "models": outcome["models"],
        "seconds": round(time.perf_counter() - started, 1),
        "pycolmap": importlib.metadata.version("pycolmap"),
    }
    _write_scene(config.scene, work, sorted(placed), record)
    shutil.rmtree(work, ignore_errors=True)
    return _posed(config.scene, record, before=False)


def _take_up(work: Path, begun: Mapping[str, Any], resume: bool) -> None:
    """Have a working directory hold what an interrupted call of the same photographs and settings left, or nothing."""
    if _read(work / RECORD) != begun or not resume:
        for path in work.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("colmap", "models"):
        shutil.rmtree(work / name, ignore_errors=True)
    (work / "images").mkdir(exist_ok=True)
    clear_leftovers(work / "images")
    write_json(work / RECORD, begun)


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """What shows the progress of each stage, in a bar of its own."""
    bars: dict[str, Any] = {}

    def tell(stage: str, done: int, of: int) -> None:
        if stage not in bars:
            for bar in bars.values():
                bar.close()
            bars[stage] = Progress(total=of, desc=STAGES[stage], disable=not is_first_process())
        bars[stage].update(done - bars[stage].n)

    try:
        yield tell
    finally:
        for bar in bars.values():
            bar.close()


def _structure(
    config: PoseConfig, photographs: Sequence[Photograph], work: Path, tell: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """What `dietnerf.structure` finds, in its process, which sees the same packages and ends with this one.

    Raises:
        UserError: it ended without an outcome.
    """
    cameras: list[Camera] = cameras_of(photographs, config.cameras)
    job = {
        "images": work / "images",
        "database": work / "database.db",
        "model": work / "colmap/sparse/0",
        "cameras": [vars(camera) for camera in cameras],
        "order": [one.name for one in photographs],
        "features": config.features,
        "threads": config.threads or os.cpu_count() or 1,
        "seed": config.seed,
    }
    path, log = write_json(work / "job.json", job), work / "colmap.log"
    home = str(Path(__file__).resolve().parents[1])
    packages = os.pathsep.join((home, *(os.path.abspath(place) for place in sys.path if place)))
    outcome = None
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "dietnerf.structure", str(path.resolve())],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=work,  # Python looks there first, before anything of the user's
            env=os.environ | {"PYTHONPATH": packages},
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if not line.startswith('{"'):  # COLMAP may write something, too
                    continue
                message = json.loads(line)
                outcome = message.get("outcome")
                if "stage" in message:
                    tell(message["stage"], message["done"], message["of"])
        finally:
            if process.poll() is None and outcome is None:
                process.kill()
    if outcome is None or process.returncode:
        last = ([line for line in log.read_text(errors="replace").splitlines() if line.strip()] or [""])[-1]
        raise UserError(
            f"COLMAP ended with exit code {process.returncode} ({last[:200] or 'no message'}; see {str(log)!r}): give "
            f"a smaller --image-size or fewer --threads if memory ran out."
        )
    return dict(outcome)


def _write_scene(scene: Path, work: Path, placed: Sequence[str], record: Mapping[str, Any]) -> None:
    """The scene as a whole: nerfstudio's conversion of COLMAP's model, the photographs that have poses, the record."""
    from nerfstudio.process_data.colmap_utils import colmap_to_json

    with whole_directory(scene, "scene") as place:
        shutil.copytree(work / "colmap", place / "colmap")
        (place / "images").mkdir()
        for name in placed:
            shutil.copyfile(work / "images" / name, place / "images" / name)
        with contextlib.redirect_stdout(open(os.devnull, "w")):  # it lists cameras when there are several
            colmap_to_json(place / "colmap/sparse/0", place)
        write_json(place / RECORD, record)


def has_photographs_only(path: Path) -> bool:
    """Whether a scene's path is a folder of photographs without poses."""
    if not path.is_dir():
        return False
    try:
        find_scene(path)
        return False
    except UserError:
        return any(file.suffix.lower() in image_suffixes() and file.is_file() for file in path.iterdir())


def with_poses(photographs: Path, out: Path, resume: bool, limit: ImageLimit) -> Path:
    """The scene OUT/scene that photographs without poses make, posed now or by a call before.

    Raises:
        UserError: as `pose`; or a resumed run was begun with other photographs.
    """
    config = PoseConfig(photographs, out / "scene", limit=limit)
    record = _read(config.scene / RECORD)
    if resume and record and record.get("begun") != _begun(config, find_photographs(photographs)):
        raise UserError(
            f"{str(config.scene)!r} was posed from other photographs than {str(photographs)!r} has now: give another "
            f"--out, or start over with --no-resume."
        )
    if is_first_process():
        print(f"{photographs} has photographs without poses: dietnerf pose finds them, into {config.scene}.")
    found = pose(config)
    if is_first_process():
        tell_posed(found)
    return config.scene


def tell_posed(found: Posed) -> None:
    """Say how it went, and what to do about photographs that have no pose."""
    for name, reason in found.skipped.items():
        print(f"left out {printable(name)!r}: {printable(reason)}", file=sys.stderr)
    count = len(found.placed) + len(found.unplaced)
    if found.unplaced:
        names = ", ".join(map(printable, found.unplaced[:SHOWN]))
        more = f" and {len(found.unplaced) - SHOWN} more" if len(found.unplaced) > SHOWN else ""
        print(
            f"warning: {len(found.unplaced)} of {count} photographs could not be placed: {names}{more}. Sharper ones "
            f"from there, or more between these and the others, would join them; without them, the scene is complete.",
            file=sys.stderr,
        )
    again = "was posed before" if found.before else "posed"
    print(
        f"{found.scene} {again}: {len(found.placed)} of {count} photographs, {found.points} points, "
        f"{found.error:.2f} pixels off on average"
    )


def run(config: PoseConfig) -> int:
    """`dietnerf pose`: pose photographs and say what comes next."""
    found = pose(config)
    tell_posed(found)
    print(f"next: dietnerf train {config.scene} --out out/mine")
    return 0
