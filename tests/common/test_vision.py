"""The packed vision tower beside the model that it is made of."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from common.packing import PackedLinear, can_pack
from common.vision import packed_vision

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="torch has no oneDNN here")


def random_tower(activation: str = "quick_gelu") -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=8,
        projection_dim=12, hidden_act=activation,
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that no term can hide
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.requires_grad_(False)


@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "gelu_tanh"])
def test_linear(activation):
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(6)
    functions = {"none": nn.Identity(), "silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh")}
    expected = functions[activation](x @ w.T + b)
    torch.testing.assert_close(PackedLinear(w, b, activation=activation)(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_tower(activation):
    model, pixels = random_tower(activation), torch.randn(3, 3, 24, 24)
    expected = model(pixel_values=pixels)
    tower = packed_vision(model, torch.float32)
    tokens, embedding = tower(pixels)
    torch.testing.assert_close(tokens, expected.last_hidden_state, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(embedding, expected.image_embeds, atol=1e-4, rtol=1e-4)
    assert packed_vision(model, torch.float32) is tower
    assert not list(tower.parameters()) and not tower.state_dict()
    assert packed_vision(random_tower("relu"), torch.float32) is None


@pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="torch has no bf16 kernels here")
def test_bf16_is_as_close_as_the_models_own():
    model, pixels = random_tower(), torch.randn(16, 3, 24, 24)
    exact = model(pixel_values=pixels).image_embeds
    packed = packed_vision(model, torch.bfloat16)(pixels)[1]
    half = copy.deepcopy(model).bfloat16()
    own = half(pixel_values=pixels.bfloat16()).image_embeds
    packed_half = packed_vision(half, torch.bfloat16)(pixels)[1]
    assert packed.dtype == packed_half.dtype == torch.bfloat16
    error = (own - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.05
    assert (packed - exact).norm() / exact.norm() < 1.2 * error
    assert (packed_half - exact).norm() / exact.norm() < 1.2 * error


def test_changed_weights_are_packed_again_and_models_stay_copyable():
    model, pixels = random_tower(), torch.randn(1, 3, 24, 24)
    before = packed_vision(model, torch.float32)(pixels)[1]
    assert torch.equal(packed_vision(copy.deepcopy(model), torch.float32)(pixels)[1], before)
    model.vision_model.encoder.layers[1].mlp.fc1.weight.data *= 2
    after = packed_vision(model, torch.float32)(pixels)[1]
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, model(pixel_values=pixels).image_embeds, atol=1e-4, rtol=1e-4)
