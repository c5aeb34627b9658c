"""From images to text in one object: CLIP, the captioner's model and its tokenizer together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from clipcap.backbones import absolute
from clipcap.checkpoint import one_dtype
from clipcap.confidence import Calibration, Judgement
from clipcap.data.embeddings import mapper_input
from clipcap.data.images import ImageError, ImageSource, read_image, readable
from clipcap.decoding import bytes_of, decode, require_options
from clipcap.generation import prompt_tokens
from clipcap.model import ClipCapModel
from clipcap.packing import require_int8
from clipcap.ranking import pool_of, require_ranker, reranked, similarities
from clipcap.scoring import caption_nats
from clipcap.search import Caption
from common.checks import UserError, require_at_least
from common.clip import FrozenCLIP, load_clip
from common.encoders.interface import ImageFeatures
from common.images import MAX_PIXELS
from common.packing import can_pack
from common.runtime import free_memory, require_memory, require_seed, resolve_device

BATCH_MOST = {"cpu": 32, "cuda": 256}
"""Images captioned at once when memory does not ask for fewer; more are no faster."""
BATCH_OPTIONS = ("strategy", "num_beams", "num_captions", "max_new_tokens")
OPTIONS = (
    *BATCH_OPTIONS, "top_k", "top_p", "temperature", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens",
    "length_penalty", "early_stopping",
)  # fmt: skip
STREAM_OPTIONS = ("on_error", "seed", "max_pixels", "confidence", "rerank")
MEMORY_SHARE = 0.25
"""Share of the memory that is free which a batch may take."""


@dataclass(frozen=True)
class ImageCaptions:
    """What `Captioner.stream` gives for one image."""

    image: ImageSource
    """As it was given."""
    captions: list[str]
    """Best first."""
    scores: list[float]
    """Mean log-probability of each caption's tokens, in nats."""
    embedding: Float[Tensor, " e"] | None = field(default=None, compare=False, repr=False)
    """CLIP's embedding of it, on the CPU; None of a captioner that reads patches."""
    confidences: list[float] = field(default_factory=list)
    """Probability of each caption to be right; empty where not asked for."""
    far: bool = False
    """Whether, as far as asked for, the image is unlike any in training, so that the captions may mean nothing."""


