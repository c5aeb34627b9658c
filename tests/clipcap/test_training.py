"""`clipcap train`: what is trained and saved, exact resume, and errors."""

import csv
import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from clipcap import Captioner
from clipcap.config import ClipCapConfig
from clipcap.decoding import decode
from clipcap.model import ClipCapModel
from clipcap.training import material
from clipcap.training.lora import add_lora, merge_lora
from clipcap.training.module import CaptionTraining
from clipcap.training.settings import FREE, TrainConfig, resolve_init, resolve_rate
from clipcap.training.train import run, train
from common.checks import UserError, run_command
from common.files import claimed
from common.gpt2 import load_gpt2
from common.pretrained import ASSETS
from common.runtime import RuntimeConfig
from common.training import GradientConfig, ScaleConfig, flat
from tests.kills import kill_everywhere


@pytest.fixture
def config(tiny_run):
    return replace(
        tiny_run,
        mapper="transformer",
        clip_length=2,
        mapper_layers=1,
        mapper_heads=2,
        steps=6,
        batch_size=5,
        val_every=3,
        val_captions=0,
        max_tokens=TrainConfig.max_tokens,
    )


def weights(directory):
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


@pytest.mark.slow
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


def test_bundle_carries_both_backbones(config, photos, tmp_path):
    directory = train(replace(config, mapper="mlp", steps=2, bundle=True))
    fields = json.loads((directory / "config.json").read_text())
    assert (fields["clip"], fields["gpt2"]) == ("./clip", "./gpt2")
    moved = directory.rename(tmp_path / "moved")
    captioner = Captioner.from_pretrained(moved, device="cpu")
    assert captioner.clip.name == str(moved.resolve() / "clip")
    assert isinstance(captioner.caption(photos / "00.jpg", max_new_tokens=5), str)


def test_patches_as_input(config):
    directory = train(replace(config, inputs="patches", steps=2))
    assert ClipCapModel.from_pretrained(directory).config.clip_width == 16


@pytest.mark.slow
def test_images_are_read_by_workers(config, monkeypatch):
    given = []
    build = material.build_store
    monkeypatch.setattr(material, "build_store", lambda *a, **k: given.append(k["workers"]) or build(*a, **k))
    train(replace(config, steps=1))
    train(replace(config, steps=2, workers=0))  # a run resumes with others
    assert given == [2, 0]


def test_a_training_step_leaves_a_frozen_gpt2_untouched(config):
    """Regression: the original's frozen GPT-2 collects gradients and sits in the optimizer."""
    model = ClipCapModel.from_backbones(ClipCapConfig(clip_width=12, prefix_length=3, gpt2=config.gpt2)).train()
    before = {name: value.clone() for name, value in model.gpt2.state_dict().items()}
    module = CaptionTraining(model, lr=0.1, warmup=0, total=10, weight_decay=0.1)
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


