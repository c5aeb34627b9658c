"""The records of a recycling stage, broken: a UserError that names the file, and nothing is trained or deleted."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import pytest
from hypothesis import given

from common.checks import UserError
from recycle_gpt2.card import model_card
from recycle_gpt2.records import reading
from recycle_gpt2.stages import once, read_done, read_settings
from recycle_gpt2.training import StageConfig, StageRecord, read_record
from tests.fuzz.mutations import FUZZ, bad_json, only_user_errors


@dataclass(frozen=True)
class Settings:
    """Of a stage."""

    stage: StageConfig = StageConfig()
    size: int = 1


RECORD = StageRecord(("wte",), 10, 100, 1e6, 1.5, 2.5, ({"step": 1, "tokens": 100, "val_loss": 2.5},))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["settings.json", "done.json"])
def test_records_of_a_stage(name, tmp_path):
    once(tmp_path, Settings(), lambda: {"number": 1}, inputs={"text": "a"})
    good = (tmp_path / name).read_bytes()
    (tmp_path / "training").mkdir()

    @FUZZ
    @given(bad_json(json.loads(good)))
    def check(data):
        (tmp_path / name).write_bytes(data)
        with only_user_errors():
            read_settings(tmp_path)
            read_done(tmp_path)
        with only_user_errors():
            once(tmp_path, Settings(), lambda: {"number": 1}, inputs={"text": None})

    check()
    (tmp_path / name).write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match=f"{name}' is damaged .*: delete "):
        once(tmp_path, Settings(), lambda: 1 / 0, inputs={"text": "a"})


def test_record_of_training(tmp_path):
    @FUZZ
    @given(bad_json(asdict(RECORD)))
    def check(data):
        (tmp_path / "stage.json").write_bytes(data)
        with only_user_errors():
            assert isinstance(read_record(tmp_path), StageRecord)

    check()
    (tmp_path / "stage.json").write_text("")
    with pytest.raises(UserError, match=r"stage.json' is damaged \(JSONDecodeError\): delete it and give the same"):
        read_record(tmp_path)


def test_records_that_make_a_card(tmp_path):
    counts = {"documents": 1, "bytes": 2, "tokens": 3}
    summary = {"tokens": 3, "perplexity": 2.0, "bits_per_character": 1.0, "bits_per_byte": 1.0,
               "bits_per_byte_interval": [1.0, 2.0]}  # fmt: skip
    records = {
        "corpus": {"splits": dict.fromkeys(("train", "valid", "test"), counts)},
        "stages": {"relearn": asdict(RECORD)},
        "scores": {"recycled": {"all": summary}},
        "samples": ["Een kat."],
    }

    @FUZZ
    @given(bad_json(records))
    def check(data):
        with only_user_errors(), reading(tmp_path, "delete it"):
            card = model_card(name="x", language="nld", small="gpt2", large="", vocabulary="3 tokens", differences={}, hardware="a CPU",
                              versions={}, **json.loads(data))  # fmt: skip
            assert card.startswith("---")

    check()
