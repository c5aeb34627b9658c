"""Confidence: scores beside naive formulas, laws of the distance, a calibration learned, saved and shown."""

import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from clipcap import Captioner, ClipCapModel
from clipcap.calibrate import fit, rarity, right_captions, share_said
from clipcap.captioning import FORMATS, surest
from clipcap.cli import main
from clipcap.confidence import FILE, SCORES, Calibration, Ground, Judgement, caption_scores
from clipcap.data.dataset import CaptionedImage, read_dataset
from clipcap.data.images import read_image
from clipcap.decoding import decode
from clipcap.evaluation.metrics import score_captions
from clipcap.ranking import WEIGHTS
from clipcap.scoring import caption_nats
from common.checks import UserError
from common.pretrained import ASSETS

SAMPLES = ASSETS / "samples"
SCENE = SAMPLES / "scenes" / "test_000.jpg"
PHOTOGRAPH = SAMPLES / "photographs" / "000000214753.jpg"


@pytest.fixture(scope="module")
def tiny():
    return Captioner.from_pretrained("tiny", device="cpu")


@pytest.fixture
def calibration():
    rng = torch.Generator().manual_seed(0)
    ground = Ground(torch.rand(6, generator=rng), torch.eye(6)[:2], 0.5)
    prefix = torch.rand(3, 4, generator=rng)
    return Calibration(prefix, ground, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), -0.25, {"right": 0.4})


def test_what_people_said_too_is_weighed_by_rarity():
    documents = [["a dog runs", "a dog"], ["a cat"], ["a dog sits"], ["a cat runs"]]
    weights = rarity(documents)
    assert weights["a"] == 0 and weights["dog"] == weights["cat"] == pytest.approx(math.log(2))
    assert weights["sits"] == pytest.approx(math.log(4))
    assert share_said("a dog sits", ["a dog"], weights) == pytest.approx(math.log(2) / (math.log(2) + math.log(4)))
    assert share_said("a dog", ["the dog runs"], weights) == 1
    assert share_said("a unicorn", ["a dog"], weights) == 0 == share_said("", ["a dog"], weights)
    assert share_said("dog unicorn", ["a dog"], weights) == pytest.approx(1 / 3)  # as rare as the rarest: log 4


def test_captions_are_right_when_half_of_them_was_said(tmp_path):
    texts = [("A dog runs.", "a dog"), ("a cat",), ("a horse",), ("a cow",)]
    items = [CaptionedImage(str(row), tmp_path / "x", captions, "val") for row, captions in enumerate(texts)]
    found = right_captions([["a dog", "A dog flies", "a bird flies"], ["a cat"]], items)
    assert found == [[True, True, False], [True]]


def test_distance_is_what_the_principal_components_leave():
    rng = np.random.default_rng(0)
    plane = np.zeros((400, 10), np.float32)
    plane[:, :3] = rng.normal(size=(400, 3)) * [3, 2, 1]
    training = torch.from_numpy(plane + 5)
    ground = Ground.fit(training, training + 0.01 * torch.randn(training.shape, generator=torch.manual_seed(0)))
    assert ground.components.shape == (5, 10)
    torch.testing.assert_close(ground.components @ ground.components.T, torch.eye(5), atol=1e-5, rtol=0)
    assert ground.distance(training).max() < 1e-4 < ground.limit < 0.1
    beside = training[:1].repeat(2, 1)
    off = torch.zeros(10)
    off[9] = 2.0
    off -= (ground.components[3:] @ off) @ ground.components[3:]  # components beyond the plane are arbitrary
    torch.testing.assert_close(ground.distance(beside + off), off.norm().expand(2), atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="1 training and 0 held-out"):
        Ground.fit(training[:1], training[:0])


