"""GPT-2 packed for decoding on a CPU (`common.packing`), GELU inside the matrix kernels.

Packed weights are a second copy, kept as long as the model lives and made again when its weights change.

As an option the copy is in 8-bit integers (`int8`): weights scaled per output, activations per row as they come, so
that what a row gives does not depend on the rows beside it. How large an integer a weight may become depends on the
processor (`largest_int8_weight`).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int8, UInt8
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

    GELU (tanh) follows when `gelu` is set. Weights become at most `largest`, by default what this processor computes
    exactly.
    """

    def __init__(
        self,
        weight: Float[Tensor, "o i"],
        bias: Float[Tensor, " o"] | None,
        *,
        gelu: bool = False,
        largest: int | None = None,
    ) -> None:
        super().__init__()
        weight = weight.detach().float()
        scales = (weight.abs().amax(1) / (largest or largest_int8_weight())).clamp(min=TINIEST)
        integers = (weight / scales[:, None]).round().to(torch.int8)
        self.weight = (_prepack(integers),)
        self.scales = (scales,)
        self.bias = (bias if bias is None else bias.detach().float(),)
        self.gelu = gelu

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        rows = x.flatten(0, -2).float()
        scale = (rows.abs().amax(1, keepdim=True) / 127).clamp_(min=TINIEST)
        # Unsigned with a zero point: oneDNN has its fast kernels for that, and slow ones for signed activations.
        integers = (rows / scale).round_().add_(128).to(torch.uint8)
        y = _int8_product(integers, self.weight[0], self.scales[0])
        y = y.mul_(scale) if self.bias[0] is None else torch.addcmul(self.bias[0], y, scale)
        return (_gelu_tanh(y) if self.gelu else y).to(x.dtype).unflatten(0, x.shape[:-1])


def _prepack(integers: Int8[Tensor, "o i"]) -> Tensor:
    """Integer weights in the layout of oneDNN's kernels."""
    return torch.ops.onednn.qlinear_prepack(integers.contiguous(), [ROWS, integers.shape[1]])  # heeds no strides


def _int8_product(integers: UInt8[Tensor, "n i"], packed: Tensor, scales: Float[Tensor, " o"]) -> Float[Tensor, "n o"]:
    """(q - 128) Wᵀ, each output times its scale."""
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        integers, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.cache
def largest_int8_weight() -> int:
    """The largest integer weight with which this processor's 8-bit products are exact: 127, 64, or 0 if neither.

    With VNNI or AMX they are summed in 32 bits, hence 127. Without (AVX2, the first AVX-512), oneDNN first adds two
    products in 16 bits, where what is above 32,767 is cut off: 2·255·127 = 64,770 is, 2·255·64 = 32,640 is not. Which
    two depends on the kernel and the width, so that every two must fit.
    """
    return next((largest for largest in (127, 64) if _is_exact(largest)), 0)


def _is_exact(largest: int) -> bool:
    """Whether products at the extremes of activations (1 and 255) and weights (±`largest`) are those of integers.

    Probed for one row, a few and many, and for a small and a large layer: oneDNN may choose a kernel for each.
    """
    generator = torch.Generator().manual_seed(0)
    for outputs, inputs in ((43, 261), (1024, 512)):  # 512·255·127 < 2²⁴: every sum is exact in float32 too
        weight = largest * (2 * torch.randint(2, (outputs, inputs), generator=generator) - 1)
        integers = 1 + 254 * torch.randint(2, (2 * ROWS + 1, inputs), generator=generator)
        weight[0], weight[1] = largest, -largest
        integers[0], integers[1] = 255, 1
        expected = ((integers - 128).double() @ weight.T.double()).float()
        try:
            packed = _prepack(weight.to(torch.int8))
            for rows in (1, 5, ROWS, len(integers)):
                found = _int8_product(integers[:rows].to(torch.uint8), packed, torch.ones(outputs))
                if not torch.equal(found, expected[:rows]):
                    return False
        except RuntimeError:  # this build of torch has no such kernel for this processor
            return False
    return True


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
        UserError: `int8` where it cannot be computed.
    """
    weight = gpt2.get_output_embeddings().weight
    if int8:
        require_int8(weight.device)
    if not int8 and not can_pack(weight.device, weight.dtype):
        return gpt2.transformer, Head(weight, packed=False)
    return _PACKED.get(gpt2, int8, lambda: (_pack(gpt2.transformer, int8), Head(weight, packed=True, int8=int8)))


def can_use_int8() -> bool:
    """Whether this build of torch multiplies 8-bit integers on this machine's CPU, and rightly."""
    there = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return bool(there and hasattr(torch.ops.onednn, "qlinear_pointwise") and largest_int8_weight())


def require_int8(device: torch.device) -> None:
    """Raise UserError where GPT-2 cannot be computed in 8-bit integers."""
    if device.type != "cpu":
        raise UserError(f"int8 needs a CPU but the device is {str(device)!r}: use device cpu, or bf16 here.")
    if not can_use_int8():
        raise UserError("int8 is not exact on this processor, or its torch has no oneDNN: leave int8 out.")


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
