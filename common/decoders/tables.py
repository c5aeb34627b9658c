"""A decoder's token tables: one, tied to the head, or two; read, and replaced in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.checks import UserError
from common.decoders.families import width

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head reads the token table itself, whatever the config says."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def token_table(model: PreTrainedModel) -> Float[Tensor, "v d"]:
    """The lexical embeddings, detached; a view, so do not write to it."""
    return model.get_input_embeddings().weight.detach()


def token_tables(model: PreTrainedModel) -> tuple[Float[Tensor, "v d"], ...]:
    """The lexical embeddings, and the head's table where it is another one; views, so do not write to them."""
    output = model.get_output_embeddings().weight.detach()
    return (token_table(model),) if is_tied(model) else (token_table(model), output)


def replace_token_table(
    model: PreTrainedModel, table: Float[Tensor, "v d"], output: Float[Tensor, "v d"] | None = None
) -> None:
    """Put another token table, of any number of rows, into `model`, in place: a scaled embedding stays one.

    Args:
        model: tied, and then it stays so, or untied.
        table: the lexical embeddings.
        output: the head's rows, of an untied model and of no other. A head's bias begins again at 0.

    Raises:
        UserError: the rows are not as wide as the model, hold NaN or infinity, or one table is given for two.
    """
    tied = is_tied(model)
    if tied != (output is None):
        what, give = ("one table of tokens", "it") if tied else ("two tables of tokens", "both")
        raise UserError(f"this {model.config.model_type!r} model has {what}: give {give}.")
    wide = width(model.config)
    for rows in (table, output):
        if rows is None:
            continue
        if rows.ndim != 2 or rows.shape[1] != wide or len(rows) != len(table):
            raise UserError(f"token table has shape {tuple(rows.shape)}: this model needs rows of width {wide}.")
        if not torch.isfinite(rows).all():
            raise UserError("token table holds NaN or infinity: check how it was made.")
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    embedding.weight = _parameter(table, embedding.weight)
    embedding.num_embeddings, embedding.padding_idx = len(table), None
    head.weight = embedding.weight if output is None else _parameter(output, head.weight)
    head.out_features = len(table)
    if head.bias is not None:
        head.bias = _parameter(torch.zeros(len(table)), head.bias)
    model.config.vocab_size = len(table)
    model.config.tie_word_embeddings = tied
    for part in (model, model.base_model):
        if hasattr(part, "vocab_size"):
            part.vocab_size = len(table)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = getattr(model.config, name, None)
        if isinstance(given, int) and given >= len(table):
            setattr(model.config, name, None)


def _parameter(values: Tensor, old: Tensor) -> nn.Parameter:
    """A copy of `values` as a parameter of `old`'s kind, place and training."""
    return nn.Parameter(values.detach().to(old.device, old.dtype, copy=True), requires_grad=old.requires_grad)
