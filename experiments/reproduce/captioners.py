"""ClipCap's published tables (Mokady et al. 2021, table 1)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.checks import UserError
from experiments.reproduce.config import CLIP, GPT2, Config
from experiments.reproduce.costs import CAPTION, Cost, captioner_costs
from experiments.reproduce.needs import Need, without_images
from experiments.reproduce.rehearsal import clock, random_clip, sizes_of, two_steps


def named_images(captions: Path, images: Path) -> tuple[list[Path], str]:
    """The images that a file of captions names, and what is wrong with the file."""
    from clipcap.data.dataset import read_dataset

    if not captions.is_file() or not images.is_dir():
        return [], ""
    try:
        return [item.path for item in read_dataset(captions, images=images, need_images=False)], ""
    except UserError as error:
        return [], str(error)


def java_needs() -> list[Need]:
    """What METEOR and SPICE need."""
    from pycocoevalcap.spice import spice

    from clipcap.evaluation.metrics import SPICE_JARS

    library = Path(spice.__file__).parent / "lib"
    return [
        Need(
            Path(shutil.which("java") or "java"),
            "Java, on the path; the tokenizer of the published scores needs it, too",
            optional="without it METEOR and SPICE are not measured",
        ),
        *(
            Need(library / jar, "of Stanford CoreNLP 3.6.0", optional="without it SPICE is not measured")
            for jar in SPICE_JARS
        ),
    ]


def coco_needs(config: Config) -> list[Need]:
    place = config.data / "coco"
    captions, train, val = place / "dataset_coco.json", place / "train2014", place / "val2014"
    named, wrong = named_images(captions, place)
    elsewhere = without_images(path for path in named if path.parent not in (train, val))
    absent = {folder: without_images(path for path in named if path.parent == folder) for folder in (train, val)}
    return [
        Need(captions, "Karpathy's splits of COCO with the captions", wrong or elsewhere),
        Need(train, "COCO's training images of 2014", absent[train]),
        Need(val, "COCO's validation images of 2014", absent[val]),
        *java_needs(),
    ]


def conceptual_needs(config: Config) -> list[Need]:
    place, needs = config.data / "conceptual", []
    for split, file in (("train", "Train_GCC-training.tsv"), ("validation", "Validation_GCC-1.1.0-Validation.tsv")):
        captions = Need(place / file, f"Conceptual Captions, {split}: captions and URLs")
        journal = Need(place / split / "journal.jsonl", f"clipcap download {place / file} --out {place / split}")
        if captions.met and journal.met:
            try:
                there, lines = downloaded(captions.path, place / split)
            except UserError as error:
                captions = replace(captions, wrong=str(error))
            else:
                if there < lines or not there:
                    journal = replace(journal, wrong=f"{there:,} of the {lines:,} lines have their image")
                if there and 2 * there >= lines:
                    journal = replace(journal, optional="URLs die, and lines without an image are left out")
        needs += [captions, journal]
    return [*needs, *java_needs()]


def downloaded(captions: Path, place: Path) -> tuple[int, int]:
    """Of how many lines of a Conceptual Captions file `clipcap download` left the image, and how many there are."""
    from clipcap.data.journal import read_journal, url_key
    from clipcap.data.readers.conceptual import conceptual_rows

    images = {key: entry.file for key, entry in read_journal(place).items() if entry.file}
    names = {name for folder in {Path(file).parent for file in images.values()} if (place / folder).is_dir()
             for name in os.listdir(place / folder)}  # fmt: skip
    keys = [url_key(url) for _, _, url in conceptual_rows(captions)]
    return sum(key in images and Path(images[key]).name in names for key in keys), len(keys)


def nocaps_needs(config: Config) -> list[Need]:
    place = config.data / "nocaps"
    captions, images = place / "nocaps_val_4500_captions.json", place / "images"
    named, wrong = named_images(captions, images)
    return [
        *(java_needs() if trained_captioners(config) else coco_needs(config)),
        Need(captions, "nocaps' validation captions, with domains", wrong),
        Need(images, "its images", without_images(named)),
    ]


def trained_captioners(config: Config) -> tuple[str, ...]:
    """The captioners of clipcap-coco, if both exist."""
    from experiments.captions.tables import VARIANTS

    models = [config.place.parent / "clipcap-coco" / name / "model" for name in VARIANTS]
    files = [model / file for model in models for file in ("config.json", "model.safetensors")]
    return tuple(map(str, models)) if all(file.is_file() for file in files) else ()


def nocaps_costs(config: Config) -> list[Cost]:
    """Those of COCO's captioners too, unless they exist."""
    if not trained_captioners(config):
        return captioner_costs(123_287 + 4_500, 566_747, 4_500)
    return [cost for cost in captioner_costs(4_500, 0, 4_500) if cost.flops]


