"""Two processes on a CPU train as one does with batches twice as large, whoever starts them, and go on after a kill."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from clipcap.training.settings import TrainConfig
from clipcap.training.train import train
from common.pretrained import ASSETS
from common.runtime import RuntimeConfig

SCRIPT = """
import os, sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
torch.set_num_threads(1)
from clipcap.training.train import CaptionTraining, TrainConfig, train
from common.runtime import RuntimeConfig
from common.training import ScaleConfig

photos, clip, gpt2, out = sys.argv[1:]
config = TrainConfig(
    data=Path(photos) / "dataset.json", out=Path(out) / "whole", embeddings=Path(out) / "embeddings", clip=clip,
    gpt2=gpt2, mapper="mlp", prefix_length=3, steps=10, batch_size=3, val_every=2, val_captions=2, max_tokens=10,
    lr=1e-2, scale=ScaleConfig(devices=2, strategy="ddp"), runtime=RuntimeConfig(device="cpu"),
)
train(config)
part = replace(config, out=Path(out) / "part", tune_gpt2=True)
original = CaptionTraining.training_step

def die(self, batch, batch_idx):
    if self.global_step == 5:
        raise KeyError("killed")
    return original(self, batch, batch_idx)

train(replace(part, out=Path(out) / "tuned"))
CaptionTraining.training_step = die
try:
    train(part)
except KeyError:
    CaptionTraining.training_step = original
train(part)
print("done", os.environ.get("LOCAL_RANK"))
"""


def losses(directory):
    with open(directory / "metrics.csv") as file:
        return [(row["step"], float(row["val/loss"])) for row in csv.DictReader(file) if row["val/loss"]]


@pytest.mark.slow
def test_two_processes(forks, photos, clip_directory, gpt2_directory, tiny_run, tmp_path):
    for rank, done in enumerate(forks.run_ranks(SCRIPT, photos, clip_directory, gpt2_directory, tmp_path)):
        assert done.stdout.endswith(f"done {rank}\n") and "GLOBAL_RANK" not in done.stderr
    one = replace(tiny_run, out=tmp_path / "one", steps=10)
    alone = load_file(train(one) / "model.safetensors")
    together = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    for (step, loss), (same_step, same) in zip(losses(one.out), losses(tmp_path / "whole"), strict=True):
        assert step == same_step and abs(loss - same) < 1e-4
    assert len(losses(one.out)) == 5
    assert all(torch.allclose(alone[name], together[name], atol=1e-4) for name in alone)
    record = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert record["steps"] == 10 and record["config"]["devices"] == 2
    # With dropout: every process's random state comes from the checkpoint.
    whole = load_file(tmp_path / "tuned" / "model" / "model.safetensors")
    resumed = load_file(tmp_path / "part" / "model" / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_of_torchrun(forks, tmp_path):
    data, embeddings = ASSETS / "samples" / "scenes" / "dataset.json", tmp_path / "embeddings"
    arguments = [
        "train", "--data", str(data), "--out", str(tmp_path / "two"), "--embeddings", str(embeddings), "--mapper", "mlp",
        "--steps", "2", "--batch-size", "4", "--lr", "1e-2", "--val-captions", "0", "--devices", "2", "--strategy", "ddp",
        "--device", "cpu",
    ]  # fmt: skip
    code = "from clipcap.cli import main\nraise SystemExit(main())"
    first, second = forks.run_ranks(code, *arguments, launcher="torchrun")
    assert "captioner written to" in first.stdout and "captioner written to" not in second.stdout
    one = TrainConfig(
        data=data,
        out=tmp_path / "one",
        embeddings=embeddings,
        mapper="mlp",
        steps=2,
        batch_size=8,
        lr=1e-2,
        val_captions=0,
        runtime=RuntimeConfig(device="cpu"),
    )
    alone = load_file(train(one) / "model.safetensors")
    together = load_file(tmp_path / "two" / "model" / "model.safetensors")
    for name in alone:  # Adam takes a step of full size where the gradient is rounding alone
        same = torch.isclose(alone[name], together[name], atol=1e-4)
        assert same.float().mean() > 0.99, name
    records = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two")]
    assert [record["steps"] for record in records] == [2, 2]
    for name in ("train/loss", "val/loss"):
        loss, same = (record["metrics"][name] for record in records)
        assert abs(loss - same) < 1e-4
