"""Frozen image encoders behind one interface, whichever library holds the weights.

They are CLIP, its relatives with two towers, and vision towers alone; packaged, or by transformers, open_clip, timm and
torchvision.
"""

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
from common.encoders.timm import TIMM_PREFIX, load_timm
from common.encoders.torchvision import TORCHVISION_PREFIX, load_torchvision
from common.runtime import resolve_device

NAMES = "tiny, a Hugging Face id or directory, open_clip:ARCH/TAG-or-path, timm:NAME[/PATH] or torchvision:NAME[/PATH]"
"""What `load_clip` takes, in words."""
_BY_PREFIX = {
    OPEN_CLIP_PREFIX: load_open_clip,
    TIMM_PREFIX: load_timm,
    TORCHVISION_PREFIX: load_torchvision,
}
PREFIXES = tuple(_BY_PREFIX)
"""Beginnings of names that are neither ids nor directories."""


def load_clip(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
) -> FrozenCLIP:
    """Load an image encoder and freeze it.

    Args:
        name: "tiny" (packaged, offline); a Hugging Face id such as "openai/clip-vit-base-patch32" or a directory, of
            any family in `common.encoders.families`;
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
        load = next((load for prefix, load in _BY_PREFIX.items() if text.startswith(prefix)), load_hugging_face)
        backbone, preprocess = load(text)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"CLIP {text!r}: the weights file is corrupt or holds more than weights: copy it again."
        ) from error
    return FrozenCLIP(text, backbone.to(device=target, dtype=dtype or torch.float32), preprocess)
