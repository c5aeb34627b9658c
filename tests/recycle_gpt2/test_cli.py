"""The command: help for everyone, one clear line and exit code 2 for what cannot work."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from recycle_gpt2.cli import SUBCOMMANDS, main

COMMANDS = "run tokenizer corpus relearn align finetune evaluate sample lexicon judge judge-report".split()


def test_every_stage_is_a_command(capsys):
    assert list(SUBCOMMANDS) == COMMANDS
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"recycle-gpt2 {name}" in printed
    chosen = SUBCOMMANDS[name]
    config = getattr(importlib.import_module(chosen.module), chosen.config)
    words = " ".join(printed.replace("│", " ").split())
    for option in dataclasses.fields(config):  # a flag that is on has only its --no- form
        name = option.name.replace("_", "-")
        assert (
            name
            in (
                "stage",
                "runtime",
                "models",
                "model",
                "rows",
                "alignment",
                "options",
                "reading",
                "kept",
                "drop",
                "processes",
            )
            or f"--{name}" in words
            or f"--no-{name}" in words
        )


def refused(arguments: list[str], capsys) -> str:
    """The one line that the command prints on standard error."""
    assert main(arguments) == 2
    captured = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in captured if line.startswith("error: ")]
    assert len(errors) == 1 and captured[-1] == errors[0]
    assert "Traceback" not in "\n".join(captured)
    return errors[0]


def run_with(text, models, out, *more: str) -> list[str]:
    return [
        "run",
        "--text",
        str(text),
        "--language",
        "nld",
        "--small",
        str(models[0]),
        "--out",
        str(out),
        "--vocab-size",
        "320",
        "--shares",
        "0.8",
        "0.1",
        "0.1",
        "--device",
        "cpu",
        *more,
    ]


def test_empty_binary_and_badly_encoded_files(tmp_path, english_models, capsys):
    cases = {
        "empty.txt": (b"", "empty"),
        "binary.txt": (b"\x00\x01\x02" * 50, "binary"),
        "latin.txt": ("een zin\nen één meer\n".encode("latin-1"), "line 2"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        error = refused(run_with(tmp_path / name, english_models, tmp_path / "out"), capsys)
        assert message in error and name in error
        assert not (tmp_path / "out").exists()


def test_vocabulary_larger_than_the_text_supports(text, tmp_path, english_models, capsys):
    arguments = run_with(text, english_models, tmp_path / "out")
    arguments[arguments.index("320")] = "30000"
    # A second try, with another value, is not held to the first.
    for size in ("30000", "20000"):
        arguments[arguments.index("--vocab-size") + 1] = size
        assert f"vocab_size is {size} but the text supports" in refused(arguments, capsys)


def test_corpus_shorter_than_a_block(tmp_path, english_models, capsys):
    (tmp_path / "short.txt").write_text("\n\n".join(["de kat en het huis"] + ["een kat"] * 3))
    arguments = run_with(tmp_path / "short.txt", english_models, tmp_path / "out")
    arguments[arguments.index("320")] = "257"
    refused(arguments, capsys)


def test_missing_text_model_and_split_of_scores(text, tmp_path, english_models, gpt2_directory, capsys):
    assert "nowhere" in refused(run_with(tmp_path / "nowhere", english_models, tmp_path / "out"), capsys)
    missing = (tmp_path / "no-model", None)
    assert "does not exist" in refused(run_with(text, missing, tmp_path / "out"), capsys)
    assert "either --text or --corpus" in refused(["evaluate", str(gpt2_directory), "--device", "cpu"], capsys)
    assert "sampl" in refused(["sampl"], capsys)


def test_a_full_disk_is_one_line(text, tmp_path, english_models, capsys, monkeypatch):
    import errno

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr("recycle_gpt2.run.save_tokenizer", full)
    error = refused(run_with(text, english_models, tmp_path / "out"), capsys)
    assert "No space left" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenizer", "--text", "TEXT", "--out", "o", "--vocab-size", "1000000000000"], "vocab_size is 1000000000000: use"),
        (["tokenizer", "--text", "TEXT", "--out", "caf\udce9"], "out is 'caf.udce9', which is not UTF-8"),
        (["tokenizer", "--text", "TEXT", "--out", "n" * 256], "name of 256 characters"),
        (["corpus", "--text", "TEXT", "--tokenizer", "MODEL", "--out", "o", "--workers", "1000000000000"], "workers is"),
        (["corpus", "--text", "TEXT", "--tokenizer", "MODEL", "--out", "taken"], "is a file: give the path of a dir"),
        (["align", "--recycled", "MODEL", "--small", "MODEL", "--large", "MODEL", "--out", "taken"], "is a file: give"),
        (["evaluate", "MODEL", "./gone", "--text", "TEXT"], "gone' does not exist"),
        (["lexicon", "--model", "./gone", "--source", "MODEL", "--dictionary", "no.tsv"], "no.tsv' does not exist"),
        (["judge", "--human", "TEXT", "--machine", "m=TEXT", "--out", "o", "--language", "dutch"], "language is 'dutch'"),
        (["judge-report", "--answers", "no.json", "--key", "no.json"], "key 'no.json' does not exist"),
        (["evaluate", "MODEL", "--text", "TEXT", "--max-documents", "-1"], "max_documents is -1"),
        (["evaluate", "MODEL", "--text", "TEXT", "--resamples", "1000000000000"], "resamples is 1000000000000"),
        (["evaluate", "MODEL", "--text", "TEXT", "--out", "TEXT"], "is a directory"),
        (["sample", "MODEL", "--prompts", "caf\udce9"], "prompt is 'caf.udce9', which is not UTF-8"),
        (["sample", "MODEL", "--count", "1000000000000"], "GB are free"),
        (["sample", "MODEL", "--temperature", "1e-320"], "temperature is 1e-320"),
        (["sample", "MODEL", "--top-p", "nan"], "top_p is nan"),
        (["sample", "MODEL", "--out", "TEXT/stories.txt/x"], "below the file"),
        (["lexicon", "--model", "MODEL", "--source", "MODEL", "--out", "n" * 256], "name of 256 characters"),
    ],
)  # fmt: skip
def test_absurd_values_are_one_line(arguments, message, text, gpt2_directory, tmp_path, monkeypatch, capsys):
    import re

    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    arguments = [a.replace("TEXT", str(text)).replace("MODEL", str(gpt2_directory)) for a in arguments]
    assert main(arguments) == 2
    printed, told = capsys.readouterr()
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert printed == "" and len(errors) == 1 and "Traceback" not in told  # nothing was done before
    assert re.search(message, errors[0].replace("\\\\", "\\"))


def test_a_text_cannot_write_to_the_terminal(gpt2_directory, monkeypatch, capsys):
    monkeypatch.setattr("recycle_gpt2.sampling.sample", lambda *_, **__: ["een\n\x1b[2Jkat"])
    assert main(["sample", str(gpt2_directory), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "een\n\\x1b[2Jkat\n\n"
