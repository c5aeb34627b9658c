"""`clip-probe zero-shot` and `clip-probe retrieve`: what images and texts say about each other, without training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from common.checks import UserError, printable, require_at_least, require_place, require_text
from common.probes import recall_at, retrieval_ranks, score
from common.probes import zero_shot as classify
from common.probing.data import PromptConfig, find_images, read_captions, read_classes, read_labels, read_templates
from common.probing.embed import EncoderConfig, embed_classes, embed_images, embed_texts, load
from common.probing.page import add_guesses, add_scores, picture, prediction_rows, print_scores, write_results
from common.report import Page

RECALLS = (1, 5, 10)


@dataclass(frozen=True)
class ZeroShotConfig:
    """Classify images by the names of classes, without training (Radford et al. 2021, sec. 3.1).

    The class whose prompts are most similar to the image is the guess. IMAGES holds a subfolder for each class (of
    train/, val/ and test/, test/ is scored); or, with --labels, images without known classes.
    """

    images: tyro.conf.Positional[Path]
    """Folder of images."""
    out: Path
    """Directory for results.json and index.html."""
    labels: str = ""
    """Classes to choose among if IMAGES has no class folders: "dog,cat,horse", or a text file with one on each line."""
    pictures: int = 48
    """Most pictures on the page."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


def zero_shot(config: ZeroShotConfig) -> int:
    """`clip-probe zero-shot`: classify, print scores and write the page."""
    require_place(config.out, directory=True)
    require_at_least("pictures", config.pictures, 0)
    templates = read_templates(config.prompts.templates)
    given: tuple[int, ...] = ()
    if config.labels:
        classes, paths = read_labels(config.labels), tuple(find_images(config.images))
    else:
        splits = read_classes(config.images)
        if not {"test", "all"} & set(splits):
            raise UserError(f"folder {str(config.images)!r} has {', '.join(splits)} but no test/: add it.")
        data = splits.get("test") or splits["all"]
        classes, paths, given = data.classes, data.paths, data.labels
    clip = load(config.encoder, text_for="zero-shot classification")
    weights = embed_classes(clip, classes, templates)
    embeddings, kept, skipped = embed_images(clip, paths, config.encoder)
    guesses = classify(embeddings, weights)
    paths, labels = tuple(paths[i] for i in kept), [given[i] for i in kept] if given else []
    more = f" and {len(templates) - 1} more" if len(templates) > 1 else ""
    about = f"{printable(clip.name)}, {len(classes)} classes, template `{printable(templates[0])}`{more}"
    page = Page("Zero-shot classification", about)
    results: dict[str, Any] = {"classes": classes, "templates": templates, "skipped": skipped}
    if labels:
        scores = score(guesses, torch.tensor(labels))
        print_scores("zero-shot", scores)
        add_scores(page, "zero-shot", scores, classes)
        results["scores"] = scores
    else:
        counts = torch.bincount(guesses.argmax(1), minlength=len(classes)).tolist()
        for name, count in zip(classes, counts, strict=True):
            print(f"{printable(name)}: {count} of {len(paths)} images")
        page.section("Guesses").table(
            [{"class": printable(name), "images": count} for name, count in zip(classes, counts, strict=True)]
        )
    results["predictions"] = prediction_rows(paths, guesses, classes, labels)
    add_guesses(
        page, paths, guesses, classes, labels, shown=config.pictures, max_pixels=config.encoder.limit.max_pixels
    )
    write_results(config.out, page, config, results)
    return 0


