"""Scores of captions with their intervals, overall and by domain."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from clipcap.data.dataset import CaptionedImage
from clipcap.evaluation.clip_score import measure_clip
from clipcap.evaluation.metrics import METRICS, Metric, bootstrap, diversity, measure, sacrebleu_score
from common.checks import require_at_least
from common.images import MAX_PIXELS

if TYPE_CHECKING:
    from torch import Tensor

    from common.clip import FrozenCLIP


DOMAINS = {"in-domain": "in", "near-domain": "near", "out-domain": "out"}
"""Names of nocaps' own files, and of its papers' columns."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of captions of some images; all on the libraries' own scale, which papers print times 100."""

    captions: dict[str, str]
    """Image id to caption."""
    scores: dict[str, float]
    """BLEU-1 to BLEU-4, METEOR, ROUGE-L, CIDEr, SPICE, CLIPScore, RefCLIPScore and sacreBLEU, where measured."""
    intervals: dict[str, tuple[float, float]]
    """95%, by bootstrap over the images."""
    domains: dict[str, dict[str, Any]]
    """nocaps' in, near, out and overall: images, scores and intervals; empty where images have no domain."""
    diversity: dict[str, float | int]
    not_measured: dict[str, str]
    """What could not be computed here, and why."""
    tokenizer: str
    """Of BLEU, METEOR, ROUGE-L, CIDEr and SPICE: "ptb" as in published scores, or "words"."""
    details: dict[str, str]
    """sacrebleu's signature, CLIPScore's CLIP."""
    per_image: dict[str, dict[str, float]]
    """Image id to its scores."""
    missing: tuple[str, ...] = ()
    """Ids of images without a caption, which are not scored: the scores may be higher for it."""
    unread: dict[str, str] = field(default_factory=dict)
    """Image id to what is wrong with an image that cannot be read, and so has no CLIPScore."""

    @property
    def coverage(self) -> str:
        """How many images are scored, of how many, in words."""
        scored = len(self.captions)
        if not self.missing:
            return f"{scored} images"
        return f"{scored} of {scored + len(self.missing)} images"

    @property
    def warnings(self) -> list[str]:
        """What a reader of the scores must know."""
        found = []
        if self.missing:
            total = len(self.captions) + len(self.missing)
            found.append(
                f"{len(self.missing)} of {total} images have no caption and are left out of the scores, which may be "
                f"higher for it, the first {self.missing[0]!r}."
            )
        if self.unread:
            found.append(
                f"{len(self.unread)} images cannot be read and have no CLIPScore, the first: "
                f"{next(iter(self.unread.values()))}"
            )
        return found


def evaluate_captions(
    captions: Mapping[str, str],
    items: Iterable[CaptionedImage],
    *,
    clip: FrozenCLIP | None = None,
    embeddings: Mapping[str, Tensor] | None = None,
    training: Sequence[str] = (),
    tokenizer: str = "auto",
    metrics: Collection[str] = METRICS,
    language: str = "en",
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Evaluation:
    """Score captions of images against their references.

    Args:
        captions: image id to caption.
        items: the images with their references; those without a caption are left out and named in `missing`.
        clip: of CLIPScore; None leaves it out.
        embeddings: image id to what this CLIP has encoded already.
        training: captions of the training split, to tell which captions are new.
        tokenizer: "auto", "ptb" or "words".
        metrics: against references, of `METRICS`.
        language: code of the captions' language.
        resamples: for the intervals; 0 leaves them out.
        seed: of the resamples.
        progress: show progress bars.
        max_pixels: of an image.

    Raises:
        UserError: no caption, no reference, no metric.
    """
    from common.progress import Progress

    require_at_least("resamples", resamples, 0)
    items = list(items)
    kept = [item for item in items if item.image_id in captions]
    unread: dict[str, str] = {}
    given = {item.image_id: captions[item.image_id] for item in kept}
    references = {item.image_id: list(item.captions) for item in kept}
    with Progress(total=len(kept), desc="scoring", unit=" captions", disable=not progress) as bar:
        measured, name, absent = measure(
            given,
            references,
            tokenizer=tokenizer,
            metrics=metrics,
            language=language,
            progress=lambda done: bar.update(done - bar.n),
        )
        bar.update(len(kept) - bar.n)
    details: dict[str, str] = {}
    if clip is None:
        absent["CLIPScore"] = absent["RefCLIPScore"] = "no CLIP was chosen (clip_score)"
    else:
        details["CLIPScore's CLIP"] = clip.name
        with Progress(total=len(kept), desc="CLIPScore", unit=" images", disable=not progress) as bar:
            by_clip = measure_clip(
                clip,
                [item.path for item in kept],
                list(given.values()),
                list(references.values()),
                embeddings={row: embeddings[key] for row, key in enumerate(given) if key in embeddings}
                if embeddings
                else None,
                max_pixels=max_pixels,
                progress=lambda done: bar.update(done - bar.n),
                on_error=lambda place, error: unread.setdefault(kept[place].image_id, str(error)),
            )
        if len(unread) < len(kept):
            measured |= by_clip
        else:
            absent["CLIPScore"] = absent["RefCLIPScore"] = "none of the images can be read"
    scores = {metric: float(found.value) for metric, found in measured.items()}
    texts = list(given.values())
    scores["sacreBLEU"], details["sacreBLEU's signature"] = sacrebleu_score(texts, list(references.values()))
    intervals = bootstrap(measured, resamples=resamples, seed=seed) if resamples else {}
    varied = diversity(texts, training, language)
    if not training:
        absent["novel share"] = "the data set has no training split beside the split that is scored"
    return Evaluation(
        captions=given,
        scores=scores,
        intervals=intervals,
        domains=_domains([item.domain for item in kept], measured, resamples=resamples, seed=seed),
        diversity=varied,
        not_measured=absent,
        tokenizer=name,
        details=details,
        per_image={
            key: {metric: float(found.per_image[row]) for metric, found in measured.items()}
            for row, key in enumerate(given)
        },
        missing=tuple(item.image_id for item in items if item.image_id not in captions),
        unread=unread,
    )


def _domains(
    domains: Sequence[str], metrics: Mapping[str, Metric], *, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Scores by nocaps' domains, in the papers' order, with the whole as "overall" (Agrawal et al. 2019)."""
    names = np.array([DOMAINS.get(domain, domain) for domain in domains])
    if not any(names):
        return {}
    known = [name for name in DOMAINS.values() if name in names]
    groups = {name: np.flatnonzero(names == name) for name in [*known, *sorted({*names} - {*known, ""})]}
    groups["overall"] = np.arange(len(names))
    return {
        str(name): {
            "images": len(rows),
            "scores": {metric: found.of(rows) for metric, found in metrics.items()},
            "intervals": bootstrap(metrics, resamples=resamples, seed=seed, rows=rows) if resamples else {},
        }
        for name, rows in groups.items()
    }


def rows_of(found: Evaluation) -> list[dict[str, Any]]:
    """The scores times 100 as papers print them, with their intervals, for a table."""
    return [
        {
            "metric": name,
            "score x 100": round(100 * value, 2),
            "95% interval": "–".join(f"{100 * end:.2f}" for end in found.intervals[name])
            if name in found.intervals
            else "",
        }
        for name, value in found.scores.items()
    ]


def domain_rows(found: Evaluation) -> list[dict[str, Any]]:
    """The scores times 100 of nocaps' domains, a row each."""
    return [
        {"domain": name, "images": part["images"]}
        | {metric: round(100 * value, 2) for metric, value in part["scores"].items()}
        for name, part in found.domains.items()
    ]
