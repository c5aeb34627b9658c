"""A captioner's backbones: named relative to its directory, or carried in it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clipcap import Captioner, ClipCapConfig, ClipCapModel
from clipcap.backbones import absolute, copy_backbones, located, relative, require_copyable
from clipcap.cli import main
from clipcap.training.settings import TrainConfig, check, resolve_init
from common.checks import UserError


@pytest.fixture
def project(tmp_path, clip_directory, gpt2_directory) -> Path:
    """Backbones and a captioner in one directory, which can be moved."""
    place = tmp_path / "project"
    shutil.copytree(clip_directory, place / "weights" / "clip")
    shutil.copytree(gpt2_directory, place / "weights" / "gpt2")
    torch.manual_seed(0)
    config = ClipCapConfig(
        clip_width=12, prefix_length=3, gpt2=str(place / "weights/gpt2"), clip=str(place / "weights/clip")
    )
    ClipCapModel.from_backbones(config).save_pretrained(place / "captioner")
    return place


def names(directory: Path) -> tuple[str, str]:
    fields = json.loads((directory / "config.json").read_text())
    return fields["clip"], fields["gpt2"]


def captions(directory: Path, photos: Path) -> list[str]:
    images = sorted(photos.glob("*.jpg"))[:2]
    return Captioner.from_pretrained(directory, device="cpu").caption(images, max_new_tokens=6, num_beams=2)


def test_directories_are_named_relative_and_move_together(project, photos, tmp_path):
    assert names(project / "captioner") == ("../weights/clip", "../weights/gpt2")
    before = captions(project / "captioner", photos)
    moved = tmp_path / "elsewhere" / "deep"
    moved.parent.mkdir()
    shutil.move(project, moved)
    assert captions(moved / "captioner", photos) == before
    model = ClipCapModel.from_pretrained(moved / "captioner")
    assert model.config.clip == os.path.realpath(moved / "weights/clip")  # in memory it is where it is
    model.save_pretrained(tmp_path / "again")
    assert names(tmp_path / "again") == ("../elsewhere/deep/weights/clip", "../elsewhere/deep/weights/gpt2")
    shutil.rmtree(moved / "weights/gpt2")
    with pytest.raises(UserError, match="needs the GPT-2"):
        ClipCapModel.from_pretrained(moved / "captioner")


def test_absolute_names_of_older_captioners_load(project, photos):
    file = project / "captioner" / "config.json"
    before = captions(project / "captioner", photos)
    fields = json.loads(file.read_text())
    fields |= {"clip": str(project / "weights/clip"), "gpt2": str(project / "weights/gpt2")}
    file.write_text(json.dumps(fields))
    assert captions(project / "captioner", photos) == before


def test_a_bundle_needs_nothing_outside(project, photos, tmp_path, capsys):
    before = captions(project / "captioner", photos)
    assert main(["bundle", str(project / "captioner"), str(tmp_path / "bundle")]) == 0
    assert names(tmp_path / "bundle") == ("./clip", "./gpt2")
    shutil.rmtree(project)
    shutil.move(tmp_path / "bundle", tmp_path / "moved")
    assert captions(tmp_path / "moved", photos) == before

    model = ClipCapModel.from_pretrained(tmp_path / "moved")
    model.save_pretrained(tmp_path / "moved", bundle=True)  # onto itself
    model.save_pretrained(tmp_path / "beside")
    assert names(tmp_path / "moved") == ("./clip", "./gpt2")
    assert names(tmp_path / "beside") == ("../moved/clip", "../moved/gpt2")
    assert captions(tmp_path / "moved", photos) == captions(tmp_path / "beside", photos) == before
    assert not list((tmp_path / "moved").glob(".saving-*"))

    saved = resolve_init(TrainConfig(data=Path("x"), init=tmp_path / "moved"))
    assert saved.clip == os.path.realpath(tmp_path / "moved/clip")
    capsys.readouterr()
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["bundle", "tiny", str(tmp_path)]) == 2 and "notes.txt" not in os.listdir(tmp_path / "moved")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_tuned_gpt2_is_bundled_once(project, tmp_path):
    config = ClipCapConfig(
        clip_width=12,
        prefix_length=3,
        gpt2=str(project / "weights/gpt2"),
        clip=str(project / "weights/clip"),
        tune_gpt2=True,
    )
    model = ClipCapModel.from_backbones(config)
    model.save_pretrained(tmp_path / "tuned", bundle=True)
    assert (tmp_path / "tuned/clip").is_dir() and not (tmp_path / "tuned/gpt2").exists()
    assert ClipCapModel.from_pretrained(tmp_path / "tuned").tokenizer is not None


def test_packaged_names_are_bundled_on_request_only(tmp_path):
    model = ClipCapModel.from_pretrained("tiny")
    model.save_pretrained(tmp_path / "plain")
    assert names(tmp_path / "plain") == (model.config.clip, model.config.gpt2)
    found = copy_backbones(model.config, tmp_path / "files")
    assert found["clip"] == "./clip" and (tmp_path / "files/clip/model.safetensors").is_file()


def test_paths_behind_a_library_s_name(tmp_path, monkeypatch):
    file = tmp_path / "weights" / "vit.safetensors"
    file.parent.mkdir()
    (tmp_path / "captioner").mkdir()
    save_file({"a": torch.zeros(1)}, file)
    monkeypatch.chdir(tmp_path)
    for head in ("open_clip:ViT-B-32", "timm:resnet18.a1_in1k", "torchvision:resnet18"):
        name = absolute(f"{head}/weights/vit.safetensors")
        assert name == f"{head}/{file}"
        assert relative(name, tmp_path / "captioner") == f"{head}/../weights/vit.safetensors"
        config = ClipCapConfig(clip=f"{head}/../weights/vit.safetensors")
        assert located(config, str(tmp_path / "captioner")).clip == name
        assert config.clip.startswith(f"{head}/..")  # the one that was given is left alone
        place = tmp_path / "bundle" / head.partition(":")[0]
        found = copy_backbones(ClipCapConfig(clip=name), place)
        assert found == {"clip": f"{head}/./clip/vit.safetensors"}
        assert (place / "clip/vit.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["open_clip:RN50/openai", "timm:resnet18", "torchvision:resnet18"])
def test_weights_that_a_library_keeps_are_refused_before_training(name, tmp_path):
    with pytest.raises(UserError, match=f"clip '{name}' cannot be bundled"):
        require_copyable("clip", name)
    with pytest.raises(UserError, match="cannot be bundled"):
        check(TrainConfig(data=tmp_path, clip=name, bundle=True))
    assert absolute(name) == name == relative(name, tmp_path)


def test_hub_ids_come_from_the_cache_or_are_refused(tmp_path, gpt2_directory, monkeypatch):
    config = ClipCapConfig(gpt2="somebody/nothing", gpt2_config={"n_embd": 4})
    with pytest.raises(UserError, match="'somebody/nothing' cannot be bundled.*hf download somebody/nothing"):
        copy_backbones(config, tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(gpt2_directory))
    assert copy_backbones(config, tmp_path) == {"gpt2": "./gpt2"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(tmp_path / "gpt2"))
    config.gpt2 = "./gpt2"
    assert located(config, "somebody/captioner").gpt2 == str(gpt2_directory.resolve() / "gpt2")
