"""`clipcap evaluate`: captions kept and made once, scores, domains, caption files, and the page in a browser."""

import csv
import dataclasses
import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from clipcap import captioner as captioner_module
from clipcap.cli import main
from clipcap.evaluation.caption_files import read_captions
from clipcap.evaluation.evaluate import EvaluateConfig, evaluate
from clipcap.evaluation.metrics import score_captions
from clipcap.evaluation.page import evaluation_page
from clipcap.evaluation.scores import evaluate_captions
from common import clip as clip_module
from common.checks import UserError
from common.clip import FrozenCLIP

pytestmark = pytest.mark.usefixtures("no_java")


@pytest.fixture
def config(photos, model, clip_directory, tmp_path):
    def make(**changes):
        settings = {
            "data": photos / "dataset.json",
            "images": photos,
            "split": "all",
            "model": str(model),
            "out": tmp_path / "evaluation",
            "clip_score": str(clip_directory),
            "tokenizer": "words",
            "resamples": 50,
            "max_new_tokens": 4,
            "batch_size": 3,
        }
        return EvaluateConfig(**(settings | changes))

    return make


def test_results_page_and_captions(config, items, photos, tmp_path, capfd):
    found = evaluate(config())
    assert len(found.captions) == 12 and found.tokenizer == "words"
    plain = score_captions(found.captions, {item.image_id: item.captions for item in items}, tokenizer="words")
    assert found.scores["CIDEr"] == plain.cider and found.scores["BLEU-4"] == plain.bleu[3]
    assert {"ROUGE-L", "CLIPScore", "RefCLIPScore", "sacreBLEU"} <= set(found.scores)
    for name, (low, high) in found.intervals.items():
        assert low <= high and (low == high or low <= found.scores[name] <= high), name

    result = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert result["images"] == 12 and result["scores"]["CIDEr"] == pytest.approx(plain.cider)
    assert result["config"]["split"] == "all" and result["details"]["CLIPScore's CLIP"]
    assert "novel share" in result["not_measured"] and result["domains"] == {}
    each = json.loads((tmp_path / "evaluation" / "per_image.json").read_text())
    assert [each[key]["CIDEr"] for key in found.captions] == pytest.approx(list(plain.cider_per_image.values()))
    page = (tmp_path / "evaluation" / "index.html").read_text()
    assert page.count('class="card"') == 12 and "http" not in page.replace("http-equiv", "")
    assert evaluate(config()).intervals == found.intervals  # the seed decides
    assert evaluate(config(split="test", out=tmp_path / "other")).diversity["novel share"] >= 0


def test_a_clip_that_captions_and_scores_is_one(config, clip_directory, items, monkeypatch, capfd):
    encoded, loaded = [], []
    encode, load = FrozenCLIP.encode_image_features, clip_module.load_clip

    def count(self, pixels, **options):
        encoded.extend(pixels)
        return encode(self, pixels, **options)

    monkeypatch.setattr(FrozenCLIP, "encode_image_features", count)
    for where in (clip_module, captioner_module):
        monkeypatch.setattr(where, "load_clip", lambda *a, **k: loaded.append(a) or load(*a, **k))
    found = evaluate(config(resamples=0))
    assert len(encoded) == 12 and len(loaded) == 1
    again = evaluate(config(resamples=0))  # its captions were made before, so CLIPScore encodes the images
    assert len(encoded) == 24 and again.scores == pytest.approx(found.scores, abs=1e-6)


def test_captions_are_made_once(config, tmp_path, monkeypatch, capfd):
    first = evaluate(config(clip_score="", resamples=0))
    path = tmp_path / "evaluation" / "captions.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 13
    path.write_text("\n".join(lines[:6]) + "\n" + lines[6][:9])  # interrupted in the middle of a line

    captioned = []
    stream = captioner_module.Captioner.stream

    def count(self, images, **options):
        captioned.extend(images)
        return stream(self, images, **options)

    monkeypatch.setattr(captioner_module.Captioner, "stream", count)
    again = evaluate(config(clip_score="", resamples=0))
    assert len(captioned) == 7 and again.captions == first.captions
    assert sorted(path.read_text().splitlines()) == sorted(lines)
    evaluate(config(clip_score="", resamples=0))
    assert len(captioned) == 7
    with pytest.raises(UserError, match="begun with max_new_tokens 4, now it is 5.*another --out"):
        evaluate(config(clip_score="", max_new_tokens=5))
    path.write_text("hello\n")
    with pytest.raises(UserError, match="not written by this command"):
        evaluate(config(clip_score=""))


