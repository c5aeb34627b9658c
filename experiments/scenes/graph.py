"""Scene graphs: which objects lie where, from where they are seen, and how scenes are drawn at random.

Everything here is plain Python and deterministic: `sample_family(seed, split, index)` gives the same
family on every machine, in any order and in any number of processes.
"""

import dataclasses
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SHAPES = ("cube", "ball", "cylinder", "cone", "ring", "monkey", "star", "stool")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
MATERIALS = ("rubber", "metal", "glowing")
SIZES = ("small", "large")
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "material": MATERIALS,
    "size": SIZES,
}

# Each colour once and each shape once: these pairs occur in no split but `test_unseen`.
HELD_OUT = frozenset(
    {
        ("red", "star"),
        ("orange", "cylinder"),
        ("yellow", "monkey"),
        ("green", "ring"),
        ("cyan", "cone"),
        ("blue", "stool"),
        ("purple", "ball"),
        ("pink", "cube"),
    }
)
SPLITS = ("train", "val", "test", "test_unseen")

RADIUS: Mapping[str, float] = {"small": 0.36, "large": 0.63}  # of the ball around an object
FIELD_OF_VIEW = math.radians(35.0)
VIEWS_PER_SCENE = 2
SCENES_PER_FAMILY = 4

_COUNT_SHARES = (0.35, 0.35, 0.30)  # of scenes with one, two and three objects
_SAME_LOOK_SHARE = 0.12  # of further objects that repeat the colour and shape of an earlier one
_GROUND_SHARE = 0.8
_GAP = 2.02 * RADIUS["large"]  # smallest distance of two objects' centres
_SPREAD = 0.80  # largest distance of three objects from the centre
_MAX_HIDDEN = 0.25  # share of an object that others may hide

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class SceneObject:
    """One object standing on the ground."""

    shape: str
    colour: str
    material: str
    size: str
    x: float
    y: float
    rotation: float
    """Radians around the vertical axis."""

    @property
    def radius(self) -> float:
        """Radius of the ball that the object roughly fills."""
        return RADIUS[self.size]

    @property
    def look(self) -> tuple[str, str]:
        """The pair (colour, shape)."""
        return (self.colour, self.shape)


@dataclass(frozen=True)
class Light:
    """A sun and a uniform sky."""

    azimuth: float
    elevation: float
    strength: float
    sky: float
    """Brightness of the surrounding."""


@dataclass(frozen=True)
class Scene:
    """One to three objects, a ground (its RGB tone) or none, and the light."""

    objects: tuple[SceneObject, ...]
    ground: Vector | None
    light: Light


@dataclass(frozen=True)
class Camera:
    """A camera that looks at `target` from `distance`; angles in radians, z is up."""

    azimuth: float
    elevation: float
    distance: float
    target: Vector

    def axes(self) -> tuple[Vector, Vector, Vector]:
        """The camera's right, up and backward unit vectors in the world."""
        sin_a, cos_a = math.sin(self.azimuth), math.cos(self.azimuth)
        sin_e, cos_e = math.sin(self.elevation), math.cos(self.elevation)
        right = (-sin_a, cos_a, 0.0)
        up = (-sin_e * cos_a, -sin_e * sin_a, cos_e)
        backward = (cos_e * cos_a, cos_e * sin_a, sin_e)
        return right, up, backward

    def pose(self) -> list[list[float]]:
        """Camera-to-world matrix (4 x 4) in the OpenGL and Blender convention: -z looks forward, y is up."""
        right, up, backward = self.axes()
        position = [t + self.distance * b for t, b in zip(self.target, backward, strict=True)]
        rows = [[right[i], up[i], backward[i], position[i]] for i in range(3)]
        return [*rows, [0.0, 0.0, 0.0, 1.0]]

    def see(self, point: Vector) -> tuple[float, float, float]:
        """Where a point appears: tangents to the right and upwards, and its depth."""
        offset = tuple(p - t for p, t in zip(point, self.target, strict=True))
        right, up, backward = (_dot(axis, offset) for axis in self.axes())
        depth = self.distance - backward
        return right / depth, up / depth, depth


