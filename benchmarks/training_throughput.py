"""Training samples per CPU second at full size (GPT-2 124M, random weights) against the original's training step.

The original's way, as a plain loop: captions padded to one length, logits at every position, and every parameter of
GPT-2 collecting a gradient, also where only the mapper is trained. Ours: captions of similar length together, padded to
the longest of the batch, logits where a token is predicted and computed once, a frozen GPT-2 without gradients, GELU
and AdamW in one operation each. Both sides train the same captions, whose lengths are drawn like COCO's, with AdamW,
and their loss is the same at the same weights.

Keys of the last line: `{mapper}_{tuned|frozen}_{precision}_ratio`, times faster than the plain step in fp32 with the
same mapper; `..._seconds`, CPU seconds for each caption; `..._of_floor`, the arithmetic that our step cannot do without
over the matrix rate measured in this run, as a share of the time; `..._loss_difference` between the two sides. A
processor without bf16 leaves `bf16` out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config

from benchmarks import parser_of, print_result
from benchmarks.caption_throughput import fast_precisions, stock_activation
from benchmarks.timing import cpu_seconds
from clipcap.config import ClipCapConfig
from clipcap.data.dataset import collate
from clipcap.model import ClipCapModel
from common.batches import BatchOrder
from common.runtime import autocast, fork_generators, resolve_dtype

PADDED = 40
"""Length to which the original pads every caption: about the mean of COCO's and ten standard deviations."""
VARIANTS = {"mlp_tuned": ("mlp", True), "transformer_frozen": ("transformer", False)}


def caption_lengths(count: int, seed: int) -> np.ndarray:
    """Tokens of COCO-like captions: 8 at least, 11.4 in the mean, a few above 16."""
    return 8 + np.random.default_rng(seed).negative_binomial(4, 0.54, count).clip(0, PADDED - 9)


def build_model(variant: str, seed: int) -> ClipCapModel:
    """A captioner of the paper's size with random weights, without dropout so that both sides can be compared."""
    mapper, tuned = VARIANTS[variant]
    sizes = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).to_dict()
    with fork_generators(seed):
        return ClipCapModel(ClipCapConfig(mapper=mapper, tune_gpt2=tuned, gpt2_config=sizes, clip_width=512)).train()


