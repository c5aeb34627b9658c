"""The demo: captions, a scene from eight photographs and English made into Dutch, on one self-contained page.

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
import tyro
from rich.console import Console

from clipcap.captioner import Captioner
from clipcap.data import read_dataset
from clipcap.evaluate import evaluate_captions, evaluation_page
from clipcap.images import read_image
from clipcap.interpret import nearest_tokens
from clipcap.metrics import score_captions
from common.checks import run_command
from common.gpt2 import load_gpt2
from common.language import score
from common.pretrained import ASSETS
from common.report import Page, contact_sheet, plot_bars, write_json
from common.runtime import RuntimeConfig, hardware, start, versions
from experiments.demo_recycling import recycling_section
from experiments.scenes.captions import looks, parse

SCENES = ASSETS / "samples" / "scenes"
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

    def next(self) -> None:
        """Announce the next step."""
        later = f", then {self.names[self.done + 1]}" if self.done + 1 < len(self.names) else ""
        elapsed = time.monotonic() - self.begun
        self.console.print(
            f"[{self.done + 1}/{len(self.names)}] {elapsed:4.0f} s  {self.names[self.done]}{later}",
            markup=False,
            highlight=False,
        )
        self.done += 1


def card_of(name: str) -> dict[str, Any]:
    """The record that a packaged model was written with."""
    return json.loads((ASSETS / name / "training.json").read_text())


def same_objects(caption: str, reference: str) -> bool:
    """Whether two captions name the same colours and shapes."""
    return looks(parse(caption)) == looks(parse(reference))


def main(config: Config) -> None:
    """Caption, score, interpret, and write the page."""
    device = start(config.runtime)
    with_scene = importlib.util.find_spec("nerfstudio") is not None
    steps = Steps(
        [
            "load the backbones and the captioner",
            "caption the sample scenes with beam search",
            "caption them again by greedy decoding and sampling",
            "read prefixes as words",
            "score the captions",
            "score tiny GPT-2 on a sentence",
            *(["rebuild a scene from eight photographs (a minute or two)"] if with_scene else []),
            "recycle English GPT-2 for Dutch (about two minutes)",
            "write the page",
        ]
    )
    begun = time.monotonic()
    steps.next()
    captioner = Captioner.from_pretrained("tiny", device=device)
    items = [item for item in read_dataset(SCENES / "dataset.json") if item.split == "test"]
    paths = [item.path for item in items]
    references = {item.image_id: list(item.captions) for item in items}

    steps.next()
    beams = list(captioner.stream(paths, strategy="beam", num_captions=3))
    captions = {item.image_id: found.captions[0] for item, found in zip(items, beams, strict=True)}
    right = {key: same_objects(text, references[key][0]) for key, text in captions.items()}
    counts = {key: sum(looks(parse(texts[0])).values()) for key, texts in references.items()}

    steps.next()
    others = {
        "beam search, 5 beams": captions,
        "greedy": dict(zip(captions, captioner.caption(paths, strategy="greedy"), strict=True)),
        "sampling, top-p 0.9": dict(
            zip(captions, captioner.caption(paths, strategy="sample", top_p=0.9, seed=config.runtime.seed), strict=True)
        ),
    }
    table = []
    for name, found in others.items():
        scores = score_captions(found, references, tokenizer="words")
        share = sum(same_objects(text, references[key][0]) for key, text in found.items()) / len(found)
        table.append({"decoding": name, "all objects right": share, "BLEU-4": scores.bleu[3], "CIDEr": scores.cider})

    steps.next()
    embeddings = captioner.embed([read_image(path) for path in paths[:4]])
    with torch.no_grad():
        prefixes = captioner.model.prefix(embeddings)
    words = [[tokens[0][0].strip() for tokens in nearest_tokens(captioner.model, prefix)] for prefix in prefixes]

    steps.next()
    found_scores = evaluate_captions(captions, items, clip=captioner.clip, resamples=300)

    steps.next()
    language = []
    for name in ("tiny", "tiny-medium"):
        model, tokenizer = load_gpt2(name, device=device, frozen=True)
        ids = [tokenizer.eos_token_id, *tokenizer(TEXT)["input_ids"]]
        found_score = score(model, ids)
        record = card_of(f"gpt2-{name}")
        language.append(
            {
                "model": f"gpt2-{name}",
                "parameters": record["parameters"],
                "bits per byte, held-out text": record["valid"]["bits_per_byte"],
                "perplexity of the sentence, now": found_score.perplexity,
            }
        )

    clip = card_of("clip-tiny")
    page = Page("CLIP and GPT-2 at work", "What the toolkit makes of its packaged tiny backbones, on this machine")
    page.section(
        "Captions",
        "ClipCap turns CLIP's embedding of an image into a short prefix that GPT-2 continues as "
        "a caption. The scenes below were rendered for this project and held out from all training.",
    )
    page.note(
        "The packaged backbones are tiny and know rendered scenes and software manuals only. Real weights "
        "(`openai/clip-vit-base-patch32`, `gpt2`) go through the same code: see the README."
    )
    page.table(table, caption=f"{len(items)} held-out scenes")
    page.command("python -m experiments.demo")
    order = sorted(range(len(items)), key=lambda i: counts[items[i].image_id])
    page.gallery(
        [
            (
                items[i].path,
                captions[items[i].image_id],
                [
                    ("right: " if right[items[i].image_id] else "not all right: ")
                    + f"reference: {references[items[i].image_id][0]}",
                    f"mean log-probability {beams[i].scores[0]:.2f}",
                ],
            )
            for i in order
        ]
    )
    page.figure(
        plot_bars(
            {
                f"{n} object{'s' * (n > 1)}": sum(right[k] for k in right if counts[k] == n)
                / max(1, sum(c == n for c in counts.values()))
                for n in sorted(set(counts.values()))
            },
            x="captions that name every colour and shape right",
        ),
        "Beam search on the scenes above",
    )
    page.section(
        "What a prefix says",
        "The vocabulary tokens nearest to each prefix embedding, by cosine similarity. "
        "A frozen GPT-2 makes the mapper speak in readable tokens less often than one would hope.",
    )
    page.gallery([(paths[i], captions[items[i].image_id], [" ".join(words[i])]) for i in range(len(words))])
    evaluation_page(found_scores, items, page=page, shown=0)
    page.command("clipcap evaluate --data common/assets/samples/scenes/dataset.json --model tiny")
    results: dict[str, Any] = {}
    if with_scene:
        from dietnerf.cli import silence_nerfstudio

        silence_nerfstudio()
        from experiments.demo_scene import scene_section

        steps.next()
        results["scene"] = scene_section(page, config.out, device=device)
    else:
        page.note("The part on novel views needs nerfstudio: `pip install 'clip-gpt-toolkit[dietnerf]'`.")
    steps.next()
    results["recycling"] = recycling_section(page, config.out, device=device)

    steps.next()
    seconds = time.monotonic() - begun
    page.section(
        "The backbones", "Trained by this project from a seed; each has a card with its data, licence and scores."
    )
    page.table(language)
    retrieval = clip["scores"]
    page.table([{"tiny CLIP on held-out scenes": name, "score": value} for name, value in retrieval.items()])
    page.command("python -m experiments.evaluate_tiny_clip --clip tiny --split test")
    page.details(
        "hardware, versions and time",
        {"hardware": hardware(), "versions": versions(), "seconds": round(seconds, 1), "seed": config.runtime.seed},
    )
    path = page.write(config.out / "index.html")
    shown = order[:: max(1, len(order) // 12)][:12]
    sheet = contact_sheet([read_image(paths[i]) for i in shown], [captions[items[i].image_id] for i in shown])
    sheet.save(config.out / "captions.png")
    write_json(
        config.out / "results.json",
        {
            "captions": captions,
            "decoding": table,
            "caption_scores": found_scores.scores,
            "language": language,
            **results,
            "seconds": seconds,
            "hardware": hardware(),
            "versions": versions(),
        },
    )
    print(f"page: {path}")


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(tyro.cli(Config))))
