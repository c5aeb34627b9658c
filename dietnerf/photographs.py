"""Photographs made ready for finding their cameras: upright, scaled down, and sorted by the lens that took them."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import ExifTags, Image

from common.checks import UserError, require_directory
from common.files import whole_file
from common.images import MAX_PIXELS, UNREAD_SUFFIXES, image_suffixes, open_image, tell_unread
from dietnerf.images import decode
from dietnerf.layouts import natural_order

FILM = math.hypot(36, 24)
"""Diagonal of 35 mm film in mm: the focal length "in 35 mm film" is that of the same diagonal angle of view."""
INCHES, CENTIMETRES = 25.4, 10.0
PLAUSIBLE = (0.2, 50.0)
"""Focal lengths in longest sides that a lens can have; EXIF may say anything."""
QUALITY = 95
Sharing = Literal["auto", "shared", "each"]


@dataclass(frozen=True)
class Photograph:
    """One that was made ready."""

    source: Path
    name: str
    """Of its file among those that are ready."""
    size: tuple[int, int]
    """Width and height, upright and scaled down."""
    focal: float | None
    """Focal length in pixels of that size, by its EXIF tags; None where they do not say."""
    lens: Hashable
    """What all photographs by one lens at one zoom have in common."""


@dataclass(frozen=True)
class Camera:
    """Photographs that have one set of intrinsics."""

    names: Sequence[str]
    size: tuple[int, int]
    focal: float | None
    """A first guess in pixels; None: no photograph says."""


def find_photographs(directory: Path) -> list[Path]:
    """The images in a folder, not those in folders inside it, in natural order; pictures that are not read are named.

    Raises:
        UserError: no folder, or none in it.
    """
    found = [path for path in require_directory(directory, "folder").iterdir() if path.is_file()]
    unread = UNREAD_SUFFIXES - image_suffixes()
    tell_unread(sorted(str(path) for path in found if path.suffix.lower() in unread), f"folder {str(directory)!r}")
    images = [path for path in found if path.suffix.lower() in image_suffixes()]
    if not images:
        raise UserError(f"folder {str(directory)!r} has no photographs: give one with JPEG or PNG files in it.")
    return sorted(images, key=lambda path: natural_order(path.name))


def names_of(sources: Sequence[Path]) -> list[str]:
    """Names without their suffix in which only letters, digits, dots and dashes are kept, each once: COLMAP's lists of
    images have no room for spaces."""
    found: dict[str, None] = {}
    for source in sources:
        plain = name = re.sub(r"[^\w.-]+", "_", source.stem)
        for number in range(2, len(sources) + 2):
            if name not in found:
                break
            name = f"{plain}_{number}"
        found[name] = None
    return list(found)


def prepare(
    sources: Sequence[Path],
    directory: Path,
    *,
    image_size: int,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> tuple[list[Photograph], dict[Path, str]]:
    """Write photographs upright and scaled down, as JPEG, or as PNG where they have alpha; what exists already stays.

    Args:
        sources: photographs.
        directory: for those that are ready.
        image_size: longest side in pixels; smaller ones keep their size.
        max_pixels: most pixels that are decoded.
        progress: called with the number that are done, and of how many.

    Returns:
        The photographs, and why others cannot be read.
    """
    ready, skipped = [], {}
    for number, (source, stem) in enumerate(zip(sources, names_of(sources), strict=True)):
        progress(number, len(sources))
        try:
            tags = read_tags(source, max_pixels)
            made = [path for path in (directory / f"{stem}.jpg", directory / f"{stem}.png") if path.is_file()]
            place = made[0] if made else _write(source, directory / stem, image_size, max_pixels)
            with open_image(place, f"image {str(place)!r}") as image:
                size = image.size
        except UserError as error:
            skipped[source] = str(error)
            continue
        focal = focal_length(tags, size)
        names = (ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.FocalLength)
        lens = (size, *(str(tags.get(tag, "")).strip("\0 ") for tag in names), focal and round(focal))
        ready.append(Photograph(source, place.name, size, focal, lens))
    progress(len(sources), len(sources))
    return ready, skipped


def _write(source: Path, place: Path, image_size: int, max_pixels: int) -> Path:
    """Scale an image down to the place, whose suffix says whether it has alpha."""
    image = decode(source, max_pixels)
    if image.mode == "RGBA" and image.getchannel("A").getextrema()[0] == 255:
        image = image.convert("RGB")
    scale = image_size / max(image.size)
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS, reducing_gap=3)
    alpha = image.mode == "RGBA"
    target = place.with_name(place.name + (".png" if alpha else ".jpg"))
    with whole_file(target, sync=False) as file:
        image.save(file, "PNG") if alpha else image.save(file, "JPEG", quality=QUALITY)
    return target


def read_tags(path: Path, max_pixels: int = MAX_PIXELS) -> dict[int, Any]:
    """The EXIF tags of an image, those about its exposure among them; it is not decoded.

    Raises:
        UserError: it cannot be opened.
    """
    with open_image(path, f"image {str(path)!r}", max_pixels=max_pixels) as image:
        exif = image.getexif()
        return {**exif, **exif.get_ifd(ExifTags.IFD.Exif), "width": image.width}  # type: ignore[dict-item]


def focal_length(tags: Mapping[Any, Any], size: tuple[int, int]) -> float | None:
    """Focal length in pixels of an image of this size, by its EXIF tags: the one for 35 mm film, else the one in mm
    with the sensor's pixels.

    None: they do not say, or nothing that can be.
    """
    pixels = None
    millimetres = _number(tags, ExifTags.Base.FocalLength)
    density = _number(tags, ExifTags.Base.FocalPlaneXResolution)
    if (film := _number(tags, ExifTags.Base.FocalLengthIn35mmFilm)) is not None:
        pixels = film * math.hypot(*size) / FILM
    elif millimetres is not None and density is not None:
        unit = CENTIMETRES if tags.get(ExifTags.Base.FocalPlaneResolutionUnit) == 3 else INCHES
        width = _number(tags, ExifTags.Base.ExifImageWidth) or float(tags["width"])
        turned = tags.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        pixels = millimetres * density / unit * size[turned] / width
    return pixels if pixels and PLAUSIBLE[0] < pixels / max(size) < PLAUSIBLE[1] else None


def _number(tags: Mapping[Any, Any], tag: int) -> float | None:
    try:
        value = float(tags[tag])
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return value if 0 < value < 1e9 else None


def cameras_of(photographs: Sequence[Photograph], sharing: Sharing = "auto") -> list[Camera]:
    """Which photographs have their intrinsics in common.

    Args:
        photographs: in any order.
        sharing: "auto": those by one lens at one zoom, by their EXIF tags, and of one size; "shared": all of one size;
            "each": every one has its own.
    """
    groups: dict[Hashable, list[Photograph]] = {}
    for one in photographs:
        key: Hashable = {"auto": one.lens, "shared": one.size, "each": one.name}[sharing]
        groups.setdefault(key, []).append(one)
    found = []
    for group in groups.values():
        focals = [one.focal for one in group if one.focal is not None]
        focal = statistics.median(focals) if focals else None
        found.append(Camera([one.name for one in group], group[0].size, focal))
    return found
