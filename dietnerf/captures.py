"""Posed images of every layout in one form: float64 poses, what is said about lenses, and the split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nerfstudio.data.utils import colmap_parsing_utils
from nerfstudio.data.utils.dataparsers_utils import get_train_eval_split_fraction, get_train_eval_split_interval
from nerfstudio.process_data.colmap_utils import parse_colmap_camera_params

from common.checks import UserError, reason_of, require_file
from dietnerf.images import IMAGE_SUFFIXES, find_image
from dietnerf.layouts import Kind, check_pose, find_scene, natural_order, read_frames
from dietnerf.lenses import lens_of

OTHER_SPLIT = {"test": "val", "val": "test"}
"""Held-out views that stand in for those that a scene lacks."""
COLMAP_LISTS = {
    "train": ("train_list.txt",),
    "test": ("test_list.txt",),
    "val": ("val_list.txt", "validation_list.txt"),
}
"""Files in which a COLMAP scene may list the images of a split."""
ORIENTATIONS = ("up", "vertical", "pca", "none")
COLMAP_WORLD = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
"""nerfstudio turns COLMAP's world by this: COLMAP's guess of gravity, -y, becomes +z."""


@dataclass(frozen=True)
class Frame:
    """A posed image."""

    image: Path
    pose: np.ndarray
    """Camera-to-world (3, 4), float64: x right, y up, looking along -z."""
    lens: Mapping[str, Any]
    """What is said about its lens, by nerfstudio's names; see `dietnerf.lenses`."""
    mask: Path | None = None


@dataclass(frozen=True)
class Capture:
    """A scene as it lies on disk, and which of its frames a split has."""

    kind: Kind
    file: Path
    """That it was read from."""
    frames: Sequence[Frame]
    """Of the split, or of all splits where one file has them."""
    ids: Sequence[int]
    """Which of them are of the split."""
    source: str
    """The split or file that these come from."""
    from_training: bool = False
    """Whether these are the training views, since no others are there."""
    poses: np.ndarray | None = None
    """Poses (n, 3, 4) that say where the scene is; None: those of the frames."""
    orientation: str = "up"
    """How the world is turned upright: nerfstudio's orientation_method."""
    applied: np.ndarray | None = None
    """Transform (4, 4) that the poses have been through already, from the coordinates that they were found in."""
    applied_scale: float = 1.0
    bounds: tuple[float, float] | None = None
    """Nearest and farthest depth of the scene, where its file has them."""


def read_capture(path: Path, split: str, *, skip_missing: bool = False) -> Capture:
    """A split of a scene in any layout.

    Args:
        path: as `find_scene` takes it.
        split: "train", "val" or "test"; where a scene lacks it, the other held-out one or "train".
        skip_missing: leave out the frames whose image is missing.

    Raises:
        UserError: no scene, a file that cannot be read, or an image that is missing.
    """
    kind, place = find_scene(path)
    readers: dict[str, Callable[[Path, str, bool], Capture]] = {
        "blender": read_blender, "nerfstudio": read_nerfstudio, "colmap": read_colmap, "llff": read_llff,
    }  # fmt: skip
    found = readers[kind](place, split, skip_missing)
    if not found.ids:
        raise UserError(f"scene {str(path)!r} has no {split} views: give it some.")
    return found


def _frames(
    directory: Path, entries: Sequence[Mapping[str, Any]], meta: Mapping[str, Any], skip_missing: bool
) -> list[Frame]:
    """Frames of a checked transforms file, those without an image left out if they may be."""
    found = []
    for number, entry in enumerate(entries):
        try:
            image = find_image(directory, entry["file_path"])
        except UserError:
            if skip_missing:
                continue
            raise
        mask = entry.get("mask_path")
        if mask is not None and not isinstance(mask, str):
            raise UserError(f"mask_path of {str(image)!r} is {str(mask)[:50]!r}: give a path.")
        pose = check_pose(entry["transform_matrix"], f"frame {number}")
        lens = lens_of(meta, entry)
        found.append(Frame(image, pose, lens, _mask(directory, mask) if mask else None))
    masks = [frame.mask is not None for frame in found]
    if any(masks) and not all(masks):
        raise UserError(
            f"image {str(found[masks.index(False)].image)!r} has no mask_path but others have: give all one, or none."
        )
    return found


def _mask(directory: Path, name: str) -> Path:
    return next((p for one in (name, name.replace("\\", "/")) if (p := directory / one).is_file()), directory / name)


