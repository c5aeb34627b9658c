"""Models of several languages in one run: first all that reads their texts, then each is trained, then one table."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.checks import UserError, printable, require_language, require_place, require_text
from common.files import markdown_table, require_own_directory, whole_directory, write_json, write_text
from common.processes import is_first_process, sole_run
from common.runtime import start
from recycle_gpt2.baseline import ORDER
from recycle_gpt2.evaluate import ALL, interval
from recycle_gpt2.hub import upload
from recycle_gpt2.records import reading
from recycle_gpt2.run import Job, RunConfig, check, check_models, make_data, make_model, recycle
from recycle_gpt2.stages import DONE, read_done

PLACE = "{language}"
"""Stands for a language's code in what a configuration names."""
SUMMARY = "languages"
"""Folder of OUT with the table of all languages."""


def run(config: RunConfig) -> int:
    """`recycle-gpt2 run`: every stage that is not done yet, of one language or several, and where the models are."""
    made, failures = _make(config)
    if is_first_process():
        for code, one in by_language(config).items():
            if code not in made:
                continue
            if one.push_to_hub:
                print(f"uploaded: {upload(made[code], one.push_to_hub)}")
            print(f"model: {made[code]}; try: recycle-gpt2 sample {made[code]}")
    _raise(failures, made)
    return 0


def recycle_each(config: RunConfig) -> dict[str, Path]:
    """Make the models that `config` describes, of one language or several; returns their directories by code.

    Settings and paths of all languages are checked first; then their texts are read, and tokenizers and corpora made;
    then one model is trained after the other. Where one fails, the others are made nevertheless. English text is read
    once. OUT/languages has a table, renewed after each.

    Raises:
        UserError: anything that cannot work, and after all others are made, what failed in training.
    """
    made, failures = _make(config)
    _raise(failures, made)
    return made


def by_language(config: RunConfig) -> dict[str, RunConfig]:
    """The configuration of each language, with its code for `{language}` in the names that it has.

    Raises:
        UserError: a code is none, or twice there, or languages would share what each must have of its own.
    """
    codes = (config.language,) if isinstance(config.language, str) else tuple(config.language)
    for code in codes:
        require_language(code)
        if codes.count(code) > 1:
            raise UserError(f"language names {code} {codes.count(code)} times: name each once.")
    if not codes:
        raise UserError("language names none: give a code, such as nld.")
    several = len(codes) > 1
    own = {
        "text": [str(path) for path in config.text],
        "dictionary": [str(config.dictionary)] if config.dictionary else [],
        "vectors": [str(config.rows.vectors)] if config.rows.vectors else [],
        "push_to_hub": [config.push_to_hub] if config.push_to_hub else [],
    }
    for name, given in own.items() if several else ():
        if given and not any(PLACE in one for one in given):
            raise UserError(
                f"{name} is {' '.join(given)!r} for {' and '.join(codes)} alike: write {PLACE} where the code stands."
            )
    if several and PLACE in str(config.out):
        raise UserError(f"out is {str(config.out)!r}: leave out {PLACE}, each model has a folder of its own in it.")

    def filled(path: Path, code: str) -> Path:
        return Path(str(path).replace(PLACE, code))

    return {
        code: replace(
            config,
            language=code,
            text=tuple(filled(path, code) for path in config.text),
            out=config.out / f"{config.out.name}-{code}" if several else filled(config.out, code),
            dictionary=filled(config.dictionary, code) if config.dictionary else None,
            rows=replace(config.rows, vectors=filled(config.rows.vectors, code) if config.rows.vectors else None),
            push_to_hub=config.push_to_hub.replace(PLACE, code),
        )
        for code in codes
    }


