"""Cameras from what transforms files and COLMAP say about lenses, fitted to the images as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.camera_utils import get_distortion_params
from nerfstudio.cameras.cameras import CAMERA_MODEL_TO_TYPE, Cameras, CameraType
from torch import Tensor

from common.checks import UserError

RADIAL = ("k1", "k2", "k3", "k4", "k5", "k6")
LENS_KEYS = (
    "fl_x", "fl_y", "cx", "cy", "w", "h", "camera_angle_x", "camera_angle_y", "camera_model", "distortion_params",
    "p1", "p2", *RADIAL,
)  # fmt: skip
"""What a frame of a transforms file, or the whole file, may say about a lens."""
FITTED = 5e-4
"""Largest error, in focal lengths, of a polynomial in place of OpenCV's rational distortion: half a pixel of 1,000."""
Size = tuple[int, int]
"""(width, height)."""


def lens_of(meta: Mapping[str, Any], frame: Mapping[str, Any]) -> dict[str, Any]:
    """What a frame says about its lens, else what its file does for all."""
    return {key: frame.get(key, meta.get(key)) for key in LENS_KEYS if frame.get(key, meta.get(key)) is not None}


def number(lens: Mapping[str, Any], key: str, what: str, default: float = 0.0) -> float:
    """A finite number of a lens.

    Raises:
        UserError: it is something else.
    """
    value = lens.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise UserError(f"{key} of {what} is {str(value)[:50]!r}: give a number.")
    return float(value)


def lens_size(lens: Mapping[str, Any], what: str) -> Size | None:
    """The width and height that a lens is described for; None: those of its image.

    Raises:
        UserError: they are no numbers of pixels.
    """
    if "w" not in lens or "h" not in lens:
        return None
    width, height = (int(number(lens, key, what)) for key in ("w", "h"))
    if min(width, height) < 1:
        raise UserError(f"w and h of {what} are {width}x{height}: give the image's width and height in pixels.")
    return width, height


def fits(image: Size, camera: Size) -> bool:
    """Whether an image is a camera's, or a smaller or larger copy, one of whose sides may have been rounded."""
    (width, height), (w, h) = image, camera
    return min(abs(h * width / w - height), abs(w * height / h - width)) <= 1


def focal_lengths(lens: Mapping[str, Any], camera: Size, what: str) -> tuple[float, float]:
    """Focal lengths in pixels of a camera of this size, from fl_x and fl_y or the angles of view.

    Raises:
        UserError: neither is there, or one is out of range.
    """
    found: list[float | None] = []
    for key, angle, side in zip(("fl_x", "fl_y"), ("camera_angle_x", "camera_angle_y"), camera, strict=True):
        if key in lens:
            found.append(number(lens, key, what))
        elif angle in lens:
            value = lens[angle]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.pi:
                raise UserError(f"{angle} of {what} is {str(value)[:50]!r}: give the angle in radians.")
            found.append(0.5 * side / math.tan(0.5 * value))
        else:
            found.append(None)
    across = found[0] if found[0] is not None else found[1]
    down = found[1] if found[1] is not None else found[0]
    if across is None or down is None:
        raise UserError(f"camera_angle_x of {what} is None: give the horizontal angle in radians, or fl_x in pixels.")
    if not (across > 0 and down > 0):
        raise UserError(f"focal lengths of {what} are {across:g} and {down:g}: give positive numbers of pixels.")
    return across, down


def camera_type(lens: Mapping[str, Any], what: str) -> CameraType:
    """nerfstudio's kind of camera.

    Raises:
        UserError: a camera_model that nerfstudio does not know.
    """
    model = lens.get("camera_model", "OPENCV")
    model = "OPENCV" if model == "FULL_OPENCV" else model
    if not isinstance(model, str) or model not in CAMERA_MODEL_TO_TYPE:
        raise UserError(
            f"camera_model of {what} is {str(model)[:50]!r}: choose one of {', '.join(CAMERA_MODEL_TO_TYPE)}."
        )
    return CAMERA_MODEL_TO_TYPE[model]