@dataclass(frozen=True)
class Family:
    """A base scene and variants that each differ from it in one thing, all seen by the same cameras."""

    index: int
    scenes: tuple[Scene, ...]
    changes: tuple[str, ...]
    """What each scene changes against the first: "none", an attribute's name or "swap"."""
    cameras: tuple[Camera, ...]


def sample_family(seed: int, split: str, index: int) -> Family:
    """Family `index` of a split: the base scene, three variants and two cameras."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: use one of {', '.join(SPLITS)}.")
    rng = random.Random(f"{seed}/{split}/{index}")
    base = _sample_scene(rng, split)
    scenes, changes = [base], ["none"]
    kinds = [*ATTRIBUTES] + (["swap"] if len(base.objects) > 1 else [])
    queue = rng.sample(kinds, len(kinds))
    while len(scenes) < SCENES_PER_FAMILY:
        kind = queue.pop(0) if queue else rng.choice(kinds)
        variant = _vary(base, kind, rng)
        if variant is not None and variant not in scenes and belongs(variant, split):
            scenes.append(variant)
            changes.append(kind)
    cameras = tuple(_sample_camera(rng, scenes) for _ in range(VIEWS_PER_SCENE))
    return Family(index, tuple(scenes), tuple(changes), cameras)


def belongs(scene: Scene, split: str) -> bool:
    """Whether a scene may be in a split: held-out looks are in `test_unseen`, and only there."""
    return has_held_out(scene) == (split == "test_unseen")


def has_held_out(scene: Scene) -> bool:
    """Whether any object has a colour and shape that training never shows together."""
    return any(thing.look in HELD_OUT for thing in scene.objects)


def replace_object(scene: Scene, index: int, **changes: Any) -> Scene:
    """The scene with some attributes of one object changed."""
    objects = list(scene.objects)
    objects[index] = dataclasses.replace(objects[index], **changes)
    return dataclasses.replace(scene, objects=tuple(objects))


def change_attribute(scene: Scene, attribute: str, rng: random.Random) -> Scene:
    """The scene with another value of one attribute ("shape", "colour", "material", "size") of one object."""
    index = rng.randrange(len(scene.objects))
    present = getattr(scene.objects[index], attribute)
    value = rng.choice([v for v in ATTRIBUTES[attribute] if v != present])
    return replace_object(scene, index, **{attribute: value})


def swap_objects(scene: Scene, first: int, second: int) -> Scene:
    """The scene with two objects in each other's place."""
    a, b = scene.objects[first], scene.objects[second]
    swapped = replace_object(scene, first, x=b.x, y=b.y)
    return replace_object(swapped, second, x=a.x, y=a.y)


def hidden_shares(scene: Scene, camera: Camera) -> list[float]:
    """For each object, the share of its disc in the image that nearer objects' discs cover (roughly)."""
    discs = []
    for thing in scene.objects:
        u, v, depth = camera.see((thing.x, thing.y, 0.9 * thing.radius))
        discs.append((u, v, 0.9 * thing.radius / depth, depth))
    shares = []
    for u, v, r, depth in discs:
        nearer = [d for d in discs if d[3] < depth]
        covered = sum(_lens(math.hypot(u - u2, v - v2), r, r2) for u2, v2, r2, _ in nearer)
        shares.append(min(1.0, covered / (math.pi * r * r)))
    return shares


def scene_from_json(data: Mapping[str, Any]) -> Scene:
    """The scene whose `dataclasses.asdict` was written as JSON."""
    ground = data["ground"]
    return Scene(
        tuple(SceneObject(**thing) for thing in data["objects"]),
        None if ground is None else (ground[0], ground[1], ground[2]),
        Light(**data["light"]),
    )


def camera_from_json(data: Mapping[str, Any]) -> Camera:
    """The camera whose `dataclasses.asdict` was written as JSON."""
    x, y, z = data["target"]
    return Camera(data["azimuth"], data["elevation"], data["distance"], (x, y, z))


