"""Images as the pixels that an encoder's weights were trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
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
    "interpolation": one_of("bicubic", "bilinear", "nearest", "lanczos"),
    "squash": SWITCH,
    "resize": whole(1, LARGEST) | None,
    "pad": SWITCH,
    "fill": _three(0, 255),
    "in_floats": SWITCH,
    "crop_down": SWITCH,
}
"""What the fields of `Preprocess` may be."""


@dataclass(frozen=True)
class Preprocess:
    """Images -> an encoder's pixels. Holds no weights, so a DataLoader's workers can carry it."""

    size: int
    """Side of the square that the vision tower sees, in pixels."""
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"
    squash: bool = False
    """Resize both sides; otherwise the shorter side."""
    resize: int | None = None
    """What sides are resized to before the centre is cropped, in pixels; None is `size`."""
    pad: bool = False
    """Resize the longer side, and fill what is then missing of the square."""
    fill: tuple[float, ...] = (0, 0, 0)
    """Red, green and blue of what `pad` fills, from 0 to 255."""
    in_floats: bool = False
    """Resize numbers, as DINOv3 does, instead of 8-bit colours."""
    crop_down: bool = False
    """Half a pixel beside the crop's centre is rounded down, as transformers does, instead of to even."""

    def __post_init__(self) -> None:
        checked(asdict(self), PREPROCESSING, "preprocessing")
        if self.squash and self.pad:
            raise UserError("preprocessing: squash and pad are both true: use one of them.")
        if self.resize is not None and self.resize < self.size:
            raise UserError(f"preprocessing: resize is {self.resize}: use at least size {self.size}.")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocess:
        """What `to_dict` gave, also after JSON, which has no tuples."""
        given: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in fields.items()}
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The fields for a file; those that most encoders do not need are left out, so old files compare equal."""
        late = {field.name: field.default for field in dataclass_fields(self)[5:]}
        return {name: value for name, value in asdict(self).items() if name not in late or value != late[name]}

    def __call__(
        self, images: Image.Image | Sequence[Image.Image] | Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 3 s s"]:
        """Resize with antialiasing, crop the centre, rescale and normalise (Radford et al. 2021).

        Args:
            images: PIL images of any size and mode (the first frame, upright, over white), one or many; or a
                float tensor in [0, 1], through which gradients flow. The tensor's resize is not clipped to [0, 1]
                as PIL's is, so that no pixel loses its gradient; nor is it rounded to 8 bits.

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
            rgb = map(to_rgb, several)
            if self.in_floats:
                pixels = torch.cat([self._fit(functional.to_tensor(image)[None]) for image in rgb])
            else:
                pixels = torch.stack([functional.to_tensor(self._fit(image)) for image in rgb])
        return functional.normalize(pixels, list(self.mean), list(self.std))

    def _fit(self, image: Any) -> Any:
        """Resize and crop a PIL image or a tensor to the square."""
        from torchvision.transforms import functional

        side = self.resize or self.size
        _, height, width = functional.get_dimensions(image)
        if self.squash:
            return self._crop(self._resize(image, side, side))
        if self.pad:
            ratio = max(height, width) / side
            return self._crop(self._resize(image, *(max(1, round(x / ratio)) for x in (height, width))))
        longest = WIDEST_ASPECT * min(height, width)
        if max(height, width) > longest:  # a strip: the crop would drop all but its middle after a huge resize
            height, width = min(height, longest), min(width, longest)
            image = functional.center_crop(image, [height, width])
        short = min(height, width)
        return self._crop(self._resize(image, int(side * height / short), int(side * width / short)))

    def _resize(self, image: Any, height: int, width: int) -> Any:
        """A PIL image or a tensor (b, 3, h, w), antialiased."""
        from torchvision.transforms import functional

        name = self.interpolation
        if isinstance(image, Tensor) and name == "lanczos":
            return resize_lanczos(image, height, width)
        if isinstance(image, Tensor) and name == "nearest":
            name = "nearest-exact"  # PIL's
        kind = functional.InterpolationMode(name)
        return functional.resize(image, [height, width], kind, antialias=True)

    def _crop(self, image: Any) -> Any:
        """The centre of a PIL image or a tensor; what lies outside is filled."""
        from torchvision.transforms import functional

        _, height, width = functional.get_dimensions(image)
        down, across = max(0, self.size - height), max(0, self.size - width)
        if down or across:
            image = self._bordered(image, (across // 2, down // 2, (across + 1) // 2, (down + 1) // 2))
        whole_pixel = int if self.crop_down else round
        top, left = (whole_pixel(max(0, x - self.size) / 2) for x in (height, width))
        return functional.crop(image, top, left, self.size, self.size)

    def _bordered(self, image: Any, border: tuple[int, int, int, int]) -> Any:
        """With `fill` to the left, above, to the right and below."""
        from torchvision.transforms import functional

        if not isinstance(image, Tensor):
            return functional.pad(image, list(border), fill=tuple(round(value) for value in self.fill))
        colours = zip(image.unbind(1), self.fill, strict=True)
        return torch.stack([functional.pad(x, list(border), fill=round(value) / 255) for x, value in colours], 1)


def resize_lanczos(images: Float[Tensor, "b c h w"], height: int, width: int) -> Float[Tensor, "b c y x"]:
    """Resize by Lanczos' kernel of 3 lobes with antialiasing, as PIL does but for its rounding to 8 bits."""
    rows, columns = (_lanczos(a, b).to(images) for a, b in ((images.shape[2], height), (images.shape[3], width)))
    return rows @ images @ columns.T


def _lanczos(given: int, wanted: int) -> Float[Tensor, "wanted given"]:
    """Weights of the given pixels of a line in each of the wanted ones: sinc(x)·sinc(x/3), |x| < 3, each row of sum 1.

    Pixels further than PIL's support, which ends at whole pixels, have none.
    """
    ratio = given / wanted
    scale = max(1.0, ratio)
    centres = (torch.arange(wanted, dtype=torch.float64) + 0.5)[:, None] * ratio
    places = torch.arange(given, dtype=torch.float64)[None]
    first, last = (centres - 3 * scale + 0.5).floor(), (centres + 3 * scale + 0.5).floor()
    x = (places + 0.5 - centres) / scale
    weights = torch.sinc(x) * torch.sinc(x / 3) * (x.abs() < 3) * (places >= first) * (places < last)
    return weights / weights.sum(1, keepdim=True)


def _check_image_tensor(images: Tensor) -> None:
    """Raise UserError unless `images` is a float batch (b, 3, h, w) of values in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise UserError(f"images has shape {tuple(images.shape)}: give (b, 3, h, w).")
    if not images.is_floating_point():
        raise UserError(f"images has dtype {images.dtype}: give floats in [0, 1].")
    low, high = (value.item() for value in images.detach().aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also NaN
        raise UserError(f"images has values from {low:.4g} to {high:.4g}: give finite values in [0, 1].")
