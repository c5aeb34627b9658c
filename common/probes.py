"""What frozen embeddings know: zero-shot classes, retrieval, linear and few-shot probes (Radford et al. 2021).

Pure functions of embeddings; `common.probing` makes them from images and texts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from common.checks import UserError, require_at_least, require_share
from common.intervals import wilson_interval

TEMPLATES: dict[str, tuple[str, ...]] = {
    "bare": ("{}",),
    "photo": ("a photo of a {}.",),
    "ensemble": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}
"""Sets of prompt templates by name. `photo` is the paper's default; `ensemble` holds the seven of its eighty that its
authors' notebook found to be enough for ImageNet."""
MOST_ITERATIONS = 1000
"""Of L-BFGS (Radford et al. 2021, appendix A.3)."""
STEPS_PER_DECADE = 8
"""Strengths C that the sweep tells apart in a decade."""
DECADES = 6
"""The sweep lies between C = 10^-6 and 10^6."""
FITS = DECADES + 1 + 2 * int(math.log2(2 * STEPS_PER_DECADE)) + 1
"""Fits of a probe at most: those of the sweep, and the last."""
TOP = 5
"""Guesses of top-5 accuracy, which is given from six classes on."""
ROWS = 4096
"""Rows of a similarity matrix at once."""


# --- zero-shot -----------------------------------------------------------------------------------------------------


def fill(templates: Sequence[str], name: str) -> list[str]:
    """The prompts of a class: its name in place of {} in every template.

    Raises:
        UserError: no template, or one without {}.
    """
    if not templates:
        raise UserError("templates are empty: give at least one, such as 'a photo of a {}.'.")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"template {template!r} has no place for the class: write {{}} where it goes.")
    return [template.replace("{}", name) for template in templates]


def class_weights(prompts: Float[Tensor, "c t e"]) -> Float[Tensor, "c e"]:
    """A unit vector for each class: the normalised mean of its prompts' unit embeddings (sec. 3.1.4).

    Args:
        prompts: embeddings of t prompts for each of c classes, of any length.
    """
    return F.normalize(F.normalize(prompts.float(), dim=-1).mean(1), dim=-1)


def zero_shot(images: Float[Tensor, "n e"], classes: Float[Tensor, "c e"]) -> Float[Tensor, "n c"]:
    """Cosine similarity of every image to every class, of which the highest is the guess (sec. 3.1.2)."""
    return F.normalize(images.float(), dim=-1) @ F.normalize(classes.float(), dim=-1).T


# --- scores --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """How good guesses are."""

    images: int
    accuracy: float
    interval: tuple[float, float]
    """Of accuracy, 95% (Wilson's)."""
    mean_per_class: float
    """Mean over the classes that have images of the share that is right."""
    top_5: float | None
    """Share of images whose class is among the five best guesses; None below six classes."""
    most_frequent: float
    """Accuracy of always guessing the most frequent class, for comparison."""
    confusion: list[list[int]]
    """Images by their class (row) and guess (column)."""


def score(
    guesses: Float[Tensor, "n c"], labels: Int[Tensor, " n"], *, known: Int[Tensor, " m"] | None = None
) -> Scores:
    """Scores of guesses.

    Args:
        guesses: a number for each image and class, the highest at the guess.
        labels: the class of each image.
        known: labels that the most frequent class is taken from: those of training; `labels` if not given.

    Raises:
        UserError: there are no images.
    """
    images, classes = guesses.shape
    if not images:
        raise UserError("there are 0 images to score: give at least one.")
    guessed = guesses.argmax(1)
    confusion = torch.bincount(labels * classes + guessed, minlength=classes * classes).view(classes, classes)
    counts, right = confusion.sum(1), confusion.diagonal()
    frequent = torch.bincount(labels if known is None else known, minlength=classes).argmax()
    top = None
    if classes > TOP:
        top = (guesses.topk(TOP, dim=1).indices == labels[:, None]).any(1).double().mean().item()
    total = int(right.sum())
    return Scores(
        images=images,
        accuracy=total / images,
        interval=wilson_interval(total, images),
        mean_per_class=(right[counts > 0].double() / counts[counts > 0]).mean().item(),
        top_5=top,
        most_frequent=(labels == frequent).double().mean().item(),
        confusion=confusion.tolist(),
    )


