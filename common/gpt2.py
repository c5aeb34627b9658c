"""GPT-2 with its tokenizer: load by name, freeze, read and replace the token table."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.checks import UserError
from common.pretrained import ASSETS, loading, locate, require_reachable
from common.runtime import resolve_device

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

PACKAGED = {"tiny": ASSETS / "gpt2-tiny", "tiny-medium": ASSETS / "gpt2-tiny-medium"}


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
    from transformers import AutoConfig, AutoTokenizer, GPT2LMHeadModel

    target = resolve_device(device)
    source = locate(name, PACKAGED, "GPT-2")
    with loading(source, PACKAGED, "GPT-2"):
        if not os.path.isdir(source):
            require_reachable(source, ("config.json",))
        config = AutoConfig.from_pretrained(source)
        if config.model_type != "gpt2":
            raise UserError(f"{source!r} is a {config.model_type!r} model: give one of the GPT-2 family.")
        model, report = GPT2LMHeadModel.from_pretrained(
            source, dtype=dtype or torch.float32, output_loading_info=True
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            missing = sorted(map(str, report["missing_keys"] or report["mismatched_keys"]))
            raise UserError(f"{source!r} lacks weights that its config.json asks for, such as {missing[0]!r}.")
        tokenizer = AutoTokenizer.from_pretrained(source)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{source!r}: the tokenizer has {len(tokenizer)} tokens but the token table "
            f"{model.config.vocab_size} rows: use the tokenizer that the model was trained with."
        )
    model.eval().to(target)
    return (freeze(model) if frozen else model), tokenizer


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
