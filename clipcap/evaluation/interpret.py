"""Read prefixes as words: the vocabulary tokens whose embeddings are nearest to them, and what all images share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import tyro
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from common.checks import UserError, printable, require_at_least, require_place
from common.decoders.families import positions
from common.gpt2 import token_table
from common.images import MAX_PIXELS, ImageLimit
from common.runtime import RuntimeConfig, resolve_dtype, start

if TYPE_CHECKING:
    from clipcap.captioner import Captioner
    from clipcap.data.images import ImageError
    from clipcap.model import ClipCapModel
    from common.report import Page

Tokens = list[list[tuple[str, float]]]
"""For each position of a prefix, tokens with their cosine similarity, nearest first."""


@torch.no_grad()
def nearest_tokens(
    model: ClipCapModel, prefix: Float[Tensor, "K d"], *, k: int = 1, table: Float[Tensor, "v d"] | None = None
) -> Tokens:
    """For each prefix embedding, the k tokens of highest cosine similarity, with it (Mokady et al. 2021, sec. 4).

    Args:
        model: captioner with its tokenizer.
        prefix: of one image, a row of `ClipCapModel.prefix`.
        k: tokens per position.
        table: its `unit_tokens`, when several prefixes share them.

    Raises:
        UserError: k below 1 or above the vocabulary, or a model without a tokenizer.
    """
    require_at_least("k", k, 1)
    if model.tokenizer is None:
        raise UserError("the captioner has no tokenizer: load it with the name of its GPT-2.")
    table = unit_tokens(model) if table is None else table
    if k > len(table):
        raise UserError(f"k is {k} but the vocabulary has {len(table)} tokens: use fewer.")
    similarity = F.normalize(prefix.float().to(table.device), dim=-1) @ table.T  # (K, v)
    values, ids = similarity.topk(k, dim=-1)
    return [
        [(model.tokenizer.decode([token]), value) for token, value in zip(row_ids, row_values, strict=True)]
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
    ]


@torch.no_grad()
def unit_tokens(model: ClipCapModel) -> Float[Tensor, "v d"]:
    """The lexical embeddings, each of length 1."""
    return F.normalize(token_table(model.gpt2).float(), dim=-1)


def common_share(mean: Float[Tensor, "... d"], energy: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The share of prefixes that is common to all images: ||mean over images||² / mean over images of ||·||².

    1 when every image has the same prefix, 0 when the prefixes cancel out; n unrelated prefixes give about 1/n.

    Args:
        mean: mean prefix, for each position.
        energy: mean squared length, for each position.
    """
    return mean.square().sum(dim=-1) / energy.clamp_min(torch.finfo(energy.dtype).tiny)


@dataclass(frozen=True)
class ImageReading:
    """What one image's prefix says."""

    image: str
    caption: str
    tokens: Tokens


@dataclass(frozen=True)
class Interpretation:
    """Prefixes of some images, as words."""

    images: list[ImageReading]
    mean: Tokens
    """Of the mean prefix."""
    common_share: float
    """Of the prefixes, over all positions (see `common_share`)."""
    common_share_by_position: list[float]


@torch.inference_mode()
def interpret(
    captioner: Captioner,
    images: Iterable[str | Path],
    *,
    k: int = 1,
    batch_size: int = 16,
    on_error: Callable[[ImageError], object] | None = None,
    progress: Callable[[int], object] = lambda done: None,
    max_pixels: int = MAX_PIXELS,
) -> Interpretation:
    """Read the prefix of each image and of their mean as words.

    Args:
        captioner: whose prefixes.
        images: files.
        k: tokens for each position of the prefix.
        batch_size: images at once.
        on_error: called with the error of an image that cannot be read, which is left out; None raises it.
        progress: called with the number of images of each batch.
        max_pixels: of an image.

    Raises:
        UserError: no image can be read.
    """
    from clipcap.data.embeddings import mapper_input
    from clipcap.data.images import read_image, readable

    require_at_least("batch size", batch_size, 1)
    paths = list(images)
    batch_size = min(batch_size, max(1, len(paths)))
    captioner.require_room(batch_size)
    table = unit_tokens(captioner.model)
    longest = min(67, positions(captioner.model.gpt2.config) - captioner.model.config.prefix_length + 1)
    read = partial(read_image, max_pixels=max_pixels, side=captioner.clip.preprocess.size)
    found: list[ImageReading] = []
    total: Tensor | None = None
    energy: Tensor | None = None
    for begin in range(0, len(paths), batch_size):
        batch = readable(paths[begin : begin + batch_size], read, on_error)
        if batch:
            features = captioner.features(captioner.clip.preprocess([image for _, image in batch]))
            prefixes = captioner.model.prefix(mapper_input(features, captioner.model.config.inputs))  # (b, K, d)
            captions = captioner.decode(features, max_new_tokens=longest)
            for (path, _), prefix, several in zip(batch, prefixes, captions, strict=True):
                tokens = nearest_tokens(captioner.model, prefix, k=k, table=table)
                found.append(ImageReading(str(path), captioner.text(several[0]), tokens))
            prefixes = prefixes.float().cpu().double()  # Apple's GPUs have no doubles
            sums, squares = prefixes.sum(dim=0), prefixes.square().sum(dim=(0, 2))  # (K, d), (K,)
            total = sums if total is None else total + sums
            energy = squares if energy is None else energy + squares
        progress(len(paths[begin : begin + batch_size]))
    if total is None or energy is None:
        raise UserError(f"none of the {len(paths)} images can be read: check the messages about them.")
    mean, energy = total / len(found), energy / len(found)
    return Interpretation(
        images=found,
        mean=nearest_tokens(captioner.model, mean, k=k, table=table),
        common_share=float(common_share(mean.flatten(), energy.sum())),
        common_share_by_position=common_share(mean, energy).tolist(),
    )


