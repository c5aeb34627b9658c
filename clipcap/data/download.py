"""Download the images of Conceptual Captions: resumable, and from public addresses only."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from clipcap.data.journal import JOURNAL, SUFFIXES, TEMPORARY, Entry, place_of, read_journal, url_key
from clipcap.data.net import Dropped, fetch
from clipcap.data.readers.conceptual import conceptual_rows
from common.checks import UserError, printable, require_at_least, require_file
from common.files import claimed, whole_file, write_json
from common.images import ImageTooLarge, open_image
from common.progress import Progress

MAX_PIXELS = 40_000_000
"""Of an image from a server that nobody chose."""
LONGEST_WAIT = 30.0
"""Seconds between two tries, whatever the server asks for."""


@dataclass(frozen=True)
class DownloadConfig:
    """Download the images of a Conceptual Captions file.

    TSV has a caption and a URL in each line, in either order. Started again, the download resumes where it stopped.
    Afterwards OUT is a data set by itself: `clipcap train --data OUT`.
    """

    tsv: tyro.conf.Positional[Path]
    """Conceptual Captions' TSV file (CC3M or CC12M)."""
    out: Path
    """Directory of the images, the captions and the report; nothing is written anywhere else."""
    workers: int = 16
    """Downloads at the same time."""
    retries: int = 3
    """More tries after a server is busy or the connection fails, each after a longer wait."""
    backoff: float = 1.0
    """Seconds before the first of those; every next wait is twice as long."""
    timeout: float = 20.0
    """Longest time for one try, in seconds, however slowly a server answers."""
    max_megabytes: float = 20.0
    """Largest file; a larger one is dropped."""
    limit: int = 0
    """Images to stop after, when not 0."""
    allow_private: bool = False
    """Also take addresses that are not public (this machine, a local network). For your own servers only: whoever
    wrote the file could make this machine ask any server that it can reach."""


RANGES = {
    "workers": (1, 1000), "retries": (0, 100), "backoff": (0, 3600), "timeout": (0.001, 3600),
    "max_megabytes": (0.001, 1000),
}  # fmt: skip
"""Smallest and largest value of each number."""


def image_suffix(data: bytes) -> str:
    """The file suffix of an image, which is decoded in full.

    Raises:
        Dropped: it is none, is cut short, or has too many pixels.
    """
    try:
        with open_image(io.BytesIO(data), "image", max_pixels=MAX_PIXELS) as image:
            image.load()
            return SUFFIXES[image.format or ""]
    except ImageTooLarge:
        raise Dropped("too many pixels") from None
    except (UserError, KeyError):
        raise Dropped("not an image") from None


def download(config: DownloadConfig) -> dict[str, object]:
    """Download what is missing and return the report, which is also in `report.json`.

    The directory then holds `images/`, named by `url_key`; `captions.jsonl`, which `read_dataset` reads; and
    `journal.jsonl`, from which a stopped run resumes. What failed for good is not tried again; what may work another
    time (a busy server, a timeout) is.

    Raises:
        UserError: a row is not a caption and a URL (its line is named), or a setting cannot work.
    """
    require_at_least("limit", config.limit, 0)
    for name, (least, most) in RANGES.items():
        if not least <= getattr(config, name) <= most:  # also NaN
            raise UserError(f"{name} is {getattr(config, name)}: use a number from {least:g} to {most:g}.")
    require_file(config.tsv, "caption file")
    rows = sum(1 for _ in conceptual_rows(config.tsv))  # all lines are checked before the first download
    with claimed(config.out):
        _require_own(config.out)
        return _download(config, rows)


def _require_own(directory: Path) -> None:
    """Make `images/`, without what a killed run had begun to write there.

    Raises:
        UserError: files would be written through a link, or over files that this command did not write.
    """
    images, results = directory / "images", [directory / name for name in ("captions.jsonl", "report.json")]
    images.mkdir(exist_ok=True)
    for place in (directory / JOURNAL, *results, images, *(images / f"{number:02x}" for number in range(256))):
        if place.is_symlink():
            raise UserError(f"{str(place)!r} is a link, through which would be written: move it away.")
    for place in results:
        if place.exists() and not (directory / JOURNAL).exists():
            raise UserError(f"{str(place)!r} was not written by this command: move it away, or give another --out.")
    for left in images.glob("[0-9a-f][0-9a-f]/.*.tmp"):
        if TEMPORARY.fullmatch(left.name):
            left.unlink()


