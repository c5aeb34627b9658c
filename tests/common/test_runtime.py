"""Device, precision, seed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from common.checks import UserError
from common.runtime import (
    RuntimeConfig,
    autocast,
    fork_generators,
    free_memory,
    hardware,
    own_gpu,
    provenance,
    require_memory,
    resolve_device,
    resolve_dtype,
    seed_everything,
    start,
    versions,
)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="device is 'gpu0'"):
        resolve_device("gpu0")
    with pytest.raises(UserError, match="CUDA devices are here"):
        resolve_device("cuda:99")
    for other in ("meta", "xpu", "hpu", "xla", "vulkan", "cpu:3", torch.device("meta"), "\udcff", "cuda:99999999999"):
        with pytest.raises(UserError, match="device is"):
            resolve_device(other)


def test_precision():
    assert resolve_dtype("fp32") == torch.float32 and resolve_dtype("bf16") == torch.bfloat16
    with pytest.raises(UserError, match="choose one of fp32, bf16"):
        resolve_dtype("fp16")
    a = torch.randn(2, 2)
    with autocast(torch.device("cpu"), "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), "fp32"):
        assert (a @ a).dtype == torch.float32


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_one_seed_decides_every_generator():
    seed_everything(3)
    first = draw()
    assert draw() != first
    seed_everything(3)
    assert draw() == first
    seed_everything(2**40)  # more than NumPy takes
    for seed in (-1, 10**26):
        with pytest.raises(UserError, match="seed is"):
            seed_everything(seed)


def test_threads_that_torch_could_not_start_are_refused():
    for threads in (-1, 10**6, 10**26):
        with pytest.raises(UserError, match="threads is"):
            start(RuntimeConfig(device="cpu", threads=threads))


def test_what_does_not_fit_in_memory_is_refused_with_its_size():
    cpu = torch.device("cpu")
    assert free_memory(cpu) > 0
    require_memory("n is 1", 8, cpu, "use less")
    with pytest.raises(UserError, match=r"n is 2, which takes 8,000,000,000.0 GB; .* GB are free on cpu: use less"):
        require_memory("n is 2", 8e18, cpu, "use less")


def test_start_applies_and_checks_the_configuration():
    threads = torch.get_num_threads()
    try:
        assert start(RuntimeConfig(device="cpu", seed=3, threads=1)) == torch.device("cpu")
        assert torch.get_num_threads() == 1
        first = draw()
        start(RuntimeConfig(device="cpu", seed=3))
        assert draw() == first
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(UserError, match="threads is -1"):
        start(RuntimeConfig(threads=-1))
    with pytest.raises(UserError, match="threads is 1000000: use at most"):  # torch would crash
        start(RuntimeConfig(threads=10**6))
    with pytest.raises(UserError, match="precision"):
        start(RuntimeConfig(precision="fp8"))  # type: ignore[arg-type]


@pytest.mark.parametrize("fast", [False, True])
def test_bf16_is_warned_of_where_it_is_slow(monkeypatch, capsys, fast):
    monkeypatch.setattr("common.runtime.can_pack", lambda device, dtype: fast)
    start(RuntimeConfig(device="cpu", precision="bf16"))
    assert capsys.readouterr().err.count("precision is 'bf16', but this processor is faster in fp32") == (not fast)
    start(RuntimeConfig(device="cpu"))
    monkeypatch.setattr("common.runtime.resolve_device", torch.device)
    start(RuntimeConfig(device="mps", precision="bf16"))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("device", "expected"), [("cuda", ["high"]), ("cuda:1", ["high"]), ("cpu", []), ("mps", [])])
def test_products_on_a_gpu_use_its_tensor_cores(monkeypatch, device, expected):
    called = []
    monkeypatch.setattr("common.runtime.resolve_device", torch.device)
    monkeypatch.setattr("torch.set_float32_matmul_precision", called.append)
    assert start(RuntimeConfig(device=device)) == torch.device(device)
    assert called == expected


def test_fork_generators_leaves_the_outer_state():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with fork_generators(7):
        inner = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with fork_generators(7):
        assert torch.equal(torch.rand(3), inner)


def test_hardware_and_versions_for_cards():
    assert "cores" in hardware() and "\n" not in hardware()
    assert provenance() == {"hardware": hardware(), "versions": versions()}
    assert f"({torch.backends.cpu.get_cpu_capability()})" in hardware()
    assert versions()["torch"] == torch.__version__.split("+")[0] or "torch" in versions()


@pytest.mark.parametrize("variable, number, expected", [("LOCAL_RANK", "2", 2), ("SLURM_LOCALID", "5", 1), ("", "", 0)])
def test_each_process_has_its_own_gpu(monkeypatch, variable, number, expected):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    if variable:
        monkeypatch.setenv(variable, number)
    assert own_gpu(torch.device("cuda")) == torch.device("cuda", expected)
    assert own_gpu(torch.device("cuda:3")) == torch.device("cuda:3")
    assert own_gpu(torch.device("cpu")) == torch.device("cpu")
