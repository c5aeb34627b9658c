"""The demo's photographs: captioned by the packaged captioner beside what people said, and classified by names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clipcap.calibrate import shares_said
from clipcap.captioner import Captioner
from clipcap.data.dataset import CaptionedImage, read_dataset
from clipcap.data.images import read_image
from clipcap.references import LABELS
from common.pretrained import ASSETS
from common.probes import TEMPLATES, zero_shot
from common.probing.data import read_labels
from common.probing.embed import embed_classes
from common.report import Page, thumbnail

PHOTOGRAPHS = ASSETS / "samples" / "photographs"
NOUNS = LABELS / "nouns.txt"
BEST = 3
"""Names on a card."""


def photographs_sections(page: Page, device: torch.device, images: int = 0) -> dict[str, Any]:
    """Caption and classify photographs that neither model has seen, in two sections; returns captions and counts.

    Args:
        page: to which they are added.
        device: to compute on.
        images: the first so many, when not 0.
    """
    items = read_dataset(PHOTOGRAPHS / "dataset.json")[: images or None]
    captioner = Captioner.from_pretrained("photo", device=device)
    found = list(captioner.stream([item.path for item in items], confidence=True))
    agreed = [several[0] for several in shares_said([one.captions for one in found], items)]
    best_first = sorted(range(len(items)), key=lambda row: -agreed[row])
    credit = credits_of(PHOTOGRAPHS / "dataset.json")
    page.section(
        "Captions of photographs",
        f"{len(items)} photographs of COCO, which neither captioner nor CLIP was trained on, with what a person said. "
        "The captioner learned on 7,689 photographs of people, dogs, sports and streets, and takes food, rooms and "
        "bears for these, so many of its captions are wrong (docs/photographs.md has its scores). Behind each stands "
        "how sure it is. First come the captions of which most is also in five people's captions, where rare words "
        "count more; the last ones are failures.",
    )
    page.gallery(
        [
            (
                items[row].path,
                f"{found[row].captions[0]} ({found[row].confidences[0]:.0%} sure)",
                [
                    f"a person: {items[row].captions[0]}",
                    f"{agreed[row]:.0%} of it is in people's captions",
                    credit[items[row].image_id],
                ],
            )
            for row in best_first
        ]
    )
    page.command("clipcap caption common/assets/samples/photographs")
    named = _classify(page, captioner, items)
    return {
        "captions": {item.image_id: one.captions[0] for item, one in zip(items, found, strict=True)},
        "shares_said": {item.image_id: share for item, share in zip(items, agreed, strict=True)},
        "named": named,
    }


def _classify(page: Page, captioner: Captioner, items: Sequence[CaptionedImage]) -> int:
    """Zero-shot classification among the packaged nouns; returns how many first nouns people used too."""
    nouns = read_labels(str(NOUNS))
    pictures = [read_image(item.path) for item in items]
    images = captioner.features(captioner.clip.preprocess(pictures)).embedding
    similarity = zero_shot(images.cpu(), embed_classes(captioner.clip, nouns, TEMPLATES["bare"]))
    ranked = [[nouns[place] for place in row] for row in similarity.topk(BEST).indices.tolist()]
    agreed = [is_said(names[0], item.captions) for names, item in zip(ranked, items, strict=True)]
    page.section(
        "The same photographs, classified without training for it",
        f"The packaged CLIP compares each photograph with the names of {len(nouns)} things (zero-shot classification, "
        f"Radford et al. 2021). For {sum(agreed)} of {len(items)} photographs, people used the name that it puts first "
        "in one of their five captions; choosing a name at random would do so for "
        f"{expected_by_chance(nouns, items):.1f}.",
    )
    page.gallery(
        [
            (
                thumbnail(picture, 240),
                names[0],
                [f"then {', '.join(names[1:])}", "in people's captions" if good else "not in people's captions"],
            )
            for picture, names, good in zip(pictures, ranked, agreed, strict=True)
        ],
        width=160,
    )
    page.command(
        "clip-probe zero-shot common/assets/samples/photographs --labels common/assets/labels/nouns.txt "
        "--templates bare --out out/zero-shot"
    )
    return sum(agreed)


def is_said(noun: str, captions: Sequence[str]) -> bool:
    """Whether one of the captions has this noun, or its regular plural."""
    return any(re.search(rf"\b{re.escape(noun)}(s|es)?\b", caption, re.IGNORECASE) for caption in captions)


def expected_by_chance(nouns: Sequence[str], items: Sequence[CaptionedImage]) -> float:
    """Photographs for which a noun drawn at random is in a caption, on average."""
    return sum(is_said(noun, item.captions) for item in items for noun in nouns) / len(nouns)


def credits_of(path: Path) -> dict[str, str]:
    """Where each photograph is from and its licence, in a line, by its file's name."""
    images: list[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["images"]
    return {image["filename"]: _credit(image) for image in images}


def _credit(image: Mapping[str, Any]) -> str:
    number = Path(image["source"]).name.partition("_")[0]
    kind, version = Path(image["licence_url"]).parts[-2:]
    return f"photograph {number} on Flickr, CC {kind.upper()} {version}"
