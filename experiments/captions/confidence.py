"""Calibrate the captioner for photographs, and show how far its confidence can be trusted.

    python -m experiments.captions.confidence --data dataset_flickr8k.json --images flickr8k/images \
        --others photographs.json --others-images coco/images --model common/assets/captioner-photo

It learns on the validation photographs of DATA and on every second one of OTHERS, photographs of other subjects (a list
of {"file_name", "captions"}, by file name); the rest of OTHERS and the test photographs of DATA are scored. Writes the
calibration beside the captioner's weights, and to OUT the plot, the tables and results.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from clipcap.calibrate import CalibrateConfig, encoded, right_captions, run
from clipcap.captioner import Captioner
from clipcap.confidence import SCORES
from clipcap.data.dataset import CaptionedImage, read_dataset
from clipcap.data.embeddings import mapper_input
from clipcap.evaluation.metrics import score_captions
from common.checks import UserError, run_command
from common.files import markdown_table, whole_file, write_json, write_text
from common.intervals import wilson_interval
from common.report import plot_lines
from common.runtime import RuntimeConfig, provenance, start
from experiments import from_command_line
from experiments.captions.photographs import cleaned

LEVELS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Least confidences of the table."""


@dataclass(frozen=True)
class Config:
    """Calibrate a captioner and score its confidence."""

    data: Path
    """Karpathy JSON file that the captioner was trained on, such as Flickr8k's."""
    others: Path
    """JSON list of other photographs: {"file_name", "captions"}."""
    images: Path | None = None
    """Directory of DATA's images, when they are not beside the file."""
    others_images: Path | None = None
    """Directory of OTHERS' images, when they are not beside the file."""
    model: str = "photo"
    """Captioner, whose directory gets the calibration."""
    out: Path = Path("out/confidence")
    """Where tables, plot and results go."""
    docs: Path | None = None
    """Directory that gets a copy of the plot as photographs_confidence.png, such as docs."""
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1))


def halved(others: Path, out: Path) -> Path:
    """The list as a Karpathy JSON file: by file name, every second photograph is of split val, the rest of test."""
    try:
        rows = sorted(json.loads(others.read_text(encoding="utf-8")), key=lambda row: row["file_name"])
        images = [
            {
                "filename": row["file_name"],
                "split": ("val", "test")[number % 2],
                "sentences": [{"raw": text} for text in row["captions"]],
            }
            for number, row in enumerate(rows)
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'others {str(others)!r} is no list of {{"file_name", "captions"}} ({type(error).__name__}): give one.'
        ) from error
    return Path(write_json(out / "others.json", {"images": images}))


