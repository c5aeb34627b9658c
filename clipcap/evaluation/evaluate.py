"""The command `clipcap evaluate`: caption a data set, score the captions, and show them best and worst first."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clipcap.confidence import FILE as CALIBRATION
from clipcap.data.dataset import CaptionedImage, read_dataset
from clipcap.data.members import open_file
from clipcap.data.readers import Format
from clipcap.decoding import require_options
from clipcap.evaluation.caption_files import read_captions
from clipcap.evaluation.metrics import METRICS, MetricName
from clipcap.evaluation.page import evaluation_page, print_scores
from clipcap.evaluation.scores import Evaluation, evaluate_captions
from common.checks import (
    UserError,
    printable,
    require_at_least,
    require_between,
    require_file,
    require_language,
    require_one_of,
    require_place,
)
from common.files import hash_content, write_json
from common.images import ImageLimit
from common.journal import Journal, Row
from common.language import MOST_RESAMPLES
from common.runtime import RuntimeConfig, provenance, start

if TYPE_CHECKING:
    from torch import Tensor

    from common.clip import FrozenCLIP


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a captioner, or captions already made, against reference captions.

    Writes to OUT: captions.jsonl (each caption as soon as it is made; an interrupted run resumes from there),
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
    """Leave out captions whose image is missing and images without a caption, instead of stopping."""
    model: str | None = None
    """Captioner: photo (for photographs) or tiny (for rendered scenes), both packaged; a directory that `clipcap train`
    or `clipcap convert` wrote; or a hub id."""
    captions: Path | None = None
    """Captions already made, instead of a model: what `clipcap caption` wrote as JSON or CSV, or COCO's results format,
    a list of {"image_id", "caption"}; an id is the image's file name, its stem, or the number at the stem's end."""
    out: Path = Path("out/evaluation")
    """Where captions, scores and the page go."""
    clip_score: str = "photo"
    """Encoder of CLIPScore, with a text tower: photo, tiny, a Hugging Face id or directory, or
    open_clip:ARCH/TAG-or-path; empty leaves it out."""
    tokenizer: Literal["auto", "ptb", "words"] = "auto"
    """ptb (English; needs Java, as the published scores), words (a plain rule for any script), or auto: ptb for English
    where Java is installed."""
    language: str = "en"
    """Code of the captions' language, such as hi or zh; METEOR and SPICE are English's and left out for others."""
    metrics: tuple[MetricName, ...] = METRICS
    """Scores against references. METEOR and SPICE each start Java, and so does the tokenizer ptb."""
    resamples: int = 1000
    """Resamples of the images for the 95% intervals; 0 leaves them out."""
    shown: int = 300
    """Images on the page: the best half and the worst half by CIDEr; 0 shows all."""
    strategy: Literal["beam", "beam_original", "greedy"] = "beam"
    """Decoding, with a model."""
    num_beams: int = 5
    """Beams, with a model."""
    rerank: float | None = None
    """Weight of CLIP's similarity in ranking the beams, with a model, as `clipcap caption` has it."""
    max_new_tokens: int | None = None
    """Longest caption in tokens, with a model; left out, 67, or as many as the captioner has room for."""
    batch_size: int = 16
    """Images captioned at once."""
    limit: ImageLimit = field(default_factory=ImageLimit)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def captioner_fingerprint(model: str) -> str:
    """What a captioner is known by: its name, or a hash of what is in its directory."""
    from clipcap.model import PACKAGED

    directory = Path(PACKAGED.get(model, Path(model).expanduser()))
    if not directory.is_dir():
        return model
    weights = sorted(file for file in directory.glob("*.safetensors") if file.name != CALIBRATION)
    return _hash([*weights, require_file(directory / "config.json", "captioner")])


