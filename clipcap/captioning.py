"""The command `clipcap caption`: captions of files, directories and URLs as text, JSON, CSV or sidecar files."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from common.checks import (
    UserError,
    printable,
    require_at_least,
    require_between,
    require_one_of,
    require_place,
)
from common.images import ImageLimit
from common.journal import Journal, Row
from common.parts import (
    Part,
    Parts,
    ProcessesConfig,
    digest_of,
    own_part,
    require_no_parts,
    start_processes,
)
from common.pretrained import CAPTION_LANGUAGES
from common.runtime import RuntimeConfig

SHEET_MOST = 100
"""Images on a contact sheet."""
NAMED = 3
"""Pictures named in a line."""
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a cell begins with that a spreadsheet computes."""
OWN = re.compile(rb'image,rank,caption,score|\[\]|\[\s*{\s*"image": |{"image": |[^\n]*\t')
"""How results begin: as CSV, JSON, JSON lines or text."""


@dataclass(frozen=True)
class CaptionConfig:
    """Caption images.

    Files that cannot be read are skipped and named at the end; the exit code is then 2 if none could be read. With
    --out, or sidecar files, an interrupted run resumes where it stopped when the same command is given again.

    With --devices, or --num-nodes and torchrun or srun, each process captions a part of the images, and the one that
    finishes last joins the parts: OUT is the same. Of strategy sample, each draws captions of its own.
    """

    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files, directories that are searched for images, or http(s) URLs."""
    model: str = "photo"
    """Captioner: photo (for photographs) or tiny (for rendered scenes), both packaged; a directory that `clipcap train`
    or `clipcap convert` wrote; or a hub id."""
    language: str | None = None
    """Language of the captions, in place of --model: eng, nld (Dutch) or ita (Italian), each packaged."""
    format: Literal["auto", "text", "json", "jsonl", "csv", "sidecar"] = "auto"
    """Output format; auto goes by the ending of OUT, else text. sidecar writes photo.txt beside photo.jpg, or at the
    same place under the directory OUT; one that exists already is kept and its image left alone."""
    out: Path | None = None
    """File to write instead of standard output (sidecar: directory)."""
    sheet: Path | None = None
    """Also write a contact sheet, the images above their captions (the first 100), to this .png or .jpg."""
    strategy: Literal["beam", "beam_original", "greedy", "sample"] = "beam"
    """Decoding."""
    num_beams: int | None = None
    """Beams of the two beam strategies; 5 where the captioner says nothing else."""
    num_captions: int = 1
    """Captions per image, best first."""
    prompt: str | None = None
    """Text that every caption begins with, such as "a photo of"."""
    max_new_tokens: int | None = None
    """Longest caption in tokens; left out, 67, or as many as the captioner has room for."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens that hold this much probability (nucleus)."""
    temperature: float | None = None
    """Temperature of sampling; 1 where not given."""
    rerank: float | None = None
    """Weight of CLIP's similarity of image and caption beside the mean log-probability, in ranking all beams or
    samples; 0 leaves the order to GPT-2. Left out, the captioner's own (of photo chosen on validation, of others 0)."""
    confidence: Literal["auto", "off"] = "auto"
    """auto: where the captioner is calibrated (photo and tiny are; see `clipcap calibrate`), the probability that a
    caption is right stands behind it, and pictures unlike any in training are named."""
    min_confidence: float = 0.0
    """Give only captions of at least this confidence, from 0 to 1; an image may be left without any."""
    batch_size: int = 0
    """Images captioned at once; 0 lets the memory decide."""
    int8: bool = False
    """Compute GPT-2 in 8-bit integers (CPU only): faster, captions close but not always equal."""
    limit: ImageLimit = field(default_factory=ImageLimit)
    spreadsheet: bool = False
    """Of csv: an apostrophe before texts that begin with =, +, -, @, a tab or a line break, which a spreadsheet would
    take for a formula. Without it the file has exactly the names and captions."""
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def caption(config: CaptionConfig) -> int:
    """Caption images and print or write the result. Returns an exit code."""
    from clipcap.data.images import ImageError, find_images
    from clipcap.decoding import ignored_options, require_options
    from common.progress import Progress
    from common.runtime import own_gpu, resolve_dtype, start

    part = own_part(config.processes)
    if part is None:
        return start_processes(caption, config, config.processes.devices)
    require_at_least("batch_size", config.batch_size, 0)
    require_between("min_confidence", config.min_confidence, 0.0, 1.0)
    if config.min_confidence and config.confidence == "off":
        raise UserError(f"min_confidence is {config.min_confidence} with confidence 'off': leave one of them out.")
    kind = _format(config)
    if config.sheet:
        if config.sheet.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise UserError(f"sheet is {str(config.sheet)!r}: give a name that ends in .png or .jpg.")
        require_place(config.sheet, "sheet")
    if config.out:
        require_place(config.out, directory=kind == "sidecar")
        if kind != "sidecar":
            _require_own(config.out)
    if config.spreadsheet and kind != "csv":
        raise UserError(f"spreadsheet is given with format {kind!r}: use --format csv, or leave it out.")
    partial = config.out.with_name(f"{config.out.name}.partial") if config.out and kind != "sidecar" else None
    _require_joinable(config, kind, part, partial)
    model = _model(config)
    device = own_gpu(start(config.runtime))
    everything = paths = find_images(config.images)
    places = _sidecars(paths, config.out) if kind == "sidecar" else {}
    skipped: list[str] = []

    def skip(error: ImageError) -> None:
        skipped.append(str(error))

    given = {
        "strategy": config.strategy,
        "num_captions": config.num_captions,
        "max_new_tokens": config.max_new_tokens,
        "num_beams": config.num_beams,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "temperature": config.temperature,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    require_options(**options)
    if config.rerank is not None:
        require_at_least("rerank", config.rerank, 0)
    ignored = ignored_options(config.strategy, num_beams=config.num_beams, temperature=config.temperature)
    for line in ignored if part.rank == 0 else ():
        print(line, file=sys.stderr)
    more = {"prompt": config.prompt, "rerank": config.rerank}
    options |= {"seed": config.runtime.seed} | {name: value for name, value in more.items() if value is not None}
    settings = options | {"model": model, "precision": config.runtime.precision, "int8": config.int8}
    settings |= {"confidence": config.confidence}

    def results(remaining: list[Path | str]) -> Iterator[tuple[str, Row]]:
        if not remaining:
            return
        from clipcap.captioner import Captioner

        dtype: Any = "int8" if config.int8 else resolve_dtype(config.runtime.precision)
        captioner = Captioner.from_pretrained(model, device=device, dtype=dtype)
        if config.min_confidence:
            captioner.require_calibration()
        found = captioner.stream(
            remaining,
            confidence=config.confidence == "auto" and captioner.model.calibration is not None,
            on_error=skip,
            batch_size=config.batch_size or None,
            max_pixels=config.limit.max_pixels,
            **options | {"seed": config.runtime.seed + part.rank},
        )
        quiet = len(remaining) < 2 or part.rank > 0
        for item in Progress(found, total=len(remaining), unit=" images", disable=quiet):
            row = {
                "image": str(item.image), "captions": item.captions, "scores": [round(s, 4) for s in item.scores]
            }  # fmt: skip
            if item.confidences:
                row |= {"confidences": [round(p, 4) for p in item.confidences], "far": item.far}
            sure = surest(row, config.min_confidence)
            if item.image in places and sure["captions"]:
                _write_sidecar(places[item.image], sure["captions"])
            if kind == "text" and not config.out:
                write_out(_as_text([sure]))
            yield _key(item.image), row

    parts = None
    if part.world > 1:
        from clipcap.captioner import BATCH_MOST

        batch_size = config.batch_size or BATCH_MOST.get(device.type, BATCH_MOST["cpu"])
        paths = list(part.take(everything, batch_size))
        if partial:
            images = digest_of(map(str, everything))
            parts = Parts(_parts_of(partial), part, settings | {"images": images, "batch_size": batch_size})
            partial = parts.place(part.rank) / "rows.jsonl"
    done: dict[str, Row] = {}
    if not (parts and parts.is_done()):
        with ExitStack() as stack:
            if parts:
                stack.enter_context(parts.own())
            journal = stack.enter_context(Journal(partial, settings, _is_row)) if partial else None
            done = journal.rows if journal else {}
            remaining = [p for p in paths if _key(p) not in done and not (p in places and os.path.exists(places[p]))]
            if kept := len(paths) - len(remaining):
                what = "sidecar files that exist" if places else "images done before"
                print(f"going on after {kept} of {len(paths)} {what}", file=sys.stderr)
            for key, row in results(remaining):
                done[key] = row
                if journal:  # whose rows `done` are
                    journal.add(key, row)
            if parts:
                parts.finish(len(done), skipped)
    if parts is None:
        return _finish(config, kind, model, paths, done, skipped, places, partial)
    with parts.joined() as found:
        if found is None:
            return 0
        done, skipped = {}, [line for mark in found for line in mark["skipped"]]
        for rank, mark in enumerate(found):
            with Journal(parts.place(rank) / "rows.jsonl", settings, _is_row) as one:
                parts.require_rows(rank, len(one.rows), mark["rows"])
                done |= one.rows
        return _finish(config, kind, model, everything, done, skipped, places, None)


def _finish(
    config: CaptionConfig,
    kind: str,
    model: str,
    paths: Sequence[Path | str],
    done: dict[str, Row],
    skipped: list[str],
    places: Mapping[Path | str, Path],
    partial: Path | None,
) -> int:
    """Write what is `done` in the order of `paths`, and say what is not as it should be. Returns an exit code."""
    if places:  # also those of earlier runs, for the sheet
        for path in (p for p in paths if _key(p) not in done and os.path.isfile(places[p])):
            lines = places[path].read_text(encoding="utf-8", errors="replace").splitlines()
            done[_key(path)] = {"image": str(path), "captions": lines or [""], "scores": []}
    everything = [done[key] for key in map(_key, paths) if key in done]
    rows = [row for row in (surest(row, config.min_confidence) for row in everything) if row["captions"]]
    if kind in FORMATS and (config.out or kind != "text"):
        text = _as_csv(rows, spreadsheet=True) if config.spreadsheet else FORMATS[kind](rows)
        if config.out:
            from common.files import write_text

            write_text(config.out, _escape(text, "utf-8"))
            if partial:
                partial.unlink(missing_ok=True)
        else:
            write_out(text)
    if config.sheet and rows:
        _write_sheet(config.sheet, rows, config.limit.max_pixels)
    if far := [printable(row["image"]) for row in everything if row.get("far")]:
        named = ", ".join(far[:NAMED]) + (f" and {len(far) - NAMED} more" if len(far) > NAMED else "")
        print(f"unlike anything captioner {model!r} was trained on, captions may be made up: {named}", file=sys.stderr)
    if unsure := len(everything) - len(rows):
        least = f"confidence {config.min_confidence:g} or more"
        print(f"{unsure} of {len(everything)} images have no caption of {least}", file=sys.stderr)
    if skipped:
        print(f"skipped {len(skipped)} of {len(paths)} images:", file=sys.stderr)
        for message in skipped:
            print(f"  {printable(message)}", file=sys.stderr)
    return 0 if everything or not paths else 2


def _require_joinable(config: CaptionConfig, kind: str, part: Part, partial: Path | None) -> None:
    """Raise UserError when the results of several processes could not be joined, or have begun otherwise."""
    if part.world == 1:
        if partial:
            require_no_parts(_parts_of(partial))
        return
    if kind != "sidecar" and not config.out:
        raise UserError(f"{part.world} processes write at once: give --out, or --format sidecar.")
    if kind == "sidecar" and config.sheet:
        raise UserError(f"{part.world} processes write sidecar files and one sheet: leave out --sheet.")
    if partial and partial.is_file():
        raise UserError(f"{str(partial)!r} is what one process has begun: finish it with one, or delete it.")


def _parts_of(partial: Path) -> Path:
    """Directory of the parts of several processes, beside the file that one process would write them to."""
    return partial.with_suffix(".parts")


def _is_row(row: Row) -> bool:
    """Whether a line of a journal holds what `clipcap caption` writes for an image."""
    match row:
        case {"image": str(), "captions": [_, *_] as captions, "scores": [*scores]}:
            sure = row.get("confidences", scores)
            same = isinstance(sure, list) and len(sure) == len(scores) == len(captions)
            return same and all(isinstance(text, str) for text in captions)
    return False


def surest(row: Row, least: float) -> Row:
    """A row with only those of its captions that are at least so sure; one without confidences as it is."""
    if "confidences" not in row or not least:
        return row
    kept = [number for number, sure in enumerate(row["confidences"]) if sure >= least]
    return row | {name: [row[name][number] for number in kept] for name in ("captions", "scores", "confidences")}


def _model(config: CaptionConfig) -> str:
    """The captioner, that of the language where one is given.

    Raises:
        UserError: an unknown language, or a captioner beside it.
    """
    if config.language is None:
        return config.model
    require_one_of("language", config.language, tuple(CAPTION_LANGUAGES))
    if config.model != CaptionConfig.model:
        raise UserError(f"language {config.language!r} and model {config.model!r} are given together: choose one.")
    return CAPTION_LANGUAGES[config.language]


def _format(config: CaptionConfig) -> str:
    """The output format, "auto" resolved."""
    if config.format == "auto":
        return {".json": "json", ".jsonl": "jsonl", ".csv": "csv"}.get(config.out.suffix if config.out else "", "text")
    return config.format


def _require_own(out: Path) -> None:
    """Raise UserError when a file lies at `out` that does not begin as the results of this command do."""
    if not out.is_file():
        return
    with open(out, "rb") as file:
        beginning = file.read(1 << 16)
    if beginning and not OWN.match(beginning):
        raise UserError(
            f"out {str(out)!r} holds something else than captions that this command wrote: give another name, or move "
            f"it away."
        )


def _key(path: Path | str) -> str:
    """What names an image in a journal: its path, and for a file its size and time, so that a new file is new."""
    try:
        status = os.stat(path) if isinstance(path, Path) else None
    except (OSError, ValueError):  # reading it says what is wrong
        status = None
    return f"{path}" if status is None else f"{path}|{status.st_size}|{status.st_mtime_ns}"


def _sidecars(paths: list[Path | str], out: Path | None) -> dict[Path | str, Path]:
    """Where the text file of each image goes: beside it, or at its place under `out`.

    Raises:
        UserError: two images would share one, or an image is a URL, which has no place.
    """
    files = []
    for path in paths:
        if isinstance(path, str):
            raise UserError(f"image {path!r} is a URL, beside which no sidecar can be: choose another format.")
        files.append(path)
    top = Path(os.path.commonpath([file.absolute().parent for file in files]))
    found: dict[Path | str, Path] = {}
    owners: dict[Path, Path] = {}
    for file in files:
        place = file if out is None else out / file.absolute().relative_to(top)
        place = place.with_suffix(".txt")
        other = owners.setdefault(place.absolute(), file)
        if other.absolute() != file.absolute():
            raise UserError(f"{str(other)!r} and {str(file)!r} would share {str(place)!r}: rename one of them.")
        found[file] = place
    return found


def _write_sidecar(place: Path, captions: list[str]) -> None:
    from common.files import write_text

    write_text(place, "".join(f"{text}\n" for text in captions))


def _write_sheet(path: Path, rows: list[Row], max_pixels: int) -> None:
    """The first SHEET_MOST images above their best captions."""
    from clipcap.data.images import ImageError, read_image
    from common.report import contact_sheet

    pictures, texts = [], []
    for row in rows[:SHEET_MOST]:
        try:
            picture = read_image(row["image"], max_pixels=max_pixels, side=384)
        except ImageError:  # it has gone since
            continue
        picture.thumbnail((384, 384))
        pictures.append(picture)
        sure = f" ({row['confidences'][0]:.2f})" if "confidences" in row else ""
        texts.append(row["captions"][0] + sure)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    contact_sheet(pictures, texts, columns=min(6, max(2, round(len(pictures) ** 0.5)))).save(temporary)
    os.replace(temporary, path)
    if len(rows) > SHEET_MOST:
        print(f"contact sheet: the first {SHEET_MOST} of {len(rows)} images", file=sys.stderr)


def write_out(text: str) -> None:
    """Write to standard output; what its encoding lacks, and bytes of file names that are not UTF-8, as escapes."""
    sys.stdout.write(_escape(text, sys.stdout.encoding or "utf-8"))


def _escape(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _as_text(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        ends = [f"\t{sure:.2f}" for sure in row.get("confidences", [])] or [""] * len(row["captions"])
        for text, end in zip(row["captions"], ends, strict=True):
            lines.append(f"{printable(row['image'])}\t{printable(text)}{end}\n")
    return "".join(lines)


def _as_json(rows: list[Row]) -> str:
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def _as_jsonl(rows: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _as_csv(rows: list[Row], *, spreadsheet: bool = False) -> str:
    def cell(text: str) -> str:
        return f"'{text}" if spreadsheet and text.startswith(FORMULA) else text

    buffer = io.StringIO()
    table = csv.writer(buffer)
    sure = any("confidences" in row for row in rows)
    table.writerow(["image", "rank", "caption", "score", *(["confidence", "far"] if sure else [])])
    for row in rows:
        confidences = row.get("confidences", [""] * len(row["captions"]))
        for rank, (text, score, p) in enumerate(zip(row["captions"], row["scores"], confidences, strict=True), 1):
            more = [p, str(row.get("far", "")).lower()] if sure else []
            table.writerow([cell(row["image"]), rank, cell(text), score, *more])
    return buffer.getvalue()


FORMATS: dict[str, Callable[[list[Row]], str]] = {
    "text": _as_text, "json": _as_json, "jsonl": _as_jsonl, "csv": _as_csv
}  # fmt: skip
