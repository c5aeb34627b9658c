"""The demo's page, made small and opened in a headless Chromium as on a telephone."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import shlex
import shutil

import pytest
import tyro

import recycle_gpt2.cli
from common.runtime import RuntimeConfig
from experiments.demo.page import Config, Steps, write_demo
from experiments.demo.photographs import PHOTOGRAPHS, credits_of, is_said
from experiments.demo.rendered import spread


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The whole page, of six scenes and a few training steps."""
    with pytest.MonkeyPatch.context() as patch:
        which = shutil.which
        patch.setattr(shutil, "which", lambda name: None if name == "java" else which(name))  # seconds for METEOR
        if importlib.util.find_spec("nerfstudio") is not None:
            from dietnerf.methods import method_config

            def small(method):
                config = method_config(method)
                config.pipeline.model.resolutions, config.pipeline.model.grow_at = (8, 12), (2,)
                return config

            patch.setattr("dietnerf.settings.method_config", small)
        return write_demo(
            Config(out=tmp_path_factory.mktemp("demo"), runtime=RuntimeConfig(device="cpu")),
            images=6,
            scene={"steps": 4, "frames": 2, "size": 16},
            walk={"steps": 4, "frames": 2, "size": 16, "image_size": 240},
            recycling={"tokens": 4000, "brief_tokens": 2000, "documents": 60},
        )


@pytest.mark.slow
def test_the_page_has_every_part_and_says_what_was_run(page):
    text = page.read_text()
    headings = re.findall("<h2[^>]*>(.*?)</h2>", text)
    order = [
        "Captions of photographs",
        "The same photographs, classified without training for it",
        "A room from twenty photographs without poses",
        "English recycled for Dutch",
        "Rendered scenes, where captions can be checked exactly",
        "What a prefix says",
        "Captions in Dutch",
        "Novel views from eight photographs",
        "What ran here",
        "The backbones",
    ]
    if importlib.util.find_spec("nerfstudio") is None:
        order = [heading for heading in order if "eight" not in heading and "twenty" not in heading]
    assert [heading for heading in headings if heading in order] == order
    assert "clipcap caption common/assets/samples/scenes/test_000.jpg --language nld" in text
    results = json.loads((page.parent / "results.json").read_text())
    shown = html.unescape(text)
    if "walk" in results:
        assert "A room from twenty photographs" in text and len(results["walk"]["placed"]) >= 15
        assert results["walk"]["scores"]["psnr"] > 5
    photographs = results["photographs"]
    assert len(photographs["captions"]) == 6 and all(said in shown for said in photographs["captions"].values())
    shares = [f"{share:.0%}" for share in sorted(photographs["shares_said"].values(), reverse=True)]
    assert re.findall(r"<p>(\d+%) of it is in people's captions</p>", shown) == shares  # the best first
    assert shown.count("<p>in people's captions</p>") == photographs["named"]
    assert "photograph 7866247804 on Flickr, CC BY 2.0" in shown
    assert set(results["captions"]) == set(results["dutch"]["captions"]) and len(results["captions"]) == 6
    assert all(step["seconds"] >= 0 for step in results["steps"])
    assert "caption them in Dutch" in [step["step"] for step in results["steps"]]
    assert all(step["step"] in text for step in results["steps"])


def commands(page):
    return [html.unescape(text) for text in re.findall(r'<pre class="command"><code>(.*?)</code>', page.read_text())]


@pytest.mark.slow
def test_every_number_has_its_command(page):
    out, found = page.parent, commands(page)
    expected = [
        "clipcap evaluate --data common/assets/samples/scenes/dataset.json --model tiny --resamples 300",
        "python -m experiments.backbones.evaluate_clip --clip tiny --split test",
        "python -m experiments.demo.recycling",
        "python -m experiments.backbones.train_gpt2 --corpus out/corpus --size small --epochs 4",
        "python -m experiments.backbones.train_gpt2 --corpus out/corpus --size medium --epochs 3",
        f"recycle-gpt2 evaluate tiny tiny-medium --text {out / 'sentence.txt'}",
    ]
    if importlib.util.find_spec("nerfstudio") is not None:
        expected += [
            "dietnerf train common/assets/samples/multiview --num-views 8 --method grid",
            f"dietnerf evaluate {out / 'scene'}",
            "dietnerf consistency common/assets/samples/multiview --views 8",
        ]
    assert not set(expected) - set(found)
    dutch = found.index("clipcap caption common/assets/samples/scenes/test_000.jpg --language nld")
    assert found[dutch + 1] == "python -m experiments.demo"  # which prints the share of all
    for words in map(shlex.split, found):
        if words[:2] == ["python", "-m"]:
            module = importlib.import_module(words[2])
            if hasattr(module, "__path__"):  # a package's command line
                module = importlib.import_module(f"{words[2]}.__main__")
            flat = (tyro.conf.OmitArgPrefixes,) if hasattr(module, "from_command_line") else ()
            tyro.cli(module.Config, args=words[3:], config=flat)