@pytest.mark.slow
def test_resume_is_exact(config, tmp_path, monkeypatch):
    whole = weights(train(replace(config, tune_gpt2=True)))
    part = replace(config, tune_gpt2=True, out=tmp_path / "part")
    original, calls = CaptionTraining.training_step, []

    def interrupted(self, batch, batch_idx):
        calls.append(batch_idx)
        if len(calls) == 5:
            raise RuntimeError("killed")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(CaptionTraining, "training_step", interrupted)
    with pytest.raises(RuntimeError, match="killed"):
        train(part)
    monkeypatch.setattr(CaptionTraining, "training_step", original)
    resumed = weights(train(part))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"prefix_length": 32}, "prefix_length is 32"),
        ({"gpt2": "/nowhere"}, "'/nowhere' does not exist"),
        ({"clip": "no-such-clip"}, "no-such-clip"),
        ({"mapper": "mlp", "inputs": "patches"}, "patches"),
        ({"scst": True}, "without --init"),
        ({"scst": True, "retrieval": 2}, "scst and retrieval are given together"),
        ({"lora": 2, "tune_gpt2": True}, "lora and tune_gpt2"),
        ({"lora": 99}, "lora is 99: GPT-2 is 16 wide"),
        ({"text_only": True, "inputs": "patches"}, "texts have no patches"),
        ({"monitor": "cider"}, "no validation images are captioned"),
        ({"scale": ScaleConfig(devices=0)}, "devices is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"lr": 1e30, "tune_gpt2": True, "steps": 40}, "lower the learning rate"),
    ],
)
def test_settings_that_cannot_work_are_one_line(config, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        train(replace(config, **changes))
    assert "\n" not in str(caught.value)


def test_settings_that_are_free_exist(config):
    assert set(FREE) <= flat(asdict(config)).keys()


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_settings_and_captions_alone(config, photos):
    directory = train(replace(config, steps=2, val_every=1))
    before, record = weights(directory), (config.out / "training.json").read_text()
    for name, value, change in (
        ("mapper_layers", 2, {"mapper_layers": 2}),
        ("lr", 0.5, {"lr": 0.5}),
        ("clip_gradients", 2.0, {"gradients": GradientConfig(clip_gradients=2.0)}),
    ):
        with pytest.raises(UserError, match=f"was begun with {name} .*, now it is {value}: use the same again"):
            train(replace(config, **change))
    train(replace(config, steps=2, val_every=1))  # it is finished
    assert (config.out / "training.json").read_text() == record
    assert all(torch.equal(before[name], value) for name, value in weights(directory).items())
    data = json.loads((photos / "dataset.json").read_text())
    data["images"][0]["sentences"][0]["raw"] = "the dog sat"
    (photos / "dataset.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="was begun with captions '16 with hash"):
        train(replace(config, steps=2))
    train(replace(config, steps=2, val_every=1, lr=0.5, resume=False))
    assert json.loads((config.out / "training.json").read_text())["config"]["lr"] == 0.5


def test_without_a_validation_split_the_last_weights_are_kept(config, photos, capfd):
    data = json.loads((photos / "dataset.json").read_text())
    for row in data["images"]:
        row["split"] = "train"
    (photos / "dataset.json").write_text(json.dumps(data))
    directory = train(replace(config, steps=4, val_every=2, val_captions=0, patience=1))
    assert "has no validation split: the last weights are kept" in capfd.readouterr().err
    last = torch.load(config.out / "last.ckpt", weights_only=False)
    assert last["global_step"] == 4 and not (config.out / "best.ckpt").exists()
    assert all(torch.equal(last["state_dict"][f"model.{name}"], value) for name, value in weights(directory).items())


@pytest.mark.slow
def test_going_on_keeps_what_init_was_trained_as(config, tmp_path):
    tuned = train(replace(config, tune_gpt2=True, steps=1))
    train(replace(config, init=tuned, out=tmp_path / "second", steps=1))
    record = json.loads((tmp_path / "second/training.json").read_text())
    assert record["config"]["tune_gpt2"] and record["trained_parameters"] > sum(
        value.numel() for name, value in weights(tuned).items() if name.startswith("mapper.")
    )
    stops_at_a_word = ClipCapModel.from_pretrained(tuned)
    stops_at_a_word.config.eos_token_id = 13  # as of the original project's checkpoints
    stops_at_a_word.save_pretrained(tmp_path / "word")
    again = train(replace(config, init=tmp_path / "word", out=tmp_path / "fourth", steps=1))
    model = ClipCapModel.from_pretrained(again)
    assert model.config.eos_token_id == model.tokenizer.eos_token_id != 13
    with pytest.raises(UserError, match="text_only trains on those of length 1"):
        train(replace(config, init=tuned, text_only=True, out=tmp_path / "third"))


def test_any_gpt2_directory_is_accepted(config, gpt2_directory):
    model, _ = load_gpt2(gpt2_directory)
    assert ClipCapModel.from_pretrained(train(replace(config, steps=1))).gpt2.config.n_embd == model.config.n_embd


@pytest.mark.slow
def test_accumulated_batches_are_one_large_batch(config):
    """The mean over all tokens of a step: batches of short and of long captions weigh by their tokens."""
    one = weights(train(replace(config, batch_size=16, steps=5)))
    four = weights(
        train(replace(config, out=config.out / "four", batch_size=4, gradients=GradientConfig(accumulate=4), steps=5))
    )
    assert all(torch.allclose(one[name], four[name], atol=1e-5) for name in one)


def test_the_loss_of_a_step_is_the_mean_over_its_tokens(config, monkeypatch):
    model = ClipCapModel.from_backbones(ClipCapConfig(clip_width=12, prefix_length=3, gpt2=config.gpt2))
    torch.manual_seed(0)
    images, ids = torch.randn(6, 12), torch.randint(1, 200, (6, 9))
    labels = ids.clone()
    labels[:3, 2:] = -100  # a short batch and a long one
    module = CaptionTraining(model, lr=1.0, warmup=0, total=1, weight_decay=0.0)

    class Fake:
        world_size, accumulate_grad_batches = 1, 2

    logged = {}
    monkeypatch.setattr(CaptionTraining, "trainer", Fake)
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.setdefault(name, value))
    for part in (slice(0, 3), slice(3, 6)):
        batch = {"clip_embeddings": images[part], "input_ids": ids[part], "labels": labels[part]}
        (module.training_step(batch, 0) / 2).backward()  # Lightning divides by the batches of a step
    module.on_before_optimizer_step(None)
    found = [parameter.grad.clone() for parameter in model.mapper.parameters()]
    model.zero_grad()
    expected = model(images, ids, labels=labels).loss
    expected.backward()
    assert logged["train/loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, parameter in zip(found, model.mapper.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, atol=1e-6)


def test_lora_trains_its_updates_alone_and_is_saved_as_a_plain_gpt2(config):
    directory = train(replace(config, lora=2))
    saved = {name.removeprefix("gpt2."): value for name, value in weights(directory).items() if "gpt2." in name}
    base = load_gpt2(config.gpt2)[0].state_dict()
    changed = {name for name in saved if not torch.equal(saved[name], base[name])}
    assert changed and all("c_attn.weight" in name or "c_proj.weight" in name for name in changed)
    checkpoint = torch.load(config.out / "last.ckpt", weights_only=False)["state_dict"]
    assert all("mapper" in name or "lora_" in name for name in checkpoint)
    record = json.loads((config.out / "training.json").read_text())
    mapper = sum(value.numel() for name, value in weights(directory).items() if name.startswith("mapper."))
    assert record["trained_parameters"] == mapper + 2 * 2 * (16 + 48 + 16 + 16 + 64 + 16)  # 2 layers, rank 2
    assert ClipCapModel.from_pretrained(directory).config.tune_gpt2


def test_lora_decodes_the_same_before_and_after_it_is_merged(config):
    torch.manual_seed(0)
    model = ClipCapModel.from_backbones(ClipCapConfig(clip_width=12, prefix_length=3, gpt2=config.gpt2)).eval()
    images, ids = torch.randn(4, 12), torch.randint(1, 200, (4, 6))
    plain = model(images, ids).logits
    add_lora(model, 4)
    model.eval()
    assert torch.equal(model(images, ids).logits, plain)  # the update begins at 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before, captions = model(images, ids).logits, decode(model, images, strategy="greedy", max_new_tokens=8)
    assert not torch.allclose(before, plain, atol=1e-2)
    merge_lora(model)
    assert torch.allclose(model(images, ids).logits, before, atol=1e-3)
    after = decode(model, images, strategy="greedy", max_new_tokens=8)
    assert [c[0].token_ids for c in after] == [c[0].token_ids for c in captions]
    assert model.state_dict().keys() == ClipCapModel(model.config).state_dict().keys()


def test_patience_ends_the_run_and_the_model_is_saved(config):
    settings = replace(config, steps=40, val_every=2, patience=2, lr=1e-30, schedule="linear")
    assert (train(settings) / "model.safetensors").is_file()
    record = json.loads((config.out / "training.json").read_text())
    assert record["stopped_early"] and record["steps"] == 6  # the first validation, and two without improvement
    train(settings)
    assert json.loads((config.out / "training.json").read_text())["steps"] == 6  # it has ended already


@pytest.mark.slow
def test_goes_on_from_a_trained_captioner(config):
    first = train(config)
    second = train(replace(config, init=first, out=config.out / "second", steps=1, lr=1e-30))
    before, after = weights(first), weights(second)
    assert all(torch.allclose(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match="mapper is 'mlp' but init .* has 'transformer'"):
        train(replace(config, init=first, mapper="mlp"))
    with pytest.raises(UserError, match="no trained captioner: give photo, tiny"):
        train(replace(config, init=config.out))


def test_a_packaged_captioner_is_continued_by_its_name():
    config = resolve_init(TrainConfig(data=Path("captions.csv"), init=Path("photo")))
    assert (config.mapper, config.inputs) == ("transformer", "patches") and config.tune_gpt2
    assert config.clip == "photo" and config.init == ASSETS / "captioner-photo"


def test_a_rate_that_is_left_out_goes_with_the_decoder(config, tmp_path):
    plain = replace(config, lr=None)
    shutil.copytree(ASSETS / "gpt2-tiny", tmp_path / "wide", ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "wide" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_embd": 768, "n_head": 12}))
    assert resolve_rate(plain).lr == 1e-3
    assert resolve_rate(replace(plain, gpt2=str(tmp_path / "wide"))).lr == 2e-5  # the paper's
    assert resolve_rate(resolve_init(TrainConfig(data=Path("x"), init=Path("photo")))).lr == pytest.approx(1e-4)
    assert resolve_rate(config) == config


@pytest.mark.slow
def test_logs_and_a_quiet_terminal(config, capfd, recwarn):
    train(replace(config, steps=20, val_every=5, val_captions=4))
    with open(config.out / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert {"train/loss", "val/loss", "val/cider", "val/top_caption_share", "val/distinct_captions"} <= set(rows[0])
    assert [row["step"] for row in rows if row["val/cider"]] == ["4", "9", "14", "19"]
    assert list((config.out / "tensorboard").glob("events*"))
    printed = "".join(capfd.readouterr())
    for chatter in ("GPU available", "Tip:", "max_steps", "num_workers", "TPU", "Warning"):
        assert chatter not in printed


def test_one_run_at_a_time_in_a_directory(config):
    with claimed(config.out), pytest.raises(UserError, match="is in use by process .*: wait for it, stop it, or give"):
        train(config)
    assert os.listdir(config.out) == []
    with pytest.raises(UserError, match="embeddings and out are both .*: give each a directory of its own"):
        train(replace(config, embeddings=config.out))


def test_a_directory_that_is_not_ours_is_refused_before_any_work(config, monkeypatch):
    (config.out / "model").mkdir(parents=True)
    (config.out / "model" / "thesis.txt").write_text("mine")
    monkeypatch.setattr("clipcap.training.train.read_items", lambda *_: pytest.fail("work"))
    with pytest.raises(UserError, match="would take the place of 'thesis.txt'"):
        train(config)
    assert (config.out / "model" / "thesis.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_signal_while_it_trains_loses_nothing(config, tmp_path, monkeypatch, capsys):
    whole = weights(train(replace(config, tune_gpt2=True)))
    part = replace(config, tune_gpt2=True, out=tmp_path / "part")
    original, calls = CaptionTraining.training_step, []

    def signalled(self, batch, batch_idx):
        calls.append(batch_idx)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(CaptionTraining, "training_step", signalled)
        assert run_command(lambda: run(part)) == 143
    assert "stopped by SIGTERM; what was saved before is kept." in capsys.readouterr().err
    assert torch.load(part.out / "last.ckpt", weights_only=True)["global_step"] == 4
    assert not (part.out / "model").exists() and not (part.out / ".lock").exists()
    resumed = weights(train(part))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def scene_captioner(directory: Path) -> str:
    """A scenario of `tests.kills`: a captioner of the packaged scenes."""
    torch.set_num_threads(1)
    saved = train(
        TrainConfig(
            data=ASSETS / "samples/scenes/dataset.json", out=directory, embeddings=directory.parent / "embeddings",
            mapper="mlp", prefix_length=2, steps=2, batch_size=4, val_every=1, val_captions=0, workers=0,
            runtime=RuntimeConfig(device="cpu"),
        )
    )  # fmt: skip
    last = torch.load(directory / "last.ckpt", weights_only=True)["state_dict"]
    values = [*weights(saved).values(), *last.values()]
    return str([float(value.double().sum()) for value in values]) + (directory / "metrics.csv").read_text()


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_training_killed_at_any_of_its_writes_ends_the_same(forks, tmp_path, exhaustive):
    points = 20 if exhaustive else 6
    kill_everywhere(forks, "tests.clipcap.test_training:scene_captioner", tmp_path, points=points)


FULL = """
import resource, sys
from pathlib import Path
from common.checks import run_command
from clipcap.training import train as training
from tests.clipcap.test_training import TrainConfig, ASSETS, RuntimeConfig

def fill(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    return whole(*arguments)

whole, training.whole_directory = training.whole_directory, fill
config = TrainConfig(data=ASSETS / "samples/scenes/dataset.json", out=Path(sys.argv[1]), mapper="mlp", prefix_length=2,
                     steps=1, batch_size=4, val_captions=0, workers=0, runtime=RuntimeConfig(device="cpu"))
raise SystemExit(run_command(lambda: training.run(config)))
"""


@pytest.mark.slow
def test_a_full_disk_at_the_end_is_one_line_and_the_same_command_writes_the_model(forks, tmp_path):
    done = forks.run(FULL, tmp_path / "run")
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "File too large" in last and str(tmp_path / "run") in last
    assert not (tmp_path / "run/model").exists() and not (tmp_path / "run/.model.partial").exists()
    checkpoint = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1
