"""The downloader against a server that the test starts: what comes, what is dropped and why, and what is never asked."""

import contextlib
import gzip
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from clipcap.cli import main
from clipcap.data import download as module
from clipcap.data.download import DownloadConfig, download
from clipcap.data.journal import read_journal, url_key
from clipcap.data.net import Dropped, fetch, is_public
from clipcap.data.readers import read_dataset
from common.checks import UserError


def picture(format="JPEG", size=40):
    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data, format)
    return data.getvalue()


@pytest.fixture
def server():
    asked = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            name = self.path.split("?")[0]
            if name.startswith("/good"):
                return self.answer(200, picture("PNG" if name.endswith("png") else "JPEG"))
            if name == "/busy.jpg" and asked[self.path] < 3:
                return self.answer(503, b"", {"Retry-After": "0"})
            if name == "/busy.jpg":
                return self.answer(200, picture())
            if name == "/always-busy.jpg":
                return self.answer(503, b"")
            if name == "/text.jpg":
                return self.answer(200, b"<html>not found</html>")
            if name == "/cut.jpg":
                return self.answer(200, picture()[:500])
            if name == "/large.jpg":
                return self.answer(200, picture(size=600))
            if name == "/large-unannounced.jpg":
                return self.answer(200, picture(size=600), announce=False)
            if name == "/redirect.jpg":
                return self.answer(302, b"", {"Location": "/good.jpg"})
            if name == "/loop.jpg":
                return self.answer(302, b"", {"Location": "/loop.jpg"})
            if name == "/inward.jpg":
                port = self.server.server_address[1]
                return self.answer(302, b"", {"Location": f"http://127.0.0.2:{port}/good-secret.jpg"})
            if name == "/file.jpg":
                return self.answer(302, b"", {"Location": "file:///etc/passwd"})
            if name == "/slow.jpg":
                time.sleep(3)
            if name.startswith("/drip"):
                return self.drip(name)
            return self.answer(404, b"")

        def drip(self, name):
            """A byte now and then, never late enough to be a timeout by itself."""
            if name == "/drip-headers.jpg":
                self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Long: ")
            else:
                self.send_response(200)
                self.end_headers()
            with contextlib.suppress(ConnectionError):
                for _ in range(60):
                    self.wfile.write(b"x")
                    time.sleep(0.05)

        def answer(self, status, body, headers=(), announce=True):
            self.send_response(status)
            for key, value in dict(headers).items():
                self.send_header(key, value)
            if announce:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    running.url, running.asked = f"http://127.0.0.1:{running.server_address[1]}", asked
    yield running
    running.shutdown()
    running.server_close()


def write_tsv(folder, server, names):
    path = folder / "train.tsv"
    path.write_text("".join(f"caption {n}\t{server.url}{name}\n" for n, name in enumerate(names)))
    return path


def settings(tsv, out, **changes):
    defaults = dict(workers=4, retries=2, backoff=0.01, timeout=10.0, max_megabytes=0.1, allow_private=True)
    return DownloadConfig(tsv=tsv, out=out, **(defaults | changes))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


NAMES = [
    "/good.jpg", "/good.png", "/good.jpg", "/gone.jpg", "/busy.jpg", "/always-busy.jpg", "/text.jpg", "/cut.jpg",
    "/large.jpg", "/large-unannounced.jpg", "/redirect.jpg", "/loop.jpg", "/file.jpg", "/good%20x.jpg?a=1&b=../../up",
]  # fmt: skip


