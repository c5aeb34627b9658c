"""One record an image: which scene it shows, from where, and what can be said about it."""

import dataclasses
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.scenes.captions import caption, view_captions
from experiments.scenes.graph import Camera, Scene, camera_from_json, sample_family, scene_from_json


@dataclass(frozen=True)
class ViewRecord:
    """One view of one scene of one family."""

    split: str
    family: int
    scene_index: int
    """0 is the family's base; 1 to 3 differ from it in one thing."""
    change: str
    """What differs from the base: "none", "shape", "colour", "material", "size" or "swap"."""
    view: int
    scene: Scene
    camera: Camera
    captions: tuple[str, ...]
    full_caption: str
    """A caption that mentions everything."""


def family_records(seed: int, split: str, family: int) -> list[ViewRecord]:
    """The views of a family, scene by scene: each scene's views follow one another."""
    sampled = sample_family(seed, split, family)
    records = []
    for number, (scene, change) in enumerate(zip(sampled.scenes, sampled.changes, strict=True)):
        for view, camera in enumerate(sampled.cameras):
            rng = random.Random(f"{seed}/{split}/{family}/{number}/{view}")
            captions = tuple(view_captions(scene, camera, rng))
            full = caption(scene, camera, rng, detail="full")
            records.append(ViewRecord(split, family, number, change, view, scene, camera, captions, full))
    return records


def record_to_json(record: ViewRecord) -> dict[str, Any]:
    """A record as plain values for JSON."""
    return dataclasses.asdict(record)


def record_from_json(data: Mapping[str, Any]) -> ViewRecord:
    """The inverse of `record_to_json`."""
    parsed = {
        "scene": scene_from_json(data["scene"]),
        "camera": camera_from_json(data["camera"]),
        "captions": tuple(data["captions"]),
    }
    return ViewRecord(**{**data, **parsed})