@dataclass(frozen=True)
class InterpretConfig:
    """Read the prefixes that a captioner makes of images as words.

    Gives, for each image and for the mean of all, the vocabulary tokens nearest to each prefix embedding by cosine
    similarity, and the share of the prefix that is common to all images: the squared length of the mean prefix over
    the mean squared length (n images without anything in common give about 1/n).
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or directories that are searched for images."""
    model: str = "tiny"
    """Captioner: photo or tiny (packaged), a directory that `clipcap train` or `clipcap convert` wrote, or a hub id."""
    top: int = 1
    """Tokens for each position of the prefix."""
    format: Literal["text", "json", "html"] = "text"
    """Output format."""
    out: Path | None = None
    """File to write instead of standard output; html needs one."""
    batch_size: int = 16
    """Images at once."""
    limit: ImageLimit = field(default_factory=ImageLimit)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def run(config: InterpretConfig) -> int:
    """`clipcap interpret`: read prefixes as words and print or write them."""
    from clipcap.captioner import Captioner
    from clipcap.captioning import write_out
    from clipcap.data.images import find_images
    from common.files import write_json, write_text
    from common.progress import Progress

    require_at_least("top", config.top, 1)
    require_at_least("batch_size", config.batch_size, 1)
    if config.out:
        require_place(config.out)
    if config.format == "html" and config.out is None:
        raise UserError("format is 'html' but there is no file for it: give --out PAGE.html.")
    device = start(config.runtime)
    paths = find_images(config.images)
    captioner = Captioner.from_pretrained(config.model, device=device, dtype=resolve_dtype(config.runtime.precision))
    skipped: list[ImageError] = []
    with Progress(total=len(paths), unit=" images", disable=len(paths) < 2) as bar:
        found = interpret(
            captioner,
            paths,
            k=config.top,
            batch_size=config.batch_size,
            on_error=skipped.append,
            progress=bar.update,
            max_pixels=config.limit.max_pixels,
        )
    if config.format == "html":
        assert config.out is not None
        interpretation_page(found, config.model, max_pixels=config.limit.max_pixels).write(config.out)
    elif config.format == "json":
        if config.out:
            write_json(config.out, found)
        else:
            write_out(_json(found))
    elif config.out:
        write_text(config.out, as_text(found))
    else:
        write_out(as_text(found))
    if skipped:
        print(f"skipped {len(skipped)} of {len(paths)} images:", file=sys.stderr)
        for error in skipped:
            print(f"  {printable(error)}", file=sys.stderr)
    return 0


def _json(found: Interpretation) -> str:
    return json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n"


def tokens_line(tokens: Tokens) -> str:
    """The tokens of a prefix on one line; those of one position joined by strokes, line breaks made visible."""
    return " ".join("|".join(_shown(token) for token, _ in several) for several in tokens)


def _shown(token: str) -> str:
    return printable(token.strip()) or repr(token)


def as_text(found: Interpretation) -> str:
    """A line for each image (path, caption, tokens, tab-separated), the mean, and the common share."""
    lines = [f"{printable(one.image)}\t{printable(one.caption)}\t{tokens_line(one.tokens)}" for one in found.images]
    lines.append(f"mean of {len(found.images)} images\t\t{tokens_line(found.mean)}")
    shares = " ".join(f"{share:.3f}" for share in found.common_share_by_position)
    lines.append(f"common to all images\t{found.common_share:.3f}\tby position {shares}")
    return "\n".join(lines) + "\n"


def interpretation_page(found: Interpretation, name: str, *, max_pixels: int = MAX_PIXELS) -> Page:
    """A page of the images with captions and tokens, and of the mean prefix by position."""
    from clipcap.data.images import read_image
    from common.report import Page, thumbnail

    page = Page("What prefixes say", f"captioner {name}, {len(found.images)} images")
    page.section(
        "All images together",
        "The vocabulary tokens nearest to each embedding of the mean prefix, by cosine similarity, and the share of "
        "the prefix that is common to all images: squared length of the mean over mean squared length. "
        f"Over all positions it is {found.common_share:.3f}; {len(found.images)} images without anything in common "
        f"would give about {1 / len(found.images):.3f}.",
    )
    page.table(
        [
            {
                "position": number + 1,
                "nearest tokens": ", ".join(f"{_shown(token)} ({value:.2f})" for token, value in several),
                "common share": share,
            }
            for number, (several, share) in enumerate(zip(found.mean, found.common_share_by_position, strict=True))
        ]
    )
    page.section("Each image")
    page.gallery(
        [
            (
                thumbnail(read_image(one.image, max_pixels=max_pixels, side=320)),
                one.caption or "(empty)",
                [tokens_line(one.tokens)],
            )
            for one in found.images
        ],
        width=240,
    )
    return page