def test_other_images_of_the_same_names_get_captions_of_their_own(config, photos, tmp_path, monkeypatch, capfd):
    evaluate(config(clip_score="", resamples=0))
    first, second = sorted(photos.iterdir())[:2]
    Image.open(second).convert("RGB").rotate(90).save(first, format="PNG")
    captioned = []
    stream = captioner_module.Captioner.stream

    def count(self, images, **options):
        captioned.extend(images)
        return stream(self, images, **options)

    monkeypatch.setattr(captioner_module.Captioner, "stream", count)
    evaluate(config(clip_score="", resamples=0))
    assert captioned == [str(first)]


def test_a_layout_that_cannot_be_guessed(config, photos, tmp_path, capfd):
    folder = tmp_path / "folder"
    folder.mkdir()
    (photos / "00.jpg").rename(folder / "00.jpg")
    (folder / "00.txt").write_text("the cat\n")
    (folder / "another.tar").write_bytes(b"")  # for which the folder is taken for shards
    settings = {"data": folder, "images": None, "clip_score": "", "resamples": 0}
    with pytest.raises(UserError, match=r"another\.tar"):
        evaluate(config(**settings))
    assert list(evaluate(config(**settings, format="folder")).captions) == ["00.jpg"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are UTF-8 here")
def test_file_names_that_are_not_utf8(config, photos, tmp_path, capfd):
    name = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / "folder").mkdir()
    (photos / "00.jpg").rename(tmp_path / "folder" / name)
    (tmp_path / "folder" / name).with_suffix(".txt").write_text("the cat\n")
    settings = {"data": tmp_path / "folder", "images": None, "clip_score": "", "resamples": 0}
    found = evaluate(config(**settings))
    assert list(found.captions) == [name]
    rows = [json.loads(line) for line in (tmp_path / "evaluation" / "captions.jsonl").read_text().splitlines()]
    assert rows[1].items() >= {"image_id": name, "caption": found.captions[name]}.items()
    assert evaluate(config(**settings)).captions == found.captions
    path = tmp_path / "captions.json"
    path.write_text('[{"image": "caf\\udce9.jpg", "caption": "half a face \\ud83d"}]')
    assert evaluate(config(**settings | {"model": None, "captions": path})).captions == {name: "half a face \ufffd"}


def test_a_damaged_image_is_skipped_and_named(config, photos, capfd):
    (photos / "03.png").write_bytes((photos / "03.png").read_bytes()[:60])
    found = evaluate(config(resamples=0))
    assert len(found.captions) == 11 and "03.png" not in found.captions
    assert "skipped 1 of 12" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["coco", "stem", "caption.json", "caption.csv", "jsonl", "annotations"])
def test_caption_files(kind, items, photos, tmp_path):
    texts = {item.image_id: f"text {number}" for number, item in enumerate(items)}
    path = tmp_path / f"captions.{kind.split('.')[-1] if '.' in kind or kind == 'jsonl' else 'json'}"
    if kind == "caption.csv":
        with open(path, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "rank", "caption", "score"])
            for item in items:
                table.writerow([item.path, 1, texts[item.image_id], -1.0])
                table.writerow([item.path, 2, "second\nbest", -2.0])
    elif kind == "caption.json":
        path.write_text(
            json.dumps(
                [{"image": str(item.path), "captions": [texts[item.image_id], "b"], "scores": [0, 0]} for item in items]
            )
        )
    else:
        names = {
            "coco": lambda item: int(item.path.stem),
            "stem": lambda item: item.path.stem,
            "jsonl": lambda item: item.image_id,
            "annotations": lambda item: item.path.name,
        }
        rows = [{"image_id": names[kind](item), "caption": texts[item.image_id]} for item in items]
        rows.append({"image_id": "of another data set", "caption": "x"})
        if kind == "jsonl":
            path.write_text("\n".join(map(json.dumps, [{"made_by": {}}, *rows])))
        else:
            path.write_text(json.dumps({"annotations": rows} if kind == "annotations" else rows))
    assert read_captions(path, items) == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image_id": "99", "caption": "x"}]', "'99' is none of them"),
        ('[{"image_id": "0", "caption": "x"}, {"image_id": 0, "caption": "y"}]', "row 2: image '0' occurs a second"),
        ('[{"image_id": "0"}]', "row 1 has no 'image_id' or no 'caption'"),
        ("[3]", "row 1 is no object"),
        ('{"a": 1}', "is no list"),
        ("[{]", "is not JSON, line 1"),
        ("[]", "the file is empty"),
    ],
)
def test_bad_caption_files(content, message, items, tmp_path):
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path / "captions.json", items)


