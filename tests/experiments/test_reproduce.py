"""Published tables: what is missing is said at once, estimates count what is there, dry runs at full size, small runs."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil

import pytest
import torch

from common.checks import UserError
from common.pretrained import ASSETS
from common.runtime import RuntimeConfig
from experiments import reproduce
from experiments.clipcap_nocaps import scenes_by_domain
from experiments.clipcap_tables import SCENES
from experiments.reproduce import CLIP, GPT2, MEDIUM, TABLES, Config, main

CPU = RuntimeConfig(device="cpu")
WHICH = shutil.which


def needs_nerfstudio(name):
    mark = pytest.mark.skipif(importlib.util.find_spec("nerfstudio") is None, reason="nerfstudio is not installed")
    return pytest.param(name, marks=mark) if name.startswith("dietnerf") else name


NAMES = [needs_nerfstudio(name) for name in TABLES if name not in ("clipcap-conceptual", "clipcap-nocaps")]


@pytest.mark.parametrize("name", TABLES)
def test_everything_that_is_missing_is_named_at_once(name, tmp_path, capsys):
    config = Config(name, data=tmp_path / "d", weights=tmp_path / "w", matrix_rate=100, runtime=CPU)
    needs = TABLES[name].needs(config)
    with pytest.raises(UserError, match=f"^{len(needs) + len(TABLES[name].weights)} of what {name} needs is not there"):
        main(config)
    said = capsys.readouterr().out
    assert all(f"  {need.path}\n" in said and need.what in said for need in needs)
    assert "in all" in said and "GFLOP/s (as given)" in said
    first = needs[0].path  # then one thing less
    if first.suffix:
        first.parent.mkdir(parents=True)
        first.write_text("{}")
    else:
        first.mkdir(parents=True)
        (first / "text.txt").write_text("de kat")
    with pytest.raises(UserError, match=f"^{len(needs) + len(TABLES[name].weights) - 1} of"):
        main(config)


def test_estimates_count_the_weights_that_there_are():
    from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel

    def matrices(module):
        return sum(p.numel() for p in module.parameters() if p.ndim >= 2)

    with torch.device("meta"):
        small = GPT2LMHeadModel(GPT2Config())
        medium = GPT2LMHeadModel(GPT2Config(n_layer=24, n_embd=1024, n_head=16))
        vision = CLIPVisionModel(CLIPVisionConfig())
    assert reproduce.SMALL == matrices(small.transformer.h) and reproduce.HEAD == small.lm_head.weight.numel()
    assert reproduce.blocks(24, 1024) == matrices(medium.transformer.h)
    positions = 50 * 768  # a table, which multiplies nothing
    assert reproduce.VIT == 50 * (matrices(vision) - positions)
    assert reproduce.duration(30) == "30.0 s" and reproduce.duration(7200) == "2.0 hours"
    assert reproduce.matrix_rate(torch.device("cpu"), torch.float32) > 1e8
    # memory of AdamW: weight, gradient, two moments and a temporary in 4 bytes each, beside the program
    assert reproduce.training_memory(10, 4, states=2, kept=5) == 4 * (10 + 4 * 4) + 5 + 2**30


def test_estimates_count_the_field():
    pytest.importorskip("nerfstudio")
    from dietnerf.mlp import PublishedField

    assert reproduce.FIELD == sum(p.numel() for p in PublishedField().parameters() if p.ndim == 2)


PHASES = {
    "clipcap": ["embedding: CLIP ViT-B/32", "training transformer-frozen", "captioning by transformer-frozen",
                "training mlp-tuned", "captioning by mlp-tuned"],
    "dietnerf-synthetic": ["nerf:", "simplified:", "dietnerf:", "dietnerf-tuned:"],
    "dietnerf-encoders": ["CLIP ViT-B/32:", "ImageNet ViT-B/32:", "ImageNet ResNet-50:"],
    "recycle": ["relearning small", "fine-tuning small", "scoring", "alignment", "relearning medium"],
}  # fmt: skip
SIZES = {
    "clipcap": ["155,908,608 parameters, 155,908,608 trained"],
    "recycle-dutch": ["116,562,432 parameters, 30,720,000 trained", "116,562,432 parameters, 116,562,432 trained",
                      "344,320,000 parameters, 40,960,000 trained"],
    "recycle-italian": ["108,882,432 parameters, 23,040,000 trained"],
}  # fmt: skip


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Where all dry runs write, so that the random CLIP is made once."""
    return tmp_path_factory.mktemp("dry")


