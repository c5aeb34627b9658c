"""Renders scenes with Blender's Cycles on the CPU; needs the `bpy` module.

One `Renderer` builds meshes and materials once and only moves, swaps and relights them between images.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bpy
import numpy as np
from mathutils import Matrix, Vector
from PIL import Image

from experiments.scenes.graph import FIELD_OF_VIEW, MATERIALS, SHAPES, Camera, Light, Scene, SceneObject

# Linear RGB, saturated and far apart in hue or lightness.
_TONES = {
    "red": (0.62, 0.012, 0.012),
    "orange": (0.95, 0.22, 0.008),
    "yellow": (0.90, 0.70, 0.02),
    "green": (0.02, 0.33, 0.03),
    "cyan": (0.04, 0.62, 0.70),
    "blue": (0.012, 0.05, 0.62),
    "purple": (0.20, 0.02, 0.40),
    "pink": (0.92, 0.26, 0.50),
    "grey": (0.34, 0.34, 0.36),  # for plinths; no object of a scene is grey
}


@dataclass(frozen=True)
class Placement:
    """One mesh in the world. Meshes stand on z = 0 and are about two units high at scale 1."""

    shape: str
    material: str
    colour: str
    location: tuple[float, float, float]
    rotation: tuple[float, float, float]
    """Euler angles x, y, z in radians."""
    scale: tuple[float, float, float]


class Renderer:
    """Renders square images of scenes, one thread each.

    `resolution` is in pixels, `samples` counts light paths a pixel, `slots` is the largest number of objects in a
    scene, `field_of_view` is in radians.
    """

    def __init__(
        self,
        resolution: int = 96,
        samples: int = 8,
        *,
        denoise: bool = False,
        slots: int = 3,
        field_of_view: float = FIELD_OF_VIEW,
    ) -> None:
        bpy.ops.wm.read_factory_settings(use_empty=True)
        self._scene = bpy.context.scene
        self._directory = tempfile.TemporaryDirectory(prefix="scenes-")
        self._file = Path(self._directory.name) / "image.png"
        configure(self._scene.render, resolution, self._file)
        self._scene.view_settings.view_transform = "Standard"
        configure_cycles(self._scene.cycles, samples, denoise=denoise)
        self._meshes = {shape: MESHES[shape]() for shape in SHAPES}
        self._materials = {(m, c): _material(m, _TONES[c]) for m in MATERIALS for c in _TONES}
        self._slots = [self._add(f"slot{i}", self._meshes["cube"]) for i in range(slots)]
        for slot in self._slots:
            slot.material_slots[0].link = "OBJECT"
        self._ground, self._ground_tone = self._add_ground()
        self._camera = self._add("camera", bpy.data.cameras.new("camera"))
        self._camera.data.angle = field_of_view
        self._scene.camera = self._camera
        self._sun = self._add("sun", bpy.data.lights.new("sun", "SUN"))
        self._sun.data.angle = math.radians(12)
        self._sky = add_world(self._scene)

    def render(self, scene: Scene, camera: Camera) -> np.ndarray:
        """The scene as seen by the camera, (height, width, 3) uint8; without a ground on white."""
        self.arrange([_placement(thing) for thing in scene.objects], scene.ground, scene.light)
        rgba = self.render_pose(camera.pose())
        if scene.ground is not None:
            return rgba[..., :3].copy()
        alpha = rgba[..., 3:].astype(np.float32) / 255.0
        return (rgba[..., :3] * alpha + 255.0 * (1.0 - alpha) + 0.5).astype(np.uint8)

    def render_pose(self, pose: Sequence[Sequence[float]]) -> np.ndarray:
        """The present arrangement from a camera-to-world pose, (height, width, 4) uint8 RGBA."""
        self._camera.matrix_world = Matrix(pose)
        bpy.ops.render.render(write_still=True)
        with Image.open(self._file) as image:
            return np.asarray(image.convert("RGBA"))

    def arrange(self, placements: Sequence[Placement], ground: tuple[float, float, float] | None, light: Light) -> None:
        """Put meshes, ground (its RGB tone; None is transparent) and light in place."""
        if len(placements) > len(self._slots):
            raise ValueError(f"scene has {len(placements)} objects: the renderer has {len(self._slots)} slots.")
        for i, slot in enumerate(self._slots):
            slot.hide_render = i >= len(placements)
            if not slot.hide_render:
                self._place(slot, placements[i])
        self._ground.hide_render = ground is None
        self._scene.render.film_transparent = ground is None
        if ground is not None:
            self._ground_tone.default_value = (*ground, 1.0)
        toward = Camera(light.azimuth, light.elevation, 1.0, (0.0, 0.0, 0.0))
        self._sun.matrix_world = Matrix(toward.pose())
        self._sun.data.energy = light.strength
        self._sky.default_value = light.sky

    def _place(self, slot: "bpy.types.Object", placement: Placement) -> None:
        slot.data = self._meshes[placement.shape]
        slot.material_slots[0].link = "OBJECT"
        slot.material_slots[0].material = self._materials[placement.material, placement.colour]
        slot.location, slot.rotation_euler, slot.scale = placement.location, placement.rotation, placement.scale

    def _add(self, name: str, data: "bpy.types.ID") -> "bpy.types.Object":
        added = bpy.data.objects.new(name, data)
        self._scene.collection.objects.link(added)
        return added

    def _add_ground(self) -> tuple["bpy.types.Object", "bpy.types.NodeSocket"]:
        mesh = bpy.data.meshes.new("ground")
        mesh.from_pydata([(-60, -60, 0), (60, -60, 0), (60, 60, 0), (-60, 60, 0)], [], [(0, 1, 2, 3)])
        material = bpy.data.materials.new("ground")
        shader = principled(material)
        shader.inputs["Roughness"].default_value = 0.9
        mesh.materials.append(material)
        return self._add("ground", mesh), shader.inputs["Base Color"]


def _placement(thing: SceneObject) -> Placement:
    return Placement(
        thing.shape,
        thing.material,
        thing.colour,
        (thing.x, thing.y, 0.0),
        (0.0, 0.0, thing.rotation),
        (thing.radius,) * 3,
    )


def configure(render: "bpy.types.RenderSettings", resolution: int, file: Path) -> None:
    render.engine = "CYCLES"
    render.resolution_x = render.resolution_y = resolution
    render.resolution_percentage = 100
    render.threads_mode, render.threads = "FIXED", 1
    render.use_persistent_data = False  # measured: keeping the data costs 0.7 s an image, rebuilding it 0.03 s
    render.use_compositing = render.use_sequencer = False
    render.image_settings.file_format = "PNG"
    render.image_settings.color_mode = "RGBA"
    render.image_settings.compression = 0
    render.filepath = str(file)


def configure_cycles(cycles: "bpy.types.CyclesRenderSettings", samples: int, *, denoise: bool) -> None:
    cycles.device = "CPU"
    cycles.samples = samples
    cycles.use_adaptive_sampling = False
    cycles.use_denoising = denoise
    cycles.max_bounces = 2
    cycles.diffuse_bounces, cycles.glossy_bounces = 1, 2
    cycles.transmission_bounces = cycles.volume_bounces = 0
    cycles.caustics_reflective = cycles.caustics_refractive = False
    cycles.sample_clamp_indirect = 3.0
    cycles.use_light_tree = False


def principled(material: "bpy.types.Material") -> "bpy.types.Node":
    if material.node_tree is None:
        material.use_nodes = True
    tree = material.node_tree
    tree.nodes.clear()
    shader = tree.nodes.new("ShaderNodeBsdfPrincipled")
    output = tree.nodes.new("ShaderNodeOutputMaterial")
    tree.links.new(shader.outputs[0], output.inputs[0])
    return shader


def _material(kind: str, tone: tuple[float, float, float]) -> "bpy.types.Material":
    material = bpy.data.materials.new(kind)
    shader = principled(material)
    inputs = shader.inputs
    inputs["Base Color"].default_value = (*tone, 1.0)
    inputs["Roughness"].default_value = 0.9
    inputs["Specular IOR Level"].default_value = 0.05
    if kind == "metal":
        inputs["Metallic"].default_value = 1.0
        inputs["Roughness"].default_value = 0.16
    elif kind == "glowing":
        _glow(material.node_tree, inputs, tone)
    material.diffuse_color = (*tone, 1.0)
    return material


def _glow(tree: "bpy.types.NodeTree", inputs: "bpy.types.NodeInputs", tone: tuple[float, float, float]) -> None:
    """Emission that fades towards a darker rim, so that the form stays readable."""
    facing = tree.nodes.new("ShaderNodeLayerWeight")
    facing.inputs["Blend"].default_value = 0.35
    ramp = tree.nodes.new("ShaderNodeMapRange")
    ramp.inputs["To Min"].default_value = 1.25
    ramp.inputs["To Max"].default_value = 0.3
    tree.links.new(facing.outputs["Facing"], ramp.inputs["Value"])
    tree.links.new(ramp.outputs[0], inputs["Emission Strength"])
    inputs["Emission Color"].default_value = (*(0.95 * t + 0.05 for t in tone), 1.0)


def add_world(scene: "bpy.types.Scene") -> "bpy.types.NodeSocket":
    """A sky that is bright above and dim below, which metal mirrors; returns its strength."""
    world = bpy.data.worlds.new("world")
    scene.world = world
    world.cycles.sampling_method = "NONE"  # no importance map, which takes longer than the image
    if world.node_tree is None:
        world.use_nodes = True
    tree = world.node_tree
    tree.nodes.clear()
    where = tree.nodes.new("ShaderNodeTexCoord")
    split = tree.nodes.new("ShaderNodeSeparateXYZ")
    ramp = tree.nodes.new("ShaderNodeValToRGB")
    ramp.color_ramp.elements[0].position, ramp.color_ramp.elements[0].color = 0.0, (0.75, 0.75, 0.75, 1)
    ramp.color_ramp.elements[1].position, ramp.color_ramp.elements[1].color = 0.9, (1.0, 1.0, 1.0, 1)
    background = tree.nodes.new("ShaderNodeBackground")
    output = tree.nodes.new("ShaderNodeOutputWorld")
    tree.links.new(where.outputs["Generated"], split.inputs[0])
    tree.links.new(split.outputs["Z"], ramp.inputs[0])
    tree.links.new(ramp.outputs[0], background.inputs["Color"])
    tree.links.new(background.outputs[0], output.inputs[0])
    return background.inputs["Strength"]


def _take_mesh(name: str, *, smooth: bool) -> "bpy.types.Mesh":
    """The mesh that an operator just added, freed of its object."""
    made = bpy.context.object
    for modifier in list(made.modifiers):
        bpy.ops.object.modifier_apply(modifier=modifier.name)
    mesh = made.data
    mesh.transform(made.matrix_world)
    bpy.data.objects.remove(made)
    return _finish(mesh, name, smooth=smooth)


def _finish(mesh: "bpy.types.Mesh", name: str, *, smooth: bool) -> "bpy.types.Mesh":
    """Stand the mesh on z = 0, centred, with one material slot."""
    corners = np.array([vertex.co for vertex in mesh.vertices])
    low, high = corners.min(0), corners.max(0)
    centre = (low + high) / 2
    mesh.transform(Matrix.Translation((-centre[0], -centre[1], -low[2])))
    mesh.shade_smooth() if smooth else mesh.shade_flat()
    mesh.materials.clear()
    mesh.materials.append(None)
    mesh.name = name
    return mesh


def _bevel(width: float) -> None:
    modifier = bpy.context.object.modifiers.new("bevel", "BEVEL")
    modifier.width, modifier.segments = width, 2


def _cube() -> "bpy.types.Mesh":
    bpy.ops.mesh.primitive_cube_add(size=1.45)
    _bevel(0.04)
    return _take_mesh("cube", smooth=False)


def _ball() -> "bpy.types.Mesh":
    bpy.ops.mesh.primitive_uv_sphere_add(radius=0.98, segments=48, ring_count=24)
    return _take_mesh("ball", smooth=True)


def _cylinder() -> "bpy.types.Mesh":
    bpy.ops.mesh.primitive_cylinder_add(radius=0.72, depth=1.75, vertices=48)
    _bevel(0.03)
    return _take_mesh("cylinder", smooth=False)


def _cone() -> "bpy.types.Mesh":
    bpy.ops.mesh.primitive_cone_add(radius1=0.95, depth=1.95, vertices=48)
    return _take_mesh("cone", smooth=False)


def _ring() -> "bpy.types.Mesh":
    bpy.ops.mesh.primitive_torus_add(major_radius=0.75, minor_radius=0.27, major_segments=48, minor_segments=16)
    return _take_mesh("ring", smooth=True)


def _monkey() -> "bpy.types.Mesh":
    bpy.ops.mesh.primitive_monkey_add(size=2.0)
    made = bpy.context.object
    made.scale = (0.86, 0.86, 0.86)
    bpy.context.view_layer.update()
    modifier = made.modifiers.new("smooth", "SUBSURF")
    modifier.levels = modifier.render_levels = 1
    return _take_mesh("monkey", smooth=True)


def _star() -> "bpy.types.Mesh":
    """The small stellated dodecahedron: twelve spikes, a five-pointed star from every side."""
    bpy.ops.mesh.primitive_ico_sphere_add(subdivisions=1, radius=1.1)
    core = _take_mesh("core", smooth=False)
    points = [vertex.co.copy() for vertex in core.vertices]
    middle = sum(points, Vector()) / len(points)
    points = [point - middle for point in points]
    valleys: list[Vector] = []
    around: dict[tuple[int, int], list[int]] = {}
    for face in core.polygons:
        centre = sum((points[i] for i in face.vertices), Vector()) / 3
        valleys.append(centre.normalized() * 0.52 * 1.1)
        for edge in face.edge_keys:
            around.setdefault(edge, []).append(len(points) + face.index)
    faces = [(tip, first, second) for edge, (first, second) in around.items() for tip in edge]
    bpy.data.meshes.remove(core)
    mesh = bpy.data.meshes.new("star")
    mesh.from_pydata([*points, *valleys], [], faces)
    return _finish(mesh, "star", smooth=False)


def _stool() -> "bpy.types.Mesh":
    """A round seat on four splayed legs."""
    bpy.ops.mesh.primitive_cylinder_add(radius=0.82, depth=0.3, vertices=48, location=(0, 0, 1.5))
    seat = bpy.context.object
    for i in range(4):
        angle = math.pi * (0.25 + 0.5 * i)
        direction = (math.cos(angle), math.sin(angle))
        bpy.ops.mesh.primitive_cylinder_add(radius=0.13, depth=1.5, vertices=16)
        leg = bpy.context.object
        leg.location = (0.58 * direction[0], 0.58 * direction[1], 0.72)
        leg.rotation_euler = (0.2 * direction[1], -0.2 * direction[0], 0.0)
        leg.select_set(True)
        seat.select_set(True)
        bpy.context.view_layer.objects.active = seat
        bpy.context.view_layer.update()
        bpy.ops.object.join()
    return _take_mesh("stool", smooth=False)


MESHES = {
    "cube": _cube,
    "ball": _ball,
    "cylinder": _cylinder,
    "cone": _cone,
    "ring": _ring,
    "monkey": _monkey,
    "star": _star,
    "stool": _stool,
}
