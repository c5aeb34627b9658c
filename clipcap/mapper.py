"""Mapping networks: from what CLIP says about an image to a prefix that GPT-2 continues (Mokady et al. 2021, sec. 3).

Parameters keep the original implementation's names, so its checkpoints load by a change of prefix only.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from common.checks import UserError, require_at_least
from common.runtime import require_memory


class MLPMapper(nn.Module):
    """prefix = W₂ tanh(W₁ embedding), K·d/2 units between: the mapper to use when GPT-2 is fine-tuned (sec. 3.2).

    Args:
        clip_width: e, width of the embedding.
        width: d, width of GPT-2.
        prefix_length: K, positions of the prefix.
    """

    def __init__(self, clip_width: int, width: int, prefix_length: int) -> None:
        super().__init__()
        hidden = width * prefix_length // 2
        self.prefix_length = prefix_length
        self.model = nn.Sequential(nn.Linear(clip_width, hidden), nn.Tanh(), nn.Linear(hidden, width * prefix_length))

    def forward(self, embedding: Float[Tensor, "b e"]) -> Float[Tensor, "b K d"]:
        return self.model(embedding).unflatten(-1, (self.prefix_length, -1))


class TransformerMapper(nn.Module):
    """K learned constants attend, through a Transformer, to tokens made of the embedding (sec. 3.3, fig. 2).

    The embedding becomes `clip_length` tokens by one linear map; with `patches` (beyond the paper) each of the
    image's patch features becomes one token instead. The outputs at the constants' places are the prefix.

    Args:
        clip_width: e, width of the embedding or of the patch features.
        width: d, width of GPT-2.
        prefix_length: K, positions of the prefix.
        clip_length: tokens made of the embedding; not used with `patches`.
        num_layers: blocks.
        num_heads: attention heads of each block.
        patches: read patch features (b, n, e) instead of the embedding (b, e).
    """

    def __init__(
        self,
        clip_width: int,
        width: int,
        prefix_length: int,
        clip_length: int,
        num_layers: int = 8,
        num_heads: int = 8,
        *,
        patches: bool = False,
    ) -> None:
        super().__init__()
        self.patches = patches
        self.transformer = _Blocks(width, num_heads, num_layers)
        self.linear = nn.Linear(clip_width, width if patches else clip_length * width)
        self.prefix_const = nn.Parameter(torch.randn(prefix_length, width))

    def forward(self, embedding: Float[Tensor, "b e"] | Float[Tensor, "b n e"]) -> Float[Tensor, "b K d"]:
        length, width = self.prefix_const.shape
        tokens = self.linear(embedding)
        if not self.patches:
            tokens = tokens.unflatten(-1, (-1, width))  # (b, n, d)
        constants = self.prefix_const.expand(len(embedding), length, width)
        return self.transformer(torch.cat([tokens, constants], dim=1))[:, -length:]


class _Blocks(nn.Module):
    """A stack of blocks, held under the name `layers` as in the original."""

    def __init__(self, width: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(width, num_heads) for _ in range(num_layers))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        for layer in self.layers:
            x = layer(x)
        return x


class _Block(nn.Module):
    """x + attention(norm x), then x + MLP(norm x) with a hidden layer of 2d."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _MLP(width, 2 * width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    """Every token attends to every token; queries, keys and values have no bias."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        queries = self.to_queries(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (b, h, n, d/h)
        keys, values = self.to_keys_values(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return self.project(mixed.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(F.relu(self.fc1(x)))


def _require_memory(sizes: object, numbers: int) -> None:
    """Raise UserError when a mapper of so many numbers does not fit in memory."""
    require_memory(f"prefix_length is {sizes}", 4 * numbers, torch.device("cpu"), "use smaller ones")


def build_mapper(
    kind: str,
    *,
    clip_width: int,
    width: int,
    prefix_length: int,
    clip_length: int,
    num_layers: int,
    num_heads: int,
    patches: bool,
) -> MLPMapper | TransformerMapper:
    """The mapper called `kind` ("mlp" or "transformer") with random weights.

    Raises:
        UserError: a size is not positive, the heads do not divide the width, or an MLP is to read patches.
    """
    require_at_least("clip_width", clip_width, 1)
    require_at_least("prefix_length", prefix_length, 1)
    if kind == "mlp":
        if patches:
            raise UserError("inputs is 'patches' with mapper 'mlp': use mapper 'transformer', which reads any number.")
        _require_memory(prefix_length, width * prefix_length // 2 * (clip_width + width * prefix_length))
        return MLPMapper(clip_width, width, prefix_length)
    if kind != "transformer":
        raise UserError(f"mapper is {kind!r}: choose one of mlp, transformer.")
    require_at_least("clip_length", clip_length, 1)
    require_at_least("mapper_layers", num_layers, 1)
    _require_memory(
        f"{prefix_length}, clip_length {clip_length} and mapper_layers {num_layers}",
        width * (clip_width * (1 if patches else clip_length) + prefix_length + 8 * width * num_layers),
    )
    require_at_least("mapper_heads", num_heads, 1)
    if width % num_heads:
        raise UserError(f"mapper_heads is {num_heads}: use a divisor of GPT-2's width {width}.")
    return TransformerMapper(clip_width, width, prefix_length, clip_length, num_layers, num_heads, patches=patches)