@torch.inference_mode()
def test_nats_of_captions_are_those_of_the_naive_loop(tiny):
    prefix = tiny.model.prefix(tiny.embed([read_image(SCENE)]))
    captions = [tiny._ids("a red cube"), tiny._ids("two large metal balls beside a star")]
    found = caption_nats(tiny.model, prefix.expand(2, -1, -1), captions)
    for row, total in zip(captions, found, strict=True):
        naive = 0.0
        for place, token in enumerate(row):
            before = tiny.model.gpt2.get_input_embeddings()(torch.tensor([row[:place]], dtype=torch.long))
            logits = tiny.model.gpt2(inputs_embeds=torch.cat([prefix, before], dim=1)).logits[0, -1]
            naive += logits.log_softmax(0)[token].item()
        assert total.item() == pytest.approx(naive, abs=1e-3)


@torch.inference_mode()
def test_scores_beside_their_definitions(tiny):
    images = [read_image(SCENE), read_image(PHOTOGRAPH)]
    features = tiny.features(tiny.clip.preprocess(images))
    prefixes = tiny.model.prefix(features.embedding)
    captions = decode(tiny.model, features.embedding, num_captions=2)
    blank = prefixes.mean(0)
    ground = Ground(torch.zeros(128), torch.eye(128)[:4], 2.0)
    found = caption_scores(tiny, features, prefixes, captions, blank, ground)
    assert [rows.shape for rows in found] == [(2, len(SCORES))] * 2
    for image, several in enumerate(captions):
        pooled = torch.nn.functional.normalize(features.patches[image].mean(0), dim=0)
        for row, caption in zip(found[image], several, strict=True):
            ids = [list(caption.token_ids)]
            seen, unseen = (
                caption_nats(tiny.model, p[None], ids).item() / len(ids[0]) for p in (prefixes[image], blank)
            )
            words = tiny.clip.encode_texts([tiny.text(caption)])
            similarity = torch.nn.functional.cosine_similarity(words, features.embedding[image][None]).item()
            expected = [seen, seen - unseen, pooled[4:].norm().item() / 2, similarity]
            torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0)
            assert caption.score == pytest.approx(seen, abs=1e-3)  # of beam search


