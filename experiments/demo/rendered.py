"""The demo's rendered scenes: captions in two languages that can be checked exactly, scores, and prefixes as words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clipcap.captioner import Captioner
from clipcap.data.dataset import read_dataset
from clipcap.data.images import read_image
from clipcap.evaluation.interpret import nearest_tokens
from clipcap.evaluation.metrics import score_captions
from clipcap.evaluation.page import evaluation_page
from clipcap.evaluation.scores import evaluate_captions
from common.pretrained import CAPTION_LANGUAGES
from common.report import Page, plot_bars
from experiments.scenes.captions import looks, names_all, parse
from experiments.scenes.karpathy import SAMPLES, captioned_in, packaged_records
from experiments.scenes.wording import DUTCH

SHOWN = 12
"""Captioned images on the page."""


def same_objects(caption: str, reference: str) -> bool:
    """Whether two captions name the same colours and shapes."""
    return looks(parse(caption)) == looks(parse(reference))


def spread(counts: dict[str, int], shown: int) -> list[str]:
    """Some of the images, evenly spread when they are sorted by the number of objects."""
    order = sorted(counts, key=lambda key: counts[key])
    return order[:: max(1, -(-len(order) // shown))]


def rendered_sections(
    page: Page, step: Callable[[], None], device: torch.device, *, images: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Caption the packaged scenes in English and Dutch, in several sections; returns captions and scores.

    Args:
        page: to which they are added.
        step: called before each of six steps.
        device: to compute on.
        images: scenes to caption, when not 0, instead of all.
        seed: of sampling.
    """
    step()
    captioner = Captioner.from_pretrained("tiny", device=device)
    items = [item for item in read_dataset(SAMPLES / "dataset.json") if item.split == "test"][: images or None]
    paths = {item.image_id: item.path for item in items}
    references = {item.image_id: list(item.captions) for item in items}

    step()
    beams = dict(zip(paths, captioner.stream(list(paths.values()), strategy="beam", num_captions=3), strict=True))
    captions = {key: found.captions[0] for key, found in beams.items()}
    right = {key: same_objects(text, references[key][0]) for key, text in captions.items()}
    counts = {key: sum(looks(parse(texts[0])).values()) for key, texts in references.items()}

    step()
    others = {
        "beam search, 5 beams": captions,
        "greedy": dict(zip(paths, captioner.caption(list(paths.values()), strategy="greedy"), strict=True)),
        "sampling, top-p 0.9": dict(
            zip(
                paths,
                captioner.caption(list(paths.values()), strategy="sample", top_p=0.9, seed=seed),
                strict=True,
            )
        ),
    }
    table = []
    for name, found in others.items():
        scores = score_captions(found, references, tokenizer="words")
        share = sum(same_objects(text, references[key][0]) for key, text in found.items()) / len(found)
        table.append({"decoding": name, "all objects right": share, "BLEU-4": scores.bleu[3], "CIDEr": scores.cider})

    step()
    shown = spread(counts, SHOWN)
    embeddings = captioner.embed([read_image(paths[key]) for key in shown[:4]])
    with torch.no_grad():
        prefixes = captioner.model.prefix(embeddings)
    words = [[tokens[0][0].strip() for tokens in nearest_tokens(captioner.model, prefix)] for prefix in prefixes]

    step()
    found_scores = evaluate_captions(captions, items, clip=captioner.clip, resamples=300)

    page.section(
        "Rendered scenes, where captions can be checked exactly",
        "What is on these scenes is known exactly, so every caption can be checked: it is right if it names every "
        "colour and shape, and no other. The scenes were rendered for this project and held out from all training. "
        f"Here are {len(shown)} of {len(items)}, with one to three objects; all captions are in `results.json`. "
        "BLEU-4, CIDEr and the scores further below compare captions with five references each, or with the image "
        "(docs/clipcap_evaluation.md): higher is better.",
    )
    page.table(table, caption=f"{len(items)} held-out scenes")
    page.command("python -m experiments.demo")
    show_checked(page, shown, paths, captions, right, {key: texts[0] for key, texts in references.items()})
    page.figure(
        plot_bars(
            {
                f"{n} object{'s' * (n > 1)}": sum(right[k] for k in right if counts[k] == n)
                / max(1, sum(c == n for c in counts.values()))
                for n in sorted(set(counts.values()))
            },
            x="captions that get every colour and shape right",
        ),
        f"Beam search on all {len(items)} scenes",
    )
    page.section(
        "What a prefix says",
        "The vocabulary tokens nearest to each prefix embedding, by cosine similarity. "
        "They are readable less often than you might hope, even with a frozen GPT-2.",
    )
    page.gallery([(paths[key], captions[key], [" ".join(said)]) for key, said in zip(shown, words, strict=False)])
    evaluation_page(found_scores, items, page=page, shown=SHOWN)
    page.command("clipcap evaluate --data common/assets/samples/scenes/dataset.json --model tiny --resamples 300")
    step()
    dutch = dutch_section(page, paths, shown, device)

    return {
        "captions": captions,
        "decoding": table,
        "caption_scores": found_scores.scores,
        "dutch": dutch,
    }


def show_checked(
    page: Page,
    shown: list[str],
    paths: dict[str, Path],
    captions: dict[str, str],
    right: dict[str, bool],
    references: dict[str, str],
) -> None:
    """Cards of these scenes with their captions, whether each is right, and a reference."""
    verdicts = {key: "right: " if right[key] else "not all right: " for key in shown}
    page.gallery([(paths[key], captions[key], [f"{verdicts[key]}reference: {references[key]}"]) for key in shown])


def dutch_section(page: Page, paths: dict[str, Path], shown: list[str], device: torch.device) -> dict[str, Any]:
    """Captions in Dutch of the same scenes, with references from the scene graphs; returns them with their score."""
    captioner = Captioner.from_pretrained(CAPTION_LANGUAGES["nld"], device=device)
    captions = dict(zip(paths, captioner.caption(list(paths.values())), strict=True))
    records = captioned_in("nld", {name: record for name, record in packaged_records("test").items() if name in paths})
    right = {name: names_all(text, records[name].scene, wording=DUTCH) for name, text in captions.items()}
    share = sum(right.values()) / len(right)
    page.section(
        "Captions in Dutch",
        "The same scenes, captioned by a GPT-2 that was recycled from English to Dutch, behind the same CLIP. It was "
        "trained on Dutch captions written from the scene graphs, and gets every colour and shape right in "
        f"{share:.1%} of {len(right)} held-out scenes.",
    )
    show_checked(page, shown, paths, captions, right, {name: record.captions[0] for name, record in records.items()})
    page.command("clipcap caption common/assets/samples/scenes/test_000.jpg --language nld")
    print(f"Dutch: every colour and shape right in {share:.1%} of {len(right)} held-out scenes")
    page.command("python -m experiments.demo")
    return {"captions": captions, "all_right": share}
