"""A stage is made once: what it was made from is on record, and another input makes it again."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pytest
from safetensors import SafetensorError

from common.checks import UserError
from common.gpt2 import load_gpt2
from common.training import ScaleConfig, flat
from recycle_gpt2.stages import (
    FREE,
    AlignConfig,
    FinetuneConfig,
    RelearnConfig,
    once,
    save_model,
    unfreezing,
)
from recycle_gpt2.training import StageConfig


@dataclass(frozen=True)
class Settings:
    """Of a stage that does nothing."""

    stage: StageConfig = StageConfig()
    size: int = 1


def test_a_stage_of_other_inputs_is_made_again_and_its_training_kept(tmp_path, capsys):
    made = []

    def work():
        made.append(len(made))
        return {"number": len(made)}

    stage = tmp_path / "stage"
    assert once(stage, Settings(), work, inputs={"text": "a"}) == {"number": 1}
    assert once(stage, Settings(), work, inputs={"text": "a"})["number"] == 1
    assert once(stage, Settings(), work, inputs={"text": None})["number"] == 1  # the text is gone
    assert not capsys.readouterr().out
    assert once(stage, Settings(), work, inputs={"text": "b"})["number"] == 2
    assert capsys.readouterr().out == f"{stage} was made of another text: it is made again.\n"
    assert json.loads((stage / "done.json").read_text()) == {"number": 2, "inputs": {"text": "b"}}
    for number, text in ((1, "c"), (2, "d")):  # finished, and half done
        (stage / "training").mkdir()
        (stage / "training" / "last.ckpt").write_text(text)
        once(stage, Settings(), work, inputs={"text": text})
        kept = tmp_path / f"stage.{number}"
        assert (kept / "training" / "last.ckpt").read_text() == text and f"is kept in {kept}" in capsys.readouterr().out
        (stage / "done.json").unlink()
    assert len(made) == 4


def test_directories_without_a_record_of_their_inputs_are_accepted_and_get_one(tmp_path, capsys):
    def work():
        return {"number": 1}

    once(tmp_path, Settings(), work, inputs={})
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["inputs"], settings["devices * num_nodes"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert once(tmp_path, Settings(), lambda: 1 / 0, inputs={"text": "a"})["number"] == 1
    assert not capsys.readouterr().out
    assert once(tmp_path, Settings(), lambda: {"number": 2}, inputs={"text": "b"})["number"] == 2


def test_settings_that_are_free_exist():
    names = {one.name for kind in (RelearnConfig, AlignConfig, FinetuneConfig) for one in fields(kind)}
    assert {"out", "runtime"} <= set(FREE) <= names | flat(asdict(StageConfig())).keys()


def test_number_of_processes_is_free_only_when_a_stage_is_done(tmp_path):
    def killed():
        (tmp_path / "training").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        once(tmp_path, Settings(), killed, inputs={})
    for more in ({"devices": 4}, {"num_nodes": 2}):
        with pytest.raises(UserError, match=r"begun with devices \* num_nodes 1, now it is [24]: use the same"):
            once(tmp_path, Settings(StageConfig(scale=ScaleConfig(**more))), dict, inputs={})
    once(tmp_path, Settings(StageConfig(scale=ScaleConfig(strategy="ddp"))), lambda: {"number": 1}, inputs={})
    assert once(tmp_path, Settings(StageConfig(scale=ScaleConfig(devices=4))), dict, inputs={})["number"] == 1


def test_other_processes_wait_until_the_first_has_made_a_stage_again(tmp_path, monkeypatch):
    once(tmp_path, Settings(), lambda: {"number": 1}, inputs={"text": "a"})
    for module in ("recycle_gpt2.stages", "common.processes"):
        monkeypatch.setattr(f"{module}.is_first_process", lambda: threading.current_thread().name == "first")
    first = threading.Thread(
        name="first", target=once, args=(tmp_path, Settings(), lambda: {"number": 2}), kwargs={"inputs": {"text": "b"}}
    )
    timer = threading.Timer(0.3, first.start)
    timer.start()
    assert once(tmp_path, Settings(), lambda: 1 / 0, inputs={"text": "b"})["number"] == 2
    timer.join()
    first.join()


def test_unfreezing_from_the_top_ends_with_everything():
    assert unfreezing("top", 4) == [[3], [3, 2], [3, 2, 1], "all"]
    assert unfreezing("all", 4) == ["all"]


def test_a_model_is_swapped_in_whole(tmp_path, english_models, monkeypatch):
    model, english = load_gpt2(english_models[0])
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    for _ in range(2):
        save_model(model, english, tmp_path / "out", card="---")
    before = {path.name: path.read_bytes() for path in (tmp_path / "real").iterdir()}
    assert (tmp_path / "out").is_symlink() and "README.md" in before

    def full(*_, **__):  # safetensors' own kind of error
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left on device: .*out'"):
        save_model(model, english, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "real").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"real", "out"}


def test_a_path_may_be_given_in_another_form_and_moved_where_a_hash_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "stage" / "training").mkdir(parents=True)

    def stage(given: str, model: str, **inputs: str):
        return once(tmp_path / "stage", Paths(Path(given), model), lambda: {"number": 1}, inputs=inputs)

    stage("corpus", "model", corpus="a")
    assert stage("moved/corpus", str(tmp_path / "model"), corpus="a")["number"] == 1
    with pytest.raises(UserError, match="begun with model '.*model', now it is 'other'"):
        stage("corpus", "other", corpus="a")
    with pytest.raises(UserError, match="begun with corpus 'corpus', now it is 'elsewhere'"):
        stage("elsewhere", "model")  # nothing tells that it is the same


@dataclass(frozen=True)
class Paths:
    """Of a stage that is made of files."""

    corpus: Path
    model: str
