"""The paper's qualitative study: people say, blind, whether a text is by a human or a machine."""

from __future__ import annotations

import hashlib
import html
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from common.checks import UserError, printable, require_at_least, require_file, require_language, require_place
from common.files import write_json, write_text
from common.intervals import wilson_interval
from common.words import is_unspaced
from recycle_gpt2.documents import read_documents
from recycle_gpt2.judge_words import direction, form_words

HUMAN = "human"
TEMPLATE = """<!doctype html>
<html lang="@LANGUAGE@" dir="@DIRECTION@"><head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>@TITLE@</title><style>
body { font: 18px/1.5 Georgia, serif; max-width: 42rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
#text { background: #f4f4f0; padding: 1rem 1.5rem; border-radius: 6px; white-space: pre-wrap; min-height: 8rem; }
button { font: inherit; padding: .5rem 1.5rem; margin: 0; margin-inline-end: .5rem; cursor: pointer; }
button[aria-pressed=true] { background: #235; color: white; }
input { font: inherit; }
progress { width: 100%; }
nav { margin-top: 2rem; }
</style></head><body>
<h1>@TITLE@</h1>
<p><label>@NAME@ <input id="judge" autocomplete="off" dir="auto" autofocus></label></p>
<progress id="progress" value="0"></progress>
<p id="count"></p>
<div id="text" dir="auto"></div>
<p>@QUESTION@</p>
<p><button id="human">@YES@</button><button id="machine">@NO@</button></p>
<nav><button id="back">@BACK@</button><button id="next">@NEXT@</button><button id="save">@SAVE@</button></nav>
<noscript>@SCRIPTS@</noscript>
<script>
"use strict";
const form = @DATA@;
const $ = id => document.getElementById(id);
let at = 0, state = { judge: "", answers: {} };
// What was answered outlives a reload; a browser that forbids this still works.
try { state = JSON.parse(localStorage.getItem(form.id)) || state; } catch (error) {}
function keep() { try { localStorage.setItem(form.id, JSON.stringify(state)); } catch (error) {} }
function show() {
  const item = form.items[at], done = Object.keys(state.answers).length;
  $("text").textContent = item.text;
  $("count").textContent = (at + 1) + " / " + form.items.length + " (" + done + ")";
  $("progress").max = form.items.length;
  $("progress").value = done;
  $("human").setAttribute("aria-pressed", state.answers[item.id] === "human");
  $("machine").setAttribute("aria-pressed", state.answers[item.id] === "machine");
  $("back").disabled = at === 0;
  $("next").disabled = at === form.items.length - 1;
  $("save").disabled = done === 0;
  $("human").disabled = $("machine").disabled = !state.judge.trim();  // the name first
}
function answer(choice) {
  state.answers[form.items[at].id] = choice;
  keep();
  if (at < form.items.length - 1) at += 1;
  show();
}
$("human").onclick = () => answer("human");
$("machine").onclick = () => answer("machine");
$("back").onclick = () => { at -= 1; show(); };
$("next").onclick = () => { at += 1; show(); };
$("judge").value = state.judge;
$("judge").oninput = () => { state.judge = $("judge").value; keep(); show(); };
$("save").onclick = () => {
  const saved = { form: form.id, judge: state.judge, answers: state.answers };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(saved, null, 1)], { type: "application/json" }));
  link.download = "answers-" + (state.judge.replace(/[^\\p{L}\\p{N}]+/gu, "-") || "judge") + ".json";
  link.click();
};
at = Math.max(0, form.items.findIndex(item => !(item.id in state.answers)));
show();
</script></body></html>
"""


@dataclass(frozen=True)
class JudgeConfig:
    """Make a form (one HTML file) in which people judge texts, blind, and the key to it."""

    human: tuple[Path, ...]
    """Texts by humans: anything that `recycle-gpt2 corpus` reads, such as held-out documents as jsonl."""
    machine: tuple[str, ...]
    """NAME=PATH of each model's texts, such as nld-small=samples/small.jsonl."""
    out: Path = Path("judge")
    """Directory for form.html (give it to the judges) and key.json (keep it)."""
    per_model: int = 20
    """Texts of each model, and of humans."""
    words: int = 60
    """Words that a text is cut to, so that its length tells nothing; shorter texts are left out. Characters, where the
    humans' texts are in a script without spaces between words (Chinese, Japanese, Thai)."""
    language: str = "en"
    """Language code of the texts and of the judges (nl, ita, ar): the form's words are in it where they are known
    (English, Dutch, Italian, German, French, Spanish), otherwise English, and its direction is the language's."""
    title: str = ""
    """Heading of the form, instead of the language's words for "Human or machine?"."""
    question: str = ""
    """Question under each text, instead of "Could this text have been written by a human?"."""
    yes: str = ""
    """Label of the button for human, instead of "Human"."""
    no: str = ""
    """Label of the button for machine, instead of "Machine"."""
    seed: int = 0
    """Which texts, and in which order."""


