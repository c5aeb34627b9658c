"""ClipCap's nocaps table (Mokady et al. 2021, table 1): captioners trained on COCO, by domain of the test images.

    python -m experiments.captions.nocaps --data dataset_coco.json --images coco \\
        --nocaps nocaps_val_4500_captions.json --nocaps-images nocaps/images [--models CAPTIONER ...]
    python -m experiments.captions.nocaps --small

`--models` takes captioners that are trained already (those of experiments/captions/coco.py). In small, the domains are
those of rendered scenes: in, where training saw every pair of colour and shape; out, where it saw none; near, between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipcap.data.dataset import read_dataset
from common.checks import UserError, require_one_of, run_command
from common.files import write_json
from experiments import from_command_line
from experiments.captions.tables import (
    VARIANTS,
    TableConfig,
    not_measured,
    prepare,
    run_captioner,
    score_captioner,
    shown,
    write_table,
)
from experiments.scenes.captions import looks, parse
from experiments.scenes.graph import HELD_OUT

DOMAINS = ("in", "near", "out", "overall")
METRICS = ("CIDEr", "SPICE")
PUBLISHED = {
    "mlp-tuned": {"CIDEr": ("79.73", "67.69", "49.35", "65.7"), "SPICE": ("12.2", "11.26", "9.7", "11.1")},
    "transformer-frozen": {"CIDEr": ("84.85", "66.82", "49.14", "65.83"), "SPICE": ("12.14", "10.92", "9.57", "10.9")},
}
"""In the order of the domains."""


@dataclass(frozen=True)
class Config(TableConfig):
    """Train the paper's two captioners on COCO, or take trained ones, and score them on nocaps by domain."""

    nocaps: Path | None = None
    """nocaps' validation captions with domains (nocaps_val_4500_captions.json)."""
    nocaps_images: Path | None = None
    """Directory of its images."""
    models: tuple[str, ...] = ()
    """Trained captioners to score, one for each of --variants, instead of training them."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which captioners: transformer-frozen, mlp-tuned."""


def scenes_by_domain(data: Path, out: Path) -> tuple[Path, Path]:
    """The test scenes in nocaps' layout: the file and the directory of its images."""
    items = [item for item in read_dataset(data) if item.split == "test"]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        pairs = set(looks(parse(item.captions[0])))
        unseen = len(pairs & HELD_OUT)
        domain = "in-domain" if not unseen else "out-domain" if unseen == len(pairs) else "near-domain"
        images.append({"id": number, "file_name": item.path.name, "domain": domain})
        annotations += [
            {"id": len(annotations) + i, "image_id": number, "caption": c} for i, c in enumerate(item.captions)
        ]
    return write_json(out, {"images": images, "annotations": annotations}), items[0].path.parent


def main(config: Config) -> None:
    """Train or take the captioners, score, and print and write the table."""
    for name in config.variants:
        require_one_of("variant", name, tuple(VARIANTS))
    if config.models and len(config.models) != len(config.variants):
        raise UserError(f"{len(config.models)} models for {len(config.variants)} variants: give one for each.")
    if not config.small and (config.nocaps is None or not config.nocaps.exists()):
        raise UserError(
            f"nocaps file {str(config.nocaps) if config.nocaps else '(none)'!r} is missing: give --nocaps "
            f"nocaps_val_4500_captions.json and --nocaps-images, or --small."
        )
    if config.models and not config.small and config.data is None:
        config = replace(config, data=config.nocaps)  # nothing is trained
    setting = prepare("clipcap_nocaps", config, epochs=10, layout="Karpathy's dataset_coco.json, with --images")
    nocaps, images = config.nocaps, config.nocaps_images
    if config.small and nocaps is None:
        nocaps, images = scenes_by_domain(setting.data, setting.out / "data" / "scenes_by_domain_val.json")
    columns = {(metric, domain): f"{metric} {domain}" for metric in METRICS for domain in DOMAINS}
    rows, tokenizer, absent = [], "", []
    for name, model in zip(config.variants, config.models or (None,) * len(config.variants), strict=True):
        trained = model or run_captioner(setting, name, **VARIANTS[name])
        found = score_captioner(setting, trained, name, data=nocaps, images=images, split="all")
        if not found.domains:
            raise UserError(f"{str(nocaps)!r} has no domains: give nocaps' file with a 'domain' for each image.")
        tokenizer, absent = found.tokenizer, not_measured(found, METRICS)
        row = {"captioner": name}
        for (metric, domain), column in columns.items():
            if domain in found.domains:
                part = found.domains[domain]
                row[column] = shown(metric, part["scores"], part["intervals"])
        row["images"] = " / ".join(str(found.domains[d]["images"]) for d in DOMAINS if d in found.domains)
        rows.append(row)
        if not config.small:
            figures = (figure for metric in METRICS for figure in PUBLISHED[name][metric])
            rows.append({"captioner": f"{name}, published"} | dict(zip(columns.values(), figures, strict=True)))
    text = ["Scores times 100 with 95% intervals over the images; CIDEr uses the document frequencies of all.", *absent]
    if config.small:
        text += [
            "Domains, by the pairs of colour and shape that training never showed: in, none; near, some; out, all",
            "(often one object).",
        ]
    write_table(
        setting,
        "nocaps, validation",
        text,
        rows,
        tokenizer=tokenizer,
        columns=("captioner", *columns.values(), "images"),
        options="".join(f" {word}" for word in (*["--models"][: len(config.models)], *config.models)),
    )


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
