"""The form is blind, keeps what people answer, and its report counts it with the right intervals."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace

import pytest

from common.checks import UserError
from common.intervals import wilson_interval
from recycle_gpt2.judge import JudgeConfig, JudgeReportConfig, make_form, run_form, run_report, tally


@pytest.fixture
def config(tmp_path, dutch):
    """Six texts of each of two models and of humans."""
    texts = {"human": dutch[:50], "klein-model": dutch[50:100], "groot-model": dutch[100:150]}
    for name, several in texts.items():
        rows = (json.dumps({"text": f"</script><b>{text}"}) for text in several)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return JudgeConfig(
        human=(tmp_path / "human.jsonl",),
        machine=tuple(f"{name}={tmp_path / name}.jsonl" for name in ("klein-model", "groot-model")),
        out=tmp_path / "form",
        per_model=6,
        words=10,
        question="Door een mens & geschreven?",
        language="nl",
    )


def test_form_is_blind_and_random(config):
    run_form(config)
    page = (config.out / "form.html").read_text(encoding="utf-8")
    key = json.loads((config.out / "key.json").read_text())
    assert "klein-model" not in page and "groot-model" not in page
    assert "Door een mens &amp; geschreven?" in page and '<html lang="nl" dir="ltr">' in page
    assert "http" not in page and page.count("</script>") == 1  # self-contained; no text ends the script
    form = json.loads(page.split("const form = ")[1].split(";\nconst $")[0])
    assert form["id"] == key["form"]
    assert [item["id"] for item in form["items"]] == [f"t{number}" for number in range(1, 19)]
    assert all(set(item) == {"id", "text"} and len(item["text"].split()) == 10 for item in form["items"])
    order = [key["models"][item["id"]] for item in form["items"]]
    assert sorted(order) == sorted(["human", "klein-model", "groot-model"] * 6) and order != sorted(order)
    # The same seed gives the same form, another one another.
    before = page
    run_form(config)
    assert (config.out / "form.html").read_text(encoding="utf-8") == before
    texts = {"human": list("abcdef"), "machine": list("ghijkl")}
    assert make_form(texts, seed=1) == make_form(texts, seed=1) != make_form(texts, seed=2)


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("nld", ("Mens of machine?", "Eerst uw naam", "Antwoorden opslaan", 'dir="ltr"', ">←</button>")),
        ("de-AT", ("Mensch oder Maschine?", "Maschine</button>", "Antworten speichern", 'dir="ltr"')),
        ("fra", ("Humain ou machine ?", "Enregistrer les réponses")),
        ("es", ("¿Persona o máquina?", "Guardar las respuestas")),
        ("ita", ("Persona o macchina?", "Salva le risposte")),
        ("ar", ("Human or machine?", "Save answers", 'lang="ar" dir="rtl"', 'id="back">→</button>')),
        ("ur-Latn", ('dir="ltr"',)),
    ],
)
def test_the_form_is_in_the_readers_language_and_direction(config, language, expected):
    run_form(replace(config, language=language, question=""))
    page = (config.out / "form.html").read_text(encoding="utf-8")
    assert all(part in page for part in expected)
    assert not re.search("@[A-Z]+@", page)
    assert page.index('id="judge"') < page.index('id="text"')  # the name comes first


def test_key_belongs_to_the_texts():
    texts = {"human": ["h1", "h2"], "model": ["m1", "m2"]}
    form, key = make_form(texts, seed=3)
    for item in form["items"]:
        assert key["models"][item["id"]] == ("human" if item["text"][0] == "h" else "model")


def test_tally():
    models = {"t1": "human", "t2": "a", "t3": "a", "t4": "b"}
    verdicts = tally([{"t1": "human", "t2": "human", "t3": "machine"}, {"t2": "machine"}], models)
    assert [(v.model, v.judged, v.human) for v in verdicts] == [("human", 1, 1), ("a", 3, 1), ("b", 0, 0)]
    assert verdicts[1].share == pytest.approx(1 / 3)
    assert (verdicts[1].low, verdicts[1].high) == wilson_interval(1, 3)


def test_report(config, tmp_path, capsys):
    run_form(config)
    key = json.loads((config.out / "key.json").read_text())
    answers = tmp_path / "answers"
    answers.mkdir()
    saved = {item: "human" if model != "groot-model" else "machine" for item, model in key["models"].items()}
    (answers / "a.json").write_text(json.dumps({"form": key["form"], "judge": "Ann", "answers": saved}))
    (answers / "a2.json").write_text(json.dumps({"form": key["form"], "judge": "Ann", "answers": saved}))  # twice
    flipped = {item: "machine" if choice == "human" else "human" for item, choice in saved.items()}
    (answers / "b.json").write_text(json.dumps({"form": key["form"], "judge": "Bob", "answers": flipped}))
    out = tmp_path / "report.json"
    run_report(JudgeReportConfig(answers=(answers,), key=config.out / "key.json", out=out))
    report = json.loads(out.read_text())
    assert report["answers_by_judge"] == {"Ann": 18, "Bob": 18}
    for verdict in report["models"]:
        assert (verdict["judged"], verdict["human"], verdict["share"]) == (12, 6, 0.5)
    printed = capsys.readouterr().out
    assert "klein-model" in printed and "50.0%" in printed and "25.4% to  74.6%" in printed
    only = JudgeReportConfig(answers=(answers / "a.json",), key=config.out / "key.json", out=out)
    run_report(only)
    shares = {verdict["model"]: verdict["share"] for verdict in json.loads(out.read_text())["models"]}
    assert shares == {"human": 1, "klein-model": 1, "groot-model": 0}
    for content, message in (
        ('{"form": "x", "judge": "", "answers": {}}', "is of another form"),
        ("{", "is not one that the form was saved with"),
        (json.dumps({"form": key["form"], "judge": "", "answers": {"t99": "human"}}), "'t99': 'human' is no answer"),
        (json.dumps({"form": key["form"], "judge": "", "answers": {}}), "there is no answer in 1 files"),
    ):
        (answers / "a.json").write_text(content)
        with pytest.raises(UserError, match=message):
            run_report(only)


@pytest.mark.parametrize(
    "content",
    [
        "[]", "null", "5", '"form"', "[" * 100_000, "9" * 5000, '{"form": 1e999, "judge": "", "answers": {}}', "\\xff",
        '{"form": "FORM", "judge": ["Ann"], "answers": {}}', '{"form": "FORM", "judge": null, "answers": {}}',
        '{"form": "FORM", "judge": "", "answers": []}', '{"form": "FORM", "judge": "", "answers": {"t1": ["human"]}}',
        '{"form": "FORM", "judge": "", "answers": {"t1": {}}}', '{"form": ["FORM"], "judge": "", "answers": {}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("which", ["answers", "key"])
def test_files_that_no_form_has_saved_are_one_line(config, tmp_path, content, which):
    run_form(config)
    key = config.out / "key.json"
    content = content.replace("FORM", json.loads(key.read_text())["form"])
    (tmp_path / "bad.json").write_text(content.replace('"answers": ', '"models": ') if which == "key" else content)
    (tmp_path / "answers.json").write_text('{"form": "x", "judge": "", "answers": {"t1": "human"}}')
    paths = (tmp_path / "bad.json", key) if which == "answers" else (tmp_path / "answers.json", tmp_path / "bad.json")
    with pytest.raises(UserError, match="not one that the form was saved with|of another form"):
        run_report(JudgeReportConfig(answers=paths[:1], key=paths[1]))


def test_a_models_name_cannot_write_to_the_terminal(tmp_path, capsys):
    (tmp_path / "key.json").write_text(json.dumps({"form": "f", "models": {"t1": "\x1b[2Jmodel"}}))
    (tmp_path / "a.json").write_text(json.dumps({"form": "f", "judge": "", "answers": {"t1": "human"}}))
    out = tmp_path / "report.json"
    run_report(JudgeReportConfig(answers=(tmp_path / "a.json",), key=tmp_path / "key.json", out=out))
    assert "\x1b" not in capsys.readouterr().out and json.loads(out.read_text())["models"][0]["model"] == "\x1b[2Jmodel"


def test_of_files_by_one_judge_the_one_saved_last_holds(config, tmp_path):
    run_form(config)
    key = json.loads((config.out / "key.json").read_text())
    first, second = tmp_path / "answers-Ann.json", tmp_path / "answers-Ann (1).json"  # as a browser names them
    for time, (path, choice) in enumerate(((first, "machine"), (second, "human")), 1):
        answers = dict.fromkeys(key["models"], choice)
        path.write_text(json.dumps({"form": key["form"], "judge": "Ann", "answers": answers}))
        os.utime(path, (time, time))
    assert second.name < first.name
    for answers in ((tmp_path,), (second, first)):
        run_report(JudgeReportConfig(answers=answers, key=config.out / "key.json", out=config.out / "report.json"))
        report = json.loads((config.out / "report.json").read_text())
        assert report["answers_by_judge"] == {"Ann": 18} and {v["share"] for v in report["models"]} == {1}


def test_bad_settings(config):
    for change, message in (
        ({"machine": ("klein.jsonl",)}, "use NAME=PATH"),
        ({"machine": ()}, "no machine is given"),
        ({"machine": config.machine[:1] * 2}, "given twice"),
        ({"machine": (config.machine[0].replace("klein-model=", "human="),)}, "is 'human'"),
        ({"words": 5000}, "has 0 different texts of 5000 words"),
        ({"per_model": 0}, "per_model is 0"),
    ):
        with pytest.raises(UserError, match=message):
            run_form(replace(config, **change))


def test_in_a_browser(config, tmp_path):
    """Answer two texts, reload, go back and change one, save, and read the saved file by the report."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    run_form(config)
    key = json.loads((config.out / "key.json").read_text())
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(accept_downloads=True)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((config.out / "form.html").as_uri())
        assert page.locator("#save").is_disabled()
        assert page.locator("#human").is_disabled() and page.locator("#machine").is_disabled()  # the name first
        first = page.locator("#text").inner_text()
        assert first.startswith("</script><b>")  # shown as it is
        for pause in (500, 2000, 8000):  # Chromium writes to the disk when it likes
            page.fill("#judge", "Ann B.")
            page.click("#human")
            assert page.locator("#text").inner_text() != first
            page.click("#machine")
            page.wait_for_timeout(pause)
            page.reload()
            if page.input_value("#judge"):
                break
        assert page.input_value("#judge") == "Ann B." and page.inner_text("#count").startswith("3 / 18 (2)")
        page.click("#back")
        assert page.get_attribute("#machine", "aria-pressed") == "true"
        page.click("#human")
        with page.expect_download() as download:
            page.click("#save")
        saved = tmp_path / download.value.suggested_filename
        download.value.save_as(saved)
        browser.close()
    assert not errors and saved.name == "answers-Ann-B-.json"
    assert json.loads(saved.read_text()) == {
        "form": key["form"],
        "judge": "Ann B.",
        "answers": {"t1": "human", "t2": "human"},
    }
    run_report(JudgeReportConfig(answers=(saved,), key=config.out / "key.json", out=tmp_path / "report.json"))
    judged = {v["model"]: v["judged"] for v in json.loads((tmp_path / "report.json").read_text())["models"]}
    assert sum(judged.values()) == 2
