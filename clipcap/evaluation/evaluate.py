"""The command `clipcap evaluate`: caption a data set, score the captions, and show them best and worst first."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clipcap.data.dataset import CaptionedImage, read_dataset
from clipcap.data.readers import Format
from clipcap.data.readers.text import whole_characters
from clipcap.decoding import require_options
from clipcap.evaluation.metrics import (
    Metric,
    bootstrap,
    diversity,
    measure,
    measure_clip,
    sacrebleu_score,
)
from common.checks import UserError, printable, require_at_least, require_between, require_file, require_place
from common.files import write_json
from common.images import MAX_PIXELS, ImageLimit
from common.report import Page, thumbnail
from common.runtime import RuntimeConfig, hardware, start, versions

if TYPE_CHECKING:
    from torch import Tensor

    from common.clip import FrozenCLIP

DOMAINS = {"in-domain": "in", "near-domain": "near", "out-domain": "out"}
"""Names of nocaps' own files, and of its papers' columns."""
MOST_RESAMPLES = 1_000_000
_ID_KEYS = ("image_id", "image", "file_name", "filename", "path")


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a captioner, or captions already made, against reference captions.

    Writes to OUT: captions.jsonl (each caption as soon as it is made; an interrupted run goes on from there),
    results.json, per_image.json, and index.html with the images, captions, references and scores.
    """

    data: Path
    """Captioned images, in any layout that `clipcap train` reads."""
    images: Path | None = None
    """Directory of the images, when they are not beside the captions."""
    format: Format = "auto"
    """Layout of DATA, where it should not be guessed from its content."""
    split: str = "test"
    """Which split: train, val, test or all."""
    skip_missing: bool = False
    """Leave out captions whose image is missing, instead of stopping."""
    model: str | None = None
    """Captioner: tiny (packaged), a directory that `clipcap train` or `clipcap convert` wrote, or a hub id."""
    captions: Path | None = None
    """Captions already made, instead of a model: what `clipcap caption` wrote as JSON or CSV, or COCO's results format,
    a list of {"image_id", "caption"}; an id is the image's file name, its stem, or the number at the stem's end."""
    out: Path = Path("out/evaluation")
    """Where captions, scores and the page go."""
    clip_score: str = "tiny"
    """CLIP of CLIPScore: tiny, a Hugging Face id or directory, or open_clip:ARCH/TAG-or-path; empty leaves it out."""
    tokenizer: Literal["auto", "ptb", "words"] = "auto"
    """ptb (needs Java, as the published scores), words (a plain rule), or auto: ptb where Java is installed."""
    resamples: int = 1000
    """Resamples of the images for the 95% intervals; 0 leaves them out."""
    shown: int = 300
    """Images on the page: the best half and the worst half by CIDEr; 0 shows all."""
    strategy: Literal["beam", "beam_original", "greedy"] = "beam"
    """Decoding, with a model."""
    num_beams: int = 5
    """Beams, with a model."""
    max_new_tokens: int = 67
    """Longest caption, with a model."""
    batch_size: int = 16
    """Images captioned at once."""
    limit: ImageLimit = field(default_factory=ImageLimit)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class Evaluation:
    """Scores of captions of some images; all on the libraries' own scale, which papers print times 100."""

    captions: dict[str, str]
    """Image id to caption."""
    scores: dict[str, float]
    """BLEU-1 to BLEU-4, METEOR, ROUGE-L, CIDEr, SPICE, CLIPScore, RefCLIPScore and sacreBLEU, where measured."""
    intervals: dict[str, tuple[float, float]]
    """95%, by bootstrap over the images."""
    domains: dict[str, dict[str, Any]]
    """nocaps' in, near, out and overall: images, scores and intervals; empty where images have no domain."""
    diversity: dict[str, float | int]
    not_measured: dict[str, str]
    """What could not be computed here, and why."""
    tokenizer: str
    """Of BLEU, METEOR, ROUGE-L, CIDEr and SPICE: "ptb" as in published scores, or "words"."""
    details: dict[str, str]
    """sacrebleu's signature, CLIPScore's CLIP."""
    per_image: dict[str, dict[str, float]]
    """Image id to its scores."""


