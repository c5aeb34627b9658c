"""The table of encoders in docs/encoders.md: every family with tiny random weights, beside its own library.

    python -m experiments.backbones.encoders_table --out docs/encoders.md

A family is saved to disk as its library saves it, loaded by `load_clip`, and compared with what the library makes of
the same pictures with its own preprocessing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
import tyro
from PIL import Image
from torch import Tensor

from common.checks import UserError, run_command
from common.clip import FrozenCLIP, load_clip
from common.files import write_text
from common.runtime import RuntimeConfig, start, versions
from dietnerf.semantic import SemanticConfig, SemanticLoss
from experiments.backbones import tiny_encoders as tiny

TEXTS = ("a red cube", "the blue dog on two large ball")
SIDES = ((101, 54), (37, 53), (64, 64))
"""Width and height of the pictures."""
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Config:
    """Compare encoders of every family with their libraries."""

    out: Path = Path("out/encoders.md")
    """Markdown page of the results."""
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1))


class Theirs(NamedTuple):
    """What a family's library computes."""

    pixels: Callable[[Image.Image], Tensor]
    """One picture -> (1, 3, s, s)."""
    images: Callable[[Tensor], Tensor]
    """Pixels -> (b, e)."""
    texts: Callable[[list[str]], Tensor] | None = None
    """Texts -> (b, e)."""


def transformers_own(family: str, directory: Path) -> Theirs:
    """transformers' model, processor and tokenizer of a directory that `tiny.save_encoder` wrote."""
    model: Any = transformers.AutoModel.from_pretrained(directory).eval()
    kind = (tiny.DUAL.get(family) or ("", *tiny.VISION[family]))[1]
    name = f"{kind}ImageProcessor"
    processor = (getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)).from_pretrained(directory)

    def pixels(image: Image.Image) -> Tensor:
        return torch.as_tensor(np.asarray(processor(images=image, return_tensors="pt")["pixel_values"])).float()

    if family not in tiny.DUAL:
        return Theirs(pixels, lambda given: model(pixel_values=given).pooler_output.flatten(1))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    padding = "max_length" if family.startswith("SigLIP") else True
    options: Any = {"padding": padding, "truncation": True, "max_length": 16, "return_tensors": "pt"}

    def texts(given: list[str]) -> Tensor:
        return model.get_text_features(**tokenizer(given, **options)).pooler_output

    return Theirs(pixels, lambda given: model.get_image_features(pixel_values=given).pooler_output, texts)


def photo(width: int, height: int) -> Image.Image:
    """A picture of smooth random colours with some grain."""
    generator = np.random.default_rng(width)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
    grain = generator.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


@torch.no_grad()
def agreement(clip: FrozenCLIP, theirs: Theirs) -> dict[str, float]:
    """Largest differences of pixels and embeddings over some pictures, and of text embeddings."""
    found = {"pixels": 0.0, "embedding": 0.0}
    for side in SIDES:
        image = photo(*side)
        ours, given = clip.preprocess(image), theirs.pixels(image)
        found["pixels"] = max(found["pixels"], float((ours - given).abs().max()))
        difference = (clip.encode_images(ours) - theirs.images(given)).abs().max()
        found["embedding"] = max(found["embedding"], float(difference))
    if theirs.texts is not None:
        found["text"] = float((clip.encode_texts(list(TEXTS)) - theirs.texts(list(TEXTS))).abs().max())
    return found


def semantic_gradient(clip: FrozenCLIP, name: str) -> float:
    """Share of a render's pixels with a gradient of DietNeRF's semantic loss."""
    views = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    loss = SemanticLoss(SemanticConfig(weight=0.1, encoder=name, targets=0), views, "cpu")
    render = views[:1].permute(0, 2, 3, 1).mul(0.5).requires_grad_()
    loss(render).sum().backward()
    assert render.grad is not None
    return float((render.grad.abs().sum(-1) > 0).float().mean())


@torch.no_grad()
def zero_shot(clip: FrozenCLIP) -> str:
    """Whether a picture can be told to one of two texts, or the line that says why not."""
    try:
        texts = clip.encode_texts(list(TEXTS))
    except UserError:
        return "refused: no text tower"
    images = clip.encode_images(clip.preprocess([photo(*side) for side in SIDES]))
    shares = torch.softmax(torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T, dim=-1)
    return "yes" if bool(shares.isfinite().all()) else "not finite"