def test_a_regression_finds_which_score_tells():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(size=(600, 3)) * [1, 5, 0.1] + [3, 0, 1])
    chance = 1 / (1 + np.exp(-(2 * (scores[:, 0].numpy() - 3))))
    right = rng.random(600) < chance
    weights, bias, quality = fit(scores, right, [row // 3 for row in range(600)])
    found = torch.sigmoid(scores @ weights + bias).numpy()
    assert abs(found - chance).mean() < 0.06 and abs(found.mean() - right.mean()) < 0.01
    assert weights[0] * 1 > 5 * abs(weights[1] * 5) and weights[0] > 5 * abs(weights[2] * 0.1)
    assert quality["AUROC"] > 0.8 and quality["Brier score"] < quality["Brier score of the mean"]
    with pytest.raises(UserError, match="9 of 600 captions are right"):
        fit(scores, np.arange(600) < 9, list(range(600)))


def test_a_calibration_is_kept_and_one_of_another_captioner_refused(calibration, tmp_path):
    path = tmp_path / FILE
    calibration.save(path)
    found = Calibration.load(path, (3, 4))
    assert found.weights.equal(calibration.weights) and (found.bias, found.record) == (-0.25, {"right": 0.4})
    assert found.prefix.equal(calibration.prefix.half().float()) and found.ground.limit == 0.5
    rows = torch.tensor([[0.0, 0.0, 0.0], [100.0, 0.0, 0.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
    expected = [1 / (1 + math.exp(0.25)), 1.0, 1 / (1 + math.exp(2.0))]
    assert found.confidence(rows).tolist() == pytest.approx(expected)
    with pytest.raises(UserError, match="does not fit the captioner"):
        Calibration.load(path, (3, 5))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged .*clipcap calibrate"):
        Calibration.load(path, (3, 4))


def test_far_is_beyond_the_limit():
    assert not Judgement([0.5], 1.0).far and Judgement([0.5], 1.01).far


def test_only_sure_captions_are_left_in_every_format():
    row = {"image": "a.jpg", "captions": ["x", "y"], "scores": [-1.0, -2.0], "confidences": [0.25, 0.75], "far": True}
    assert surest(row, 0.0) == row and surest(row, 0.9)["captions"] == []
    kept = surest(row, 0.5)
    assert (kept["captions"], kept["scores"], kept["confidences"]) == (["y"], [-2.0], [0.75])
    plain = {"image": "b.jpg", "captions": ["z"], "scores": [-3.0]}
    assert surest(plain, 0.5) == plain
    assert FORMATS["text"]([row, plain]) == "a.jpg\tx\t0.25\na.jpg\ty\t0.75\nb.jpg\tz\n"
    lines = FORMATS["csv"]([row, plain]).splitlines()
    assert lines[0] == "image,rank,caption,score,confidence,far"
    assert lines[1] == "a.jpg,1,x,-1.0,0.25,true" and lines[3] == "b.jpg,1,z,-3.0,,"
    assert FORMATS["csv"]([plain]).splitlines() == ["image,rank,caption,score", "b.jpg,1,z,-3.0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "known", "strange"),
    [("photo", PHOTOGRAPH, SCENE), ("tiny", SCENE, PHOTOGRAPH)],
)
def test_the_packaged_captioners_know_what_they_have_never_seen(name, known, strange, capsys):
    assert main(["caption", str(known), str(strange), "--model", name]) == 0
    out, error = capsys.readouterr()
    rows = [line.split("\t") for line in out.splitlines()]
    assert [len(row) for row in rows] == [3, 3] and all(0 < float(row[2]) < 1 for row in rows)
    assert float(rows[0][2]) > float(rows[1][2])
    [line] = [line for line in error.splitlines() if "unlike anything" in line]
    assert strange.name in line and known.name not in line and repr(name) in line


@pytest.mark.slow
def test_most_packaged_pictures_of_a_kind_are_known(tiny):
    photo = Captioner.from_pretrained("photo", device="cpu")
    scenes = sorted((SAMPLES / "scenes").glob("test_*.jpg"))[::3]
    photographs = sorted((SAMPLES / "photographs").glob("*.jpg"))
    share = {}
    for captioner in (photo, tiny):
        for kind, paths in (("scenes", scenes), ("photographs", photographs)):
            found = list(captioner.stream(paths, strategy="greedy", confidence=True))
            share[captioner is tiny, kind] = sum(one.far for one in found) / len(found)
    assert share[True, "scenes"] < 0.1 and share[True, "photographs"] > 0.75
    assert share[False, "scenes"] == 1 and share[False, "photographs"] < 0.75


def test_confidence_costs_nothing_unless_asked_for(tiny, monkeypatch):
    monkeypatch.setattr(Calibration, "judge", None)
    [found] = tiny.stream([SCENE])
    assert found.confidences == [] and not found.far


@pytest.mark.slow
def test_ranked_captions_are_embedded_once(monkeypatch):
    """Judged from the cosines by which they were ranked, they are as sure as those that are embedded again."""
    photo, counts = Captioner.from_pretrained("photo", device="cpu"), []
    plain = photo.clip.encode_texts
    monkeypatch.setattr(photo.clip, "encode_texts", lambda texts: counts.append(len(texts)) or plain(texts))
    [found] = photo.stream([PHOTOGRAPH], confidence=True, rerank=1.0, num_captions=2, max_new_tokens=8)
    assert counts == [5]
    features = photo.features(photo.clip.preprocess([read_image(PHOTOGRAPH)]))
    captions = photo.decode(features, rerank=1.0, num_captions=2, max_new_tokens=8)
    [again] = photo.judge(features, [[replace(caption, similarity=None) for caption in captions[0]]])
    assert counts == [5, 5, 2] and found.confidences == pytest.approx(again.confidences, abs=1e-6)


def test_options_that_cannot_be_are_one_line(capsys):
    for options, said in (
        (["--min-confidence", "2"], "use at most 1"),
        (["--min-confidence", "0.5", "--confidence", "off"], "leave one of them out"),
    ):
        assert main(["caption", str(SCENE), "--model", "tiny", *options]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert main(["calibrate", "--data", "x", "--model", "someone/captioner"]) == 2
    assert FILE in capsys.readouterr().err


@pytest.mark.slow
def test_a_captioner_without_a_calibration_is_as_before(tmp_path, capsys):
    plain = tmp_path / "plain"
    shutil.copytree(ASSETS / "captioner-tiny", plain, ignore=shutil.ignore_patterns(FILE))
    assert main(["caption", str(SCENE), "--model", str(plain), "--min-confidence", "0.5"]) == 2
    assert "clipcap calibrate" in capsys.readouterr().err
    assert main(["caption", str(SCENE), "--model", str(plain)]) == 0
    assert len(capsys.readouterr().out.split("\t")) == 2


def test_a_captioner_takes_its_calibration_along_and_leaves_none_behind(tiny, tmp_path):
    model = ClipCapModel.from_pretrained("tiny")
    model.save_pretrained(tmp_path / "copy")
    again = ClipCapModel.from_pretrained(tmp_path / "copy")
    assert again.calibration.weights.equal(tiny.model.calibration.weights)
    model.calibration = None
    model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / FILE).exists()
    assert ClipCapModel.from_pretrained(tmp_path / "copy").calibration is None


@pytest.mark.slow
def test_a_captioner_is_calibrated_and_says_how_sure_it_is(tmp_path, capsys, monkeypatch):
    """On the packaged scenes: 32 to know, 72 to learn from."""
    scenes = SAMPLES / "scenes"
    place = tmp_path / "captioner"
    shutil.copytree(ASSETS / "captioner-tiny", place, ignore=shutil.ignore_patterns(FILE))
    data = ["--data", str(scenes / "dataset.json"), "--model", str(place)]
    assert main(["calibrate", *data, "--split", "train"]) == 2
    assert "split is 'train'" in capsys.readouterr().err
    seen, plain = [], Captioner.features
    monkeypatch.setattr(Captioner, "features", lambda self, pixels: seen.append(len(pixels)) or plain(self, pixels))
    assert main(["calibrate", *data, "--split", "test", "--threads", "1"]) == 0
    assert sum(seen) == 32 + 72  # each once
    said = capsys.readouterr().out
    assert "216 captions of 72 images" in said and "AUROC" in said and (place / FILE).is_file()
    ciders = {float(weight): float(value) for value, weight in re.findall(r"CIDEr ([\d.]+) with ([\d.]+)", said)}
    weight = json.loads((place / "config.json").read_text())["rerank"]
    assert list(ciders) == list(WEIGHTS) and ciders[weight] == max(ciders.values())
    items = [item for item in read_dataset(scenes / "dataset.json") if item.split == "test"]
    captioner = Captioner.from_pretrained(place, device="cpu")
    assert captioner.rerank_weight(None) == weight
    for asked in (0.0, None, 4.0):
        texts = captioner.caption([item.path for item in items], rerank=asked)
        captions = {item.image_id: text for item, text in zip(items, texts, strict=True)}
        found = score_captions(captions, {item.image_id: item.captions for item in items}, tokenizer="words").cider
        assert found == pytest.approx(ciders[weight if asked is None else asked], abs=1e-3)
    paths = [str(path) for path in sorted(scenes.glob("test_0*.jpg"))[:6]]
    assert main(["caption", *paths, "--model", str(place), "--format", "json", "--num-captions", "2"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(len(row["confidences"]) == 2 and all(0 < p < 1 for p in row["confidences"]) for row in rows)
    middle = sorted(p for row in rows for p in row["confidences"])[6]
    options = ["--format", "jsonl", "--num-captions", "2", "--min-confidence", str(middle)]
    assert main(["caption", *paths, "--model", str(place), *options]) == 0
    kept = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sum(len(row["captions"]) for row in kept) == 6 and all(min(row["confidences"]) >= middle for row in kept)
