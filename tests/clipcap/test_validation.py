"""Validation captions: variety, collapse and its explanation, the page of samples."""

import csv
from dataclasses import replace

import pytest
import torch

from clipcap import Captioner
from clipcap.data.readers import read_dataset
from clipcap.evaluation.metrics import score_captions
from clipcap.model import ClipCapModel
from clipcap.training.train import train
from clipcap.training.validation import CaptionValidation, Subset, explain_collapse, measure_variety


def test_variety():
    found = measure_variety(["a cat", "a dog", "a cat", "a cat"])
    assert (found.distinct, found.top, found.top_share) == (2, "a cat", 0.75)


def test_collapse_is_told_from_references_that_are_alike():
    different = [[f"caption {number}"] for number in range(20)]
    text = explain_collapse(["a man riding a wave"] * 19 + ["a dog"], different)
    assert text and "95% of 20" in text and "'a man riding a wave'" in text and "\n" not in text
    for cure in ("train longer", "learning rate", "--normalize-embeddings", "embedding store"):
        assert cure in text
    assert explain_collapse([f"caption {number}" for number in range(20)], different) is None
    assert explain_collapse(["a cat"] * 10 + ["a dog"] * 10, different) is None
    assert explain_collapse(["a cat"] * 20, [["a cat"]] * 20) is None  # nothing else is true of these images


@pytest.fixture
def config(tiny_run):
    return replace(tiny_run, batch_size=8, val_every=4, val_beams=2, max_tokens=12)


def test_cider_and_the_page_are_those_of_the_captioner(config, photos):
    directory = train(config)
    items = [item for item in read_dataset(photos / "dataset.json") if item.split == "val"]
    captioner = Captioner.from_pretrained(directory, device="cpu")
    captions = captioner.caption([item.path for item in items], num_beams=2, max_new_tokens=12)
    expected = score_captions(
        {item.image_id: text for item, text in zip(items, captions, strict=True)},
        {item.image_id: item.captions for item in items},
        tokenizer="words",
    )
    with open(config.out / "metrics.csv") as file:
        row = next(row for row in csv.DictReader(file) if row["val/cider"])
    assert float(row["val/cider"]) == pytest.approx(expected.cider, abs=1e-4)
    assert float(row["val/distinct_captions"]) == len(set(captions))
    page = (config.out / "samples.html").read_text()
    assert page.count("data:image/png") + page.count("data:image/jpeg") == 2 and items[0].captions[0] in page


def test_the_best_checkpoint_by_cider_is_saved(config, monkeypatch):
    """The page's CIDEr is made to fall: the first validation's weights are the model."""
    ciders = iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(CaptionValidation, "_report", lambda self, captions, step: [next(ciders), 1.0, 0.5])
    train(replace(config, steps=3, val_every=1, monitor="cider"))
    best = torch.load(config.out / "best.ckpt", weights_only=False)
    assert best["global_step"] == 1
    from safetensors.torch import load_file

    saved = load_file(config.out / "model" / "model.safetensors")
    assert all(torch.equal(saved[name.removeprefix("model.")], value) for name, value in best["state_dict"].items())


def test_a_collapse_is_explained_once_and_stands_on_the_page(config, photos, capsys):
    items = [
        replace(item, captions=(f"picture number {n}",)) for n, item in enumerate(read_dataset(photos / "dataset.json"))
    ]
    store = {item.image_id: n for n, item in enumerate(items)}

    class Rows(dict):
        def row(self, image_id):
            return self[image_id]

        def __getitem__(self, key):
            return super().__getitem__(key) if isinstance(key, str) else torch.zeros(12)

    subset = Subset.draw(items, Rows(store), 10, seed=0)
    assert len(subset.items) == 10 and subset.embeddings.shape == (10, 12)
    assert Subset.draw(items, Rows(store), 10, seed=0).items == subset.items
    check = CaptionValidation(subset, config.out)
    for step in (1, 2):
        assert check._report(["a cat"] * 10, step)[1:] == [1.0, 1.0]
    assert capsys.readouterr().err.count("collapse: 100% of 10") == 1
    assert "collapse: 100% of 10" in (config.out / "samples.html").read_text()


def test_captions_end_at_the_end_token_and_keep_the_random_state(config):
    model = ClipCapModel.from_pretrained(train(config))
    subset = Subset([], torch.randn(3, 12))
    state = torch.get_rng_state()
    texts = CaptionValidation(subset, config.out, max_new_tokens=9).caption(model)
    assert torch.equal(torch.get_rng_state(), state)  # or a run with validations would differ from one without
    assert len(texts) == 3 and not any("endoftext" in text for text in texts)
