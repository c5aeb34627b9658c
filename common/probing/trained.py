"""`clip-probe linear` and `clip-probe few-shot`: logistic regression on frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from common.checks import UserError, printable, require_at_least, require_between, require_place
from common.probes import FITS, Scores, few_shot_probe, linear_probe, score
from common.probes import zero_shot as classify
from common.probing.data import Labelled, PromptConfig, Shares, read_templates, train_val_test
from common.probing.embed import EncoderConfig, Features, embed_classes, embed_images, load
from common.probing.page import add_guesses, add_scores, prediction_rows, print_scores, score_row, write_results
from common.report import Page, plot_lines
from common.runtime import require_seed

if TYPE_CHECKING:
    from common.clip import FrozenCLIP

MOST_REPEATS = 1000


@dataclass(frozen=True)
class LinearConfig:
    """Train a linear classifier on an encoder's frozen features, and score it (Radford et al. 2021, appendix A.3).

    Logistic regression by L-BFGS, at most 1000 iterations. Its strength C is chosen on validation images; then it is
    fitted on training and validation images together. IMAGES holds a subfolder for each class, or such folders inside
    train/, test/ and, if you have it, val/.
    """

    images: tyro.conf.Positional[Path]
    """Folder of class folders, or of splits."""
    out: Path
    """Directory for results.json and index.html."""
    features: Features = "embedding"
    """embedding (of the image; in CLIP after the projection), or class_token (before it; the mean of the patches in
    encoders without one)."""
    pictures: int = 48
    """Most pictures on the page."""
    shares: Shares = field(default_factory=Shares)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


@dataclass(frozen=True)
class FewShotConfig:
    """Train linear classifiers on 1, 2, 4, ... images of each class (Radford et al. 2021, sec. 3.1.5).

    Each fit sees only its shots; C is chosen on the validation images, as for `clip-probe linear`. If the encoder has
    a text tower, zero-shot classification stands beside them.
    """

    images: tyro.conf.Positional[Path]
    """Folder of class folders, or of splits."""
    out: Path
    """Directory for results.json and index.html."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Training images of each class."""
    repeats: int = 3
    """Draws of the shots, with seeds from --seed on, that are averaged."""
    features: Features = "embedding"
    """What the classifier sees, as for `clip-probe linear`."""
    shares: Shares = field(default_factory=Shares)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


class _Split(NamedTuple):
    data: Labelled
    features: Float[Tensor, "n w"]

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.features, self.data.targets


def _embed(
    clip: FrozenCLIP, splits: Sequence[Labelled], config: EncoderConfig, features: Features
) -> tuple[list[_Split], dict[str, str]]:
    """The features of several splits, without images that cannot be read."""
    found, kept, skipped = embed_images(clip, [path for split in splits for path in split.paths], config, features)
    parts, begin = [], 0
    for split in splits:
        end = begin + len(split.paths)
        own = [row for row, place in enumerate(kept) if begin <= place < end]
        parts.append(_Split(split.take([kept[row] - begin for row in own]), found[own]))
        begin = end
    return parts, skipped


def linear(config: LinearConfig) -> int:
    """`clip-probe linear`: train, print scores and write the page."""
    from common.progress import Progress

    require_place(config.out, directory=True)
    require_at_least("pictures", config.pictures, 0)
    require_seed(config.encoder.runtime.seed)
    splits = train_val_test(config.images, config.shares, config.encoder.runtime.seed)
    clip = load(config.encoder)
    (train, val, test), skipped = _embed(clip, splits, config.encoder, config.features)
    classes = test.data.classes
    with Progress(total=FITS, desc="fitting", unit=" fits") as bar:
        probe = linear_probe(train.pair, val.pair, test.features, len(classes), progress=bar.update)
    scores = score(probe.guesses, test.data.targets, known=train.data.targets)
    print_scores("linear probe", scores)
    page = Page("Linear probe", f"{printable(clip.name)}, {config.features}, {len(classes)} classes")
    add_scores(page, "linear probe", scores, classes)
    page.figure(
        plot_lines({"validation": (list(probe.tried), list(probe.tried.values()))}, x="C", y="accuracy", log_x=True),
        f"The sweep chose C = {probe.strength:.3g}; the last fit "
        + ("converged." if probe.converged else "stopped at the limit of iterations."),
    )
    add_guesses(
        page,
        test.data.paths,
        probe.guesses,
        classes,
        test.data.labels,
        shown=config.pictures,
        max_pixels=config.encoder.limit.max_pixels,
    )
    results = {
        "classes": classes,
        "images": {"train": len(train.data.paths), "val": len(val.data.paths), "test": len(test.data.paths)},
        "scores": scores,
        "strength": probe.strength,
        "tried": probe.tried,
        "converged": probe.converged,
        "skipped": skipped,
        "predictions": prediction_rows(test.data.paths, probe.guesses, classes, test.data.labels),
    }
    write_results(config.out, page, config, results)
    return 0