def read_blender(directory: Path, split: str, skip_missing: bool) -> Capture:
    """transforms_train.json and, if they exist, transforms_val.json and transforms_test.json."""
    path = directory / f"transforms_{split}.json"
    from_training = False
    if not path.is_file() and split != "train":  # a scene may come with one held-out split only
        path = directory / f"transforms_{OTHER_SPLIT[split]}.json"
        if from_training := not path.is_file():
            path = directory / "transforms_train.json"
    meta = read_frames(path)
    frames = _frames(directory, meta["frames"], meta, skip_missing)
    training = meta if path.name == "transforms_train.json" else read_frames(directory / "transforms_train.json")
    poses = np.stack([check_pose(frame["transform_matrix"], "frame") for frame in training["frames"]])
    return Capture("blender", path, frames, range(len(frames)), path.name, from_training, poses)


def read_nerfstudio(file: Path, split: str, skip_missing: bool) -> Capture:
    """A transforms.json as ns-process-data writes it, or instant-ngp."""
    meta = read_frames(file)
    if "fisheye_crop_radius" in meta and "FISHEYE" in str(meta.get("camera_model")):
        raise UserError(
            f"transforms file {str(file)!r} has fisheye_crop_radius {meta['fisheye_crop_radius']}, which cannot be "
            f"used: undistort the photographs, or leave it out to train on whole images."
        )
    entries = sorted(meta["frames"], key=lambda frame: natural_order(frame["file_path"]))
    frames = _frames(file.parent, entries, meta, skip_missing)
    listed = {
        name: _listed(
            meta[f"{name}_filenames"], file.parent, frames, f"{name}_filenames of {str(file)!r}", skip_missing
        )
        for name in ("train", "val", "test")
        if f"{name}_filenames" in meta
    }
    default = get_train_eval_split_fraction(frames, 0.9)
    ids, source = _split(listed, default, split, str(file))
    orientation = meta.get("orientation_override", "up")
    if not isinstance(orientation, str) or orientation not in ORIENTATIONS:
        raise UserError(
            f"orientation_override of {str(file)!r} is {str(orientation)[:50]!r}: choose one of "
            f"{', '.join(ORIENTATIONS)}."
        )
    applied, scale = _applied(meta, file)
    return Capture(
        "nerfstudio", file, frames, ids, source, source == "train" != split, None, orientation, applied, scale
    )


