"""`clipcap serve` under load: good and bad files from several clients; latency, errors by kind, memory over time.

    python -m benchmarks.serve_soak --docs docs/benchmarks

Starts the server with the packaged captioner in a process of its own and asks it over HTTP, as the page does. Every
kind of request has the answer that it must get; any other answer, and none in time, is `unexpected`. Keys of the last
line: `requests`, `unexpected`, `hung`, `seconds`, `p50_seconds` and `p95_seconds` of captions, `memory_growth`
(resident bytes at the end over those after a fifth of the requests; 1 is none), `kinds` with counts and latencies,
`curve` with [requests, MB, open files, threads].
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import requests
from PIL import Image

from benchmarks import parser_of, print_result
from common.checks import UserError, require_at_least, run_command
from common.files import write_json
from common.pretrained import ASSETS
from common.report import plot_lines

SCENES = ASSETS / "samples" / "scenes"
MAX_UPLOAD = 2
"""Megabytes."""
TIMEOUT = 120
OPTIONS = ["Beam search", 1, 5, 0.9, 1.0, 0]


@dataclass(frozen=True)
class Kind:
    """A kind of request."""

    name: str
    content: bytes | None
    """Of the file that is uploaded; None uploads none."""
    expected: str | None = None
    """Pattern of the error that must be answered; None wants a caption."""
    file: str = "photo.png"
    options: tuple[Any, ...] = tuple(OPTIONS)


class Sample(NamedTuple):
    """The server's state."""

    requests: int
    megabytes: float
    """Resident."""
    files: int
    """Open."""
    threads: int


def kinds() -> list[Kind]:
    """What clients send; each as often as the others."""

    def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    scene = (SCENES / "test_000.jpg").read_bytes()
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    large = Image.fromarray(noise).resize((3000, 2250))
    frames = [Image.new("P", (90, 60), i) for i in range(5)]
    cannot = "cannot be captioned"
    return [
        Kind("scene, beam search", scene),
        Kind("scene, greedy", (SCENES / "test_001.jpg").read_bytes(), options=("Greedy", *OPTIONS[1:])),
        Kind("scene, sampling", (SCENES / "test_002.jpg").read_bytes(), options=("Sampling", 5, *OPTIONS[2:])),
        Kind("photograph of 7 megapixels", encoded(large, "JPEG", quality=60)),
        Kind("PNG with alpha", encoded(Image.fromarray(noise).convert("RGBA"), "PNG")),
        Kind("animated GIF", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), file="a.gif"),
        Kind("cut short", scene[:300], cannot, "cut.jpg"),
        Kind("text named .png", b"hello" * 50, cannot),
        Kind("empty", b"", cannot),
        Kind("900 megapixels", png_header(30_000, 30_000), cannot),
        Kind("above the size limit", scene + bytes(MAX_UPLOAD << 20), r"413|(?i:size|large|exceed)"),
        Kind("no file", None, "Choose an image first"),
        Kind("unknown strategy", scene, "not in the list of choices", options=("Guess", *OPTIONS[1:])),
        Kind("left before the answer", scene, "left"),
    ]


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises more pixels than it has."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def ask(address: str, kind: Kind) -> str | None:
    """Send one request; the error that is answered, or None for a caption.

    Raises:
        requests.RequestException: no answer in time, or no server.
    """
    path = None
    if kind.content is not None:
        sent = requests.post(
            f"{address}/gradio_api/upload", files={"files": (kind.file, kind.content)}, timeout=TIMEOUT
        )
        if not sent.ok:
            return f"{sent.status_code} {sent.text[:200]}"
        path = {"path": sent.json()[0], "meta": {"_type": "gradio.FileData"}}
    asked = requests.post(f"{address}/gradio_api/call/caption", json={"data": [path, *kind.options]}, timeout=TIMEOUT)
    if not asked.ok:
        return f"{asked.status_code} {asked.text[:200]}"
    url = f"{address}/gradio_api/call/caption/{asked.json()['event_id']}"
    with requests.get(url, stream=True, timeout=TIMEOUT) as answer:
        if kind.expected == "left":
            return "left"
        event = ""
        for raw in answer.iter_lines():
            name, _, value = raw.decode().partition(": ")
            if name == "event":
                event = value
            elif name == "data" and event == "error":
                return str(json.loads(value))
            elif name == "data" and event == "complete":
                return None if json.loads(value)[0] else "empty caption"
    return "the answer ended without a result"


def observe(process: int, done: int) -> Sample:
    """Memory, open files and threads of a process, from /proc."""
    status = Path(f"/proc/{process}/status").read_text()
    resident, threads = (int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1]) for name in ("VmRSS", "Threads"))  # type: ignore[index]
    return Sample(done, round(resident / 1024, 1), len(os.listdir(f"/proc/{process}/fd")), threads)


