"""The demo: captions in two languages, a scene from eight photographs and English made into Dutch, on one page.

    python -m experiments.demo

Everything runs on the packaged tiny backbones, offline, in a few minutes on two cores.
"""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from clipcap.captioner import Captioner
from clipcap.data.dataset import read_dataset
from clipcap.data.images import read_image
from clipcap.evaluation.interpret import nearest_tokens
from clipcap.evaluation.metrics import score_captions
from clipcap.evaluation.page import evaluation_page
from clipcap.evaluation.scores import evaluate_captions
from clipcap.references import label_reference
from common.files import write_json, write_text
from common.gpt2 import load_gpt2
from common.language import score
from common.pretrained import ASSETS, CAPTION_LANGUAGES
from common.report import Page, contact_sheet, plot_bars
from common.runtime import RuntimeConfig, hardware, provenance, start
from experiments.demo.recycling import recycling_section
from experiments.scenes.captions import looks, names_all, parse
from experiments.scenes.karpathy import SAMPLES, captioned_in, packaged_records
from experiments.scenes.wording import DUTCH

PHOTOGRAPHS = ASSETS / "samples" / "photographs"
SHOWN = 12
"""Captioned images on the page."""
TEXT = "The user can select a file in the dialog and press the button to open the document."


@dataclass(frozen=True)
class Config:
    """Run the packaged applications and write one page."""

    out: Path = Path("out/demo")
    """Where the page and results.json go."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


class Steps:
    """Says what is being done, what comes next and how long each step took."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.console, self.begun, self.done = names, Console(), time.monotonic(), 0
        self.times: list[float] = []

    def next(self) -> None:
        """Announce the next step."""
        later = f", then {self.names[self.done + 1]}" if self.done + 1 < len(self.names) else ""
        elapsed = time.monotonic() - self.begun
        self.times.append(elapsed)
        self.console.print(
            f"[{self.done + 1}/{len(self.names)}] {elapsed:4.0f} s  {self.names[self.done]}{later}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        self.done += 1

    def table(self) -> list[dict[str, Any]]:
        """Seconds of each step that is over."""
        spans = zip(self.names, self.times, self.times[1:], strict=False)
        return [{"step": name, "seconds": round(end - begin, 1)} for name, begin, end in spans]


def card_of(name: str) -> dict[str, Any]:
    """The record that a packaged model was written with."""
    return json.loads((ASSETS / name / "training.json").read_text())


def same_objects(caption: str, reference: str) -> bool:
    """Whether two captions name the same colours and shapes."""
    return looks(parse(caption)) == looks(parse(reference))


def introduce(page: Page) -> None:
    """What the applications are, and on which weights they run here."""
    page.section("Three applications of CLIP and GPT-2")
    page.table(
        [
            {
                "application": "`clipcap`",
                "what it does": "Turns CLIP's embedding of an image into a short prefix that GPT-2 continues as a "
                "caption. Only a small mapping network has to be trained, or GPT-2 with it.",
                "weights here": "captioner-photo, captioner-tiny and captioner-tiny-nld, trained in advance",
            },
            {
                "application": "`dietnerf`",
                "what it does": "Rebuilds a scene from a few posed photographs as a radiance field. A semantic loss "
                "can require that new views look like the photographs to CLIP; it is off here, because it does not "
                "help on this scene (docs/dietnerf.md).",
                "weights here": "clip-tiny; the scene itself is trained now",
            },
            {
                "application": "`recycle-gpt2`",
                "what it does": "Turns an English GPT-2 into one for another language by learning new token embeddings "
                "for its layers. A linear map carries them over to a larger model.",
                "weights here": "gpt2-tiny and gpt2-tiny-medium; their Dutch embeddings are trained now",
            },
        ]
    )
    page.note(
        "The packaged backbones are small: those for photographs know what Flickr8k shows, the tiny ones only rendered "
        "scenes and software manuals. Real weights "
        "(`openai/clip-vit-base-patch32`, `gpt2`) go through the same code: see the README."
    )


def spread(counts: dict[str, int], shown: int) -> list[str]:
    """Some of the images, evenly spread when they are sorted by the number of objects."""
    order = sorted(counts, key=lambda key: counts[key])
    return order[:: max(1, -(-len(order) // shown))]


def photographs_section(page: Page, device: torch.device, images: int = 0) -> dict[str, str]:
    """Captions of photographs that the packaged captioner has never seen, beside people's; returns them."""
    items = read_dataset(PHOTOGRAPHS / "dataset.json")[: images or None]
    captioner = Captioner.from_pretrained("photo", device=device)
    found = dict(
        zip(
            [item.image_id for item in items],
            captioner.stream([item.path for item in items], confidence=True),
            strict=True,
        )
    )
    captions = {key: one.captions[0] for key, one in found.items()}
    nouns = label_reference(captioner.clip)
    assert nouns is not None
    features = captioner.features(captioner.clip.preprocess([read_image(item.path) for item in items]))
    seen = [", ".join(label for label, _ in nouns.nearest(row)[:3]) for row in features.embedding]
    page.section(
        "Captions of photographs",
        "COCO's photographs, with credits in common/assets/samples/photographs/README.md; none was trained on. The "
        "captioner learned on 7,689 photographs of people, dogs, sports and streets, and takes other things for these: "
        "docs/photographs.md has its scores. The percentage says how likely the caption is to be right. Below a "
        "person's caption stand the most similar of 100 nouns, by the same CLIP.",
    )
    page.gallery(
        [
            (
                item.path,
                f"{captions[item.image_id]} ({found[item.image_id].confidences[0]:.0%})",
                [f"a person: {item.captions[0]}", f"nouns: {labels}"],
            )
            for item, labels in zip(items, seen, strict=True)
        ]
    )
    page.command("clipcap caption common/assets/samples/photographs")
    return captions


def dutch_section(page: Page, paths: dict[str, Path], shown: list[str], device: torch.device) -> dict[str, Any]:
    """Captions in Dutch of the same scenes, with references from the scene graphs; returns them with their score."""
    captioner = Captioner.from_pretrained(CAPTION_LANGUAGES["nld"], device=device)
    captions = dict(zip(paths, captioner.caption(list(paths.values())), strict=True))
    records = captioned_in("nld", {name: record for name, record in packaged_records("test").items() if name in paths})
    right = {name: names_all(text, records[name].scene, wording=DUTCH) for name, text in captions.items()}
    share = sum(right.values()) / len(right)
    page.section(
        "Captions in Dutch",
        "A GPT-2 that was recycled from English to Dutch, behind the same CLIP. It was trained on Dutch captions "
        f"written from the scene graphs, and gets every colour and shape right in {share:.1%} of {len(right)} "
        "held-out scenes.",
    )
    page.gallery(
        [
            (
                paths[name],
                captions[name],
                [("right: " if right[name] else "not all right: ") + f"reference: {records[name].captions[0]}"],
            )
            for name in shown
        ]
    )
    page.command("clipcap caption common/assets/samples/scenes/test_000.jpg --language nld")
    print(f"Dutch: every colour and shape right in {share:.1%} of {len(right)} held-out scenes")
    page.command("python -m experiments.demo")
    return {"captions": captions, "all_right": share}


def main(config: Config) -> None:
    """Run everything and write the page."""
    print(f"page: {write_demo(config)}")


def write_demo(
    config: Config,
    *,
    images: int = 0,
    scene: dict[str, Any] | None = None,
    walk: dict[str, Any] | None = None,
    recycling: dict[str, Any] | None = None,
) -> Path:
    """Caption, rebuild, recycle, and write the page; returns its path.

    Args:
        config: as given.
        images: scenes to caption, when not 0, instead of all.
        scene: options of `scene_section`.
        walk: options of `walk_section`.
        recycling: options of `recycling_section`.
    """
    device = start(config.runtime)
    with_scene = importlib.util.find_spec("nerfstudio") is not None
    steps = Steps(
        [
            "caption photographs",
            "load the backbones and the captioner of scenes",
            "caption the sample scenes with beam search",
            "caption them again by greedy decoding and sampling",
            "read prefixes as words",
            "score the captions",
            "caption them in Dutch",
            "score tiny GPT-2 on a sentence",
            *(
                [
                    "rebuild a room from photographs without poses (about a minute)",
                    "rebuild a scene from eight photographs (a minute or two)",
                ]
                if with_scene
                else []
            ),
            "recycle English GPT-2 for Dutch (about two minutes)",
            "write the page",
        ]
    )
    page = Page("CLIP and GPT-2 at work", "What the toolkit does with its packaged backbones, on this machine")
    introduce(page)
    steps.next()
    photographs = photographs_section(page, device, images)

    steps.next()
    captioner = Captioner.from_pretrained("tiny", device=device)
    items = [item for item in read_dataset(SAMPLES / "dataset.json") if item.split == "test"][: images or None]
    paths = {item.image_id: item.path for item in items}
    references = {item.image_id: list(item.captions) for item in items}

    steps.next()
    beams = dict(zip(paths, captioner.stream(list(paths.values()), strategy="beam", num_captions=3), strict=True))
    captions = {key: found.captions[0] for key, found in beams.items()}
    right = {key: same_objects(text, references[key][0]) for key, text in captions.items()}
    counts = {key: sum(looks(parse(texts[0])).values()) for key, texts in references.items()}

    steps.next()
    others = {
        "beam search, 5 beams": captions,
        "greedy": dict(zip(paths, captioner.caption(list(paths.values()), strategy="greedy"), strict=True)),
        "sampling, top-p 0.9": dict(
            zip(
                paths,
                captioner.caption(list(paths.values()), strategy="sample", top_p=0.9, seed=config.runtime.seed),
                strict=True,
            )
        ),
    }
    table = []
    for name, found in others.items():
        scores = score_captions(found, references, tokenizer="words")
        share = sum(same_objects(text, references[key][0]) for key, text in found.items()) / len(found)
        table.append({"decoding": name, "all objects right": share, "BLEU-4": scores.bleu[3], "CIDEr": scores.cider})

    steps.next()
    shown = spread(counts, SHOWN)
    embeddings = captioner.embed([read_image(paths[key]) for key in shown[:4]])
    with torch.no_grad():
        prefixes = captioner.model.prefix(embeddings)
    words = [[tokens[0][0].strip() for tokens in nearest_tokens(captioner.model, prefix)] for prefix in prefixes]

    steps.next()
    found_scores = evaluate_captions(captions, items, clip=captioner.clip, resamples=300)

    page.section(
        "Captions of rendered scenes",
        "What can be measured exactly. The scenes below were rendered for this project and held out from all training. "
        f"Here are {len(shown)} of {len(items)}, with one to three objects; all captions are in `results.json`.",
    )
    page.table(table, caption=f"{len(items)} held-out scenes")
    page.command("python -m experiments.demo")
    page.gallery(
        [
            (
                paths[key],
                captions[key],
                [
                    ("right: " if right[key] else "not all right: ") + f"reference: {references[key][0]}",
                    f"mean log-probability {beams[key].scores[0]:.2f}",
                ],
            )
            for key in shown
        ]
    )
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
    evaluation_page(found_scores, items, page=page, shown=0)
    page.command("clipcap evaluate --data common/assets/samples/scenes/dataset.json --model tiny --resamples 300")
    results: dict[str, Any] = {}
    steps.next()
    results["dutch"] = dutch_section(page, paths, shown, device)

    steps.next()
    language = score_language(device)
    if with_scene:
        from dietnerf.cli import silence_nerfstudio

        silence_nerfstudio()
        from experiments.demo.scene import scene_section
        from experiments.demo.walk import walk_section

        steps.next()
        results["walk"] = walk_section(page, config.out, device=device, **(walk or {}))
        steps.next()
        results["scene"] = scene_section(page, config.out, device=device, **(scene or {}))
        page.text("To compute the scores of the held-out views and the similarities of this scene's views again:")
        page.command(f"dietnerf evaluate {config.out / 'scene'}")
        page.command("dietnerf consistency common/assets/samples/multiview --views 8")
        page.text("This writes the similarities with views of other scenes to `scene.json`:")
        page.command("python -m experiments.demo")
    else:
        page.note("The part on novel views needs nerfstudio: `pip install 'clip-gpt-toolkit[dietnerf]'`.")
    steps.next()
    results["recycling"] = recycling_section(page, config.out, device=device, **(recycling or {}))

    steps.next()
    page.section(
        "The backbones", "Trained by this project with fixed seeds; each has a card with its data, licence and scores."
    )
    page.table(language)
    for row in language:
        trained = card_of(row["model"])["config"]
        page.command(
            f"python -m experiments.backbones.train_gpt2 --corpus out/corpus --size {trained['size']} "
            f"--epochs {trained['epochs']:g}"
        )
    sentence = write_text(config.out / "sentence.txt", TEXT)
    page.command(f"recycle-gpt2 evaluate tiny tiny-medium --text {sentence}")
    retrieval = card_of("clip-tiny")["scores"]
    page.table([{"tiny CLIP on held-out scenes": name, "score": value} for name, value in retrieval.items()])
    page.command("python -m experiments.backbones.evaluate_clip --clip tiny --split test")
    page.section("What was run")
    page.table(steps.table(), caption=f"Seconds on {hardware()}")
    seconds = time.monotonic() - steps.begun
    page.details(
        "hardware, versions and time",
        {**provenance(), "seconds": round(seconds, 1), "seed": config.runtime.seed},
    )
    path = page.write(config.out / "index.html")
    contact_sheet([read_image(paths[key]) for key in shown], [captions[key] for key in shown]).save(
        config.out / "captions.png"
    )
    write_json(
        config.out / "results.json",
        {
            "photographs": photographs,
            "captions": captions,
            "decoding": table,
            "caption_scores": found_scores.scores,
            "language": language,
            **results,
            "steps": steps.table(),
            "seconds": seconds,
            **provenance(),
        },
    )
    return path


def score_language(device: torch.device) -> list[dict[str, Any]]:
    """Both tiny GPT-2s on a sentence, with what their cards say."""
    rows = []
    for name in ("tiny", "tiny-medium"):
        model, tokenizer = load_gpt2(name, device=device, frozen=True)
        found = score(model, [tokenizer.eos_token_id, *tokenizer(TEXT)["input_ids"]])
        record = card_of(f"gpt2-{name}")
        rows.append(
            {
                "model": f"gpt2-{name}",
                "parameters": record["parameters"],
                "bits per byte, held-out text": record["valid"]["bits_per_byte"],
                "perplexity of the sentence, now": found.perplexity,
            }
        )
    return rows