def test_what_comes_what_is_dropped_and_the_next_run(server, tmp_path):
    tsv, out = write_tsv(tmp_path, server, NAMES), tmp_path / "out"
    report = download(settings(tsv, out))
    assert report == json.loads((out / "report.json").read_text())
    assert report["rows"] == 14 and report["urls"] == 13 and report["downloaded"] == 5 and report["captions"] == 6
    assert report["dropped"] == {
        "not an image": 2, "too large": 2, "HTTP 404": 1, "HTTP 503": 1, "too many redirects": 1,
        "not an http(s) URL": 1,
    }  # fmt: skip
    assert report["worth_another_run"] == 1
    assert server.asked["/busy.jpg"] == 3 and server.asked["/always-busy.jpg"] == 3
    assert set(server.asked) == set(NAMES)
    assert {name.split("/")[0] for name in files(tmp_path)} == {"out", "train.tsv"}
    keys = {url_key(server.url + name) for name in NAMES}
    for name in files(out / "images"):
        assert os.path.basename(name).split(".")[0] in keys  # nothing of a URL but its hash is in a name
    for items in (read_dataset(out), read_dataset(tsv, images=out)):
        assert sorted(len(item.captions) for item in items) == [1, 1, 1, 1, 2]
        assert all(Image.open(item.path).size == (40, 40) for item in items)

    before = server.asked.copy()
    assert download(settings(tsv, out)) == report
    assert server.asked - before == {"/always-busy.jpg": 3}  # the only one that may work another time
    first = read_dataset(out)[0].path
    first.unlink()
    assert download(settings(tsv, out)) == report and first.is_file()


def test_a_killed_download_leaves_no_half_files_and_goes_on(server, tmp_path, monkeypatch):
    tsv = write_tsv(tmp_path, server, [f"/good-{n}.jpg" for n in range(30)])
    out = tmp_path / "out"
    replace, done = os.replace, []

    def kill_before_the_tenth(source, target):
        done.append(target)
        if len(done) == 10:
            os.kill(os.getpid(), signal.SIGKILL)  # its bytes are written, its place is not taken
        replace(source, target)

    def victim():
        monkeypatch.setattr(os, "replace", kill_before_the_tenth)
        download(settings(tsv, out, workers=1))

    process = multiprocessing.get_context("fork").Process(target=victim)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    kept = [name for name in files(out / "images") if name.endswith(".jpg")]
    assert len(kept) == 9 and len(files(out / "images")) == 10
    for name in kept:
        Image.open(out / "images" / name).load()
    with open(out / "journal.jsonl", "a") as file:
        file.write('{"key": "half a li')
    server.asked.clear()
    report = download(settings(tsv, out))
    assert report["downloaded"] == 30 and len(files(out / "images")) == 30
    assert len(server.asked) in (21, 22)  # an image whose journal line was lost with the process comes again
    assert len(read_journal(out)) == 30


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.9.9.9", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
     "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1",
     "fec0::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::7f00:1", "64:ff9b::7f00:1",
     "2002:7f00:1::", "2002:a00:1::"],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_that_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]"])
def test_this_machine_is_never_asked_without_allowance(server, tmp_path, host):
    port = server.server_address[1]
    with pytest.raises(Dropped, match="not public|host not found"):
        fetch(f"http://{host}:{port}/good.jpg", timeout=5, max_bytes=10**6)
    tsv = write_tsv(tmp_path, server, ["/good.jpg"])
    assert download(settings(tsv, tmp_path / "out", allow_private=False))["dropped"] == {"address is not public": 1}
    assert not server.asked


def test_a_redirect_inward_is_not_followed(server, monkeypatch):
    # The test's own server stands for a public one; the address it sends to does not.
    monkeypatch.setattr("clipcap.data.net.is_public", lambda address: address == "127.0.0.1")
    options = dict(timeout=5, max_bytes=10**6)
    assert fetch(f"{server.url}/redirect.jpg", **options) == picture()
    with pytest.raises(Dropped, match="address is not public"):
        fetch(f"{server.url}/inward.jpg", **options)
    assert not any("secret" in path for path in server.asked)
    assert fetch(f"{server.url}/inward.jpg", allow_private=True, **options) == picture()


