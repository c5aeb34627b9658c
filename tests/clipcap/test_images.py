"""Reading images: every colour mode, orientation and array type as 8-bit RGB, and what cannot be read as one line."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from clipcap.cli import main
from clipcap.data.images import ImageError, find_images, is_url, read_image
from common import images as opening
from common.checks import UserError
from common.clip import load_clip
from common.images import FORMATS, IMAGE_SUFFIXES, LARGE_JPEG, ImageLimit

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def image_of(mode: str, colour, size=(8, 6)) -> Image.Image:
    return Image.new(mode, size, colour)


def palette(transparent: bool) -> Image.Image:
    image = image_of("P", 1)
    image.putpalette([0, 0, 0, *RED])
    if transparent:
        image.info["transparency"] = 1
    return image


MODES = {
    "rgb.png": (image_of("RGB", (10, 20, 30)), (10, 20, 30)),
    "grey.png": (image_of("L", 77), (77, 77, 77)),
    "bit.png": (image_of("1", 1), WHITE),
    "bit.bmp": (image_of("1", 0), (0, 0, 0)),
    "cmyk.jpg": (image_of("CMYK", (0, 255, 255, 0)), RED),
    "cmyk.tif": (image_of("CMYK", (255, 255, 0, 0)), BLUE),
    "ycbcr.jpg": (image_of("RGB", BLUE), BLUE),
    "lab.tif": (image_of("LAB", (255, 128, 128)), WHITE),
    "palette.png": (palette(False), RED),
    "clear_palette.png": (palette(True), WHITE),
    "palette.gif": (palette(False), RED),
    "clear_grey.png": (image_of("LA", (100, 0)), WHITE),
    "half_grey.png": (image_of("LA", (0, 128)), (127, 127, 127)),
    "clear.png": (image_of("RGBA", (1, 2, 3, 0)), WHITE),
    "half.webp": (image_of("RGBA", (255, 0, 0, 128)), (255, 127, 127)),
    "opaque.png": (image_of("RGBA", (9, 8, 7, 255)), (9, 8, 7)),
    "sixteen.png": (image_of("I;16", 40000), (156, 156, 156)),
    "sixteen.tif": (image_of("I;16", 65535), WHITE),
    "whole.tif": (image_of("I", 257 * 50), (50, 50, 50)),
    "float.tif": (image_of("F", 0.5), (128, 128, 128)),
    "photo.pgm": (image_of("L", 3), (3, 3, 3)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_colour_mode_is_rgb(name, tmp_path):
    image, expected = MODES[name]
    image.save(tmp_path / name)
    for source in (tmp_path / name, str(tmp_path / name), image):
        found = read_image(source)
        assert found.mode == "RGB" and found.size == (8, 6)
        difference = np.abs(np.asarray(found).astype(int) - np.array(expected)).max()
        assert difference <= (4 if name.endswith((".jpg", ".webp")) else 1), found.getpixel((0, 0))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_an_animation_is_its_first_frame(suffix, tmp_path):
    path = tmp_path / f"moving.{suffix}"
    frames = [image_of("RGB", RED), image_of("RGB", BLUE)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with Image.open(path) as image:
        assert image.n_frames == 2
        image.seek(1)
        for source in (path, image):
            pixels = np.asarray(read_image(source)).astype(int)
            assert np.abs(pixels - RED).max() <= 4


# Where the top left pixel of the picture lies in a file of each EXIF orientation.
CORNERS = {1: (0, 0), 2: (5, 0), 3: (5, 3), 4: (0, 3), 5: (0, 0), 6: (0, 3), 7: (5, 3), 8: (5, 0)}


@pytest.mark.parametrize("orientation", CORNERS)
def test_photographs_are_upright(orientation, tmp_path):
    image = image_of("RGB", (0, 0, 0), size=(6, 4))
    image.putpixel(CORNERS[orientation], WHITE)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "photo.png", exif=exif)
    found = read_image(tmp_path / "photo.png")
    assert found.size == ((6, 4) if orientation < 5 else (4, 6))
    assert found.getpixel((0, 0)) == WHITE
    assert np.asarray(found).sum() == 3 * 255


def test_files_that_are_cut_short_anywhere(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "gif", "bmp", "webp", "tif"):
        whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
        Image.fromarray(pixels).save(whole)
        data = whole.read_bytes()
        for share in (0.0, 0.02, 0.3, 0.9):
            cut.write_bytes(data[: int(share * len(data))])
            with pytest.raises(ImageError) as caught:
                read_image(cut)
            assert cut.name in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").touch()
    for name, message in (
        ("text.jpg", "not an image"), ("empty.png", "empty|not an image"), ("gone.png", "gone.png"), ("", "directory")
    ):  # fmt: skip
        with pytest.raises(ImageError, match=message):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="image is a int"):
        read_image(3)


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    image_of("RGB", RED, size=(30, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="too large"):
        read_image(tmp_path / "large.png")


PICTURE = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int32", "uint64", "int64", ">i4", ">u8"])
def test_arrays_of_integers(dtype):
    assert np.array_equal(read_image(PICTURE.astype(dtype)), PICTURE)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_arrays_of_floats(dtype):
    assert np.array_equal(read_image((PICTURE / 255).astype(dtype)), PICTURE)


def test_other_arrays():
    assert np.array_equal(read_image(PICTURE.astype(np.uint16) * 257), PICTURE)
    assert np.array_equal(read_image(PICTURE > 99), 255 * (PICTURE > 99))
    grey = PICTURE[..., 0]
    for array in (grey, grey[..., None], np.asfortranarray(grey)):
        assert np.array_equal(read_image(array), np.repeat(grey[..., None], 3, 2))
    assert np.array_equal(read_image(PICTURE[::-1, ::2]), PICTURE[::-1, ::2])
    clear = np.concatenate([PICTURE, np.zeros_like(PICTURE[..., :1])], -1)
    assert (np.asarray(read_image(clear)) == 255).all()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 4)), "shape"), (np.zeros((4, 4, 2)), "shape"), (np.zeros(4), "shape"), (np.zeros(()), "shape"),
        (np.zeros((2, 4, 4, 3)), "shape"), (np.full((4, 4), 256), "dtype"), (np.full((4, 4), -1), "dtype"),
        (np.full((4, 4), np.nan), "floats"), (np.full((4, 4), np.inf), "floats"), (np.full((4, 4), 1.5), "floats"),
        (np.zeros((4, 4), complex), "dtype"), (np.full((4, 4), "a"), "dtype"), (np.full((4, 4), None), "dtype"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_images(array, message):
    with pytest.raises(ImageError, match=message):
        read_image(array)


def test_finding_images(tmp_path):
    (tmp_path / "inside" / "deep.jpg").mkdir(parents=True)  # a folder may be called so
    names = ["b.JPG", "a.png", "inside/c.webp", "inside/deep.jpg/d.tiff"]
    for name in (*names, "notes.txt", "inside/captions.csv"):
        (tmp_path / name).touch()
    inside = sorted(tmp_path / name for name in names)
    assert find_images([tmp_path]) == inside
    given = ["http://a.org/b.png", tmp_path / "notes.txt", tmp_path]
    assert find_images(given) == [*given[:2], *inside]
    assert is_url("HTTPS://a.org") and not is_url("ftp://a.org") and not is_url(tmp_path)
    (tmp_path / "none").mkdir()
    for paths, message in (([], "no images"), ([tmp_path / "none"], "holds no image")):
        with pytest.raises(UserError, match=message):
            find_images(paths)
    assert {".jpg", ".png", ".webp"} <= IMAGE_SUFFIXES


def test_pixels_are_counted_before_anything_is_decoded(tmp_path, monkeypatch):
    names = ("large.png", "large.gif", "large.tif", "large.jpg", "large.webp", "large.bmp")
    for name in names:
        Image.new("L", (50, 21)).save(tmp_path / name)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    for name in names:
        with pytest.raises(ImageError, match="50x21 pixels") as caught:
            read_image(tmp_path / name, max_pixels=1000)
        assert "scale it down" in str(caught.value) and "\n" not in str(caught.value)
    lazy = Image.open(tmp_path / "large.png")
    with pytest.raises(ImageError, match="too large"):
        read_image(lazy, max_pixels=1000)


def test_a_picture_at_the_limit_is_read_and_one_pixel_more_is_not(tmp_path):
    Image.new("L", (50, 20)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=1000).size == (50, 20)
    with pytest.raises(ImageError, match="too large"):
        read_image(tmp_path / "a.png", max_pixels=999)


@pytest.mark.parametrize("megapixels", ["0", "-1", "nan", "inf", "1e300", "179"])
def test_a_limit_that_cannot_be_is_named(megapixels, capsys, tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match="2"):
        main(["caption", str(tmp_path / "a.png"), "--max-megapixels", megapixels])
    assert f"max_megapixels is {float(megapixels)}: use a number above 0" in capsys.readouterr().err
    assert ImageLimit(178).max_pixels == 178_000_000 and ImageLimit().max_pixels == 100_000_000


def tile(width, height, side):
    """A TIFF of few pixels that is stored as one tile of side x side."""
    data = zlib.compress(bytes(side * side))
    tags = [(256, 3, width), (257, 3, height), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), (322, 4, side),
            (323, 4, side), (324, 4, 8), (325, 4, len(data))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_small_tiff_of_a_huge_tile_is_refused(tmp_path):
    (tmp_path / "small.tif").write_bytes(tile(10, 10, 16))
    assert read_image(tmp_path / "small.tif").size == (10, 10)
    (tmp_path / "huge.tif").write_bytes(tile(10, 10, 2048))
    with pytest.raises(ImageError, match="2048x2048"):
        read_image(tmp_path / "huge.tif", max_pixels=1_000_000)


MEMORY = """
import resource, sys
from clipcap.data.images import read_image
read_image(sys.argv[1])  # what is imported on the way
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = read_image(sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (image.width * image.height))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGBA", "RGB", "I;16", "LA", "1"])
def test_the_memory_that_a_large_picture_takes(mode, tmp_path):
    """At most 12 bytes a pixel, as the help of --max-megapixels says."""
    for name, size in (("small.png", (8, 8)), ("large.png", (4000, 3000))):
        image = Image.new("RGBA" if mode == "LA" else mode, size).convert(mode)
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / name, compress_level=1, exif=exif)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "small.png"), str(tmp_path / "large.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 13, done.stdout


@pytest.mark.parametrize("array", [np.float64, np.float32, np.uint16, np.bool_])
def test_an_array_is_converted_in_parts(array, monkeypatch):
    whole = np.random.default_rng(2).random((50, 40, 3)) if array != np.uint16 else PICTURE.astype(np.uint16) * 257
    whole = whole > 0.5 if array == np.bool_ else whole.astype(array)
    expected = np.asarray(read_image(whole))
    monkeypatch.setattr(opening, "BAND_PIXELS", 97)
    assert np.array_equal(read_image(whole), expected)


@pytest.mark.parametrize("name", MODES)
def test_images_are_converted_in_parts(name, monkeypatch):
    image, _ = MODES[name]
    expected = np.asarray(read_image(image))
    monkeypatch.setattr(opening, "BAND_PIXELS", 20)
    assert np.array_equal(read_image(image), expected)


def test_formats_that_start_programs_or_are_never_used_are_not_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png", "TGA")
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png", "PCX")
    for name in ("a.png", "b.png", "c.png"):
        with pytest.raises(ImageError, match="known format"):
            read_image(tmp_path / name)
    assert not {"EPS", "PSD", "FLI", "ICNS", "WMF"} & set(FORMATS)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_text_that_unpacks_to_much_is_refused(kind, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    packed = zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 1))
    body = b"key\0\1\0\0\0" + packed if kind == b"iTXt" else b"key\0\0" + packed
    (tmp_path / "a.png").write_bytes(data[:33] + chunk(kind, body) + data[33:])
    with pytest.raises(ImageError, match=r"a\.png.*damaged"):
        read_image(tmp_path / "a.png")


