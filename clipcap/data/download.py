"""Download the images of Conceptual Captions: resumable, and from public addresses only."""

from __future__ import annotations

import hashlib
import http.client
import io
import ipaddress
import json
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import tyro
import urllib3
from tqdm import tqdm

from clipcap.data.readers import conceptual_rows
from common.checks import UserError, printable, require_at_least, require_file
from common.files import claimed, whole_file, write_json
from common.images import ImageTooLarge, open_image

SUFFIXES = {
    "JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tiff",
    "AVIF": ".avif",
}  # fmt: skip
MAX_PIXELS = 40_000_000
"""Of an image from a server that nobody chose."""
REDIRECTS = 5
JOURNAL = "journal.jsonl"
JOURNAL_LINE = 1 << 16
_TEMPORARY = re.compile(r"\.[0-9a-f]{40}\.[a-z]+\.\w+\.tmp")
LONGEST_WAIT = 30.0
"""Seconds between two tries, whatever the server asks for."""


@dataclass(frozen=True)
class DownloadConfig:
    """Download the images of a Conceptual Captions file.

    TSV has a caption and a URL in each line, in either order. Started again, the download goes on where it stopped.
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


@dataclass(frozen=True)
class Entry:
    """What became of one URL."""

    file: str = ""
    """Relative to the output directory; empty when it was dropped."""
    dropped: str = ""
    """Why there is no file."""
    again: bool = False
    """It may work another time, so the next run tries it again."""


class Dropped(Exception):
    """Why a URL gives no image."""

    def __init__(self, reason: str, *, again: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.again, self.wait = reason, again, wait


def url_key(url: str) -> str:
    """The name of a URL's image, without its suffix: a hash, so that no URL decides where something is written."""
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _place(key: str, suffix: str) -> str:
    """Where an image goes in the output directory.

    Raises:
        ValueError: not an `url_key`, or not a suffix of `SUFFIXES`: a name that this command never gives.
    """
    if not re.fullmatch("[0-9a-f]{40}", key) or suffix and suffix not in SUFFIXES.values():
        raise ValueError(key)
    return f"images/{key[:2]}/{key}{suffix}"


def read_journal(directory: Path) -> dict[str, Entry]:
    """What became of every URL so far, by `url_key`; empty where nothing was downloaded."""
    path = directory / JOURNAL
    found: dict[str, Entry] = {}
    if path.is_file():
        with open(path, "rb") as file:
            while line := file.readline(JOURNAL_LINE):
                try:
                    row = json.loads(line)
                    key = row.pop("key")
                    entry = Entry(**row)
                    if entry.file in ("", _place(key, Path(entry.file).suffix)) and isinstance(entry.dropped, str):
                        found[key] = entry
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    continue  # the line that a killed run did not finish, or that this command did not write
    return found


