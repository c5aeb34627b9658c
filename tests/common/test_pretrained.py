"""From a backbone's name to what is loaded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from common.checks import UserError
from common.pretrained import (
    SIZE,
    SWITCH,
    checked,
    loading,
    locate,
    number,
    one_of,
    require_finite,
    saving,
    tokens,
    whole,
)

PACKAGED = {"tiny": Path("/packaged/tiny")}


def test_packaged_name():
    assert locate("tiny", PACKAGED, "CLIP") == "/packaged/tiny"


def test_directory_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    (tmp_path / "owner" / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert locate("owner/model", PACKAGED, "CLIP") == "owner/model"
    assert locate(tmp_path / "owner" / "model", PACKAGED, "CLIP") == str(tmp_path / "owner" / "model")


@pytest.mark.parametrize("name", ["gpt2", "openai/clip-vit-base-patch32"])
def test_hub_ids_pass(name):
    assert locate(name, PACKAGED, "CLIP") == name


@pytest.mark.parametrize("error", [OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError])
def test_every_failure_becomes_one_line(error):
    with pytest.raises(UserError) as caught, loading("some/model", PACKAGED, "CLIP"):
        raise error("first line\nsecond line")
    assert "'some/model'" in str(caught.value) and "\n\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, error)


def test_user_errors_pass_as_they_are():
    mine = UserError("mine")
    with pytest.raises(UserError) as caught, loading("some/model", PACKAGED, "CLIP"):
        raise mine
    assert caught.value is mine


def test_failures_to_load_a_directory_name_the_reason(tmp_path):
    with (
        pytest.raises(UserError, match=r"cannot be loaded \(broken\): copy it again"),
        loading(str(tmp_path), PACKAGED, "CLIP"),
    ):
        raise ValueError("broken\nand more")


@pytest.mark.parametrize("rule, good, bad", [
    (whole(1, 9), [1, 9], [0, 10, True, 1.0, "1", None, math.nan, 10**400]),
    (SIZE | None, [None, 1], [0, False, ""]),
    (number(0, 1), [0, 1, 0.5], [True, "0", None, math.nan, math.inf, -0.1, [0]]),
    (SWITCH, [True, False], [0, 1, None, "true"]),
    (one_of("a", "b"), ["a"], ["c", ["a"], None, 1]),
    (tokens(5) | None, [0, 4, [4, 0], None], [5, -1, [], [5], ["a"], "a", 1.0, True, {}, (1,)]),
])  # fmt: skip
def test_rules(rule, good, bad):
    for value in good:
        assert checked({"size": value, "other": 3}, {"size": rule}, "config") == {"size": value}
    for value in bad:
        with pytest.raises(UserError, match="config: size is .*: use ") as caught:
            checked({"size": value}, {"size": rule}, "config")
        assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    assert checked({"other": 3}, {"size": rule}, "config") == {}
    for fields in ([], "size", None, 3):
        with pytest.raises(UserError, match="instead of named values"):
            checked(fields, {"size": rule}, "config")


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_is_found_and_large_numbers_are_not_taken_for_it(dtype):
    most = torch.finfo(dtype).max
    fine = {"a": torch.full((70_000,), most, dtype=dtype), "b": torch.zeros(0, dtype=dtype), "c": torch.tensor([1, 2])}
    require_finite(fine, "file")
    for bad in (torch.nan, torch.inf, -torch.inf):
        value = torch.zeros(70_000, dtype=dtype)
        value[-1] = bad
        with pytest.raises(UserError, match="file: d.weight holds NaN or infinity"):
            require_finite(fine | {"d.weight": value}, "file")
    with pytest.raises(UserError, match="d holds"):
        require_finite({"d": torch.tensor([torch.inf, -torch.inf], dtype=dtype)}, "file")


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"), SafetensorError("Error while serializing: I/O error: No space left on device")
])  # fmt: skip
def test_a_failure_to_write_is_one_line(error):
    with (
        pytest.raises(UserError, match="model 'out' cannot be written .*No space left on device") as caught,
        saving("out", "model"),
    ):
        raise error
    assert len(str(caught.value).splitlines()) == 1