def test_domains_of_nocaps(items):
    captions = {item.image_id: item.captions[number % 2][: 9 + number] for number, item in enumerate(items)}
    domains = ["in-domain", "near-domain", "out-domain"] * 4
    marked = [dataclasses.replace(item, domain=domain) for item, domain in zip(items, domains, strict=True)]
    found = evaluate_captions(captions, marked, tokenizer="words", resamples=20)
    assert list(found.domains) == ["in", "near", "out", "overall"]
    assert [part["images"] for part in found.domains.values()] == [4, 4, 4, 12]
    assert found.domains["overall"]["scores"]["CIDEr"] == pytest.approx(found.scores["CIDEr"])
    near = [found.per_image[item.image_id]["CIDEr"] for item in marked[1::3]]
    assert found.domains["near"]["scores"]["CIDEr"] == pytest.approx(np.mean(near))
    page = evaluation_page(found, marked).html()
    assert "near-domain" in page and "By domain" in page


def test_the_page_shows_the_best_and_the_worst(items):
    captions = {item.image_id: item.captions[1] if number < 3 else "zzz" for number, item in enumerate(items)}
    found = evaluate_captions(captions, items, tokenizer="words", resamples=0)
    page = evaluation_page(found, items, shown=6).html()
    assert page.count('class="card"') == 6
    for item in items[:3]:
        assert page.count(item.captions[1]) >= 2  # the caption and the reference


@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")
def test_the_page_sorts_in_a_browser(items, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    captions = {item.image_id: item.captions[1][: 8 + 3 * (number * 5 % 12)] for number, item in enumerate(items)}
    found = evaluate_captions(captions, items, tokenizer="words", resamples=10)
    path = evaluation_page(found, items).write(tmp_path / "page.html")
    problems = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())

        def shown():
            return page.eval_on_selector_all(".card h3", "cards => cards.map(card => card.textContent)")

        def ranked(metric, sign):
            keys = sorted(captions, key=lambda key: sign * found.per_image[key][metric])
            return [captions[key] for key in keys]

        given = shown()
        assert given == list(captions.values())
        page.click('button:has-text("worst first")')
        assert shown() == ranked("CIDEr", 1) != given
        page.click('button:has-text("best first")')
        assert shown() == ranked("CIDEr", -1)
        page.select_option("select", "ROUGE-L")
        assert shown() == ranked("ROUGE-L", -1)
        page.click('button:has-text("as in the data")')
        assert shown() == given
        assert page.get_attribute('button:has-text("as in the data")', "aria-pressed") == "true"
        loaded = page.eval_on_selector_all("img", "all => all.map(i => i.scrollIntoView() || i.decode().then(() => 1))")
        assert len(loaded) == 12
        browser.close()
    assert problems == []


def test_command(config, photos, model, clip_directory, tmp_path, capsys):
    common = ["--data", str(photos / "dataset.json"), "--images", str(photos), "--out", str(tmp_path / "out")]
    options = ["--model", str(model), "--max-new-tokens", "3", "--clip-score", "", "--resamples", "20"]
    assert main(["evaluate", *common, *options, "--tokenizer", "words"]) == 0
    out = capsys.readouterr().out
    assert "CIDEr" in out and "not measured: CLIPScore" in out and "index.html" in out

    def error(*arguments):
        assert main(["evaluate", *common, *arguments]) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error: ")
        return message

    assert "either --model" in error()
    assert "either --model" in error("--model", "tiny", "--captions", "x.json")
    assert "choose one of test, train, val, all" in error("--model", "tiny", "--split", "dev")
    assert "'x.json' does not exist" in error("--captions", "x.json", "--clip-score", "")
