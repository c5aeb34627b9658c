"""CLIP by transformers, and the way to its other encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from common.checks import UserError
from common.encoders.checkpoint import load_weights
from common.encoders.families import load_family, require_words
from common.encoders.interface import PACKAGED, Backbone, ImageFeatures
from common.encoders.preprocess import LARGEST, Preprocess
from common.encoders.processors import read_fields, to_preprocess
from common.pretrained import (
    DROPOUT,
    EPSILON,
    LAYERS,
    SIZE,
    checked,
    load_tokenizer,
    loading,
    locate,
    one_of,
    read_config,
    require_finite,
    require_reachable,
    require_room,
    require_tokens,
    whole,
)

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase


class _HuggingFace(Backbone):
    def __init__(self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.width: int = model.config.projection_dim
        self.patch_width: int = model.config.vision_config.hidden_size

    def image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> ImageFeatures:
        vision = self.model.vision_model(pixel_values=pixels)
        tokens = vision.last_hidden_state  # (b, 1 + n, w)
        return ImageFeatures(tokens[:, 0], tokens[:, 1:], self.model.visual_projection(vision.pooler_output))

    def packed_image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> ImageFeatures:
        from common.vision import packed_vision

        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else pixels.dtype
        vision = packed_vision(self.model, dtype)
        if vision is None:
            return self.image_features(pixels)
        with torch.autocast("cpu", enabled=False):  # all is in `dtype` already
            tokens, embedding = vision(pixels)
        return ImageFeatures(tokens[:, 0], tokens[:, 1:], embedding)

    def text_embeddings(self, texts: list[str]) -> Float[Tensor, "b e"]:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        text = self.model.text_model(**tokens.to(self.model.device))
        return self.model.text_projection(text.pooler_output)


def load_hugging_face(name: str) -> tuple[Backbone, Preprocess]:
    from transformers.configuration_utils import PreTrainedConfig

    source = locate(name, PACKAGED, "CLIP")
    with loading(source, PACKAGED, "CLIP"):
        if not Path(source).is_dir():
            require_reachable(source, ("config.json",))
        kind = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
        return _load_clip(source) if kind == "clip" else load_family(source, kind)


def _load_clip(source: str) -> tuple[Backbone, Preprocess]:
    from transformers import CLIPModel

    config = _clip_config(read_config(source, "CLIP", "clip"), f"config.json of {source!r}")
    preprocess, size = Preprocess(config.vision_config.image_size), config.vision_config.image_size
    if found := read_fields(source):  # old directories have none: OpenAI's
        preprocess = to_preprocess(found[1], f"{found[0]} of {source!r}", "CLIP", size)
    require_room(source, "CLIP", lambda: CLIPModel(config))
    model, missing = load_weights(CLIPModel, source, config, "CLIP")
    for key in missing:
        raise UserError(f"CLIP {source!r} lacks weights that its config.json asks for, such as {key!r}.")
    require_finite(model.state_dict(), f"CLIP {source!r}")
    tokenizer = load_tokenizer(source, config)
    require_words(source, "CLIP", tokenizer)
    require_tokens(source, "CLIP", tokenizer, config.text_config.vocab_size)
    end = config.text_config.eos_token_id
    if end not in (2, tokenizer.eos_token_id):  # 2: old configs
        raise UserError(
            f"CLIP {source!r}: the tokenizer ends texts with {tokenizer.eos_token_id}, the text tower with {end}: "
            f"use the tokenizer that it was trained with."
        )
    if tokenizer.pad_token_id is None:
        raise UserError(f"CLIP {source!r}: the tokenizer has no pad_token: use the one that it was trained with.")
    return _HuggingFace(model, tokenizer), preprocess


def _clip_config(fields: Mapping[str, Any], place: str) -> CLIPConfig:
    """transformers' config of the sizes and functions in `fields`; nothing else there is believed."""
    from transformers import CLIPConfig
    from transformers.activations import ACT2FN

    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads"), SIZE)
    tower = sizes | {"num_hidden_layers": LAYERS, "hidden_act": one_of(*ACT2FN), "layer_norm_eps": EPSILON}
    tower |= {"attention_dropout": DROPOUT}
    text = tower | dict.fromkeys(("vocab_size", "max_position_embeddings"), SIZE) | {"eos_token_id": whole(0, 10**7)}
    side = whole(1, LARGEST)
    vision = tower | {"num_channels": one_of(3), "image_size": side, "patch_size": side}
    parts = {
        name: checked(fields[name], rules, f"{place}, {name}")
        for part, rules in (("text_config", text), ("vision_config", vision))
        for name in (part, f"{part}_dict")  # the second in old files, where it counts more
        if fields.get(name) is not None
    }
    config = CLIPConfig(**checked(fields, {"projection_dim": SIZE}, place), **parts)
    for part, one in (("text_config", config.text_config), ("vision_config", config.vision_config)):
        if one.hidden_size % one.num_attention_heads:
            raise UserError(
                f"{place}, {part}: num_attention_heads is {one.num_attention_heads}: use a divisor of hidden_size "
                f"{one.hidden_size}."
            )
    if config.vision_config.patch_size > config.vision_config.image_size:
        raise UserError(
            f"{place}, vision_config: patch_size is {config.vision_config.patch_size}: use at most image_size "
            f"{config.vision_config.image_size}."
        )
    return config
