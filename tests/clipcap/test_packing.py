"""8-bit matrix products beside the exact ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from clipcap.packing import CHUNK, Head, _gelu_tanh, _Int8Linear, can_use_int8, decoding_parts
from common.checks import UserError

pytestmark = pytest.mark.skipif(not can_use_int8(torch.zeros(1)), reason="torch has no 8-bit kernels here")


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("transposed", [False, True])  # GPT-2's weights are views of transposed tensors
def test_int8_linear_is_the_integer_formula(rows, gelu, transposed):
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=generator) for s in ((2, rows, 24), (40, 24), (40,)))
    w = w.T.contiguous().T if transposed else w
    sx = x.abs().amax(-1, keepdim=True) / 127
    sw = w.abs().amax(1) / 127
    expected = (x / sx).round() @ (w / sw[:, None]).round().T * sx * sw + b  # whole numbers, exact in float32
    expected = F.gelu(expected, approximate="tanh") if gelu else expected
    found = _Int8Linear(w, b, gelu=gelu)(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    exact = F.linear(x, w, b)
    exact = F.gelu(exact, approximate="tanh") if gelu else exact
    assert (found - exact).norm() / exact.norm() < 0.02


def test_gelu_is_torchs():
    x = torch.linspace(-30, 30, 2001)[None]
    torch.testing.assert_close(_gelu_tanh(x), F.gelu(x, approximate="tanh"), atol=1e-6, rtol=1e-6)


def test_zeros_and_bfloat16():
    layer = _Int8Linear(torch.randn(8, 16), None)
    assert not layer(torch.zeros(3, 16)).any()
    assert layer(torch.ones(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_rows_do_not_depend_on_their_neighbours():
    x = torch.randn(5, 16)
    head = Head(torch.randn(33, 16), packed=True, int8=True)
    together = torch.cat(list(head.chunks(x)), -1)
    loud = torch.cat(list(head.chunks(torch.cat([x, 1000 * x]))), -1)[:5]
    assert torch.equal(together, loud)


@torch.inference_mode()
def test_a_whole_gpt2_in_int8_is_close():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=16)).eval()
    x = torch.randn(3, 9, 64)
    exact = model(inputs_embeds=x).logits
    transformer, head = decoding_parts(model, int8=True)
    found = torch.cat(list(head.chunks(transformer(inputs_embeds=x).last_hidden_state)), -1)
    assert 1e-5 < (found - exact).norm() / exact.norm() < 0.03


def test_the_vocabulary_is_split_for_a_cpu_alone():
    assert len(Head(torch.zeros(CHUNK + 1, 4), packed=False).parts) == 2
    table = torch.zeros(CHUNK + 1, 4, device="meta")  # stands for a GPU's
    (logits,) = Head(table, packed=False).chunks(torch.zeros(3, 4, device="meta"))
    assert logits.shape == (3, CHUNK + 1)


def test_int8_needs_a_cpu():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9))
    with pytest.raises(UserError, match="int8"):
        decoding_parts(model, int8=True)
