"""Which decoder a configuration describes: nothing in it is believed that does not fit, or that could run code."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from common.checks import UserError
from common.decoders.families import cache_name
from common.pretrained import (
    ASSETS,
    DROPOUT,
    EPSILON,
    LAYERS,
    SIZE,
    SWITCH,
    checked,
    load_tokenizer,
    loading,
    locate,
    number,
    one_of,
    read_config,
    require_reachable,
    require_tokens,
    tokens,
    whole,
)

if TYPE_CHECKING:
    from transformers import GPT2Config, PreTrainedModel
    from transformers.configuration_utils import PreTrainedConfig

PACKAGED = {"tiny": ASSETS / "gpt2-tiny", "tiny-medium": ASSETS / "gpt2-tiny-medium"}
WHAT = "GPT-2 or other decoder"
END = 50256
"""GPT-2's own end token, which transformers writes in a config also when the vocabulary has no such token."""
OLDER = (
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",
    "rotary_pct",
    "sliding_window_pattern",
)
"""Sizes that earlier versions of transformers wrote by names that are no fields today, but still understood."""
NOT_CAUSAL = {"bert-generation", "trocr", "whisper", "xlnet"}
"""Have a class for causal modelling, but are not decoders that stand alone."""


def decoder_config(fields: Any, place: str) -> PreTrainedConfig:
    """transformers' config of a decoder of any family; of the fields only those that the family itself has.

    Args:
        fields: what a `config.json` holds; without a `model_type`, GPT-2's.
        place: of the fields, for messages.

    Raises:
        UserError: no causal decoder, or a value that none can have.
    """
    from transformers import CONFIG_MAPPING

    if not isinstance(fields, Mapping) or fields.get("model_type", "gpt2") == "gpt2":
        return gpt2_config(fields, place)
    require_causal(fields, place)
    kind = CONFIG_MAPPING[fields["model_type"]]
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
    rules = dict.fromkeys((*sizes, "n_head", "ffn_dim", "word_embed_proj_dim"), SIZE)
    rules |= dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window"), SIZE | None)
    rules |= dict.fromkeys(("num_hidden_layers", "n_layer"), LAYERS)
    rules |= dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), EPSILON)
    rules |= dict.fromkeys(("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop"), DROPOUT)
    rules |= {"initializer_range": number(0, 100), "tie_word_embeddings": SWITCH}
    checked(fields, rules, place)
    known = _own_fields(kind) | {*OLDER, *kind.attribute_map, *kind.attribute_map.values()}
    try:
        config = kind(**{name: value for name, value in fields.items() if name in known})
    except Exception as error:  # each family checks its own
        reason = next((line.strip() for line in str(error).splitlines()[::-1] if line.strip()), type(error).__name__)
        raise UserError(f"{place} is no {fields['model_type']!r} model's: {reason}") from error
    _check_heads(config, place)
    _check_tokens(config, fields, place)
    return config


def gpt2_config(fields: Any, place: str) -> GPT2Config:
    """transformers' config of the sizes, functions and special tokens in `fields`; nothing else there is believed.

    Args:
        fields: what a `config.json` holds.
        place: of the fields, for messages.

    Raises:
        UserError: a value that no GPT-2 can have, or one that is not supported here.
    """
    from transformers import GPT2Config
    from transformers.activations import ACT2FN

    rules = dict.fromkeys(("vocab_size", "n_positions", "n_embd", "n_head"), SIZE)
    rules |= {"n_layer": LAYERS, "n_inner": SIZE | None, "activation_function": one_of(*ACT2FN)}
    rules |= {"layer_norm_epsilon": EPSILON, "initializer_range": number(0, 100)}
    rules |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), DROPOUT)
    rules |= dict.fromkeys(("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"), SWITCH)
    rules |= {"tie_word_embeddings": one_of(True), "add_cross_attention": one_of(False)}
    names = GPT2Config.attribute_map  # hidden_size stands for n_embd, and the like
    fields = {names.get(name, name): value for name, value in fields.items()}
    config = GPT2Config(**checked(fields, rules, place))
    if config.n_embd % config.n_head:
        raise UserError(f"{place}: n_head is {config.n_head}: use a divisor of n_embd {config.n_embd}.")
    ids = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": None}
    ids = {name: fields.get(name, usual) for name, usual in ids.items()}
    ids = {name: None if value == END >= config.vocab_size else value for name, value in ids.items()}
    one = whole(0, config.vocab_size - 1) | None
    rules = {"bos_token_id": one, "eos_token_id": tokens(config.vocab_size) | None, "pad_token_id": one}
    for name, value in checked(ids, rules, place).items():
        setattr(config, name, value)
    return config


