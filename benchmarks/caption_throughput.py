"""Captions per CPU second at full size (GPT-2 124M, ViT-B/32, random weights) against a plain one-image, no-cache loop.

The plain loop is the original implementation's `generate_beam`: each image alone, each beam's whole sequence through
GPT-2 at every step. Both sides start from pixels and decode exactly 20 tokens (no stop token can be reached). CPU
seconds, not wall seconds, because machines are shared; one thread unless told otherwise.

Keys of the last line: `{strategy}_{precision}_b{batch}_ratio`, times faster than the plain loop in fp32, where `beam`
is the original's rule (`beam_original`), `beam_mean` our length-normalised beam and `greedy` one beam;
`..._seconds`, CPU seconds for each caption; `beam_fp32_identical`, share of the plain loop's images whose five captions
are the same, in order, and `beam_{bf16,int8}_same_best`, share whose best caption is the same; `int8` is 8-bit integers
in GPT-2, with weights up to `int8_largest_weight` (127, or 64 on a processor without VNNI), and bf16 elsewhere;
`..._of_floor`, arithmetic over the matrix rate measured in this run, or reading GPT-2's weights once a step at the
memory bandwidth measured in it (`..._weights_read_seconds`), whichever is longer, as a share of the time. A processor
without bf16 leaves `bf16` out, and computes in fp32 what is bf16 elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, GPT2Config
from transformers.activations import NewGELUActivation

from benchmarks import parser_of, print_result
from benchmarks.timing import cpu_seconds
from clipcap.config import ClipCapConfig
from clipcap.decoding import decode
from clipcap.model import ClipCapModel
from clipcap.packing import Head, can_use_int8, largest_int8_weight
from common.packing import can_pack
from common.runtime import fork_generators, resolve_dtype
from common.vision import packed_vision

TOKENS = 20
BEAMS = 5
STRATEGIES = {"beam": "beam_original", "beam_mean": "beam", "greedy": "greedy"}

PRECISIONS = ("fp32", "bf16", "int8")


def fast_precisions() -> tuple[str, ...]:
    """fp32, and bf16 where this processor has kernels for it; elsewhere bf16 is the slower."""
    return ("fp32", "bf16") if can_pack(torch.device("cpu"), torch.bfloat16) else ("fp32",)


def build_models(seed: int) -> tuple[ClipCapModel, CLIPVisionModelWithProjection]:
    """GPT-2 124M behind an MLP mapper with a prefix of 10, and ViT-B/32, with random weights."""
    with fork_generators(seed):
        model = ClipCapModel(ClipCapConfig(gpt2_config=GPT2Config().to_dict(), clip_width=512, prefix_length=10))
        vision = CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=512))
    return model.eval(), vision.eval()


@contextlib.contextmanager
def stock_activation(model: ClipCapModel) -> Iterator[None]:
    """GPT-2 with transformers' own GELU, as the original has it; ours is one operation."""
    blocks = model.gpt2.transformer.h
    ours = [block.mlp.act for block in blocks]
    for block in blocks:
        block.mlp.act = NewGELUActivation()
    try:
        yield
    finally:
        for block, act in zip(blocks, ours, strict=True):
            block.mlp.act = act


@torch.no_grad()
def plain_beam(model: ClipCapModel, embedding: Float[Tensor, "1 e"], beams: int) -> list[list[int]]:
    """`generate_beam` of the original: the whole of every beam is computed again for each token."""
    generated = model.prefix(embedding)
    scores = tokens = None
    lengths = torch.ones(beams)
    for _ in range(TOKENS):
        logits = model.gpt2(inputs_embeds=generated).logits[:, -1]
        logits = logits.softmax(-1).log()
        if scores is None or tokens is None:
            scores, chosen = logits.topk(beams, -1)
            generated = generated.expand(beams, *generated.shape[1:])
            chosen, scores = chosen.permute(1, 0), scores.squeeze(0)
            tokens = chosen
        else:
            lengths += 1
            means, flat = ((scores[:, None] + logits) / lengths[:, None]).view(-1).topk(beams, -1)
            source, chosen = flat // logits.shape[1], (flat % logits.shape[1]).unsqueeze(1)
            lengths, tokens, generated = lengths[source], torch.cat((tokens[source], chosen), dim=1), generated[source]
            scores = means * lengths
        embedded = model.gpt2.transformer.wte(chosen.squeeze()).view(beams, 1, -1)
        generated = torch.cat((generated, embedded), dim=1)
    assert scores is not None and tokens is not None
    return tokens[(scores / lengths).argsort(descending=True)].tolist()


def matrix_rate(dtype: torch.dtype, int8: bool = False, sizes: tuple[int, int] = (768, 3072)) -> float:
    """Multiply-adds per CPU second of a large matrix product, in the best layout there is."""
    x, weight = torch.randn(1024, sizes[0]).to(dtype), torch.randn(*sizes[::-1]).to(dtype)
    with torch.inference_mode():
        head = Head(weight, packed=can_pack(weight.device, dtype), int8=int8)
        return 1024 * weight.numel() / cpu_seconds(lambda: list(head.chunks(x)), 5)


def memory_rate() -> float:
    """Bytes per CPU second that one thread reads from memory, of a table that no cache holds."""
    table = torch.ones(64 << 20)  # 256 MB
    return table.numel() * table.element_size() / cpu_seconds(table.sum, 3)