class Captioner:
    """A trained captioner with the CLIP it was trained on.

    Example:
        >>> captioner = Captioner.from_pretrained("tiny")
        >>> captioner.caption("photo.jpg")
    """

    def __init__(
        self,
        model: ClipCapModel,
        clip: FrozenCLIP,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        int8: bool = False,
    ) -> None:
        tokenizer = tokenizer or model.tokenizer
        if tokenizer is None:
            raise UserError("the captioner has no tokenizer: give one, or load it with the name of its GPT-2.")
        if model.config.inputs == "patches":
            clip.require_patches("the captioner")
        width = clip.patch_width if model.config.inputs == "patches" else clip.width
        if width != model.config.clip_width:
            raise UserError(
                f"CLIP {clip.name!r} gives {model.config.inputs} of width {width} but the captioner reads "
                f"{model.config.clip_width}: use the CLIP it was trained on ({model.config.clip})."
            )
        self.model, self.clip, self.tokenizer, self.int8 = model.eval(), clip, tokenizer, int8

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        clip: str | FrozenCLIP | None = None,
    ) -> Captioner:
        """Load a captioner and its backbones.

        Args:
            path_or_name: packaged name ("tiny"), directory that `clipcap train` or `clipcap convert` wrote, or hub id.
            device: "auto", "cpu", "cuda", ...
            dtype: of all weights; None is float32. bfloat16 captions faster; "int8", on a CPU, faster still: GPT-2's
                matrix products in 8-bit integers, the rest in bfloat16 where the processor has it. "auto" is that of
                the file; names such as "bfloat16" are taken too.
            torch_dtype: its older name.
            clip: where its CLIP is, when not where the captioner's config says. Or a CLIP that is in memory, which is
                used when it is the one that the config names, with this dtype and on this device.

        Raises:
            UserError: the captioner or a backbone cannot be found or does not fit.
        """
        target = resolve_device(device)
        dtype = one_dtype(dtype, torch_dtype)
        int8 = dtype == "int8"
        if int8:
            require_int8(target)
            dtype = torch.bfloat16 if can_pack(target, torch.bfloat16) else torch.float32
        model = ClipCapModel.from_pretrained(path_or_name, dtype=dtype, device=target)
        if isinstance(clip, FrozenCLIP):
            wanted = model.config.clip, model.dtype, model.device
            if (absolute(clip.name), clip.dtype, clip.device) == wanted:
                return cls(model, clip, int8=int8)
            clip = None
        name = clip or model.config.clip
        if name is None:
            raise UserError(f"captioner {str(path_or_name)!r} does not name its CLIP: give it (clip).")
        return cls(model, load_clip(name, device=target, dtype=model.dtype), int8=int8)

    def caption(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        strategy: str | None = None,
        num_captions: int | None = None,
        batch_size: int | Literal["auto"] | None = None,
        prompt: str | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Any:
        """Captions of images.

        Args:
            images: one image, or several as a list, an array (n, h, w, c) or a generator: paths, URLs, PIL images and
                arrays, mixed as you like (see `clipcap.data.images.read_image`).
            strategy: "beam", "beam_original", "greedy" or "sample" (see `clipcap.decoding.decode`); None is the
                captioner's own, "beam" where its directory says nothing else.
            num_captions: captions for each image; None is 1.
            batch_size: images captioned at once; None or "auto" lets the memory decide (`auto_batch_size`).
            prompt: text that all captions begin with, such as "a photo of".
            progress: show a progress bar.
            options: `stream`'s, and `decode`'s or transformers' own (`ClipCapModel.generate`).

        Returns:
            A text for each image, in order; a list of texts for each, best first, when `num_captions` is above 1.
            For one image that is not in a list, its text or list of texts itself.

        Raises:
            ImageError: an image cannot be read; `stream` can go on with the rest.
            UserError: an option is out of range.
        """
        one = _is_one(images)
        several: Any = [images] if one else images
        options |= {"strategy": strategy, "num_captions": num_captions}
        found = self.stream(several, batch_size=batch_size, prompt=prompt, **options)
        asked = {name: value for name, value in options.items() if name not in STREAM_OPTIONS}
        many = self._options(asked, prompt).get("num_captions", 1) > 1
        if progress:
            from common.progress import Progress

            found = Progress(found, total=len(several) if hasattr(several, "__len__") else None, unit=" images")
        texts = [item.captions if many else item.captions[0] for item in found]
        return texts[0] if one else texts

    def stream(
        self,
        images: Iterable[ImageSource],
        *,
        batch_size: int | Literal["auto"] | None = None,
        on_error: Callable[[ImageError], object] | None = None,
        seed: int = 0,
        max_pixels: int = MAX_PIXELS,
        prompt: str | None = None,
        confidence: bool = False,
        rerank: float | None = None,
        **options: Any,
    ) -> Iterator[ImageCaptions]:
        """Captions of images one after the other, reading `batch_size` at a time.

        Args:
            images: as in `caption`, several. Of a list, the next batch is read while one is captioned; of a generator,
                nothing is taken before it is needed.
            batch_size: images captioned at once; None or "auto" lets the memory decide (`auto_batch_size`).
            on_error: called with the error of an image that cannot be read, which is then left out; None raises it.
            seed: of strategy "sample".
            max_pixels: of an image (see `clipcap.data.images.read_image`).
            prompt: text that all captions begin with.
            confidence: also tell how sure the captions are, which the captioner must be calibrated for.
            rerank: as in `decode`.
            options: `clipcap.decoding.decode`'s: strategy, num_captions, num_beams, max_new_tokens, ...; or those of
                transformers' `generate`.
        """
        if confidence:
            self.require_calibration()
        require_ranker(self.clip, self.rerank_weight(rerank))
        options = self._options(options, prompt)
        length = len(options.get("prompt_ids", ()))
        require_options(self.model, prompt_length=length, **{k: options[k] for k in OPTIONS if k in options})
        require_seed(seed)
        sizes = {k: options[k] for k in BATCH_OPTIONS if k in options}
        if batch_size is None or batch_size == "auto":
            batch_size = self.auto_batch_size(**sizes)
        require_at_least("batch_size", batch_size, 1)
        if isinstance(images, Sequence):
            batch_size = max(1, min(batch_size, len(images)))
            self.require_room(batch_size, **sizes)
        batch_size = min(batch_size, sys.maxsize)
        options.setdefault("int8", self.int8)
        options.setdefault("generator", torch.Generator(self.model.device).manual_seed(seed))
        remaining, ahead = iter(images), isinstance(images, Sequence)
        reader = ThreadPoolExecutor(1)

        def begin() -> list[tuple[ImageSource, Future[Tensor]]]:
            several = islice(remaining, batch_size)
            return [(source, reader.submit(self._pixels, source, max_pixels)) for source in several]

        try:
            batch = begin()
            while batch:
                following = begin() if ahead else []
                read = readable(batch, lambda one: one[1].result(), on_error)
                if read:
                    features = self.features(torch.cat([pixels for _, pixels in read]))
                    embeddings = mapper_input(features, self.model.config.inputs)
                    found = self.decode(features, rerank=rerank, **options)
                    judged = self.judge(features, found) if confidence else [Judgement([], 0.0)] * len(found)
                    rows = embeddings.cpu() if embeddings.ndim == 2 else [None] * len(found)
                    for ((source, _), _), captions, row, sure in zip(read, found, rows, judged, strict=True):
                        texts = [self.text(caption) for caption in captions]
                        scores = [caption.score for caption in captions]
                        yield ImageCaptions(source, texts, scores, row, sure.confidences, sure.far)
                batch = following or begin()
        finally:
            reader.shutdown(cancel_futures=True)

    @torch.inference_mode()
    def features(self, pixels: Float[Tensor, "b 3 s s"]) -> ImageFeatures:
        """What CLIP makes of preprocessed images, on the captioner's device."""
        features = self.clip.encode_image_features(pixels, packed=True)
        return ImageFeatures(*(part.to(self.model.device) for part in features))

    def decode(self, features: ImageFeatures, *, rerank: float | None = None, **options: Any) -> list[list[Caption]]:
        """Captions of images, best first, from what CLIP makes of them.

        Args:
            features: of the images.
            rerank: weight of CLIP's cosine of image and caption beside the mean log-probability of a token, in ranking
                all beams (of "sample", all samples); 0 leaves the language model's order, None takes the captioner's
                own weight (`ClipCapConfig.rerank`).
            options: `clipcap.decoding.decode`'s.

        Raises:
            UserError: a negative weight, or CLIP has no text tower to rank with.
        """
        embeddings, weight = mapper_input(features, self.model.config.inputs), self.rerank_weight(rerank)
        require_ranker(self.clip, weight)
        if not weight:
            return decode(self.model, embeddings, **options)
        found = decode(self.model, embeddings, **pool_of(options))
        texts = [[self.text(caption) for caption in captions] for captions in found]
        cosines = similarities(self.clip, features.embedding, texts)
        count = options.get("num_captions", 1)
        return [reranked(*of_image, weight)[:count] for of_image in zip(found, cosines, strict=True)]

    def rerank_weight(self, asked: float | None) -> float:
        """The weight that was asked for; else the captioner's own, if its CLIP can rank."""
        if asked is not None:
            return asked
        own = self.model.config.rerank
        return own if own and self.clip.has_text else 0.0

    @torch.inference_mode()
    def judge(self, features: ImageFeatures, captions: Sequence[Sequence[Caption]]) -> list[Judgement]:
        """How sure the captions of each image are.

        Args:
            features: of the images.
            captions: of each image, as `clipcap.decoding.decode` gives them.

        Raises:
            UserError: the captioner is not calibrated.
        """
        prefixes = self.model.prefix(mapper_input(features, self.model.config.inputs))
        return self.require_calibration().judge(self, features, prefixes, captions)

    def require_calibration(self) -> Calibration:
        """The model's calibration.

        Raises:
            UserError: it has none.
        """
        if self.model.calibration is None:
            raise UserError(
                "the captioner cannot tell how sure it is: calibrate it (clipcap calibrate), or do not ask."
            )
        return self.model.calibration

    def _options(self, asked: dict[str, Any], prompt: str | None) -> dict[str, Any]:
        """`decode`'s options for those that were asked."""
        if prompt is not None:
            asked = asked | {"prompt_ids": prompt_tokens(self.tokenizer, prompt)}
        return self.model.decode_options(asked)

    def _pixels(self, source: ImageSource, max_pixels: int) -> Float[Tensor, "1 3 s s"]:
        return self.clip.preprocess([read_image(source, max_pixels=max_pixels, side=self.clip.preprocess.size)])

    def auto_batch_size(
        self, *, strategy: str = "beam", num_beams: int = 5, num_captions: int = 1, max_new_tokens: int = 67
    ) -> int:
        """Images to caption at once so that their caches take a quarter of the free memory, and no more than pays."""
        size = self._bytes_of(strategy, num_beams, num_captions, max_new_tokens)
        fitting = int(MEMORY_SHARE * free_memory(self.model.device) / size)
        return max(1, min(fitting, BATCH_MOST.get(self.model.device.type, BATCH_MOST["cpu"])))

    def require_room(
        self,
        images: int,
        *,
        strategy: str = "beam",
        num_beams: int = 5,
        num_captions: int = 1,
        max_new_tokens: int = 67,
    ) -> None:
        """Raise UserError when so many images at once take more memory than there is."""
        size = self._bytes_of(strategy, num_beams, num_captions, max_new_tokens)
        what, cure = f"{images} images are captioned at once", "use a smaller batch_size, or fewer beams"
        require_memory(what, images * size, self.model.device, cure)

    def _bytes_of(self, strategy: str, num_beams: int, num_captions: int, max_new_tokens: int) -> int:
        """Memory that each image of a batch takes."""
        width = {"greedy": 1, "sample": num_captions}.get(strategy, num_beams)
        pixels = 16 * 3 * self.clip.image_size**2 * self.model.dtype.itemsize  # with what CLIP makes of them on the way
        return bytes_of(self.model, strategy, max(width, 1), max(max_new_tokens, 1)) + pixels

    @torch.inference_mode()
    def log_probability(
        self,
        images: ImageSource | Iterable[ImageSource],
        captions: str | Sequence[str] | Sequence[Sequence[str]],
        *,
        mean: bool = False,
        batch_size: int = 16,
    ) -> Any:
        """log p(caption | image) of given captions, their end included: to rank captions, or to find the foil.

        Args:
            images: one image, or several, as in `caption`.
            captions: for one image, a text or a list of texts. For several images, one such list for all of them, or
                a list of texts for each.
            mean: per token instead of the whole caption, as `ImageCaptions.scores` are; longer captions then compare
                with shorter ones.
            batch_size: pairs scored at once.

        Returns:
            Nats, at most 0: a float for one image and a text; a list as long as the texts for one image; else a list
            of such lists.

        Raises:
            ImageError: an image cannot be read.
            UserError: no caption, an empty or too long one, or another number of lists than images.
        """
        require_at_least("batch_size", batch_size, 1)
        one_image, one_text = _is_one(images), isinstance(captions, str)
        several: list[Any] = [images] if one_image else list(images)  # type: ignore[arg-type]
        texts: list[Any] = [captions] if isinstance(captions, str) else list(captions)
        if not texts:
            raise UserError("captions is empty: give at least one text.")
        lists = [texts] * len(several) if isinstance(texts[0], str) else texts
        if len(lists) != len(several):
            raise UserError(f"captions has {len(lists)} lists but there are {len(several)} images: give one for each.")
        pairs = [(row, self._ids(text)) for row, of_image in enumerate(lists) for text in of_image]
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][1]))  # little padding
        side = self.clip.preprocess.size
        rows = [
            row
            for i in range(0, len(several), batch_size)
            for row in self.embed([read_image(image, side=side) for image in several[i : i + batch_size]])
        ]
        found = [0.0] * len(pairs)
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            embeddings = torch.stack([rows[pairs[i][0]] for i in batch])
            totals = caption_nats(self.model, self.model.prefix(embeddings), [pairs[i][1] for i in batch])
            if mean:
                totals = totals / torch.tensor([len(pairs[i][1]) for i in batch], device=totals.device)
            for i, total in zip(batch, totals.tolist(), strict=True):
                found[i] = total
        values = iter(found)
        nested = [[next(values) for _ in of_image] for of_image in lists]
        if not one_image:
            return nested
        return nested[0][0] if one_text else nested[0]

    def _ids(self, text: str) -> list[int]:
        """A caption's tokens with its end token, as in training."""
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"caption {text!r} is empty: give a text.")
        ids = self.tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
        ends = self.model.config.eos_token_id
        stops = [ends] if isinstance(ends, int) else list(ends or [])
        return ids if not stops or ids[-1] in stops else [*ids, stops[0]]

    def embed(self, images: list[Image.Image]) -> Float[Tensor, "b e"] | Float[Tensor, "b n e"]:
        """What the captioner reads of images: CLIP's embeddings, or its patches."""
        return mapper_input(self.features(self.clip.preprocess(images)), self.model.config.inputs)

    def text(self, caption: Caption) -> str:
        """A caption's text, without the end token."""
        return self.tokenizer.decode(caption.token_ids, skip_special_tokens=True).strip()


def _is_one(images: Any) -> bool:
    """Whether this is one image rather than several."""
    return isinstance(images, str | os.PathLike | Image.Image) or isinstance(images, np.ndarray) and images.ndim < 4
