"""The page: driven in a headless Chromium and through gradio's client, with good and bad files, offline."""

from __future__ import annotations

import json
import os
import shutil
import socket
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from clipcap import Captioner
from clipcap.cli import main
from clipcap.serve import STRATEGIES, ServeConfig, Settings, Worker, serving
from common.pretrained import ASSETS

pytest.importorskip("gradio", reason="gradio (extra [serve]) is not installed")
SCENE = ASSETS / "samples" / "scenes" / "test_000.jpg"
PHOTOGRAPH = ASSETS / "samples" / "photographs" / "000000214753.jpg"


@pytest.fixture(scope="module")
def captioner():
    return Captioner.from_pretrained("tiny", device="cpu")


@pytest.fixture(scope="module")
def address(captioner, tmp_path_factory):
    known = {"neighbours": SCENE.parent / "dataset.json", "neighbours_store": tmp_path_factory.mktemp("store")}
    with serving(captioner, ServeConfig(port=0, max_upload=1, max_new_tokens=30, **known)) as running:
        yield running


def post(address, image, query=""):
    """What `/caption` answers."""
    request = urllib.request.Request(f"{address}/caption{query}", data=image.read_bytes(), method="POST")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_a_browser_captions_a_file_and_is_told_of_a_bad_one(address, captioner, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(SCENE.read_bytes()[:200])
    large = tmp_path / "large.jpg"
    large.write_bytes(SCENE.read_bytes() + bytes(2 << 20))
    expected = captioner.caption(SCENE, max_new_tokens=30, num_captions=3)
    asked = set()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.on("request", lambda request: asked.add(urlsplit(request.url)))
        page.goto(address)
        page.locator("input[type=file]").first.set_input_files(SCENE)
        page.locator("#caption").click()
        best = page.locator("#best textarea")
        sync_api.expect(best).to_have_value(expected[0], timeout=60_000)
        sync_api.expect(page.locator("#captions")).to_contain_text(expected[2])
        sync_api.expect(page.locator("#captions")).to_contain_text("%")
        for name in ("#labels", "#neighbours"):
            sync_api.expect(page.locator(name)).to_contain_text("0.")
        page.get_by_text("The prefix, as its nearest tokens").click()
        sync_api.expect(page.locator("#prefix")).to_contain_text("'")
        page.screenshot(path=tmp_path / "page.png", full_page=True)

        page.goto(address)
        page.locator("input[type=file]").first.set_input_files(bad)
        page.locator("#caption").click()
        sync_api.expect(page.get_by_text("bad.jpg").first).to_be_visible(timeout=30_000)
        assert "Traceback" not in page.content()

        page.goto(address)
        page.locator("input[type=file]").first.set_input_files(large)
        sync_api.expect(page.get_by_text("large.jpg").first).to_be_visible(timeout=30_000)
        assert "exceed" in page.content()

        page.set_viewport_size({"width": 420, "height": 900})  # a telephone: nothing beside the image, nothing cut off
        page.goto(address)
        sync_api.expect(page.locator("#best")).to_be_visible(timeout=30_000)
        button, table = page.locator("#caption").bounding_box(), page.locator("#captions").bounding_box()
        assert table["y"] > button["y"] and table["x"] + table["width"] <= 420
        browser.close()
    outside = {url.netloc for url in asked if url.scheme in ("http", "https", "ws", "wss")} - {urlsplit(address).netloc}
    assert not outside


@pytest.mark.slow
def test_the_client_can_ask_several_times_at_once(address, captioner):
    client_api = pytest.importorskip("gradio_client")
    client = client_api.Client(address, verbose=False, analytics_enabled=False)

    def ask(label):
        return client.predict(client_api.handle_file(SCENE), label, 2, 3, 0.9, 1.0, 0, api_name="/caption")

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, STRATEGIES))
    for (best, table, warning, prefix, labels, neighbours), kind in zip(answers, STRATEGIES.values(), strict=True):
        several = 1 if kind == "greedy" else 2
        assert len(table["data"]) == several and table["data"][0][1] == best
        assert len(prefix["data"]) == captioner.model.config.prefix_length
        assert len(table["data"][0]) == 4 and table["data"][0][2].endswith("%")
        assert len(labels["data"]) == len(neighbours["data"]) == 5 and "unlike" not in str(warning)
    assert answers[0][0] == captioner.caption(SCENE, num_beams=3, num_captions=2, max_new_tokens=30)[0]
    with pytest.raises(Exception, match="Guess is not in the list of choices"):
        ask("Guess")


def test_files_above_the_limit_are_refused(address, tmp_path):
    client_api = pytest.importorskip("gradio_client")
    large = tmp_path / "large.jpg"
    large.write_bytes(SCENE.read_bytes() + bytes(2 << 20))
    client = client_api.Client(address, verbose=False, analytics_enabled=False)
    with pytest.raises(Exception, match="(?i)size|413|large"):
        client.predict(client_api.handle_file(large), "Greedy", 1, 1, 0.9, 1.0, 0, api_name="/caption")


def test_programs_get_confidence_labels_and_neighbours(address, captioner):
    found = post(address, SCENE, "?captions=2")
    [expected] = captioner.stream([SCENE], num_captions=2, num_beams=5, max_new_tokens=30, confidence=True)
    assert [one["caption"] for one in found["captions"]] == expected.captions
    assert [one["confidence"] for one in found["captions"]] == pytest.approx(expected.confidences, abs=1e-3)
    assert found["far"] is False and found["neighbours"][0]["similarity"] > 0.999  # the scene itself is among them
    similarities = [one["similarity"] for one in found["labels"]]
    assert len(similarities) == 5 and similarities == sorted(similarities, reverse=True)
    shape = found["labels"][0]["label"].split()[1]
    assert any(shape in text for text in (*expected.captions, found["neighbours"][0]["caption"]))
    assert post(address, PHOTOGRAPH)["far"] is True


def test_the_page_of_a_captioner_without_more_is_as_before(captioner, monkeypatch):
    monkeypatch.setattr(captioner.model, "calibration", None)
    worker = Worker(captioner, 30)
    try:
        found = worker.submit(str(SCENE), Settings(captions=1), name="x").result()
    finally:
        worker.thread.shutdown()
    assert set(found.json) == {"captions"} and set(found.json["captions"][0]) == {"caption", "score"}


def test_a_port_in_use_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert str(port) in error and error.count("\n") == 1


def test_gradio_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert main(["serve"]) == 2
    error = capsys.readouterr().err
    assert "clip-gpt-toolkit[serve]" in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_small_soak_of_good_and_bad_files(address):
    from benchmarks.serve_soak import kinds, soak

    found = soak(address, os.getpid(), total=20, clients=4, every=10)
    assert found["unexpected_answers"] == {} and found["hung"] == 0
    assert found["requests"] == 20 == sum(part["requests"] for part in found["kinds"].values())
    assert set(found["kinds"]) == {kind.name for kind in kinds()} and len(found["curve"]) == 3
    assert 0 < found["p50_seconds"] <= found["p95_seconds"] < 60


def test_names_are_shown_as_they_are():
    from clipcap.serve import as_markdown

    assert as_markdown("out/my_model_v1 *a* `b` <i>") == r"out/my\_model\_v1 \*a\* \`b\` &lt;i&gt;"