def _make(config: RunConfig) -> tuple[dict[str, Path], dict[str, Exception]]:
    """The models that could be made, and what went wrong with the others."""
    configs = by_language(config)
    if len(configs) == 1:
        return {code: recycle(one) for code, one in configs.items()}, {}
    require_text("out", config.out)
    require_place(config.out, directory=True)
    if (config.out / "config.json").exists():
        raise UserError(f"out is {str(config.out)!r}, a model: give a directory for the models of several languages.")
    if is_first_process():
        require_own_directory(config.out / SUMMARY, "table of languages")
    jobs = {}
    for code, one in configs.items():
        with _naming(code):
            jobs[code] = check(one, english=config.out / "english")
    start(config.runtime)
    block = check_models(config)
    made: dict[str, Path] = {}
    failures: dict[str, Exception] = {}
    with sole_run(config.out):
        for code, job in jobs.items():
            _say(f"{code}: text")
            with _naming(code), sole_run(job.work):
                make_data(job, block)
        for code, job in jobs.items():
            _say(f"{code}: training")
            try:
                with sole_run(job.work):
                    make_model(job)
                made[code] = job.config.out
            except Exception as error:
                if config.stage.scale.world > 1:  # the other processes are still in it
                    raise
                failures[code] = error
                if isinstance(error, UserError):
                    print(f"{code} failed: {printable(str(error))}", file=sys.stderr)
                else:
                    traceback.print_exc()
            if is_first_process():
                table = _summarise(config.out, jobs, failures)
    if is_first_process():
        print(table, flush=True)
    return made, failures


def _raise(failures: Mapping[str, Exception], made: Mapping[str, Path]) -> None:
    """Raise what is no mistake of the user's, or else UserError with all that went wrong."""
    for error in failures.values():
        if not isinstance(error, UserError):
            raise error
    if failures:
        each = "; ".join(f"{code}: {error}" for code, error in failures.items())
        rest = f"; {' and '.join(made)} {'are' if len(made) > 1 else 'is'} finished" if made else ""
        raise UserError(f"{each} Mend this and give the same command again{rest}.")


@contextlib.contextmanager
def _naming(code: str) -> Iterator[None]:
    """Put the language before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{code}: {error}") from None


def _say(what: str) -> None:
    if is_first_process():
        print(what, flush=True)


def _summarise(out: Path, jobs: Mapping[str, Job], failures: Mapping[str, Exception]) -> str:
    """Write the table of all languages, as a page and as JSON; returns it."""
    rows, records = [], {}
    for code, job in jobs.items():
        failed = str(failures[code]) if code in failures else None
        row: dict[str, Any] = {"language": code, "model": "failed" if failed else "not finished"}
        records[code] = {"model": None, "failed": failed}
        if not failed and (job.work / "card" / DONE).exists():
            row, record = _row(code, job)
            records[code] |= record
        rows.append(row)
    columns = ["language", "tokens of text", "hours", "recycled", "95% interval", f"{ORDER}-gram", "recycled minus it"]
    lines = markdown_table([*columns, "English, untouched", "model"], rows)
    text = "\n".join(lines)
    said = "Bits per byte of held-out documents. They compare models of one language, not languages."
    with whole_directory(out / SUMMARY, "table of languages") as directory:
        write_text(directory / "README.md", f"# Languages\n\n{text}\n\n{said}\n")
        write_json(directory / "languages.json", records)
    return text


def _row(code: str, job: Job) -> tuple[dict[str, str], dict[str, Any]]:
    """What the table and its JSON say of a finished language."""
    evaluation = job.work / "evaluate"
    with reading(evaluation / DONE, "delete that directory and give the same command again"):
        found = read_done(evaluation)
        scores = {name: groups[ALL] for name, groups in found["scores"].items()}
        counted = next(name for name in scores if name.startswith(f"{ORDER}-gram"))
        bits = {name: f"{score['bits_per_byte']:.3f}" for name, score in scores.items()}
        stages = [
            read_done(job.work / name)
            for name in ("relearn", "relearn-large", "finetune")
            if (job.work / name / DONE).exists()
        ]
        tokens = read_done(job.work / "corpus")["splits"]["train"]["tokens"]
        row = {
            "language": code,
            "tokens of text": f"{tokens:,}",
            "hours": f"{sum(stage['seconds'] for stage in stages) / 3600:.2f}",
            "recycled": bits["recycled"],
            "95% interval": interval(scores["recycled"]["bits_per_byte_interval"]),
            f"{ORDER}-gram": bits[counted],
            "recycled minus it": found["differences"][counted],
            "English, untouched": bits["English, untouched"],
            "model": job.config.out.name,
        }
    record = {"model": job.config.out.name, "tokens": tokens, "scores": scores, "differences": found["differences"]}
    return row, record
