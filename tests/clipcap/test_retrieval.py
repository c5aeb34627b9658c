"""Retrieval prompts: the nearest captions, never an image's own in training, kept with the captioner."""

import json
import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from clipcap import Captioner
from clipcap.data.readers.captioned import CaptionedImage
from clipcap.model import ClipCapModel
from clipcap.retrieval import FILE, Datastore
from clipcap.training.capdec import NOWHERE, TextStore
from clipcap.training.material import Material
from clipcap.training.module import CaptionTraining
from clipcap.training.settings import TrainConfig
from clipcap.training.train import _with_prompts, train
from common.checks import UserError
from common.gpt2 import load_gpt2


@pytest.fixture(scope="module")
def tokenizer(gpt2_directory):
    return load_gpt2(gpt2_directory)[1]


@pytest.fixture
def datastore(tokenizer):
    torch.manual_seed(0)
    texts = [f"the cat {n}" + " sat" * (n % 4) for n in range(30)]
    return Datastore.build(texts, [n // 3 for n in range(30)], torch.randn(30, 12), tokenizer)


def test_nearest_is_the_naive_one(datastore, monkeypatch):
    monkeypatch.setattr("clipcap.retrieval.PART", 7)
    queries = torch.randn(5, 12)
    own = torch.tensor([0, 3, 9, 5, 5])
    similarity = F.normalize(queries, dim=-1) @ datastore.embeddings.float().T
    for image in (None, own):
        masked = similarity.clone()
        if image is not None:
            for row, number in enumerate(image.tolist()):
                masked[row, 3 * number : 3 * number + 3] = -9
        assert torch.equal(datastore.nearest(queries, 4, image), masked.topk(4, -1).indices)


def test_the_search_is_on_the_gpu_of_the_queries(datastore, monkeypatch):
    with FakeTensorMode(allow_non_fake_inputs=True):  # a GPU's tensors without their numbers
        queries = torch.randn(5, 12, device="cuda")
        for own in (None, torch.arange(5)):
            values, rows = datastore._search(queries, 4, own)
            assert values.is_cuda and rows.is_cuda and rows.shape == (5, 4)
        searched = []
        monkeypatch.setattr(datastore, "_distinct", lambda *arguments: [0] * 4)
        monkeypatch.setattr(
            datastore, "_search", lambda unit, *_: searched.append(unit) or (torch.zeros(5, 4), torch.zeros(5, 4))
        )
        datastore.nearest(queries, 4)
    assert searched[0].is_cuda


def test_training_searches_where_it_will_train(datastore, monkeypatch):
    asked = []
    monkeypatch.setattr("clipcap.training.train.resolve_device", lambda name: torch.device("meta"))  # stands for a GPU
    monkeypatch.setattr(
        datastore, "prompts", lambda part, *_: asked.append(part.device.type) or torch.zeros(len(part), 3)
    )
    store = TextStore(["a", "b"], np.ones((2, 12)) * [[1], [2]])
    items = [CaptionedImage(name, NOWHERE, ("the cat",), "val") for name in "ab"]
    found = _with_prompts([], "val", TrainConfig(data=NOWHERE), Material({"val": items}, {"val": store}), datastore)
    assert asked == ["meta"] and len(found.prompts) == 2


def test_equal_captions_count_once(tokenizer):
    texts = ["the cat", "the cat", "the mat", "the hat"]
    store = Datastore.build(texts, [0, 1, 2, 3], torch.tensor([[1.0, 0], [1, 0.1], [1, 1], [0, 1]]), tokenizer)
    assert store.nearest(torch.tensor([[1.0, 0.0]]), 3).tolist() == [[0, 2, 3]]
    with pytest.raises(UserError, match="retrieval is 4 but only 3 other captions"):
        store.nearest(torch.tensor([[1.0, 0.0]]), 4)


def test_prompts_are_padded_on_the_left_and_end_with_the_nearest(datastore, tokenizer):
    queries = torch.randn(3, 12)
    prompts = datastore.prompts(queries, 2)
    assert prompts.shape == (3, datastore.prompt_length(2))
    for row, (first, second) in zip(prompts.tolist(), datastore.nearest(queries, 2).tolist(), strict=True):
        text = [tokenizer.decode([t for t in datastore.tokens[n].tolist() if t != 0]) for n in (second, first)]
        words = [token for token in row if token != 0]
        assert tokenizer.decode(words) == "".join(text) and text[1].endswith("\n")
        assert row == [0] * (len(row) - len(words)) + words


def test_saved_and_damaged(datastore, tmp_path):
    datastore.save(tmp_path / FILE)
    loaded = Datastore.load(tmp_path / FILE)
    assert torch.equal(loaded.embeddings, datastore.embeddings) and torch.equal(loaded.tokens, datastore.tokens)
    assert loaded.pad == datastore.pad and torch.equal(loaded.owners, datastore.owners)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:100])
    with pytest.raises(UserError, match="datastore .* is damaged"):
        Datastore.load(tmp_path / FILE)


