"""Similarity within and across scenes: the pairs, the summary, and the command."""

from __future__ import annotations

import json

import pytest
import torch

from dietnerf.cli import main
from dietnerf.consistency import pair_similarities, plot_similarities, summary
from tests.dietnerf.ball import write_scene


def test_pairs():
    a = torch.tensor([[1.0, 0], [0, 2], [3, 3]])
    b = torch.tensor([[0.0, 1], [-1, 0]])
    found = pair_similarities({"a": a, "b": b})
    half = 2**-0.5
    assert torch.allclose(found.within["a"], torch.tensor([0.0, half, half]), atol=1e-6)
    assert torch.allclose(found.within["b"], torch.tensor([0.0]))
    assert sorted(found.across.tolist()) == pytest.approx(sorted([0, -1, 1, 0, half, -half]), abs=1e-6)
    assert summary(found.across)["number"] == 6 and summary(found.across)["most"] == pytest.approx(1)
    assert len(pair_similarities({"a": a}).across) == 0
    assert len(plot_similarities(found).axes[0].patches) == 80


def resnet_file(directory):
    network = pytest.importorskip("torchvision").models.resnet18(weights=None)
    torch.save(network.state_dict(), directory / "resnet18.pth")
    return directory / "resnet18.pth"


@pytest.mark.slow
def test_command(ball_scene, tmp_path, root, capsys):
    other = write_scene(tmp_path / "other", splits={"train": 2}, size=24)
    out = tmp_path / "out"
    arguments = ["consistency", str(ball_scene), str(other), "--out", str(out), "--views", "3", "--device", "cpu"]
    assert main(arguments) == 0
    record = json.loads((out / "results.json").read_text())
    assert record["scenes"]["ball"]["views"] == 3 and record["within"]["number"] == 3 + 1
    assert record["across"]["number"] == 3 * 2 and record["within"]["most"] <= 1.00001
    assert (out / "histogram.svg").is_file() and (out / "index.html").is_file()
    assert "views of one scene" in capsys.readouterr().out
    assert main([*arguments, "--precision", "bf16"]) == 0
    rough = json.loads((out / "results.json").read_text())["across"]["mean"]
    assert rough != record["across"]["mean"] and rough == pytest.approx(record["across"]["mean"], abs=0.02)
    classifier = ["--encoder", f"torchvision:resnet18:{resnet_file(tmp_path)}"]  # has no class token
    assert main([*arguments, *classifier]) == 0
    assert json.loads((out / "results.json").read_text())["across"]["number"] == 3 * 2
    capsys.readouterr()
    alone = write_scene(tmp_path / "alone", splits={"train": 2, "val": 1})
    assert main(["consistency", str(alone), "--split", "val", "--device", "cpu", "--out", str(out)]) == 2
    assert "has one val view: pairs need 2" in capsys.readouterr().err
    assert main(["consistency", str(ball_scene), "--views", "1"]) == 2
    assert main(["consistency", str(ball_scene), str(ball_scene), str(ball_scene), "--device", "cpu"]) == 2
