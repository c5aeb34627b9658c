"""Further views of a training image: crops, mirrored, smaller or recompressed, as users' photographs are."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image, ImageFilter

from clipcap.data.readers.captioned import CaptionedImage

LEAST_AREA = 0.6
"""Of the image, that a crop keeps."""


def with_views(items: Sequence[CaptionedImage], views: int) -> list[CaptionedImage]:
    """`items`, and then `views` - 1 further views of each under ids of their own, with the same captions."""
    further = [
        replace(item, image_id=f"{item.image_id}#view{view}", view=view) for view in range(1, views) for item in items
    ]
    return [*items, *further]


def random_view(image: Image.Image, seed: str) -> Image.Image:
    """Another photograph that the captions of `image` fit as well: the same for the same seed, everywhere.

    A crop of at least 60% of the area, its sides' ratio changed by up to 1.25, mirrored half the time; of two in five
    only 40 to 95% of the pixels of a side are left, one in five is blurred, every second one saved as JPEG. Captions
    that name left and right do not fit a mirrored view; of Flickr8k's, 1 in 250 does.

    Args:
        image: RGB.
        seed: of the view, such as the image's id with the view's number.
    """
    rng = random.Random(seed)
    width, height = image.size
    area, ratio = rng.uniform(LEAST_AREA, 1), rng.uniform(0.8, 1.25)
    crop_width = max(1, min(width, round(width * (area * ratio) ** 0.5)))
    crop_height = max(1, min(height, round(height * (area / ratio) ** 0.5)))
    left, top = rng.randint(0, width - crop_width), rng.randint(0, height - crop_height)
    image = image.crop((left, top, left + crop_width, top + crop_height))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.4:
        scale = rng.uniform(0.4, 0.95)
        smaller = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(smaller, Image.Resampling.BICUBIC)
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(40, 90))
        image = Image.open(buffer)
        image.load()
    return image