def _download(config: DownloadConfig, rows: int) -> dict[str, object]:
    journal = {key: entry for key, entry in read_journal(config.out).items() if not entry.again}
    for key in [k for k, entry in journal.items() if entry.file and not (config.out / entry.file).is_file()]:
        del journal[key]  # the image was deleted since
    path = config.out / JOURNAL
    stop = threading.Event()
    with open(path, "a", encoding="utf-8") as file, ThreadPoolExecutor(config.workers) as executor:
        file.write("\n")  # the last line of a killed run may have no end
        running: dict[Future[Entry], str] = {}
        with Progress(total=rows, desc="downloading", unit=" rows") as bar:

            def finish(least: int) -> None:
                while len(running) > least:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        key, entry = running.pop(future), future.result()
                        journal[key] = entry
                        file.write(json.dumps({"key": key, **asdict(entry)}) + "\n")
                        file.flush()

            try:
                for key, url in _distinct(config, bar):
                    if key not in journal:
                        finish(2 * config.workers - 1)  # a bounded queue: the file may have millions of rows
                        running[executor.submit(_save, url, key, config, stop)] = key
                finish(0)
            except BaseException:
                stop.set()
                executor.shutdown(wait=False, cancel_futures=True)
                raise
    return _conclude(config, rows, journal)


def _distinct(config: DownloadConfig, bar: Progress | None = None) -> Iterator[tuple[str, str]]:
    """Every URL once, as (key, URL), up to the limit."""
    seen: set[str] = set()
    for _, _, url in conceptual_rows(config.tsv):
        if bar is not None:
            bar.update()
        key = url_key(url)
        if key not in seen:
            if config.limit and len(seen) == config.limit:
                return
            seen.add(key)
            yield key, url


def _save(url: str, key: str, config: DownloadConfig, stop: threading.Event) -> Entry:
    """Download one image into its place; a file is there whole or not at all."""
    for attempt in range(config.retries + 1):
        try:
            data = fetch(
                url,
                timeout=config.timeout,
                max_bytes=int(config.max_megabytes * 1e6),
                allow_private=config.allow_private,
            )
            name = place_of(key, image_suffix(data))
        except Dropped as error:
            dropped = error
            if not error.again or attempt == config.retries:
                break
            if stop.wait(min(max(config.backoff * 2**attempt, error.wait), LONGEST_WAIT)):
                break
            continue
        if (config.out / name).is_symlink():  # which `whole_file` would follow
            return Entry(dropped="a link lies in its place", again=True)
        with whole_file(config.out / name, sync=False) as file:
            file.write(data)
        return Entry(file=name)
    return Entry(dropped=dropped.reason, again=dropped.again)


def _conclude(config: DownloadConfig, rows: int, journal: dict[str, Entry]) -> dict[str, object]:
    """Write the captions of what exists and the report."""
    captions = 0
    with whole_file(config.out / "captions.jsonl", "w", encoding="utf-8") as file:
        for _, caption, url in conceptual_rows(config.tsv):
            entry = journal.get(url_key(url))
            if entry is not None and entry.file:
                file.write(json.dumps({"file_name": entry.file, "caption": caption}, ensure_ascii=False) + "\n")
                captions += 1
    entries = [journal[key] for key, _ in _distinct(config) if key in journal]
    report: dict[str, object] = {
        "source": config.tsv.name,
        "rows": rows,
        "urls": len(entries),
        "downloaded": sum(bool(entry.file) for entry in entries),
        "captions": captions,
        "dropped": dict(Counter(entry.dropped for entry in entries if not entry.file).most_common()),
        "worth_another_run": sum(entry.again for entry in entries),
    }
    write_json(config.out / "report.json", report)
    return report


def run(config: DownloadConfig) -> int:
    """`clipcap download`: download and say what came and what did not."""
    report = download(config)
    print(f"{report['downloaded']} of {report['urls']} images are in {config.out}; the report is report.json there.")
    dropped = report["dropped"]
    assert isinstance(dropped, dict)
    for reason, count in dropped.items():
        print(f"  dropped {count}: {printable(reason)}", file=sys.stderr)
    if not report["downloaded"]:
        raise UserError(f"none of the {report['urls']} images of {str(config.tsv)!r} could be downloaded.")
    return 0