@pytest.mark.parametrize("name", ["clipcap-conceptual", "clipcap-nocaps"])
def test_dry_run_is_that_of_coco(name):
    """The same models in the same phases, so the test below is theirs too."""
    assert TABLES[name].rehearse is TABLES["clipcap-coco"].rehearse and TABLES[name].weights == (CLIP, GPT2)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_dry_run_at_full_size_within_memory(name, dry, capsys):
    main(Config(name, out=dry, dry_run=True, matrix_rate=100, runtime=CPU))
    said = capsys.readouterr().out
    runs = re.findall(r"^dry run: (.*); peak ([\d.]+) GiB$", said, flags=re.MULTILINE)
    expected = next(phases for start, phases in PHASES.items() if name.startswith(start))
    assert [line for line, _ in runs if not any(line.startswith(phase) for phase in expected)] == []
    assert len(runs) == len(expected) and "every phase ran." in said
    assert max(float(peak) for _, peak in runs) < 20
    for start, sizes in SIZES.items():
        if name.startswith(start):
            assert all(any(size in line for line, _ in runs) for size in sizes), said


@pytest.fixture
def weights(tmp_path):
    """The packaged weights under the names of the real ones."""
    place = tmp_path / "weights"
    place.mkdir()
    for name, packaged in ((CLIP, "clip-tiny"), (GPT2, "gpt2-tiny"), (MEDIUM, "gpt2-tiny-medium")):
        (place / name.rpartition("/")[2]).symlink_to(ASSETS / packaged)
    return place


def test_captioning_tables_run_and_nocaps_takes_the_captioners(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "java" else WHICH(name))
    coco = tmp_path / "data" / "coco"
    for folder in ("train2014", "val2014"):
        (coco / folder).mkdir(parents=True)
    rows = json.loads(SCENES.read_text())["images"]
    kept = [row for row in rows if row["split"] == "train"][:6] + [row for row in rows if row["split"] == "val"][:2]
    kept += [row for row in rows if row["split"] == "test" and not row["unseen"]][:2]
    kept += [row for row in rows if row["unseen"]][:2]
    for row in kept:
        shutil.copy(SCENES.parent / row["filename"], coco / "train2014")
        row["filepath"] = "train2014"
    shutil.copy(SCENES.parent / kept[0]["filename"], coco / "val2014")
    (coco / "dataset_coco.json").write_text(json.dumps({"images": kept}))
    options = dict(data=tmp_path / "data", weights=weights, steps=2, matrix_rate=100, runtime=CPU)
    main(Config("clipcap-coco", out=tmp_path / "clipcap-coco", **options))
    said = capsys.readouterr().out
    assert "transformer-frozen, published" in said and "113.08" in said and "| mlp-tuned |" in said
    model = tmp_path / "clipcap-coco" / "mlp-tuned" / "model" / "model.safetensors"
    made = model.stat().st_mtime_ns

    domains, images = scenes_by_domain(coco / "dataset_coco.json", tmp_path / "domains.json")
    place = tmp_path / "data" / "nocaps"
    place.mkdir()
    shutil.copy(domains, place / "nocaps_val_4500_captions.json")
    (place / "images").symlink_to(images)
    main(Config("clipcap-nocaps", out=tmp_path / "clipcap-nocaps", **options))
    said = capsys.readouterr().out
    assert "CIDEr overall" in said and "65.83" in said
    assert model.stat().st_mtime_ns == made and not (tmp_path / "clipcap-nocaps" / "mlp-tuned" / "model").exists()


def test_recycling_runs_and_goes_on(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(reproduce.LANGUAGES["nld"], "vocab_size", 600)
    text = tmp_path / "data" / "text" / "nld"
    text.mkdir(parents=True)
    shutil.copy(ASSETS / "samples" / "dutch" / "train.txt.xz", text)  # enough that some documents are held out
    config = Config("recycle-dutch", data=tmp_path / "data", weights=weights, out=tmp_path / "out", steps=1,
                    matrix_rate=100, runtime=CPU)  # fmt: skip
    main(config)
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out
    for name in ("small relearned", "small fine-tuned", "medium relearned"):
        bits = float(re.search(rf"\| {name} \| ([\d.]+) \|", table)[1])
        assert 1 < bits < 8, table
    assert table.count("not measured") == 3  # the released models are on no disk here
    model = tmp_path / "out" / "small-fine-tuned" / "model" / "model.safetensors"
    made = model.stat().st_mtime_ns
    main(config)
    assert model.stat().st_mtime_ns == made and (tmp_path / "out" / "table.md").read_text() == table