def coverage_curve(
    confidence: Float[np.ndarray, " n"], quality: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Share of the captions that are kept, the surest first, and the mean quality of those."""
    order = np.argsort(-confidence, kind="stable")
    counts = np.arange(1, len(order) + 1)
    return counts / len(order), np.cumsum(quality[order]) / counts


def auroc(score: Float[np.ndarray, " n"], right: Int[np.ndarray, " n"]) -> float:
    """Probability that a right caption has a higher score than a wrong one; 0.5 by chance."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(right, score)) if 0 < right.sum() < len(right) else float("nan")


@torch.inference_mode()
def judged(captioner: Captioner, items: list[CaptionedImage], known: list[CaptionedImage]) -> dict[str, Any]:
    """The best caption of each image: text, scores, confidence, whether it is far, whether it is right, and CIDEr."""
    calibration = captioner.require_calibration()
    texts, scores, confidences, far = [], [], [], []
    length = captioner.model.decode_options({})["max_new_tokens"]
    for _, features in encoded(captioner, items):
        inputs = mapper_input(features, captioner.model.config.inputs)
        found = captioner.decode(features, max_new_tokens=length)
        texts += [captioner.text(several[0]) for several in found]
        scores += calibration.scores(captioner, features, captioner.model.prefix(inputs), found)
        sure = captioner.judge(features, found)
        confidences += [one.confidences[0] for one in sure]
        far += [one.far for one in sure]
    right = right_captions([[text] for text in texts], [*items, *known])
    keys = [item.image_id for item in items]
    references = {item.image_id: list(item.captions) for item in items}
    cider = score_captions(dict(zip(keys, texts, strict=True)), references, tokenizer="words").cider_per_image
    return {
        "texts": texts,
        "scores": torch.cat(scores).numpy(),
        "confidence": np.array(confidences),
        "far": np.array(far),
        "right": np.array([one for [one] in right]),
        "cider": np.array([cider[key] for key in keys]),
    }


def column_of(found: dict[str, Any], name: str) -> Float[np.ndarray, " n"]:
    """A score by its name, higher where a caption is more likely right."""
    if name == "confidence":
        return found["confidence"]
    return (-1 if name == "distance" else 1) * found["scores"][:, SCORES.index(name)]


def level_rows(found: dict[str, Any]) -> list[dict[str, str]]:
    """What is left, and how good it is, of captions of at least each confidence."""
    rows = []
    for level in LEVELS:
        kept = found["confidence"] >= level
        count, right = int(kept.sum()), int(found["right"][kept].sum())
        if count:
            low, high = wilson_interval(right, count)
            rows.append(
                {
                    "confidence at least": f"{level:.1f}",
                    "captions": f"{count} of {len(kept)}",
                    "right": f"{right / count:.0%} ({low:.0%}–{high:.0%})",
                    "mean confidence": f"{found['confidence'][kept].mean():.0%}",
                    "CIDEr": f"{100 * found['cider'][kept].mean():.1f}",
                }
            )
    return rows


def main(config: Config) -> None:
    """Calibrate, score what was not learned from, and write tables and plot."""
    start(config.runtime)
    images = config.images or config.data.parent
    data = cleaned(config.data, images, config.out)
    others = halved(config.others, config.out)
    others_images = config.others_images or config.others.parent
    run(
        CalibrateConfig(
            data=data,
            images=images,
            others=others,
            others_images=others_images,
            model=config.model,
            runtime=config.runtime,
        )
    )
    captioner = Captioner.from_pretrained(config.model, device=config.runtime.device)
    items = read_dataset(data, images=images)
    known = [item for item in items if item.split == "train"]
    parts = {
        "test photographs": [item for item in items if item.split == "test"],
        "other photographs": [item for item in read_dataset(others, images=others_images) if item.split == "test"],
    }
    found = {name: judged(captioner, several, known) for name, several in parts.items()}
    together = {key: np.concatenate([part[key] for part in found.values()]) for key in next(iter(found.values()))}
    groups = found | {"both": together}
    figures: dict[str, Any] = {
        name: coverage_curve(part["confidence"], part["right"].astype(float)) for name, part in groups.items()
    }
    figure = plot_lines(
        figures, x="share of the captions that are kept, the surest first", y="share of them that is right"
    )
    for place in (config.out / "coverage.png", *([config.docs / "photographs_confidence.png"] if config.docs else [])):
        with whole_file(place) as file:
            figure.savefig(file, format="png", dpi=150)
    ranking = [
        {"score": name}
        | {group: f"{auroc(column_of(part, name), part['right']):.2f}" for group, part in groups.items()}
        for name in (*SCORES[: together["scores"].shape[1]], "confidence")
    ]
    levels = level_rows(together)
    apart = [
        {
            "photographs": name,
            "how many": int(kept.sum()),
            "right": f"{part['right'][kept].mean():.0%}" if kept.any() else "–",
            "CIDEr": f"{100 * part['cider'][kept].mean():.1f}" if kept.any() else "–",
        }
        for group, part in found.items()
        for name, kept in ((group, ~part["far"]), (f"{group}, called far", part["far"]))
    ]
    tables = [
        markdown_table(("score", *groups), ranking),
        markdown_table(tuple(levels[0]), levels),
        markdown_table(tuple(apart[0]), apart),
    ]
    text = "\n\n".join("\n".join(lines) for lines in tables) + "\n"
    print(text)
    write_text(config.out / "tables.md", text)
    brier = {name: float(((part["confidence"] - part["right"]) ** 2).mean()) for name, part in groups.items()}
    record = {"ranking": ranking, "levels": levels, "far": apart, "Brier score": brier, "config": config}
    record["captions"] = dict(zip(together["texts"], together["confidence"].tolist(), strict=False))
    write_json(config.out / "results.json", record | provenance())


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