def soak(address: str, process: int, *, total: int, clients: int, every: int = 20) -> dict[str, Any]:
    """Send `total` requests of all kinds in turn from `clients` threads and observe the server's process.

    Args:
        address: of the server.
        process: its id.
        total: requests.
        clients: that send at the same time.
        every: how many requests lie between two observations.
    """
    chosen, lock = kinds(), threading.Lock()
    curve, done = [observe(process, 0)], 0
    times: dict[str, list[float]] = {kind.name: [] for kind in chosen}
    unexpected: Counter[str] = Counter()
    hung = 0

    def send(number: int) -> None:
        nonlocal done, hung
        kind = chosen[number % len(chosen)]
        begun, late = time.monotonic(), False
        try:
            error = ask(address, kind)
        except requests.Timeout:
            error, late = "no answer", True
        except requests.RequestException as problem:
            error = type(problem).__name__
        right = error is None if kind.expected is None else error is not None and bool(re.search(kind.expected, error))
        with lock:
            done, hung = done + 1, hung + late
            times[kind.name].append(time.monotonic() - begun)
            if not right:
                unexpected[f"{kind.name}: {error}"] += 1
            if done % every == 0:
                curve.append(observe(process, done))

    begun = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(send, range(total)))
    seconds = time.monotonic() - begun
    captions = [value for kind in chosen if kind.expected is None for value in times[kind.name]]
    fifth = next(sample for sample in curve if sample.requests * 5 >= total or sample is curve[-1])
    return {
        "requests": total,
        "clients": clients,
        "unexpected": sum(unexpected.values()),
        "unexpected_answers": dict(unexpected),
        "hung": hung,
        "seconds": round(seconds, 1),
        "requests_per_second": round(total / seconds, 2),
        "p50_seconds": round(float(np.percentile(captions, 50)), 3),
        "p95_seconds": round(float(np.percentile(captions, 95)), 3),
        "memory_growth": round(curve[-1].megabytes / fifth.megabytes, 4),
        "megabytes": {"start": curve[0].megabytes, "a_fifth": fifth.megabytes, "end": curve[-1].megabytes,
                      "most": max(sample.megabytes for sample in curve)},
        "kinds": {
            name: {
                "requests": len(values),
                "p50_seconds": round(float(np.percentile(values, 50)), 3),
                "p95_seconds": round(float(np.percentile(values, 95)), 3),
            }
            for name, values in times.items()
            if values
        },
        "curve": [list(sample) for sample in curve],
    }  # fmt: skip


@contextmanager
def server(threads: int, log: Path) -> Iterator[tuple[str, int]]:
    """`clipcap serve` in a process of its own, its address and id; it is stopped at the end.

    Raises:
        UserError: it does not come up.
    """
    command = [sys.executable, "-u", "-m", "clipcap.cli", "serve", "--port", "0", "--max-upload", str(MAX_UPLOAD)]
    with open(log, "w") as lines:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(
            [*command, "--threads", str(threads)], stdout=lines, stderr=subprocess.STDOUT, env=environment
        )
        try:
            deadline = time.monotonic() + 300
            while not (found := re.search(r"clipcap is at (http://\S+)", log.read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise UserError(f"clipcap serve did not come up: {log.read_text()[-500:]}")
                time.sleep(0.5)
            yield found[1], process.pid
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> int:
    parser = parser_of(__doc__, quick="56 requests")
    parser.add_argument("--requests", type=int, default=1000, help="requests in all")
    parser.add_argument("--clients", type=int, default=8, help="clients at the same time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the server")
    parser.add_argument("--docs", type=Path, help="directory that gets serve_soak.json and serve_soak.png")
    arguments = parser.parse_args()
    require_at_least("requests", arguments.requests, 1)
    require_at_least("clients", arguments.clients, 1)
    total = 56 if arguments.quick else arguments.requests
    with tempfile.TemporaryDirectory() as folder, server(arguments.threads, Path(folder) / "log") as (address, process):
        result = soak(address, process, total=total, clients=arguments.clients)
    result = print_result({"server_threads": arguments.threads} | result)
    if arguments.docs:
        write_json(arguments.docs / "serve_soak.json", result)
        xs, ys, *_ = zip(*result["curve"], strict=True)
        figure = plot_lines({"": (xs, ys)}, x="requests answered", y="resident memory of the server, MB")
        figure.savefig(arguments.docs / "serve_soak.png", dpi=110)
    return 1 if result["unexpected"] or result["hung"] else 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