@pytest.fixture(scope="module")
def roomy_gpt2(tmp_path_factory, gpt2_directory):
    """The tiny GPT-2 with positions enough for two retrieved captions."""
    from transformers import GPT2LMHeadModel

    model, tokenizer = load_gpt2(gpt2_directory)
    directory = tmp_path_factory.mktemp("gpt2") / "roomy"
    torch.manual_seed(0)
    model.config.n_positions = 160
    GPT2LMHeadModel(model.config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_run(photos, tiny_run, roomy_gpt2, tmp_path, monkeypatch, tokenizer):
    data = json.loads((photos / "dataset.json").read_text())
    for number, row in enumerate(data["images"]):
        row["sentences"] = [{"raw": f"the cat {number}"}, {"raw": f"the bat {number}"}]
    (photos / "dataset.json").write_text(json.dumps(data))
    batches, original = [], CaptionTraining._loss

    def spy(self, batch):
        if self.trainer.training:
            batches.append(batch)
        return original(self, batch)

    monkeypatch.setattr(CaptionTraining, "_loss", spy)
    config = replace(tiny_run, gpt2=str(roomy_gpt2), retrieval=2, batch_size=8, val_every=4)
    directory = train(config)
    seen = 0
    for batch in batches:
        for ids, prompt in zip(batch["input_ids"], batch["prompts"], strict=True):
            own = tokenizer.decode(ids[ids != 0]).split()[-1]
            retrieved = [line.split()[-1] for line in tokenizer.decode(prompt[prompt != 0]).splitlines()]
            assert own not in retrieved and len(retrieved) == 2
            seen += 1
    assert seen == 32

    assert (directory / FILE).is_file()
    captioner = Captioner.from_pretrained(directory, device="cpu")
    model = captioner.model
    extra = model.datastore.prompt_length(2)
    assert model.config.prefix_length == 3 + extra and model.config.retrieval_tokens == extra
    embeddings = torch.randn(2, 12)
    prefix = model.prefix(embeddings)
    table = model.gpt2.get_input_embeddings()
    assert torch.equal(prefix[:, :extra], table(model.datastore.prompts(embeddings, 2)))
    assert torch.equal(prefix[:, extra:], model.mapper(embeddings))
    caption = captioner.caption(photos / "00.jpg", max_new_tokens=5)
    assert isinstance(caption, str)
    model.save_pretrained(tmp_path / "again")
    again = Captioner.from_pretrained(tmp_path / "again", device="cpu")
    assert again.caption(photos / "00.jpg", max_new_tokens=5) == caption
    (tmp_path / "again" / FILE).unlink()
    with pytest.raises(UserError, match="datastore"):
        ClipCapModel.from_pretrained(tmp_path / "again")
    with pytest.raises(UserError, match="retrieval is 15 but only 14"):
        train(replace(config, retrieval=15, out=tmp_path / "more"))
    with pytest.raises(UserError, match="retrieval is 40: .* of GPT-2's 160 positions"):
        train(replace(config, retrieval=40, out=tmp_path / "more"))


BAD = {
    "shape": {"embeddings": torch.zeros(3)}, "rows": {"tokens": torch.zeros(2, 4, dtype=torch.int32)},
    "owners": {"owners": torch.zeros(3)}, "kind": {"tokens": torch.zeros(3, 4)}, "nan": {"embeddings": torch.full((3, 5), torch.nan)},
    "none": {"embeddings": torch.zeros(0, 5), "tokens": torch.zeros(0, 4, dtype=torch.int32),
             "owners": torch.zeros(0, dtype=torch.int64)},
    "negative": {"tokens": torch.full((3, 4), -1, dtype=torch.int32)}, "whole": {"embeddings": torch.zeros(3, 5, dtype=torch.int8)},
}  # fmt: skip


@pytest.mark.parametrize("change", [*BAD.values(), "pad"], ids=[*BAD, "pad"])
def test_a_datastore_of_other_tensors_is_refused(change, tmp_path):
    from safetensors.torch import save_file

    good = {"embeddings": torch.zeros(3, 5), "tokens": torch.zeros(3, 4, dtype=torch.int32), "owners": torch.arange(3)}
    path = tmp_path / FILE
    save_file(good, path, {"pad": "0"})
    assert len(Datastore.load(path)) == 3
    save_file(good if change == "pad" else good | change, path, {"pad": "x" if change == "pad" else "0"})
    with pytest.raises(UserError, match="damaged|NaN") as caught:
        Datastore.load(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_full_disk_leaves_the_datastore_that_was_there(tmp_path):
    (tmp_path / FILE).write_bytes(b"before")
    datastore = Datastore(torch.zeros(3000, 5), torch.zeros(3000, 4, dtype=torch.int32), torch.arange(3000), 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(UserError, match="datastore .* cannot be written"):
            datastore.save(tmp_path / FILE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {FILE: b"before"}