def test_the_connection_goes_to_the_address_that_was_checked(server, monkeypatch):
    """A name server that gives a public address to the check and an inner one to the connection has no way in."""
    resolve, asked = socket.getaddrinfo, []

    def rebinding(host, *rest, **options):
        if host != "rebind.example":
            return resolve(host, *rest, **options)
        asked.append(host)
        return resolve("127.0.0.1" if len(asked) == 1 else "127.0.0.2", *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr("clipcap.data.net.is_public", lambda address: address == "127.0.0.1")
    port = server.server_address[1]
    assert fetch(f"http://rebind.example:{port}/good.jpg", timeout=5, max_bytes=10**6) == picture()
    assert asked == ["rebind.example"]
    with pytest.raises(Dropped, match="not public"):
        fetch(f"http://rebind.example:{port}/good.jpg", timeout=5, max_bytes=10**6)


@pytest.mark.parametrize("url", ["ftp://x.example/a.jpg", "file:///etc/passwd", "http://", "http://[::1", "//x/y"])
def test_only_http_urls(url):
    with pytest.raises(Dropped, match="URL"):
        fetch(url, timeout=5, max_bytes=10)


def test_a_slow_server_is_dropped(server):
    with pytest.raises(Dropped, match="timeout"):
        fetch(f"{server.url}/slow.jpg", timeout=0.5, max_bytes=10**6, allow_private=True)


@pytest.mark.parametrize("name", ["/drip-headers.jpg", "/drip-body.jpg"])
def test_a_try_ends_in_time_however_slowly_the_server_answers(server, name):
    begun = time.monotonic()
    with pytest.raises(Dropped, match="timeout"):
        fetch(f"{server.url}{name}", timeout=0.4, max_bytes=10**6, allow_private=True)
    assert time.monotonic() - begun < 1.5


def test_mistakes_are_one_line(server, tmp_path, capsys):
    tsv = write_tsv(tmp_path, server, ["/gone.jpg"])
    with pytest.raises(UserError, match="workers is 0"):
        download(settings(tsv, tmp_path / "out", workers=0))
    assert main(["download", str(tsv), "--out", str(tmp_path / "out"), "--allow-private", "--retries", "0"]) == 2
    streams = capsys.readouterr()
    assert "none of the 1 images" in streams.err and "dropped 1: HTTP 404" in streams.err
    shutil.rmtree(tmp_path / "out")
    tsv.write_text(f"a\t{server.url}/good.jpg\nno url\n")
    assert main(["download", str(tsv), "--out", str(tmp_path / "out"), "--allow-private"]) == 2
    assert "line 2" in capsys.readouterr().err and not server.asked["/good.jpg"]


@pytest.mark.parametrize(
    "option",
    ["--timeout inf", "--timeout nan", "--timeout 0", "--timeout -1", "--timeout 1e300", "--max-megabytes inf",
     "--max-megabytes nan", "--max-megabytes 0", "--max-megabytes 1e300", "--backoff inf", "--backoff nan",
     "--backoff -1", "--retries -1", "--retries 1000000", "--workers 0", "--workers 1000000", "--limit -1"],
)  # fmt: skip
def test_numbers_that_cannot_be_are_one_line(option, tmp_path, capsys):
    (tmp_path / "a.tsv").write_text("a\thttp://a.example/a.jpg\n")
    assert main(["download", str(tmp_path / "a.tsv"), "--out", str(tmp_path / "out"), *option.split()]) == 2
    name = option.split()[0][2:].replace("-", "_")
    last = capsys.readouterr().err.splitlines()[-1]  # before it, servers of other tests may tell of clients that left
    assert last.startswith(f"error: {name} is ") and not (tmp_path / "out").exists()


def test_what_a_journal_names_outside_is_not_looked_at(server, tmp_path):
    tsv, out = write_tsv(tmp_path, server, ["/good.jpg"]), tmp_path / "out"
    out.mkdir()
    key = url_key(f"{server.url}/good.jpg")
    (tmp_path / "secret.jpg").write_bytes(picture())
    lines = [
        {"key": key, "file": file}
        for file in ("../secret.jpg", str(tmp_path / "secret.jpg"), f"images/{key[:2]}/../../../secret.jpg", 5, ["a"])
    ]
    lines += [{"key": [key], "file": ""}, {"key": key, "dropped": ["x"]}, {"key": "../../up", "file": ""}]
    (out / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "9" * 100_000 + "\n")
    assert read_journal(out) == {}
    assert download(settings(tsv, out))["downloaded"] == 1 and server.asked["/good.jpg"] == 1
    [item] = read_dataset(tsv, images=out)
    assert item.path == out / "images" / key[:2] / f"{key}.jpg"


def test_nothing_of_others_is_deleted_or_written_over(server, tmp_path):
    tsv, out = write_tsv(tmp_path, server, ["/good.jpg"]), tmp_path / "out"
    mine = ["partial/mine.txt", "images/mine.jpg", "images/00/.mine.tmp", "images/00/.mine.jpg.abcdefgh.tmp"]
    for name in mine:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    assert download(settings(tsv, out))["downloaded"] == 1
    assert all((out / name).read_text() == "mine" for name in mine)
    for name in ("captions.jsonl", "report.json"):
        other = tmp_path / f"other-{name}"
        other.mkdir()
        (other / name).write_text("mine")
        with pytest.raises(UserError, match="was not written by this command"):
            download(settings(tsv, other))
        assert (other / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["images", "images/KEY", "captions.jsonl", "journal.jsonl", "report.json"])
def test_nothing_is_written_through_a_link(server, tmp_path, name):
    tsv, out, elsewhere = write_tsv(tmp_path, server, ["/good.jpg"]), tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = out / name.replace("KEY", url_key(f"{server.url}/good.jpg")[:2])
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere / "new" if "." in name else elsewhere)
    with pytest.raises(UserError, match="is a link"):
        download(settings(tsv, out))
    assert not os.listdir(elsewhere)


