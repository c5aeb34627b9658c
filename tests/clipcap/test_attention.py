"""What packing puts in the place of the library's attention and norms, beside the plain formulas."""

from __future__ import annotations

import pytest
import torch

from clipcap.packing import RMSNorm, grouped_attention


def attention_layer(groups: int) -> torch.nn.Module:
    layer = torch.nn.Module().eval()
    layer.num_key_value_groups = groups
    return layer


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("images", [1, 2])
def test_grouped_attention_equals_that_with_copied_keys(groups, images):
    """Six query heads, each over the keys of its group, with a mask of one image or of each."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 5, 4, generator=generator)
    key, value = (torch.randn(2, 6 // groups, 9, width, generator=generator) for width in (4, 7))
    mask = torch.randn(images, 1, 5, 9, generator=generator).masked_fill_(torch.eye(5, 9).bool(), float("-inf"))
    found, _ = grouped_attention(attention_layer(groups), query, key, value, mask, scaling=0.3)
    scores = 0.3 * query @ key.repeat_interleave(groups, 1).mT + mask
    expected = scores.softmax(-1) @ value.repeat_interleave(groups, 1)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_grouped_attention_without_a_mask_is_the_library_s():
    query, key = torch.randn(2, 6, 5, 4), torch.randn(2, 2, 5, 4)
    found, _ = grouped_attention(attention_layer(3), query, key, key, None, is_causal=True)
    copied = key.repeat_interleave(3, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, copied, copied, is_causal=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_the_norm_is_the_library_s():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm, x = LlamaRMSNorm(12, eps=1e-2), torch.randn(3, 5, 12)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(12))
        torch.testing.assert_close(RMSNorm(norm.weight, 1e-2)(x), norm(x))
