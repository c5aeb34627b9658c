"""Images as the pixels that an encoder's weights were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from common.checks import UserError
from common.images import to_rgb as to_rgb
from common.pretrained import SWITCH, Rule, checked, number, one_of, whole

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
WIDEST_ASPECT = 32
LARGEST = 8192
"""Side of an encoder's square in pixels, far above that of any there is."""


def _three(least: float, most: float) -> Rule:
    one = number(least, most)
    return Rule(
        lambda value: isinstance(value, tuple) and len(value) == 3 and all(map(one.holds, value)),
        f"three numbers from {least} to {most}, for pixels from 0 to 1",
    )


PREPROCESSING = {
    "size": whole(1, LARGEST),
    "mean": _three(0, 1),
    "std": _three(0.001, 10),
    "interpolation": one_of("bicubic", "bilinear", "nearest"),
    "squash": SWITCH,
}
"""What the fields of `Preprocess` may be."""


@dataclass(frozen=True)
class Preprocess:
    """Images -> CLIP's pixels. Holds no weights, so a DataLoader's workers can carry it."""

    size: int
    """Side of the square that the vision tower sees, in pixels."""
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"
    squash: bool = False
    """Resize both sides to `size`; otherwise the shorter side, and crop the centre."""

    def __post_init__(self) -> None:
        checked(asdict(self), PREPROCESSING, "preprocessing")

    def __call__(
        self, images: Image.Image | Sequence[Image.Image] | Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 3 s s"]:
        """Resize with antialiasing, crop the centre, rescale and normalise (Radford et al. 2021).

        Args:
            images: PIL images of any size and mode (the first frame, upright, over white), one or many; or a
                float tensor in [0, 1], through which gradients flow. The tensor's resize is not clipped to [0, 1]
                as PIL's is, so that no pixel loses its gradient.

        Returns:
            float32; on the CPU for PIL images, on their own device for tensors.

        Raises:
            UserError: no images, wrong shape or type, NaN, values outside [0, 1], a file that cannot be read.
        """
        from torchvision.transforms import functional

        if isinstance(images, Tensor):
            _check_image_tensor(images)
            pixels = self._fit(images.float())
        else:
            several = [images] if isinstance(images, Image.Image) else list(images)
            if not several:
                raise UserError("images is empty: give at least one image.")
            pixels = torch.stack([functional.to_tensor(self._fit(to_rgb(image))) for image in several])
        return functional.normalize(pixels, list(self.mean), list(self.std))

    def _fit(self, image: Any) -> Any:
        """Resize and crop a PIL image or a tensor to the square."""
        from torchvision.transforms import functional

        kind = functional.InterpolationMode(self.interpolation)
        if self.squash:
            return functional.resize(image, [self.size, self.size], kind, antialias=True)
        _, height, width = functional.get_dimensions(image)
        longest = WIDEST_ASPECT * min(height, width)
        if max(height, width) > longest:  # a strip: the crop would drop all but its middle after a huge resize
            image = functional.center_crop(image, [min(height, longest), min(width, longest)])
        return functional.center_crop(
            functional.resize(image, [self.size], kind, antialias=True), [self.size, self.size]
        )


def _check_image_tensor(images: Tensor) -> None:
    """Raise UserError unless `images` is a float batch (b, 3, h, w) of values in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise UserError(f"images has shape {tuple(images.shape)}: give (b, 3, h, w).")
    if not images.is_floating_point():
        raise UserError(f"images has dtype {images.dtype}: give floats in [0, 1].")
    low, high = (value.item() for value in images.detach().aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also NaN
        raise UserError(f"images has values from {low:.4g} to {high:.4g}: give finite values in [0, 1].")
