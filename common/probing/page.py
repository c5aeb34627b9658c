"""Results of probes as a page: scores, confusion matrix and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from common.checks import UserError, printable
from common.files import write_json
from common.images import decode_image
from common.probes import Scores
from common.report import Page, thumbnail
from common.runtime import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED_CLASSES, COUNTED_CLASSES = 60, 15
"""Most classes whose names, and whose counts, a confusion matrix shows."""
SIDE = 320


def plot_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """A confusion matrix: a row for each class, coloured by the share of its images, a column for each guess."""
    from matplotlib.figure import Figure

    counts = np.asarray(confusion, dtype=float)  # (c, c)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(12.0, 2.5 + 0.35 * len(classes))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("guess")
    axes.set_ylabel("class")
    if len(classes) <= NAMED_CLASSES:
        names = [printable(name).replace("$", r"\$")[:30] for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    if len(classes) <= COUNTED_CLASSES:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the class")
    return figure


def score_row(name: str, scores: Scores) -> dict[str, Any]:
    """A row of a table."""
    row = {
        "": name,
        "images": scores.images,
        "accuracy": scores.accuracy,
        "95% interval": "{:.3f} to {:.3f}".format(*scores.interval),
        "mean per class": scores.mean_per_class,
    }
    return row if scores.top_5 is None else row | {"top-5": scores.top_5}


def add_scores(page: Page, name: str, scores: Scores, classes: Sequence[str]) -> Page:
    """A section of scores beside the most frequent class, the confusion matrix and the scores of each class."""
    page.section(name[0].upper() + name[1:])
    baseline = {"": "most frequent class", "images": scores.images, "accuracy": scores.most_frequent}
    page.table([score_row(name, scores), baseline])
    page.figure(plot_confusion(scores.confusion, classes), "Images by class (rows) and guess (columns).")
    return page.table(class_rows(scores, classes), caption="Scores of each class.")


def class_rows(scores: Scores, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Each class with its images, the share that is right, and what it is most often taken for."""
    rows = []
    for number, name in enumerate(classes):
        counts = scores.confusion[number]
        others = [(count, classes[other]) for other, count in enumerate(counts) if other != number and count]
        share = counts[number] / sum(counts) if sum(counts) else None
        taken = max(others, key=lambda pair: pair[0]) if others else None
        rows.append(
            {
                "class": printable(name),
                "images": sum(counts),
                "accuracy": share,
                "most often taken for": f"{printable(taken[1])} ({taken[0]})" if taken else "",
            }
        )
    return rows


def picture(path: Path, max_pixels: int) -> str:
    """A small copy of an image file for the page."""
    return thumbnail(decode_image(path, f"image {str(path)!r}", max_pixels=max_pixels, side=SIDE), SIDE)


def add_guesses(
    page: Page,
    paths: Sequence[Path],
    guesses: Float[Tensor, "n c"],
    classes: Sequence[str],
    labels: Sequence[int] = (),
    *,
    shown: int,
    max_pixels: int,
) -> Page:
    """A gallery of images with their guesses; of labelled ones, half of it wrong where there are as many.

    Args:
        page: to add it to.
        paths: images.
        guesses: a number for each image and class.
        classes: their names.
        labels: classes of the images, if known.
        shown: most images.
        max_pixels: of an image.
    """
    guessed = guesses.argmax(1).tolist()
    rows = list(range(len(paths)))
    if labels:
        wrong = _spread([row for row in rows if guessed[row] != labels[row]], shown // 2)
        right = _spread([row for row in rows if guessed[row] == labels[row]], shown - len(wrong))
        page.section("Images", f"{len(wrong)} wrong and {len(right)} right ones, spread evenly over the data.")
        rows = wrong + right
    else:
        rows = _spread(rows, shown)
        page.section("Images", f"{len(rows)} of {len(paths)}, with their three best classes.")
    cards: list[tuple[Any, str, list[str]]] = []
    for row in rows:
        top = guesses[row].topk(min(3, len(classes)))
        best = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        lines = [f"{printable(classes[i])} {value:.3f}" for value, i in best]
        title = printable(classes[guessed[row]])
        if labels and guessed[row] != labels[row]:
            title += f", not {printable(classes[labels[row]])}"
        try:
            cards.append((picture(paths[row], max_pixels), title, [*lines, printable(paths[row].name)]))
        except (UserError, OSError):  # it has gone since
            continue
    return page.gallery(cards)


def _spread(rows: list[int], most: int) -> list[int]:
    """At most `most` of them, evenly chosen."""
    if len(rows) <= most:
        return rows
    return [rows[i * len(rows) // most] for i in range(most)]


def prediction_rows(
    paths: Iterable[Path], guesses: Float[Tensor, "n c"], classes: Sequence[str], labels: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """For results.json: each image with its guess, the guess's score and its class, if known."""
    best = guesses.max(1)
    rows = []
    for row, path in enumerate(paths):
        found = {"image": str(path), "guess": classes[int(best.indices[row])], "score": float(best.values[row])}
        rows.append(found | ({"class": classes[labels[row]]} if labels else {}))
    return rows


def write_results(out: Path, page: Page, config: Any, results: dict[str, Any]) -> None:
    """Write results.json, with configuration, versions and hardware, and index.html; say where they are."""
    about = {"configuration": asdict(config), **provenance()}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", about | results)
    page.section("How this was made").details("Configuration, versions, hardware", about)
    page.write(out / "index.html")
    print(f"page: {out / 'index.html'}")


def print_scores(name: str, scores: Scores) -> None:
    """One line."""
    low, high = scores.interval
    top = "" if scores.top_5 is None else f", top-5 {scores.top_5:.3f}"
    print(
        f"{name}: accuracy {scores.accuracy:.3f} ({low:.3f} to {high:.3f}), mean per class {scores.mean_per_class:.3f}"
        f"{top}; most frequent class {scores.most_frequent:.3f}; {scores.images} images"
    )
