"""Images of every mode become upright RGB."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from common.encoders.preprocess import Preprocess
from common.images import to_rgb

RED = (200, 30, 20)


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *RED])
    image.paste(0, (0, 0, 4, 8))
    image.info["transparency"] = 0
    return image


def animated() -> Image.Image:
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255), (0, 255, 0))]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    image = Image.open(file)
    image.seek(2)
    return image


def rotated() -> Image.Image:
    file = io.BytesIO()
    image = Image.new("RGB", (8, 4), RED)
    exif = image.getexif()
    exif[0x0112] = 6  # turn right
    image.paste((0, 0, 0), (0, 0, 4, 4))  # left half black: on top once upright
    image.save(file, "PNG", exif=exif)
    return Image.open(file)


@pytest.mark.parametrize(
    ("image", "left", "right"),
    [
        (Image.new("RGB", (8, 8), RED), RED, RED),
        (Image.new("RGB", (8, 8), RED).convert("CMYK"), RED, RED),
        (Image.new("RGB", (8, 8), RED).convert("YCbCr"), RED, RED),
        (Image.new("RGB", (8, 8), RED).convert("HSV"), RED, RED),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), (255,) * 3, (255,) * 3),
        (Image.new("RGBA", (8, 8), (*RED, 255)), RED, RED),
        (Image.new("RGBA", (8, 8), (*RED, 255)).convert("RGBa"), RED, RED),
        (Image.new("LA", (8, 8), (0, 128)), (127,) * 3, (127,) * 3),
        (Image.new("LA", (8, 8), (90, 255)).convert("La"), (90,) * 3, (90,) * 3),
        (palette_with_transparency(), (255,) * 3, RED),
        (palette_with_transparency().convert("PA"), (255,) * 3, RED),
        (Image.new("L", (8, 8), 90), (90,) * 3, (90,) * 3),
        (Image.new("1", (8, 8), 1), (255,) * 3, (255,) * 3),
        (Image.new("I;16", (8, 8), 90 * 257), (90,) * 3, (90,) * 3),
        (Image.new("I", (8, 8), 90 * 257), (90,) * 3, (90,) * 3),
        (Image.new("I", (8, 8), 90), (90,) * 3, (90,) * 3),
        (Image.new("F", (8, 8), 90 / 255), (90,) * 3, (90,) * 3),
        (animated(), RED, RED),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_becomes_rgb(image, left, right):
    found = np.asarray(to_rgb(image)).astype(int)
    assert found.shape == (8, 8, 3)
    assert np.abs(found[4, 1] - left).max() <= 3
    assert np.abs(found[4, 6] - right).max() <= 3
    assert Preprocess(8)(image).isfinite().all()


def test_exif_orientation_is_applied():
    found = np.asarray(to_rgb(rotated()))
    assert found.shape == (8, 4, 3)
    assert tuple(found[0, 0]) == (0, 0, 0)
    assert tuple(found[7, 3]) == RED


def test_sixteen_bit_grey_keeps_its_steps():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(4, 0)
    found = np.asarray(to_rgb(Image.fromarray(ramp)))[0, :, 0]
    np.testing.assert_allclose(found, ramp[0] / 257, atol=0.51)
