"""Values of a model's configuration that no model has: each is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipcap import ClipCapModel, ClipCapProcessor, load_original_checkpoint
from common.clip import load_clip
from common.gpt2 import load_gpt2
from tests.fuzz.mutations import edit, refused

GOLDEN = Path(__file__).parent.parent / "golden"


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
