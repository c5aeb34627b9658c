"""Find image files, and read files, URLs, PIL images and arrays as RGB, or say what is wrong with them."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, TypeAlias, TypeGuard, Union

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.checks import UserError, require_file
from common.clip import to_rgb

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"))
URL_PREFIXES = ("http://", "https://")
URL_BYTES = 32 << 20
"""Largest image that is fetched."""
URL_SECONDS = 30.0
"""Longest time that an image's URL may take."""
ImageSource: TypeAlias = Union[str, "os.PathLike[str]", Image.Image, np.ndarray]


class ImageError(UserError):
    """An image that cannot be read."""


def read_image(source: ImageSource) -> Image.Image:
    """An image as 8-bit RGB: first frame, upright by its EXIF tag, over white where it is transparent.

    Args:
        source: path, http(s) URL of a public address, PIL image, or array (h, w), (h, w, 1), (h, w, 3) or (h, w, 4)
            of integers in [0, 255], 16-bit integers in [0, 65535], or floats in [0, 1].

    Raises:
        ImageError: it is missing, empty, cut short, too large, cannot be fetched, is not an image or not of these
            shapes.
    """
    try:
        if isinstance(source, Image.Image):
            return to_rgb(source)
        if isinstance(source, np.ndarray):
            return to_rgb(_from_array(source))
        if is_url(source):
            return _decode(io.BytesIO(_fetch(source)), source)
        if isinstance(source, str | os.PathLike):
            return _read_file(require_file(source, "image"))
    except ImageError:
        raise
    except UserError as error:
        raise ImageError(str(error)) from error
    raise ImageError(f"image is a {type(source).__name__}: give a path, a PIL image or a NumPy array.")


def is_url(source: object) -> TypeGuard[str]:
    """Whether an image's source is an http(s) URL."""
    return isinstance(source, str) and source.lower().startswith(URL_PREFIXES)


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path | str]:
    """Files and URLs as they are given, and every image file inside directories, sorted by path.

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
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not inside:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"folder {str(path)!r} holds no image: give one with {kinds} files.")
        found += inside
    if not found:
        raise UserError("no images: give the path of an image or of a folder.")
    return found


def _read_file(path: Path) -> Image.Image:
    try:
        with open(path, "rb") as file:
            return _decode(file, str(path))
    except PermissionError as error:
        raise ImageError(f"image {str(path)!r} may not be read: check its permissions.") from error
    except OSError as error:
        raise ImageError(f"image {str(path)!r} cannot be read ({error.strerror or error}): copy it again.") from error


def _fetch(url: str) -> bytes:
    """The bytes at a URL; addresses that are not public are refused, redirects included."""
    from clipcap.download import Dropped, fetch

    try:
        return fetch(url, timeout=URL_SECONDS, max_bytes=URL_BYTES)
    except Dropped as error:
        raise ImageError(f"image {url!r} cannot be fetched ({error.reason}): check the address.") from error


def _decode(file: BinaryIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images below Pillow's limit, and of odd metadata
            with Image.open(file) as image:
                return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise ImageError(f"image {name!r} is too large ({error}): scale it down.") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"image {name!r} is not an image that Pillow knows: convert or remove it.") from error
    except (UserError, OSError, SyntaxError, ValueError, EOFError) as error:
        reason = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
        raise ImageError(f"image {name!r} is damaged or cut short ({reason}): copy it again.") from error


def _from_array(values: np.ndarray) -> Image.Image:
    shape = values.shape
    if not (len(shape) == 2 or len(shape) == 3 and shape[2] in (1, 3, 4)) or 0 in shape:
        raise ImageError(f"image array has shape {shape}: use (height, width) or (height, width, 1, 3 or 4).")
    values = values[..., 0] if shape[2:] == (1,) else values
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also NaN
            raise ImageError(f"image array has floats from {low:.4g} to {high:.4g}: scale them to [0, 1].")
        values = (values * 255).round()
    elif values.dtype == np.bool_:
        values = values * 255
    elif values.dtype == np.uint16:
        values = values // 257
    elif values.dtype.kind not in "iu" or int(values.min()) < 0 or int(values.max()) > 255:
        raise ImageError(f"image array has dtype {values.dtype}: use uint8, uint16, or floats in [0, 1].")
    return Image.fromarray(np.ascontiguousarray(values.astype(np.uint8)))
