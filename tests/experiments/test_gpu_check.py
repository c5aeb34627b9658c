"""The check on a GPU, tried on the CPU in small: every part, one that fails among others, what is written, no GPU."""

import copy
import importlib.util
import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from common.checks import run_command
from experiments import gpu_check, gpu_parts

CPU = gpu_parts.Work(torch.device("cpu"), small=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_parts.PARTS)
def test_every_part_runs_in_small(name):
    if name == "field" and importlib.util.find_spec("nerfstudio") is None:
        pytest.skip("nerfstudio is not installed")
    found = gpu_parts.PARTS[name](CPU)
    assert len(found) == {"rates": 3, "field": 1}.get(name, 2)
    for one in found:
        assert one.seconds > 0 and one.peak_bytes > 1e6 and one.items > 0 and one.moved > 0
        assert all(math.isfinite(value) for value in one.notes.values())
    if name in ("captioners", "recycling"):
        assert all(0 < one.notes["last_loss"] < 8 for one in found)  # ln 200 is 5.3
        assert found[-1].notes["last_loss"] < found[-1].notes["second_loss"]
    if name == "decode":
        assert {one.notes["same_as_generate_in_fp32"] for one in found} == {1.0}


MEASURED = {
    "hardware": "a GPU", "versions": {},
    "measurements": [
        {"what": "work", "precision": "bf16", "unit": "captions", "items": 8, "seconds": 0.5, "flops": 1e12,
         "moved": 2e9, "peak_bytes": 2**30, "notes": {"last_loss": 1.5}},
    ],
}  # fmt: skip
RATES = {
    "hardware": "a GPU", "versions": {},
    "measurements": [
        {"what": "matrix product", "precision": "bf16", "unit": "products", "items": 1, "seconds": 0.1, "flops": 1e12,
         "moved": 1e9, "peak_bytes": 1, "notes": {}},
        {"what": "matrix product", "precision": "fp32", "unit": "products", "items": 1, "seconds": 0.2, "flops": 1e12,
         "moved": 1e9, "peak_bytes": 1, "notes": {}},
        {"what": "copy in memory", "precision": "fp32", "unit": "copies", "items": 1, "seconds": 1.0, "flops": 0.0,
         "moved": 1e10, "peak_bytes": 1, "notes": {}},
    ],
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    return gpu_check.Config(device="cpu", small=True, out=tmp_path / "out")


def test_a_part_that_fails_is_recorded_and_the_others_run(config, monkeypatch, capsys):
    def run_part(name, config, device, seconds):
        assert device == "cpu" and 0 < seconds <= 600
        if name == "embed":
            return {"error": "OutOfMemoryError: no room", "said": "Traceback"}
        return {"error": None, **copy.deepcopy(RATES if name == "rates" else MEASURED)}

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    assert gpu_check.main(config) == 1
    said = capsys.readouterr()
    assert "1 of 6 parts did not end: embed." in said.err and "embedding with ViT-L/14: OutOfMemoryError" in said.out
    result = json.loads((config.out / "gpu_check.json").read_text())
    assert result["roofline"] == {"bf16": 1e13, "fp32": 5e12, "memory": 1e10} and result["hardware"] == "a GPU"
    assert result["parts"]["embed"]["measurements"] == [] and len(result["parts"]) == 6
    (one,) = result["parts"]["field"]["measurements"]  # 0.1 s of arithmetic and 0.2 s of memory, in 0.5 s
    assert one["bound_by"] == "memory" and one["of_roofline"] == pytest.approx(0.4) and one["items_per_second"] == 16
    page = (config.out / "index.html").read_text()
    assert "OutOfMemoryError: no room" in page and "40%" in page and "last loss" in page


def test_without_rates_there_is_no_roofline_and_no_share(config, monkeypatch):
    monkeypatch.setattr(gpu_check, "run_part", lambda *_: {"error": None, **copy.deepcopy(MEASURED)})
    assert gpu_check.main(replace(config, parts=("decode",))) == 0
    result = json.loads((config.out / "gpu_check.json").read_text())
    assert result["roofline"] == {} and "of_roofline" not in result["parts"]["decode"]["measurements"][0]


def test_what_the_budget_leaves_no_time_for_is_stopped_or_not_begun(config, monkeypatch):
    found = gpu_check.run_part("rates", replace(config, budget=1.0), "cpu", 0.2)
    assert found == {"error": "stopped after 0 s, its share of the budget of 1 s"}
    ticks, shares = iter(range(0, 1000, 30)), []

    def run_part(name, config, device, seconds):
        shares.append(seconds)
        return {"error": None, **copy.deepcopy(MEASURED)}

    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    monkeypatch.setattr(gpu_check, "run_part", run_part)
    assert gpu_check.main(replace(config, budget=150.0, parts=("decode", "recycling", "field"))) == 1
    assert shares == [60, 15]  # half of what is left: begun after 30 and 120 s
    parts = json.loads((config.out / "gpu_check.json").read_text())["parts"]
    assert [part["error"] for part in parts.values()] == [None, None, "not begun: the budget was used up"]


@pytest.mark.slow
def test_a_part_is_a_process_of_its_own(config):
    found = gpu_check.run_part("rates", config, "cpu", 200)
    assert found["error"] is None and len(found["measurements"]) == 3 and found["hardware"]
    failed = gpu_check.run_part("rates", config, "cuda:99", 200)
    assert failed["error"].startswith("common.checks.UserError: device is 'cuda:99'") and "Traceback" in failed["said"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "auto"}, "no CUDA GPU is here"),
        ({"device": "cuda:99"}, "device is 'cuda:99'"),
        ({"budget": 0.0}, "budget is 0"),
        ({"parts": ()}, "parts is empty"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(config, monkeypatch, capsys, changes, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "run_part", None)
    assert run_command(lambda: gpu_check.main(replace(config, **changes))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line and not config.out.exists()


def test_the_command_and_its_parts_have_the_same_names():
    assert tuple(gpu_check.TITLES) == tuple(gpu_parts.PARTS) == get_args(gpu_check.Part)


@pytest.mark.slow
def test_full_size_is_that_of_the_published_models():
    from transformers import CLIPVisionModelWithProjection, GPT2LMHeadModel

    full = gpu_parts.Work(torch.device("cuda"))
    clip = gpu_parts.clip_config(full)
    clip.vision_config.projection_dim = clip.projection_dim
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(gpu_parts.gpt2_config(full))
        vision = CLIPVisionModelWithProjection(clip.vision_config)
    assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808
    assert sum(p.numel() for p in vision.parameters()) == 303_966_208