def test_an_image_is_not_written_over_a_links_target(server, tmp_path):
    tsv, out = write_tsv(tmp_path, server, ["/good.jpg"]), tmp_path / "out"
    key = url_key(f"{server.url}/good.jpg")
    link = out / "images" / key[:2] / f"{key}.jpg"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "mine")
    (tmp_path / "mine").write_text("mine")
    assert download(settings(tsv, out))["dropped"] == {"a link lies in its place": 1}
    assert (tmp_path / "mine").read_text() == "mine"


def test_images_with_too_many_pixels_are_dropped(monkeypatch):
    assert module.image_suffix(picture()) == ".jpg"
    monkeypatch.setattr(module, "MAX_PIXELS", 1599)
    with pytest.raises(Dropped, match="too many pixels"):
        module.image_suffix(picture())


def test_two_in_one_file_and_avif_are_images():
    data = io.BytesIO()
    frame = Image.new("RGB", (8, 8), "red")
    frame.save(data, "MPO", save_all=True, append_images=[frame])
    assert module.image_suffix(data.getvalue()) == ".jpg"
    frame.save(data := io.BytesIO(), "AVIF")
    assert module.image_suffix(data.getvalue()) == ".avif"


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000,
     b"HTTP/1.1 200 " + b"x" * 100_000, b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000],
)  # fmt: skip
def test_huge_headers_are_dropped(head):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(4096)
                connection.sendall(head + b"\r\n\r\n" + b"x" * 10)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(Dropped):
            fetch(f"http://127.0.0.1:{listening.getsockname()[1]}/", timeout=5, max_bytes=100, allow_private=True)


def test_what_is_compressed_on_the_way_is_not_unpacked(tmp_path):
    bomb = gzip.compress(bytes(10_000_000))
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + bomb)

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        assert fetch(url, timeout=5, max_bytes=100_000, allow_private=True) == bomb
