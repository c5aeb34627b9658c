"""Mapping networks: the formulas of the paper written plainly, and sizes that cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipcap.mapper import TransformerMapper, build_mapper
from common.checks import UserError

SIZES = dict(clip_width=12, width=16, prefix_length=3, clip_length=5, num_layers=2, num_heads=4, patches=False)


def naive_transformer(mapper: TransformerMapper, tokens: Tensor) -> Tensor:
    """The Transformer mapper as the original writes it: attention by einsum over (b, n, h, d/h)."""
    x = torch.cat([tokens, mapper.prefix_const.expand(len(tokens), -1, -1)], 1)
    for layer in mapper.transformer.layers:
        y = layer.norm1(x)
        b, n, d = y.shape
        heads = layer.attn.num_heads
        q = layer.attn.to_queries(y).reshape(b, n, heads, d // heads)
        kv = layer.attn.to_keys_values(y).reshape(b, n, 2, heads, d // heads)
        weights = (torch.einsum("bnhd,bmhd->bnmh", q, kv[:, :, 0]) * (d // heads) ** -0.5).softmax(2)
        x = x + layer.attn.project(torch.einsum("bnmh,bmhd->bnhd", weights, kv[:, :, 1]).reshape(b, n, d))
        x = x + layer.mlp.fc2(layer.mlp.fc1(layer.norm2(x)).relu())
    return x[:, tokens.shape[1] :]


def test_transformer_equals_the_plain_formula():
    mapper = build_mapper("transformer", **SIZES)
    x = torch.randn(6, 12)
    expected = naive_transformer(mapper, mapper.linear(x).view(6, 5, 16))
    torch.testing.assert_close(mapper(x), expected, atol=1e-5, rtol=1e-5)


def test_patches_become_one_token_each_and_their_order_does_not_matter():
    mapper = build_mapper("transformer", **SIZES | {"patches": True})
    x = torch.randn(2, 9, 12)
    expected = naive_transformer(mapper, mapper.linear(x))
    torch.testing.assert_close(mapper(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mapper(x[:, torch.randperm(9)]), expected, atol=1e-5, rtol=1e-5)


def test_mlp_equals_the_plain_formula_and_has_the_published_size():
    mapper = build_mapper("mlp", **SIZES)
    x = torch.randn(2, 12)
    (w1, b1), (w2, b2) = ((layer.weight, layer.bias) for layer in (mapper.model[0], mapper.model[2]))
    assert w1.shape == (16 * 3 // 2, 12) and w2.shape == (16 * 3, 16 * 3 // 2)
    torch.testing.assert_close(mapper(x), (torch.tanh(x @ w1.T + b1) @ w2.T + b2).view(2, 3, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix_length": 0}, "prefix_length is 0: use at least 1."),
        ({"clip_length": 0}, "clip_length is 0"),
        ({"num_layers": 0}, "mapper_layers is 0"),
        ({"prefix_length": 10**12}, "prefix_length is 1000000000000, .* GB are free"),
        ({"clip_length": 10**12}, "clip_length 1000000000000 .* GB are free"),
        ({"num_layers": 10**12}, "mapper_layers 1000000000000, which takes"),
        ({"num_heads": 3}, "mapper_heads is 3: use a divisor of GPT-2's width 16."),
    ],
)
def test_impossible_sizes_are_named(change, message):
    with pytest.raises(UserError, match=message):
        build_mapper("transformer", **SIZES | change)


def test_an_mlp_that_does_not_fit_in_memory_is_refused():
    with pytest.raises(UserError, match="prefix_length is 1000000, which takes .* GB"):
        build_mapper("mlp", **SIZES | {"prefix_length": 1_000_000})


def test_mlp_cannot_read_patches():
    with pytest.raises(UserError, match="use mapper 'transformer'"):
        build_mapper("mlp", **SIZES | {"patches": True})
