"""`clipcap train`: what is trained and saved, exact resume, and errors."""

import json
from dataclasses import replace

import pytest
import torch

from clipcap import Captioner
from clipcap.model import ClipCapConfig, ClipCapModel
from clipcap.training import Captioning, TrainConfig, train
from common.checks import UserError
from common.gpt2 import load_gpt2
from common.runtime import RuntimeConfig


@pytest.fixture
def config(photos, clip_directory, gpt2_directory, tmp_path):
    return TrainConfig(
        data=photos / "dataset.json",
        out=tmp_path / "run",
        clip=str(clip_directory),
        gpt2=str(gpt2_directory),
        prefix_length=3,
        clip_length=2,
        mapper_layers=1,
        mapper_heads=2,
        steps=6,
        batch_size=5,
        lr=1e-2,
        val_every=3,
        runtime=RuntimeConfig(device="cpu"),
    )


def weights(directory):
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("mapper", ["mlp", "transformer"])
@pytest.mark.parametrize("tune", [False, True])
def test_trains_saves_and_captions(config, mapper, tune, photos):
    directory = train(replace(config, mapper=mapper, tune_gpt2=tune))
    saved = weights(directory)
    assert any(name.startswith("gpt2.") for name in saved) == tune  # a frozen backbone is in no checkpoint of ours
    checkpoint = torch.load(config.out / "last.ckpt", weights_only=False)
    assert any("gpt2" in name for name in checkpoint["state_dict"]) == tune
    record = json.loads((config.out / "training.json").read_text())
    assert record["steps"] == 6 and record["captions"] == {"train": 16, "val": 4}
    captions = Captioner.from_pretrained(directory, device="cpu").caption(
        [photos / "00.jpg", photos / "01.jpg"], max_new_tokens=5
    )
    assert len(captions) == 2 and all(isinstance(text, str) for text in captions)


def test_patches_as_input(config):
    directory = train(replace(config, inputs="patches", steps=2))
    assert ClipCapModel.from_pretrained(directory).config.clip_width == 16


def test_a_training_step_leaves_a_frozen_gpt2_untouched(config):
    """Regression: the original's frozen GPT-2 collects gradients and sits in the optimizer."""
    model = ClipCapModel.from_backbones(ClipCapConfig(clip_width=12, prefix_length=3, gpt2=config.gpt2)).train()
    before = {name: value.clone() for name, value in model.gpt2.state_dict().items()}
    module = Captioning(model, lr=0.1, warmup=0, total=10, weight_decay=0.1)
    optimizer = module.configure_optimizers()["optimizer"]
    ids = torch.randint(1, 200, (4, 6))
    loss = module._loss({"clip_embeddings": torch.randn(4, 12), "input_ids": ids, "labels": ids})
    loss.backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.gpt2.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.gpt2.state_dict().items())
    in_optimizer = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert in_optimizer == {id(parameter) for parameter in model.mapper.parameters()}
    assert not model.gpt2.training and model.mapper.training


def test_resume_is_exact(config, tmp_path, monkeypatch):
    whole = weights(train(replace(config, tune_gpt2=True)))
    part = replace(config, tune_gpt2=True, out=tmp_path / "part")
    original, calls = Captioning.training_step, []

    def interrupted(self, batch, batch_idx):
        calls.append(batch_idx)
        if len(calls) == 5:
            raise RuntimeError("killed")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Captioning, "training_step", interrupted)
    with pytest.raises(RuntimeError, match="killed"):
        train(part)
    monkeypatch.setattr(Captioning, "training_step", original)
    resumed = weights(train(part))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_overfits_a_caption(config, photos):
    """The whole path learns: after enough steps every caption is one of the training captions."""
    data = json.loads((photos / "dataset.json").read_text())
    for row in data["images"]:
        row["sentences"] = [{"raw": "the cat sat on the mat"}]
    (photos / "dataset.json").write_text(json.dumps(data))
    directory = train(replace(config, tune_gpt2=True, steps=150, val_every=150, lr=2e-2))
    captions = Captioner.from_pretrained(directory, device="cpu").caption(
        sorted(photos.glob("*.jpg")), max_new_tokens=20
    )
    assert set(captions) == {"the cat sat on the mat"}  # and it stopped at the end token


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"prefix_length": 32}, "prefix_length is 32"),
        ({"gpt2": "/nowhere"}, "'/nowhere' does not exist"),
        ({"clip": "no-such-clip"}, "no-such-clip"),
        ({"mapper": "mlp", "inputs": "patches"}, "patches"),
        ({"lr": 1e30, "tune_gpt2": True, "steps": 40}, "lower the learning rate"),
    ],
)
def test_settings_that_cannot_work_are_one_line(config, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        train(replace(config, **changes))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_other_sizes_is_named(config):
    train(replace(config, steps=2, val_every=1))
    with pytest.raises(UserError, match=r"last\.ckpt.*does not fit"):
        train(replace(config, mapper_layers=2))


def test_any_gpt2_directory_is_accepted(config, gpt2_directory):
    model, _ = load_gpt2(gpt2_directory)
    assert ClipCapModel.from_pretrained(train(replace(config, steps=1))).gpt2.config.n_embd == model.config.n_embd