def plain_loss(model: ClipCapModel, batch: dict[str, Tensor]) -> Tensor:
    """The original's forward: the whole padded sequence, logits everywhere, then those of the caption are cut out."""
    tokens, labels = batch["input_ids"], batch["labels"]
    missing = PADDED - tokens.shape[1]
    tokens, labels = F.pad(tokens, (0, missing)), F.pad(labels, (0, missing), value=-100)
    mask = F.pad(batch["attention_mask"], (0, missing))
    prefix = model.prefix(batch["clip_embeddings"])
    inputs = torch.cat([prefix, model.gpt2.get_input_embeddings()(tokens)], dim=1)
    mask = torch.cat([mask.new_ones(prefix.shape[:2]), mask], dim=1)
    logits = model.gpt2(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
    logits = logits[:, prefix.shape[1] - 1 : -1]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def our_loss(model: ClipCapModel, batch: dict[str, Tensor]) -> Tensor:
    """The loss that `clipcap train` computes."""
    loss = model(batch["clip_embeddings"], batch["input_ids"], labels=batch["labels"], return_logits=False).loss
    assert loss is not None
    return loss


def training_step(
    model: ClipCapModel,
    loss: Callable[[ClipCapModel, dict[str, Tensor]], Tensor],
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    precision: str,
) -> float:
    """Forward, backward and AdamW on one batch; returns the loss."""
    with autocast(torch.device("cpu"), precision):
        value = loss(model, batch)
    value.backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    return value.item()


def matrix_rate(dtype: torch.dtype) -> float:
    """Multiply-adds per CPU second of a large matrix product as training does it, weights in the plain layout."""
    x, weight = torch.randn(1024, 768).to(dtype), torch.randn(3072, 768).to(dtype)
    return 1024 * weight.numel() / cpu_seconds(lambda: F.linear(x, weight), 7)


def multiply_adds(model: ClipCapModel, tokens: float) -> float:
    """Multiply-adds with weights that one caption of `tokens` tokens needs, forward and backward.

    One for each weight and position going forward, one for the gradient of the input, and one for the gradient of the
    weight where it is trained.
    """
    config = model.config
    parts: Any = model.mapper
    through = 3 if config.tune_gpt2 else 2
    blocks = sum(p.numel() for p in model.gpt2.transformer.h.parameters())
    head = model.gpt2.lm_head.weight.numel()
    if config.mapper == "mlp":
        mapper = 3 * sum(p.numel() for p in parts.parameters())
    else:
        each = sum(p.numel() for p in parts.transformer.parameters())
        mapper = 3 * (each * (config.clip_length + config.prefix_length) + parts.linear.weight.numel())
    return mapper + through * (blocks * (config.prefix_length + tokens - 1) + head * tokens)


def main() -> None:
    parser = parser_of(__doc__, quick="batches of 10, one step of each", threads=True, seed="weights and captions")
    parser.add_argument("--steps", type=int, default=3, help="steps of each kind, of which the fastest counts")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batch_size, steps = (10, 1) if arguments.quick else (40, arguments.steps)

    rng = np.random.default_rng(arguments.seed)
    lengths = caption_lengths(BatchOrder.POOL * batch_size, arguments.seed)
    items = [
        {
            "embedding": torch.from_numpy(rng.standard_normal(512, dtype=np.float32)),
            "ids": rng.integers(0, 50256, int(length) - 1).tolist() + [50256],
        }
        for length in lengths
    ]
    join = collate(50256)
    buckets = BatchOrder(len(lengths), batch_size, seed=arguments.seed, lengths=lengths).order().reshape(-1, batch_size)
    order = buckets.ravel()
    padded = float(np.mean([lengths[rows].max() for rows in buckets]))
    # Batches whose padded length is nearest to the mean one, so that a few steps stand for an epoch.
    typical = sorted(buckets, key=lambda rows: abs(lengths[rows].max() - padded))[:steps]
    batches = [join([items[row] for row in rows]) for rows in typical]
    result: dict[str, object] = {
        "batch_size": batch_size, "steps": steps,
        "mean_tokens": float(lengths[order].mean()), "mean_padded_tokens": padded, "original_padded_tokens": PADDED,
    }  # fmt: skip
    rates = {precision: matrix_rate(resolve_dtype(precision)) for precision in fast_precisions()}
    result |= {f"{precision}_gflops": 2e-9 * rate for precision, rate in rates.items()}

    for variant in VARIANTS:
        model = build_model(variant, arguments.seed)
        trained = [p for p in model.parameters() if p.requires_grad]

        losses: dict[tuple[str, Callable], float] = {}

        def run(  # bound to this variant
            loss: Callable, precision: str, model: Any = model, trained: Any = trained, losses: Any = losses
        ) -> float:
            # The rate is 0 for the same weights on both sides; the work is the same.
            optimizer = torch.optim.AdamW(trained, lr=0.0, fused=loss is our_loss or None)
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # makes its state, which is no part of a step
            model.zero_grad(set_to_none=True)
            seconds = []
            for batch in batches:
                begin = time.process_time()
                losses[precision, loss] = training_step(model, loss, optimizer, batch, precision)
                seconds.append(time.process_time() - begin)
            return min(seconds) / batch_size

        with torch.no_grad():
            our_loss(model, join(items[:2]))  # warm up
        for parameter in model.gpt2.parameters():  # the original trains the mapper alone by the optimizer's list alone
            parameter.requires_grad_(True)
        with stock_activation(model):
            plain = run(plain_loss, "fp32")
        if not model.config.tune_gpt2:
            for parameter in model.gpt2.parameters():
                parameter.requires_grad_(False)
        result[f"{variant}_plain_seconds"] = plain
        print(f"{variant}: the original's way {plain:.3f} s a caption", flush=True)
        for precision in fast_precisions():
            seconds = run(our_loss, precision)
            key = f"{variant}_{precision}"
            floor = multiply_adds(model, float(lengths[order].mean())) / rates[precision]
            difference = abs(losses[precision, our_loss] - losses["fp32", plain_loss])
            result |= {
                f"{key}_ratio": plain / seconds,
                f"{key}_seconds": seconds,
                f"{key}_of_floor": floor / seconds,
                f"{key}_loss_difference": difference,
            }
            print(
                f"{key}: {seconds:.3f} s a caption, {plain / seconds:.2f}x, {floor / seconds:.0%} of the floor, "
                f"loss apart by {difference:.1e}",
                flush=True,
            )
    print_result(result)


if __name__ == "__main__":
    main()
