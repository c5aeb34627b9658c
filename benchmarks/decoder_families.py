"""Captions per second with a Llama-like decoder of 135M (SmolLM2-135M's sizes) against transformers' `generate`.

Random weights, prefixes of 10 positions, beam 5 unless told otherwise, 20 tokens (no stop token can be reached), fp32,
one thread, both sides in the same process and turn by turn. CPU seconds, not wall seconds, because machines are shared.

Keys of the last line: `{strategy}_b{batch}_ratio`, times faster than `generate`; `..._captions_per_second`, ours;
`..._identical`, share of the images whose best caption is the same; `..._of_floor`, the products' arithmetic over the
matrix rate measured in this run, as a share of our time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks import parser_of, print_result
from benchmarks.caption_throughput import matrix_rate
from benchmarks.timing import in_turns
from clipcap.config import ClipCapConfig
from clipcap.decoding import decode
from clipcap.model import ClipCapModel
from common.decoders.families import blocks
from common.runtime import fork_generators

TOKENS = 20
SMOLLM2_135M = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "rope_theta": 100_000, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def build_model(layers: int, seed: int) -> ClipCapModel:
    """The decoder behind an MLP mapper with a prefix of 10, with random weights."""
    with fork_generators(seed):
        sizes = SMOLLM2_135M | {"num_hidden_layers": layers}
        return ClipCapModel(ClipCapConfig(gpt2_config=sizes, clip_width=512, prefix_length=10)).eval()


@torch.no_grad()
def library(model: ClipCapModel, embeddings: Float[Tensor, "b e"], beams: int) -> Int[Tensor, "b t"]:
    """The best caption of each image by transformers' `generate`."""
    prefix = model.prefix(embeddings)
    return model.gpt2.generate(
        inputs_embeds=prefix,
        attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long),
        num_beams=beams,
        do_sample=False,
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )


def ours(model: ClipCapModel, embeddings: Float[Tensor, "b e"], beams: int) -> list[list[int]]:
    """The same by `clipcap.decoding.decode`."""
    strategy = "beam" if beams > 1 else "greedy"
    found = decode(
        model, embeddings, strategy=strategy, num_beams=beams, max_new_tokens=TOKENS, stop_token_ids=[]
    )  # fmt: skip
    return [captions[0].token_ids for captions in found]


SIDES: dict[str, Callable] = {"library": library, "ours": ours}


def main() -> None:
    parser = parser_of(__doc__, quick="one batch of 8, beam search alone", threads=True, seed="weights and embeddings")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8), help="images captioned at once")
    parser.add_argument("--beams", type=int, nargs="+", default=(5, 1), help="beams; 1 is greedy")
    parser.add_argument("--layers", type=int, default=SMOLLM2_135M["num_hidden_layers"], help="of the decoder")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each kind, of which the fastest counts")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batches, widths, repeats = arguments.batches, arguments.beams, arguments.repeats
    if arguments.quick:
        batches, widths, repeats = (8,), (5,), 1

    model = build_model(arguments.layers, arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    embeddings = torch.randn(max(batches), 512, generator=generator)
    parameters = model.gpt2.num_parameters()
    result: dict[str, object] = {"tokens": TOKENS, "parameters": parameters, "threads": arguments.threads}
    rate = matrix_rate(torch.float32, sizes=(576, 1536))
    ours(model, embeddings[:1], 1)  # warm up: packs the weights, once for a model
    in_blocks = sum(p.numel() for p in blocks(model.gpt2).parameters())
    head = model.gpt2.get_output_embeddings().weight.numel()
    captions: dict[str, Any] = {}

    def keep(name: str, rows: Tensor, beams: int) -> None:
        captions[name] = SIDES[name](model, rows, beams)

    for batch in batches:
        for beams in widths:
            ways = {name: partial(keep, name, embeddings[:batch], beams) for name in SIDES}
            times = in_turns(ways, repeats)
            seconds, theirs = times["ours"] / batch, times["library"] / batch
            same = [a == b for a, b in zip(captions["ours"], captions["library"].tolist(), strict=True)]
            floor = (10 * in_blocks + head + (TOKENS - 1) * beams * (in_blocks + head)) / rate
            key = f"{'beam' if beams > 1 else 'greedy'}_b{batch}"
            result |= {
                f"{key}_ratio": theirs / seconds,
                f"{key}_captions_per_second": 1 / seconds,
                f"{key}_identical": sum(same) / len(same),
                f"{key}_of_floor": floor / seconds,
            }
            print(
                f"{key}: {seconds:.3f} s a caption, {theirs / seconds:.2f}x, {floor / seconds:.0%} of the floor",
                flush=True,
            )
    print_result(result)


if __name__ == "__main__":
    main()
