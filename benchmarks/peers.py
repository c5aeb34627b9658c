"""Captions per CPU second beside what one would take instead, at full size with random weights.

    python -m benchmarks.peers --docs docs/benchmarks

Three others: transformers' `VisionEncoderDecoderModel` of ViT-B/16 and GPT-2 124M (the kind of vit-gpt2), BLIP base (it
sees 384 x 384 pixels), and GPT-2's own `generate` on our prefixes, with the activation that transformers gives it. Ours
is GPT-2 124M behind an MLP mapper with a prefix of 10, and CLIP's ViT-B/16, so that the encoder is no smaller than
vit-gpt2's. All search with 5 beams and write exactly 20 tokens. vit-gpt2 and BLIP start from preprocessed pixels and so
does what they are compared with; `generate` and what it is compared with start from embeddings. All run turn by turn in
one process, in CPU seconds, not wall seconds, because machines are shared; one thread unless told otherwise.

Keys of the last line: `{generate|vit_gpt2|blip}_{precision}_b{batch}_ratio`, times that ours is faster;
`{side}_..._captions_per_second`, where `ours` starts from pixels and `ours_on_prefixes` from embeddings;
`generate_..._identical`, share of the images whose best caption is `generate`'s, token for token. Less than all of them
in fp32 is an error, after everything is written. A processor without bf16 leaves `bf16` out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GPT2Config,
    PreTrainedModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from benchmarks import parser_of, print_result
from benchmarks.caption_throughput import PRECISIONS as ALL_PRECISIONS
from benchmarks.caption_throughput import fast_precisions, stock_activation
from benchmarks.timing import in_turns
from clipcap.config import ClipCapConfig
from clipcap.decoding import decode
from clipcap.model import ClipCapModel
from common.files import markdown_table, write_json
from common.runtime import fork_generators, resolve_dtype
from common.vision import packed_vision

TOKENS = 20
BEAMS = 5
EMBEDDING = 512
PRECISIONS = tuple(name for name in ALL_PRECISIONS if name != "int8")
AGAINST = {"generate": "ours_on_prefixes", "vit_gpt2": "ours", "blip": "ours"}
"""Each of the others, and what of ours starts where it starts."""
NAMES = {"generate": "`generate` on our prefixes", "vit_gpt2": "ViT-B/16 and GPT-2", "blip": "BLIP base"}

Captions = list[list[int]]
"""The best caption of each image."""


@dataclass(frozen=True)
class Sizes:
    """Of all towers; those of the published models."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    """GPT-2's."""
    blip_vocabulary: int = 30524
    pixels: int = 224
    blip_pixels: int = 384


@dataclass
class Models:
    """Everything that captions, and what it captions."""

    ours: ClipCapModel
    vision: CLIPVisionModelWithProjection
    vit_gpt2: VisionEncoderDecoderModel
    blip: BlipForConditionalGeneration
    embeddings: Tensor
    pixels: Tensor
    blip_pixels: Tensor

    def to(self, dtype: torch.dtype) -> None:
        """Weights and inputs in this precision."""
        for name, value in vars(self).items():
            setattr(self, name, value.to(dtype))


