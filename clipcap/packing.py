"""GPT-2 packed for decoding on a CPU (`common.packing`), GELU inside the matrix kernels.

Packed weights are a second copy, kept as long as the model lives and made again when its weights change.

As an option the copy is in 8-bit integers (`int8`): weights scaled per output, activations per row as they come, so
that what a row gives does not depend on the rows beside it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel
from transformers.activations import NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.pytorch_utils import Conv1D

from common.checks import UserError
from common.packing import ROWS, PackedCopies, PackedLinear, can_pack

CHUNK = 8192
"""Tokens of the vocabulary whose logits exist at once, so that they stay in the processor's cache."""
TINIEST = 1e-12
"""Least scale of 8-bit integers, for rows of zeros."""


class Head:
    """Next-token logits over the vocabulary, on a CPU in chunks of CHUNK tokens."""

    def __init__(self, table: Float[Tensor, "v d"], *, packed: bool, int8: bool = False) -> None:
        kind = _Int8Linear if int8 else PackedLinear
        parts = table.split(CHUNK) if table.device.type == "cpu" else [table]
        self.parts = [kind(part, None) if packed or int8 else part for part in parts]

    def chunks(self, hidden: Float[Tensor, "... d"]) -> Iterator[Float[Tensor, "... c"]]:
        """Logits (float32) of one chunk after the other."""
        for part in self.parts:
            yield (part(hidden) if isinstance(part, nn.Module) else F.linear(hidden, part)).float()


class _Int8Linear(nn.Module):
    """x Wᵀ + b in 8-bit integers: x = sₓ·(q - 128) row by row, W = s_w·q output by output, sums in 32 bits.

    GELU (tanh) follows when `gelu` is set.
    """

    def __init__(self, weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None, *, gelu: bool = False) -> None:
        super().__init__()
        weight = weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp(min=TINIEST)
        integers = (weight / scales[:, None]).round().to(torch.int8).contiguous()  # prepacking heeds no strides
        self.weight = (torch.ops.onednn.qlinear_prepack(integers, [ROWS, weight.shape[1]]),)
        self.scales = (scales, torch.zeros(len(scales), dtype=torch.int32))
        self.bias = (bias if bias is None else bias.detach().float(),)
        self.gelu = gelu

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        rows = x.flatten(0, -2).float()
        scale = (rows.abs().amax(1, keepdim=True) / 127).clamp_(min=TINIEST)
        # Unsigned with a zero point: oneDNN has its fast kernels for that, and slow ones for signed activations.
        integers = (rows / scale).round_().add_(128).to(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, 128, self.weight[0], *self.scales, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = y.mul_(scale) if self.bias[0] is None else torch.addcmul(self.bias[0], y, scale)
        return (_gelu_tanh(y) if self.gelu else y).to(x.dtype).unflatten(0, x.shape[:-1])


def _gelu_tanh(x: Float[Tensor, "n o"]) -> Float[Tensor, "n o"]:
    """GELU's tanh form as x·σ(2·√(2/π)·(x + 0.044715·x³)): the same function, in a third of torch's time for it."""
    slope = 2 * (2 / math.pi) ** 0.5
    inner = torch.addcmul(x.new_tensor(slope), x, x, value=0.044715 * slope)
    return inner.mul_(x).sigmoid_().mul_(x)


# Beside the models, not in them: packed tensors can neither be pickled nor copied, and models must be.
_PACKED: PackedCopies[tuple[nn.Module, Head]] = PackedCopies()


def decoding_parts(gpt2: GPT2LMHeadModel, *, int8: bool = False) -> tuple[nn.Module, Head]:
    """GPT-2's Transformer and head for inference: packed where that is possible, else its own.

    Raises:
        UserError: `int8` where torch has no kernels for it.
    """
    weight = gpt2.get_output_embeddings().weight
    if int8 and not can_use_int8(weight):
        raise UserError(f"int8 decoding needs a CPU and torch with oneDNN, not {weight.device}: leave int8 out.")
    if not int8 and not can_pack(weight.device, weight.dtype):
        return gpt2.transformer, Head(weight, packed=False)
    return _PACKED.get(
        gpt2, int8, lambda: (_pack(gpt2.transformer, int8), Head(weight, packed=True, int8=int8))
    )


def can_use_int8(weight: Tensor) -> bool:
    """Whether this build of torch multiplies 8-bit integers on the device of this weight."""
    there = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return bool(weight.device.type == "cpu" and there and hasattr(torch.ops.onednn, "qlinear_pointwise"))


def _pack(transformer: nn.Module, int8: bool) -> nn.Module:
    """A copy of the Transformer that shares its tensors, with every Conv1D packed."""
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*transformer.parameters(), *transformer.buffers())}
    fused = set()
    for module in transformer.modules():
        if isinstance(module, GPT2MLP) and _is_gelu_tanh(module.act):
            fused.add(id(module.c_fc))
            memo[id(module.act)] = nn.Identity()
    for module in transformer.modules():
        if isinstance(module, Conv1D):  # (in, out) weights
            weight, bias, gelu = module.weight.T, module.bias, id(module) in fused
            memo[id(module)] = (
                _Int8Linear(weight, bias, gelu=gelu)
                if int8
                else PackedLinear(weight, bias, activation="gelu_tanh" if gelu else "none")
            )
    return copy.deepcopy(transformer, memo).eval()


def _is_gelu_tanh(act: nn.Module) -> bool:
    return isinstance(act, NewGELUActivation) or isinstance(act, nn.GELU) and act.approximate == "tanh"
