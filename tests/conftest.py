"""What every test shares: no network, few threads, a tiny random GPT-2 with its tokenizer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import costs  # in tests/hooks
import jaxtyping
import pytest
import shapes  # noqa: F401  before any package of ours
import torch

from tests.forks import Forks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Tiny tensors run slower on more threads than cores."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test of what users read who pass a wrong shape: the hook that checks shapes would raise first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(costs.Costs(), "costs of tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="try every value and every point, not a sample")


@pytest.fixture(scope="session")
def exhaustive(request: pytest.FixtureRequest) -> bool:
    """Every value and every point of what is otherwise sampled."""
    return request.config.getoption("--exhaustive")


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Processes that need not import torch and lightning again."""
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Java were not installed: METEOR has tests of its own, and starting it costs seconds."""
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *more: None if name == "java" else which(name, *more))


@pytest.fixture(scope="session")
def gpt2_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 (2 layers of width 16, 32 positions) in Hugging Face format; read it, do not write to it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    directory = tmp_path_factory.mktemp("gpt2") / "random"
    tokenizer = save_tokenizer(directory)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # far from the flat start, so that errors show
    model.save_pretrained(directory)
    return directory


def save_tokenizer(directory: Path):
    """A byte-level BPE of 256 bytes, an end token and a few merges, saved in `directory`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2TokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(["the cat and the hat and the bat sat on the mat"] * 4, trainer)
    end = "<|endoftext|>"
    tokenizer = GPT2TokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, unk_token=end)
    tokenizer.save_pretrained(directory)
    return tokenizer
