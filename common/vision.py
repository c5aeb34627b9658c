"""CLIP's ViT (Hugging Face's) for inference alone on a CPU: packed matrices, one for queries, keys and values.

Its features are those of the model that it is made of, up to the order of sums. Against that model it saves the
unpacked layout's cost, the passes of quick GELU over memory, and the convolution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from common.packing import PackedCopies, PackedLinear, can_pack

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPVisionModelWithProjection

SLOPE = 1.702
"""Of quick GELU, x·σ(1.702·x)."""


class PackedVision(nn.Module):
    """The vision tower and its projection, in `dtype`.

    Args:
        clip: whose `vision_model` and `visual_projection`.
        dtype: of the packed weights and everything computed.
    """

    def __init__(self, clip: CLIPModel | CLIPVisionModelWithProjection, dtype: torch.dtype) -> None:
        super().__init__()
        vision: Any = clip.vision_model
        embeddings = vision.embeddings
        self.dtype, self.patch_size = dtype, embeddings.patch_size
        position = embeddings.position_embedding.weight
        convolution = embeddings.patch_embedding
        self.patch = PackedLinear(convolution.weight.flatten(1).to(dtype), _cast(convolution.bias, dtype))
        self.tensors = (  # a tuple hides them from parameters()
            (embeddings.class_embedding + position[0]).detach().to(dtype),
            position[1:].detach().to(dtype),
        )
        self.before, self.after = _Norm(vision.pre_layrnorm, dtype), _Norm(vision.post_layernorm, dtype)
        self.layers = nn.ModuleList([_Layer(layer, dtype) for layer in vision.encoder.layers])
        self.projection = PackedLinear(clip.visual_projection.weight.to(dtype), None)

    def forward(self, pixels: Float[Tensor, "b 3 s s"]) -> tuple[Float[Tensor, "b m w"], Float[Tensor, "b e"]]:
        """The tokens of the last layer, the class token first, and the embedding."""
        side = self.patch_size
        patches = pixels.to(self.dtype).unfold(2, side, side).unfold(3, side, side)  # (b, 3, y, x, side, side)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # (b, n, 3 side²)
        first, rest = self.tensors
        x = torch.cat([first.expand(len(pixels), 1, -1), self.patch(patches) + rest], 1)  # (b, 1 + n, w)
        x = self.before(x)
        for layer in self.layers:
            x = layer(x)
        return x, self.projection(self.after(x[:, 0]))


class _Layer(nn.Module):
    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, self.scale = attention.num_heads, attention.scale
        several = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = PackedLinear(
            torch.cat([part.weight for part in several]).to(dtype),
            _cast(torch.cat([part.bias for part in several]), dtype),
        )
        self.out = PackedLinear(attention.out_proj.weight.to(dtype), _cast(attention.out_proj.bias, dtype))
        # Quick GELU of h is SiLU of 1.702·h over 1.702: the norm before brings the factor, the sum after takes it.
        quick = mlp.config.hidden_act == "quick_gelu"
        self.factor = SLOPE if quick else 1.0
        activation: Any = "silu" if quick else "gelu"
        self.up = PackedLinear(
            mlp.fc1.weight.to(dtype), _cast(mlp.fc1.bias * self.factor, dtype), activation=activation
        )
        self.down = PackedLinear(mlp.fc2.weight.to(dtype), _cast(mlp.fc2.bias * self.factor, dtype))
        self.norms = nn.ModuleList(
            [_Norm(layer.layer_norm1, dtype), _Norm(layer.layer_norm2, dtype, factor=self.factor)]
        )

    def forward(self, x: Float[Tensor, "b m w"]) -> Float[Tensor, "b m w"]:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, scale=self.scale)  # (b, h, m, w/h)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x.add_(self.down(self.up(self.norms[1](x))), alpha=1 / self.factor)


class _Norm(nn.Module):
    """`factor` times a layer norm."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype, *, factor: float = 1.0) -> None:
        super().__init__()
        kept = dtype if factor == 1 else torch.float32  # a scaled weight would be rounded once more
        self.tensors = [(factor * value.detach().float()).to(kept) for value in (norm.weight, norm.bias)]
        self.eps = norm.eps

    def forward(self, x: Float[Tensor, "... w"]) -> Float[Tensor, "... w"]:
        weight, bias = self.tensors
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.detach().to(dtype)


# Beside the models, not in them: packed tensors can neither be pickled nor copied, and models must be.
_PACKED: PackedCopies[PackedVision] = PackedCopies()


def packed_vision(clip: CLIPModel | CLIPVisionModelWithProjection, dtype: torch.dtype) -> PackedVision | None:
    """The packed vision tower of a CLIP, made once, and again when its weights change; None where it cannot be packed.

    Its results have no gradients.
    """
    weight = clip.visual_projection.weight
    activation = clip.vision_model.config.hidden_act
    if not can_pack(weight.device, dtype) or activation not in ("quick_gelu", "gelu"):
        return None
    return _PACKED.get(clip, dtype, lambda: PackedVision(clip, dtype), of=clip.vision_model)
