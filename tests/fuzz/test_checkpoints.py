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
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from clipcap import ClipCapConfig, ClipCapModel, ClipCapProcessor, load_original_checkpoint
from clipcap.data.dataset import CaptionedImage
from clipcap.data.embeddings import build_store
from clipcap.data.store import EmbeddingStore, StoreWriter
from clipcap.retrieval import Datastore
from common.checks import UserError
from common.clip import load_clip
from common.gpt2 import load_gpt2
from tests.fuzz.mutations import FUZZ, bad_json, break_file, changed, damaged, json_text, only_user_errors

GOLDEN = Path(__file__).parent.parent / "golden"
SHAPES = [(), (0,), (3,), (0, 3), (2, 2), (7, 5), (1, 2, 3)]
NUMBERS = st.one_of(
    st.none(), st.integers(-2, 20), st.text(max_size=4), st.just([]), st.just({}), st.booleans(), st.floats()
)
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


@pytest.fixture(scope="module")
def directories(captioner, gpt2_directory, clip_directory, tmp_path_factory):
    """A directory of each kind and what reads it."""
    place = tmp_path_factory.mktemp("kinds")
    config = ClipCapConfig(
        gpt2=str(gpt2_directory), clip=str(clip_directory), clip_width=4, prefix_length=2, tune_gpt2=True
    )
    ClipCapModel.from_backbones(config).save_pretrained(place / "tuned")
    ClipCapProcessor.from_pretrained(place / "tuned").save_pretrained(place / "processor")
    return {
        "gpt2": (gpt2_directory, load_gpt2),
        "clip": (clip_directory, lambda path: load_clip(path, device="cpu")),
        "mapper": (captioner, ClipCapModel.from_pretrained),
        "tuned": (place / "tuned", ClipCapModel.from_pretrained),
        "auto": (place / "tuned", AutoModel.from_pretrained),
        "processor": (place / "processor", ClipCapProcessor.from_pretrained),
        "auto processor": (place / "tuned", AutoProcessor.from_pretrained),
    }


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


def edit(path: Path, part: str | None = None, **values) -> None:
    """Change fields of a JSON file, or of one of its parts."""
    fields = json.loads(path.read_text())
    (fields[part] if part else fields).update(values)
    path.write_text(json.dumps(fields))


NAN, INF = float("nan"), float("inf")
GPT2_SILLY = [
    *({"eos_token_id": value} for value in ("x", 1.5, -1, 270, [], [0, "x"], [270], {}, True)),
    *({"bos_token_id": value} for value in ("x", 270, [0])), {"pad_token_id": -100},
    *({"n_positions": value} for value in (0, -1, "x", None, 1.5, 10**9, 2**70)),
    *({"n_embd": value} for value in (0, 17, 10**6, 10**7, 10**30, "16")),
    *({"n_head": value} for value in (0, 3, -2, 10**6, None)), *({"n_layer": value} for value in (0, 900, 10**6, True)),
    *({"n_inner": value} for value in (0, 10**7, "x")), *({"vocab_size": value} for value in (0, 5, 10**7, 1.0)),
    *({"layer_norm_epsilon": value} for value in (0, -1, NAN, INF, "x", None, 1e300)),
    *({"activation_function": value} for value in ("nope", None, ["gelu"], 3)),
    *({"resid_pdrop": value} for value in (1, -0.1, NAN, "x", None)), {"initializer_range": INF},
    {"scale_attn_weights": "x"}, {"tie_word_embeddings": False}, {"add_cross_attention": True},
]  # fmt: skip


@pytest.mark.parametrize("values", GPT2_SILLY, ids=str)
def test_silly_values_of_a_gpt2(gpt2_directory, values, tmp_path):
    place = shutil.copytree(gpt2_directory, tmp_path / "gpt2")
    edit(place / "config.json", **values)
    refused(lambda: load_gpt2(place), str(place))


def test_values_that_mean_none_are_fine(gpt2_directory, tmp_path):
    place = shutil.copytree(gpt2_directory, tmp_path / "gpt2")
    edit(place / "config.json", eos_token_id=50256, bos_token_id=None)  # transformers' default, of a larger vocabulary
    edit(place / "generation_config.json", eos_token_id="x", num_beams=10**9)
    model, _ = load_gpt2(place)
    assert model.config.eos_token_id is None and model.generation_config.eos_token_id is None
    assert model.generation_config.num_beams in (None, 1)


