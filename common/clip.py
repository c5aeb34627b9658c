"""Frozen image encoders behind one interface, whichever library holds the weights.

They are CLIP, its relatives with two towers, and vision towers alone; packaged, or by transformers, open_clip, timm and
torchvision.
"""

from __future__ import annotations

import os
import pickle

import torch

from common.checks import UserError
from common.encoders.interface import (
    OPEN_CLIP_PREFIX,
    TIMM_PREFIX,
    TORCHVISION_PREFIX,
    Backbone,
    FrozenCLIP,
)
from common.encoders.interface import ImageFeatures as ImageFeatures
from common.encoders.preprocess import Preprocess as Preprocess
from common.runtime import resolve_device


def load_clip(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
) -> FrozenCLIP:
    """Load an image encoder and freeze it.

    Args:
        name: "photo" or "tiny" (packaged, offline); a Hugging Face id such as "openai/clip-vit-base-patch32" or a
            directory, of any family in `common.encoders.families`;
            or "open_clip:ARCH/TAG" and "open_clip:ARCH/PATH" with PATH a .pt, .bin or .safetensors file, such as
            "open_clip:RN50/openai" or "open_clip:ViT-B-32-quickgelu//data/ViT-B-32.safetensors". A tag knows
            its activation; with a path, ARCH must name it: OpenAI's weights need the "-quickgelu" kind;
            or "timm:NAME" and "torchvision:NAME", whose weights are fetched, "timm:NAME/PATH" and
            "torchvision:NAME/PATH", without a text tower.
        device: "auto", "cpu", "cuda", ...
        dtype: of the weights; None is float32 whatever the file holds.

    Raises:
        UserError: the name is unknown, files are missing, corrupt or of other sizes, or it is no image encoder.
    """
    target = resolve_device(device)
    text = os.fspath(name)
    try:
        backbone, preprocess = _load(text)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"CLIP {text!r}: the weights file is corrupt or holds more than weights: copy it again."
        ) from error
    return FrozenCLIP(text, backbone.to(device=target, dtype=dtype or torch.float32), preprocess)


def _load(name: str) -> tuple[Backbone, Preprocess]:
    """By the library that a name says; each is imported when it is asked for."""
    if name.startswith(OPEN_CLIP_PREFIX):
        from common.encoders.open_clip import load_open_clip

        return load_open_clip(name)
    if name.startswith(TIMM_PREFIX):
        from common.encoders.timm import load_timm

        return load_timm(name)
    if name.startswith(TORCHVISION_PREFIX):
        from common.encoders.torchvision import load_torchvision

        return load_torchvision(name)
    from common.encoders.hugging_face import load_hugging_face

    return load_hugging_face(name)
