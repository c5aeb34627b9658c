"""Linear layers packed for inference on a CPU: weights in the blocked layout of oneDNN's matrix kernels.

The plain layout costs a few percent of a product with many rows and up to half of one with few. Packed weights are a
second copy; they can neither be pickled, copied nor differentiated, so they stay beside a model and never in it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.huge_pages import to_huge_pages

ROWS = 64
"""Rows for which oneDNN chooses the layout."""
Packed = TypeVar("Packed")
Activation = Literal["none", "gelu_tanh", "gelu", "silu"]
_POST_OPERATIONS: dict[Activation, tuple[str, str]] = {
    "none": ("none", ""),
    "gelu_tanh": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "silu": ("swish", ""),
}


class PackedLinear(nn.Module):
    """act(x Wᵀ + b), the activation inside the matrix kernel."""

    def __init__(
        self,
        weight: Float[Tensor, "o i"],
        bias: Float[Tensor, " o"] | None,
        *,
        activation: Activation = "none",
    ) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
        self.weight = (to_huge_pages(packed),)
        self.bias = (bias,)  # tuples hide both from parameters() and state_dict()
        self.after = _POST_OPERATIONS[activation]

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        kind, algorithm = self.after
        return torch.ops.mkldnn._linear_pointwise(x, self.weight[0], self.bias[0], kind, [], algorithm)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch packs weights of this type on this device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def weights_state(module: nn.Module) -> object:
    """Differs after the weights have changed: by training (tensor versions) or behind torch's back (samples)."""
    seen = []
    for p in module.parameters():
        samples = p.detach().flatten()[:: max(1, p.numel() // 61)].float().sum().item()
        seen.append((p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version, samples))
    return seen


class PackedCopies(Generic[Packed]):
    """Packed copies beside their models, each made once, and again when the weights have changed."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, dict[Hashable, tuple[object, Packed]]] = WeakKeyDictionary()

    def get(
        self, model: nn.Module, kind: Hashable, make: Callable[[], Packed], *, of: nn.Module | None = None
    ) -> Packed:
        """The copy of one kind.

        Args:
            model: as long as it lives, its copies are kept.
            kind: tells a model's copies from each other.
            make: packs.
            of: the part of the model whose weights are packed; all of it when not given.
        """
        state = weights_state(model if of is None else of)
        kinds = self._known.setdefault(model, {})
        known = kinds.get(kind)
        if known is None or known[0] != state:
            known = kinds[kind] = state, make()
        return known[1]
