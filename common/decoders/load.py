"""Load a decoder and its tokenizer by name, whichever family it is of, and freeze it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import nn

from common.checks import UserError
from common.decoders.configs import PACKAGED, WHAT, decoder_class, read_decoder_config
from common.decoders.heads import require_known_head
from common.decoders.tables import is_tied
from common.pretrained import load_tokenizer, loading, locate, require_finite, require_room, require_tokens
from common.runtime import resolve_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PACKAGED", "freeze", "load_decoder"]


def load_decoder(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    frozen: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GPT-2, or any other causal decoder that transformers knows, and its tokenizer.

    Args:
        name: "tiny" or "tiny-medium" (packaged, offline), a hub id such as "gpt2", or a directory.
        device: "auto", "cpu", "cuda", ...
        dtype: of the weights; None is float32 whatever the file holds.
        frozen: eval mode and `requires_grad=False` throughout.

    Returns:
        The model in eval mode, its config's `tie_word_embeddings` true to its tensors; and its tokenizer.

    Raises:
        UserError: the name is unknown, the files are missing or corrupt, it is no causal decoder, is quantized, asks
            for code of its own, or has an output head that is not known here.
    """
    from transformers import GenerationConfig

    target = resolve_device(device)
    source = locate(name, PACKAGED, WHAT)
    with loading(source, PACKAGED, WHAT):
        config = read_decoder_config(source)
        kind = decoder_class(config)
        require_room(source, WHAT, lambda: kind(config))
        model, report = kind.from_pretrained(
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
        require_finite(model.state_dict(), f"{WHAT} {source!r}")
        tokenizer = load_tokenizer(source, config)
        require_tokens(source, WHAT, tokenizer, config.vocab_size)
    model.eval()
    model.config.tie_word_embeddings = is_tied(model)
    require_known_head(model, source)
    model.to(target)
    return (freeze(model) if frozen else model), tokenizer


def freeze(module: nn.Module) -> nn.Module:
    """Put `module` in eval mode and let none of its parameters ask for or keep a gradient."""
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return module
