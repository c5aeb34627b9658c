"""The command `clipcap calibrate`: learn from captioned images when a captioner is right (`clipcap.confidence`)."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clipcap.confidence import FILE, SCORES, Calibration, Ground, caption_scores, whole_picture
from clipcap.data.dataset import CaptionedImage, read_dataset
from clipcap.data.embeddings import mapper_input
from clipcap.data.images import ImageError, read_image, readable
from clipcap.data.readers import Format
from clipcap.evaluation.metrics import score_captions, tokenize
from clipcap.ranking import WEIGHTS, pool_of, reranked, similarities
from common.checks import UserError, printable, require_language
from common.files import write_text
from common.images import MAX_PIXELS, ImageLimit
from common.runtime import RuntimeConfig, start

if TYPE_CHECKING:
    from clipcap.captioner import Captioner
    from common.encoders.interface import ImageFeatures

RIGHT = 0.5
"""Share of what a caption says, by rarity of its words, that people said too, from which on it counts as right."""
LEAST = 10
"""Captions that are right, and that are not, at least."""
STRENGTH = 0.1
"""C of the logistic regression on standardised scores: few captions, so a strong penalty."""
FOLDS = 5
CAPTIONS = 3
"""Of each image that are learned from, so that a second and third caption's confidence is calibrated too."""
TRAINING = 2000
"""Training images, at most, that say what is known."""
BATCH = 16
"""Images at once."""
Encoded = tuple[list[CaptionedImage], "ImageFeatures"]
"""Images that were read, and what CLIP makes of them."""


@dataclass(frozen=True)
class CalibrateConfig:
    """Learn how to rank a captioner's captions and when they are right, on captioned images that it was not trained on.

    Captions of the split are compared with the people's; what they have in common teaches how sure a caption is. Writes
    confidence.safetensors beside the captioner's weights. `clipcap caption`, `clipcap serve` and `Captioner.stream`
    then give the probability that a caption is right, and name pictures unlike any in training.
    """

    data: Path
    """Captioned images that the captioner was trained on, in any layout that `clipcap train` reads."""
    model: str
    """Captioner: a directory that `clipcap train` or `clipcap convert` wrote, or a packaged name, photo or tiny."""
    images: Path | None = None
    """Directory of the images, when they are not beside the captions."""
    format: Format = "auto"
    """Layout of DATA, where it should not be guessed from its content."""
    split: str = "val"
    """Split of DATA to learn from, of images that were not trained on."""
    others: Path | None = None
    """More captioned images with this split, of other subjects than those of training: the captioner is more often
    wrong about them, and that is learned too."""
    others_images: Path | None = None
    """Directory of their images, when they are not beside the captions."""
    rerank: bool = True
    """If the captioner's CLIP has a text tower, also choose the weight of its similarity in ranking the beams, by CIDEr
    on the same images, and write it to config.json."""
    language: str = "en"
    """Code of the captions' language."""
    skip_missing: bool = False
    """Leave out captions whose image is missing and images without a caption, instead of stopping."""
    limit: ImageLimit = field(default_factory=ImageLimit)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def rarity(documents: Sequence[Sequence[str]]) -> dict[str, float]:
    """log(n / images whose captions have a word) for each word of the captions of n images, as tokenised texts."""
    counts = Counter(word for texts in documents for word in {word for text in texts for word in text.split()})
    return {word: math.log(len(documents) / count) for word, count in counts.items()}


def share_said(caption: str, references: Sequence[str], weights: Mapping[str, float]) -> float:
    """The share of a caption's words, weighed by `rarity`, that are in any of the references; 0 of no words.

    All are tokenised texts. A word that nobody used anywhere weighs as much as the rarest.
    """
    most = max(weights.values(), default=1.0)
    said = {word for text in references for word in text.split()}
    words = [(weights.get(word, most), word in said) for word in caption.split()]
    total = sum(weight for weight, _ in words)
    return sum(weight for weight, known in words if known) / total if total > 0 else 0.0