# --- retrieval -----------------------------------------------------------------------------------------------------


def retrieval_ranks(
    images: Float[Tensor, "n e"], texts: Float[Tensor, "t e"], owners: Int[Tensor, " t"]
) -> tuple[Int[Tensor, " n"], Int[Tensor, " t"]]:
    """Ranks, 0 the best, by cosine similarity, of images that have one or several captions.

    Args:
        images: embeddings.
        texts: embeddings of captions.
        owners: the image that each caption belongs to.

    Returns:
        For each image, the rank of the best of its own captions among those of others; for each caption, the rank of
        its image among the others. What is as similar counts as better, so that embeddings that are all the same
        find nothing.

    Raises:
        UserError: an image has no caption.
    """
    if len(torch.unique(owners)) != len(images):
        raise UserError(f"{len(images)} images, {len(torch.unique(owners))} with captions: give each at least one.")
    images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    of_images, of_texts = [], []
    for begin in range(0, len(images), ROWS):
        numbers = torch.arange(begin, min(begin + ROWS, len(images)), device=owners.device)
        similarity = images[numbers] @ texts.T  # (r, t)
        own = owners[None] == numbers[:, None]  # (r, t)
        best = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        of_images.append(((similarity >= best) & ~own).sum(1))
    for begin in range(0, len(texts), ROWS):
        similarity = texts[begin : begin + ROWS] @ images.T  # (r, n)
        own_image = similarity.gather(1, owners[begin : begin + ROWS, None])
        of_texts.append((similarity >= own_image).sum(1) - 1)
    return torch.cat(of_images), torch.cat(of_texts)


def recall_at(ranks: Int[Tensor, " q"], k: int) -> float:
    """Share of queries whose own candidate is among the first k."""
    require_at_least("k", k, 1)
    return (ranks < k).double().mean().item()


# --- linear and few-shot probes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A logistic regression on frozen features."""

    guesses: Tensor
    """Probability of each class for the test images, (n, c)."""
    strength: float
    """scikit-learn's C, the inverse of the L2 penalty, that the sweep chose."""
    tried: dict[float, float]
    """Accuracy on validation images by C."""
    converged: bool
    """Whether the last fit ended before `MOST_ITERATIONS`."""


