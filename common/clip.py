"""Frozen CLIP behind one interface, whichever library holds the weights: packaged, Hugging Face or open_clip."""

from __future__ import annotations

import os
import pickle

import torch

from common.checks import UserError
from common.encoders.hugging_face import load_hugging_face
from common.encoders.interface import FrozenCLIP
from common.encoders.interface import ImageFeatures as ImageFeatures
from common.encoders.open_clip import OPEN_CLIP_PREFIX, load_open_clip
from common.encoders.preprocess import Preprocess as Preprocess
from common.runtime import resolve_device


def load_clip(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
) -> FrozenCLIP:
    """Load a CLIP and freeze it.

    Args:
        name: "tiny" (packaged, offline); a Hugging Face id such as "openai/clip-vit-base-patch32" or a directory;
            or "open_clip:ARCH/TAG" and "open_clip:ARCH/PATH" with PATH a .pt, .bin or .safetensors file, such as
            "open_clip:RN50/openai" or "open_clip:ViT-B-32-quickgelu//data/ViT-B-32.safetensors". A tag knows
            its activation; with a path, ARCH must name it: OpenAI's weights need the "-quickgelu" kind.
        device: "auto", "cpu", "cuda", ...
        dtype: of the weights; None is float32 whatever the file holds.

    Raises:
        UserError: the name is unknown, files are missing, corrupt or of other sizes, or it is not a CLIP.
    """
    target = resolve_device(device)
    text = os.fspath(name)
    try:
        if text.startswith(OPEN_CLIP_PREFIX):
            backbone, preprocess = load_open_clip(text)
        else:
            backbone, preprocess = load_hugging_face(text)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"CLIP {text!r}: the weights file is corrupt or holds more than weights: copy it again."
        ) from error
    return FrozenCLIP(text, backbone.to(device=target, dtype=dtype or torch.float32), preprocess)