def few_shot(config: FewShotConfig) -> int:
    """`clip-probe few-shot`: train on ever more shots, print scores and write the page."""
    from common.progress import Progress

    require_place(config.out, directory=True)
    seed = config.encoder.runtime.seed
    require_seed(seed)
    require_between("repeats", config.repeats, 1, MOST_REPEATS)
    require_seed(seed + config.repeats - 1)
    if not config.shots:
        raise UserError("shots is empty: give at least one number.")
    for shots in config.shots:
        require_at_least("shots", shots, 1)
    templates = read_templates(config.prompts.templates)
    splits = train_val_test(config.images, config.shares, seed)
    _require_shots(splits[0], max(config.shots))
    clip = load(config.encoder)
    (train, val, test), skipped = _embed(clip, splits, config.encoder, config.features)
    _require_shots(train.data, max(config.shots))
    classes, labels = test.data.classes, test.data.targets
    found: dict[int, list[Scores]] = {}
    with Progress(total=FITS * len(set(config.shots)) * config.repeats, desc="fitting", unit=" fits") as bar:
        for shots in sorted(set(config.shots)):
            for repeat in range(config.repeats):
                probe = few_shot_probe(
                    train.pair,
                    val.pair,
                    test.features,
                    len(classes),
                    shots=shots,
                    generator=torch.Generator().manual_seed(seed + repeat),
                    progress=bar.update,
                )
                found.setdefault(shots, []).append(score(probe.guesses, labels, known=train.data.targets))
    page = Page("Few-shot probes", f"{printable(clip.name)}, {config.features}, {len(classes)} classes")
    rows = [_mean_row(shots, several) for shots, several in found.items()]
    for row in rows:
        print(f"{row['']}: accuracy {row['accuracy']:.3f} ± {row['deviation']:.3f}")
    results: dict[str, Any] = {"classes": classes, "few_shot": found, "skipped": skipped}
    curves = {"linear probe": (list(found), [row["accuracy"] for row in rows])}
    if clip.has_text:
        seen = test.features if config.features == "embedding" else None
        if seen is None:
            seen = _embed(clip, [test.data], config.encoder, "embedding")[0][0].features
        results["zero_shot"] = scores = score(classify(seen, embed_classes(clip, classes, templates)), labels)
        print_scores("zero-shot", scores)
        rows.append(score_row("zero-shot", scores))
        curves["zero-shot"] = (list(found), [scores.accuracy] * len(found))
    frequent = next(iter(found.values()))[0].most_frequent
    rows.append({"": "most frequent class", "accuracy": frequent})
    columns = ["", "accuracy", "deviation", "95% interval", "mean per class"]
    page.section("Scores", f"Means over {config.repeats} draws of the shots, on {len(labels)} test images.")
    page.table(rows, columns)
    page.figure(plot_lines(curves, x="training images of each class", y="accuracy", log_x=True))
    largest = max(found)
    add_scores(page, f"{largest} shots, first draw", found[largest][0], classes)
    write_results(config.out, page, config, results)
    return 0


def _require_shots(train: Labelled, shots: int) -> None:
    """Raise UserError when a class has fewer training images."""
    counts = torch.bincount(train.targets, minlength=len(train.classes)).tolist()
    least = min(range(len(counts)), key=counts.__getitem__)
    if counts[least] < shots:
        raise UserError(
            f"shots is {shots}, but class {train.classes[least]!r} has {counts[least]} training images: use fewer "
            f"--shots."
        )


def _mean_row(shots: int, several: Sequence[Scores]) -> dict[str, Any]:
    """A row of a table: means over draws, and the standard deviation of accuracy between them."""
    accuracies = torch.tensor([one.accuracy for one in several], dtype=torch.float64)
    return {
        "": f"{shots} shot{'s' * (shots > 1)}",
        "accuracy": accuracies.mean().item(),
        "deviation": accuracies.std(correction=0).item(),
        "mean per class": sum(one.mean_per_class for one in several) / len(several),
    }