def _sample_scene(rng: random.Random, split: str) -> Scene:
    count = rng.choices((1, 2, 3), _COUNT_SHARES)[0]
    while True:
        looks: list[tuple[str, str]] = []
        for _ in range(count):
            if looks and rng.random() < _SAME_LOOK_SHARE:
                looks.append(rng.choice(looks))
            else:
                looks.append((rng.choice(COLOURS), rng.choice(SHAPES)))
        if split == "test_unseen" and not HELD_OUT.intersection(looks):
            looks[rng.randrange(count)] = rng.choice(sorted(HELD_OUT))
        held_out = HELD_OUT.intersection(looks)
        if bool(held_out) == (split == "test_unseen"):
            break
    objects = tuple(
        SceneObject(
            shape,
            colour,
            rng.choice(MATERIALS),
            rng.choice(SIZES),
            x,
            y,
            rng.uniform(0.0, 2.0 * math.pi),
        )
        for (colour, shape), (x, y) in zip(looks, _sample_positions(rng, count), strict=True)
    )
    ground = _sample_ground(rng) if rng.random() < _GROUND_SHARE else None
    light = Light(
        azimuth=rng.uniform(0.0, 2.0 * math.pi),
        elevation=math.radians(rng.uniform(35.0, 75.0)),
        strength=rng.uniform(2.0, 3.6),
        sky=rng.uniform(0.45, 0.85),
    )
    return Scene(objects, ground, light)


def _sample_ground(rng: random.Random) -> Vector:
    tone = rng.uniform(0.12, 0.6)
    red, green, blue = (tone * rng.uniform(0.85, 1.15) for _ in range(3))
    return (red, green, blue)


def _sample_positions(rng: random.Random, count: int) -> list[tuple[float, float]]:
    if count == 1:
        return [(0.0, 0.0)]
    if count == 2:
        angle, half = rng.uniform(0.0, 2.0 * math.pi), 0.5 * rng.uniform(_GAP, 1.15 * _GAP)
        x, y = half * math.cos(angle), half * math.sin(angle)
        return [(x, y), (-x, -y)]
    while True:
        points = [(rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)) for _ in range(count)]
        if any(math.dist(a, b) < _GAP for i, a in enumerate(points) for b in points[:i]):
            continue
        middle_x, middle_y = (sum(axis) / count for axis in zip(*points, strict=True))
        points = [(x - middle_x, y - middle_y) for x, y in points]
        if max(math.hypot(*point) for point in points) <= _SPREAD:
            return points


def _sample_camera(rng: random.Random, scenes: list[Scene]) -> Camera:
    """A camera from which no scene's objects hide one another much."""
    objects = scenes[0].objects
    if len(objects) == 1:
        extent = 1.2 * RADIUS["large"]
    else:
        extent = max(math.hypot(thing.x, thing.y) for thing in objects) + 0.85 * RADIUS["large"]
    while True:
        camera = Camera(
            azimuth=rng.uniform(0.0, 2.0 * math.pi),
            elevation=math.asin(rng.uniform(math.sin(math.radians(10)), math.sin(math.radians(70)))),
            distance=extent / math.sin(0.5 * FIELD_OF_VIEW) * rng.uniform(0.95, 1.05),
            target=(
                rng.uniform(-0.06, 0.06) * extent,
                rng.uniform(-0.06, 0.06) * extent,
                0.85 * RADIUS["large"] + rng.uniform(-0.06, 0.06) * extent,
            ),
        )
        if all(max(hidden_shares(scene, camera)) <= _MAX_HIDDEN for scene in scenes):
            return camera


def _vary(scene: Scene, kind: str, rng: random.Random) -> Scene | None:
    if kind != "swap":
        return change_attribute(scene, kind, rng)
    first, second = rng.sample(range(len(scene.objects)), 2)
    a, b = scene.objects[first], scene.objects[second]
    if (a.look, a.material, a.size) == (b.look, b.material, b.size):
        return None
    return swap_objects(scene, first, second)


def _dot(a: Vector, b: tuple[float, ...]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _lens(distance: float, a: float, b: float) -> float:
    """Area that two discs of radius a and b share."""
    if distance >= a + b:
        return 0.0
    if distance <= abs(a - b):
        return math.pi * min(a, b) ** 2
    alpha = math.acos((distance**2 + a**2 - b**2) / (2 * distance * a))
    beta = math.acos((distance**2 + b**2 - a**2) / (2 * distance * b))
    return a * a * (alpha - math.sin(2 * alpha) / 2) + b * b * (beta - math.sin(2 * beta) / 2)
