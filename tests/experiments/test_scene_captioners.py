"""Captioners of rendered scenes, compared: each script in a few steps, on scenes that are noise."""

import json

import numpy as np
import pytest

from common.runtime import RuntimeConfig
from experiments.captions import beyond, mapper_ablation
from experiments.scenes.records import family_records, record_to_json


@pytest.fixture
def options(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test", "test_unseen"):
        records = [family_records(0, split, family)[0] for family in range(12)]  # of 1, 2 and 3 objects
        np.save(tmp_path / f"{split}-00000.npy", rng.integers(0, 256, (len(records), 96, 96, 3), dtype=np.uint8))
        lines = "".join(json.dumps(record_to_json(record)) + "\n" for record in records)
        (tmp_path / f"{split}-00000.jsonl").write_text(lines)
    runtime = RuntimeConfig(device="cpu", threads=1)
    return dict(scenes=tmp_path, out=tmp_path / "out", docs=tmp_path, steps=2, batch_size=4, runtime=runtime)


def scores(out, run):
    return json.loads((out / run / "scores.json").read_text())


@pytest.mark.slow
def test_mappers(options):
    mapper_ablation.main(mapper_ablation.Config(**options, variants=("patches-frozen",), mapper_layers=1))
    found, run = scores(options["out"], "patches-frozen-seed0"), options["out"] / "patches-frozen-seed0"
    for split in ("test", "test_unseen"):
        assert len(json.loads((run / f"captions-{split}.json").read_text())) == 12
        assert found[split]["cider"] >= 0 and 1 <= found[split]["distinct_captions"] <= 12
    table = (options["docs"] / "clipcap_mapper_ablation.md").read_text()
    assert f"| patches-frozen | 0 | 2 | {found['test']['all_right']['1']['share']:.3f} ±" in table


@pytest.mark.slow
def test_beyond_the_paper_some_scenes_are_scored(options):
    beyond.main(beyond.Config(**options, variants=("plain",), images=6))
    found = scores(options["out"], "plain-seed0")
    assert found["steps"] == 2 and sum(part["images"] for part in found["test"]["all_right"].values()) == 6
    assert len(json.loads((options["out"] / "plain-seed0" / "captions-test.json").read_text())) == 6
    assert "| plain | 0 | 2 | " in (options["docs"] / "clipcap_beyond.md").read_text()
