"""What torch.compile gives a training step, and what it costs (GPT-2 124M tuned behind an MLP mapper, random weights).

The same step as in `benchmarks.training_throughput`, GPT-2's Transformer compiled or not, on one batch. The cost is
that of the first step in a fresh cache, the C++ compiler's time included. CPU seconds on one thread.

Keys of the last line: `eager_seconds` and `compiled_seconds` of a step; `compiled_ratio`, eager over compiled;
`compile_seconds`, the first step's beyond a later one's; `steps_to_pay`, after which it has paid, or null if it never
does; `skipped`, a reason instead of all of these where there is no C++ compiler.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time

import torch

from benchmarks import parser_of, print_result
from benchmarks.timing import cpu_seconds, with_children
from benchmarks.training_throughput import build_model, our_loss, training_step
from common.runtime import fork_generators


def main() -> None:
    parser = parser_of(__doc__, quick="two of GPT-2's layers, a batch of 10", threads=True, seed="weights and captions")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the matrix products")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, object] = {"precision": arguments.precision}
    if not any(map(shutil.which, ("g++", "clang++", os.environ.get("CXX", "")))):
        print_result(result | {"skipped": "torch.compile needs a C++ compiler and there is none"})
        return
    batch_size, tokens = 10 if arguments.quick else 40, 12
    with fork_generators(arguments.seed):
        model = build_model("mlp_tuned", arguments.seed)
        ids = torch.randint(50256, (batch_size, tokens))
        batch = {"clip_embeddings": torch.randn(batch_size, 512), "input_ids": ids, "labels": ids}
    if arguments.quick:
        del model.gpt2.transformer.h[2:]
        model.gpt2.config.n_layer = 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> float:
        return training_step(model, our_loss, optimizer, batch, arguments.precision)

    loss = step()  # warm up
    eager = cpu_seconds(step, 2)
    print(f"eager: {eager:.2f} s a step", flush=True)
    begin = time.time()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # so that nothing of an earlier run is found
        torch._inductor.config.compile_threads = 1  # in this process, where its time is counted
        model.gpt2.transformer.compile()
        first = cpu_seconds(step, clock=with_children)
        seconds = cpu_seconds(step, 2)
        difference = abs(step() - loss)
    cost = first - seconds
    result |= {
        "batch_size": batch_size, "tokens": tokens, "layers": len(model.gpt2.transformer.h),
        "eager_seconds": eager, "compiled_seconds": seconds, "compiled_ratio": eager / seconds,
        "compile_seconds": cost, "compile_wall_seconds": time.time() - begin, "loss_difference": difference,
        "steps_to_pay": round(cost / (eager - seconds)) if eager > seconds else None,
    }  # fmt: skip
    print(f"compiled: {seconds:.2f} s a step, {eager / seconds:.2f}x, after {cost:.0f} s of compiling", flush=True)
    print_result(result)


if __name__ == "__main__":
    main()
