"""Further views of training images: what they may change, and that they are the same everywhere."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipcap.data.embeddings import Pixels
from clipcap.data.readers.captioned import CaptionedImage
from clipcap.data.views import LEAST_AREA, random_view, with_views
from clipcap.training.settings import TrainConfig, check
from common.checks import UserError
from common.encoders.preprocess import Preprocess


def test_ids_and_captions():
    items = [CaptionedImage(f"{n}.jpg", Path(f"{n}.jpg"), (f"a {n}", f"the {n}"), "train") for n in range(3)]
    assert with_views(items, 1) == items
    found = with_views(items, 3)
    assert found[:3] == items and len({item.image_id for item in found}) == 9
    assert [item.view for item in found] == [0] * 3 + [1] * 3 + [2] * 3
    assert [(item.path, item.captions) for item in found[3:6]] == [(item.path, item.captions) for item in items]


@pytest.mark.parametrize("size", [(200, 120), (1, 1), (3, 400)])
def test_views_are_large_parts_of_the_image_and_all_of_its_colours(size):
    image = Image.new("RGB", size, (200, 100, 50))
    for seed in range(50):
        view = random_view(image, str(seed))
        assert view.mode == "RGB" and view.width * view.height >= 1
        assert np.abs(np.asarray(view).astype(int) - (200, 100, 50)).max() <= 8
    if size == (200, 120):
        smallest = min(random_view(image, str(s)).width * random_view(image, str(s)).height for s in range(50))
        assert smallest >= 0.9 * LEAST_AREA * 0.4**2 * 200 * 120


def test_half_of_the_views_are_mirrored():
    image = Image.merge("RGB", [Image.linear_gradient("L").rotate(90)] * 3)
    pixels = [np.asarray(random_view(image, str(seed)), dtype=float) for seed in range(100)]
    mirrored = sum(view[:, 0].mean() > view[:, -1].mean() for view in pixels)
    assert 35 <= mirrored <= 65


def test_a_view_is_the_same_each_time_and_the_image_itself_is_view_0(tmp_path):
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    items = with_views([CaptionedImage("a.png", path, ("a",), "train")], 3)
    preprocess = Preprocess(32)
    first, again = ([Pixels(items, preprocess)[n][1] for n in range(3)] for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert first[0].equal(preprocess(Image.open(path))[0])
    assert not first[0].equal(first[1]) and not first[1].equal(first[2])


def test_views_of_texts_are_refused():
    with pytest.raises(UserError, match="views is 2 with text_only"):
        check(TrainConfig(Path("x"), views=2, text_only=True))
    with pytest.raises(UserError, match="views is 0"):
        check(TrainConfig(Path("x"), views=0))