def distortion(lens: Mapping[str, Any], camera: Size, what: str) -> Float[Tensor, " d"]:
    """nerfstudio's distortion parameters (k1, k2, k3, k4, p1, p2), or those of distortion_params as they are.

    k4, k5 and k6 of a perspective camera are OpenCV's, the denominator of its rational model; nerfstudio's camera has
    a polynomial, which is fitted to it.

    Raises:
        UserError: no numbers, or a rational model that no such polynomial comes near.
    """
    if "distortion_params" in lens:
        try:
            given = torch.as_tensor(lens["distortion_params"], dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            given = torch.zeros(0)
        if given.shape not in ((6,), (12,)) or not torch.isfinite(given).all():
            raise UserError(f"distortion_params of {what} has shape {tuple(given.shape)}: give 6 or 12 numbers.")
        return given
    k = [number(lens, key, what) for key in RADIAL]
    if camera_type(lens, what) == CameraType.PERSPECTIVE and any(k[3:]):
        k[:4] = _polynomial(k, _corner(lens, camera, what), what)
    p1, p2 = number(lens, "p1", what), number(lens, "p2", what)
    return get_distortion_params(k1=k[0], k2=k[1], k3=k[2], k4=k[3], p1=p1, p2=p2)


def _corner(lens: Mapping[str, Any], camera: Size, what: str) -> float:
    """How far the farthest corner of an image is from its principal point, in focal lengths."""
    sides = []
    for key, focal, side in zip(("cx", "cy"), focal_lengths(lens, camera, what), camera, strict=True):
        middle = number(lens, key, what, side / 2)
        sides.append(max(middle, side - middle) / focal)
    return math.hypot(*sides)


def _polynomial(k: Sequence[float], corner: float, what: str) -> list[float]:
    """k1 to k4 of 1 + k1 r^2 + k2 r^4 + k3 r^6 + k4 r^8, by least squares over the image, for OpenCV's
    (1 + k1 r^2 + k2 r^4 + k3 r^6) / (1 + k4 r^2 + k5 r^4 + k6 r^6)."""
    r = np.linspace(0, 4 * max(corner, 1e-3), 4001)
    powers = np.stack([r**2, r**4, r**6, r**8], axis=1)
    with np.errstate(all="ignore"):
        radial = (1 + powers[:, :3] @ np.array(k[:3])) / (1 + powers[:, :3] @ np.array(k[3:]))
        bent = r * radial
    rising = np.append(np.diff(bent) > 0, False)
    end = int(np.argmin(rising & (bent < corner)))  # the first radius beyond the corner, or where light turns back
    if not np.isfinite(bent[: end + 1]).all() or end < 8:
        raise UserError(f"k4, k5 and k6 of {what} fold the image: estimate them again, or undistort the photographs.")
    weighted = powers[: end + 1] * r[: end + 1, None]
    found = np.linalg.lstsq(weighted, bent[: end + 1] - r[: end + 1], rcond=None)[0]
    error = float(np.abs(weighted @ found + r[: end + 1] - bent[: end + 1]).max())
    if error > FITTED or bent[end] < 0.9 * corner:
        raise UserError(
            f"k4, k5 and k6 of {what} bend the image as no polynomial does ({error:.2g} of a focal length off): "
            f"undistort the photographs (colmap image_undistorter)."
        )
    return found.tolist()


def _require_one_shape(lenses: Sequence[Mapping[str, Any]], images: Sequence[Size], names: Sequence[str]) -> None:
    """Refuse one angle of view for images of several shapes: a photograph that was turned has another one across."""
    seen: dict[Any, tuple[Size, str]] = {}
    for lens, image, name in zip(lenses, images, names, strict=True):
        if "fl_x" in lens or "fl_y" in lens or ("w" in lens and "h" in lens):
            continue
        first, other = seen.setdefault(str(lens.get("camera_angle_x")), (image, name))
        if not fits(image, first):
            raise UserError(
                f"image {name} is {image[0]}x{image[1]} but {other} is {first[0]}x{first[1]}, with one camera_angle_x: "
                f"give each frame its own, or fl_x, fl_y, w and h."
            )


def build_cameras(
    poses: Float[Tensor, "n 3 4"],
    lenses: Sequence[Mapping[str, Any]],
    images: Sequence[Size],
    sizes: Sequence[Size],
    names: Sequence[str],
) -> Cameras:
    """Cameras (n,) of images of `sizes`.

    Args:
        poses: camera-to-world.
        lenses: as `lens_of` gives them.
        images: sizes of the images as they lie on disk, upright; the lenses may have been estimated on larger ones.
        sizes: to which they are averaged down.
        names: what errors call each.

    Raises:
        UserError: a lens that cannot be.
    """
    _require_one_shape(lenses, images, names)
    rows, distortions, types = [], [], []
    for lens, image, size, name in zip(lenses, images, sizes, names, strict=True):
        camera = lens_size(lens, name) or image
        fx, fy = focal_lengths(lens, camera, name)
        cx, cy = (number(lens, key, name, side / 2) for key, side in zip(("cx", "cy"), camera, strict=True))
        across, down = size[0] / camera[0], size[1] / camera[1]
        rows.append((fx * across, fy * down, cx * across, cy * down))
        distortions.append(distortion(lens, camera, name))
        types.append(camera_type(lens, name).value)
    if len({len(one) for one in distortions}) > 1:
        raise UserError(f"distortion_params of {names[0]} and others differ in length: give all frames as many.")
    values = torch.tensor(rows, dtype=torch.float64).float()
    bent = torch.stack(distortions)
    return Cameras(
        camera_to_worlds=poses,
        fx=values[:, :1],
        fy=values[:, 1:2],
        cx=values[:, 2:3],
        cy=values[:, 3:],
        width=torch.tensor([[w] for w, _ in sizes]),
        height=torch.tensor([[h] for _, h in sizes]),
        distortion_params=bent if bool(bent.any()) else None,
        camera_type=torch.tensor(types)[:, None],
    )
