"""Attacks on the page, over real HTTP: files and addresses that a request names, foreign names and sites, floods."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import os
import re
import signal
import socket
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio", reason="gradio (extra [serve]) is not installed")

from benchmarks.serve_soak import png_header
from clipcap import Captioner, guard, serve
from clipcap.guard import NOT_UPLOADED, Guard, Uploads
from clipcap.serve import ServeConfig, serving
from common.pretrained import ASSETS

SCENE = ASSETS / "samples" / "scenes" / "test_000.jpg"
SETTINGS = ["Greedy", 1, 1, 0.9, 1.0, 0]
CALLS = ["/gradio_api/call/caption", "/gradio_api/queue/join"]
META = {"meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def captioner():
    return Captioner.from_pretrained("tiny", device="cpu")


@pytest.fixture(scope="module")
def address(captioner):
    with serving(captioner, ServeConfig(port=0, max_upload=1, max_new_tokens=12)) as running:
        yield urlsplit(running).netloc


def ask(address, method, path, body=None, *, chunked=False, **headers):
    connection = http.client.HTTPConnection(address, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body, named, encode_chunked=chunked)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


def upload(address, *contents, **headers):
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="photo%d.jpg"\r\n\r\n%b\r\n' % part
        for part in enumerate(contents)
    ]
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    return ask(address, "POST", "/gradio_api/upload", b"".join(parts) + b"--x--\r\n", **kind, **headers)


def uploaded(address):
    status, text = upload(address, SCENE.read_bytes())
    assert status == 200
    return json.loads(text)[0]


def call(address, image, *, route=CALLS[0], settings=SETTINGS, **more):
    asked = {"data": [image, *settings], "session_hash": "visit", "fn_index": 0} | more
    return ask(address, "POST", route, json.dumps(asked), Content_Type="application/json")


@pytest.mark.slow
def test_an_upload_is_captioned_over_plain_http(address, captioner):
    path = uploaded(address)
    status, text = call(address, {"path": path}, session_hash=None)
    assert status == 200
    status, text = ask(address, "GET", f"{CALLS[0]}/{json.loads(text)['event_id']}")
    assert "event: complete" in text
    expected = captioner.caption(SCENE, strategy="greedy", max_new_tokens=12)
    assert json.loads(text.split("data: ")[-1])[0] == expected
    assert ask(address, "GET", f"/gradio_api/file={path}")[0] == 200


@pytest.mark.parametrize("route", CALLS)
def test_no_file_of_the_machine_is_opened_and_no_answer_tells_whether_it_exists(address, route, tmp_path):
    folder = Path(uploaded(address)).parents[1]
    link = folder / "link.jpg"
    link.symlink_to(SCENE)
    names = [str(SCENE), str(tmp_path / "none.jpg"), "/etc/passwd", "/etc/none", str(folder), str(link)]
    names += [f"{folder}/../x.jpg", f"file://{SCENE}", os.path.relpath(SCENE), "", "\0", "x" * 5000, 7, None, [], {}]
    answers = {call(address, {"path": name} | meta, route=route) for name in names for meta in ({}, META)}
    assert answers == {(400, json.dumps({"detail": NOT_UPLOADED}, separators=(",", ":")))}
    link.unlink()


@pytest.mark.parametrize("route", CALLS)
def test_no_address_is_fetched_wherever_a_request_names_it(address, route):
    with socket.create_server(("127.0.0.1", 0)) as inner:
        inner.settimeout(0.3)
        url = f"http://127.0.0.1:{inner.getsockname()[1]}/photo.jpg"
        for file in ({"path": url}, {"path": url, "url": url}, {"path": f"/gradio_api/proxy={url}"}, url):
            assert call(address, file | META if isinstance(file, dict) else file, route=route)[0] == 400
        for place in range(len(SETTINGS)):
            settings = SETTINGS.copy()
            settings[place] = {"path": url} | META
            assert call(address, None, route=route, settings=settings)[0] == 400
        for path in (f"/gradio_api/file={url}", f"/gradio_api/proxy={url}", f"/proxy={url}"):
            assert ask(address, "GET", path)[0] == 404
        with pytest.raises(TimeoutError):
            inner.accept()


def test_a_url_beside_an_upload_is_not_passed_on(address):
    with socket.create_server(("127.0.0.1", 0)) as inner:
        inner.settimeout(0.3)
        url = f"http://127.0.0.1:{inner.getsockname()[1]}/photo.jpg"
        status, text = call(address, {"path": uploaded(address), "url": url} | META, session_hash=None)
        assert status == 200
        assert "complete" in ask(address, "GET", f"{CALLS[0]}/{json.loads(text)['event_id']}")[1]
        with pytest.raises(TimeoutError):
            inner.accept()


def test_only_uploads_can_be_read(address):
    folder = Path(uploaded(address)).parents[1]
    names = ["/etc/passwd", "/etc/none", SCENE, folder, f"{folder}/", f"{folder}/../../etc/passwd", "pyproject.toml"]
    names += ["..%2f..%2fetc%2fpasswd", "%00", "https://example.org/x.jpg", "//example.org/x.jpg"]
    answers = {ask(address, "GET", f"/gradio_api/file={name}") for name in names}
    assert {status for status, _ in answers} == {404} and len(answers) == 1


@pytest.mark.parametrize(
    "route",
    "GET /gradio_api/file/etc/passwd;GET /gradio_api/proxy=https://x.hf.space/;POST /gradio_api/component_server;"
    "GET /gradio_api/stream/a/b/1/playlist.m3u8;POST /gradio_api/stream/a;GET /gradio_api/upload_progress?upload_id=a;"
    "GET /monitoring;GET /monitoring/summary;POST /gradio_api/run/caption;POST /gradio_api/api/caption;POST /login;"
    "POST /gradio_api/call/v2/caption;GET /gradio_api/deep_link?session_hash=a;POST /gradio_api/process_recording;"
    "GET /gradio_api/custom_component/1/client/component/index.js;POST /gradio_api/vibe-edit;GET /gradio_api/dev/reload;"
    "GET /gradio_api/vibe-code;GET /gradio_api/queue/status;POST /gradio_api/cancel;GET /gradio_api/runs;"
    "GET /gradio_api/token;GET /pwa_icon;PUT /caption;DELETE /;OPTIONS /caption;GET /gradio_api/openapi.json".split(";"),
)  # fmt: skip
def test_what_the_page_does_not_need_is_off(address, route):
    method, path = route.split()
    assert ask(address, method, path, b"{}" if method == "POST" else None)[0] == 404


def test_the_library_serves_its_own_files_only(address):
    for place in ("assets", "static"):
        assert ask(address, "GET", f"/{place}/../../../../../../../etc/passwd")[0] in (403, 404)
        assert ask(address, "GET", f"/{place}/..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd")[0] in (403, 404)


FOREIGN = [
    "evil.example",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "a@localhost",
    "localhost.",
    "10.1.2.3",
    "",
]


@pytest.mark.parametrize("host", FOREIGN)
def test_a_foreign_name_for_this_machine_is_refused(address, host):
    port = address.split(":")[1]
    for name in (host, f"{host}:{port}"):
        for method, path in (("GET", "/"), ("GET", "/config"), ("POST", "/caption"), ("POST", CALLS[0])):
            assert ask(address, method, path, Host=name)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:7860"])
def test_this_machines_own_names_are_accepted(address, host):
    assert ask(address, "GET", "/config", Host=host)[0] == 200


def sender(own, host, **options):
    """Whether a server that listens on `own` accepts the Host."""
    guarded = Guard(None, None, host=own, max_bytes=1, **options)
    try:
        guarded._check_sender({"type": "http", "path": "/", "headers": [(b"host", host.encode())]})
    except guard.HTTPException:
        return False
    return True


def test_a_server_for_the_network_has_its_names_and_addresses():
    for own in ("0.0.0.0", "::", "192.168.7.7"):
        for host in ("192.168.7.7:7860", "[fe80::1]:7860", "localhost:7860", f"{socket.gethostname()}:7860"):
            assert sender(own, host)
        assert not sender(own, "evil.example:7860")
    assert sender("0.0.0.0", "captions.lan", allow_host=["Captions.lan"])
    assert sender("127.0.0.1", "captions.lan", allow_host=["captions.lan"])
    assert not sender("127.0.0.1", "192.168.7.7")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}, {"Origin": ""},
        {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"},
    ],
)  # fmt: skip
def test_other_sites_can_neither_upload_nor_call(address, headers):
    path = uploaded(address)
    before = set(Path(path).parents[1].rglob("*"))
    assert upload(address, b"foreign", **headers)[0] == 403
    for method, route in (("POST", "/caption"), ("GET", "/config"), ("GET", f"/gradio_api/file={path}"), ("GET", "/")):
        assert ask(address, method, route, **headers)[0] == 403
    for route in CALLS:
        assert ask(address, "POST", route, json.dumps({"data": [{"path": path}, *SETTINGS]}), **headers)[0] == 403
    assert set(Path(path).parents[1].rglob("*")) == before


def test_the_page_itself_may_be_linked_to_and_call(address):
    assert ask(address, "GET", "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Dest="document")[0] == 200
    assert ask(address, "GET", "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Dest="iframe")[0] == 403
    same = {"Origin": f"http://{address}", "Sec_Fetch_Site": "same-origin"}
    assert upload(address, SCENE.read_bytes(), **same)[0] == 200


@pytest.mark.parametrize("route", ["/caption", "/gradio_api/upload"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_above_the_limit_is_refused_whether_or_not_it_says_how_long_it_is(address, route, chunked):
    start = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n' if "upload" in route else b""
    )
    parts = [start, *[bytes(1 << 16)] * 40]
    kind = {"Content-Type": "multipart/form-data; boundary=x"} if start else {}
    status, text = ask(address, "POST", route, iter(parts) if chunked else b"".join(parts), chunked=chunked, **kind)
    assert status == 413 and "maximum allowed size" in text


def test_a_call_is_small_and_of_its_form(address):
    for body in (b"", b"[]", b"7", b"{", b"[" * 20_000, b'{"data": 7}', b'{"data": []}', b'{"data": [null, NaN]}'):
        assert ask(address, "POST", CALLS[0], body)[0] == 400
    assert ask(address, "POST", CALLS[0], b" " * (1 << 17))[0] == 413
    assert call(address, None, session_hash="x" * 65)[0] == 400
    assert call(address, None, session_hash=["x"])[0] == 400


@pytest.mark.parametrize("settings", [["x", 1, 0.9, 1, 0], [1, None, 0.9, 1, 0], [1, 1, 0.9, 1, -1]])
def test_settings_of_a_call_that_cannot_be_are_an_error(address, settings):
    path = uploaded(address)
    status, text = call(address, {"path": path}, settings=["Sampling", *settings], session_hash=None)
    assert status == 200
    status, text = ask(address, "GET", f"{CALLS[0]}/{json.loads(text)['event_id']}")
    assert "event: error" in text


def test_many_small_files_do_not_fill_the_disk(address):
    folder = Path(uploaded(address)).parents[1]
    status, _ = upload(address, *(b"%d" % number for number in range(150)))
    assert status == 200
    newest = uploaded(address)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) <= guard.MOST_UPLOADS + 1 and Path(newest) in files


def test_uploads_are_deleted_in_time(tmp_path):
    uploads = Uploads(tmp_path)
    old, new, empty = tmp_path / "a" / "old.jpg", tmp_path / "new.jpg", tmp_path / "b"
    old.parent.mkdir()
    empty.mkdir()
    for path in (old, new):
        path.write_bytes(b"x")
    past = time.time() - guard.KEPT_SECONDS - 5
    for path in (old, old.parent, empty):
        os.utime(path, (past, past))
    assert str(old) in uploads
    uploads.tidy()
    assert str(old) not in uploads and str(new) in uploads and not empty.exists()
    os.utime(old.parent, (past, past))
    uploads.tidy()
    assert os.listdir(tmp_path) == ["new.jpg"]


def test_more_requests_at_once_than_can_wait_are_refused(address):
    host, port = address.split(":")
    slow = []
    try:
        for _ in range(guard.MOST_POSTS):
            slow.append(socket.create_connection((host, int(port))))
            slow[-1].sendall(f"POST /caption HTTP/1.1\r\nHost: {address}\r\nContent-Length: 9\r\n\r\n".encode())
        deadline = time.monotonic() + 20
        while ask(address, "POST", "/caption", b"x")[0] != 503:
            assert time.monotonic() < deadline
        assert ask(address, "GET", "/config")[0] == 200
    finally:
        for connection in slow:
            connection.close()
    while ask(address, "POST", "/caption", b"x")[0] == 503:
        assert time.monotonic() < deadline


def test_a_body_that_never_ends_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)
    answers = []

    async def app(scope, receive, send):
        await receive()

    async def never():
        await asyncio.sleep(60)

    async def send(message):
        answers.append(message)

    guarded = Guard(app, Uploads(tmp_path), host="127.0.0.1", max_bytes=9)
    scope = {"type": "http", "method": "POST", "path": CALLS[0], "headers": [(b"host", b"localhost")]}
    asyncio.run(guarded(scope, never, send))
    assert answers[0]["status"] == 408 and guarded.posts == guarded.requests == 0


def test_gradio_forgets_answered_and_abandoned_calls(monkeypatch):
    monkeypatch.setattr(serve, "ANSWERS", 2)
    visits = {"answered": set(), "abandoned": {"1"}, "working": {"2"}, "new": {"3"}, "newer": set()}
    queue = SimpleNamespace(
        pending_event_ids_session=visits, event_ids_to_events={"2": 0}, pending_messages_per_session={"abandoned": 0}
    )
    serve._forget(SimpleNamespace(_queue=queue))
    assert list(visits) == ["working", "new", "newer"] and not queue.pending_messages_per_session


def test_what_gradio_remembers_does_not_grow_with_the_calls(address, monkeypatch):
    from gradio.queueing import Queue

    def queues():
        return [item for item in gc.get_objects() if type(item) is Queue and item.pending_event_ids_session]

    monkeypatch.setattr(serve, "ANSWERS", 2)
    others = {id(queue): set(queue.pending_event_ids_session) for queue in queues()}  # of other tests' servers
    for _ in range(4):
        _, text = call(address, None, session_hash=None)
        assert "Choose an image" in ask(address, "GET", f"{CALLS[0]}/{json.loads(text)['event_id']}")[1]
    ask(address, "GET", "/config")
    kept = [queue for queue in queues() if set(queue.pending_event_ids_session) != others.get(id(queue))]
    assert kept
    for queue in kept:
        assert len(queue.event_analytics) <= 1 and len(queue.pending_event_ids_session) <= 2


def caption(address, body, query="", **headers):
    status, text = ask(address, "POST", f"/caption{query}", body, **headers)
    return status, json.loads(text)


def test_one_request_captions_an_image(address, captioner):
    status, found = caption(address, SCENE.read_bytes(), "?captions=2&beams=4")
    assert status == 200
    texts = captioner.caption(SCENE, num_captions=2, num_beams=4, max_new_tokens=12)
    assert [item["caption"] for item in found["captions"]] == texts
    assert found["captions"][0]["score"] >= found["captions"][1]["score"] and found["captions"][0]["score"] < 0
    sampled = [caption(address, SCENE.read_bytes(), "?strategy=sample&seed=7")[1] for _ in range(2)]
    assert sampled[0] == sampled[1] and len(sampled[0]["captions"]) == 3


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("?strategy=guess", "guess"), ("?captions=0", "captions is 0"), ("?captions=6", "at most 5"),
        ("?captions=two", "'two'"), ("?beams=1e3", "1e3"), ("?seed=-1", "seed is -1"), (f"?seed={2**70}", "seed"),
        ("?strategy=sample&top_p=nan", "top_p is nan"), ("?strategy=sample&temperature=0", "temperature is 0"),
        ("?colour=red", "colour"), ("?temperature=0.5", "does not use"), ("?strategy=greedy&captions=2", "does not use"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_named(address, query, named):
    status, found = caption(address, SCENE.read_bytes(), query)
    assert status == 400 and named in found["detail"] and "\n" not in found["detail"]


def test_a_body_that_is_no_image_is_said_to_be_none(address):
    folder = Path(uploaded(address)).parents[1]
    for body in (b"", b"hello" * 50, SCENE.read_bytes()[:300]):
        status, found = caption(address, body)
        assert status == 400 and "cannot be captioned" in found["detail"] and str(folder) not in found["detail"]
    status, found = caption(address, b"--x--", Content_Type="multipart/form-data; boundary=x")
    assert status == 400 and "--data-binary" in found["detail"]
    assert not list(folder.glob("*.sent"))


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(address):
    assert caption(address, png_header(7000, 6000))[0] == 400
    status, found = caption(address, png_header(7000, 6000))
    assert "pixels" in found["detail"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_command_and_deletes_what_was_uploaded(captioner, tmp_path, monkeypatch, capfd, number):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Captioner, "from_pretrained", lambda *_, **__: captioner)
    found, handler = [], signal.getsignal(number)

    def visit(running):
        try:
            found.append(Path(uploaded(running)))
            page = http.client.HTTPConnection(running, timeout=60)
            page.request("GET", "/gradio_api/heartbeat/visit")  # as an open page does
            found.append(page.getresponse().status)
        finally:
            os.kill(os.getpid(), number)

    serving = serve.serving

    @contextmanager
    def visited(*args):
        with serving(*args) as running:
            threading.Thread(target=visit, args=[urlsplit(running).netloc]).start()
            yield running

    monkeypatch.setattr(serve, "serving", visited)
    assert serve.run(ServeConfig(port=0, max_new_tokens=5)) == 0
    path, status = found
    assert path.is_relative_to(tmp_path) and status == 200 and not os.listdir(tmp_path)
    assert "Traceback" not in capfd.readouterr().err and signal.getsignal(number) == handler


@pytest.mark.slow
def test_a_process_that_is_told_to_end_ends_cleanly(forks, tmp_path):
    code = "from clipcap.cli import main\nraise SystemExit(main())"
    running = forks.start(code, "serve", "--port", 0, "--threads", 1, env={"TMPDIR": str(tmp_path)})
    try:
        until = time.monotonic() + 120
        while not (address := re.search(r"http://(\S+)", running.said())):
            assert running.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        path = Path(uploaded(address[1]))
        assert path.is_relative_to(tmp_path) and path.parents[1].stat().st_mode & 0o077 == 0  # nobody else's to read
        os.kill(running.pid, signal.SIGTERM)
        done = running.wait(120)
    finally:
        running.kill()
    assert done.returncode == 0 and done.stderr == "" and not list(tmp_path.glob("clipcap-serve-*"))
