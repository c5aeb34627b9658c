"""Device, precision, seed and threads: the one place where they are decided."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import numpy as np
import torch

from common.checks import INTEGERS, UserError, require_between, require_one_of
from common.packing import can_pack

Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[str, ...] = ("fp32", "bf16")
DEVICES = ("cpu", "cuda", "mps")
MOST_THREADS = 256
"""Threads that any machine can start; more only where there are as many cores."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how a command computes."""

    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda, cuda:1, mps."""
    precision: Precision = "fp32"
    """fp32 (on a GPU, products in TF32), or bf16 for matrix products; weights in training stay in fp32, those of a
    captioner that is only used are then bf16 too. A CPU without bf16 (AVX2 alone) computes it, but slowly."""
    seed: int = 0
    """Seed of every random choice."""
    threads: int = 0
    """CPU threads; 0 leaves torch's own choice (OMP_NUM_THREADS, else one for each core)."""


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The torch device for a name; "auto" is a GPU when one is there. Unknown or absent devices are named."""
    if isinstance(device, torch.device):
        device = str(device)
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in DEVICES or (resolved.type != "cuda" and resolved.index):
        raise UserError(f"device is {device!r}: use auto, cpu, cuda, cuda:N or mps.")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {device!r} but {torch.cuda.device_count()} CUDA devices are here: use auto or cpu.")
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device is 'mps' but this machine has none: use auto or cpu.")
    return resolved


def own_gpu(device: torch.device) -> torch.device:
    """With its number when it is a GPU: of several processes on a machine, each has its own."""
    if device.type != "cuda" or device.index is not None:
        return device
    number = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return torch.device("cuda", number % torch.cuda.device_count())


def resolve_dtype(precision: str) -> torch.dtype:
    """torch.float32 for "fp32", torch.bfloat16 for "bf16"."""
    require_one_of("precision", precision, PRECISIONS)
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in bf16 when `precision` is "bf16", else nothing."""
    dtype = resolve_dtype(precision)
    return torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()


def require_seed(seed: int) -> None:
    """Raise UserError when `seed` is none that torch's generators take."""
    require_between("seed", seed, 0, INTEGERS - 1)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    require_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def start(config: RuntimeConfig) -> torch.device:
    """Apply a command's runtime choices to this process and return its device.

    Warns on standard error where bf16 is slower than fp32.
    """
    dtype = resolve_dtype(config.precision)
    require_between("threads", config.threads, 0, max(os.cpu_count() or 1, MOST_THREADS))
    if config.threads:
        torch.set_num_threads(config.threads)
    seed_everything(config.seed)
    device = resolve_device(config.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu" and dtype == torch.bfloat16 and not can_pack(device, dtype):
        print("warning: precision is 'bf16', but this processor is faster in fp32: leave it out.", file=sys.stderr)
    return device


@contextlib.contextmanager
def fork_generators(seed: int) -> Iterator[None]:
    """Run a block with its own torch seed and leave the caller's random state untouched."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, StopIteration, ValueError), open("/proc/meminfo") as lines:
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 << 30


def require_memory(what: str, size: float, device: torch.device, cure: str) -> None:
    """Raise UserError when `size` bytes are more than can be had on a device: ask before they are allocated.

    Args:
        what: the setting with its value, as "resolutions is 512".
        size: bytes.
        device: where.
        cure: what to do.
    """
    free = free_memory(device)
    if size > free:
        raise UserError(f"{what}, which takes {size / 1e9:,.1f} GB; {free / 1e9:,.1f} GB are free on {device}: {cure}.")


def hardware() -> str:
    """One line that names the processor, its instruction set, its cores and the GPU, for cards and results."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    instructions = torch.backends.cpu.get_cpu_capability()  # AVX2, AVX512, ...: decides which kernels torch runs
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores {model} ({instructions}){gpu}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of the libraries that decide a result."""
    names = ("torch", "transformers", "open_clip_torch", "lightning", "numpy", "clip-gpt-toolkit")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def provenance() -> dict[str, Any]:
    """What a result was made with, for the files that hold one: "hardware" and "versions"."""
    return {"hardware": hardware(), "versions": versions()}