def build(sizes: Sizes, images: int, seed: int) -> Models:
    """Random weights, and random pixels and embeddings of `images` images."""
    gpt2 = GPT2Config(
        n_layer=sizes.layers, n_embd=sizes.width, n_head=sizes.heads, vocab_size=sizes.vocabulary,
        bos_token_id=sizes.vocabulary - 1, eos_token_id=sizes.vocabulary - 1,
    )  # fmt: skip
    tower: dict[str, Any] = {
        "num_hidden_layers": sizes.layers, "hidden_size": sizes.width, "num_attention_heads": sizes.heads,
        "intermediate_size": 4 * sizes.width,
    }  # fmt: skip
    text = tower | {
        "vocab_size": sizes.blip_vocabulary, "encoder_hidden_size": sizes.width,
        "bos_token_id": sizes.blip_vocabulary - 2,
    }  # fmt: skip
    vision = tower | {"image_size": sizes.pixels, "patch_size": 16}
    generator = torch.Generator().manual_seed(seed)
    with fork_generators(seed):
        models = Models(
            ClipCapModel(ClipCapConfig(gpt2_config=gpt2.to_dict(), clip_width=EMBEDDING, prefix_length=10)).eval(),
            CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, projection_dim=EMBEDDING)).eval(),
            VisionEncoderDecoderModel(
                VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**vision), gpt2)
            ).eval(),
            BlipForConditionalGeneration(
                BlipConfig(text_config=text, vision_config=vision | {"image_size": sizes.blip_pixels})
            ).eval(),
            torch.randn(images, EMBEDDING, generator=generator),
            torch.randn(images, 3, sizes.pixels, sizes.pixels, generator=generator),
            torch.randn(images, 3, sizes.blip_pixels, sizes.blip_pixels, generator=generator),
        )
    for model in (models.ours.gpt2, models.vit_gpt2):  # BLIP's end is given by its own `generate`
        assert isinstance(model, PreTrainedModel) and model.generation_config is not None
        model.generation_config.eos_token_id = None
    return models


