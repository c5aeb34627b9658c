"""The demo on one page: photographs captioned, a room rebuilt from them, English made into Dutch, then rendered scenes.

    python -m experiments.demo

Everything runs on the packaged backbones, offline, in less than ten minutes on two cores.
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

from common.files import write_json, write_text
from common.gpt2 import load_gpt2
from common.language import score
from common.pretrained import ASSETS
from common.report import Page
from common.runtime import RuntimeConfig, hardware, provenance, start
from experiments.demo.photographs import photographs_sections
from experiments.demo.recycling import recycling_section
from experiments.demo.rendered import rendered_sections

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


def applications(page: Page) -> None:
    """What the applications are, and on which weights they run here."""
    page.section(
        "What ran here",
        "Three applications of CLIP and GPT-2. The packaged backbones are small: those for photographs know what "
        "Flickr8k shows, the tiny ones only rendered scenes and software manuals. Real weights "
        "(`openai/clip-vit-base-patch32`, `gpt2`) go through the same code: see the README.",
    )
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
                "what it does": "Rebuilds a scene from a few photographs as a radiance field. A semantic loss "
                "can require that new views look like the photographs to CLIP; it is off here (docs/dietnerf.md says "
                "where it helps).",
                "weights here": "none: both scenes were trained just now",
            },
            {
                "application": "`recycle-gpt2`",
                "what it does": "Turns an English GPT-2 into one for another language by learning new token embeddings "
                "for its layers. A linear map carries them over to a larger model.",
                "weights here": "gpt2-tiny and gpt2-tiny-medium; their Dutch embeddings were trained just now",
            },
        ]
    )


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
            "caption and classify photographs",
            *(["rebuild a room from photographs without poses (two minutes or three)"] if with_scene else []),
            "recycle English GPT-2 for Dutch (about two minutes)",
            "load the captioner of rendered scenes",
            "caption the sample scenes with beam search",
            "caption them again by greedy decoding and sampling",
            "read prefixes as words",
            "score the captions",
            "caption them in Dutch",
            *(["rebuild a still life from eight pictures (two minutes or three)"] if with_scene else []),
            "score tiny GPT-2 on a sentence",
            "write the page",
        ]
    )
    page = Page(
        "CLIP and GPT\N{NON-BREAKING HYPHEN}2 at work",
        "Photographs captioned, a room rebuilt from twenty pictures, English made into Dutch; then rendered scenes, "
        "where everything can be measured exactly. All of it ran just now, on this machine.",
    )
    results: dict[str, Any] = {}
    steps.next()
    results["photographs"] = photographs_sections(page, device, images)

    if with_scene:
        from dietnerf.cli import silence_nerfstudio

        silence_nerfstudio()
        from experiments.demo.scene import scene_section
        from experiments.demo.walk import walk_section

        steps.next()
        results["walk"] = walk_section(page, config.out, device=device, **(walk or {}))
    else:
        page.note("The parts on novel views need nerfstudio: `pip install 'clip-gpt-toolkit[dietnerf]'`.")

    steps.next()
    results["recycling"] = recycling_section(page, config.out, device=device, **(recycling or {}))

    results |= rendered_sections(page, steps.next, device, images=images, seed=config.runtime.seed)

    if with_scene:
        steps.next()
        results["scene"] = scene_section(page, config.out, device=device, **(scene or {}))
        page.text("To compute the scores of the held-out views and the similarities of this scene's views again:")
        page.command(f"dietnerf evaluate {config.out / 'scene'}")
        page.command("dietnerf consistency common/assets/samples/multiview --views 8")
        page.text("This writes the similarities with views of other scenes to `scene.json`:")
        page.command("python -m experiments.demo")

    steps.next()
    language = score_language(device)
    applications(page)
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
    page.table(steps.table(), caption=f"Seconds on {hardware()}")
    seconds = time.monotonic() - steps.begun
    page.details(
        "hardware, versions and time",
        {**provenance(), "seconds": round(seconds, 1), "seed": config.runtime.seed},
    )
    path = page.write(config.out / "index.html")
    write_json(
        config.out / "results.json",
        {
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
