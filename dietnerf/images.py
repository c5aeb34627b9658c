"""Photographs and masks as tensors: decoded, upright, averaged down by area."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from common.checks import UserError, require_file
from common.images import MAX_PIXELS, grey_to_8_bit, open_image

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
    pixels = np.asarray(decode(path, max_pixels, upright=upright))
    if pixels.shape[-1] == 3 or background == "image":
        return _join([_area(_unit(pixels[..., i]), size) for i in range(3)]), None
    behind = np.float32(background == "white")
    alpha, colours = _unit(pixels[..., 3]), []
    for i in range(3):
        channel = _unit(pixels[..., i])
        channel -= behind
        channel *= alpha
        channel += behind
        colours.append(_area(channel, size))
    return _join(colours), _join([_area(alpha, size)])


def load_mask(path: Path, size: tuple[int, int], *, max_pixels: int = MAX_PIXELS) -> Bool[Tensor, "h w 1"]:
    """Where a mask is not black, at `size`; a smaller pixel is left out where a part of it is (if any is whole).

    Raises:
        UserError: unreadable, cut short, too large, or black all over.
    """
    image = decode(path, max_pixels, exact_grey=True)
    usable = np.asarray(image if image.mode.startswith(("I", "F")) else image.convert("L")) > 0
    share = _join([_area(usable.astype(np.float32), size)])
    if not share.any():
        raise UserError(f"mask {str(path)!r} is black all over: make white what may be used, or leave its view out.")
    return share > 0.999 * share.max()


def decode(path: Path, max_pixels: int = MAX_PIXELS, *, upright: bool = True, exact_grey: bool = False) -> Image.Image:
    """An image as RGBA when it has alpha, else as RGB; `exact_grey` keeps grey of more than 8 bits as it is.

    Raises:
        UserError: unreadable, cut short or too large.
    """
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
    image = decode(path, max_pixels)
    return image.mode == "RGB" or image.getchannel("A").getextrema()[0] == 255


def _unit(channel: UInt8[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    return np.multiply(channel, np.float32(1 / 255), dtype=np.float32)


def _area(channel: Float32[np.ndarray, "_ _"], size: tuple[int, int]) -> Float32[np.ndarray, "_ _"]:
    """A channel averaged over the area of each smaller pixel: OpenCV's, one channel at a time, to need less memory."""
    return channel if channel.shape[::-1] == size else cv2.resize(channel, size, interpolation=cv2.INTER_AREA)


def _join(channels: Sequence[Float32[np.ndarray, "h w"]]) -> Float[Tensor, "h w c"]:
    return torch.from_numpy(np.stack(channels, axis=-1))