def photograph(path, size, **options):
    """Smooth shapes and a little noise, as a camera's file."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = np.resize(rng.integers(-8, 9, 10007).astype(np.int16), (size[1], size[0], 1))
    Image.fromarray((np.asarray(small) + noise).clip(0, 255).astype(np.uint8)).save(path, **options)


def test_a_large_jpeg_is_decoded_at_a_scale_that_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr("common.images.LARGE_JPEG", 1_000_000)
    path, clip = tmp_path / "photo.jpg", load_clip("tiny", device="cpu")
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(path, (1280, 960), quality=88, exif=exif)
    whole = read_image(path)
    assert whole.size == (960, 1280)
    widths = [read_image(path, side=side).width for side in (30, 60, 65, 150, 240, 241)]
    assert widths == [120, 120, 240, 480, 480, 960]
    few, many = (
        clip.encode_images(clip.preprocess(image)) for image in (read_image(path, side=clip.image_size), whole)
    )
    assert torch.cosine_similarity(few, many).item() > 0.999


def test_other_images_are_the_same_at_every_scale(tmp_path, monkeypatch):
    assert LARGE_JPEG == 4_000_000
    monkeypatch.setattr("common.images.LARGE_JPEG", 40_000)
    small, odd, png = tmp_path / "small.jpg", tmp_path / "odd.jpg", tmp_path / "a.png"
    photograph(small, (200, 200))
    photograph(odd, (251, 191))  # at half its size it would not be the same picture
    photograph(png, (240, 200))
    for path in (small, odd, png):
        assert np.array_equal(read_image(path, side=32), read_image(path))


def test_finding_images_meets_no_loop_and_waits_for_nothing(tmp_path, capsys, monkeypatch):
    inside = tmp_path / "inside"
    inside.mkdir()
    names = ["new\nline.png", os.fsdecode(b"not-utf8-\xff.jpg"), "plain.png"]
    for name in names:
        (inside / name).touch()
    (inside / "loop").symlink_to(tmp_path)
    (inside / "linked.png").symlink_to(inside / "plain.png")
    (inside / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(inside / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(inside)  # a socket's path is short
        server.bind("socket.jpg")
        assert sorted(file.name for file in find_images([tmp_path])) == sorted([*names, "linked.png"])
        for name in ("pipe.jpg", "socket.jpg", "/dev/zero"):
            with pytest.raises(ImageError, match="pipe, a socket or a device"):
                read_image(inside / name)
    scandir = os.scandir

    def refuse(place):
        if str(place).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    (inside / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    assert len(find_images([tmp_path])) == 4
    assert "closed' cannot be read (Permission denied)" in capsys.readouterr().err
