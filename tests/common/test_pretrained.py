"""From a backbone's name to what is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.checks import UserError
from common.pretrained import loading, locate

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
    with pytest.raises(UserError, match="cannot be loaded: broken"), loading(str(tmp_path), PACKAGED, "CLIP"):
        raise ValueError("broken\nand more")
