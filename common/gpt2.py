"""GPT-2 with its tokenizer: load by name, freeze, read and replace the token table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.checks import UserError
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
    require_finite,
    require_reachable,
    require_room,
    require_tokens,
    tokens,
    whole,
)
from common.runtime import resolve_device

if TYPE_CHECKING:
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

PACKAGED = {"tiny": ASSETS / "gpt2-tiny", "tiny-medium": ASSETS / "gpt2-tiny-medium"}
END = 50256
"""GPT-2's own end token, which transformers writes in a config also when the vocabulary has no such token."""


def load_gpt2(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    frozen: bool = False,
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """Load a GPT-2 and its tokenizer.

    Args:
        name: "tiny" or "tiny-medium" (packaged, offline), a hub id such as "gpt2", or a directory.
        device: "auto", "cpu", "cuda", ...
        dtype: of the weights; None is float32 whatever the file holds.
        frozen: eval mode and `requires_grad=False` throughout.

    Returns:
        The model, its head tied to its token table, in eval mode; and its tokenizer.

    Raises:
        UserError: the name is unknown, the files are missing or corrupt, or it is not a GPT-2.
    """
    from transformers import GenerationConfig, GPT2LMHeadModel

    target = resolve_device(device)
    source = locate(name, PACKAGED, "GPT-2")
    with loading(source, PACKAGED, "GPT-2"):
        if not os.path.isdir(source):
            require_reachable(source, ("config.json",))
        config = gpt2_config(read_config(source, "GPT-2", "gpt2"), f"config.json of {source!r}")
        require_room(source, "GPT-2", lambda: GPT2LMHeadModel(config))
        model, report = GPT2LMHeadModel.from_pretrained(
            source,
            config=config,
            generation_config=GenerationConfig.from_model_config(config),  # not that of a file
            dtype=dtype or torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            missing = sorted(map(str, report["missing_keys"] or report["mismatched_keys"]))
            raise UserError(f"{source!r} lacks weights that its config.json asks for, such as {missing[0]!r}.")
        require_finite(model.state_dict(), f"GPT-2 {source!r}")
        tokenizer = load_tokenizer(source, config)
        require_tokens(source, "GPT-2", tokenizer, config.vocab_size)
    model.eval().to(target)
    return (freeze(model) if frozen else model), tokenizer


def gpt2_config(fields: Mapping[str, Any], place: str) -> GPT2Config:
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


def freeze(module: nn.Module) -> nn.Module:
    """Put `module` in eval mode and let none of its parameters ask for or keep a gradient."""
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return module


def token_table(model: GPT2LMHeadModel) -> Float[Tensor, "v d"]:
    """The lexical embeddings (wte), detached; a view, so do not write to it."""
    return model.get_input_embeddings().weight.detach()


def replace_token_table(model: GPT2LMHeadModel, table: Float[Tensor, "v d"]) -> None:
    """Put another token table, of any number of rows, into `model`; input and output stay tied.

    Raises:
        UserError: the rows are not as wide as the model, or hold NaN or infinity.
    """
    width = model.config.n_embd
    if table.ndim != 2 or table.shape[1] != width:
        raise UserError(f"token table has shape {tuple(table.shape)}: this model needs rows of width {width}.")
    if not torch.isfinite(table).all():
        raise UserError("token table holds NaN or infinity: check how it was made.")
    old = model.get_input_embeddings().weight
    new = nn.Embedding(len(table), width, device=old.device, dtype=old.dtype)
    with torch.no_grad():
        new.weight.copy_(table)
    new.weight.requires_grad_(old.requires_grad)
    model.set_input_embeddings(new)
    model.config.vocab_size = len(table)
    model.lm_head = nn.Linear(width, len(table), bias=False, device=old.device, dtype=old.dtype)
    model.lm_head.weight = new.weight
