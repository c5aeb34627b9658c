"""Several languages in one run: checked together, trained one after the other, one failure apart from the others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.checks import UserError
from common.runtime import RuntimeConfig
from recycle_gpt2 import languages as languages_module
from recycle_gpt2 import run as run_module
from recycle_gpt2.cli import main
from recycle_gpt2.extend import EnglishConfig
from recycle_gpt2.languages import by_language, recycle_each
from recycle_gpt2.lexical import RowsConfig
from recycle_gpt2.run import RunConfig
from recycle_gpt2.training import StageConfig
from tests.recycle_gpt2.conftest import invent


@pytest.fixture
def config(tmp_path, dutch, english_models) -> RunConfig:
    """Of two invented languages, with English text that both replay."""
    for code, texts in {"nld": dutch, "xen": invent("english", 200, seed=1)}.items():
        (tmp_path / "text" / code).mkdir(parents=True)
        (tmp_path / "text" / code / "a.txt").write_text("\n\n".join(texts))
    (tmp_path / "english.txt").write_text("\n\n".join(invent("english", 60)))
    return RunConfig(
        text=(tmp_path / "text" / "{language}",),
        out=tmp_path / "out",
        language=("nld", "xen"),
        small=str(english_models[0]),
        vocab_size=320,
        block=32,
        shares=(0.8, 0.1, 0.1),
        kept=EnglishConfig(english=(tmp_path / "english.txt",), replay=0.2),
        finetune_share=0.5,
        stage=StageConfig(tokens=256, batch_size=8, lr=3e-3),
        runtime=RuntimeConfig(device="cpu"),
    )


def test_the_code_stands_in_every_name(config):
    config = replace(
        config,
        dictionary=Path("{language}.tsv"),
        rows=RowsConfig(initialisation="focus", vectors=Path("v/{language}.vec")),
        push_to_hub="me/gpt2-{language}",
    )
    found = by_language(config)
    assert list(found) == ["nld", "xen"]
    one = found["xen"]
    assert one.language == "xen" and one.text == (config.text[0].parent / "xen",)
    assert one.out == config.out / "out-xen" and one.dictionary == Path("xen.tsv")
    assert one.rows.vectors == Path("v/xen.vec") and one.push_to_hub == "me/gpt2-xen"
    assert replace(one, stage=config.stage) == replace(
        config,
        **{name: getattr(one, name) for name in ("language", "text", "out", "dictionary", "rows", "push_to_hub")},
    )
    for language in ("nld", ("nld",)):
        (alone,) = by_language(replace(config, language=language)).values()
        assert alone.out == config.out and alone.text[0].name == "nld" and alone.language == "nld"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": (Path("corpus"),)}, r"text is 'corpus' for nld and xen alike: write \{language\} where the code"),
        ({"dictionary": Path("a.tsv")}, "dictionary is 'a.tsv' for nld and xen alike"),
        ({"push_to_hub": "me/gpt2"}, "push_to_hub is 'me/gpt2' for nld and xen alike"),
        ({"language": ("nld", "nld")}, "language names nld 2 times: name each once"),
        ({"language": ("nld", "../x")}, r"language is '\.\./x': give a code of two or three letters"),
        ({"language": ""}, "language is '': give a code"),
        ({"language": ()}, "language names none"),
        ({"out": Path("out/{language}")}, r"leave out \{language\}, each model has a folder"),
    ],
)
def test_what_languages_cannot_share_is_refused(change, message, config):
    with pytest.raises(UserError, match=message):
        recycle_each(replace(config, **change))
    assert not config.out.exists()


def test_a_bad_path_of_the_second_language_is_refused_before_anything_is_made(config, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "load_gpt2", None)
    (config.text[0].parent / "xen").rename(config.text[0].parent / "elsewhere")
    with pytest.raises(UserError, match=r"^xen: text '.*text.xen' does not exist"):
        recycle_each(config)
    assert not config.out.exists()


@pytest.mark.slow
def test_a_bad_text_of_the_second_language_is_refused_before_the_first_is_trained(config, monkeypatch):
    monkeypatch.setattr(languages_module, "make_model", None)
    (config.text[0].parent / "xen" / "a.txt").write_text("one cat\n\nand a cat\n\nno cat")
    with pytest.raises(UserError, match="^xen: vocab_size is 320 but the text supports"):
        recycle_each(config)


@pytest.mark.slow
def test_one_language_that_fails_late_does_not_lose_the_others(config, monkeypatch, capsys):
    make_model = run_module.make_model

    def failing(job):
        if job.config.language == "nld":
            raise UserError("the loss is nan: use a lower rate.")
        make_model(job)

    monkeypatch.setattr(languages_module, "make_model", failing)
    with pytest.raises(UserError, match="^nld: the loss is nan: use a lower rate. Mend .* again; xen is finished"):
        recycle_each(config)
    assert (config.out / "out-xen" / "model.safetensors").is_file() and not (config.out / "out-nld").exists()
    printed = capsys.readouterr()
    assert "nld failed: the loss is nan" in printed.err
    records = json.loads((config.out / "languages" / "languages.json").read_text())
    assert records["nld"] == {"model": None, "failed": "the loss is nan: use a lower rate."}
    page = (config.out / "languages" / "README.md").read_text()
    assert "| nld | – |" in page and "| failed |" in page

    monkeypatch.undo()
    before = (config.out / "out-xen" / "model.safetensors").stat().st_mtime_ns
    made = recycle_each(config)
    assert made == {code: config.out / f"out-{code}" for code in ("nld", "xen")}
    assert (made["xen"] / "model.safetensors").stat().st_mtime_ns == before
    assert "language: xen" in (made["xen"] / "README.md").read_text()
    records = json.loads((config.out / "languages" / "languages.json").read_text())
    for code, record in records.items():
        scores = json.loads((config.out / f"out-{code}.stages" / "evaluate" / "done.json").read_text())["scores"]
        assert record["scores"]["recycled"] == scores["recycled"]["all"] and record["model"] == f"out-{code}"
        bits = f"{scores['recycled']['all']['bits_per_byte']:.3f}"
        row = next(line for line in page_of(config.out) if line.startswith(f"| {code} |"))
        assert f"| {bits} |" in row and row.endswith(f"| out-{code} |")
    # The English text was read once, into a place that both have.
    assert (config.out / "english" / "documents.jsonl.gz").is_file()
    assert not list(config.out.glob("*.stages/text/english"))

    with pytest.raises(UserError, match="a model: give a directory for the models of several languages"):
        recycle_each(replace(config, out=made["nld"]))


def page_of(out: Path) -> list[str]:
    return (out / "languages" / "README.md").read_text().splitlines()


def test_the_command_takes_several_codes(config, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(languages_module, "_make", lambda config: (given.append(config), ({}, {}))[1])
    text, small = str(config.text[0]), config.small
    base = ["run", "--text", text, "--small", small, "--out", str(config.out), "--language"]
    assert main([*base, "nld", "xen"]) == 0 and main([*base, "nld"]) == 0
    assert [one.language for one in given] == [("nld", "xen"), "nld"]
