"""Writes the packaged photographs without poses: a walk around a table in a room where everything has texture."""

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import bpy
from mathutils import Matrix
from PIL import ExifTags, Image

from experiments.scenes.blender import MESHES, add_world, configure, configure_cycles, principled
from experiments.scenes.graph import Camera

VIEWS = 20
SIZE = (480, 360)
QUALITY = 85
FILM_FOCAL = 26
"""mm: a telephone's, in 35 mm film."""
FOCAL = FILM_FOCAL * math.hypot(*SIZE) / math.hypot(36, 24)
"""The same in pixels."""
TRUTH = "true_cameras.json"
Tone = tuple[float, float, float]
Point = tuple[float, float, float]


def write_walk(directory: Path, *, samples: int = 8) -> None:
    """`VIEWS` JPEG photographs with a telephone's EXIF tags, and where they were truly taken in `TRUTH`."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.jpg"):
        old.unlink()
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene, place = bpy.context.scene, Path(tempfile.mkdtemp(prefix="room-"))
    configure(scene.render, SIZE[0], place / "image.png")
    scene.render.resolution_y = SIZE[1]
    scene.view_settings.view_transform = "Standard"
    configure_cycles(scene.cycles, samples, denoise=True)
    scene.cycles.diffuse_bounces = scene.cycles.max_bounces = 3
    furnish()
    camera = _add("camera", bpy.data.cameras.new("camera"))
    camera.data.sensor_fit, camera.data.angle = "HORIZONTAL", 2 * math.atan(SIZE[0] / 2 / FOCAL)
    camera.data.clip_start = 0.01
    scene.camera = camera
    frames = []
    for number, pose in enumerate(walk()):
        camera.matrix_world = Matrix(pose)
        bpy.ops.render.render(write_still=True)
        name = f"walk_{number + 1}.jpg"
        with Image.open(place / "image.png") as image:
            image.convert("RGB").save(directory / name, quality=QUALITY, exif=_exif())
        frames.append({"file_path": name, "transform_matrix": pose})
    shutil.rmtree(place)
    width, height = SIZE
    lens = {"fl_x": FOCAL, "fl_y": FOCAL, "cx": width / 2, "cy": height / 2, "w": width, "h": height}
    (directory / TRUTH).write_text(json.dumps({**lens, "frames": frames}, indent=1) + "\n", encoding="utf-8")


def walk() -> list[list[list[float]]]:
    """Camera-to-world poses on a circle around the table, at the height of a hand that goes up and down."""
    found = []
    for i in range(VIEWS):
        turn = 2 * math.pi * i / VIEWS
        height, radius = 0.62 + 0.28 * math.sin(3 * turn + 0.7), 1.75 + 0.2 * math.cos(2 * turn)
        target = (0.12 * math.cos(5 * turn), 0.12 * math.sin(4 * turn), 0.62)
        pose = Camera(turn, math.atan2(height, radius), math.hypot(radius, height), target).pose()
        found.append([[float(value) for value in row] for row in pose])
    return found


def _exif() -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Make], tags[ExifTags.Base.Model] = "Blender", "Cycles"
    tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = FILM_FOCAL
    return tags


def furnish() -> None:
    """Floor, walls, a table with things on it, and boxes by the walls."""
    sun = _add("sun", bpy.data.lights.new("sun", "SUN"))
    sun.matrix_world = Matrix(Camera(math.radians(-40), math.radians(62), 1.0, (0.0, 0.0, 0.0)).pose())
    sun.data.angle, sun.data.energy = math.radians(20), 2.2
    add_world(bpy.context.scene).default_value = 0.75
    half, high = 3.0, 2.6
    floor = [(-half, -half, 0), (half, -half, 0), (half, half, 0), (-half, half, 0)]
    _plane("floor", floor, bricks(2.6, (0.50, 0.33, 0.20), (0.22, 0.12, 0.07), (0.05, 0.04, 0.03)))
    tones: list[tuple[Tone, Tone, Tone]] = [
        ((0.75, 0.62, 0.40), (0.18, 0.30, 0.42), (0.80, 0.78, 0.72)),
        ((0.40, 0.12, 0.10), (0.78, 0.60, 0.45), (0.12, 0.10, 0.14)),
        ((0.14, 0.30, 0.16), (0.66, 0.70, 0.40), (0.85, 0.82, 0.70)),
        ((0.25, 0.25, 0.50), (0.80, 0.72, 0.66), (0.45, 0.20, 0.30)),
    ]
    for side, colours in enumerate(tones):
        first, second = floor[side], floor[(side + 1) % 4]
        corners = [first, second, (*second[:2], high), (*first[:2], high)]
        _plane(f"wall{side}", corners, patches(2.2 + 0.5 * side, colours, offset=7.0 * side))
    _thing(
        "cylinder", (0, 0, 0), (0.72, 0.72, 0.24), 0, patches(5, ((0.6, 0.45, 0.3), (0.3, 0.18, 0.1), (0.7, 0.6, 0.5)))
    )
    top = 0.42
    _thing(
        "monkey",
        (-0.16, 0.14, top),
        (0.24, 0.24, 0.24),
        35,
        patches(9, ((0.8, 0.3, 0.08), (0.3, 0.08, 0.04), (0.9, 0.7, 0.4))),
    )
    _thing(
        "cube",
        (0.24, 0.16, top),
        (0.17, 0.17, 0.17),
        20,
        bricks(9, (0.08, 0.2, 0.6), (0.7, 0.7, 0.75), (0.02, 0.03, 0.1)),
    )
    _thing(
        "ball",
        (0.10, -0.26, top),
        (0.15, 0.15, 0.15),
        0,
        patches(11, ((0.1, 0.45, 0.12), (0.75, 0.75, 0.15), (0.05, 0.15, 0.1))),
    )
    _thing(
        "cone",
        (-0.30, -0.20, top),
        (0.14, 0.14, 0.2),
        0,
        bricks(12, (0.1, 0.5, 0.55), (0.7, 0.15, 0.25), (0.9, 0.9, 0.85)),
    )
    _thing(
        "star",
        (0.42, -0.12, top),
        (0.11, 0.11, 0.11),
        10,
        patches(14, ((0.85, 0.65, 0.05), (0.5, 0.1, 0.4), (0.95, 0.9, 0.7))),
    )
    boxes = [
        (2.3, 1.6, 0.5, 15),
        (-2.2, 1.9, 0.65, 40),
        (-2.0, -2.2, 0.4, 70),
        (1.9, -2.3, 0.6, 25),
        (0.2, 2.5, 0.35, 5),
    ]
    for i, (x, y, size, turn) in enumerate(boxes):
        a, b, c = tones[(i + 1) % 4]
        material = patches(6, (b, c, a), offset=3.0 * i) if i % 2 else bricks(5, a, c, b)
        _thing("cube", (x, y, 0), (size, size, size * 0.9), turn, material)


def patches(scale: float, tones: Sequence[Tone], *, offset: float = 0.0) -> "bpy.types.Material":
    """Irregular cells in three tones, with finer cells in light and dark: corners everywhere, none like another."""
    material = bpy.data.materials.new("patches")
    shader, tree = principled(material), material.node_tree
    where = _coordinates(tree, offset)
    coarse, fine = (_voronoi(tree, where, factor * scale) for factor in (1.0, 4.0))
    ramp = tree.nodes.new("ShaderNodeValToRGB")
    ramp.color_ramp.interpolation = "CONSTANT"
    ramp.color_ramp.elements.new(0.66)
    for element, position, tone in zip(ramp.color_ramp.elements, (0.0, 0.36, 0.66), tones, strict=True):
        element.position, element.color = position, (*tone, 1.0)
    tree.links.new(coarse, ramp.inputs[0])
    _shade(tree, shader, ramp.outputs[0], fine)
    return material


def bricks(scale: float, first: Tone, second: Tone, mortar: Tone) -> "bpy.types.Material":
    """Bricks whose tones vary between two, with finer cells in light and dark."""
    material = bpy.data.materials.new("bricks")
    shader, tree = principled(material), material.node_tree
    where = _coordinates(tree, 0.0)
    brick = tree.nodes.new("ShaderNodeTexBrick")
    for name, tone in (("Color1", first), ("Color2", second), ("Mortar", mortar)):
        brick.inputs[name].default_value = (*tone, 1.0)
    brick.inputs["Scale"].default_value = scale
    tree.links.new(where, brick.inputs["Vector"])
    _shade(tree, shader, brick.outputs["Color"], _voronoi(tree, where, 3.0 * scale))
    return material


def _coordinates(tree: "bpy.types.NodeTree", offset: float) -> "bpy.types.NodeSocket":
    """Places in the room's units, moved so that no two surfaces look alike."""
    geometry, moved = tree.nodes.new("ShaderNodeNewGeometry"), tree.nodes.new("ShaderNodeMapping")
    moved.inputs["Location"].default_value = (offset, 2 * offset, 0.37)
    moved.inputs["Rotation"].default_value = (0.3, 0.2, 0.5) if offset else (0.0, 0.0, 0.2)
    tree.links.new(geometry.outputs["Position"], moved.inputs["Vector"])
    return moved.outputs[0]