def right_captions(
    captions: Sequence[Sequence[str]], items: Sequence[CaptionedImage], *, language: str = "en"
) -> list[list[bool]]:
    """Whether captions of images are right: half of what each says, weighed by `rarity`, people said too.

    The arguments are those of `shares_said`.
    """
    return [[share >= RIGHT for share in several] for several in shares_said(captions, items, language=language)]


def shares_said(
    captions: Sequence[Sequence[str]], items: Sequence[CaptionedImage], *, language: str = "en"
) -> list[list[float]]:
    """The share of each caption of an image that people said of it too (`share_said`).

    Args:
        captions: of each of the first images of `items`.
        items: images with reference captions; those without captions to judge only say how rare words are.
        language: code of the captions' language.
    """
    keys = [str(row) for row in range(len(items))]
    people, _ = tokenize({key: list(item.captions) for key, item in zip(keys, items, strict=True)}, "words", language)
    given, _ = tokenize({key: list(several) for key, several in zip(keys, captions, strict=False)}, "words", language)
    weights = rarity(list(people.values()))
    return [[share_said(text, people[key], weights) for text in texts] for key, texts in given.items()]


def fit(
    scores: Float[Tensor, "n s"], right: Bool[np.ndarray, " n"], owners: Sequence[int]
) -> tuple[Float[Tensor, " s"], float, dict[str, float]]:
    """Logistic regression of being right on scores: weights, bias, and how good it is on images left out.

    Args:
        scores: of captions.
        right: whether each is right.
        owners: number of each caption's image; captions of one image are left out together.

    Raises:
        UserError: fewer than `LEAST` captions are right, or are not.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import brier_score_loss, roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if min(right.sum(), (~right).sum()) < LEAST or len(set(owners)) < FOLDS:
        raise UserError(
            f"{right.sum()} of {len(right)} captions are right: learning when needs at least {LEAST} that are and "
            f"{LEAST} that are not, so give more images."
        )
    model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH))
    rows = scores.numpy()
    folds = GroupKFold(FOLDS)
    held_out = cross_val_predict(model, rows, right, groups=list(owners), cv=folds, method="predict_proba")[:, 1]
    model.fit(rows, right)
    scaler, regression = model[0], model[-1]
    weights = regression.coef_[0] / scaler.scale_
    bias = float(regression.intercept_[0] - weights @ scaler.mean_)
    return (
        torch.from_numpy(weights),
        bias,
        {
            "AUROC": float(roc_auc_score(right, held_out)),
            "Brier score": float(brier_score_loss(right, held_out)),
            "Brier score of the mean": float(right.mean() * (1 - right.mean())),
        },
    )


def encoded(
    captioner: Captioner,
    items: Sequence[CaptionedImage],
    *,
    on_error: Callable[[ImageError], object] | None = None,
    progress: Callable[[int], object] = lambda done: None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Encoded]:
    """The images that can be read, in batches, and what CLIP makes of them.

    Args:
        captioner: with its CLIP.
        items: captioned images.
        on_error: called with the error of each other image; None raises it.
        progress: called with the number of images of each batch when it is done.
        max_pixels: of an image.
    """

    def pixels(item: CaptionedImage) -> Tensor:
        preprocess = captioner.clip.preprocess
        return preprocess([read_image(item.path, max_pixels=max_pixels, side=preprocess.size)])

    for begin in range(0, len(items), BATCH):
        batch = items[begin : begin + BATCH]
        if found := readable(batch, pixels, on_error):
            yield [item for item, _ in found], captioner.features(torch.cat([one for _, one in found]))
        progress(len(batch))


def scores_by_weight(
    captioner: Captioner, batches: Iterable[Encoded], *, progress: Callable[[int], object] = lambda done: None
) -> dict[float, float]:
    """CIDEr of the captions that `Captioner.decode` ranks first, by its weight `rerank`: of each of `WEIGHTS`.

    Args:
        captioner: its CLIP has a text tower.
        batches: images with captions by people, none of them trained on, as `encoded` gives them.
        progress: called with the number of images of each batch when it is done.

    Raises:
        UserError: there are none.
    """
    chosen: dict[float, dict[str, str]] = {weight: {} for weight in WEIGHTS}
    references = {}
    for items, features in batches:
        pools = captioner.decode(features, rerank=0, **pool_of(captioner.model.decode_options({})))
        texts = [[captioner.text(caption) for caption in pool] for pool in pools]
        cosines = similarities(captioner.clip, features.embedding, texts)
        for item, pool, cosine in zip(items, pools, cosines, strict=True):
            references[item.image_id] = list(item.captions)
            for weight, captions in chosen.items():
                captions[item.image_id] = captioner.text(reranked(pool, cosine, weight)[0])
        progress(len(items))
    if not references:
        raise UserError("none of the held-out images can be read: check the messages about them.")
    return {weight: score_captions(found, references, tokenizer="words").cider for weight, found in chosen.items()}


def choose_rerank(captioner: Captioner, place: Path, batches: Iterable[Encoded], **options: Any) -> dict[float, float]:
    """Set the captioner's own weight `rerank`, in memory and in its directory's config.json, to the best of
    `scores_by_weight` (of equals, the smallest); returns the scores.

    Args:
        captioner: its CLIP has a text tower.
        place: its directory.
        batches, options: as in `scores_by_weight`.
    """
    from common.pretrained import saving

    ciders = scores_by_weight(captioner, batches, **options)
    weight = max(ciders, key=lambda weight: (round(ciders[weight], 4), -weight))
    captioner.model.config.rerank = weight
    file = place / "config.json"
    with saving(file, "captioner's config"):
        fields = {**json.loads(file.read_text(encoding="utf-8")), "rerank": weight}
        write_text(file, json.dumps(fields, indent=2, sort_keys=True) + "\n")  # as transformers writes it
    return ciders


def calibrate(
    captioner: Captioner,
    training: Sequence[CaptionedImage],
    items: Sequence[Encoded],
    others: Sequence[Encoded] = (),
    *,
    language: str = "en",
    on_error: Callable[[ImageError], object] | None = None,
    progress: Callable[[int], object] = lambda done: None,
    max_pixels: int = MAX_PIXELS,
) -> Calibration:
    """Learn when a captioner is right; it is not changed: set `captioner.model.calibration` to the result.

    Args:
        captioner: with its CLIP.
        training: images that it was trained on, of which at most `TRAINING` are looked at, evenly chosen.
        items: other images of the same kind, with captions by people, as `encoded` gives them.
        others: more images with captions, of any kind.
        language: code of the captions' language.
        on_error, max_pixels: of the training images, as `encoded` takes them.
        progress: called with the number of images of each batch when it is done.

    Raises:
        UserError: too few images of a kind, or captions that are right or wrong nearly always.
    """

    @torch.inference_mode()
    def prefixes(features: ImageFeatures) -> Float[Tensor, "b K d"]:
        return captioner.model.prefix(mapper_input(features, captioner.model.config.inputs))

    pictures, total = [], torch.zeros(())
    for _, features in encoded(
        captioner, looked_at(training), on_error=on_error, progress=progress, max_pixels=max_pixels
    ):
        pictures.append(whole_picture(features).cpu())
        total = total + prefixes(features).float().sum(0).cpu()
    length = captioner.model.decode_options({})["max_new_tokens"]  # as `Captioner.stream` has it
    judged: list[CaptionedImage] = []
    found: list[tuple[ImageFeatures, Tensor, list[Any]]] = []
    if not pictures or not items:
        raise UserError("no training images or no others can be read: calibrating needs both.")
    for kept, features in [*items, *others]:
        made = prefixes(features)
        found.append((features, made, captioner.decode(features, num_captions=CAPTIONS, max_new_tokens=length)))
        judged += kept
        progress(len(kept))
    known_pictures = torch.cat(pictures)
    ground = Ground.fit(known_pictures, torch.cat([whole_picture(features).cpu() for _, features in items]))
    blank = total / len(known_pictures)
    scores = [rows for part in found for rows in caption_scores(captioner, *part, blank, ground)]
    texts = [[captioner.text(one) for one in captions] for _, _, several in found for captions in several]
    seen = {item.image_id for item in judged}
    right = right_captions(
        texts, [*judged, *(item for item in training if item.image_id not in seen)], language=language
    )
    owners = [number for number, several in enumerate(right) for _ in several]
    flat = np.array([one for several in right for one in several])
    weights, bias, quality = fit(torch.cat(scores), flat, owners)
    record = {
        "images": {"training": len(known_pictures), "learned from": len(judged)},
        "captions": len(flat),
        "right": float(flat.mean()),
        "language": language,
        "scores": dict(zip(SCORES, weights.tolist(), strict=False)),
    }
    return Calibration(blank, ground, weights, bias, record | quality)


def looked_at(training: Sequence[CaptionedImage]) -> Sequence[CaptionedImage]:
    """At most `TRAINING` of the training images, evenly chosen."""
    return training[:: max(1, -(-len(training) // TRAINING))]


def run(config: CalibrateConfig) -> int:
    """`clipcap calibrate`: learn, say how well it went, and write the file."""
    from clipcap.captioner import Captioner
    from clipcap.model import PACKAGED
    from common.pretrained import saving
    from common.progress import Progress

    if config.split == "train":
        raise UserError("split is 'train', whose images the captioner knows: choose val or test.")
    require_language(config.language)
    place = Path(PACKAGED.get(config.model, Path(config.model).expanduser()))
    if not place.is_dir():
        raise UserError(f"model {config.model!r} is no directory here, where {FILE} could be written: give one.")
    device = start(config.runtime)
    everything = read_dataset(config.data, images=config.images, skip_missing=config.skip_missing, format=config.format)
    splits: dict[str, list[CaptionedImage]] = {"train": [], config.split: []}
    for item in everything:
        if item.captions:
            splits.setdefault(item.split, []).append(item)
    for name in ("train", config.split):
        several = splits[name]
        if not several or any(item.embedding_row is not None for item in several):
            raise UserError(f"{str(config.data)!r} has no images of split {name!r} with captions: give some.")
    others = []
    if config.others is not None:
        more = read_dataset(config.others, images=config.others_images, skip_missing=config.skip_missing)
        others = [item for item in more if item.split == config.split and item.captions]
        if not others:
            raise UserError(f"{str(config.others)!r} has no images of split {config.split!r} with captions: give some.")
    captioner = Captioner.from_pretrained(config.model, device=device)
    skipped: list[ImageError] = []
    options: dict[str, Any] = {"on_error": skipped.append, "max_pixels": config.limit.max_pixels}
    parts = splits[config.split], others
    with Progress(total=sum(map(len, parts)), desc="embedding", unit=" images") as bar:
        known, strange = (list(encoded(captioner, part, progress=bar.update, **options)) for part in parts)
    held_out = [*known, *strange]
    count = sum(len(batch) for batch, _ in held_out)
    if config.rerank and captioner.clip.has_text:
        with Progress(total=count, desc="ranking", unit=" images") as bar:
            ciders = choose_rerank(captioner, place, held_out, progress=bar.update)
        weight = captioner.model.config.rerank
        print(f"rerank: {weight:g} ({', '.join(f'CIDEr {value:.3f} with {w:g}' for w, value in ciders.items())})")
    total = len(looked_at(splits["train"])) + count
    with Progress(total=total, desc="calibrating", unit=" images") as bar:
        found = calibrate(
            captioner, splits["train"], known, strange, language=config.language, progress=bar.update, **options
        )
    if skipped:
        print(f"skipped {len(skipped)} images, the first: {printable(skipped[0])}", file=sys.stderr)
    with saving(place / FILE, "calibration"):
        found.save(place / FILE)
    record = found.record
    learned, right = record["images"]["learned from"], f"{record['right']:.0%}"
    print(
        f"{record['captions']} captions of {learned} images, {right} of them right; on images left out, "
        f"AUROC {record['AUROC']:.2f} and Brier score {record['Brier score']:.3f} "
        f"({record['Brier score of the mean']:.3f} of always saying {right})."
    )
    print(f"confidence: {place / FILE}")
    return 0