def public_address(host: str, port: int, *, allow_private: bool = False) -> str:
    """Resolve a host and return its first address.

    Raises:
        Dropped: it has none, or one that is not public: loopback, private, link-local, multicast, reserved, or one
            of these inside an IPv6 address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Dropped("host not found", again=True) from None
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses if not allow_private else ():
        if not is_public(address):
            raise Dropped("address is not public")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address, and any IPv4 address that it wraps, is on the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    wrapped: list[ipaddress.IPv4Address | None] = []
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.is_site_local:
            return False
        wrapped = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in ipaddress.ip_network("64:ff9b::/96") or int(ip) >> 32 == 0:  # NAT64; IPv4-compatible
            wrapped.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    if any(inner is not None and not is_public(str(inner)) for inner in wrapped):
        return False
    if any(inner is not None for inner in wrapped):
        return True
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def fetch(url: str, *, timeout: float, max_bytes: int, allow_private: bool = False) -> bytes:
    """The bytes at a URL. Every redirect is checked as the URL itself is, and the connection goes to the very address
    that was checked, without a proxy.

    Raises:
        Dropped: anything that keeps it from coming.
    """
    deadline = time.monotonic() + timeout
    for _ in range(REDIRECTS + 1):
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
            host = parts.hostname
        except ValueError:
            raise Dropped("not a URL") from None
        if parts.scheme not in ("http", "https") or not host:
            raise Dropped("not an http(s) URL")
        address = public_address(host, port, allow_private=allow_private)
        target = quote(parts.path or "/", safe="/%:=&+!$,;'()*~@") + (
            f"?{quote(parts.query, safe='/%:=&?+!$,;()*~@')}" if parts.query else ""
        )
        try:
            with _pool(parts.scheme, host, address, port, deadline) as pool:
                response = pool.request(
                    "GET", target, headers=_headers(host, port), redirect=False, retries=False, preload_content=False
                )
                try:
                    if response.status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
                        url = urljoin(url, response.headers["Location"])
                        continue
                    return _body(response, max_bytes)
                finally:
                    response.close()
        except (TimeoutError, urllib3.exceptions.TimeoutError):
            raise Dropped("timeout", again=True) from None
        except (urllib3.exceptions.SSLError, urllib3.exceptions.LocationParseError):
            raise Dropped("no secure connection") from None
        except (urllib3.exceptions.HTTPError, OSError, ValueError):
            raise Dropped("connection failed", again=True) from None
    raise Dropped("too many redirects")


def _pool(scheme: str, host: str, address: str, port: int, deadline: float) -> urllib3.HTTPConnectionPool:
    """Connections to `address` that are secured and addressed as `host`, and give nothing after `deadline`."""
    limit = urllib3.Timeout(total=_left(deadline))
    if scheme == "http":
        pool = urllib3.HTTPConnectionPool(address, port, timeout=limit)
    else:
        pool = urllib3.HTTPSConnectionPool(
            address, port, timeout=limit, cert_reqs="CERT_REQUIRED", server_hostname=host, assert_hostname=host
        )
    base: Any = pool.ConnectionCls

    def respond(sock: socket.socket, *args: Any, **options: Any) -> http.client.HTTPResponse:
        response: Any = http.client.HTTPResponse(sock, *args, **options)
        response.fp = io.BufferedReader(_Bounded(sock, response.fp.detach(), deadline))
        return response

    class Connection(base):  # type: ignore[misc]
        response_class = staticmethod(respond)

        def _new_conn(self) -> socket.socket:
            sock = super()._new_conn()
            sock.settimeout(_left(deadline))  # of the whole handshake
            return sock

    pool.ConnectionCls = Connection
    return pool


class _Bounded(io.RawIOBase):
    """What comes through a socket until a deadline: the socket's own timeout is of each read alone."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, deadline: float) -> None:
        self.sock, self.raw, self.deadline = sock, raw, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.sock.settimeout(_left(self.deadline))
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


def _left(deadline: float) -> float:
    """Seconds to a deadline; TimeoutError after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _headers(host: str, port: int) -> dict[str, str]:
    name = f"[{host}]" if ":" in host else host
    return {
        "Host": name if port in (80, 443) else f"{name}:{port}",
        "User-Agent": "clipcap-download",
        "Accept": "image/*,*/*;q=0.5",
        "Accept-Encoding": "identity",  # nothing that grows when it is unpacked
    }


def _body(response: urllib3.BaseHTTPResponse, max_bytes: int) -> bytes:
    if response.status != 200:
        asked = response.headers.get("Retry-After", "")
        again = response.status in (408, 425, 429) or response.status >= 500
        raise Dropped(f"HTTP {response.status}", again=again, wait=float(asked) if asked.isdigit() else 0.0)
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise Dropped("too large")
    data = bytearray()
    for chunk in response.stream(1 << 16, decode_content=False):
        data += chunk
        if len(data) > max_bytes:
            raise Dropped("too large")
    return bytes(data)


def image_suffix(data: bytes) -> str:
    """The file suffix of an image, which is decoded as a whole.

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
    """Download what is not there yet and return the report, which is also in `report.json`.

    The directory then holds `images/`, named by `url_key`; `captions.jsonl`, which `read_dataset` reads; and
    `journal.jsonl`, from which a stopped run goes on. What failed for good is not tried again; what may work another
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
        if _TEMPORARY.fullmatch(left.name):
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
        with tqdm(total=rows, desc="downloading", unit=" rows") as bar:

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


def _distinct(config: DownloadConfig, bar: tqdm | None = None) -> Iterator[tuple[str, str]]:
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
            name = _place(key, image_suffix(data))
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
    """Write the captions of what is there and the report."""
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
