"""From images to text in one object: CLIP, the captioner's model and its tokenizer together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from clipcap.decoding import Caption, decode
from clipcap.embeddings import encode
from clipcap.images import ImageError, ImageSource, read_image
from clipcap.model import ClipCapModel
from common.checks import UserError, require_at_least
from common.clip import FrozenCLIP, load_clip
from common.runtime import resolve_device


@dataclass(frozen=True)
class ImageCaptions:
    """What `Captioner.stream` gives for one image."""

    image: ImageSource
    """As it was given."""
    captions: list[str]
    """Best first."""
    scores: list[float]
    """Mean log-probability of each caption's tokens, in nats."""


class Captioner:
    """A trained captioner with the CLIP it was trained on.

    Example:
        >>> captioner = Captioner.from_pretrained("tiny")
        >>> captioner.caption("photo.jpg")
    """

    def __init__(self, model: ClipCapModel, clip: FrozenCLIP, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        tokenizer = tokenizer or model.tokenizer
        if tokenizer is None:
            raise UserError("the captioner has no tokenizer: give one, or load it with the name of its GPT-2.")
        width = clip.patch_width if model.config.inputs == "patches" else clip.width
        if width != model.config.clip_width:
            raise UserError(
                f"CLIP {clip.name!r} gives {model.config.inputs} of width {width} but the captioner reads "
                f"{model.config.clip_width}: use the CLIP it was trained on ({model.config.clip})."
            )
        self.model, self.clip, self.tokenizer = model.eval(), clip, tokenizer

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        clip: str | None = None,
    ) -> Captioner:
        """Load a captioner and its backbones.

        Args:
            path_or_name: packaged name ("tiny"), directory that `clipcap train` or `clipcap convert` wrote, or hub id.
            device: "auto", "cpu", "cuda", ...
            dtype: of all weights; None is float32. bfloat16 captions faster.
            clip: where its CLIP is, when not where the captioner's config says.

        Raises:
            UserError: the captioner or a backbone cannot be found or does not fit.
        """
        target = resolve_device(device)
        model = ClipCapModel.from_pretrained(path_or_name, dtype=dtype, device=target)
        name = clip or model.config.clip
        if name is None:
            raise UserError(f"captioner {str(path_or_name)!r} does not name its CLIP: give it (clip).")
        return cls(model, load_clip(name, device=target, dtype=dtype))

    def caption(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        strategy: str = "beam",
        num_captions: int = 1,
        batch_size: int = 16,
        progress: bool = False,
        **options: Any,
    ) -> Any:
        """Captions of images.

        Args:
            images: one image, or several as a list, an array (n, h, w, c) or a generator: paths, PIL images and
                arrays, mixed as you like (see `clipcap.images.read_image`).
            strategy: "beam", "beam_original", "greedy" or "sample" (see `clipcap.decoding.decode`).
            num_captions: captions for each image.
            batch_size: images captioned at once.
            progress: show a progress bar.
            options: `stream`'s and `decode`'s.

        Returns:
            A text for each image, in order; a list of texts for each, best first, when `num_captions` is above 1.
            For one image that is not in a list, its text or list of texts itself.

        Raises:
            ImageError: an image cannot be read; `stream` can go on with the rest.
            UserError: an option is out of range.
        """
        one = isinstance(images, str | os.PathLike | Image.Image)
        one = one or isinstance(images, np.ndarray) and images.ndim < 4
        several: Any = [images] if one else images
        found = self.stream(
            several, strategy=strategy, num_captions=num_captions, batch_size=batch_size, **options
        )
        if progress:
            from tqdm import tqdm

            found = tqdm(found, total=len(several) if hasattr(several, "__len__") else None, unit=" images")
        texts = [item.captions if num_captions > 1 else item.captions[0] for item in found]
        return texts[0] if one else texts

    def stream(
        self,
        images: Iterable[ImageSource],
        *,
        batch_size: int = 16,
        on_error: Callable[[ImageError], object] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Iterator[ImageCaptions]:
        """Captions of images one after the other, reading `batch_size` at a time.

        Args:
            images: as in `caption`, several.
            batch_size: images captioned at once.
            on_error: called with the error of an image that cannot be read, which is then left out; None raises it.
            seed: of strategy "sample".
            options: `clipcap.decoding.decode`'s: strategy, num_captions, num_beams, max_new_tokens, ...
        """
        require_at_least("batch_size", batch_size, 1)
        options.setdefault("generator", torch.Generator(self.model.device).manual_seed(seed))
        remaining = iter(images)
        while batch := list(islice(remaining, batch_size)):
            readable: list[tuple[ImageSource, Image.Image]] = []
            for source in batch:
                try:
                    readable.append((source, read_image(source)))
                except ImageError as error:
                    if on_error is None:
                        raise
                    on_error(error)
            if not readable:
                continue
            found = decode(self.model, self.embed([image for _, image in readable]), **options)
            for (source, _), captions in zip(readable, found, strict=True):
                texts = [self.text(caption) for caption in captions]
                yield ImageCaptions(source, texts, [caption.score for caption in captions])

    @torch.inference_mode()
    def embed(self, images: list[Image.Image]) -> Float[Tensor, "b e"] | Float[Tensor, "b n e"]:
        """What the captioner reads of images: CLIP's embeddings, or its patches."""
        pixels = self.clip.preprocess(images)
        return encode(self.clip, pixels, self.model.config.inputs).to(self.model.device)  # type: ignore[arg-type]

    def text(self, caption: Caption) -> str:
        """A caption's text, without the end token."""
        return self.tokenizer.decode(caption.token_ids, skip_special_tokens=True).strip()
