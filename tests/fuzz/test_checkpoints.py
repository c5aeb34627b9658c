"""Checkpoints, model directories and embedding stores, broken: a UserError, no hang, no code run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from clipcap import ClipCapConfig, ClipCapModel, load_original_checkpoint
from clipcap.data import CaptionedImage
from clipcap.embeddings import EmbeddingStore, StoreWriter, build_store
from common.checks import UserError
from common.clip import load_clip
from common.gpt2 import load_gpt2
from tests.fuzz.mutations import FUZZ, bad_json, break_file, changed, damaged, json_text, only_user_errors

GOLDEN = Path(__file__).parent.parent / "golden"
SHAPES = [(), (0,), (3,), (0, 3), (2, 2), (7, 5), (1, 2, 3)]
NUMBERS = st.one_of(st.none(), st.integers(-2, 20), st.text(max_size=4), st.just([]), st.just({}), st.booleans(), st.floats())
"""For sizes in a config: small, so that what is built from them is."""


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_original_checkpoint_of_other_tensors(kind, tmp_path):
    weights = torch.load(GOLDEN / f"clipcap_{kind}.pt", weights_only=True)
    names = sorted(weights)

    @settings(FUZZ, max_examples=30)
    @given(st.lists(st.tuples(st.sampled_from(names), st.sampled_from(["drop", "shape", "type", "name", "value"]),
                              st.sampled_from(SHAPES)), min_size=1, max_size=3))  # fmt: skip
    def check(changes):
        bad = dict(weights)
        for name, how, shape in changes:
            old = bad.pop(name, torch.zeros(2))
            if how == "shape":
                bad[name] = torch.zeros(shape)
            elif how == "type":
                bad[name] = old.to(torch.int64) if isinstance(old, torch.Tensor) else old
            elif how == "name":
                bad[f"{name}.more"] = old
            elif how == "value":
                bad[name] = list(shape)
        torch.save(bad, tmp_path / "bad.pt")
        with only_user_errors():
            load_original_checkpoint(tmp_path / "bad.pt", n_head=4)

    check()


@settings(FUZZ, max_examples=60)
@given(damaged((GOLDEN / "clipcap_mlp.pt").read_bytes()[:4000]), st.booleans())
def test_original_checkpoint_of_other_bytes(tmp_path_factory, data, whole):
    path = tmp_path_factory.mktemp("bytes") / "bad.pt"
    path.write_bytes(data + (GOLDEN / "clipcap_mlp.pt").read_bytes()[4000:] if whole else data)
    with only_user_errors():
        load_original_checkpoint(path, n_head=4)


@pytest.mark.parametrize("kind, name", [
    ("mlp", "clip_project.model.2.weight"), ("transformer", "clip_project.prefix_const"),
    ("transformer", "clip_project.linear.weight"), ("mlp", "gpt.transformer.h.0.mlp.c_fc.weight"),
])  # fmt: skip
def test_a_vector_in_place_of_a_matrix_is_named(kind, name, tmp_path):
    weights = torch.load(GOLDEN / f"clipcap_{kind}.pt", weights_only=True)
    torch.save(weights | {name: torch.zeros(3)}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="no matrix"):
        load_original_checkpoint(tmp_path / "bad.pt", n_head=4)


@pytest.fixture(scope="module")
def captioner(gpt2_directory, tmp_path_factory):
    """A captioner that keeps its mapper alone."""
    directory = tmp_path_factory.mktemp("captioner") / "model"
    config = ClipCapConfig(gpt2=str(gpt2_directory), clip_width=8, prefix_length=2)
    ClipCapModel.from_backbones(config).save_pretrained(directory)
    return directory


def test_captioner_config(captioner, tmp_path):
    good = json.loads((captioner / "config.json").read_text())
    place = shutil.copytree(captioner, tmp_path / "model")

    data = st.one_of(changed(good, NUMBERS).map(json_text), damaged(json_text(good)))
    break_file(place / "config.json", data, lambda: ClipCapModel.from_pretrained(place), 40)


def test_captioner_weights(captioner, tmp_path):
    place = shutil.copytree(captioner, tmp_path / "model")
    good = (place / "model.safetensors").read_bytes()
    break_file(place / "model.safetensors", damaged(good), lambda: ClipCapModel.from_pretrained(place), 25)


@pytest.fixture(scope="module")
def clip_directory(gpt2_directory, tmp_path_factory):
    """A random CLIP, all its files."""
    place = tmp_path_factory.mktemp("clip") / "model"
    tokenizer = AutoTokenizer.from_pretrained(gpt2_directory, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(place)
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 8, "eos_token_id": tokenizer.eos_token_id}
    vision = tower | {"image_size": 8, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)).save_pretrained(place)
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(place)
    return place


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"])
def test_clip_directory(clip_directory, name, tmp_path):
    place = shutil.copytree(clip_directory, tmp_path / "clip")
    good = (place / name).read_bytes()
    assert load_clip(place, device="cpu").width == 4
    data = damaged(good)
    if name.endswith("config.json"):
        data = st.one_of(changed(json.loads(good), NUMBERS).map(json_text), data)

    def read():
        clip = load_clip(place, device="cpu")
        clip.encode_images(clip.preprocess(Image.new("RGB", (9, 8))))
        clip.encode_texts(["a cat"])

    break_file(place / name, data, read, 15)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_gpt2_directory(gpt2_directory, name, tmp_path):
    place = shutil.copytree(gpt2_directory, tmp_path / "gpt2")
    good = (place / name).read_bytes()
    data = changed(json.loads(good), NUMBERS).map(json_text) if name == "config.json" else damaged(good)
    break_file(place / name, data, lambda: load_gpt2(place), 20)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three images, embedded."""
    place = tmp_path_factory.mktemp("store")
    items = []
    for number in range(3):
        path = place / f"{number}.png"
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
        items.append(CaptionedImage(f"{number}", path, ("a cat",), "train"))
    build_store(items, load_clip("tiny", device="cpu"), place / "store")
    return place / "store"


@pytest.mark.parametrize("name", ["manifest.json", "rows.bin"])
def test_embedding_store(store, name, tmp_path):
    place = shutil.copytree(store, tmp_path / "store")
    good = (place / name).read_bytes()
    key = json.loads((place / "manifest.json").read_text())["key"]

    @FUZZ
    @given(bad_json(json.loads(good)) if name.endswith("json") else damaged(good))
    def check(data):
        (place / name).write_bytes(data)
        with only_user_errors():
            found = EmbeddingStore(place)
            found.ids  # noqa: B018
            assert len(found) == len(found.records) and (not len(found) or found[0] is not None)
            assert "nowhere" not in found
            assert isinstance(found.skipped, dict)
        with only_user_errors():
            StoreWriter(place, key, "tiny").close()

    check()
