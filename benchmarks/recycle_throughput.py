"""Tokens per second and peak memory of recycling at full size: GPT-2 124M, a new vocabulary of 40,000, random weights.

Two comparisons, each in one run of this file: a step that trains the lexical embeddings alone against one that trains
everything (both with AMSGrad Adam, as published), and the chunked loss against the plain one. Each measurement is a
process of its own, so that its peak memory is its own. CPU seconds, not wall seconds, because machines are shared.

Keys of the last line: `embedding_only_tokens_ratio`, tokens for each CPU second of the embedding-only step over those
of the full one; `optimizer_memory_ratio`, bytes of optimizer state likewise; `chunked_loss_peak_ratio`, memory that the
chunked loss and its gradient take on top of their inputs and gradients, over that of the plain loss; `..._growth`, how
much that memory grows from a vocabulary of 20,000 to one of 40,000.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import parser_of, print_result
from common.runtime import fork_generators
from recycle_gpt2.lexical import train_only
from recycle_gpt2.loss import next_token_loss, tied_cross_entropy
from recycle_gpt2.training import PUBLISHED, build_optimizer, flops_per_token

WIDTH = 768
PAGE = resource.getpagesize()


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def peak_above(work: Callable[[], object]) -> int:
    """The most bytes that `work` holds beyond what is held before it, sampled every millisecond."""
    before, most, over = resident(), [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            most[0] = max(most[0], resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    over.set()
    watcher.join()
    return max(0, most[0] - before)


def measure_step(which: str, *, vocab: int, tokens: int, steps: int) -> dict[str, Any]:
    """Training steps of the whole model or of its embeddings alone."""
    with fork_generators(0):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, eos_token_id=0, bos_token_id=0))
        batch = torch.randint(1, vocab, (1, tokens))
    model.train()
    train_only(model, layers="all" if which == "full" else ())
    optimizer = build_optimizer(model, PUBLISHED)
    times = []
    for _ in range(steps + 1):  # the first one makes the optimizer's state
        begin = time.process_time()
        optimizer.zero_grad()
        next_token_loss(model, batch).backward()
        optimizer.step()
        times.append(time.process_time() - begin)
    state = sum(
        value.numel() * value.element_size()
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    )
    return {
        "tokens_per_second": tokens / min(times[1:]),
        "optimizer_bytes": state,
        "gflops": 1e-9 * flops_per_token(model, tokens) * tokens / min(times[1:]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure_loss(which: str, *, vocab: int, tokens: int) -> dict[str, Any]:
    """The loss and its gradient for `tokens` positions, the gradients' own memory counted off."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator).requires_grad_()
    table = (0.02 * torch.randn(vocab, WIDTH, generator=generator)).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    warm = tied_cross_entropy if which == "chunked" else (lambda h, t, y: F.cross_entropy(h @ t.T, y))
    warm(hidden[:8], table[:64], labels[:8] % 64).backward()  # libraries allocate on first use
    hidden.grad = table.grad = None
    spent = [0.0]

    def work() -> None:
        begin = time.process_time()
        warm(hidden, table, labels).backward()
        spent[0] = time.process_time() - begin

    peak = peak_above(work)
    gradients = (hidden.numel() + table.numel()) * 4
    return {"peak_bytes": max(1, peak - gradients), "tokens_per_second": tokens / spent[0]}


def in_process(arguments: argparse.Namespace, kind: str, which: str, **sizes: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.recycle_throughput",
        "--threads",
        str(arguments.threads),
        "--measure",
        json.dumps({"kind": kind, "which": which, "sizes": sizes}),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    shown = ", ".join(f"{name} {value:,.0f}" for name, value in found.items())
    print(f"{kind} {which} {sizes}: {shown}", flush=True)
    return found


def main() -> None:
    parser = parser_of(__doc__, quick="256 tokens and one step instead of 1,024 and three", threads=True)
    parser.add_argument("--vocab", type=int, default=40_000, help="tokens of the vocabulary")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        wanted = json.loads(arguments.measure)
        measure = measure_step if wanted["kind"] == "step" else measure_loss
        print(json.dumps(measure(wanted["which"], **wanted["sizes"])))
        return
    tokens, steps = (256, 1) if arguments.quick else (1024, 3)
    full, frozen = (
        in_process(arguments, "step", which, vocab=arguments.vocab, tokens=tokens, steps=steps)
        for which in ("full", "embeddings")
    )
    plain, chunked, half = (
        in_process(arguments, "loss", which, vocab=vocab, tokens=1024)
        for which, vocab in (
            ("plain", arguments.vocab),
            ("chunked", arguments.vocab),
            ("chunked", arguments.vocab // 2),
        )
    )
    result = {
        "embedding_only_tokens_ratio": frozen["tokens_per_second"] / full["tokens_per_second"],
        "optimizer_memory_ratio": frozen["optimizer_bytes"] / full["optimizer_bytes"],
        "peak_memory_ratio": frozen["peak_bytes"] / full["peak_bytes"],
        "chunked_loss_peak_ratio": chunked["peak_bytes"] / plain["peak_bytes"],
        "chunked_loss_peak_growth": chunked["peak_bytes"] / half["peak_bytes"],
        "chunked_loss_speed_ratio": chunked["tokens_per_second"] / plain["tokens_per_second"],
        "full_tokens_per_second": full["tokens_per_second"],
        "embedding_only_tokens_per_second": frozen["tokens_per_second"],
        "vocab": arguments.vocab,
        "tokens": tokens,
    }
    print_result(result)


if __name__ == "__main__":
    main()