@pytest.mark.slow
def test_the_commands_give_the_numbers_of_the_page(page, root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(root)
    results = json.loads((page.parent / "results.json").read_text())
    of = {words[:2]: list(words[1:]) for words in (tuple(shlex.split(command)) for command in commands(page))}
    scores = tmp_path / "scores.json"
    assert recycle_gpt2.cli.main([*of["recycle-gpt2", "evaluate"], "--out", str(scores)]) == 0
    for row in results["language"]:
        found = json.loads(scores.read_text())["models"][row["model"].removeprefix("gpt2-")]["all"]["perplexity"]
        assert found == pytest.approx(row["perplexity of the sentence, now"], rel=1e-4)
    if importlib.util.find_spec("nerfstudio") is not None:
        import dietnerf.cli

        scored = [*of["dietnerf", "evaluate"], "--out", str(tmp_path / "scene"), "--device", "cpu"]
        assert dietnerf.cli.main(scored) == 0
        found = json.loads((tmp_path / "scene" / "results.json").read_text())["scores"]
        assert found == pytest.approx(results["scene"]["scores"], rel=1e-4)
        assert dietnerf.cli.main([*of["dietnerf", "consistency"], "--out", str(tmp_path), "--device", "cpu"]) == 0
        found = json.loads((tmp_path / "results.json").read_text())["within"]
        assert found == pytest.approx(results["scene"]["similarity_within"], rel=1e-4)


def test_every_photograph_has_its_credit():
    credit = credits_of(PHOTOGRAPHS / "dataset.json")
    assert set(credit) == {path.name for path in PHOTOGRAPHS.glob("*.jpg")}
    assert all(re.fullmatch(r"photograph \d+ on Flickr, CC BY 2\.0", line) for line in credit.values())


def test_names_that_people_said():
    captions = ["Two Dogs on a beach", "a man's hat"]
    assert [is_said(noun, captions) for noun in ("dog", "beach", "man", "hat")] == [True] * 4
    assert not any(is_said(noun, captions) for noun in ("be", "hot dog", "woman"))


@pytest.mark.slow
def test_a_telephone_shows_it_whole_without_errors(page):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    errors, asked = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 390, "height": 844})
        view.on(
            "console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None
        )
        view.on("pageerror", lambda error: errors.append(str(error)))
        view.on("request", lambda request: asked.append(request.url) if not request.url.startswith("data:") else None)
        view.goto(page.as_uri(), wait_until="load")
        broken = view.evaluate(
            "Promise.all([...document.images].map(image => {"
            "image.loading = 'eager'; return image.decode().then(() => null, () => image.alt); }))"  # lazy ones never come
        )
        images = view.evaluate("document.images.length")
        widths = view.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        small = view.evaluate(
            "[...document.querySelectorAll('p, td, h3, figcaption')].filter(e => e.innerText.trim() && "
            "parseFloat(getComputedStyle(e).fontSize) < 11).map(e => e.innerText.slice(0, 40))"
        )
        browser.close()
    assert errors == [] and asked == [page.as_uri()]
    assert images > 20 and [alt for alt in broken if alt is not None] == []
    assert widths[0] <= widths[1] == 390
    assert small == []


@pytest.mark.slow
def test_shown_images_are_spread_over_the_numbers_of_objects():
    counts = {f"{n}{i}": n for n in (1, 2, 3) for i in range(24)}
    chosen = spread(counts, 12)
    assert len(chosen) == 12 and [sum(counts[key] == n for key in chosen) for n in (1, 2, 3)] == [4, 4, 4]
    assert spread({"a": 2, "b": 1}, 12) == ["b", "a"]


@pytest.mark.slow
def test_steps_say_what_comes_next(capsys):
    steps = Steps(["one", "two"])
    steps.next()
    steps.next()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("[1/2]") and first.endswith("one, then two") and second.endswith(" s  two")
    assert [row["step"] for row in steps.table()] == ["one"]
