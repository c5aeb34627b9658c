"""What the tests of dietnerf share: the golden numbers of the original implementation."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def golden(root) -> dict[str, torch.Tensor]:
    """Outputs of the original DietNeRF code on small random inputs, by name."""
    return load_file(root / "tests" / "golden" / "dietnerf.safetensors")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
