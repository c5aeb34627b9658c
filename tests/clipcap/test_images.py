"""Reading images: every colour mode, orientation and array type as 8-bit RGB, and what cannot be read as one line."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from clipcap.images import IMAGE_SUFFIXES, ImageError, find_images, is_url, read_image
from common.checks import UserError

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