CAPTIONER_SILLY = [
    *({"eos_token_id": value} for value in ("x", 1.5, -1, 270, [], ["x"])),
    *({"prefix_length": value} for value in (0, 32, 10**6, 10**12, 10**30, "x", None, 2.0, True)),
    *({"clip_width": value} for value in (0, 10**7, 10**30, "x")), {"mapper": "transformer", "mapper_layers": 10**6},
    {"mapper": ["mlp"]}, {"inputs": {}}, {"inputs": "patches"}, {"retrieval": 2}, {"retrieval": -1}, {"retrieval_tokens": 1},
    {"normalize_embeddings": "no"}, {"tune_gpt2": 1}, {"gpt2": 3}, {"clip": []}, {"gpt2_config": []}, {"gpt2_config": "x"},
    {"gpt2_config": {"n_embd": 10**7}}, {"gpt2_config": {"n_layer": "x"}}, {"gpt2_config": None}, {"mapper_heads": 0},
]  # fmt: skip


@pytest.mark.parametrize("values", CAPTIONER_SILLY, ids=str)
def test_silly_values_of_a_captioner(captioner, values, tmp_path):
    place = shutil.copytree(captioner, tmp_path / "model")
    edit(place / "config.json", **values)
    refused(lambda: ClipCapModel.from_pretrained(place))


CLIP_SILLY = [
    *({part: {name: value}} for part in ("text_config", "vision_config") for name, value in (
        ("hidden_size", 10**6), ("hidden_size", 0), ("num_hidden_layers", 10**6), ("num_hidden_layers", -1),
        ("num_attention_heads", 3), ("num_attention_heads", 0), ("hidden_act", "nope"), ("layer_norm_eps", NAN),
        ("layer_norm_eps", None), ("attention_dropout", 2), ("intermediate_size", 10**7), ("intermediate_size", "x"),
    )),
    *({"vision_config": {"image_size": value}} for value in (0, 10**9, "8", [8, 8], None, 8.0)),
    *({"vision_config": {"patch_size": value}} for value in (0, 9, 10**6, None)), {"vision_config": {"num_channels": 4}},
    *({"text_config": {"eos_token_id": value}} for value in ("x", None, [0], 5)), {"text_config": {"vocab_size": 3}},
    {"text_config": {"max_position_embeddings": 10**7}}, {"projection_dim": 10**7}, {"projection_dim": "x"},
    {"text_config": []}, {"vision_config": "x"}, {"text_config_dict": 5}, {"vision_config_dict": {"hidden_size": 10**6}},
]  # fmt: skip


@pytest.mark.parametrize("values", CLIP_SILLY, ids=str)
def test_silly_values_of_a_clip(clip_directory, values, tmp_path):
    place = shutil.copytree(clip_directory, tmp_path / "clip")
    for name, value in values.items():
        if isinstance(value, dict) and not name.endswith("_dict"):
            edit(place / "config.json", name, **value)
        else:
            edit(place / "config.json", **{name: value})
    refused(lambda: load_clip(place, device="cpu"), str(place))


PIXELS_SILLY = [
    *({name: value} for name in ("image_mean", "image_std") for value in (
        None, [0.5], [0.5] * 4, "half", ["x"] * 3, [NAN] * 3, [INF] * 3, [-1.0] * 3, [123.7, 116.3, 103.5], 0.5, {}, [True] * 3,
    )),
    {"image_std": [0.0] * 3}, {"image_std": [1e-30] * 3}, *({name: {"height": side, "width": side}} for name in
        ("size", "crop_size") for side in (0, -1, 7, 10**9, "8")), {"size": {"shortest_edge": 10**9}}, {"size": None},
    {"size": 7}, {"crop_size": 9}, {"crop_size": {"height": 8, "width": 9}}, {"resample": 4}, {"resample": "x"},
    {"do_center_crop": False}, {"do_center_crop": "no"}, {"do_resize": False}, {"do_normalize": 0}, {"do_rescale": 0},
    {"rescale_factor": 1.0}, {"rescale_factor": NAN}, {"size": {"height": 8, "width": 9}}, {"do_pad": True},
    {"size": {"shortest_edge": 8, "longest_edge": 16}}, {"image_processor_type": "Mine"}, {"image_processor_type": 3},
]  # fmt: skip