@dataclass(frozen=True)
class RetrieveConfig:
    """Find the images that are most similar to texts; with captions, recall in both directions.

    Give --queries, --captions, or both.
    """

    images: tyro.conf.Positional[Path]
    """Folder of images."""
    out: Path
    """Directory for results.json and index.html."""
    queries: tuple[str, ...] = ()
    """Texts to find images for."""
    captions: Path | None = None
    """CSV file with columns file_name (below IMAGES) and caption, in several rows for several captions: recall at 1, 5
    and 10 of images by their captions and of captions by their images."""
    top: int = 8
    """Images found for each query."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)


def retrieve(config: RetrieveConfig) -> int:
    """`clip-probe retrieve`: rank images by texts, and write the page."""
    require_place(config.out, directory=True)
    require_at_least("top", config.top, 1)
    if not config.queries and config.captions is None:
        raise UserError("nothing to find: give --queries 'a red cube', or --captions with a CSV file.")
    for query in config.queries:
        require_text("queries", query)
        if not query.strip() or "\0" in query:
            raise UserError(f"queries has {query!r}: give texts.")
    captioned = None if config.captions is None else read_captions(config.captions, config.images)
    paths = find_images(config.images) if config.queries else []
    known = set(paths)
    paths += [path for path in (captioned[0] if captioned else []) if path not in known]
    clip = load(config.encoder, text_for="retrieval by text")
    asked = embed_texts(clip, config.queries) if config.queries else None
    embeddings, kept, skipped = embed_images(clip, paths, config.encoder)
    embeddings, paths = F.normalize(embeddings, dim=-1), [paths[i] for i in kept]
    page = Page("Retrieval", f"{printable(clip.name)}, {len(paths)} images")
    results: dict[str, Any] = {"skipped": skipped}
    if captioned is not None:
        rows = {str(path): row for row, path in enumerate(paths)}
        results["recall"] = found = _recall(captioned, rows, embeddings, embed_texts(clip, captioned[1]))
        for direction in ("text to image", "image to text"):
            shares = ", ".join(f"recall@{k} {found[direction][f'recall@{k}']:.3f}" for k in RECALLS)
            print(f"{direction}: {shares} ({found['images']} images, {found['captions']} captions)")
        page.section("Recall", "The share of queries whose own image or caption is among the first k.").table(
            [{"": name, **found[name]} for name in ("text to image", "image to text", "chance, text to image")],
            caption=f"{found['images']} images, {found['captions']} captions.",
        )
    if asked is not None:
        results["queries"] = _ranked(config, paths, asked @ embeddings.T, page)
    write_results(config.out, page, config, results)
    return 0


def _recall(
    captioned: tuple[list[Path], list[str], list[int]],
    rows: dict[str, int],
    embeddings: Float[Tensor, "n e"],
    texts: Float[Tensor, "t e"],
) -> dict[str, Any]:
    """Recall in both directions over the captioned images that could be read."""
    images, _, owners = captioned
    used = [number for number, image in enumerate(images) if str(image) in rows]
    if not used:
        raise UserError("none of the captioned images can be read: check the messages about them.")
    place = {number: row for row, number in enumerate(used)}
    chosen = [row for row, owner in enumerate(owners) if owner in place]
    of_images, of_texts = retrieval_ranks(
        embeddings[[rows[str(images[number])] for number in used]],
        texts[chosen],
        torch.tensor([place[owners[row]] for row in chosen]),
    )
    return {
        "images": len(used),
        "captions": len(chosen),
        "text to image": {f"recall@{k}": recall_at(of_texts, k) for k in RECALLS},
        "image to text": {f"recall@{k}": recall_at(of_images, k) for k in RECALLS},
        "chance, text to image": {f"recall@{k}": min(1.0, k / len(used)) for k in RECALLS},
    }


def _ranked(
    config: RetrieveConfig, paths: list[Path], similarity: Float[Tensor, "q n"], page: Page
) -> list[dict[str, Any]]:
    """The best images of each query, for results.json; they are shown on the page and the first is printed."""
    found = []
    for query, row in zip(config.queries, similarity, strict=True):
        best = row.topk(min(config.top, len(paths)))
        pairs = [(paths[i], value) for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        print(f"{printable(query)}: {printable(pairs[0][0])} ({pairs[0][1]:.3f})")
        cards: list[tuple[Any, str, list[str]]] = [
            (picture(path, config.encoder.limit.max_pixels), f"{rank}", [f"{value:.3f}", printable(path.name)])
            for rank, (path, value) in enumerate(pairs[:200], start=1)
        ]
        page.section(printable(query)).gallery(cards, width=150)
        found.append({"query": query, "images": [{"image": str(path), "similarity": value} for path, value in pairs]})
    return found