def table_options(config: Config, weights: dict[str, str]) -> dict[str, Any]:
    """What all captioning tables are given."""
    return {
        "clip": weights[CLIP], "gpt2": weights[GPT2], "out": config.place, "steps": config.steps,
        "runtime": config.runtime,
    }  # fmt: skip


def run_coco(config: Config, weights: dict[str, str]) -> None:
    from experiments.captions import coco as clipcap_coco

    place = config.data / "coco"
    options = table_options(config, weights)
    clipcap_coco.main(clipcap_coco.Config(data=place / "dataset_coco.json", images=place, **options))


def run_conceptual(config: Config, weights: dict[str, str]) -> None:
    from experiments.captions import conceptual as clipcap_conceptual

    place = config.data / "conceptual"
    clipcap_conceptual.main(
        clipcap_conceptual.Config(
            data=place / "Train_GCC-training.tsv",
            images=place / "train",
            test=place / "Validation_GCC-1.1.0-Validation.tsv",
            test_images=place / "validation",
            skip_missing=True,
            **table_options(config, weights),
        )
    )


def run_nocaps(config: Config, weights: dict[str, str]) -> None:
    """Scores the captioners of clipcap-coco if they exist, or trains them."""
    from experiments.captions import nocaps as clipcap_nocaps

    coco, place, trained = config.data / "coco", config.data / "nocaps", trained_captioners(config)
    clipcap_nocaps.main(
        clipcap_nocaps.Config(
            data=None if trained else coco / "dataset_coco.json",
            images=None if trained else coco,
            nocaps=place / "nocaps_val_4500_captions.json",
            nocaps_images=place / "images",
            models=trained,
            **table_options(config, weights),
        )
    )


def rehearse_captioners(config: Config) -> Iterator[str]:
    """Embeds, trains both captioners for two steps of 4 captions, and captions by beam search."""
    from transformers import GPT2Config

    from clipcap.config import ClipCapConfig
    from clipcap.data.embeddings import encode
    from clipcap.decoding import decode
    from clipcap.model import ClipCapModel
    from clipcap.training.module import CaptionTraining
    from common.clip import load_clip
    from experiments.captions.tables import VARIANTS

    clip = load_clip(random_clip(config.place), device=config.runtime.device)
    begun = clock()
    for _ in range(2):
        embeddings = encode(clip, torch.randn(2, 3, 224, 224, device=clip.device), "embedding")
    seconds = (clock() - begun) / 2
    yield f"embedding: CLIP ViT-B/32, {seconds:.2f} s for 2 images"
    del clip
    sizes = GPT2Config().to_dict()
    for name, variant in VARIANTS.items():
        model = ClipCapModel(ClipCapConfig(gpt2_config=sizes, clip_width=512, eos_token_id=50256, **variant)).train()
        module = CaptionTraining(model, lr=2e-5, warmup=1, total=2, weight_decay=0.01, schedule="linear")
        ids = torch.randint(50257, (4, CAPTION))
        batch = {"clip_embeddings": torch.randn(4, 512), "input_ids": ids, "labels": ids}
        seconds = two_steps(module, batch, config.runtime)
        yield f"training {name}: {sizes_of(model)}, {seconds:.2f} s a step of 4 captions (published: 40)"
        model.eval().to(embeddings.device)
        begun = clock()
        found = decode(model, embeddings, strategy="beam", num_beams=5, max_new_tokens=2)
        seconds = (clock() - begun) / 2
        yield f"captioning by {name}: {seconds:.2f} s a token of {len(found)} images with 5 beams"
        del model, module