def sweep(accuracy: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The C of highest accuracy between 10^-6 and 10^6, of equal ones the smallest, and all that were tried.

    A binary search (Radford et al. 2021, appendix A.3): every second decade, then ever closer to the best, until eight
    steps make a decade.
    """
    tried: dict[int, float] = {}  # by the exponent in steps
    end, step = DECADES * STEPS_PER_DECADE, 2 * STEPS_PER_DECADE
    candidates = list(range(-end, end + 1, step))
    while True:
        for place in candidates:
            if place not in tried and -end <= place <= end:
                tried[place] = accuracy(_strength(place))
        best = max(tried, key=lambda place: (tried[place], -place))
        if step == 1:
            return _strength(best), {_strength(place): tried[place] for place in sorted(tried)}
        step //= 2
        candidates = [best - step, best + step]


def _strength(place: int) -> float:
    return 10.0 ** (place / STEPS_PER_DECADE)


def linear_probe(
    train: tuple[Float[Tensor, "n w"], Int[Tensor, " n"]],
    val: tuple[Float[Tensor, "m w"], Int[Tensor, " m"]],
    test: Float[Tensor, "q w"],
    classes: int,
    *,
    progress: Callable[[], object] = lambda: None,
) -> Probe:
    """Logistic regression by L-BFGS: C by a sweep on `val`, then fitted on `train` and `val` (appendix A.3).

    Args:
        train: features, as they are, with labels.
        val: the same, of images that C is chosen on.
        test: features to guess the classes of.
        classes: how many there are; one without training images is never guessed.
        progress: called after each fit.

    Raises:
        UserError: fewer than two classes have training images, no validation images, or features that are not finite.
    """
    strength, tried = _choose(train, val, progress)
    both = torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]])
    guesses, converged = _fit(*both, test, classes, strength)
    progress()
    return Probe(guesses, strength, tried, converged)


def few_shot_probe(
    train: tuple[Float[Tensor, "n w"], Int[Tensor, " n"]],
    val: tuple[Float[Tensor, "m w"], Int[Tensor, " m"]],
    test: Float[Tensor, "q w"],
    classes: int,
    *,
    shots: int,
    generator: torch.Generator,
    progress: Callable[[], object] = lambda: None,
) -> Probe:
    """A linear probe of `shots` training images of each class, drawn by `generator` (sec. 3.1.5).

    C is chosen on `val` like that of `linear_probe`; the fit sees only the shots.

    Raises:
        UserError: a class has fewer training images, and as `linear_probe`.
    """
    rows = sample_shots(train[1], classes, shots, generator)
    chosen = train[0][rows], train[1][rows]
    strength, tried = _choose(chosen, val, progress)
    guesses, converged = _fit(*chosen, test, classes, strength)
    progress()
    return Probe(guesses, strength, tried, converged)


def sample_shots(labels: Int[Tensor, " n"], classes: int, shots: int, generator: torch.Generator) -> Int[Tensor, " m"]:
    """Rows of `shots` images of each class, drawn without replacement, in their order.

    Raises:
        UserError: shots below 1, or a class with fewer images.
    """
    require_at_least("shots", shots, 1)
    rows = []
    for number in range(classes):
        own = torch.nonzero(labels == number)[:, 0]
        if len(own) < shots:
            raise UserError(f"shots is {shots}, but class {number} has {len(own)} training images: use fewer shots.")
        rows.append(own[torch.randperm(len(own), generator=generator)[:shots]])
    return torch.cat(rows).sort().values


def split_by_class(
    labels: Int[Tensor, " n"], share: float, generator: torch.Generator
) -> tuple[Int[Tensor, " k"], Int[Tensor, " h"]]:
    """Rows that are kept and rows that are held out: about `share` of each class, at least one on either side.

    A class with one image is kept.
    """
    require_share("share", share)
    kept, held = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.long)]
    for number in torch.unique(labels):
        own = torch.nonzero(labels == number)[:, 0]
        own = own[torch.randperm(len(own), generator=generator)]
        out = min(max(1, round(share * len(own))), len(own) - 1)
        kept.append(own[out:])
        held.append(own[:out])
    return torch.cat(kept).sort().values, torch.cat(held).sort().values


def _choose(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], progress: Callable[[], object]
) -> tuple[float, dict[float, float]]:
    if not len(val[1]):
        raise UserError("there are 0 validation images to choose C on: hold some out of training.")
    classes = int(torch.cat([train[1], val[1]]).max()) + 1

    def accuracy(strength: float) -> float:
        guesses, _ = _fit(*train, val[0], classes, strength)
        progress()
        return (guesses.argmax(1) == val[1]).double().mean().item()

    return sweep(accuracy)


def _fit(
    features: Float[Tensor, "n w"],
    labels: Int[Tensor, " n"],
    others: Float[Tensor, "q w"],
    classes: int,
    strength: float,
) -> tuple[Float[Tensor, "q c"], bool]:
    """Probabilities of the classes of `others`, and whether L-BFGS converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    known, seen = (part.detach().double().cpu().numpy() for part in (features, others))
    if not np.isfinite(known).all():
        raise UserError("features hold NaN or infinity: check the encoder's weights.")
    if len(torch.unique(labels)) < 2:
        raise UserError(f"{len(torch.unique(labels))} classes have training images: a probe needs at least 2.")
    model = LogisticRegression(C=strength, max_iter=MOST_ITERATIONS, solver="lbfgs")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(known, labels.cpu().numpy())
    guesses = torch.zeros(len(seen), classes, dtype=torch.float64)
    if len(seen):
        guesses[:, torch.from_numpy(model.classes_)] = torch.from_numpy(model.predict_proba(seen))
    return guesses, not any(issubclass(one.category, ConvergenceWarning) for one in caught)
