"""ClipCap's nocaps table (Mokady et al. 2021, table 1): captioners trained on COCO, by domain of the test images.

    python -m experiments.clipcap_nocaps --data dataset_coco.json --images coco \\
        --nocaps nocaps_val_4500_captions.json --nocaps-images nocaps/images [--models CAPTIONER ...]
    python -m experiments.clipcap_nocaps --small

`--models` takes captioners that are trained already (those of experiments/clipcap_coco.py). In small, the domains are
those of rendered scenes: in, where training saw every pair of colour and shape; out, where it saw none; near, between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from clipcap.data import read_dataset
from common.checks import UserError, require_one_of, run_command
from common.report import write_json
from experiments import from_command_line
from experiments.clipcap_tables import (
    VARIANTS,
    TableConfig,
    prepare,
    run_captioner,
    score_captioner,
    write_table,
)
from experiments.scenes.captions import looks, parse
from experiments.scenes.graph import HELD_OUT

DOMAINS = ("in", "near", "out", "overall")
PUBLISHED = {
    "mlp-tuned": {"in": "79.73", "near": "67.69", "out": "49.35", "overall": "65.7"},
    "transformer-frozen": {"in": "84.85", "near": "66.82", "out": "49.14", "overall": "65.83"},
}
"""CIDEr."""


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
    images, annotations = [], []
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
            f"nocaps file {str(config.nocaps) if config.nocaps else '(none)'!r} is not there: give --nocaps "
            f"nocaps_val_4500_captions.json and --nocaps-images, or --small."
        )
    if config.models and not config.small and config.data is None:
        config = replace(config, data=config.nocaps)  # nothing is trained
    setting = prepare("clipcap_nocaps", config, epochs=10, layout="Karpathy's dataset_coco.json, with --images")
    nocaps, images = config.nocaps, config.nocaps_images
    if config.small and nocaps is None:
        nocaps, images = scenes_by_domain(setting.data, setting.out / "data" / "scenes_by_domain_val.json")
    rows, tokenizer = [], ""
    for name, model in zip(config.variants, config.models or (None,) * len(config.variants), strict=True):
        trained = model or run_captioner(setting, name, **VARIANTS[name])
        found = score_captioner(setting, trained, name, data=nocaps, images=images, split="all")
        if not found.domains:
            raise UserError(f"{str(nocaps)!r} has no domains: give nocaps' file with a 'domain' for each image.")
        tokenizer = found.tokenizer
        row = {"captioner": name}
        for domain in DOMAINS:
            if domain in found.domains:
                part = found.domains[domain]
                row[f"CIDEr {domain}"] = f"{100 * part['scores']['CIDEr']:.2f}"
                if "CIDEr" in part["intervals"]:
                    low, high = part["intervals"]["CIDEr"]
                    row[f"CIDEr {domain}"] += f" ({100 * low:.1f}–{100 * high:.1f})"
                row["images"] = " / ".join(str(found.domains[d]["images"]) for d in DOMAINS if d in found.domains)
        rows.append(row)
        if not config.small:
            rows.append({"captioner": f"{name}, published"} | {f"CIDEr {d}": v for d, v in PUBLISHED[name].items()})
    text = ["CIDEr times 100 with 95% intervals over the images; document frequencies of all images."]
    if config.small:
        text += [
            "Rendered scenes and the packaged tiny backbones: not comparable with the published table. Domains:",
            "in, no pair of colour and shape that training never showed; near, some; out, all (often one object).",
        ]
    write_table(
        setting,
        "nocaps, in small" if config.small else "nocaps, validation",
        text,
        ("captioner", *(f"CIDEr {domain}" for domain in DOMAINS), "images"),
        rows,
        command=" ".join(["python -m experiments.clipcap_nocaps", *["--models"][: len(config.models)], *config.models]),
        tokenizer=tokenizer,
    )


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
