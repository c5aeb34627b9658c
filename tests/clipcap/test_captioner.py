"""Captioner: given captions scored as the naive formula scores them, batch size by memory, URLs, generators, int8."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from clipcap import Captioner, ClipCapConfig, ClipCapModel
from clipcap import captioner as module
from clipcap.data.images import ImageError, find_images, read_image
from clipcap.data.net import Dropped
from clipcap.decoding import decode
from common.checks import UserError
from common.clip import load_clip
from common.pretrained import ASSETS

SCENES = ASSETS / "samples" / "scenes"


@pytest.fixture(scope="module")
def captioner(clip_directory, gpt2_directory) -> Captioner:
    torch.manual_seed(0)
    config = ClipCapConfig(clip_width=12, prefix_length=3, gpt2=str(gpt2_directory), clip=str(clip_directory))
    return Captioner(ClipCapModel.from_backbones(config), load_clip(str(clip_directory), device="cpu"))


@torch.no_grad()
def naive_log_probability(captioner: Captioner, image, text: str) -> list[float]:
    """The terms log p(token | image, tokens before), each by a forward pass of its own."""
    ids = [*captioner.tokenizer(text)["input_ids"], captioner.model.config.eos_token_id]
    prefix = captioner.model.prefix(captioner.embed([read_image(image)]))
    terms = []
    for i, token in enumerate(ids):
        words = captioner.model.gpt2.transformer.wte(torch.tensor([ids[:i]], dtype=torch.long))
        logits = captioner.model.gpt2(inputs_embeds=torch.cat([prefix, words], 1)).logits[0, -1]
        terms.append(logits.log_softmax(-1)[token].item())
    return terms


TEXTS = ["the cat", "the bat sat on the mat", "a", "and the hat"]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_log_probability_is_the_naive_sum(captioner, photos, batch_size):
    images = find_images([photos])[:3]
    expected = [[naive_log_probability(captioner, image, text) for text in TEXTS] for image in images]
    totals = captioner.log_probability(images, TEXTS, batch_size=batch_size)
    np.testing.assert_allclose(totals, [[sum(t) for t in row] for row in expected], atol=1e-4)
    means = captioner.log_probability(images, [TEXTS] * 3, mean=True, batch_size=batch_size)
    np.testing.assert_allclose(means, [[np.mean(t) for t in row] for row in expected], atol=1e-4)
    assert captioner.log_probability(images[0], TEXTS[1]) == pytest.approx(totals[0][1], abs=1e-4)


def test_ranking_finds_the_caption_among_foils():
    captioner = Captioner.from_pretrained("tiny", device="cpu")
    images = sorted(SCENES.glob("*.jpg"))[:6]
    best = captioner.caption(images, max_new_tokens=30)
    assert len(set(best)) > 1
    foils = [" ".join(reversed(text.split())) for text in best]
    scores = captioner.log_probability(images, [list(pair) for pair in zip(best, foils, strict=True)])
    assert all(right > wrong for right, wrong in scores)
    # A caption's own score is the mean log-probability of its text.
    found = list(captioner.stream(images[:2], max_new_tokens=60))
    means = captioner.log_probability(images[:2], [f.captions for f in found], mean=True)
    np.testing.assert_allclose([m[0] for m in means], [f.scores[0] for f in found], atol=1e-3)


@pytest.mark.parametrize(
    ("captions", "message"),
    [([], "captions is empty"), (["a", " "], "is empty"), ([["a"], ["b"]], "2 lists"), ("the cat " * 40, "positions")],
)
def test_captions_that_cannot_be_scored(captioner, photos, captions, message):
    with pytest.raises(UserError, match=message):
        captioner.log_probability([photos / "00.jpg"], captions)


def test_batch_size_follows_memory(captioner, monkeypatch, photos):
    assert captioner.auto_batch_size() == module.BATCH_MOST["cpu"]
    monkeypatch.setattr(module, "free_memory", lambda device: 0)
    assert captioner.auto_batch_size() == 1
    monkeypatch.setattr(module, "free_memory", lambda device: 8_000_000)
    some = captioner.auto_batch_size(max_new_tokens=5)
    assert 1 <= captioner.auto_batch_size(max_new_tokens=25) < some < module.BATCH_MOST["cpu"]
    images = find_images([photos])
    alone = captioner.caption(images, batch_size=1, max_new_tokens=5)
    assert alone == captioner.caption(images, batch_size="auto", max_new_tokens=5)
    assert alone == captioner.caption((i for i in images), max_new_tokens=5)


def test_streaming_reads_no_further_than_its_batch(captioner, photos):
    read = []

    def images():
        for path in find_images([photos]):
            read.append(path)
            yield path

    found = captioner.stream(images(), batch_size=2, max_new_tokens=3)
    next(found)
    assert len(read) == 2


def test_of_a_list_the_next_batch_is_read_while_one_is_captioned(captioner, photos, monkeypatch):
    images, read, ready = sorted(photos.glob("0*")), [], threading.Event()

    def reading(path, **options):
        read.append(path)
        if len(read) == 4:
            ready.set()
        return read_image(path, **options)

    def decoding(*arguments, **options):
        assert ready.wait(60)  # for the second batch, with the first in hand
        return decode(*arguments, **options)

    monkeypatch.setattr(module, "read_image", reading)
    monkeypatch.setattr(module, "decode", decoding)
    found = captioner.stream(images, batch_size=2, max_new_tokens=3)
    first = next(found)
    assert first.image == images[0] and read == images[:4]
    assert torch.allclose(first.embedding, captioner.embed([read_image(images[0])])[0], atol=1e-6)
    assert [item.image for item in found] == images[1:] and read == images


def test_a_stream_that_is_left_leaves_no_thread(captioner, photos):
    before = threading.active_count()
    found = captioner.stream(sorted(photos.glob("0*")), batch_size=2, max_new_tokens=3)
    next(found)
    found.close()
    assert threading.active_count() == before


def test_a_clip_in_memory_is_taken_when_it_is_the_captioners(captioner, clip_directory, tmp_path):
    captioner.model.save_pretrained(tmp_path)
    options = {"device": "cpu", "clip": captioner.clip}
    assert Captioner.from_pretrained(tmp_path, **options).clip is captioner.clip
    other = Captioner.from_pretrained(tmp_path, dtype=torch.bfloat16, **options).clip
    assert other is not captioner.clip and other.dtype == torch.bfloat16
    assert Captioner.from_pretrained("tiny", **options).clip.name == "tiny"


def test_urls(monkeypatch, captioner, photos):
    asked = []

    def fetch(url, **options):
        asked.append(options)
        if "gone" in url:
            raise Dropped("HTTP 404")
        return (photos / "00.jpg").read_bytes()[: 150 if "cut" in url else None]

    monkeypatch.setattr("clipcap.data.images.fetch", fetch)
    local = captioner.caption(photos / "00.jpg", max_new_tokens=4)
    assert captioner.caption("https://example.org/a.jpg", max_new_tokens=4) == local
    assert asked[0]["max_bytes"] > 0 and not asked[0].get("allow_private")
    for name, message in (("gone", "HTTP 404"), ("cut", "damaged|not an image")):
        with pytest.raises(ImageError, match=message):
            read_image(f"https://example.org/{name}.jpg")
    assert find_images(["http://a.org//b.png", photos / "00.jpg"]) == ["http://a.org//b.png", photos / "00.jpg"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.jpg", "http://localhost:9/a.jpg", "http://169.254.169.254/a"])
def test_addresses_that_are_not_public_are_refused(url):
    with pytest.raises(ImageError, match="not public"):
        read_image(url)


def test_int8_is_close_and_does_not_depend_on_the_batch(captioner, photos):
    images = find_images([photos])
    embeddings = captioner.embed([read_image(image) for image in images])
    options = {"max_new_tokens": 6, "strategy": "greedy", "stop_token_ids": []}
    exact, found = ([c for [c] in decode(captioner.model, embeddings, int8=int8, **options)] for int8 in (False, True))
    same = [(f.score, e.score) for f, e in zip(found, exact, strict=True) if f.token_ids == e.token_ids]
    assert len(same) > len(images) / 2
    np.testing.assert_allclose(*zip(*same, strict=True), atol=0.05)
    assert [f.score for f in found] != [e.score for e in exact]
    captioner_int8 = Captioner(captioner.model, captioner.clip, int8=True)
    together, alone = (captioner_int8.caption(images, batch_size=b, num_captions=2, max_new_tokens=6) for b in (12, 1))
    assert together == alone


def test_arrays_and_pil_images(captioner):
    array = np.random.default_rng(0).integers(0, 255, (2, 20, 30, 3), dtype=np.uint8)
    both = captioner.caption(array, max_new_tokens=3)
    assert both == [captioner.caption(Image.fromarray(a), max_new_tokens=3) for a in array]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "temperature is nan"), ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1e-320}, "temperature is 1e-320"), ({"strategy": "sample", "top_p": float("nan")}, "top_p is nan"),
        ({"num_beams": 10**9}, "num_beams is 1000000000"), ({"seed": 10**26, "max_new_tokens": 5}, "seed is"),
        ({"seed": -1, "max_new_tokens": 5}, "seed is -1"),
        ({"max_new_tokens": 10**12}, "max_new_tokens is"),
        ({"strategy": "sample", "num_captions": 10**12}, "num_captions is"),
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_named(captioner, photos, options, message):
    with pytest.raises(UserError, match=message):
        captioner.caption([photos / "00.jpg"], **options)


def test_a_batch_may_be_as_large_as_one_likes_but_must_fit_in_memory(captioner, photos, monkeypatch):
    images = find_images([photos])
    assert captioner.caption(images, batch_size=10**26, max_new_tokens=3) == captioner.caption(images, max_new_tokens=3)
    monkeypatch.setattr("common.runtime.free_memory", lambda device: 100_000)
    with pytest.raises(UserError, match="12 images are captioned at once, which takes .* GB"):
        captioner.caption(images, batch_size=10**12, max_new_tokens=3)


def test_a_coldest_temperature_still_gives_captions(captioner, photos):
    from common.checks import LEAST_TEMPERATURE

    (found,) = captioner.caption(
        [photos / "00.jpg"], strategy="sample", temperature=LEAST_TEMPERATURE, max_new_tokens=4
    )
    assert found == captioner.caption(photos / "00.jpg", strategy="greedy", max_new_tokens=4)
