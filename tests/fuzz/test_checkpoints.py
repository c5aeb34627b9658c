"""Checkpoints, model directories and embedding stores, broken: a UserError, no hang, no code run."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipcap import ClipCapModel, ClipCapProcessor, load_original_checkpoint
from clipcap.data.dataset import CaptionedImage
from clipcap.data.embeddings import build_store
from clipcap.data.store import EmbeddingStore, StoreWriter
from clipcap.retrieval import Datastore
from common.checks import UserError
from common.clip import load_clip
from common.gpt2 import load_gpt2
from tests.fuzz.mutations import (
    FUZZ,
    bad_json,
    break_file,
    changed,
    damaged,
    edit,
    json_text,
    only_user_errors,
    refused,
)

GOLDEN = Path(__file__).parent.parent / "golden"
SHAPES = [(), (0,), (3,), (0, 3), (2, 2), (7, 5), (1, 2, 3)]
NUMBERS = st.one_of(
    st.none(), st.integers(-2, 20), st.text(max_size=4), st.just([]), st.just({}), st.booleans(), st.floats()
)
"""For sizes in a config: small, so that what is built from them is."""


@pytest.mark.slow
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


def test_captioner_config(captioner, tmp_path):
    good = json.loads((captioner / "config.json").read_text())
    place = shutil.copytree(captioner, tmp_path / "model")

    data = st.one_of(changed(good, NUMBERS).map(json_text), damaged(json_text(good)))
    break_file(place / "config.json", data, lambda: ClipCapModel.from_pretrained(place), 40)


def test_captioner_weights(captioner, tmp_path):
    place = shutil.copytree(captioner, tmp_path / "model")
    good = (place / "model.safetensors").read_bytes()
    break_file(place / "model.safetensors", damaged(good), lambda: ClipCapModel.from_pretrained(place), 25)


@pytest.mark.slow
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


@pytest.mark.slow
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


KINDS = ["gpt2", "clip", "mapper", "tuned", "auto", "processor", "auto processor"]
CONFIGS = [
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [True, False])
def test_no_code_that_comes_with_weights_is_run_and_nobody_is_asked(directories, kind, known, tmp_path, monkeypatch):
    source, read = directories[kind]
    place, made = shutil.copytree(source, tmp_path / "model"), tmp_path / "made"
    monkeypatch.setattr(builtins, "input", lambda *prompt: pytest.fail("asked at the keyboard"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = f"open({str(made)!r}, 'w')\nclass Evil: pass\n"
    (place / "evil.py").write_text(code)
    (place / "custom_generate").mkdir()
    (place / "custom_generate" / "generate.py").write_text(code)
    names = [
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoImageProcessor",
        "AutoProcessor",
        "AutoFeatureExtractor",
    ]
    asked = {"auto_map": dict.fromkeys(names, "evil.Evil") | {"AutoTokenizer": [None, "evil.Evil"]}}
    for name in CONFIGS:
        if (place / name).is_file():
            fields = json.loads((place / name).read_text()) | asked
            if not known and not kind.startswith("auto"):  # transformers' own classes ask before ours are reached
                fields |= {"tokenizer_class": "Evil"} if name.startswith("tok") else {"model_type": "evil"}
            (place / name).write_text(json.dumps(fields))
    with contextlib.nullcontext() if known or kind.startswith("auto") else only_user_errors():
        read(place)
    assert not made.exists() and not (tmp_path / "modules").exists()


def test_a_request_to_run_code_is_one_line(directories, tmp_path):
    place = shutil.copytree(directories["processor"][0], tmp_path / "model")
    edit(place / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Evil"]}, tokenizer_class="Evil")
    refused(lambda: ClipCapProcessor.from_pretrained(place), "asks to run code that comes with it, which is never done")


KERNEL = "somebody/some-kernel"
CODE = {
    "_attn_implementation": KERNEL, "attn_implementation": KERNEL, "_attn_implementation_internal": KERNEL,
    "_experts_implementation": KERNEL, "experts_implementation": KERNEL, "kernel_config": {"RMSNorm": KERNEL},
    "use_kernels": True, "transformers_weights": "/etc/hostname", "fusion_config": {"a": True}, "distributed_config": {},
    "dtype": "float16", "torch_dtype": "float16", "use_cache": "x", "output_attentions": True, "per_layer_config": {},
}  # fmt: skip
"""What a config.json may say of how a model is computed, and fetched for it."""


@pytest.mark.parametrize("kind", ["gpt2", "clip", "mapper", "tuned"])
def test_how_a_model_is_computed_is_not_for_its_config_to_say(directories, kind, tmp_path):
    source, read = directories[kind]
    place = shutil.copytree(source, tmp_path / "model")
    fields = json.loads((place / "config.json").read_text())
    for part in (fields, *(fields[name] for name in ("text_config", "vision_config", "gpt2_config") if name in fields)):
        part |= CODE
    (place / "config.json").write_text(json.dumps(fields))
    found, expected = read(place), read(source)
    model, other = [one[0] if kind == "gpt2" else one.backbone if kind == "clip" else one for one in (found, expected)]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for mine, theirs in zip(model.modules(), other.modules(), strict=True):
        if hasattr(theirs, "config"):
            assert mine.config._attn_implementation == theirs.config._attn_implementation
    edit(place / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(UserError, match="is quantized"):
        read(place)


def test_an_adapter_beside_a_model_is_not_taken_in(gpt2_directory, tmp_path):
    place = shutil.copytree(gpt2_directory, tmp_path / "model")
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "gpt2"}))
    with pytest.raises(UserError, match="holds an adapter"):
        load_gpt2(place)


@pytest.mark.parametrize("header", [
    {"transformer.wte.weight": {"dtype": "F32", "shape": [2**60, 16], "data_offsets": [0, 2**63]}},
    {"transformer.wte.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]}},
    {"transformer.wte.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}},
], ids=str)  # fmt: skip
def test_a_safetensors_header_that_claims_too_much(gpt2_directory, header, tmp_path):
    place = shutil.copytree(gpt2_directory, tmp_path / "gpt2")
    text = json.dumps(header).encode()
    (place / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    refused(lambda: load_gpt2(place), str(place))
    (place / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + text)
    refused(lambda: load_gpt2(place), str(place))


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return open, (str(self.made), "w")


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_no_loader_runs_what_a_pickle_asks_for(directories, form, tmp_path):
    from dietnerf.semantic import load_encoder

    made = tmp_path / "made"
    hostile = tmp_path / "hostile.pt"

    def write(path: Path) -> None:
        bad = {"clip_project.model.0.weight": Hostile(made)}
        torch.save(bad, path) if form == "torch" else path.write_bytes(pickle.dumps(bad) + bytes(100_000))

    write(hostile)
    refused(lambda: load_original_checkpoint(hostile, n_head=4))
    refused(lambda: load_clip(f"open_clip:ViT-B-32/{hostile}", device="cpu"))
    refused(lambda: load_encoder(f"torchvision:resnet18:{hostile}", device="cpu"))
    refused(lambda: Datastore.load(hostile))
    for kind in ("gpt2", "clip", "mapper", "tuned"):
        source, read = directories[kind]
        place = shutil.copytree(source, tmp_path / kind)
        (place / "model.safetensors").unlink()
        write(place / "pytorch_model.bin")
        refused(lambda read=read, place=place: read(place))
    assert not made.exists()


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    weights = torch.load(GOLDEN / "clipcap_mlp.pt", weights_only=True)
    for bad in (
        torch.zeros(1).expand(2**20, 2**20), torch.zeros(3, 3).to_sparse(), torch.zeros(2, 2, device="meta"),
        torch.zeros(2, 2, dtype=torch.complex64), "text", None,
    ):  # fmt: skip
        torch.save(weights | {"gpt.transformer.wte.weight": bad}, tmp_path / "bad.pt")
        refused(lambda: load_original_checkpoint(tmp_path / "bad.pt", n_head=4), "wte.weight' is no plain tensor")
        torch.save({"positional_embedding": bad}, tmp_path / "clip.pt")
        refused(lambda: load_clip(f"open_clip:ViT-B-32/{tmp_path / 'clip.pt'}", device="cpu"))


def test_tokenizers_of_other_models(gpt2_directory, clip_directory, tmp_path):
    for source, read in ((gpt2_directory, load_gpt2), (clip_directory, lambda path: load_clip(path, device="cpu"))):
        place = shutil.copytree(source, tmp_path / source.parent.name)
        fields = json.loads((place / "tokenizer.json").read_text())
        fields["model"]["vocab"]["Ġand"] = 10**9  # a hole before the last of the ids
        (place / "tokenizer.json").write_text(json.dumps(fields))
        refused(lambda read=read, place=place: read(place), str(place))


def test_links_in_a_directory_of_weights_are_followed(directories, tmp_path):
    for kind in ("gpt2", "clip", "mapper", "tuned"):  # as in the hub's cache
        source, read = directories[kind]
        place = tmp_path / kind
        place.mkdir()
        for file in source.iterdir():
            os.symlink(file, place / file.name)
        read(place)
