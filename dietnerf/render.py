"""Render a path through a trained scene, depth beside colour, as a GIF, a video or pictures."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from PIL import Image
from torch import Tensor

from common.checks import UserError, require_at_least, require_place
from common.files import whole_file
from common.progress import Progress
from common.runtime import require_memory
from dietnerf.poses import estimate_ranges, interpolate_poses, orbit_path
from dietnerf.scene import Rendering, Scene


@dataclass(frozen=True)
class RenderConfig:
    """Render a path through a trained scene."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of a run of dietnerf train or ns-train."""
    path: Literal["orbit", "interpolate", "test"] = "orbit"
    """Once around the scene, from training view to training view, or the held-out views by their own cameras."""
    format: Literal["gif", "mp4", "png"] = "gif"
    """An animation, a video, or one picture for each frame."""
    out: Path | None = None
    """File (gif, mp4) or directory (png); beside the run when not given."""
    frames: int = 60
    """Frames of orbit and interpolate."""
    fps: int = 20
    """Frames a second."""
    size: int = 0
    """Width of the picture in pixels; 0 is the training images', of test the held-out ones'."""
    elevation: float | None = None
    """Degrees above the horizon of an orbit; left out, the middle of the training cameras'."""
    depth: bool = True
    """Show depth beside colour; --no-depth leaves it out."""
    chunk: int = 0
    """Rays at once; 0 is the run's own number. Less needs less memory."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    data: Path | None = None
    """Where the scene's images lie now, when they have moved since training."""


def path_poses(scene: Scene, kind: str, frames: int, elevation: float | None = None) -> Float[Tensor, "n 3 4"]:
    """Camera-to-world poses of an orbit or an interpolated path of this scene."""
    require_at_least("frames", frames, 1)
    cameras = scene.training_views.cameras.camera_to_worlds
    if kind == "orbit":
        return orbit_path(estimate_ranges(cameras), frames, elevation)
    order = round_trip(cameras[:, :, 3])
    places = torch.linspace(0, len(order), frames + 1)[:-1].tolist()
    poses = []
    for place in places:
        first, share = int(place), place - int(place)
        a, b = (cameras[order[i % len(order)]] for i in (first, first + 1))
        poses.append(interpolate_poses(a, b, b, share, 0.0))
    return torch.stack(poses)


def path_cameras(
    scene: Scene, kind: str, frames: int, elevation: float | None = None, *, size: int = 0
) -> list[Cameras]:
    """Cameras (1,) of a path, `size` pixels wide or as wide as the images; of the held-out views their own."""
    if kind != "test":
        return [scene.camera(pose, size=size) for pose in path_poses(scene, kind, frames, elevation)]
    views = scene.held_out_views.cameras
    cameras = [views[i : i + 1] for i in range(len(views))]
    for camera in cameras if size else []:
        camera.rescale_output_resolution(size / int(camera.width), scale_rounding_mode="round")
    return cameras


def round_trip(positions: Float[Tensor, "n 3"]) -> list[int]:
    """The cameras in the order of a walk that goes to the nearest next one."""
    order, left = [0], set(range(1, len(positions)))
    while left:
        nearest = min(left, key=lambda i: float((positions[i] - positions[order[-1]]).norm()))
        order.append(nearest)
        left.remove(nearest)
    return order


def depth_picture(rendering: Rendering, near: float, far: float) -> UInt8[np.ndarray, "h w 3"]:
    """Depth as colour, near bright and far dark, over white where nothing is."""
    from matplotlib import colormaps

    share = ((rendering.depth[..., 0].float() - near) / max(far - near, 1e-6)).clamp(0, 1).numpy()
    colour = colormaps["viridis"](1 - share)[..., :3]
    alpha = rendering.accumulation.float().numpy()
    return ((colour * alpha + 1 - alpha) * 255 + 0.5).astype(np.uint8)