@pytest.mark.parametrize("values", PIXELS_SILLY, ids=str)
def test_silly_preprocessing(clip_directory, values, tmp_path):
    place = shutil.copytree(clip_directory, tmp_path / "clip")
    [file] = [name for name in ("preprocessor_config.json", "processor_config.json") if (place / name).is_file()]
    edit(place / file, **values)
    refused(lambda: load_clip(place, device="cpu"), file)


@pytest.mark.parametrize("values, expected", [
    ({"size": 8, "crop_size": 8}, ("bicubic", False)),  # as in old files
    ({"resample": 2}, ("bilinear", False)),
    ({"do_center_crop": False, "size": {"height": 8, "width": 8}}, ("bicubic", True)),
    ({"size": {"height": 9, "width": 9}, "resample": 1}, ("lanczos", True)),
    ({"size": {"shortest_edge": 10}, "do_normalize": False}, ("bicubic", False)),
], ids=str)  # fmt: skip
def test_preprocessing_that_is_honoured(clip_directory, values, expected, tmp_path):
    place = shutil.copytree(clip_directory, tmp_path / "clip")
    edit(place / "preprocessor_config.json", **values)
    found = load_clip(place, device="cpu").preprocess
    assert (found.interpolation, found.squash) == expected and found.size == 8


def test_where_preprocessing_is_read_from(clip_directory, tmp_path):
    place = shutil.copytree(clip_directory, tmp_path / "clip")
    fields = json.loads((place / "preprocessor_config.json").read_text())
    (place / "processor_config.json").write_text(
        json.dumps({"processor_class": "CLIPProcessor"})
    )  # says nothing of images
    assert load_clip(place, device="cpu").mean == tuple(fields["image_mean"])
    newer = {"image_processor": fields | {"image_mean": [0.1, 0.2, 0.3]}}
    (place / "processor_config.json").write_text(json.dumps(newer))
    assert load_clip(place, device="cpu").mean == (0.1, 0.2, 0.3)
    for bad in ("[]", "3", "{", '{"image_processor": []}'):
        (place / "processor_config.json").write_text(bad)
        if bad in ("[]", "3"):
            assert load_clip(place, device="cpu").mean == tuple(fields["image_mean"])
        else:
            refused(lambda: load_clip(place, device="cpu"))


def test_silly_values_of_a_processor(directories, tmp_path):
    place = shutil.copytree(directories["processor"][0], tmp_path / "processor")
    good = (place / "processor_config.json").read_text()
    for values in (
        {"std": [0, 0, 0]},
        {"mean": 3},
        {"size": 10**9},
        {"size": "x"},
        {"interpolation": "x"},
        {"squash": 1},
        {"a": 1},
    ):
        (place / "processor_config.json").write_text(good)
        edit(place / "processor_config.json", "image", **values)
        refused(lambda: ClipCapProcessor.from_pretrained(place))


def refused(read, *words: str) -> None:
    """A UserError of one line with these words."""
    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 1000 and all(word in message for word in words), message


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_weights_with_nan_are_refused_by_name(directories, bad, tmp_path):
    for kind in ("gpt2", "clip", "mapper", "tuned"):
        source, read = directories[kind]
        place = shutil.copytree(source, tmp_path / kind)
        weights = load_file(place / "model.safetensors")
        name = sorted(weights)[len(weights) // 2]
        weights[name].flatten()[-1] = bad
        save_file(weights, place / "model.safetensors", {"format": "pt"})
        refused(lambda read=read, place=place: read(place), name, "NaN or infinity")
    weights = torch.load(GOLDEN / "clipcap_mlp.pt", weights_only=True)
    weights["gpt.transformer.ln_f.bias"][0] = bad
    torch.save(weights, tmp_path / "original.pt")
    refused(lambda: load_original_checkpoint(tmp_path / "original.pt", n_head=4), "gpt.transformer.ln_f.bias holds NaN")


def test_finite_weights_whose_sum_is_not_are_fine(gpt2_directory, tmp_path):
    place = shutil.copytree(gpt2_directory, tmp_path / "gpt2")
    weights = load_file(place / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"].fill_(3e38)
    save_file(weights, place / "model.safetensors", {"format": "pt"})
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
