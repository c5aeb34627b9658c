"""Decoders packed for decoding on a CPU (`common.packing`), GPT-2's GELU and Llama's SiLU inside the matrix kernels.

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
from typing import Any

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation, SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.pytorch_utils import Conv1D

from common.checks import UserError
from common.decoders.families import base_model
from common.decoders.heads import OutputHead, output_head
from common.huge_pages import to_huge_pages
from common.packing import ROWS, Activation, PackedCopies, PackedLinear, can_pack

CHUNK = 8192
"""Tokens of the vocabulary whose logits exist at once, so that they stay in the processor's cache."""
RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
"""transformers' names of one and the same norm."""
GROUPED = "clipcap_grouped"
"""Name of `grouped_attention` among transformers' kinds of attention."""
TINIEST = 1e-12
"""Least scale of 8-bit integers, for rows of zeros."""


class Head:
    """Next-token logits over the vocabulary, on a CPU in chunks of CHUNK tokens.

    Args:
        table: of the head.
        packed, int8: how its products are computed.
        head: what else the head does; the plain product when left out.
    """

    def __init__(
        self, table: Float[Tensor, "v d"], *, packed: bool, int8: bool = False, head: OutputHead | None = None
    ) -> None:
        kind = _Int8Linear if int8 else PackedLinear
        self.head = OutputHead(table) if head is None else head
        size = CHUNK if table.device.type == "cpu" else len(table)
        parts = table.split(size)
        biases = [None] * len(parts) if self.head.bias is None else self.head.bias.split(size)
        self.parts = [
            kind(part, bias) if packed or int8 else (part, bias) for part, bias in zip(parts, biases, strict=True)
        ]

    def chunks(self, hidden: Float[Tensor, "... d"]) -> Iterator[Float[Tensor, "... c"]]:
        """Logits (float32) of one chunk after the other."""
        for part in self.parts:
            products = part(hidden) if isinstance(part, nn.Module) else F.linear(hidden, *part)
            yield self.head.shape(products.float())


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
        self.weight = (to_huge_pages(_prepack(integers)),)
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


def decoding_parts(gpt2: PreTrainedModel, *, int8: bool = False) -> tuple[nn.Module, Head]:
    """A decoder's Transformer and head for inference: packed where that is possible, else its own.

    Raises:
        UserError: `int8` where it cannot be computed.
    """
    base, head = base_model(gpt2), output_head(gpt2)
    weight = head.weight
    if int8:
        require_int8(weight.device)
    if not int8 and not can_pack(weight.device, weight.dtype):
        return base, Head(weight, packed=False, head=head)
    return _PACKED.get(gpt2, int8, lambda: (_pack(base, int8), Head(weight, packed=True, int8=int8, head=head)))


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
    """A copy of the Transformer that shares its tensors, with every Conv1D and Linear packed."""
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*transformer.parameters(), *transformer.buffers())}
    fused: dict[int, Activation] = {}
    for module in transformer.modules():
        layer, act = _hidden_layer(module)
        kind = None if act is None else _activation(act)
        if layer is not None and kind is not None and not (int8 and kind != "gelu_tanh"):
            fused[id(layer)] = kind
            memo[id(act)] = nn.Identity()
    norms: Any = transformer.modules()
    for module in norms:
        if type(module).__name__ in RMS_NORMS and module.weight.dtype == torch.float32:
            memo[id(module)] = RMSNorm(module.weight, module.variance_epsilon)
    for name, module in transformer.named_modules():
        if ".lora_" in name:  # peft asks these for their type
            continue
        if isinstance(module, Conv1D):  # (in, out) weights
            weight = module.weight.T
        elif type(module) is nn.Linear:
            weight = module.weight
        else:
            continue
        activation = fused.get(id(module), "none")
        memo[id(module)] = (
            _Int8Linear(weight, module.bias, gelu=activation == "gelu_tanh")
            if int8
            else PackedLinear(weight, module.bias, activation=activation)
        )
    packed = copy.deepcopy(transformer, memo).eval()
    config: Any = packed.config
    if config._attn_implementation == "sdpa" and getattr(config, "num_key_value_heads", None):
        config._attn_implementation = GROUPED
    return packed


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · weight in one operation, where the library takes six."""

    def __init__(self, weight: Float[Tensor, " d"], epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = (weight,), epsilon  # a tuple hides it from parameters()

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return F.rms_norm(x, x.shape[-1:], self.weight[0], self.epsilon)


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention where several query heads share keys and values, of which none are copied.

    The queries of a group stand one after the other, as if they were further positions of one head.

    Args:
        module: an attention layer of transformers, in eval mode.
        query: (b, h, n, d).
        key, value: (b, h / groups, m, d).
        attention_mask: (b or 1, 1, n, m), added to the scores; with any other, the library's attention is used.
        options: the library's.

    Returns:
        (b, n, h, d), and no weights.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if groups == 1 or attention_mask is None or attention_mask.shape[1] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    batch, heads, count, _ = query.shape
    rows = query.reshape(batch, heads // groups, groups * count, -1)
    mask = attention_mask.repeat(1, 1, groups, 1)
    mixed = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=options.get("scaling"))
    return mixed.reshape(batch, heads, count, -1).transpose(1, 2), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def _hidden_layer(module: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The layer of an MLP that its activation follows, and the activation: GPT-2's, or the gate of Llama's kind."""
    if isinstance(module, GPT2MLP):
        return module.c_fc, module.act
    gate, act = getattr(module, "gate_proj", None), getattr(module, "act_fn", None)
    return (gate, act) if type(gate) is nn.Linear and isinstance(act, nn.Module) else (None, None)


def _activation(act: nn.Module) -> Activation | None:
    """What the matrix kernel calls an activation, where it has it."""
    if isinstance(act, nn.SiLU | SiLUActivation):
        return "silu"
    tanh = isinstance(act, NewGELUActivation | GELUTanh) or isinstance(act, nn.GELU) and act.approximate == "tanh"
    return "gelu_tanh" if tanh else None
