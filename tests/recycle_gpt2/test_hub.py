"""Text streamed from the hub: its rows as they arrive, its test split left out, and read once by a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.checks import UserError
from common.runtime import RuntimeConfig
from recycle_gpt2.bad_rows import TextOptions
from recycle_gpt2.corpus import build_corpus
from recycle_gpt2.documents import read_documents
from recycle_gpt2.run import RunConfig, recycle
from recycle_gpt2.texts import text_hash
from recycle_gpt2.training import StageConfig

datasets = pytest.importorskip("datasets")
NAME = Path("hf:someone/dutch:nl")


@pytest.fixture
def hub(tmp_path, dutch, monkeypatch):
    """A hub of one dataset, files on this disk that `datasets` streams; counts how often it was asked."""
    asked = []
    for split, texts in {"train": dutch[:80], "validation": dutch[80:120], "test": dutch[120:]}.items():
        lines = [json.dumps({"body": text, "id": number}) for number, text in enumerate(texts)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    load = datasets.load_dataset

    def load_dataset(name, configuration, *, streaming):
        asked.append((name, configuration))
        if name != "someone/dutch":
            raise FileNotFoundError(f"Couldn't find any data file at {name}")
        files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
        return load("json", data_files=files, streaming=streaming, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_rows_are_streamed_and_the_test_split_is_for_scores(hub, dutch, capsys):
    body = TextOptions(column="body")
    found = list(read_documents([NAME], body))
    assert [document.text for document in found] == dutch[:120] and found[0].genre == "dutch"
    assert "left out: split 'test'" in capsys.readouterr().err
    assert [document.text for document in read_documents([NAME], body, held_out=True)] == dutch[120:]
    assert hub == [("someone/dutch", "nl")] * 2
    assert text_hash([NAME]) != text_hash([Path("hf:someone/else")]) and len(hub) == 2  # by its name alone


def test_what_cannot_be_streamed_is_one_line(hub):
    with pytest.raises(UserError, match='has no column "text" .columns: body, id.'):
        list(read_documents([NAME]))
    with pytest.raises(UserError, match="'no/such' cannot be streamed from the hub .Couldn't find any"):
        list(read_documents([Path("hf:no/such")]))
    with pytest.raises(UserError, match="names no dataset"):
        list(read_documents([Path("hf:")]))


def test_a_corpus_of_it(hub, tokenizer, tmp_path):
    settings = dict(block=16, shares=(0.8, 0.1, 0.1), reading=TextOptions(column="body"), progress=False)
    build_corpus([NAME], tokenizer, tmp_path / "corpus", **settings)
    times = len(hub)
    build_corpus([NAME], tokenizer, tmp_path / "corpus", **settings)  # it is there
    assert len(hub) == times


@pytest.mark.slow
def test_a_run_reads_the_stream_once(hub, english_models, tmp_path):
    config = RunConfig(
        text=(NAME,),
        out=tmp_path / "out",
        language="nld",
        small=str(english_models[0]),
        vocab_size=320,
        block=32,
        shares=(0.8, 0.1, 0.1),
        unfreeze="none",
        reading=TextOptions(column="body"),
        stage=StageConfig(tokens=8 * 32, batch_size=8),
        runtime=RuntimeConfig(device="cpu"),
    )
    recycle(config)
    recycle(config)
    assert hub == [("someone/dutch", "nl")]
    assert json.loads((tmp_path / "out.stages" / "text" / "text.json").read_text())["documents"] == 120
    assert (tmp_path / "out" / "config.json").is_file()
