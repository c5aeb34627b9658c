"""Finding and opening images: their size is checked before they are decoded, and every mode becomes 8-bit RGB."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from common.checks import UserError, printable

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")
"""What people have; JPEG includes MPO, and HEIF needs a plugin that is registered. Pillow knows others, of which one
starts a program (EPS) and many are hardly ever read, and so hardly ever tested."""
MAX_PIXELS = 100_000_000
BAND_PIXELS = 1 << 20
"""Pixels converted at once: what a conversion needs beside its input and output stays small."""
IMAGE_SUFFIXES = frozenset(
    (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm",
        ".pgm", ".pbm", ".pnm", ".avif",
    )
)  # fmt: skip
HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
"""Of pictures that are read where pillow-heif is installed."""
UNREAD_SUFFIXES = HEIF_SUFFIXES | frozenset(
    (
        ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".svg", ".psd", ".xcf", ".tga", ".ico", ".icns", ".exr", ".hdr", ".eps",
        ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pcx", ".dds", ".qoi",
    )
)  # fmt: skip
"""Of pictures that are not read, or not everywhere."""
LARGE_JPEG = 4_000_000
"""Pixels above which a JPEG is decoded at a smaller scale where that is enough."""
_ORIENTATION = 0x0112
_TILE_WIDTH, _TILE_LENGTH = 322, 323


@dataclass(frozen=True)
class ImageLimit:
    """Which images are read."""

    max_megapixels: float = MAX_PIXELS / 1e6
    """Largest image that is read, in millions of pixels (up to 178): a small file can hold a picture that fills the
    memory. One takes up to 12 bytes a pixel while it is read, and more in some files."""

    def __post_init__(self) -> None:
        if not 0 < self.max_megapixels <= 178:  # above it, Pillow refuses
            raise UserError(f"max_megapixels is {self.max_megapixels}: use a number above 0, up to 178.")

    @property
    def max_pixels(self) -> int:
        """The same in pixels."""
        return int(self.max_megapixels * 1e6)


@contextlib.contextmanager
def open_image(
    file: str | os.PathLike[str] | BinaryIO, name: str, *, max_pixels: int = MAX_PIXELS
) -> Iterator[ImageFile.ImageFile]:
    """Open an image of one of `FORMATS`, not decoded yet, whose size has been checked; for a short block.

    Args:
        file: a path or an open file.
        name: what errors call it, such as "image 'a.png'".
        max_pixels: most width times height.

    Raises:
        UserError: it has more pixels, is no image, or cannot be decoded in the block.
    """
    Image.init()
    _register_heif()
    formats = [format for format in FORMATS if format in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, which are looked at here, and of odd metadata
            with Image.open(file, formats=formats) as image:
                require_pixels(image, name, max_pixels)
                yield image
    except ImageTooLarge:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"{name} is too large ({error}): scale it down.") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image of a known format: convert or remove it.") from error
    except MemoryError as error:
        raise UserError(f"{name} needs more memory than there is: scale it down.") from error
    except OSError as error:
        if error.filename is not None:  # of the file itself
            raise
        raise UserError(f"{name} is damaged or cut short ({error}): copy it again.") from error
    except Exception as error:  # Pillow's decoders raise what they like on broken data
        cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
        reason = str(cause) or type(cause).__name__
        raise UserError(f"{name} is damaged or cut short ({reason}): copy it again.") from error


def decode_image(
    file: str | os.PathLike[str] | BinaryIO, name: str, *, max_pixels: int = MAX_PIXELS, side: int = 0
) -> Image.Image:
    """An image as 8-bit RGB, as `to_rgb` makes it.

    Args:
        file: a path or an open file.
        name: what errors call it, such as "image 'a.png'".
        max_pixels: most width times height.
        side: of the square that the image will be scaled down to; 0 for its full size. A JPEG above `LARGE_JPEG` is
            then decoded at a half, a quarter or an eighth of its size, several times as fast, if that divides both
            sides and leaves them at least twice as long as this: CLIP's embedding has a cosine above 0.999 to that of
            the whole image.

    Raises:
        UserError: as `open_image`.
    """
    with open_image(file, name, max_pixels=max_pixels) as image:
        if side and image.width * image.height > LARGE_JPEG:
            for scale in (8, 4, 2):  # sides that it does not divide would be rounded, and the picture shifted
                if not any(image.size[i] % scale or image.size[i] < 2 * scale * side for i in (0, 1)):
                    image.draft(None, (image.width // scale, image.height // scale))  # does nothing but to JPEGs
                    break
        return to_rgb(image)


def files_below(directory: Path, suffixes: Iterable[str]) -> Iterator[Path]:
    """The files with one of `suffixes` in a directory and those inside it; of links, those to files only.

    A directory that may not be read is named on standard error.
    """
    wanted = frozenset(suffixes)

    def tell(error: OSError) -> None:
        print(f"folder {str(error.filename)!r} cannot be read ({error.strerror}): left out.", file=sys.stderr)

    for place, _, names in os.walk(directory, onerror=tell):
        for name in names:
            if os.path.splitext(name)[1].lower() in wanted:
                file = Path(place, name)
                if file.is_file():  # a pipe or a device would be waited for
                    yield file


@functools.cache
def _register_heif() -> bool:
    """Have Pillow read HEIF where pillow-heif is installed; whether it does."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return "HEIF" in Image.OPEN


