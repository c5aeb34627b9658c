"""What an image is compared with on the page: names of things, and images with captions, by CLIP's embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from common.checks import UserError
from common.pretrained import ASSETS
from common.probing.data import read_labels
from common.probing.embed import embed_classes

if TYPE_CHECKING:
    from common.clip import FrozenCLIP

Ranked = list[tuple[str, float]]
"""Texts with their cosine similarity, the most similar first."""
LABELS = ASSETS / "labels"
TEMPLATES = ("a {}", "a photo of a {}", "there is a {} in the picture")
"""Prompts of a label, averaged."""
SHOWN = 5


class Reference:
    """Texts with embeddings: the labels', or those of images whose captions the texts are.

    Args:
        texts: what is shown.
        embeddings: in CLIP's space.
    """

    def __init__(self, texts: Sequence[str], embeddings: Float[Tensor, "n e"]) -> None:
        self.texts, self.rows = list(texts), F.normalize(embeddings.float().cpu(), dim=-1)

    def nearest(self, embedding: Float[Tensor, " e"], count: int = SHOWN) -> Ranked:
        """The texts whose embeddings are most similar to an image's."""
        similarity = self.rows @ F.normalize(embedding.float().cpu(), dim=-1)
        best = similarity.topk(min(count, len(self.texts)))
        return [
            (self.texts[row], value) for row, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def label_reference(clip: FrozenCLIP, labels: str = "") -> Reference | None:
    """Names of things as CLIP's text tower knows them; None where it has none and no names are given.

    Args:
        clip: encoder.
        labels: names with commas between, or a file with one on each line; the packaged ones when empty.

    Raises:
        UserError: labels for an encoder without a text tower, or too few of them, or one twice.
    """
    if labels:
        clip.require_text("--labels")
    elif not clip.has_text:
        return None
    file = LABELS / ("shapes.txt" if Path(clip.name).name in ("tiny", "clip-tiny") else "nouns.txt")
    names = read_labels(labels or str(file))
    return Reference(names, embed_classes(clip, names, TEMPLATES))


def neighbour_reference(clip: FrozenCLIP, data: Path, images: Path | None, store: Path) -> Reference:
    """Captioned images, each by its first caption.

    Args:
        clip: encoder.
        data: captioned images, in any layout that `clipcap train` reads.
        images: directory of the images, when they are not beside the captions.
        store: directory where the embeddings are kept; what is there is not computed again.

    Raises:
        UserError: the data set or the store cannot be used.
    """
    from clipcap.data.dataset import read_dataset
    from clipcap.data.embeddings import build_store
    from common.progress import Progress

    items = [item for item in read_dataset(data, images=images) if item.captions]
    if not items:
        raise UserError(f"neighbours {str(data)!r} has no captions: give captioned images.")
    with Progress(total=len(items), desc="embedding neighbours", unit=" images") as bar:
        found = build_store(items, clip, store, progress=lambda done: bar.update(done - bar.n))
    kept = [item for item in items if item.image_id in found]
    rows = torch.stack([found[found.row(item.image_id)] for item in kept])
    return Reference([item.captions[0] for item in kept], rows)
