"""What every frozen encoder is to the applications, whichever library is behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.checks import UserError
from common.encoders.preprocess import Preprocess
from common.pretrained import ASSETS

PACKAGED = {"photo": ASSETS / "clip-photo", "tiny": ASSETS / "clip-tiny"}
"""Encoders by their packaged names."""


OPEN_CLIP_PREFIX, TIMM_PREFIX, TORCHVISION_PREFIX = PREFIXES = ("open_clip:", "timm:", "torchvision:")
"""Beginnings of the names that are neither packaged, nor directories, nor ids of the hub."""


class ImageFeatures(NamedTuple):
    """What the vision tower knows of a batch of images."""

    class_token: Float[Tensor, "b w"]
    """A ViT's class token of the last hidden state: before the final layer norm and the projection in CLIP (DietNeRF's
    choice) and wherever the library gives it so, after that norm in transformers' vision-only ViTs. Where there is no
    class token (ResNet and other convolutions, SigLIP, Swin): the mean of `patches`."""
    patches: Float[Tensor, "b n w"]
    """The patch tokens beside it, row by row, without register and distillation tokens. Convolutions: the feature map
    before the pooling, flattened. n is 0 for torchvision's classifiers, which give none."""
    embedding: Float[Tensor, "b e"]
    """Two towers: after the projection, not normalised. Vision alone: the pooled output. It is what
    `FrozenCLIP.encode_images` gives."""


class FrozenCLIP(nn.Module):
    """A CLIP, or another image encoder, whose weights never change; use `load_clip` to make one.

    It may sit inside a module that is trained: it stays in eval mode and follows `.to()`, but has no parameters
    and nothing in `state_dict()`, so no optimizer and no checkpoint ever holds it.
    """

    def __init__(self, name: str, backbone: Backbone, preprocess: Preprocess) -> None:
        super().__init__()
        self.name = name
        self.preprocess = preprocess
        backbone.requires_grad_(False).eval()
        self._unregistered = (backbone,)  # a tuple hides it from parameters(), state_dict() and train()
        self.training = False

    @property
    def image_size(self) -> int:
        """Side of the images that the vision tower sees, in pixels (s)."""
        return self.preprocess.size

    @property
    def mean(self) -> tuple[float, ...]:
        """Of the red, green and blue that `preprocess` subtracts."""
        return self.preprocess.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Of the red, green and blue that `preprocess` divides by."""
        return self.preprocess.std

    @property
    def width(self) -> int:
        """Width of embeddings (e)."""
        return self.backbone.width

    @property
    def patch_width(self) -> int:
        """Width of the vision tower's features (w)."""
        return self.backbone.patch_width

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower, for `encode_texts`."""
        return self.backbone.has_text

    @property
    def has_patches(self) -> bool:
        """Whether `ImageFeatures.patches` holds any."""
        return self.backbone.has_patches

    def require_text(self, wanted: str) -> None:
        """Raise UserError when there is no text tower, which `wanted` (an option, say) needs."""
        if not self.has_text:
            raise UserError(f"{self.name!r} has no text tower, which {wanted} needs: use a CLIP or a SigLIP.")

    def require_patches(self, wanted: str) -> None:
        """Raise UserError when there are no patch features, which `wanted` (an option, say) needs."""
        if not self.has_patches:
            raise UserError(f"{self.name!r} has no patches, which {wanted} needs: use a CLIP or another ViT.")

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    def encode_images(self, pixels: Float[Tensor, "b 3 s s"], *, packed: bool = False) -> Float[Tensor, "b e"]:
        """Embeddings, not normalised, of what `preprocess` gave. Gradients reach `pixels` when it asks for them.

        Args:
            pixels: of images.
            packed: as in `encode_image_features`.
        """
        return self.encode_image_features(pixels, packed=packed).embedding

    def encode_image_features(self, pixels: Float[Tensor, "b 3 s s"], *, packed: bool = False) -> ImageFeatures:
        """The embeddings together with the class token and patches that they are made from.

        Args:
            pixels: of images.
            packed: without gradients, and on a CPU by a second copy of the vision tower's weights that is faster there
                (`common.vision`); where there is none (a GPU, open_clip's towers), by the tower itself.

        Raises:
            UserError: `pixels` has another shape than (b, 3, s, s).
        """
        size = self.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise UserError(
                f"pixels has shape {tuple(pixels.shape)}: {self.name!r} needs (b, 3, {size}, {size}); use preprocess."
            )
        if not packed:
            return self.backbone.image_features(pixels.to(self.device, self.dtype))
        with torch.no_grad():
            return self.backbone.packed_image_features(pixels.to(self.device, self.dtype))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "b e"]:
        """Embeddings, not normalised, of texts, each cut to the tower's context length.

        Raises:
            UserError: no texts, one string instead of a list, or an encoder without a text tower.
        """
        self.require_text("encode_texts")
        if isinstance(texts, str):
            raise UserError(f"texts is the string {texts!r}: give a list of strings.")
        if not len(texts):
            raise UserError("texts is empty: give at least one text.")
        return self.backbone.text_embeddings(list(texts))

    def train(self, mode: bool = True) -> FrozenCLIP:
        """Stays in eval mode."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> FrozenCLIP:
        """Stays frozen."""
        return self

    @property
    def backbone(self) -> Backbone:
        """The towers as their library holds them: to be read, for this module hides them from all training."""
        return self._unregistered[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenCLIP:
        """What `.to()`, `.cuda()`, `.bfloat16()`, ... call, also from a module around this one."""
        self.backbone._apply(fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.name!r}, image_size={self.image_size}, width={self.width}, patch_width={self.patch_width}"


class Backbone(nn.Module, ABC):
    """The vision tower, and the text tower where there is one, as one library holds them."""

    width: int
    patch_width: int
    has_text: bool = True
    has_patches: bool = True

    @abstractmethod
    def image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> ImageFeatures: ...

    def packed_image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> ImageFeatures:
        """`image_features` by a copy that is for inference alone, where there is one."""
        return self.image_features(pixels)

    def text_embeddings(self, texts: list[str]) -> Float[Tensor, "b e"]:
        """Only asked for where `has_text`."""
        raise NotImplementedError


def from_map(features: Float[Tensor, "b w y x"]) -> Float[Tensor, "b n w"]:
    """A feature map as patches, row by row."""
    return features.flatten(2).transpose(1, 2)


def widths(backbone: Backbone, size: int) -> tuple[int, int]:
    """Widths of embedding and patches, from one image of `size` pixels."""
    backbone.eval()
    weight = next(backbone.parameters())
    with torch.no_grad():
        found = backbone.image_features(torch.zeros(1, 3, size, size, dtype=weight.dtype, device=weight.device))
    return found.embedding.shape[-1], found.patches.shape[-1]