def evaluate_captions(
    captions: Mapping[str, str],
    items: Iterable[CaptionedImage],
    *,
    clip: FrozenCLIP | None = None,
    embeddings: Mapping[str, Tensor] | None = None,
    training: Sequence[str] = (),
    tokenizer: str = "auto",
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Evaluation:
    """Score captions of images against their references.

    Args:
        captions: image id to caption.
        items: the images with their references; those without a caption are left out.
        clip: of CLIPScore; None leaves it out.
        embeddings: image id to what this CLIP has encoded already.
        training: captions of the training split, to tell which captions are new.
        tokenizer: "auto", "ptb" or "words".
        resamples: for the intervals; 0 leaves them out.
        seed: of the resamples.
        progress: show progress bars.
        max_pixels: of an image.

    Raises:
        UserError: no caption, no reference, an image of CLIPScore that cannot be read.
    """
    from tqdm import tqdm

    require_at_least("resamples", resamples, 0)
    kept = [item for item in items if item.image_id in captions]
    given = {item.image_id: captions[item.image_id] for item in kept}
    references = {item.image_id: list(item.captions) for item in kept}
    with tqdm(total=len(kept), desc="scoring", unit=" captions", disable=not progress) as bar:
        metrics, name, absent = measure(
            given, references, tokenizer=tokenizer, progress=lambda done: bar.update(done - bar.n)
        )
        bar.update(len(kept) - bar.n)
    details: dict[str, str] = {}
    if clip is None:
        absent["CLIPScore"] = absent["RefCLIPScore"] = "no CLIP was chosen (clip_score)"
    else:
        details["CLIPScore's CLIP"] = clip.name
        with tqdm(total=len(kept), desc="CLIPScore", unit=" images", disable=not progress) as bar:
            metrics |= measure_clip(
                clip,
                [item.path for item in kept],
                list(given.values()),
                list(references.values()),
                embeddings={row: embeddings[key] for row, key in enumerate(given) if key in embeddings}
                if embeddings
                else None,
                max_pixels=max_pixels,
                progress=lambda done: bar.update(done - bar.n),
            )
    scores = {metric: float(found.value) for metric, found in metrics.items()}
    texts = list(given.values())
    scores["sacreBLEU"], details["sacreBLEU's signature"] = sacrebleu_score(texts, list(references.values()))
    intervals = bootstrap(metrics, resamples=resamples, seed=seed) if resamples else {}
    varied = diversity(texts, training)
    if not training:
        absent["novel share"] = "the data set has no training split beside the split that is scored"
    return Evaluation(
        captions=given,
        scores=scores,
        intervals=intervals,
        domains=_domains([item.domain for item in kept], metrics, resamples=resamples, seed=seed),
        diversity=varied,
        not_measured=absent,
        tokenizer=name,
        details=details,
        per_image={
            key: {metric: float(found.per_image[row]) for metric, found in metrics.items()}
            for row, key in enumerate(given)
        },
    )


def _domains(
    domains: Sequence[str], metrics: Mapping[str, Metric], *, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Scores by nocaps' domains, in the papers' order, with the whole as "overall" (Agrawal et al. 2019)."""
    names = np.array([DOMAINS.get(domain, domain) for domain in domains])
    if not any(names):
        return {}
    known = [name for name in DOMAINS.values() if name in names]
    groups = {name: np.flatnonzero(names == name) for name in [*known, *sorted({*names} - {*known, ""})]}
    groups["overall"] = np.arange(len(names))
    return {
        str(name): {
            "images": len(rows),
            "scores": {metric: found.of(rows) for metric, found in metrics.items()},
            "intervals": bootstrap(metrics, resamples=resamples, seed=seed, rows=rows) if resamples else {},
        }
        for name, rows in groups.items()
    }


def read_captions(path: Path, items: Sequence[CaptionedImage]) -> dict[str, str]:
    """Captions of `items` from a file: JSON or CSV of `clipcap caption`, JSON Lines, or COCO's results format.

    The best caption of an image counts. An id may be the image's id, path, file name or its stem, or the number at
    the end of the stem, as in COCO_val2014_000000391895.jpg; ids of other images are left out.

    Raises:
        UserError: not such a file (the row is named), an id twice, or no id of these images.
    """
    known = _index(items)
    found: dict[str, str] = {}
    unknown = ""
    for number, row in enumerate(_rows(path)):
        where = f"captions {str(path)!r}, row {number + 1}"
        if not isinstance(row, dict):
            raise UserError(f"{where} is no object: give each image an 'image_id' and a 'caption'.")
        if "made_by" in row:
            continue
        name = next((row[key] for key in _ID_KEYS if row.get(key) not in (None, "")), None)
        text = row.get("caption")
        if text is None and isinstance(row.get("captions"), list) and row["captions"]:
            text = row["captions"][0]
        if name is None or not isinstance(text, str):
            raise UserError(f"{where} has no 'image_id' or no 'caption': give each image both.")
        if str(row.get("rank", "1")) != "1":
            continue
        image_id = next((known[key] for key in (str(name), Path(str(name)).name) if key in known), None)
        if image_id is None:
            unknown = unknown or str(name)
            continue
        if image_id in found:
            raise UserError(f"{where}: image {str(name)!r} occurs a second time: give one caption for each image.")
        found[image_id] = whole_characters(text)
    if not found:
        example = f"{unknown!r} is none of them" if unknown else "the file is empty"
        raise UserError(
            f"captions {str(path)!r} has no caption of the {len(items)} images (such as {items[0].image_id!r}): "
            f"{example}; give file names or their numbers as ids, or another --split."
        )
    return found


def _index(items: Sequence[CaptionedImage]) -> dict[str, str]:
    """What an image may be called, to its id; names that two images share are left out."""
    found: dict[str, str | None] = {}
    for item in items:
        number = re.search(r"\d+$", item.path.stem)
        names = {str(item.path), item.path.name, item.path.stem, Path(item.image_id).name, Path(item.image_id).stem}
        if number:
            names.add(str(int(number.group())))
        for name in names:
            found[name] = item.image_id if found.get(name, item.image_id) == item.image_id else None
    unique = {name: image_id for name, image_id in found.items() if image_id is not None}
    return unique | {item.image_id: item.image_id for item in items}


def _rows(path: Path) -> list[Any]:
    text = _read(path)
    if path.suffix.lower() == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(text)))
        except csv.Error as error:
            raise UserError(f"captions {str(path)!r} is not CSV ({error}): write it again.") from None
    try:
        if path.suffix.lower() == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"captions {str(path)!r} is not JSON, line {error.lineno}: {error.msg}.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists in lists in lists
        raise UserError(f"captions {str(path)!r} is JSON that cannot be read ({error}): write it again.") from None
    rows = rows.get("annotations") if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise UserError(f"captions {str(path)!r} is no list: give a list of objects with 'image_id' and 'caption'.")
    return rows


def _read(path: Path) -> str:
    try:
        return require_file(path, "captions").read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"captions {str(path)!r} is not UTF-8 (byte {error.start}): convert it.") from None


def fingerprint(model: str) -> str:
    """What a captioner is known by: its name, or a hash of what is in its directory."""
    from clipcap.model import PACKAGED

    directory = Path(PACKAGED.get(model, Path(model).expanduser()))
    if not directory.is_dir():
        return model
    digest = hashlib.sha256()
    for file in sorted([*directory.glob("*.safetensors"), directory / "config.json"]):
        with open(require_file(file, "captioner"), "rb") as content:
            while block := content.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def caption_items(
    items: Sequence[CaptionedImage], config: EvaluateConfig, clip: FrozenCLIP | None = None
) -> tuple[dict[str, str], list[str], dict[str, Tensor]]:
    """Caption images, keeping each caption in OUT/captions.jsonl, and take from there what was made before.

    Args:
        items: images.
        config: the captioner and how it decodes.
        clip: of CLIPScore; the captioner uses it too when it is its own.

    Returns:
        Image id to caption, a line for each image that cannot be read, and image id to what `clip` gave on the way.

    Raises:
        UserError: the file holds captions of another captioner or decoding.
    """
    from tqdm import tqdm

    from clipcap.captioner import Captioner
    from clipcap.data.images import ImageError
    from common.runtime import resolve_dtype

    assert config.model is not None
    path = config.out / "captions.jsonl"
    made_by = {
        "model": fingerprint(config.model),
        "strategy": config.strategy,
        "num_beams": config.num_beams,
        "max_new_tokens": config.max_new_tokens,
        "precision": config.runtime.precision,
    }
    made = _made_before(path, made_by)
    found = {item.image_id: made[item.image_id] for item in items if item.image_id in made}
    waiting: dict[str, list[str]] = {}
    for item in items:
        if item.image_id not in found:
            waiting.setdefault(str(item.path), []).append(item.image_id)
    skipped: list[str] = []
    embeddings: dict[str, Tensor] = {}
    if not waiting:
        return found, skipped, embeddings

    def skip(error: ImageError) -> None:
        skipped.append(str(error))
        bar.update()

    captioner = Captioner.from_pretrained(
        config.model, device=config.runtime.device, dtype=resolve_dtype(config.runtime.precision), clip=clip
    )
    with (
        open(path, "a", encoding="ascii") as file,
        tqdm(total=len(items), initial=len(found), desc="captioning", unit=" images") as bar,
    ):
        if not file.tell():
            file.write(json.dumps({"made_by": made_by}) + "\n")
        for result in captioner.stream(
            list(waiting),
            on_error=skip,
            batch_size=config.batch_size,
            strategy=config.strategy,
            num_beams=config.num_beams,
            max_new_tokens=config.max_new_tokens,
            max_pixels=config.limit.max_pixels,
        ):
            for image_id in waiting[str(result.image)]:
                found[image_id] = result.captions[0]
                if captioner.clip is clip and result.embedding is not None:
                    embeddings[image_id] = result.embedding
                file.write(json.dumps({"image_id": image_id, "caption": found[image_id]}) + "\n")
            file.flush()
            bar.update()
    return found, skipped, embeddings


def _made_before(path: Path, made_by: dict[str, Any]) -> dict[str, str]:
    """Captions in a file that an earlier run began; a last line that was cut short is taken off it."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        if rows and rows[0]["made_by"] != made_by:
            changed = sorted(key for key in made_by if rows[0]["made_by"].get(key) != made_by[key])
            raise UserError(
                f"{str(path)!r} holds captions of another run (another {', '.join(changed)}): "
                f"give another --out, or delete the file."
            )
        return {str(row["image_id"]): str(row["caption"]) for row in rows[1:]}
    except UserError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise UserError(f"{str(path)!r} was not written by this command: give another --out, or delete it.") from None


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Caption and score a split, and write captions, results and the page to `config.out`.

    Raises:
        UserError: anything in the data or the settings that cannot work, with its cure.
    """
    if (config.model is None) == (config.captions is None):
        raise UserError("give either --model, whose captions are made, or --captions, a file of captions.")
    require_at_least("shown", config.shown, 0)
    require_at_least("batch_size", config.batch_size, 1)
    require_between("resamples", config.resamples, 0, MOST_RESAMPLES)
    require_options(strategy=config.strategy, num_beams=config.num_beams, max_new_tokens=config.max_new_tokens)
    require_place(config.out, directory=True)
    if config.captions is not None:
        require_file(config.captions, "captions")
    start(config.runtime)
    everything = read_dataset(
        config.data, images=config.images, skip_missing=config.skip_missing, format=config.format
    )
    items = [item for item in everything if config.split in ("all", item.split)]
    if not items:
        splits = sorted({item.split for item in everything})
        raise UserError(f"{str(config.data)!r} has no split {config.split!r}: choose one of {', '.join(splits)}, all.")
    if any(item.embedding_row is not None for item in items):
        raise UserError(f"{str(config.data)!r} holds embeddings instead of images: evaluate on the images themselves.")
    unreferenced = [item.image_id for item in items if not item.captions]
    if unreferenced:
        raise UserError(
            f"{len(unreferenced)} of {len(items)} images have no reference caption, the first {unreferenced[0]!r}: "
            f"there is nothing to score them by; use a split that has."
        )
    clip = None
    if config.clip_score:
        from common.clip import load_clip

        clip = load_clip(config.clip_score, device=config.runtime.device)
    config.out.mkdir(parents=True, exist_ok=True)
    skipped: list[str] = []
    embeddings: dict[str, Tensor] = {}
    if config.captions is not None:
        captions = read_captions(config.captions, items)
    else:
        captions, skipped, embeddings = caption_items(items, config, clip)
    if skipped:
        print(f"skipped {len(skipped)} of {len(items)} images:", file=sys.stderr)
        for reason in skipped[:10]:
            print(f"  {printable(reason)}", file=sys.stderr)
    if len(captions) < len(items):
        print(f"{len(items) - len(captions)} of {len(items)} images have no caption and are left out.", file=sys.stderr)
    scored = {item.image_id for item in items}
    training = [
        text for item in everything if item.split == "train" and item.image_id not in scored for text in item.captions
    ]
    found = evaluate_captions(
        captions,
        items,
        clip=clip,
        embeddings=embeddings,
        training=training,
        tokenizer=config.tokenizer,
        resamples=config.resamples,
        seed=config.runtime.seed,
        progress=True,
        max_pixels=config.limit.max_pixels,
    )
    result = {name: value for name, value in asdict(found).items() if name not in ("captions", "per_image")}
    write_json(
        config.out / "results.json",
        {"images": len(found.captions), "skipped": skipped}
        | result
        | {"config": config, "hardware": hardware(), "versions": versions()},
    )
    write_json(
        config.out / "per_image.json",
        {key: {"caption": text} | found.per_image[key] for key, text in found.captions.items()},
    )
    title = f"{config.data.name}, split {config.split}"
    page = evaluation_page(
        found, items, title=f"Captions of {title}", shown=config.shown, max_pixels=config.limit.max_pixels
    )
    page.details("configuration", config)
    page.details("hardware and versions", {"hardware": hardware(), "versions": versions()})
    page.write(config.out / "index.html")
    return found


def rows_of(found: Evaluation) -> list[dict[str, Any]]:
    """The scores times 100 as papers print them, with their intervals, for a table."""
    return [
        {
            "metric": name,
            "score x 100": round(100 * value, 2),
            "95% interval": "–".join(f"{100 * end:.2f}" for end in found.intervals[name])
            if name in found.intervals
            else "",
        }
        for name, value in found.scores.items()
    ]


def domain_rows(found: Evaluation) -> list[dict[str, Any]]:
    """The scores times 100 of nocaps' domains, a row each."""
    return [
        {"domain": name, "images": part["images"]}
        | {metric: round(100 * value, 2) for metric, value in part["scores"].items()}
        for name, part in found.domains.items()
    ]


def evaluation_page(
    found: Evaluation,
    items: Iterable[CaptionedImage],
    *,
    title: str = "Captions",
    shown: int = 300,
    page: Page | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Page:
    """The scores, and the images with captions, references and scores, to be sorted best or worst first.

    Args:
        found: scores.
        items: the images of `found`, perhaps with others.
        title: of the page.
        shown: images: the best half and the worst half by CIDEr; 0 shows all.
        page: a page to add the sections to; None begins one.
        max_pixels: of an image.
    """
    from clipcap.data.images import read_image

    by_id = {item.image_id: item for item in items if item.image_id in found.captions}
    if page is None:
        page = Page(title, f"{len(found.captions)} images, tokenizer {found.tokenizer}")
    page.section("Scores")
    page.table(rows_of(found), caption=f"{len(found.captions)} images; intervals by bootstrap over the images")
    if found.domains:
        page.table(domain_rows(found), caption="By domain; CIDEr's document frequencies are those of all images")
    page.table([found.diversity], caption="Diversity")
    if found.details:
        page.table(list(found.details.items()), columns=["scored with", ""])
    if found.not_measured:
        page.table(list(found.not_measured.items()), columns=["not measured", "reason"])
    ids = list(found.captions)
    note = ""
    if shown and len(ids) > shown:
        ranked = sorted(ids, key=lambda key: found.per_image[key]["CIDEr"])
        chosen = {*ranked[: shown // 2], *ranked[len(ranked) - (shown - shown // 2) :]}
        ids = [key for key in ids if key in chosen]
        note = f"The {shown} images with the lowest and the highest CIDEr of {len(found.captions)}."
    page.section("Images, best or worst first", note)
    front = ["CIDEr"] if "CIDEr" in next(iter(found.per_image.values())) else []
    page.gallery(
        [
            (
                thumbnail(read_image(by_id[key].path, max_pixels=max_pixels, side=320)),
                found.captions[key] or "(empty)",
                [*filter(None, [by_id[key].domain]), *by_id[key].captions],
            )
            for key in ids
        ],
        scores=[{name: found.per_image[key][name] for name in [*front, *_others(found.per_image[key])]} for key in ids],
        width=240,
    )
    return page


def _others(scores: Mapping[str, float]) -> list[str]:
    """The metrics of a card beside CIDEr: BLEU-1 to BLEU-3 say what BLEU-4 says."""
    return [name for name in scores if name not in ("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3")]


def print_scores(found: Evaluation) -> None:
    """The scores as tables on the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    tables: list[tuple[str, list[dict[str, Any]]]] = [
        (f"{len(found.captions)} images, tokenizer {found.tokenizer}", rows_of(found)),
        ("by domain", domain_rows(found)),
        ("diversity", [{"": name, "value": round(value, 3)} for name, value in found.diversity.items()]),
    ]
    for title, rows in tables:
        if not rows:
            continue
        table = Table(title=Text(title), title_justify="left")
        for number, column in enumerate(rows[0]):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*(Text(printable(value)) for value in row.values()))
        console.print(table)
    for name, reason in found.not_measured.items():
        console.print(printable(f"not measured: {name}: {reason}"), markup=False, highlight=False, soft_wrap=True)


def run(config: EvaluateConfig) -> int:
    """`clipcap evaluate`: score, print and say where the page is."""
    print_scores(evaluate(config))
    print(f"page: {config.out / 'index.html'}")
    return 0
