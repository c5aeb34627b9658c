"""The captioning tables, each in small with a few steps, and what they say when data is missing."""

import json
import shutil

import pytest

from common.checks import UserError
from common.files import write_json
from common.runtime import RuntimeConfig
from experiments.captions import coco, conceptual, nocaps, prefix_length
from experiments.captions.tables import SCENES, small_data

CPU = RuntimeConfig(device="cpu")
pytestmark = pytest.mark.usefixtures("no_java")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Some of the packaged scenes: 8 to train on, 2 to validate, 2 of known and 2 of new looks to score."""
    folder = tmp_path_factory.mktemp("scenes")
    rows = json.loads(SCENES.read_text())["images"]
    kept = [row for row in rows if row["split"] == "train"][:8] + [row for row in rows if row["split"] == "val"][:2]
    kept += [row for row in rows if row["split"] == "test" and not row["unseen"]][:2]
    kept += [row for row in rows if row["unseen"]][:2]
    for row in kept:
        shutil.copy(SCENES.parent / row["filename"], folder)
    (folder / "dataset.json").write_text(json.dumps({"images": kept}))
    return folder / "dataset.json"


@pytest.fixture
def options(data, tmp_path):
    return {
        "small": True,
        "data": data,
        "out": tmp_path / "out",
        "docs": tmp_path / "docs",
        "steps": 2,
        "resamples": 20,
        "clip_score": "",
        "runtime": CPU,
    }


def rows(out):
    return json.loads((out / "table.json").read_text())["rows"]


@pytest.mark.slow
def test_coco(options, tmp_path, capsys):
    coco.main(coco.Config(**options))
    table = (tmp_path / "docs" / "clipcap_coco_small.md").read_text()
    assert [row["captioner"] for row in rows(tmp_path / "out")] == ["transformer-frozen", "mlp-tuned"]
    assert "not comparable" in table and "`python -m experiments.captions.coco --small --steps 2`" in table
    assert table in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "mlp-tuned" / "evaluation-test" / "results.json").read_text())
    assert result["images"] == 4 and f"{100 * result['scores']['CIDEr']:.2f}" in rows(tmp_path / "out")[1]["CIDEr"]
    assert "METEOR" in result["not_measured"] and rows(tmp_path / "out")[1]["METEOR"] == "–"


@pytest.mark.slow
def test_conceptual_has_one_caption_each(options, tmp_path):
    conceptual.main(conceptual.Config(**options, variants=("mlp-tuned",)))
    images = json.loads((tmp_path / "out" / "data" / "one_caption.json").read_text())["images"]
    assert len(images) == 14 and all(len(row["sentences"]) == 1 for row in images)
    record = json.loads((tmp_path / "out" / "mlp-tuned" / "training.json").read_text())
    assert record["captions"]["train"] == 8 and record["steps"] == 2
    assert "(split: test)" in (tmp_path / "docs" / "clipcap_conceptual_small.md").read_text()


def test_nocaps_by_domain(options, tmp_path):
    nocaps.main(nocaps.Config(**options, variants=("mlp-tuned",), models=("tiny",)))
    (row,) = rows(tmp_path / "out")
    assert {"CIDEr in", "CIDEr overall"} <= set(row) and {"CIDEr near", "CIDEr out"} & set(row)
    result = json.loads((tmp_path / "out" / "mlp-tuned" / "evaluation-all" / "results.json").read_text())
    counts = {name: part["images"] for name, part in result["domains"].items()}
    assert counts["in"] == 2 and counts["overall"] == 4 and sum(counts.values()) == 8
    assert not (tmp_path / "out" / "mlp-tuned" / "training.json").exists()  # the given captioner was scored


@pytest.mark.slow
def test_prefix_length(options, tmp_path):
    config = prefix_length.Config(**options, lengths=(3, 2), variants=("transformer-frozen",))
    prefix_length.main(config)
    assert [row["K"] for row in rows(tmp_path / "out")] == [2, 3]
    for length in (2, 3):
        model = json.loads((tmp_path / "out" / f"transformer-frozen-{length}" / "model" / "config.json").read_text())
        assert model["prefix_length"] == model["clip_length"] == length
    assert (tmp_path / "docs" / "clipcap_prefix_length_small.png").stat().st_size > 5000
    assert "clipcap_prefix_length_small.png" in (tmp_path / "docs" / "clipcap_prefix_length_small.md").read_text()


def test_missing_data_is_said_first(tmp_path):
    for module in (coco, conceptual, prefix_length):
        with pytest.raises(UserError, match="give --data"):
            module.main(module.Config(out=tmp_path))
        with pytest.raises(UserError, match="'gone.json' does not exist"):
            module.main(module.Config(data=tmp_path.__class__("gone.json"), out=tmp_path))
    with pytest.raises(UserError, match="give --nocaps"):
        nocaps.main(nocaps.Config(out=tmp_path))
    with pytest.raises(UserError, match="1 models for 2 variants"):
        nocaps.main(nocaps.Config(small=True, models=("tiny",)))
    with pytest.raises(UserError, match="test 'gone.tsv' does not exist"):
        conceptual.main(conceptual.Config(small=True, test=tmp_path.__class__("gone.tsv")))
    with pytest.raises(UserError, match="variant is 'x'"):
        coco.main(coco.Config(small=True, variants=("x",)))
    assert small_data(tmp_path, tmp_path) == (SCENES, None)
    assert not list(tmp_path.iterdir())


def test_few_test_scenes_are_chosen_evenly(tmp_path, monkeypatch):
    from experiments.scenes import karpathy

    for split in ("train", "val", "test", "test_unseen"):
        (tmp_path / f"{split}-00000.npy").touch()
    rows = [{"split": "train", "filename": "a.png"}, *({"split": "test", "filename": f"{n}.png"} for n in range(10))]

    def export(scenes, out, splits):
        return write_json(out / "dataset.json", {"images": rows})

    monkeypatch.setattr(karpathy, "export", export)
    path, _ = small_data(tmp_path, tmp_path / "out", 5)
    assert [row["filename"] for row in json.loads(path.read_text())["images"]] == [
        "a.png",
        "0.png",
        "2.png",
        "4.png",
        "6.png",
        "8.png",
    ]
