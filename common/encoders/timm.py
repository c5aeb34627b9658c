"""Vision towers by timm, which only this file imports, and only when one is asked for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection
from typing import Any

from jaxtyping import Float
from torch import Tensor

from common.checks import UserError
from common.encoders.checkpoint import put_in, read_weights, split_name
from common.encoders.interface import TIMM_PREFIX, Backbone, ImageFeatures, from_map, widths
from common.encoders.preprocess import Preprocess
from common.imports import without
from common.pretrained import require_finite, require_reachable
from common.runtime import fork_generators

OLDEST = "1.0.22"
"""The timm to ask for where one before 1.0 is installed, which lacks what this file and transformers import."""


class _Timm(Backbone):
    has_text = False

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> ImageFeatures:
        return trunk_features(self.model, pixels)


def trunk_features(trunk: Any, pixels: Float[Tensor, "b 3 s s"]) -> ImageFeatures:
    """Class token and patches of a timm model, as `ImageFeatures` has them, and as embedding what its head gives."""
    extra = getattr(trunk, "num_prefix_tokens", 0)
    prefix = None
    if "return_prefix_tokens" in _options(trunk):  # a ViT: of the last block, before the final norm
        options = {"return_prefix_tokens": True} if extra else {}
        last, [found] = trunk.forward_intermediates(pixels, indices=1, **options)
        patches, prefix = found if extra else (found, None)
        patches = from_map(patches)
    else:
        last = trunk.forward_features(pixels)
        if last.ndim == 3:
            prefix, patches = last[:, :extra], last[:, extra:]
        else:
            patches = last.flatten(1, 2) if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else from_map(last)
    registers = getattr(trunk, "reg_token", None)
    has_class_token = extra > (0 if registers is None else registers.shape[1])
    class_token = prefix[:, 0] if prefix is not None and has_class_token else patches.mean(1)
    return ImageFeatures(class_token, patches, trunk.forward_head(last))


def _options(trunk: Any) -> Collection[str]:
    """What the model's `forward_intermediates` takes, if it has one."""
    return inspect.signature(trunk.forward_intermediates).parameters if hasattr(trunk, "forward_intermediates") else ()


def import_timm() -> Any:
    """timm, without Weights & Biases, which its training utilities import and which takes longer than all of timm."""
    with without("wandb"):
        import timm
    if timm.__version__.startswith("0."):
        raise UserError(
            f"timm is {timm.__version__}, which is too old: pip install 'timm>={OLDEST},<2' "
            f"(nerfstudio asks for 0.6.7, which it never imports)."
        )
    return timm


def load_timm(name: str) -> tuple[Backbone, Preprocess]:
    """A timm model without its classifier, by "timm:NAME" (its weights fetched) or "timm:NAME/PATH"."""
    timm = import_timm()
    arch, path = split_name(name, TIMM_PREFIX, timm.list_models())
    tag = arch.partition(".")[2]
    if tag and arch not in timm.list_pretrained(f"{arch.partition('.')[0]}.*"):
        raise UserError(f"{name!r}: timm has no weights {tag!r}: use {_tags(arch) or 'NAME/PATH of a file'}.")
    if path is None and not timm.list_pretrained(f"{arch.partition('.')[0]}.*"):
        raise UserError(f"{name!r}: timm has no weights of this model: give a file, {TIMM_PREFIX}{arch}/PATH.")
    state = None if path is None else read_weights(path, f"encoder {name!r}")
    with fork_generators(0):
        try:
            if path is None:
                weights: Any = timm.get_pretrained_cfg(arch)
                if weights.hf_hub_id:
                    require_reachable(weights.hf_hub_id, ("model.safetensors", "pytorch_model.bin"))
            model: Any = timm.create_model(arch, pretrained=path is None, num_classes=0)
        except Exception as error:  # the hub's client and timm have their own for what is missing
            if path is not None:
                raise
            raise UserError(
                f"encoder {name!r}: its weights are not at hand and cannot be fetched ({type(error).__name__}): "
                f"give a file, {TIMM_PREFIX}{arch}/PATH."
            ) from error
    if state is not None:
        classifier = model.pretrained_cfg.get("classifier") or ()
        spared = (classifier,) if isinstance(classifier, str) else classifier
        put_in(model, state, f"encoder {name!r}", spared=[f"{layer}." for layer in spared])
    else:
        require_finite(model.state_dict(), f"encoder {name!r}")
    preprocess, backbone = _preprocess(model, name), _Timm(model)
    backbone.width, backbone.patch_width = widths(backbone, preprocess.size)
    return backbone, preprocess


def _tags(arch: str) -> str:
    return ", ".join(import_timm().list_pretrained(f"{arch.partition('.')[0]}.*")[:5])


def _preprocess(model: Any, name: str) -> Preprocess:
    """What timm's own evaluation transform does."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise UserError(
            f"encoder {name!r} sees {channels} channels of {height} x {width} pixels: use one of squares in colour."
        )
    mode = config["crop_mode"]
    return Preprocess(
        size=height,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        squash=mode == "squash",
        resize=math.floor(height / config["crop_pct"]),
        pad=mode == "border",
        fill=tuple(round(255 * value) for value in config["mean"]) if mode == "border" else (0, 0, 0),
    )
