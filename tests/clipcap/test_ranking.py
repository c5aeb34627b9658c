"""Beams ranked by CLIP's similarity: as one by one by hand, at the extremes, and what cannot be ranked."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch.nn import functional as F

from clipcap import Captioner
from clipcap.cli import main
from clipcap.data.embeddings import mapper_input
from clipcap.data.images import read_image
from clipcap.decoding import decode
from clipcap.ranking import reranked, similarities
from clipcap.search import Caption
from common.checks import UserError
from common.pretrained import ASSETS

PICTURES = sorted((ASSETS / "samples" / "photographs").glob("*.jpg"))[:3]


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner.from_pretrained("photo", device="cpu")


@pytest.fixture(scope="module")
def features(captioner):
    return captioner.features(captioner.clip.preprocess([read_image(path) for path in PICTURES]))


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.3, 2.0])
@pytest.mark.parametrize("strategy", ["beam", "beam_original"])
def test_the_best_is_that_of_each_beam_scored_by_hand(captioner, features, strategy, weight):
    found = captioner.decode(features, strategy=strategy, num_beams=4, num_captions=2, max_new_tokens=12, rerank=weight)
    for row in range(len(PICTURES)):
        one = mapper_input(features, "patches")[row : row + 1]
        beams = decode(captioner.model, one, strategy=strategy, num_beams=4, num_captions=4, max_new_tokens=12)[0]
        values = []
        for beam in beams:
            text = captioner.clip.encode_texts([captioner.text(beam)])[0]
            values.append(beam.score + weight * F.cosine_similarity(text, features.embedding[row], dim=0).item())
        expected = [beams[i].token_ids for i in sorted(range(4), key=lambda i: -values[i])[:2]]
        assert [caption.token_ids for caption in found[row]] == expected


@pytest.mark.slow
def test_extremes_are_the_language_model_alone_and_clip_alone(captioner, features):
    plain = decode(captioner.model, mapper_input(features, "patches"), num_captions=5, max_new_tokens=12)
    assert captioner.decode(features, num_captions=5, max_new_tokens=12, rerank=0) == plain
    texts = [[captioner.text(beam) for beam in beams] for beams in plain]
    cosines = similarities(captioner.clip, features.embedding, texts)
    chosen = captioner.decode(features, max_new_tokens=12, rerank=1e6)
    for beams, cosine, (best,) in zip(plain, cosines, chosen, strict=True):
        assert best == beams[int(cosine.argmax())]


def test_order_of_ties_and_weights():
    captions = [Caption([1], -1.0), Caption([2], -1.0), Caption([3], -2.0)]
    assert reranked(captions, [0.5, 0.5, 0.5], 3.0) == captions
    assert reranked(captions, [0.0, 0.1, 0.9], 1.0) == [captions[1], captions[0], captions[2]]
    assert reranked(captions, [0.0, 0.1, 0.9], 2.0) == [captions[2], captions[1], captions[0]]


@pytest.mark.slow
def test_the_captioners_own_weight_is_used_and_kept(captioner, tmp_path, capsys):
    directory = tmp_path / "mine"
    shutil.copytree(ASSETS / "captioner-photo", directory)
    config = json.loads((directory / "config.json").read_text())
    for weight in (0.0, 50.0):
        (directory / "config.json").write_text(json.dumps(config | {"rerank": weight, "clip": "photo"}))
        mine = Captioner.from_pretrained(directory, device="cpu")
        assert mine.rerank_weight(None) == weight and mine.rerank_weight(1.0) == 1.0
        told = [captioner.caption(PICTURES, rerank=weight, num_captions=3), mine.caption(PICTURES, num_captions=3)]
        assert told[0] == told[1]
        assert main(["caption", *map(str, PICTURES), "--model", str(directory), "--confidence", "off"]) == 0
        assert [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()] == [row[0] for row in told[1]]
    (directory / "config.json").write_text(json.dumps(config | {"rerank": -1.0, "clip": "photo"}))
    with pytest.raises(UserError, match="rerank is -1.0: use a number from 0"):
        Captioner.from_pretrained(directory, device="cpu")


def test_what_cannot_be_ranked_is_said_before_any_work(captioner, monkeypatch, capsys):
    with pytest.raises(UserError, match="rerank is -0.5: use 0"):
        next(captioner.stream(PICTURES, rerank=-0.5))
    monkeypatch.setattr(type(captioner.clip), "has_text", False)
    with pytest.raises(UserError, match="rerank is 1.0 but CLIP 'photo' has no text tower: leave it out, or give 0"):
        next(captioner.stream(PICTURES, rerank=1.0))
    monkeypatch.setattr(captioner.model.config, "rerank", 2.0)
    assert captioner.rerank_weight(None) == 0
    assert main(["caption", str(PICTURES[0]), "--rerank", "-1"]) == 2
    assert "rerank is -1.0: use at least 0" in capsys.readouterr().err
    assert torch.is_grad_enabled()