@dataclass(frozen=True)
class JudgeReportConfig:
    """Read judges' answers and say how often each model was taken for human."""

    answers: tuple[Path, ...]
    """Answer files that the form has saved, or directories of them; of a judge's answers to a text the one in the file
    that was saved last holds."""
    key: Path
    """key.json of the form."""
    out: Path | None = None
    """JSON file for the report, beside the printed table."""


@dataclass(frozen=True)
class Verdict:
    """How often one model's texts, or humans', were taken for human."""

    model: str
    judged: int
    """Answers to its texts."""
    human: int
    """Answers that say human."""
    share: float
    low: float
    """Lower end of the 95% interval of the share."""
    high: float
    """Upper end."""


def run_form(config: JudgeConfig) -> None:
    """Write form.html and key.json into `config.out`.

    Raises:
        UserError: a model is not given as NAME=PATH, twice or as "human", or has too few texts of that length.
    """
    require_at_least("per_model", config.per_model, 1)
    require_at_least("words", config.words, 1)
    require_at_least("seed", config.seed, 0)
    require_language(config.language)
    require_place(config.out, directory=True)
    sources = {HUMAN: list(config.human)}
    for given in config.machine:
        name, equals, path = given.partition("=")
        if not (name and equals and path):
            raise UserError(f"machine is {given!r}: use NAME=PATH, such as nld-small=samples/small.jsonl.")
        if name in sources:
            raise UserError(f"machine {name!r} is given twice or is {HUMAN!r}: use another name.")
        sources[name] = [Path(path)]
    if len(sources) < 2:
        raise UserError("no machine is given: use NAME=PATH, such as nld-small=samples/small.jsonl.")
    written = {name: [document.text for document in read_documents(paths)] for name, paths in sources.items()}
    characters = is_unspaced(written[HUMAN])
    texts = {name: _choose(name, several, config, characters) for name, several in written.items()}
    form, key = make_form(texts, seed=config.seed)
    page, words, way = TEMPLATE, form_words(config.language), direction(config.language)
    arrows = ("→", "←") if way == "rtl" else ("←", "→")
    for mark, value in {
        "LANGUAGE": config.language,
        "DIRECTION": way,
        "TITLE": config.title or words.title,
        "NAME": words.name,
        "QUESTION": config.question or words.question,
        "YES": config.yes or words.yes,
        "NO": config.no or words.no,
        "BACK": arrows[0],
        "NEXT": arrows[1],
        "SAVE": words.save,
        "SCRIPTS": words.scripts,
    }.items():
        page = page.replace(f"@{mark}@", html.escape(value))
    # Last, so that no mark within a text is filled in; "<" escaped, so that no text ends the script.
    page = page.replace("@DATA@", json.dumps(form, ensure_ascii=False).replace("<", "\\u003c"))
    write_text(config.out / "form.html", page)
    write_json(config.out / "key.json", key)
    print(f"{len(form['items'])} texts in {config.out / 'form.html'}; keep {config.out / 'key.json'} from the judges.")


