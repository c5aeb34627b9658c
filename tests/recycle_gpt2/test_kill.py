"""A run that is killed while it writes ends, given the same command again, in the same model to the bit."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import lightning  # noqa: F401  imported before the forks, as is all that a run needs
import pytest
import torch
import torch._dynamo  # as an optimizer does at its first step
import transformers.models.auto.tokenization_auto  # noqa: F401
from transformers import GPT2LMHeadModel, GPT2TokenizerFast  # noqa: F401

from common.runtime import RuntimeConfig
from recycle_gpt2.run import RunConfig, recycle
from recycle_gpt2.training import StageConfig
from tests.kills import kill_everywhere
from tests.recycle_gpt2.conftest import invent


def tiny_run(directory: Path) -> str:
    """Recycle the packaged models with a few hundred tokens in each stage; returns a hash of the finished directory."""
    text = directory.parent / "text.txt"
    if not text.exists():
        text.write_text("\n\n".join(invent("dutch", 60)), encoding="utf-8")
    config = RunConfig(
        text=(text,), out=directory / "out", language="nld", small="tiny", large="tiny-medium", vocab_size=300,
        block=16, shares=(0.8, 0.1, 0.1), stage=StageConfig(tokens=256, batch_size=4, val_every=2), finetune_share=0.5,
        runtime=RuntimeConfig(device="cpu", threads=1),
    )  # fmt: skip
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        recycle(config)
    digest = hashlib.sha256()
    for path in sorted(config.out.iterdir()):
        if path.name != "README.md":  # it tells how long training took
            digest.update(path.name.encode() + path.read_bytes())
    assert torch.get_num_threads() == 1
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_any_write_a_run_ends_in_the_same_model(forks, tmp_path, exhaustive):
    points = 40 if exhaustive else 6
    kill_everywhere(forks, "tests.recycle_gpt2.test_kill:tiny_run", tmp_path, points=points)
