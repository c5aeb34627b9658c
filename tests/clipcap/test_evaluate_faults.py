"""Faults of scoring that users found: captions that are missing, images that cannot be read, Java that nobody wanted."""

import json
import subprocess

import numpy as np
import pytest

from clipcap.evaluation import metrics
from clipcap.evaluation.caption_files import read_captions
from clipcap.evaluation.clip_score import clip_scores
from clipcap.evaluation.evaluate import EvaluateConfig, evaluate, run
from clipcap.evaluation.metrics import METRICS, bootstrap, mean_metric, measure
from clipcap.evaluation.page import evaluation_page
from clipcap.evaluation.scores import evaluate_captions
from clipcap.training.capdec import read_captions as read_text
from common import clip as clip_module
from common.checks import UserError
from common.clip import load_clip

PLAIN = ("BLEU", "ROUGE-L", "CIDEr")


def config(photos, tmp_path, captions, **changes):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps([{"image_id": key, "caption": text} for key, text in captions.items()]))
    settings = {
        "data": photos / "dataset.json", "images": photos, "split": "all", "captions": path, "out": tmp_path / "scores",
        "clip_score": "", "tokenizer": "words", "metrics": PLAIN, "resamples": 20,
    }  # fmt: skip
    return EvaluateConfig(**(settings | changes))


def captions_of(items):
    return {item.image_id: item.captions[number % 2] for number, item in enumerate(items)}


def test_missing_predictions_are_recorded_and_said(items, photos, tmp_path, capsys):
    given = captions_of(items[:9])
    assert run(config(photos, tmp_path, given)) == 0
    out = capsys.readouterr().out
    assert (
        "9 of 12 images" in out and "3 of 12 images have no caption and are left out of the scores, which may be" in out
    )
    result = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert result["images"] == 9 and result["images in the split"] == 12
    assert result["missing"] == [item.image_id for item in items[9:]]
    page = (tmp_path / "scores" / "index.html").read_text()
    assert "9 of 12 images" in page and "3 of 12 images have no caption" in page
    evaluate(config(photos, tmp_path, captions_of(items)))
    result = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert result["images"] == 12 and result["missing"] == []
    assert "have no caption" not in (tmp_path / "scores" / "index.html").read_text()


def test_one_unreadable_image_does_not_end_evaluate_captions(items, photos, clip_directory, tmp_path, monkeypatch):
    clip, options = load_clip(clip_directory, device="cpu"), {"tokenizer": "words", "metrics": PLAIN}
    whole = evaluate_captions(captions_of(items), items, clip=clip, resamples=20, **options)
    monkeypatch.setattr(clip_module, "load_clip", lambda *arguments, **options: clip)
    (photos / "03.png").write_bytes(b"no image")
    found = evaluate(config(photos, tmp_path, captions_of(items), clip_score=str(clip_directory)))
    assert len(found.captions) == 12 and list(found.unread) == ["03.png"]
    assert found.scores["CIDEr"] == whole.scores["CIDEr"] and found.intervals["CIDEr"] == whole.intervals["CIDEr"]
    for name in ("CLIPScore", "RefCLIPScore"):
        rest = [scores[name] for key, scores in whole.per_image.items() if key != "03.png"]
        assert found.scores[name] == pytest.approx(np.mean(rest), abs=1e-6)
        assert np.isnan(found.per_image["03.png"][name]) and not np.isnan(found.intervals[name]).any()
    result = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert "03.png" in result["unread"]["03.png"]
    assert json.loads((tmp_path / "scores" / "per_image.json").read_text())["03.png"]["CLIPScore"] is None
    page = (tmp_path / "scores" / "index.html").read_text()
    assert page.count('class="card"') == 12 and "1 images cannot be read and have no CLIPScore" in page
    for item in items:
        item.path.write_bytes(b"no image")
    found = evaluate_captions(captions_of(items), items, clip=clip, resamples=0, **options)
    assert "CLIPScore" not in found.scores
    assert found.not_measured["CLIPScore"] == "none of the images can be read"


