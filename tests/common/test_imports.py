"""Importing: a module that is hidden for a while, and light names."""

import sys

import pytest

from common.imports import without


def test_a_module_is_hidden_only_meanwhile(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "slow_one.py").write_text("VALUE = 3\n")
    with without("slow_one"), pytest.raises(ImportError):
        import slow_one
    import slow_one

    assert slow_one.VALUE == 3
    with without("slow_one"):  # imported already: stays
        assert sys.modules["slow_one"] is slow_one
    assert sys.modules["slow_one"] is slow_one
    with pytest.raises(ZeroDivisionError), without("another_one"):
        raise ZeroDivisionError
    assert "another_one" not in sys.modules


CODE = """
import sys
assert "timm" not in sys.modules and "wandb" not in sys.modules
from common.clip import load_clip
assert load_clip("photo", device="cpu").has_text
assert "timm" in sys.modules and "wandb" not in sys.modules
print("loaded")
"""


@pytest.mark.slow
def test_a_tower_of_timm_loads_without_weights_and_biases(forks):
    found = forks.run(CODE)
    assert found.stdout.strip() == "loaded", found.stderr
