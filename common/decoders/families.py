"""What decoders of every family have, by whatever name: sizes, blocks, norms, position embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.configuration_utils import PreTrainedConfig

UNLIMITED = 1 << 20
"""Positions of a decoder whose attention sets no limit (ALiBi)."""


def width(config: PreTrainedConfig) -> int:
    """Width of the token table's rows, of a prefix, and of the last hidden states."""
    text: Any = config.get_text_config()
    return getattr(text, "word_embed_proj_dim", None) or text.hidden_size


def positions(config: PreTrainedConfig) -> int:
    """Positions that the decoder was made for; UNLIMITED where its config names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED


def numbers_cached(config: PreTrainedConfig) -> int:
    """Numbers that the keys and values of one position take, in all layers together."""
    text: Any = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    each = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * each


def cache_name(forward: Callable[..., Any]) -> str | None:
    """What a decoder's forward calls its cache of keys and values, which changed in transformers 5.24; None without."""
    names = "cache", "past_key_values"
    return next((name for name in names if name in inspect.signature(forward).parameters), None)


def base_model(model: PreTrainedModel) -> Any:
    """The decoder without its head: token ids or embeddings in, last hidden states out, the final norm included."""
    return model.base_model


def blocks_name(model: nn.Module) -> str:
    """Name of the list of the decoder's blocks, such as "transformer.h" or "model.layers"."""
    return next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks, the first one nearest to the input."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm or root-mean-square norm, whatever its family calls it."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm")


def position_embeddings(model: PreTrainedModel) -> list[nn.Embedding]:
    """The learned position embeddings; none where positions are rotations (RoPE) or distances (ALiBi)."""
    tokens = model.get_input_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens]
