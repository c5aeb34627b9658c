"""CLIPScore and RefCLIPScore of captions (Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from clipcap.data.images import ImageError, read_image
from clipcap.evaluation.metrics import Metric, mean_metric
from common.images import MAX_PIXELS

if TYPE_CHECKING:
    import torch

    from common.clip import FrozenCLIP

PROMPT = "A photo depicts "
"""What CLIPScore puts before a caption (Hessel et al. 2021, sec. 3)."""


def clip_scores(
    images: Float[np.ndarray, "n e"],
    candidates: Float[np.ndarray, "n e"],
    references: Sequence[Float[np.ndarray, "_ e"]] | None = None,
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"] | None]:
    """CLIPScore 2.5 max(cos(v, c), 0), and RefCLIPScore, its harmonic mean with max(max_r cos(c, r), 0).

    Hessel et al. 2021, sec. 3. Rows are CLIP's embeddings, of any length, of images v, candidates c, references r.
    """

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    texts = unit(np.asarray(candidates, np.float64))
    scores = 2.5 * np.maximum((unit(np.asarray(images, np.float64)) * texts).sum(axis=-1), 0)
    if references is None:
        return scores, None
    nearest = np.array(
        [
            max(float((unit(np.asarray(rows, np.float64)) @ text).max()), 0.0)
            for rows, text in zip(references, texts, strict=True)
        ]
    )
    total = scores + nearest
    # 0 where both are, NaN where the image's embedding is.
    return scores, np.divide(2 * scores * nearest, total, out=np.zeros_like(total), where=total != 0)


def measure_clip(
    clip: FrozenCLIP,
    images: Sequence[Any],
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    embeddings: Mapping[int, torch.Tensor] | None = None,
    batch_size: int = 32,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int], object] = lambda done: None,
    on_error: Callable[[int, ImageError], object] | None = None,
) -> dict[str, Metric]:
    """CLIPScore and RefCLIPScore of captions.

    Args:
        clip: with a text tower; published scores are ViT-B/32's.
        images: of the captions, as `clipcap.data.images.read_image` takes them.
        candidates: a caption for each image.
        references: the reference captions of each image.
        embeddings: of images, by their places, that this CLIP has encoded already.
        batch_size: images or texts encoded at once.
        max_pixels: of an image.
        progress: called with the number of images done.
        on_error: called with the place of an image that cannot be read, whose scores are then NaN and do not count;
            None raises.

    Raises:
        ImageError: of an image, where `on_error` is None.
    """
    import torch

    texts = list(dict.fromkeys([*candidates, *(text for several in references for text in several)]))
    rows = {text: row for row, text in enumerate(texts)}
    with torch.inference_mode():
        encoded = []
        for begin in range(0, len(texts), batch_size):
            prompts = [PROMPT + text for text in texts[begin : begin + batch_size]]
            encoded.append(_rows(clip.encode_texts(prompts)))
        table = np.concatenate(encoded)
        seen = {place: _rows(embedding) for place, embedding in (embeddings or {}).items()}
        progress(len(seen))
        todo = [place for place in range(len(images)) if place not in seen]
        for begin in range(0, len(todo), batch_size):
            places = todo[begin : begin + batch_size]
            pictures = {}
            for place in places:
                try:
                    pictures[place] = read_image(images[place], max_pixels=max_pixels, side=clip.preprocess.size)
                except ImageError as error:
                    if on_error is None:
                        raise
                    on_error(place, error)
                    seen[place] = np.full(table.shape[1], np.nan)
            if pictures:
                batch = clip.preprocess(list(pictures.values()))
                seen |= zip(pictures, _rows(clip.encode_images(batch, packed=True)), strict=True)
            progress(len(seen))
    scores, with_references = clip_scores(
        np.stack([seen[place] for place in range(len(images))]),
        table[[rows[text] for text in candidates]],
        [table[[rows[text] for text in several]] for several in references],
    )
    assert with_references is not None
    return {"CLIPScore": mean_metric(scores.tolist()), "RefCLIPScore": mean_metric(with_references.tolist())}


def _rows(embeddings: torch.Tensor) -> np.ndarray:
    return embeddings.float().cpu().numpy()