def run_report(config: JudgeReportConfig) -> None:
    """Print, and write, how often each model was taken for human, with Wilson intervals.

    Raises:
        UserError: files that the form was not saved with, answers to another form, or none.
    """
    if config.out is not None:
        require_place(config.out)
    key = _read(config.key, "key", ("form",), "models")
    files: list[Path] = []
    for path in config.answers:
        files += sorted(path.glob("*.json")) if path.is_dir() else [require_file(path, "answer file")]
    files.sort(key=lambda path: path.stat().st_mtime_ns)
    answers = [_read(path, "answer file", ("form", "judge"), "answers") for path in files]
    for path, saved in zip(files, answers, strict=True):
        if saved["form"] != key["form"]:
            raise UserError(f"answer file {str(path)!r} is of another form than key {str(config.key)!r}: use its key.")
        for item, choice in saved["answers"].items():
            if item not in key["models"] or choice not in (HUMAN, "machine"):
                raise UserError(f"answer file {str(path)!r}: {item!r}: {choice!r} is no answer of it: remove it.")
    judges: dict[str, dict[str, str]] = {}
    for path, saved in zip(files, answers, strict=True):
        # A judge who saved twice is one judge, and the later file holds; those without a name are each their own.
        judges.setdefault(saved["judge"] or str(path), {}).update(saved["answers"])
    verdicts = tally(list(judges.values()), key["models"])
    if not any(verdict.judged for verdict in verdicts):
        raise UserError(f"there is no answer in {len(files)} files: give files that the form has saved.")
    names = {verdict.model: printable(verdict.model) for verdict in verdicts}
    width = max(map(len, names.values()))
    print(f"{'model':<{width}}  taken for human  95% interval     answers")
    for verdict in verdicts:
        if verdict.judged:
            print(
                f"{names[verdict.model]:<{width}}  {verdict.share:15.1%}  {verdict.low:6.1%} to {verdict.high:6.1%}  "
                f"{verdict.judged:>7,}"
            )
    if config.out is not None:
        counts = {judge: len(given) for judge, given in judges.items()}
        write_json(config.out, {"form": key["form"], "answers_by_judge": counts, "models": verdicts})


def make_form(texts: Mapping[str, Sequence[str]], *, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """A form's items in random order, which say nothing about who wrote them, and the key that does.

    Args:
        texts: by model, "human" among them.
        seed: of the order and of the items' names.

    Returns:
        {"id", "items": [{"id", "text"}]} and {"form": id, "models": {item id: model}}.
    """
    rng = random.Random(seed)
    pairs = [(model, text) for model, several in texts.items() for text in several]
    rng.shuffle(pairs)
    # The names of the items are numbers in the shuffled order: a hash of the text could be looked up.
    form_id = hashlib.sha256(json.dumps([seed, pairs]).encode()).hexdigest()[:16]
    items = [{"id": f"t{number}", "text": text} for number, (_, text) in enumerate(pairs, 1)]
    models = {item["id"]: model for item, (model, _) in zip(items, pairs, strict=True)}
    return {"id": form_id, "items": items}, {"form": form_id, "models": models}


def tally(answers: Sequence[Mapping[str, str]], models: Mapping[str, str]) -> list[Verdict]:
    """A verdict on each model, the one taken for human most often first; a judge's answers are a mapping."""
    judged, human = dict.fromkeys(models.values(), 0), dict.fromkeys(models.values(), 0)
    for one in answers:
        for item, choice in one.items():
            judged[models[item]] += 1
            human[models[item]] += choice == HUMAN
    verdicts = []
    for model, number in judged.items():
        share = human[model] / number if number else 0.0
        verdicts.append(Verdict(model, number, human[model], share, *wilson_interval(human[model], number)))
    return sorted(verdicts, key=lambda verdict: -verdict.share)


def _choose(name: str, texts: Sequence[str], config: JudgeConfig, characters: bool) -> list[str]:
    """Texts of exactly `config.words` words, or characters, in white space as it would be read aloud."""
    cut = {short for text in texts if (short := _cut(text, config.words, characters)) is not None}
    if len(cut) < config.per_model:
        raise UserError(
            f"{name!r} has {len(cut)} different texts of {config.words} {'characters' if characters else 'words'}: "
            f"give {config.per_model}, or lower per_model or words."
        )
    return random.Random(f"{config.seed} {name}").sample(sorted(cut), config.per_model)


def _cut(text: str, length: int, characters: bool) -> str | None:
    """The beginning of `text`, or None if it is shorter; marks stay with their letters."""
    words = text.split()
    if not characters:
        return " ".join(words[:length]) if len(words) >= length else None
    units = regex.findall(r"\X", " ".join(words))
    ends = [place for place, unit in enumerate(units, 1) if unit != " "]
    return "".join(units[: ends[length - 1]]) if len(ends) >= length else None


def _read(path: Path, what: str, texts: Sequence[str], mapping: str) -> dict[str, Any]:
    """What a file of the form holds: under `texts` texts, under `mapping` texts by texts."""
    require_file(path, what)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # not UTF-8, not JSON, a number of thousands of digits, or too deep
        value = None
    if (
        not isinstance(value, dict)
        or not all(isinstance(value.get(name), str) for name in texts)
        or not isinstance(value.get(mapping), dict)
        or not all(isinstance(inner, str) for inner in value[mapping].values())
    ):
        raise UserError(f"{what} {str(path)!r} is not one that the form was saved with: give the right file.")
    return value
