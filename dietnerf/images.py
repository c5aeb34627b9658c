"""Photographs and masks as tensors: decoded, upright, averaged down by area."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from common.checks import UserError, require_file
from common.images import MAX_PIXELS, bands, grey_to_8_bit, open_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".JPG", ".PNG", ".JPEG", ".webp")


def find_image(directory: Path, name: str) -> Path:
    """The image of a frame, whose name may lack its suffix, or have the separators of Windows.

    Raises:
        UserError: there is none.
    """
    for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
        path = directory / spelling
        if path.is_file():
            return path
        for suffix in IMAGE_SUFFIXES:
            if (candidate := path.parent / (path.name + suffix)).is_file():
                return candidate
    raise UserError(
        f"image {str(directory / name)!r} does not exist: check file_path in the transforms file, or leave out what is "
        f"missing (--skip-missing)."
    )


def read_size(
    path: Path, what: str = "image", *, max_pixels: int = MAX_PIXELS
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of an image (or mask, as `what` says) as it lies in its file, and turned upright by its EXIF tag;
    it is not decoded.

    Raises:
        UserError: it cannot be opened or has more than `max_pixels` pixels.
    """
    with open_image(require_file(path, what), f"{what} {str(path)!r}", max_pixels=max_pixels) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (width, height), (height, width) if turned else (width, height)


def load_image(
    path: Path, size: tuple[int, int], background: str, *, upright: bool = True, max_pixels: int = MAX_PIXELS
) -> tuple[Float[Tensor, "h w 3"], Float[Tensor, "h w 1"] | None]:
    """Colour over the background in [0, 1], and alpha where the image has it, averaged by area down to `size`.

    Args:
        path: of an image of any mode.
        size: (width, height), at most the image's.
        background: "white" or "black", over which transparent pixels lie; "image" drops alpha.
        upright: turn it by its EXIF tag.
        max_pixels: most pixels that are decoded.

    Raises:
        UserError: unreadable, cut short or too large.
    """
    pixels = np.asarray(_decode(path, max_pixels, upright=upright))
    with_alpha = pixels.shape[-1] == 4 and background != "image"
    behind = 1.0 if background == "white" else 0.0

    def part(top: int, bottom: int) -> np.ndarray:
        values = pixels[top:bottom].astype(np.float32) / 255
        colour = values[..., :3]
        if not with_alpha:
            return colour
        alpha = values[..., 3:]
        return np.concatenate((colour * alpha + (1 - alpha) * behind, alpha), axis=-1)

    found = _area(pixels.shape[:2], part, size)
    return (found[..., :3].contiguous(), found[..., 3:].contiguous()) if with_alpha else (found, None)


def load_mask(path: Path, size: tuple[int, int], *, max_pixels: int = MAX_PIXELS) -> Bool[Tensor, "h w 1"]:
    """Where a mask is not black, at `size`; a smaller pixel is left out where a part of it is (if any is whole).

    Raises:
        UserError: unreadable, cut short, too large, or black all over.
    """
    image = _decode(path, max_pixels, exact_grey=True)
    usable = np.asarray(image if image.mode.startswith(("I", "F")) else image.convert("L"))[..., None] > 0
    share = _area(usable.shape[:2], lambda top, bottom: usable[top:bottom].astype(np.float32), size)
    if not share.any():
        raise UserError(f"mask {str(path)!r} is black all over: make white what may be used, or leave its view out.")
    return share > 0.999 * share.max()


def _decode(path: Path, max_pixels: int, *, upright: bool = True, exact_grey: bool = False) -> Image.Image:
    """An image as RGBA when it has alpha, else as RGB; `exact_grey` keeps grey of more than 8 bits as it is."""
    with open_image(path, f"image {str(path)!r}", max_pixels=max_pixels) as opened:
        opened.load()
        turned = ImageOps.exif_transpose(opened) if upright else opened
        if turned.mode.startswith(("I", "F")) and exact_grey:
            return turned.copy()
        image = grey_to_8_bit(turned)
        return image.convert("RGBA" if image.has_transparency_data else "RGB")


def is_opaque(path: Path, *, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether an image has no alpha, or alpha that hides nothing.

    Raises:
        UserError: unreadable, cut short or too large.
    """
    image = _decode(path, max_pixels)
    return image.mode == "RGB" or image.getchannel("A").getextrema()[0] == 255


def _area(
    shape: tuple[int, ...], part: Callable[[int, int], np.ndarray], size: tuple[int, int]
) -> Float[Tensor, "h w c"]:
    """Each channel averaged over the area of each smaller pixel.

    Args:
        shape: (height, width) of the image.
        part: gives its rows from one to another, as (rows, width, channels).
        size: (width, height) of the result.
    """
    (height, width), (new_width, new_height) = shape, size
    if (width, height) == size:
        return torch.cat([torch.from_numpy(part(*rows)) for rows in bands(width, height)])
    rows, columns = area_weights(height, new_height), area_weights(width, new_width)
    found = []
    with torch.autocast("cpu", enabled=False):  # the first step, which may be in bfloat16, asks for the images
        for first, end in bands(math.ceil(width * height / new_height), new_height):
            top, bottom = first * height // new_height, math.ceil(end * height / new_height)
            values = torch.from_numpy(np.ascontiguousarray(part(top, bottom)))
            found.append(torch.einsum("yh,hwc,xw->yxc", rows[first:end, top:bottom], values, columns))
    return torch.cat(found)


def area_weights(old: int, new: int) -> Float[Tensor, "new old"]:
    """How much of each of `old` pixels lies in each of `new` larger ones, in rows that sum to 1."""
    begins, ends = torch.arange(old, dtype=torch.float64), torch.arange(1, old + 1, dtype=torch.float64)
    edges = torch.arange(new + 1, dtype=torch.float64) * (old / new)
    overlap = torch.minimum(ends, edges[1:, None]) - torch.maximum(begins, edges[:-1, None])
    return (overlap.clamp(min=0) * (new / old)).float()
