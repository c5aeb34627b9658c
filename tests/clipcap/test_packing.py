"""8-bit matrix products beside the exact ones, on processors of either kind: with weights up to 127, and up to 64."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from clipcap.captioner import Captioner
from clipcap.data.images import read_image
from clipcap.decoding import decode
from clipcap.packing import (
    CHUNK,
    Head,
    _gelu_tanh,
    _Int8Linear,
    _is_exact,
    can_use_int8,
    decoding_parts,
    largest_int8_weight,
)
from common.checks import UserError
from common.pretrained import ASSETS

pytestmark = pytest.mark.skipif(not can_use_int8(), reason="torch has no 8-bit kernels here")
LARGEST = [None, 64]  # what this processor takes; what every processor takes


def integer_formula(x, w, b, largest):
    """x Wᵀ + b with activations rounded to 127 and weights to `largest` steps."""
    x, w = x.double(), w.double()
    sx, sw = x.abs().amax(-1, keepdim=True) / 127, w.abs().amax(1) / largest
    return ((x / sx).round() @ (w / sw[:, None]).round().T * sx * sw + b).float()


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 200])
@pytest.mark.parametrize("transposed", [False, True])  # GPT-2's weights are views of transposed tensors
def test_int8_linear_is_the_integer_formula(rows, gelu, transposed, largest):
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=generator) for s in ((2, rows, 24), (40, 24), (40,)))
    w = w.T.contiguous().T if transposed else w
    expected = integer_formula(x, w, b, largest or largest_int8_weight())
    expected = F.gelu(expected, approximate="tanh") if gelu else expected
    found = _Int8Linear(w, b, gelu=gelu, largest=largest)(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    exact = F.linear(x, w, b)
    exact = F.gelu(exact, approximate="tanh") if gelu else exact
    assert (found - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("inputs", [1, 2, 25, 262, 768, 3072])
def test_the_largest_activations_and_weights_are_multiplied_exactly(inputs, largest):
    """For each output the activations that give its largest sum, which 16 bits may not hold, and its least."""
    w = (2.0 * torch.randint(2, (9, inputs), generator=torch.Generator().manual_seed(0)) - 1) / 127
    w[0], w[1] = 1, -1
    x = torch.cat((127 * w.sign(), -127 * w.sign()))
    found = _Int8Linear(w, None, largest=largest)(x)
    exact = (x.double() @ w.double().T).float()  # some sums are 0, where float32 has a rest of its own
    torch.testing.assert_close(found, exact, atol=1e-7, rtol=1e-5)


def test_what_every_processor_computes_exactly():
    assert _is_exact(64)
    assert largest_int8_weight() in (64, 127) and _is_exact(largest_int8_weight())


PROBE = "from clipcap.packing import _is_exact, largest_int8_weight as f; print(f(), _is_exact(127), _is_exact(64))"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86's instruction sets")
@pytest.mark.slow
def test_a_processor_without_vnni_is_found_out(root):
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    found = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True)
    assert found.stdout.split() == ["64", "False", "True"], found.stderr


def test_a_processor_that_is_never_exact_is_refused(monkeypatch):
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, bos_token_id=0, eos_token_id=0))
    monkeypatch.setattr("clipcap.packing.largest_int8_weight", lambda: 0)
    with pytest.raises(UserError, match="int8 is not exact on this processor.*leave int8 out"):
        decoding_parts(model, int8=True)


def test_kernels_that_saturate_or_do_not_exist_are_not_exact(monkeypatch):
    product = torch.ops.onednn.qlinear_pointwise

    def off_by_one(*arguments):
        return product(*arguments) + 1

    def missing(*arguments):
        raise NotImplementedError("no such kernel")

    for kernel in (off_by_one, missing):
        monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", kernel)
        assert not _is_exact(64)


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
@pytest.mark.parametrize("largest", LARGEST)
def test_a_whole_gpt2_in_int8_is_close(largest, monkeypatch):
    if largest:
        monkeypatch.setattr("clipcap.packing.largest_int8_weight", lambda: largest)
    torch.manual_seed(0)
    sizes = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    x = torch.randn(3, 9, 64)
    exact = model(inputs_embeds=x).logits
    transformer, head = decoding_parts(model, int8=True)
    found = torch.cat(list(head.chunks(transformer(inputs_embeds=x).last_hidden_state)), -1)
    assert 1e-5 < (found - exact).norm() / exact.norm() < 0.03


@torch.inference_mode()
@pytest.mark.parametrize("largest", LARGEST)
def test_int8_on_the_packaged_captioner(largest, monkeypatch):
    """Along the captions of 32 scenes: 1.3% and 0.0008 nats with 127, 1.8% and 0.0015 nats with 64."""
    if largest:
        monkeypatch.setattr("clipcap.packing.largest_int8_weight", lambda: largest)
    captioner = Captioner.from_pretrained("tiny", device="cpu")
    model = captioner.model
    embeddings = captioner.embed([read_image(ASSETS / "samples" / "scenes" / f"test_{n:03}.jpg") for n in range(8)])
    found = decode(model, embeddings, strategy="greedy", max_new_tokens=8, stop_token_ids=[])
    ids = torch.tensor([caption.token_ids for [caption] in found])
    x = torch.cat((model.prefix(embeddings), model.gpt2.transformer.wte(ids)), 1)
    exact = model.gpt2(inputs_embeds=x).logits[:, -9:]
    transformer, head = decoding_parts(model.gpt2, int8=True)
    logits = torch.cat(list(head.chunks(transformer(inputs_embeds=x).last_hidden_state)), -1)[:, -9:]
    assert (logits - exact).norm() / exact.norm() < 0.03
    divergence = (exact.softmax(-1) * (exact.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
    assert divergence < 0.004


def test_the_vocabulary_is_split_for_a_cpu_alone():
    assert len(Head(torch.zeros(CHUNK + 1, 4), packed=False).parts) == 2
    table = torch.zeros(CHUNK + 1, 4, device="meta")  # stands for a GPU's
    (logits,) = Head(table, packed=False).chunks(torch.zeros(3, 4, device="meta"))
    assert logits.shape == (3, CHUNK + 1)


def test_int8_needs_a_cpu():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, bos_token_id=0, eos_token_id=0))
    with pytest.raises(UserError, match="int8 needs a CPU but the device is 'meta'"):
        decoding_parts(model, int8=True)
