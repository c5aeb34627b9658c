"""Scores to look at: an HTML page of the best and worst captions, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from PIL import Image

from clipcap.data.dataset import CaptionedImage
from clipcap.data.images import ImageError, read_image
from clipcap.evaluation.scores import Evaluation, domain_rows, rows_of
from common.checks import printable
from common.images import MAX_PIXELS
from common.report import Page, thumbnail


def evaluation_page(
    found: Evaluation,
    items: Iterable[CaptionedImage],
    *,
    title: str = "Captions",
    shown: int = 300,
    page: Page | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Page:
    """The scores, and the images with captions, references and scores, to be sorted best or worst first.

    Args:
        found: scores.
        items: the images of `found`, perhaps with others.
        title: of the page.
        shown: images: the best half and the worst half by CIDEr; 0 shows all.
        page: a page to add the sections to; None begins one.
        max_pixels: of an image.
    """
    by_id = {item.image_id: item for item in items if item.image_id in found.captions}
    if page is None:
        page = Page(title, f"{found.coverage}, tokenizer {found.tokenizer}")
    page.section("Scores")
    for warning in found.warnings:
        page.note(warning)
    page.table(rows_of(found), caption=f"{found.coverage}; intervals by bootstrap over the images")
    if found.domains:
        page.table(domain_rows(found), caption="By domain; CIDEr's document frequencies are those of all images")
    page.table([found.diversity], caption="Diversity")
    if found.details:
        page.table(list(found.details.items()), columns=["scored with", ""])
    if found.not_measured:
        page.table(list(found.not_measured.items()), columns=["not measured", "reason"])
    ids = list(found.captions)
    note = ""
    names = next(iter(found.per_image.values()), {})
    chief = "CIDEr" if "CIDEr" in names else next(iter(names), None)
    if chief is None:
        ids = ids[: shown or None]
    elif shown and len(ids) > shown:
        ranked = sorted(ids, key=lambda key: found.per_image[key][chief])
        chosen = {*ranked[: shown // 2], *ranked[len(ranked) - (shown - shown // 2) :]}
        ids = [key for key in ids if key in chosen]
        note = f"The {shown} images with the lowest and the highest {chief} of {len(found.captions)}."
    page.section("Images, best or worst first", note)
    front = ["CIDEr"] if "CIDEr" in names else []
    page.gallery(
        [
            (
                _thumbnail(by_id[key], max_pixels),
                found.captions[key] or "(empty)",
                [*filter(None, [by_id[key].domain]), *by_id[key].captions],
            )
            for key in ids
        ],
        scores=[{name: found.per_image[key][name] for name in [*front, *_others(found.per_image[key])]} for key in ids],
        width=240,
    )
    return page


def _thumbnail(item: CaptionedImage, max_pixels: int) -> str:
    """Of an image that cannot be read, a grey one."""
    try:
        return thumbnail(read_image(item.path, max_pixels=max_pixels, side=320))
    except ImageError:
        return thumbnail(Image.new("RGB", (320, 240), "#d8dade"))


def _others(scores: Mapping[str, float]) -> list[str]:
    """The metrics of a card beside CIDEr: BLEU-1 to BLEU-3 say what BLEU-4 says."""
    return [name for name in scores if name not in ("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3")]


def print_scores(found: Evaluation) -> None:
    """The scores as tables on the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    tables: list[tuple[str, list[dict[str, Any]]]] = [
        (f"{found.coverage}, tokenizer {found.tokenizer}", rows_of(found)),
        ("by domain", domain_rows(found)),
        ("diversity", [{"": name, "value": round(value, 3)} for name, value in found.diversity.items()]),
    ]
    for title, rows in tables:
        if not rows:
            continue
        table = Table(title=Text(title), title_justify="left")
        for number, column in enumerate(rows[0]):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*(Text(printable(value)) for value in row.values()))
        console.print(table)
    for warning in found.warnings:
        console.print(printable(warning), markup=False, highlight=False, soft_wrap=True)
    for name, reason in found.not_measured.items():
        console.print(printable(f"not measured: {name}: {reason}"), markup=False, highlight=False, soft_wrap=True)