def options(tokens: int) -> dict[str, Any]:
    """The search that transformers is asked for: no caption ends before it has `tokens` tokens."""
    return {"num_beams": BEAMS, "do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}


def ours_on_prefixes(models: Models, batch: int, tokens: int, embeddings: Tensor | None = None) -> Captions:
    """Ours from embeddings, those of `models` where none are given."""
    given = models.embeddings[:batch] if embeddings is None else embeddings
    found = decode(models.ours, given, strategy="beam", num_beams=BEAMS, max_new_tokens=tokens, stop_token_ids=[])
    return [captions[0].token_ids for captions in found]


@torch.inference_mode()
def ours(models: Models, batch: int, tokens: int) -> Captions:
    """Ours from pixels, the encoder as `clipcap.data.embeddings.encode` runs it."""
    pixels = models.pixels[:batch]
    packed = packed_vision(models.vision, pixels.dtype)
    embeddings = packed(pixels)[1] if packed is not None else models.vision(pixel_values=pixels).image_embeds
    return ours_on_prefixes(models, batch, tokens, embeddings)


@torch.inference_mode()
def generate(models: Models, batch: int, tokens: int) -> Captions:
    """GPT-2's `generate` on our prefixes."""
    prefix = models.ours.prefix(models.embeddings[:batch])
    mask = torch.ones(prefix.shape[:2], dtype=torch.long)
    gpt2: Any = models.ours.gpt2
    with stock_activation(models.ours):
        return gpt2.generate(inputs_embeds=prefix, attention_mask=mask, pad_token_id=0, **options(tokens)).tolist()


@torch.inference_mode()
def vit_gpt2(models: Models, batch: int, tokens: int) -> Captions:
    """transformers' encoder and decoder, without the token that captions begin with."""
    model: Any = models.vit_gpt2
    start = model.config.decoder.bos_token_id
    found = model.generate(models.pixels[:batch], decoder_start_token_id=start, pad_token_id=0, **options(tokens))
    return found[:, 1:].tolist()


@torch.inference_mode()
def blip(models: Models, batch: int, tokens: int) -> Captions:
    """BLIP, without the token that captions begin with."""
    return models.blip.generate(models.blip_pixels[:batch], **options(tokens))[:, 1:].tolist()


SIDES: dict[str, Callable[[Models, int, int], Captions]] = {
    "ours": ours, "ours_on_prefixes": ours_on_prefixes, "generate": generate, "vit_gpt2": vit_gpt2, "blip": blip,
}  # fmt: skip


def sides_of(against: Sequence[str]) -> list[str]:
    """These others and what of ours each is compared with, in the order of `SIDES`."""
    wanted = {*against, *(AGAINST[other] for other in against)}
    return [name for name in SIDES if name in wanted]


def compare(
    models: Models, batch: int, *, tokens: int, repeats: int, against: Sequence[str] = tuple(AGAINST)
) -> dict[tuple[str, str], float]:
    """By side and measure: captions per second, ratio to ours, the share of captions equal to `generate`'s."""
    found: dict[str, Captions] = {}

    def caption(name: str) -> None:
        found[name] = SIDES[name](models, batch, tokens)

    seconds = in_turns({name: partial(caption, name) for name in sides_of(against)}, repeats)
    for name, captions in found.items():
        lengths = [len(caption) for caption in captions]
        if lengths != [tokens] * batch:
            raise RuntimeError(f"{name} wrote captions of {lengths} tokens, not {batch} of {tokens}")
    result = {(name, "captions_per_second"): batch / taken for name, taken in seconds.items()}
    result |= {(other, "ratio"): seconds[other] / seconds[AGAINST[other]] for other in against}
    if "generate" in against:
        same = [a == b for a, b in zip(found["ours_on_prefixes"], found["generate"], strict=True)]
        result["generate", "identical"] = sum(same) / len(same)
    return result


def table(rows: list[tuple[str, int, dict[tuple[str, str], float]]]) -> list[str]:
    """The lines of a table of what `compare` found, by precision and batch."""
    lines = []
    for precision, batch, values in rows:
        for other, mine in AGAINST.items():
            if (other, "ratio") not in values:
                continue
            lines.append(
                {
                    "captions a CPU second": NAMES[other],
                    "precision": precision,
                    "batch": batch,
                    "theirs": f"{values[other, 'captions_per_second']:.3g}",
                    "ours": f"{values[mine, 'captions_per_second']:.3g}",
                    "ratio": f"{values[other, 'ratio']:.2f}x",
                }
            )
    return markdown_table(list(lines[0]), lines)


def main(arguments: list[str] | None = None, sizes: Sizes = Sizes()) -> dict[str, Any]:
    parser = parser_of(__doc__, quick="one image at once, in fp32, once", threads=True, seed="weights and images")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 32), help="images captioned at once")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="of all sides; all that are fast here")
    parser.add_argument("--against", nargs="+", choices=AGAINST, default=tuple(AGAINST), help="of the others, these")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side, of which the fastest counts")
    parser.add_argument("--docs", type=Path, help="directory that gets peers.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    batches, repeats, precisions = given.batches, given.repeats, given.precisions or fast_precisions()
    if given.quick:
        batches, repeats, precisions = (1,), 1, ("fp32",)

    models = build(sizes, max(batches), given.seed)
    result: dict[str, Any] = {"tokens": TOKENS, "beams": BEAMS, "threads": given.threads}
    rows, differ = [], []
    for precision in precisions:
        models.to(resolve_dtype(precision))
        for name in sides_of(given.against):
            SIDES[name](models, 1, 2)  # warm up: ours packs the weights, transformers imports what it needs
        for batch in batches:
            found = compare(models, batch, tokens=TOKENS, repeats=repeats, against=given.against)
            rows.append((precision, batch, found))
            result |= {f"{side}_{precision}_b{batch}_{measure}": value for (side, measure), value in found.items()}
            shown = ", ".join(f"{found[other, 'ratio']:.2f}x {other}" for other in given.against)
            identical = found.get(("generate", "identical"))
            shown += "" if identical is None else f", {identical:.0%} identical"
            print(f"{precision}, batch {batch}: {shown}", flush=True)
            if precision == "fp32" and identical is not None and identical < 1:
                differ.append(batch)
    print("\n".join(table(rows)))
    said = print_result(result)
    if given.docs:
        write_json(given.docs / "peers.json", {"quick": given.quick, "seed": given.seed, **said})
    if differ:
        sys.exit(f"error: in fp32, captions of batch {differ} are not those of `generate`.")
    return said


if __name__ == "__main__":
    main()
