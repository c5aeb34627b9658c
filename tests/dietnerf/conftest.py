"""What the tests of dietnerf share: the golden numbers of the original implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dietnerf.ball import write_scene


@pytest.fixture(scope="session")
def golden(root) -> dict[str, torch.Tensor]:
    """Outputs of the original DietNeRF code on small random inputs, by name."""
    return load_file(root / "tests" / "golden" / "dietnerf.safetensors")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def ball_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 train, 2 val and 3 test views of 16 x 16 pixels; read it, do not write to it."""
    return write_scene(tmp_path_factory.mktemp("ball") / "ball")