def depth_range(renderings: Sequence[Rendering]) -> tuple[float, float]:
    """Depths between which most of what is opaque lies."""
    depths = torch.cat([r.depth[r.accumulation > 0.5] for r in renderings])
    if not len(depths):
        return 0.0, 1.0
    some = depths[:: max(1, len(depths) // 100_000)].float()
    return float(some.quantile(0.01)), float(some.quantile(0.99))


def frames_of(renderings: Iterable[Rendering], *, depth: bool = True) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Pictures of renderings, with depth to the right of colour on one scale for all.

    That scale is known after the last one; until then each is kept in 7 bytes a pixel, without depth in 3.
    """
    colours, depths = [], []
    for rendering in renderings:
        colours.append((rendering.rgb.numpy() * 255 + 0.5).astype(np.uint8))
        if depth:
            no_colour = torch.empty(1).expand(*rendering.depth.shape[:2], 3)
            depths.append(Rendering(no_colour, rendering.depth.half(), rendering.accumulation.half()))
    if not depth:
        return one_size(colours)
    near, far = depth_range(depths)
    pictures = [depth_picture(d, near, far) for d in depths]
    return [np.concatenate(pair, axis=1) for pair in zip(one_size(colours), one_size(pictures), strict=True)]


def one_size(pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Pictures of several sizes in the middle of white ones of the largest width and height."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    found = []
    for picture in pictures:
        down, across = height - picture.shape[0], width - picture.shape[1]
        edges = ((down // 2, down - down // 2), (across // 2, across - across // 2), (0, 0))
        found.append(np.pad(picture, edges, constant_values=255) if down or across else picture)
    return found


def write_gif(path: Path, frames: Sequence[UInt8[np.ndarray, "h w 3"]], fps: int) -> Path:
    """A GIF that plays over and over, written all at once."""
    pictures = [Image.fromarray(frame).quantize(128, dither=Image.Dither.NONE) for frame in frames]
    with whole_file(path) as file:
        pictures[0].save(
            file, "GIF", save_all=True, append_images=pictures[1:], duration=max(20, round(1000 / fps)), loop=0
        )
    return path


def write_mp4(path: Path, frames: Sequence[UInt8[np.ndarray, "h w 3"]], fps: int) -> Path:
    """A video (H.264) by the ffmpeg that imageio-ffmpeg brings, written all at once.

    Raises:
        UserError: ffmpeg is missing or fails.
    """
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        program = get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise UserError(f"mp4 needs ffmpeg ({error}): install imageio-ffmpeg, or use --format gif.") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp.mp4")
    height, width = frames[0].shape[:2]
    command = [program, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    # The codec takes even sides only.
    command += ["-r", str(fps), "-i", "-", "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white", "-c:v", "libx264"]
    command += ["-pix_fmt", "yuv420p", "-crf", "18", "-movflags", "+faststart", str(temporary)]
    try:
        done = subprocess.run(command, input=b"".join(f.tobytes() for f in frames), capture_output=True, check=False)
        if done.returncode:
            raise UserError(f"ffmpeg failed ({done.stderr.decode(errors='replace').strip()[:200]}): use --format gif.")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_pngs(directory: Path, frames: Iterable[UInt8[np.ndarray, "h w 3"]]) -> Path:
    """One PNG for each frame."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(directory / f"{number:04d}.png")
    return directory


def render(config: RenderConfig) -> Path:
    """Render a path and return the file or directory that was written.

    Raises:
        UserError: a run that cannot be opened, a value that cannot work, or no memory for the chunk.
    """
    for name, least in (("frames", 1), ("fps", 1), ("size", 0), ("chunk", 0)):
        require_at_least(name, getattr(config, name), least)
    if config.out:
        require_place(config.out, directory=config.format == "png")
    scene = Scene.load(config.run, device=config.device, data=config.data)
    width, height = scene.training_views.metadata["size"]
    pixels = (config.size or width) ** 2 * height / width
    count = 1 if config.path == "test" else config.frames
    cure = "use fewer frames, or a smaller size"
    # Colour is kept in 3 bytes, depth in 4, and the picture of depth again in 3.
    what = f"frames is {config.frames}, each of {pixels:,.0f} pixels"
    require_memory(what, 10 * count * pixels, torch.device("cpu"), cure)
    cameras = path_cameras(scene, config.path, config.frames, config.elevation, size=config.size)
    shown = (
        scene.render_camera(camera, chunk=config.chunk)
        for camera in Progress(cameras, desc=f"rendering {config.path}", unit=" frames")
    )
    frames = frames_of(shown, depth=config.depth)
    suffix = "" if config.format == "png" else f".{config.format}"
    out = config.out or scene.directory / f"{config.path}{suffix}"
    if config.format == "png":
        return write_pngs(out, frames)
    return (write_gif if config.format == "gif" else write_mp4)(out, frames, config.fps)


def run(config: RenderConfig) -> int:
    """`dietnerf render`: render a path and say where it is."""
    print(f"written to {render(config)}")
    return 0