def multiply_adds(model: ClipCapModel, vision: CLIPVisionModelWithProjection, beams: int) -> tuple[float, float]:
    """Multiply-adds with weights for one caption: of ViT (50 tokens), then of the prefix and all steps of all beams."""
    blocks = sum(p.numel() for p in model.gpt2.transformer.h.parameters())
    head = model.gpt2.lm_head.weight.numel()
    image = 50 * sum(p.numel() for p in vision.vision_model.encoder.parameters())
    prefix = model.config.prefix_length * blocks + head
    return image, prefix + (TOKENS - 1) * beams * (blocks + head)


def main() -> None:
    parser = parser_of(__doc__, quick="one image in the loop, batch 8 only", threads=True, seed="weights and images")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 32), help="images captioned at once")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=tuple(STRATEGIES), help="decodings")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="of our side; all that are fast here")
    parser.add_argument("--plain-images", type=int, default=8, help="images that the plain loop captions")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each kind, of which the fastest counts")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quick = arguments.quick
    batches, plain_images, repeats = arguments.batches, arguments.plain_images, arguments.repeats
    if quick:
        batches, plain_images, repeats = (8,), 1, 1
    strategies = {k: STRATEGIES[k] for k in arguments.strategies if not (quick and k == "beam_mean")}

    model, vision = build_models(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    pixels = torch.randn(max(batches), 3, 224, 224, generator=generator)
    result: dict[str, object] = {"tokens": TOKENS}

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        return vision(pixel_values=images).image_embeds

    @torch.no_grad()
    def embed_packed(images: Tensor) -> Tensor:
        """As `clipcap.data.embeddings.encode` does it."""
        packed = packed_vision(vision, model.dtype)
        return packed(images)[1] if packed is not None else embed(images.to(vision.dtype))

    plain_captions: dict[int, list[list[list[int]]]] = {}

    def plain(beams: int) -> None:
        with stock_activation(model):
            plain_captions[beams] = [plain_beam(model, embed(image[None]), beams) for image in pixels[:plain_images]]

    def fast(batch: int, strategy: str, beams: int) -> list[list[list[int]]]:
        found = decode(
            model,
            embed_packed(pixels[:batch]),
            strategy=strategy,
            num_captions=beams,
            max_new_tokens=TOKENS,
            stop_token_ids=[],
            int8=int8,
        )
        return [[caption.token_ids for caption in captions] for captions in found]

    model.gpt2(inputs_embeds=torch.zeros(1, 10, 768))  # warm up
    plain_seconds = {beams: cpu_seconds(partial(plain, beams), 1) / plain_images for beams in (BEAMS, 1)}
    result |= {"plain_beam_seconds": plain_seconds[BEAMS], "plain_greedy_seconds": plain_seconds[1]}
    print(f"plain loop, fp32: beam {plain_seconds[BEAMS]:.2f} s, greedy {plain_seconds[1]:.2f} s a caption", flush=True)

    bandwidth = memory_rate()
    result["memory_gb_per_second"] = 1e-9 * bandwidth
    weights = sum(p.numel() for p in model.gpt2.parameters())
    int8 = False
    for precision in arguments.precisions or [*fast_precisions(), *["int8"] * can_use_int8()]:
        int8 = precision == "int8"
        if int8:
            result["int8_largest_weight"] = largest_int8_weight()
        dtype = resolve_dtype(fast_precisions()[-1] if int8 else precision)
        model, vision = model.to(dtype), vision.to(dtype)
        vision_rate, rate = matrix_rate(dtype), matrix_rate(dtype, int8)
        result[f"{precision}_gflops"] = 2e-9 * rate
        fast(1, "greedy", 1)  # warm up: packs the weights, once for a model
        for batch in batches:
            for name, strategy in strategies.items():
                beams = 1 if name == "greedy" else BEAMS

                found: list[list[list[list[int]]]] = []
                work = partial(fast, batch, strategy, beams)

                def keep(work: Any = work, found: Any = found) -> None:
                    found.append(work())

                seconds = cpu_seconds(keep, repeats) / batch
                if name == "beam" and batch == max(batches):
                    pairs = list(zip(plain_captions[BEAMS], found[-1], strict=False))
                    if precision == "fp32":
                        result["beam_fp32_identical"] = sum(a == b for a, b in pairs) / len(pairs)
                    else:
                        result[f"beam_{precision}_same_best"] = sum(a[0] == b[0] for a, b in pairs) / len(pairs)
                key = f"{name}_{precision}_b{batch}"
                image, decoding = multiply_adds(model, vision, beams)
                size = 1 if int8 else dtype.itemsize
                moved = TOKENS * weights * size / bandwidth / batch  # every weight is read once a step
                floor = image / vision_rate + max(decoding / rate, moved)
                ratio = plain_seconds[beams] / seconds
                result |= {f"{key}_ratio": ratio, f"{key}_seconds": seconds, f"{key}_of_floor": floor / seconds}
                result[f"{key}_weights_read_seconds"] = moved
                print(f"{key}: {seconds:.3f} s a caption, {ratio:.1f}x, {floor / seconds:.0%} of the floor", flush=True)
    print_result(result)


if __name__ == "__main__":
    main()