def require_causal(fields: Mapping[str, Any], place: str) -> None:
    """Raise UserError unless a `config.json` is that of a decoder that predicts the next token from those before it."""
    from transformers.models.auto import modeling_auto as auto

    kind, causal = fields.get("model_type"), auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    others = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    named = fields.get("architectures") or []
    accepted = (
        isinstance(kind, str)
        and kind in causal
        and kind not in NOT_CAUSAL
        and not any(kind in names for names in others)
        and not fields.get("is_encoder_decoder")
        and (not isinstance(named, list) or not named or causal[kind] in named)
    )
    if accepted and _takes_prefix_and_cache(str(kind)):
        return
    code = ", and code that comes with a model is never run" if fields.get("auto_map") and kind not in causal else ""
    raise UserError(
        f"{place} is a {repr(kind)[:60]} model, not a GPT-2 or another causal decoder{code}: "
        f"give the name or directory of one, such as a GPT-2, Llama or Qwen."
    )


def decoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' own class of a decoder with its head."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def read_decoder_config(source: str) -> PreTrainedConfig:
    """The configuration of a directory or hub id, as `locate` gives it.

    Raises:
        UserError: no decoder's, quantized, an adapter's, or a value that cannot be.
    """
    if not os.path.isdir(source):
        require_reachable(source, ("config.json",))
    fields = read_config(source, WHAT, None)
    if "model_type" not in fields:
        fields = {**fields, "model_type": None}
    require_causal(fields, repr(source))
    return decoder_config(fields, f"config.json of {source!r}")


def require_decoder(name: str | os.PathLike[str]) -> PreTrainedConfig:
    """Check all of a decoder but its weights, before long work: its configuration, which is returned, and tokenizer.

    Raises:
        UserError: as `load_decoder`.
    """
    source = locate(name, PACKAGED, WHAT)
    with loading(source, PACKAGED, WHAT):
        config = read_decoder_config(source)
        tokenizer = load_tokenizer(source, config)
        require_tokens(source, WHAT, tokenizer, config.vocab_size)
    return config


def _own_fields(kind: type[PreTrainedConfig]) -> set[str]:
    """Names that a family's config adds to those that every config has."""
    from transformers.configuration_utils import PreTrainedConfig

    shared = {field.name for field in dataclasses.fields(PreTrainedConfig)}  # type: ignore[arg-type]
    own = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return own - shared - {"use_cache"}


def _takes_prefix_and_cache(kind: str) -> bool:
    """Whether a family's forward takes a prefix and a cache of keys and values, which a recurrent one has not."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    config: Any = CONFIG_MAPPING[kind]
    heads = {"num_attention_heads", "num_key_value_heads"} & {*_own_fields(config), *config.attribute_map}
    forward = MODEL_FOR_CAUSAL_LM_MAPPING[config].forward
    arguments = inspect.signature(forward).parameters
    takes = {"inputs_embeds", "use_cache"} <= set(arguments) and cache_name(forward) is not None
    return takes and bool(heads or config.sub_configs)


def _check_heads(config: Any, place: str) -> None:
    """Raise UserError unless heads divide the width, groups of keys and values the heads, and there is one text."""
    if config.get_text_config() is not config:
        raise UserError(
            f"{place} is a {config.model_type!r} model, which reads more than text: give its language model alone."
        )
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise UserError(f"{place}: num_attention_heads is {heads}: use a divisor of hidden_size {config.hidden_size}.")
    if groups and heads % groups:
        raise UserError(f"{place}: num_key_value_heads is {groups}: use a divisor of num_attention_heads {heads}.")


def _check_tokens(config: Any, fields: Mapping[str, Any], place: str) -> None:
    """Special tokens that are no rows of the table: a mistake where they are given, absent where they are usual."""
    one = whole(0, config.vocab_size - 1) | None
    rules = {"bos_token_id": one, "eos_token_id": tokens(config.vocab_size) | None, "pad_token_id": one}
    for name, rule in rules.items():
        value = getattr(config, name, None)
        usual = name not in fields or (name == "pad_token_id" and value == -1)  # as old files say "none"
        if usual and not rule.holds(value):
            setattr(config, name, None)
        else:
            checked({name: value}, {name: rule}, place)