def image_suffixes() -> frozenset[str]:
    """The suffixes of files that are read as images here."""
    return IMAGE_SUFFIXES | HEIF_SUFFIXES if _register_heif() else IMAGE_SUFFIXES


def images_below(directory: Path) -> list[Path]:
    """The image files in a directory and those inside it, sorted; pictures of other kinds are named (`tell_unread`)."""
    found = sorted(files_below(directory, image_suffixes() | UNREAD_SUFFIXES))
    read = [file for file in found if file.suffix.lower() in image_suffixes()]
    if len(read) < len(found):
        known = set(read)
        tell_unread([str(file) for file in found if file not in known], f"folder {str(directory)!r}")
    return read


def tell_unread(names: Sequence[str], where: str) -> None:
    """Count on standard error the pictures somewhere that are of kinds that are not read, and name the first."""
    if not names:
        return
    kinds = collections.Counter(os.path.splitext(name)[1].lower() for name in names)
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    heif = " (pip install pillow-heif reads HEIF)" if not HEIF_SUFFIXES.isdisjoint(kinds) else ""
    print(
        f"{printable(where)} has {len(names)} pictures of kinds that are not read, left out: {counted}, the first "
        f"{printable(names[0])!r}; convert them to JPEG or PNG{heif}.",
        file=sys.stderr,
    )


class ImageTooLarge(UserError):
    """An image with more pixels than are allowed."""


def require_pixels(image: Image.Image, name: str, max_pixels: int) -> None:
    """Raise ImageTooLarge when an image, or a tile of it, has more than `max_pixels` pixels; nothing is decoded."""
    tags = getattr(image, "tag_v2", None) or {}
    tile = tags.get(_TILE_WIDTH), tags.get(_TILE_LENGTH)  # TIFF: decoded whole, however small the image
    for width, height in (image.size, tile):
        if isinstance(width, int) and isinstance(height, int) and width * height > max_pixels:
            raise ImageTooLarge(
                f"{name} is too large ({width}x{height} pixels, {width * height / 1e6:.4g} megapixels of at most "
                f"{max_pixels / 1e6:.4g}): scale it down, or raise the limit of megapixels."
            )


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as 8-bit RGB: first frame, upright by its EXIF tag, over white where transparent.

    16-bit grey is scaled from [0, 65535], floating point grey from [0, 1] or else [0, 255].

    Raises:
        UserError: not a PIL image, a file that cannot be read, a mode without a meaning as colour, or no pixels.
    """
    if not isinstance(image, Image.Image):
        raise UserError(f"image is a {type(image).__name__}: give PIL images, or a float tensor (b, 3, h, w).")
    name = getattr(image, "filename", "") or "image"
    try:
        if image.tell():
            image.seek(0)
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        image = grey_to_8_bit(image)
        image = _over_white(image) if image.has_transparency_data else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{name!r} cannot be read as an image ({error}): replace or remove it.") from error
    if 0 in image.size:
        raise UserError(f"{name!r} is {image.width}x{image.height} pixels: give an image with pixels.")
    return image


def _over_white(image: Image.Image) -> Image.Image:
    """An image with alpha as RGB over white."""
    found = Image.new("RGB", image.size)
    for top, bottom in bands(*image.size):
        part = image.crop((0, top, image.width, bottom))
        part = (part.convert("LA") if part.mode == "La" else part).convert("RGBA")
        white = Image.new("RGBA", part.size, "white")
        found.paste(Image.alpha_composite(white, part).convert("RGB"), (0, top))
    return found


def grey_to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and floating point grey as mode L, which PIL's own conversion would only clip at 255.

    An image of another mode is returned as it is.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    places = list(bands(*image.size))

    def part(top: int, bottom: int) -> np.ndarray:
        return np.asarray(image.crop((0, top, image.width, bottom)))

    highest = 65535 if image.mode.startswith("I;16") else np.max([part(*rows).max() for rows in places], initial=0)
    scale = 1.0
    if image.mode.startswith("I") and highest > 255:
        scale = 255 / 65535
    elif image.mode == "F" and highest <= 1:
        scale = 255.0
    found = np.empty((image.height, image.width), np.uint8)
    for top, bottom in places:
        values = part(top, bottom).astype(np.float64) * scale
        found[top:bottom] = np.nan_to_num(values).round().clip(0, 255)
    return Image.fromarray(found)


def bands(width: int, height: int) -> Iterator[tuple[int, int]]:
    """The rows of an image in parts of at most `BAND_PIXELS` pixels, or of one row: (first, end)."""
    rows = max(1, BAND_PIXELS // max(width, 1))
    return ((top, min(top + rows, height)) for top in range(0, height, rows))
