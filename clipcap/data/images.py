"""Find image files, and read files, URLs, PIL images and arrays as RGB, or say what is wrong with them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias, TypeGuard, TypeVar, Union

import numpy as np
from PIL import Image

from clipcap.data.members import is_member, open_file
from clipcap.data.net import Dropped, fetch
from common.checks import UserError, require_file
from common.images import MAX_PIXELS, bands, decode_image, image_suffixes, images_below, require_pixels, to_rgb

URL_PREFIXES = ("http://", "https://")
URL_BYTES = 32 << 20
"""Largest image that is fetched."""
URL_SECONDS = 30.0
"""Longest time that an image's URL may take."""
ImageSource: TypeAlias = Union[str, "os.PathLike[str]", Image.Image, np.ndarray]


Source = TypeVar("Source")
Made = TypeVar("Made")


class ImageError(UserError):
    """An image that cannot be read."""


def read_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, side: int = 0) -> Image.Image:
    """An image as 8-bit RGB: first frame, upright by its EXIF tag, over white where it is transparent.

    Args:
        source: path, http(s) URL of a public address, PIL image, or array (h, w), (h, w, 1), (h, w, 3) or (h, w, 4)
            of integers in [0, 255], 16-bit integers in [0, 65535], or floats in [0, 1].
        max_pixels: most width times height of a file, URL or PIL image; more is refused before it is decoded.
        side: of the square that the image will be scaled down to; 0 for its full size. A large JPEG is
            then decoded at a smaller scale (`common.images.decode_image`).

    Raises:
        ImageError: it is missing, empty, cut short, too large, cannot be fetched, is not an image or not of these
            shapes.
    """
    try:
        if isinstance(source, Image.Image):
            require_pixels(source, "image", max_pixels)
            return to_rgb(source)
        if isinstance(source, np.ndarray):
            return to_rgb(_from_array(source))
        if is_url(source):
            return decode_image(io.BytesIO(_fetch(source)), f"image {source!r}", max_pixels=max_pixels, side=side)
        if isinstance(source, str | os.PathLike):
            return _read_file(source if is_member(source) else require_file(source, "image"), max_pixels, side)
    except ImageError:
        raise
    except UserError as error:
        raise ImageError(str(error)) from error
    raise ImageError(f"image is a {type(source).__name__}: give a path, a PIL image or a NumPy array.")


def readable(
    sources: Iterable[Source], read: Callable[[Source], Made], on_error: Callable[[ImageError], object] | None = None
) -> list[tuple[Source, Made]]:
    """Each source with what `read` makes of it; `on_error` is called with the error of one that cannot be read.

    Raises:
        ImageError: of one, where `on_error` is None.
    """
    found = []
    for source in sources:
        try:
            found.append((source, read(source)))
        except ImageError as error:
            if on_error is None:
                raise
            on_error(error)
    return found


def is_url(source: object) -> TypeGuard[str]:
    """Whether an image's source is an http(s) URL."""
    return isinstance(source, str) and source.lower().startswith(URL_PREFIXES)


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path | str]:
    """Files and URLs as they are given, and every image file inside directories, sorted by path.

    Pictures there of kinds that are not read are counted and named on standard error.

    Raises:
        UserError: a directory holds no image, or there is no path.
    """
    found: list[Path | str] = []
    for given in paths:
        if is_url(given):
            found.append(given)
            continue
        path = Path(given)
        if not os.path.isdir(path):  # also of a name that none can have
            found.append(path)
            continue
        inside = images_below(path)
        if not inside:
            kinds = ", ".join(sorted(image_suffixes()))
            raise UserError(f"folder {str(path)!r} holds no image: give one with {kinds} files.")
        found += inside
    if not found:
        raise UserError("no images: give the path of an image or of a folder.")
    return found


def _read_file(path: str | os.PathLike[str], max_pixels: int, side: int) -> Image.Image:
    try:
        with open_file(path) as file:
            return decode_image(file, f"image {str(path)!r}", max_pixels=max_pixels, side=side)
    except PermissionError as error:
        raise ImageError(f"image {str(path)!r} may not be read: check its permissions.") from error
    except OSError as error:
        raise ImageError(f"image {str(path)!r} cannot be read ({error.strerror or error}): copy it again.") from error


def _fetch(url: str) -> bytes:
    """The bytes at a URL; addresses that are not public are refused, redirects included."""
    try:
        return fetch(url, timeout=URL_SECONDS, max_bytes=URL_BYTES)
    except Dropped as error:
        raise ImageError(f"image {url!r} cannot be fetched ({error.reason}): check the address.") from error


def _from_array(values: np.ndarray) -> Image.Image:
    shape = values.shape
    if not (len(shape) == 2 or len(shape) == 3 and shape[2] in (1, 3, 4)) or 0 in shape:
        raise ImageError(f"image array has shape {shape}: use (height, width) or (height, width, 1, 3 or 4).")
    values = values[..., 0] if shape[2:] == (1,) else values
    kind = values.dtype.kind
    if kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also NaN
            raise ImageError(f"image array has floats from {low:.4g} to {high:.4g}: scale them to [0, 1].")
    elif values.dtype not in (np.bool_, np.uint16) and (
        kind not in "iu" or int(values.min()) < 0 or int(values.max()) > 255
    ):
        raise ImageError(f"image array has dtype {values.dtype}: use uint8, uint16, or floats in [0, 1].")
    found = np.empty(values.shape, np.uint8)
    for top, bottom in bands(shape[1], shape[0]):
        part = values[top:bottom]
        if kind == "f":
            part = (part * 255).round()
        elif kind == "b":
            part = part * np.uint8(255)
        elif values.dtype == np.uint16:
            part = part // 257
        found[top:bottom] = part
    return Image.fromarray(found)
