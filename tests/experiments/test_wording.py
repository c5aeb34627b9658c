"""Captions of the scenes in Dutch and Italian: grammar, and that they read back to the scene."""

import random
import re
from dataclasses import replace

import pytest

from experiments.scenes.captions import caption, looks, names_all, parse
from experiments.scenes.graph import Camera, Light, Scene, SceneObject, sample_family
from experiments.scenes.wording import DUTCH, ITALIAN, WORDINGS

CAMERA = Camera(0.0, 0.5, 5.0, (0.0, 0.0, 0.0))


def scene(*looks):
    things = [
        SceneObject(shape, colour, material, size, 0.9 * i, 0.0, 0.0)
        for i, (size, colour, material, shape) in enumerate(looks)
    ]
    return Scene(tuple(things), None, Light(0.0, 1.0, 3.0, 0.5))


def all_captions(wording, *looks, detail="full"):
    return {caption(scene(*looks), CAMERA, random.Random(i), detail=detail, wording=wording) for i in range(200)}


@pytest.mark.slow
@pytest.mark.parametrize("language", WORDINGS)
@pytest.mark.parametrize("detail", ["some", "full"])
def test_captions_read_back_to_the_scene(language, detail):
    for index in range(150):
        family = sample_family(3, "train", index)
        for variant in family.scenes:
            text = caption(variant, family.cameras[0], random.Random(index), detail=detail, wording=WORDINGS[language])
            assert names_all(text, variant, wording=WORDINGS[language]), text
            if detail == "full":
                named = parse(text, wording=WORDINGS[language])
                assert sorted((n.colour, n.shape, n.material, n.size) for n in named) == sorted(
                    (t.colour, t.shape, t.material, t.size) for t in variant.objects
                ), text


def test_dutch_adjectives_agree_with_neuter_nouns_and_plurals():
    texts = all_captions(DUTCH, ("small", "red", "glowing", "cube"))
    assert any("klein rood lichtgevend blok" in text for text in texts)
    assert any("kleine rode lichtgevende kubus" in text for text in texts)
    assert any(text.endswith("blok dat licht geeft") for text in texts)
    assert not any(re.search(r"(kleine|rode) \w*\s?blok\b|klein (rood )?kubus", text) for text in texts)
    several = all_captions(DUTCH, ("small", "red", "rubber", "cube"), ("small", "red", "rubber", "cube"))
    assert any("twee kleine rode rubberen blokken" in text for text in several)


def test_italian_articles_and_agreement():
    texts = all_captions(ITALIAN, ("small", "red", "glowing", "stool"), detail="some")
    assert any("uno sgabello rosso" in text for text in texts) and any("un piccolo sgabello" in text for text in texts)
    assert not any("un sgabello" in text or "uno piccolo" in text for text in texts)
    ball = all_captions(ITALIAN, ("large", "yellow", "metal", "ball"))
    assert any("una grande palla gialla di metallo" in text for text in ball)
    assert any("una grande sfera gialla fatta di metallo" in text for text in ball)
    assert not any("giallo" in text or re.search(r"\bun (grande )?(palla|sfera)", text) for text in ball)
    pair = all_captions(ITALIAN, ("small", "orange", "rubber", "monkey"), ("small", "orange", "rubber", "monkey"))
    assert any("due piccole scimmie arancioni di gomma" in text for text in pair)


def test_italian_prepositions_join_their_articles():
    three = [
        ("small", "red", "rubber", "stool"),
        ("small", "blue", "rubber", "ring"),
        ("small", "green", "rubber", "cone"),
    ]
    texts = {
        caption(
            scene(*random.Random(i).sample(three, 3)),
            replace(CAMERA, azimuth=0.7 * i),
            random.Random(i),
            detail="full",
            wording=ITALIAN,
        )
        for i in range(300)
    }
    joined = " ".join(texts)
    for phrase in (
        "dello sgabello rosso",
        "allo sgabello rosso",
        "dell'anello blu",
        "all'anello blu",
        "del cono verde",
        "al cono verde",
    ):
        assert phrase in joined, phrase
    assert not re.search(r"\b(di|a) (il|lo|la) |\b(di|a) l'", joined)


def test_reader_knows_adjectives_after_the_noun():
    assert dict(looks(parse("un cubo rosso a sinistra di una palla blu", wording=ITALIAN))) == {
        ("red", "cube"): 1,
        ("blue", "ball"): 1,
    }
    assert looks(parse("un cubo, rosso", wording=ITALIAN)) == {(None, "cube"): 1}
