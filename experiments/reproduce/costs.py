"""What the published recipes cost in floating-point operations and memory, and how long that takes here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Cost:
    """What a phase of the published recipe takes."""

    phase: str
    flops: float
    memory: float
    """Bytes: weights, gradients, the optimizer's state and what is kept for the backward pass."""


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product (2048 x 768 by 768 x 3072), the best of five.

    On a CPU seconds are of one thread's work, times the threads: what else runs here does not count.
    """
    x, y = (torch.randn(shape, device=device).to(dtype) for shape in ((2048, 768), (768, 3072)))
    on_cpu, best = device.type == "cpu", float("inf")
    products = 1 if on_cpu else 100  # one lasts no longer on a GPU than to ask for it
    clock = time.process_time if on_cpu else time.perf_counter
    for _ in range(6):  # the first only warms up
        begun = clock()
        for _ in range(products):
            z = x @ y
        z[0, 0].item()  # waits for a GPU
        best = min(best, clock() - begun)
    return products * 2.0 * 2048 * 768 * 3072 / best * (torch.get_num_threads() if on_cpu else 1)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def blocks(layers: int, width: int) -> float:
    """Weights of a Transformer's matrices."""
    return 12.0 * layers * width**2


def training_memory(weights: float, trained: float, *, states: int, kept: float) -> float:
    """Bytes in float32: weights; for trained ones a gradient, the optimizer's `states` and what it computes with.

    `kept` is for the backward pass; a GiB is for the program.
    """
    return 4 * (weights + trained * (2 + states)) + kept + 2**30


def kept_for_backward(layers: int, width: int, heads: int, batch: int, tokens: int) -> float:
    """Bytes of activations in float32 (Korthikanti et al. 2022, eq. 2, twice its 16 bits)."""
    return 2.0 * layers * batch * tokens * (34 * width + 5 * heads * tokens)


VIT = (blocks(12, 768) + 3072 * 768) * 50
"""Multiply-adds of ViT-B/32 for an image: 49 patches and the class token."""
SMALL, HEAD = blocks(12, 768), 50257.0 * 768
CAPTION, PREFIX = 13, 10
"""Tokens of a caption with its end (COCO's mean, benchmarks/training_throughput.py), and of the prefix."""


def captioner_costs(images: int, captions: int, scored: int) -> list[Cost]:
    """Both of the paper's captioners, 10 epochs at batch 40."""
    language = SMALL * (PREFIX + CAPTION) + HEAD * CAPTION
    kept = kept_for_backward(12, 768, 12, 40, PREFIX + CAPTION) + 40 * CAPTION * 50257 * 8
    mappers = {
        "transformer-frozen": (512 * 7680 + 64.0 * 768**2 * 20, 512 * 7680 + 64.0 * 768**2),
        "mlp-tuned": (512 * 3840 + 3840.0 * 7680,) * 2,
    }
    scoring = scored * (2 * VIT + 5 * CAPTION * 2 * (SMALL + HEAD))
    costs = [Cost("embedding the images", 2 * VIT * images, 4 * 151e6 + 1e9)]
    for name, (work, size) in mappers.items():
        tuned = name == "mlp-tuned"
        trained = size + tuned * (SMALL + HEAD)
        flops = 10.0 * captions * ((6 if tuned else 4) * language + 6 * work)
        weights = SMALL + HEAD + size
        costs.append(Cost(f"training {name}", flops, training_memory(weights, trained, states=2, kept=kept)))
        costs.append(Cost(f"captioning {scored:,} images by {name}", scoring, 4 * (weights + 151e6) + 1e9))
    return costs


FIELD = 593_408
"""Multiply-adds of the published MLP for a point."""
FIELD_STEPS = 200_000


def field_costs(arms: dict[str, tuple[int, bool]], scenes: int) -> list[Cost]:
    """Training and scoring by 25 views of 400x400; `arms` has the samples of a ray and whether CLIP is in the loss."""
    costs = []
    for name, (samples, semantic) in arms.items():
        step = 1024.0 * samples * 6 * FIELD
        if semantic:
            step += (168**2 * samples * 8 * FIELD + 6 * VIT) / 10  # 8: rendered again in the backward pass
        scoring = 25.0 * 400**2 * samples * 2 * FIELD
        kept = 4096.0 * samples * 256 * 11 * 4 if semantic else 1024.0 * samples * 256 * 11 * 4
        memory = training_memory(semantic * 151e6 + 2 * FIELD, 2 * FIELD, states=2, kept=kept)
        phase = f"{name}, {scenes} scene{'s' * (scenes > 1)}"
        costs.append(Cost(phase, scenes * (FIELD_STEPS * step + scoring), memory))
    return costs


def recycling_costs(text: Path, vocab_size: int) -> list[Cost]:
    """One pass over the text there, or over a gigabyte where there is none, at 4 bytes a token."""
    size = sum(file.stat().st_size for file in text.rglob("*") if file.is_file()) if text.is_dir() else 0
    given = f"{size / 1e6:,.1f} MB" if size else "a GB of text"
    tokens = (size or 1e9) / 4
    costs = []
    for name, layers, width, heads, share, whole in (
        ("relearning small", 12, 768, 12, 1.0, False),
        ("relearning medium after alignment", 24, 1024, 16, 0.25, False),
        ("fine-tuning small", 12, 768, 12, 1.0, True),
    ):
        matrices, table = blocks(layers, width), float(vocab_size * width)
        attention = 3 * 4.0 * 1024 * width * layers
        flops = share * tokens * ((6 if whole else 4) * matrices + 6 * table + attention)
        trained = table + whole * matrices
        kept = kept_for_backward(layers, width, heads, 8, 1024)
        memory = training_memory(matrices + table, trained, states=3, kept=kept)
        costs.append(Cost(f"{name}, {given}", flops, memory))
    return costs
