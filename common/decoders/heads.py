"""A decoder's output head: from last hidden states to next-token logits as its family computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from common.checks import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPREAD = 60.0
"""Standard deviation of the logits at which a head is compared with the library's: softcapping shows there."""


class OutputHead(NamedTuple):
    """logits = c·tanh(s·(h Wᵀ + b) / c), where c is the softcap; without one, s·(h Wᵀ + b)."""

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "... d"]) -> Float[Tensor, "... v"]:
        """Next-token logits of last hidden states."""
        return self.shape(F.linear(hidden, self.weight, self.bias))

    def shape(self, products: Float[Tensor, "... v"]) -> Float[Tensor, "... v"]:
        """What the head makes of h Wᵀ + b: nothing in most families."""
        if self.scale != 1:
            products = products * self.scale
        return products if self.softcap is None else self.softcap * torch.tanh(products / self.softcap)


def output_head(model: PreTrainedModel) -> OutputHead:
    """The head of a decoder: softcapped in Gemma, scaled in Cohere and Granite, with a bias in Phi."""
    head: Any = model.get_output_embeddings()
    config: Any = model.config.get_text_config()
    scale = 1.0
    if config.model_type.startswith("cohere"):
        scale = float(config.logit_scale)
    elif config.model_type.startswith("granite"):
        scale = 1 / float(config.logits_scaling)
    return OutputHead(head.weight, head.bias, scale, getattr(config, "final_logit_softcapping", None))


class _Output:
    """Of a base model: last hidden states and, whatever else is asked for, None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, key: Any) -> Any:
        return (self.last_hidden_state,)[key]


class _StandIn(nn.Module):
    """In a base model's place: gives the same last hidden states whatever it is asked."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    @property
    def decoder(self) -> _StandIn:
        """The part of OPT that answers."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output(self.hidden)


@torch.no_grad()
def library_logits(model: PreTrainedModel, hidden: Float[Tensor, "b n d"]) -> Float[Tensor, "b n v"]:
    """The logits that the family's own code makes of these last hidden states; no block is computed."""
    name = model.base_model_prefix
    own = getattr(model, name)
    setattr(model, name, _StandIn(hidden))
    try:
        return model(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)).logits
    finally:
        setattr(model, name, own)


@torch.no_grad()
def require_known_head(model: PreTrainedModel, source: str) -> None:
    """Raise UserError unless `output_head` gives the logits of the family's own code, also where they are large."""
    if model.config.model_type == "gpt2":
        return
    head = output_head(model)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, head.weight.shape[1], generator=generator).to(head.weight)
    hidden *= SPREAD / F.linear(hidden, head.weight).float().std().clamp(min=1e-6).to(hidden)
    try:
        theirs = library_logits(model, hidden)
        close = torch.allclose(head.logits(hidden).float(), theirs.float(), rtol=2e-2, atol=2e-2 * SPREAD)
    except (AttributeError, TypeError, RuntimeError, ValueError, IndexError):
        close = False
    if not close:
        raise UserError(
            f"{source!r} is a {model.config.model_type!r} model, whose output head makes logits in a way that is not "
            f"known here: give a decoder of another family."
        )
