"""What cannot work is refused before a run makes anything."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from common.checks import UserError
from common.files import claimed
from recycle_gpt2 import run as run_module
from recycle_gpt2.alignment import AlignmentConfig
from recycle_gpt2.corpus import build_corpus
from recycle_gpt2.extend import EnglishConfig
from recycle_gpt2.run import recycle
from recycle_gpt2.stages import (
    AlignConfig,
    FinetuneConfig,
    RelearnConfig,
    align_models,
    finetune,
    relearn,
)
from recycle_gpt2.tokenizer import train_tokenizer
from recycle_gpt2.training import StageConfig
from tests.recycle_gpt2.test_run import settings


def test_what_cannot_work_is_said_before_anything_is_made(tmp_path, text, english_models, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "load_gpt2", None)
    config = settings(text, english_models, tmp_path / "out")
    (tmp_path / "bad.tsv").write_text("kat cat\n")
    for change, message in (
        ({"shares": (0.99, 0.01, 0)}, r"shares are \(0.99, 0.01, 0\): use three above 0"),
        ({"dictionary": tmp_path / "absent.tsv"}, "absent.tsv' does not exist"),
        ({"dictionary": tmp_path / "bad.tsv"}, "line 1 is not a word, a tab"),
        ({"out": Path(".")}, r"out is '\.', which names no new directory"),
        ({"out": Path("..")}, r"out is '\.\.'"),
        ({"text": (tmp_path / "absent",)}, "absent' does not exist"),
        ({"kept": EnglishConfig(replay=0.1, english=(tmp_path / "absent",))}, "absent' does not exist"),
        # Each was found only after the tokenizer, the corpus, or hours of relearning.
        ({"shares": (0.5, 0.1, 0.1)}, "use three for train, valid and test that sum to 1"),
        ({"block": 1}, "block is 1: use at least 2"),
        ({"vocab_size": 100}, "vocab_size is 100: use at least 257"),
        ({"workers": 0}, "workers is 0: use at least 1"),
        ({"stage": StageConfig(lr=-1)}, "lr is -1: use a rate above 0"),
        ({"stage": StageConfig(batch_size=0)}, "batch_size is 0: use at least 1"),
        ({"stage": StageConfig(early_stopping=-2)}, "early_stopping is -2: use at least 0"),
        ({"stage": StageConfig(epochs=0)}, "epochs is 0 and tokens is 0: set one of them above 0"),
        ({"finetune_lr": 0}, "finetune_lr is 0: use a rate above 0"),
        ({"alignment": AlignmentConfig(method="knn", k=0)}, "k is 0: use at least 1"),
        ({"language": "a/b"}, "language is 'a/b': give a code"),
        ({"language": ("nld", "ita")}, "`recycle` makes one, `recycle_each` several"),
    ):
        with pytest.raises(UserError, match=message):
            recycle(replace(config, **change))
    assert {path.name for path in tmp_path.iterdir()} == {"text", "bad.tsv"}


def test_corpus_of_another_tokenizer_is_named(tmp_path, text, dutch, tokenizer, english_models, english_tokenizer):
    build_corpus([text], tokenizer, tmp_path / "corpus", block=16, shares=(0.8, 0.1, 0.1), progress=False)
    english_tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="vocabulary of 320 tokens but the tokenizer 310"):
        relearn(
            RelearnConfig(
                corpus=tmp_path / "corpus",
                tokenizer=tmp_path / "tokenizer",
                out=tmp_path / "out",
                model=str(english_models[0]),
            )
        )
    train_tokenizer(dutch[:100], 320).save_pretrained(tmp_path / "as-large")
    with pytest.raises(UserError, match="built with another tokenizer of as many tokens"):
        relearn(
            RelearnConfig(
                corpus=tmp_path / "corpus",
                tokenizer=tmp_path / "as-large",
                out=tmp_path / "out",
                model=str(english_models[0]),
            )
        )


@pytest.mark.parametrize("there", ["thesis.txt", "config.json", ".git/config"])
@pytest.mark.parametrize("linked", [False, True])
def test_out_that_holds_something_else_is_refused_before_any_work(
    there, linked, tmp_path, text, english_models, monkeypatch
):
    place = tmp_path / ("real" if linked else "out")
    (place / there).parent.mkdir(parents=True)
    (place / there).write_text("mine")
    if linked:
        (tmp_path / "out").symlink_to(place)
    monkeypatch.setattr(run_module, "load_gpt2", None)
    with pytest.raises(UserError, match=f"out' would take the place of '{there}', .* move it away"):
        recycle(settings(text, english_models, tmp_path / "out"))
    assert (place / there).read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"text", "out", place.name}


def test_a_stage_with_a_model_that_it_did_not_write_is_refused_before_any_work(
    tmp_path, text, english_models, monkeypatch
):
    shutil.copytree(english_models[0], tmp_path / "out.stages" / "align" / "model")
    monkeypatch.setattr(run_module, "load_gpt2", None)
    with pytest.raises(UserError, match=r"align.model' would take the place of 'config.json'"):
        recycle(settings(text, english_models, tmp_path / "out"))
    monkeypatch.undo()
    config = AlignConfig(Path(english_models[0]), tmp_path / "out.stages" / "align")
    with pytest.raises(UserError, match=r"align.model' would take the place of 'config.json'"):
        align_models(config)


def test_out_inside_the_text_is_refused(text, english_models):
    with pytest.raises(UserError, match="inside the text"):
        recycle(settings(text, english_models, text / "out"))


def test_one_run_at_a_time(tmp_path, text, english_models):
    config = settings(text, english_models, tmp_path / "out")
    with claimed(tmp_path / "out.stages"), pytest.raises(UserError, match=r"out.stages' is in use by process \d+ on"):
        recycle(config)
    relearning = RelearnConfig(tmp_path / "corpus", tmp_path / "tokenizer", tmp_path / "relearn")
    tuning = FinetuneConfig(english_models[0], tmp_path / "corpus", tmp_path / "tuned")
    aligning = AlignConfig(english_models[0], tmp_path / "align")
    for command, given in ((relearn, relearning), (finetune, tuning), (align_models, aligning)):
        with claimed(given.out), pytest.raises(UserError, match="is in use by process"):
            command(given)
    assert not (tmp_path / "relearn" / "settings.json").exists()