def _voronoi(tree: "bpy.types.NodeTree", where: "bpy.types.NodeSocket", scale: float) -> "bpy.types.NodeSocket":
    """A number in [0, 1] for each cell."""
    cells, red = tree.nodes.new("ShaderNodeTexVoronoi"), tree.nodes.new("ShaderNodeSeparateColor")
    cells.inputs["Scale"].default_value = scale
    tree.links.new(where, cells.inputs["Vector"])
    tree.links.new(cells.outputs["Color"], red.inputs[0])
    return red.outputs[0]


def _shade(
    tree: "bpy.types.NodeTree",
    shader: "bpy.types.Node",
    colour: "bpy.types.NodeSocket",
    lightness: "bpy.types.NodeSocket",
) -> None:
    """The colour times 0.55 to 1.25, as the lightness says."""
    spread, product = tree.nodes.new("ShaderNodeMapRange"), tree.nodes.new("ShaderNodeVectorMath")
    spread.inputs["To Min"].default_value, spread.inputs["To Max"].default_value = 0.55, 1.25
    product.operation = "MULTIPLY"
    tree.links.new(lightness, spread.inputs["Value"])
    tree.links.new(colour, product.inputs[0])
    tree.links.new(spread.outputs[0], product.inputs[1])
    tree.links.new(product.outputs[0], shader.inputs["Base Color"])
    shader.inputs["Roughness"].default_value, shader.inputs["Specular IOR Level"].default_value = 0.9, 0.05


def _thing(shape: str, location: Point, scale: Point, degrees: float, material: "bpy.types.Material") -> None:
    added = _add(shape, MESHES[shape]())
    added.data.materials[0] = material
    added.location, added.scale, added.rotation_euler = location, scale, (0.0, 0.0, math.radians(degrees))


def _plane(name: str, corners: Sequence[Point], material: "bpy.types.Material") -> None:
    mesh = bpy.data.meshes.new(name)
    mesh.from_pydata(corners, [], [(0, 1, 2, 3)])
    mesh.materials.append(material)
    _add(name, mesh)


def _add(name: str, data: "bpy.types.ID") -> "bpy.types.Object":
    added = bpy.data.objects.new(name, data)
    bpy.context.scene.collection.objects.link(added)
    return added
