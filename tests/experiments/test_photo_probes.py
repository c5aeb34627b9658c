"""Classes from captions, and the probes of an encoder on them, with photographs of two colours."""

import json

import pytest
from PIL import Image

from common.checks import UserError
from common.probing.embed import EncoderConfig
from common.runtime import RuntimeConfig
from experiments.backbones.photo_probes import NOUNS, Config, choose_nouns, main, named, noun_of


def test_a_noun_needs_two_captions_that_name_it_alone():
    assert named("Two dogs, and a Puppy on the beach.", NOUNS) == {"dog", "beach"}
    assert noun_of(["a dog", "a brown dog", "a dog on a beach", "the beach", "run"], NOUNS) == "dog"
    assert noun_of(["a dog", "a dog on a beach", "running", "it runs", "fast"], NOUNS) is None
    assert noun_of(["a dog", "dogs", "a beach", "the beach", "fast"], NOUNS) is None
    assert noun_of(["dogmatic", "a doghouse"], NOUNS) is None


@pytest.fixture
def data(tmp_path):
    """Twenty grass-green dogs and ten white snows of every split."""
    rows = []
    for number in range(30):
        dog, split = number % 3 > 0, ("train", "train", "train", "val", "test")[number // 3 % 5]
        Image.new("RGB", (8, 8), (20 + number, 200, 20) if dog else (250 - number, 250, 250)).save(
            tmp_path / f"{number}.png"
        )
        texts = ["a dog runs", "the dog", "green"] if dog else ["deep snow", "snow everywhere", "a dog in the snow"]
        rows.append({"filename": f"{number}.png", "split": split, "sentences": [{"raw": text} for text in texts]})
    (tmp_path / "dataset.json").write_text(json.dumps({"images": rows}))
    return tmp_path / "dataset.json"


@pytest.mark.slow
def test_probes_of_photographs(data, tmp_path, capsys):
    encoder = EncoderConfig(runtime=RuntimeConfig(device="cpu"))
    main(Config(data=data, classes=2, out=tmp_path / "probes.json", docs=tmp_path / "probes.md", encoder=encoder))
    found = json.loads((tmp_path / "probes.json").read_text())
    assert found["classes"] == {"dog": 4, "snow": 2} and found["images"] == {"train": 18, "val": 6, "test": 6}
    assert found["scores"]["linear probe"]["accuracy"] == 1
    assert found["scores"]["linear probe"]["most_frequent"] == pytest.approx(2 / 3)
    page = (tmp_path / "probes.md").read_text()
    assert page.count("\n| zero-shot, ") == 3 and "| linear probe | 1.000 |" in page and page in capsys.readouterr().out
    with pytest.raises(UserError, match="name 2 nouns"):
        main(Config(data=data, classes=3, out=tmp_path / "probes.json", encoder=encoder))


def test_the_most_frequent_nouns_of_training_are_chosen(data):
    from clipcap.data.readers import read_dataset

    assert choose_nouns(read_dataset(data), 1) == ("dog",)