def _applied(meta: Mapping[str, Any], file: Path) -> tuple[np.ndarray | None, float]:
    """applied_transform (4, 4) and applied_scale of a transforms file."""
    scale = meta.get("applied_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < 1e12:
        raise UserError(f"applied_scale of {str(file)!r} is {str(scale)[:50]!r}: give a positive number.")
    if "applied_transform" not in meta:
        if not (file.parent / "colmap/sparse/0").exists():
            return None, float(scale)
        # What ns-process-data did before it wrote applied_transform.
        return np.array([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]]), float(scale)
    try:
        given = np.asarray(meta["applied_transform"], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        given = np.zeros(0)
    if given.shape not in ((3, 4), (4, 4)) or not np.isfinite(given).all():
        raise UserError(f"applied_transform of {str(file)!r} has shape {given.shape}: give 3 rows of 4 numbers.")
    return np.vstack((given[:3], [0, 0, 0, 1])), float(scale)


def _listed(names: Any, directory: Path, frames: Sequence[Frame], what: str, skip_missing: bool) -> list[int]:
    """Places of the frames whose images are listed."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{what} is no list of file names: give one.")
    places, found = {frame.image: i for i, frame in enumerate(frames)}, set()
    for name in names:
        try:
            found.add(places[find_image(directory, name)])
        except (UserError, KeyError) as error:
            if not skip_missing:
                raise UserError(f"{what} has {name!r}, which no frame has: correct the list.") from error
    return sorted(found)


def _split(
    listed: Mapping[str, list[int]], default: Sequence[np.ndarray], split: str, what: str
) -> tuple[list[int], str]:
    """Ids of a split's frames and the split that they come from.

    A scene may list one held-out split only, or have too few images to hold any out.
    """
    for name in ("train",) if split == "train" else (split, OTHER_SPLIT[split], "train"):
        if listed and name not in listed:
            if name == "train":
                raise UserError(f"scene {what!r} lists images of other splits, but none to train on: list those too.")
            continue
        if ids := listed[name] if listed else default[name != "train"].tolist():
            break
    return list(ids), name


def read_colmap(model: Path, split: str, skip_missing: bool) -> Capture:
    """A reconstruction of COLMAP, with its photographs in the folder images of the scene that it lies in."""
    directory = next((place for place in list(model.absolute().parents)[:3] if (place / "images").is_dir()), None)
    if directory is None:
        raise UserError(f"COLMAP's model {str(model)!r} has no folder images beside it: put the photographs there.")
    cameras, images = read_model(model, "cameras", "images")
    try:
        lenses = {number: _colmap_lens(camera) for number, camera in cameras.items()}
        entries = []
        for image in sorted(images.values(), key=lambda one: natural_order(one.name)):
            view = np.eye(4)
            view[:3, :3], view[:3, 3] = colmap_parsing_utils.qvec2rotmat(image.qvec), image.tvec
            pose = COLMAP_WORLD @ np.linalg.inv(view) @ np.diag([1.0, -1, -1, 1])
            entries.append({"file_path": image.name, "transform_matrix": pose, **lenses[image.camera_id]})
    except Exception as error:  # whatever nerfstudio comes upon in a lens or a pose
        raise UserError(f"scene {str(directory)!r} cannot be read: {reason_of(error)}") from error
    if not entries:
        raise UserError(f"COLMAP's model {str(model)!r} has no images: run COLMAP again, with more photographs.")
    frames = _frames(directory / "images", entries, {}, skip_missing)
    listed = {}
    for name, files in COLMAP_LISTS.items():
        for list_file in [directory / file for file in files if (directory / file).is_file()][:1]:
            names = list_file.read_text("utf-8-sig").split("\n")
            names = [line.strip() for line in names if line.strip()]
            listed[name] = _listed(names, directory / "images", frames, repr(str(list_file)), skip_missing)
    ids, source = _split(listed, get_train_eval_split_interval(frames, 8), split, str(directory))
    return Capture("colmap", model, frames, ids, source, source == "train" != split, applied=COLMAP_WORLD)


def read_model(model: Path, *parts: str) -> list[dict[int, Any]]:
    """Parts of COLMAP's model ("cameras", "images", "points3D"), in text or binary, each by its numbers.

    Raises:
        UserError: a part is broken.
    """
    found = []
    for part in parts:
        text = model / f"{part}.txt"
        kind, path = ("text", text) if text.is_file() else ("binary", model / f"{part}.bin")
        try:
            found.append(getattr(colmap_parsing_utils, f"read_{part}_{kind}")(path))
        except OSError:
            raise
        except Exception as error:  # whatever nerfstudio's readers come upon in a broken file
            raise UserError(f"COLMAP's {str(path)!r} cannot be read ({reason_of(error)}): copy it again.") from error
    return found


def _colmap_lens(camera: Any) -> dict[str, Any]:
    """A lens by nerfstudio's names; FULL_OPENCV, which nerfstudio does not read, is OPENCV with k3 to k6 behind it."""
    if camera.model != "FULL_OPENCV":
        return parse_colmap_camera_params(camera)
    lens = parse_colmap_camera_params(camera._replace(model="OPENCV", params=camera.params[:8]))
    return lens | dict(zip(("k3", "k4", "k5", "k6"), map(float, camera.params[8:12]), strict=True))


def read_llff(directory: Path, split: str, skip_missing: bool) -> Capture:
    """poses_bounds.npy, with its photographs in images: in the alphabet's order, as LLFF's own scripts have them."""
    path = require_file(directory / "poses_bounds.npy", "poses file")
    try:
        table = np.asarray(np.load(path), dtype=np.float64)
    except Exception as error:  # numpy reads the head as Python, which has errors of its own
        raise UserError(f"poses file {str(path)!r} cannot be read ({reason_of(error)}): write it again.") from error
    if table.ndim != 2 or table.shape[1] != 17 or not len(table) or not np.isfinite(table).all():
        raise UserError(f"poses file of {str(directory)!r} has shape {table.shape}: give (images, 17), without NaN.")
    paths = sorted(p for p in (directory / "images").glob("*") if p.suffix in IMAGE_SUFFIXES)
    if len(paths) != len(table):
        raise UserError(f"{str(directory)!r} has {len(paths)} images for {len(table)} poses: make them match.")
    raw = table[:, :15].reshape(-1, 3, 5)
    rotation = np.stack((raw[..., 1], -raw[..., 0], raw[..., 2]), axis=-1)  # down, right, back -> right, up, back
    poses = np.concatenate((rotation, raw[..., 3:4]), axis=-1)
    frames = []
    for i, (image, pose, (height, width, focal)) in enumerate(zip(paths, poses, raw[:, :, 4], strict=True)):
        lens = {"w": float(width), "h": float(height), "fl_x": float(focal)}
        frames.append(Frame(image, check_pose(pose, f"pose {i} of {str(directory)!r}"), lens))
    ids, source = _split({}, get_train_eval_split_interval(frames, 8), split, str(directory))
    bounds = float(table[:, 15].min()), float(table[:, 16].max())
    return Capture("llff", path, frames, ids, source, source == "train" != split, bounds=bounds)