def _hash(files: Sequence[Path]) -> str:
    """Of the content of files, one after another."""
    digest = hashlib.sha256()
    for file in files:
        with open_file(file) as content:
            hash_content(content, digest)
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
    from clipcap.captioner import Captioner
    from clipcap.data.images import ImageError
    from common.progress import Progress
    from common.runtime import resolve_dtype

    assert config.model is not None
    path = config.out / "captions.jsonl"
    made_by = {
        "model": captioner_fingerprint(config.model),
        "strategy": config.strategy,
        "num_beams": config.num_beams,
        **({} if config.rerank is None else {"rerank": config.rerank}),
        "max_new_tokens": config.max_new_tokens,
        "precision": config.runtime.precision,
    }
    cure = "give another --out, or delete it"
    with Journal(path, made_by, _is_row, cure=cure) as journal:
        keys = {item.image_id: f"{item.image_id}|{_content(item.path)}" for item in items}
        found = {name: str(journal.rows[key]["caption"]) for name, key in keys.items() if key in journal.rows}
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
        with Progress(total=len(items), initial=len(found), desc="captioning", unit=" images") as bar:
            for result in captioner.stream(
                list(waiting),
                on_error=skip,
                batch_size=config.batch_size,
                strategy=config.strategy,
                num_beams=config.num_beams,
                rerank=config.rerank,
                **_length(config),
                max_pixels=config.limit.max_pixels,
            ):
                for image_id in waiting[str(result.image)]:
                    found[image_id] = result.captions[0]
                    if captioner.clip is clip and result.embedding is not None:
                        embeddings[image_id] = result.embedding
                    journal.add(keys[image_id], {"image_id": image_id, "caption": found[image_id]})
                bar.update()
    return found, skipped, embeddings


def _length(config: EvaluateConfig) -> dict[str, Any]:
    """The longest caption, where one was asked for."""
    return {} if config.max_new_tokens is None else {"max_new_tokens": config.max_new_tokens}


def _is_row(row: Row) -> bool:
    return isinstance(row.get("image_id"), str) and isinstance(row.get("caption"), str)


def _content(path: Path) -> str:
    """What tells an image from another of the same name: a hash of the file; of a URL, or one that is missing, it."""
    try:
        return _hash([path])[:20]
    except (OSError, ValueError):  # reading it says what is wrong
        return str(path)


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Caption and score a split, and write captions, results and the page to `config.out`.

    Raises:
        UserError: anything in the data or the settings that cannot work, with its cure.
    """
    if (config.model is None) == (config.captions is None):
        raise UserError("give either --model, whose captions are made, or --captions, a file of captions.")
    if not config.metrics:
        raise UserError(f"metrics is empty: choose of {', '.join(METRICS)}.")
    for metric in config.metrics:
        require_one_of("metrics", metric, METRICS)
    require_at_least("shown", config.shown, 0)
    require_at_least("batch_size", config.batch_size, 1)
    require_between("resamples", config.resamples, 0, MOST_RESAMPLES)
    require_language(config.language)
    if config.rerank is not None:
        require_at_least("rerank", config.rerank, 0)
    require_options(strategy=config.strategy, num_beams=config.num_beams, **_length(config))
    require_place(config.out, directory=True)
    if config.captions is not None:
        require_file(config.captions, "captions")
    start(config.runtime)
    everything = read_dataset(config.data, images=config.images, skip_missing=config.skip_missing, format=config.format)
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
        clip.require_text("--clip-score")
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
        metrics=config.metrics,
        language=config.language,
        resamples=config.resamples,
        seed=config.runtime.seed,
        progress=True,
        max_pixels=config.limit.max_pixels,
    )
    result = {name: value for name, value in asdict(found).items() if name not in ("captions", "per_image")}
    write_json(
        config.out / "results.json",
        {"images": len(found.captions), "images in the split": len(items), "skipped": skipped}
        | result
        | {"config": config, **provenance()},
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
    page.details("hardware and versions", provenance())
    page.write(config.out / "index.html")
    return found


def run(config: EvaluateConfig) -> int:
    """`clipcap evaluate`: score, print and say where the page is."""
    print_scores(evaluate(config))
    print(f"page: {config.out / 'index.html'}")
    return 0