def test_a_score_that_an_image_has_not_does_not_count():
    each = [1.0, float("nan"), 3.0]
    metric = mean_metric(each)
    assert metric.value == 2 and metric.of(np.array([1, 2])) == 3 and np.isnan(metric.of(np.array([1])))
    low, high = bootstrap({"mean": metric}, resamples=200)["mean"]
    assert (low, high) == (1, 3)
    assert bootstrap({"mean": metric}, resamples=5, rows=np.array([1])) == {}
    images = np.array([[1.0, 0.0], [np.nan, np.nan], [-1.0, 0.0]])
    texts = np.array([[1.0, 0.0]] * 3)
    scores, with_references = clip_scores(images, texts, [np.array([[-1.0, 0.0]])] * 3)
    assert scores.tolist() == [2.5, pytest.approx(float("nan"), nan_ok=True), 0]
    assert with_references[[0, 2]].tolist() == [0, 0] and np.isnan(with_references[1])


def test_a_line_separator_in_a_caption_does_not_break_json_lines(items, tmp_path):
    path = tmp_path / "captions.jsonl"
    rows = [
        {"image_id": items[0].image_id, "caption": "one\u2028two\u0085\x1c"},
        {"image_id": "01.jpg", "caption": "b"},
    ]
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    found = read_captions(path, items)
    assert found[items[0].image_id] == rows[0]["caption"] and len(found) == 2
    (tmp_path / "captions.txt").write_text("one\u2028two\nthree\n", encoding="utf-8")
    assert [item.captions for item in read_text(tmp_path / "captions.txt")] == [("one\u2028two",), ("three",)]


def test_java_is_started_only_for_metrics_that_are_wanted(items, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: pytest.fail("a program was started"))
    found = evaluate(config(photos, tmp_path, captions_of(items)))
    assert [name for name in found.scores if name[:4] != "BLEU"] == ["ROUGE-L", "CIDEr", "sacreBLEU"]
    assert found.not_measured["METEOR"] == found.not_measured["SPICE"] == "not asked for (metrics)"
    texts = {item.image_id: item.captions[0] for item in items}
    references = {item.image_id: item.captions for item in items}
    every, _, _ = measure(texts, references, tokenizer="words", metrics=PLAIN)
    one, _, absent = measure(texts, references, tokenizer="words", metrics=("ROUGE-L",))
    assert list(one) == ["ROUGE-L"] and one["ROUGE-L"].value == every["ROUGE-L"].value
    assert set(absent) == {*METRICS} - {"ROUGE-L"}
    with pytest.raises(UserError, match="metrics is 'Rouge'"):
        measure(texts, references, tokenizer="words", metrics=("Rouge",))
    with pytest.raises(UserError, match="metrics is empty: choose of BLEU, METEOR"):
        evaluate(config(photos, tmp_path, texts, metrics=()))
    with pytest.raises(UserError, match="metrics is 'BLEU-4': choose one of BLEU, METEOR"):
        evaluate(config(photos, tmp_path, texts, metrics=("BLEU-4",)))


def test_a_page_without_cider_is_ranked_by_what_there_is(items, no_java):
    found = evaluate_captions(captions_of(items), items, tokenizer="words", metrics=("ROUGE-L",), resamples=0)
    page = evaluation_page(found, items, shown=4).html()
    assert page.count('class="card"') == 4 and "the highest ROUGE-L of 12" in page
    found = evaluate_captions(captions_of(items), items, tokenizer="words", metrics=("METEOR",), resamples=3)
    assert list(found.scores) == ["sacreBLEU"]
    assert evaluation_page(found, items, shown=4).html().count('class="card"') == 4


def test_captions_are_shown_as_they_are_on_the_page(items, monkeypatch):
    texts = captions_of(items) | {items[0].image_id: "a `red` *cube* <b> # one"}
    found = evaluate_captions(texts, items, tokenizer="words", metrics=PLAIN, resamples=0)
    page = evaluation_page(found, items).html()
    assert "<h3>a `red` *cube* &lt;b&gt; # one</h3>" in page and "<code>red" not in page


def test_a_csv_of_captions_is_read_like_a_table(items, tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text('Image ID;Caption\n0;"one; two"\n01.jpg;three, four\n')
    assert read_captions(path, items) == {items[0].image_id: "one; two", items[1].image_id: "three, four"}
    path.write_text("image_id,caption\n0,one, two\n")
    with pytest.raises(UserError, match="line 2 has 3 fields, the header 2"):
        read_captions(path, items)
    path.write_text("picture,words\n0,one\n")
    with pytest.raises(
        UserError, match="has the columns 'picture', 'words': it needs one for the image, such as 'image_id'"
    ):
        read_captions(path, items)
