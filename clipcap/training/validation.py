"""Captions while training: CIDEr on a subset, sample captions beside their images, and the detection of collapse."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from clipcap.data.dataset import CaptionedImage
from clipcap.data.images import ImageError, read_image
from clipcap.decoding import decode
from clipcap.evaluation.metrics import score_captions
from clipcap.model import ClipCapModel
from common.images import MAX_PIXELS
from common.progress import Progress
from common.report import Page

COLLAPSED = 0.9
"""Share of images with one and the same caption from which a captioner counts as collapsed."""
SHOWN = 24
"""Images on the page of samples."""


@dataclass(frozen=True)
class Subset:
    """Images that are captioned at every validation."""

    items: list[CaptionedImage]
    embeddings: Float[Tensor, "n ..."]

    @classmethod
    def draw(cls, items: Sequence[CaptionedImage], store: Any, count: int, seed: int) -> Subset:
        """`count` of the items that are in `store`, the same ones for the same seed."""
        there = [item for item in items if item.image_id in store]
        rows = np.sort(np.random.default_rng((seed, 2)).permutation(len(there))[:count])
        chosen = [there[row] for row in rows]
        return cls(chosen, torch.stack([store[store.row(item.image_id)] for item in chosen]))


@dataclass(frozen=True)
class Variety:
    """How much captions differ from image to image."""

    distinct: int
    """Different captions."""
    top: str
    """The most frequent caption."""
    top_share: float
    """Share of the images that have it."""


def measure_variety(captions: Sequence[str]) -> Variety:
    """How many different captions there are, and how frequent the most frequent one is."""
    counts = Counter(captions)
    top, times = counts.most_common(1)[0]
    return Variety(len(counts), top, times / len(captions))


def explain_collapse(captions: Sequence[str], references: Sequence[Sequence[str]]) -> str | None:
    """One explanation when nearly every image gets the same caption though their references differ, else None."""
    found = measure_variety(captions)
    of_references = measure_variety([texts[0] for texts in references])
    if len(captions) < 5 or found.top_share < COLLAPSED or of_references.top_share > found.top_share / 2:
        return None
    return (
        f"collapse: {found.top_share:.0%} of {len(captions)} validation images get the caption {found.top[:80]!r}. "
        f"The captioner does not use the image yet. This is usual in the first hundreds of steps; if it stays, try in "
        f"this order: train longer; a learning rate 3 to 10 times lower (higher, if the loss hardly falls); "
        f"--normalize-embeddings; --tune-gpt2 or --lora 16; and check that the embedding store was made of these "
        f"images (delete it to have them encoded again)."
    )


class CaptionValidation(Callback):
    """Captions a subset at every validation: logs CIDEr and variety, writes `samples.html`, explains a collapse once.

    Args:
        subset: what is captioned.
        directory: where `samples.html` goes.
        beams: 1 decodes greedily, more with beam search.
        max_new_tokens: longest caption. Captions end at the model's end token.
        batch_size: images captioned at once.
        max_pixels: of an image that is shown.
    """

    def __init__(
        self,
        subset: Subset,
        directory: Path,
        *,
        beams: int = 1,
        max_new_tokens: int = 67,
        batch_size: int = 40,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.subset, self.directory, self.beams, self.max_pixels = subset, directory, beams, max_pixels
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.explained = False

    def caption(self, model: ClipCapModel) -> list[str]:
        """The best caption of each image of the subset."""
        assert model.tokenizer is not None
        options: dict[str, Any] = {"strategy": "greedy"}
        if self.beams > 1:
            options = {"strategy": "beam", "num_beams": self.beams}
        texts = []
        for rows in self.subset.embeddings.split(self.batch_size):
            for found in decode(model, rows.to(model.device), max_new_tokens=self.max_new_tokens, **options):
                texts.append(model.tokenizer.decode(found[0].token_ids, skip_special_tokens=True).strip())
        return texts

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        values = [0.0, 0.0, 0.0]
        if trainer.is_global_zero:
            captions = self.caption(module.model)  # type: ignore[arg-type]
            values = self._report(captions, trainer.global_step)
        cider, distinct, share = trainer.strategy.broadcast(values)
        module.log("val/cider", cider, prog_bar=True, rank_zero_only=False)
        module.log("val/distinct_captions", distinct)
        module.log("val/top_caption_share", share)

    def _report(self, captions: list[str], step: int) -> list[float]:
        """Write the page, explain a collapse; returns CIDEr, distinct captions and the share of the commonest."""
        items = self.subset.items
        found = score_captions(
            {item.image_id: text for item, text in zip(items, captions, strict=True)},
            {item.image_id: list(item.captions) for item in items},
            tokenizer="words",
        )
        variety = measure_variety(captions)
        collapse = explain_collapse(captions, [item.captions for item in items])
        if collapse and not self.explained:
            Progress.write(collapse, file=sys.stderr)
            self.explained = True
        page = Page(
            "Captions while training",
            f"step {step}: CIDEr {found.cider:.3f} on {len(items)} images, {variety.distinct} distinct captions",
        )
        if collapse:
            page.note(collapse)
        self._show(page, captions, found.cider_per_image)
        page.write(self.directory / "samples.html")
        return [found.cider, float(variety.distinct), variety.top_share]

    def _show(self, page: Page, captions: list[str], scores: dict[str, float]) -> None:
        cards, rows = [], []
        for item, text in list(zip(self.subset.items, captions, strict=True))[:SHOWN]:
            score = scores[item.image_id]
            try:
                image = read_image(item.path, max_pixels=self.max_pixels, side=256)
            except ImageError:  # captions without images, or an image that is gone since it was encoded
                rows.append({"caption": text, "reference": item.captions[0], "CIDEr": score})
                continue
            image.thumbnail((256, 256))
            cards.append((image, text, [f"CIDEr {score:.2f}", f"reference: {item.captions[0]}"]))
        if cards:
            page.gallery(cards)
        if rows:
            page.table(rows)