def row(family: str, name: str, shown: str, theirs: Theirs) -> list[str]:
    """One line of the table."""
    clip = load_clip(name, device="cpu")
    found = agreement(clip, theirs)
    features = clip.encode_image_features(clip.preprocess(photo(*SIDES[0])))
    patches = f"{features.patches.shape[1]} x {clip.patch_width}" if clip.has_patches else "none"
    return [
        family,
        shown,
        _shown(found["pixels"]),
        _shown(found["embedding"]),
        str(clip.width),
        patches,
        f"{semantic_gradient(clip, name):.0%}",
        _shown(found["text"]) if "text" in found else "none",
        zero_shot(clip),
        "yes" if all(value <= TOLERANCE for value in found.values()) else "NO",
    ]


def _shown(difference: float) -> str:
    return f"{difference:.0e}" if difference else "0"


def main(config: Config) -> None:
    """Write the page."""
    start(config.runtime)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    begun, rows = time.process_time(), []
    with tempfile.TemporaryDirectory() as place:
        for number, family in enumerate((*tiny.DUAL, *tiny.VISION)):
            directory = tiny.save_encoder(family, Path(place) / str(number))
            rows.append(row(family, str(directory), "directory or id", transformers_own(family, directory)))
        for family in tiny.OPEN_CLIP:
            name, *own = tiny.save_open_clip(family, Path(place))
            rows.append(row(family, name, "open_clip:ARCH/...", Theirs(*own)))
        for model in tiny.TIMM:
            name, *own = tiny.save_timm(model, Path(place))
            rows.append(row(f"timm's {model}", name, "timm:NAME[/PATH]", Theirs(*own)))
        for model in tiny.TORCHVISION:
            name, *own = tiny.save_torchvision(model, Path(place))
            rows.append(row(f"torchvision's {model}", name, "torchvision:NAME[/PATH]", Theirs(*own)))
    write_text(config.out, _page(rows, time.process_time() - begun))
    print(f"{len(rows)} encoders, {sum(line[-1] == 'yes' for line in rows)} equal to their library: {config.out}")


def _page(rows: list[list[str]], seconds: float) -> str:
    heads = ["encoder", "named by", "pixels", "embedding", "e", "patches", "gradient", "text", "zero-shot", "equal"]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))
    used = ", ".join(f"{name} {versions()[name]}" for name in ("torch", "transformers") if name in versions())
    return f"""# Encoders

`load_clip`, and every option that names an image encoder, takes these families. Each line is a tiny model of random
weights, saved to disk, loaded, and compared with its own library: its preprocessing of {len(SIDES)} pictures of odd
sizes (*pixels*, largest difference), its image *embedding* and its *text* embedding. *e* is the embedding's width,
*patches* their number and width, *gradient* the share of a render's pixels that DietNeRF's semantic loss moves (a crop
leaves out the borders of what is not square), and *zero-shot* whether pictures can be told by texts. What has no text
tower says so in one line before any work where text is needed: `--text-only`, `--retrieval`, CLIPScore, text targets.

{lines}

`python -m experiments.backbones.encoders_table --out docs/encoders.md` ({seconds:.0f} s of a CPU; {used}).

## What counts as what

- **Class token**: CLIP's is the one before the final norm and projection; so are open_clip's and timm's. Those of
  transformers' vision-only ViTs (DINOv2, DINOv3, ViT, ...) come after the final norm, as the library gives them. Where
  there is none (convolutions, SigLIP, Swin) it is the mean of the patches.
- **Patches** never hold register or distillation tokens. A feature map is flattened row by row.
- **Embedding**: the projection of two towers; the pooled output of one; for a Hugging Face classifier that was saved
  without its pooling layer, the class token.
- **Pixels** are made as the weights' own processor makes them: size, crop, padding, interpolation (Lanczos too),
  rescaling, mean and standard deviation. For PIL images they are the same to the last bit or to rounding; tensors with
  gradients are resized without PIL's rounding to 8 bits and its clipping, which differs by up to 0.01 of a colour's
  range, and up to 0.05 at sharp edges with Lanczos. transformers' processors come in two kinds: the one of PIL is meant
  here (torchvision's differs from it by one step of 255 in some pixels), except for DINOv3, which has the other alone.
- **Refused by name**: SigLIP 2 of any shape (NaFlex; its checkpoints of fixed size work), encoders without pooled
  output (ViT-MAE, I-JEPA), images that are no squares, processors that are not in `common/encoders/processors.py`,
  quantised weights, code that comes with weights.
- **Texts and the hub**: text towers of open_clip that name a tokenizer on the hub (SigLIP, ...) fetch it when the first
  text is embedded; those that are a model of the hub (RoBERTa, mT5, NLLB) need its config when they are loaded.
"""


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(tyro.cli(Config))))
