"""Pictures for the tests of encoders."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIZES = [(37, 53), (101, 38), (225, 133), (32, 32), (64, 47), (40, 400)]
"""Width and height, odd and even, near the encoders' own and far from it."""


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours with some grain, as a photograph has."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
    grain = generator.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


def as_tensor(image: Image.Image) -> Tensor:
    """The same as numbers (1, 3, h, w) from 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
