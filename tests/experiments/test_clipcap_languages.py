"""Captioners in Dutch and Italian: the packaged scenes' graphs, which runs come first, and two tiny runs to the page."""

import json
from collections import Counter

import pytest

from common.checks import UserError
from common.pretrained import ASSETS
from common.runtime import RuntimeConfig
from experiments.captions import languages as clipcap_languages
from experiments.captions.languages import Config, find_models, main, plan, summarise, take_share
from experiments.scenes.captions import names_all
from experiments.scenes.karpathy import SAMPLES, captioned_in, packaged_records
from experiments.scenes.wording import WORDINGS

GPT2 = str(ASSETS / "gpt2-tiny")
CPU = RuntimeConfig(device="cpu", precision="bf16", threads=1)


def test_packaged_scenes_have_their_graphs_back_and_captions_in_each_language():
    rows = {row["filename"]: row for row in json.loads((SAMPLES / "dataset.json").read_text())["images"]}
    records = {name: record for split in ("train", "val", "test") for name, record in packaged_records(split).items()}
    assert set(records) == set(rows)
    for name, record in records.items():
        assert list(record.captions) == [sentence["raw"] for sentence in rows[name]["sentences"]]
    for language in ("nld", "ita"):
        translated = captioned_in(language, records)
        assert translated == captioned_in(language, records)
        for record in translated.values():
            assert len(set(record.captions)) == 5
            assert all(names_all(text, record.scene, wording=WORDINGS[language]) for text in record.captions)
    assert captioned_in("eng", records) == records


def test_runs_that_say_most_come_first(tmp_path):
    jobs = plan(Config(), {"recycled": "r", "English": "e"})
    assert len(jobs) == 2 * 2 * 3 * 3 and len({job.name for job in jobs}) == len(jobs)
    assert [(j.model, j.mode, j.share, j.seed) for j in jobs[:3]] == [
        ("recycled", "fine-tuned", 1.0, 0), ("English", "fine-tuned", 1.0, 0), ("recycled", "fine-tuned", 0.1, 0),
    ]  # fmt: skip
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)


def test_models_are_found_where_they_were_recycled(tmp_path):
    for name, tokens in (("all-from-English-seed0", 10), ("all-from-English-900", 90), ("all-from-English-9000", 9000)):
        (tmp_path / "runs" / name / "model").mkdir(parents=True)
        (tmp_path / "runs" / name / "result.json").write_text(json.dumps({"tokens": tokens}))
    (tmp_path / "runs" / "all-from-English-9000" / "model").rmdir()  # was not kept
    found = find_models(Config(recycled=tmp_path))
    assert list(found) == ["recycled", "English", "English medium"]
    assert found["recycled"] == str(tmp_path / "runs" / "all-from-English-900" / "model")
    assert find_models(Config(recycled=tmp_path, gpt2=(f"mine={GPT2}",), models=("mine",))) == {"mine": GPT2}
    for options, said in (
        ({"models": ("aligned medium",)}, "experiments.languages.recycle --language nld"),
        ({"gpt2": ("tiny",)}, "name=directory"),
        ({"gpt2": ("x=gone",)}, "'gone' has no config.json"),
    ):
        with pytest.raises(UserError, match=said):
            find_models(Config(recycled=tmp_path, **options))


def test_shares_are_nested_and_differ_by_seed():
    records = packaged_records("train")
    whole, some, few = (set(take_share(records, share, 1)) for share in (1.0, 0.5, 0.01))
    assert few < some < whole == set(records) and len(few) == 1 and len(some) == 16
    assert some != set(take_share(records, 0.5, 2))


def test_summary_of_seeds():
    assert [summarise([], 2), summarise([0.5], 2), summarise([1.0, 2.0, 3.0], 2)] == ["–", "0.50", "2.00 ± 1.00"]


@pytest.mark.slow
def test_two_languages_to_the_page(tmp_path, monkeypatch, capsys):
    options = dict(
        recycled=tmp_path, gpt2=(f"recycled={GPT2}",), models=("recycled",), seeds=(0,), scenes=tmp_path / "none",
        images=4, val_images=2, test_images=4, steps=2, batch_size=4, out=tmp_path / "out", docs=tmp_path / "docs",
        runtime=CPU,
    )  # fmt: skip
    with pytest.raises(UserError, match="no finished run"):
        main(Config(**options, report=True))
    dutch = Config(**options, modes=("fine-tuned",), shares=(1.0,))
    main(dutch)
    main(Config(**options, language="ita", modes=("frozen",), shares=(0.5,)))
    page = (tmp_path / "docs" / "clipcap_languages.md").read_text()
    for text in (
        "## Dutch",
        "## Italian",
        "GPT-2 fine-tuned; captions: 100% is 20.",
        "GPT-2 frozen; captions: 50% is 10.",
    ):
        assert text in page
    assert "at most 2 steps of 4 captions: 0.4 passes over 100%;" in page and "0.8 passes over 50%;" in page
    assert all((tmp_path / "docs" / f"clipcap_languages_{name}.png").stat().st_size > 5000 for name in ("nld", "ita"))
    directory = tmp_path / "out" / "nld" / "recycled-fine-tuned-1-seed0"
    result = json.loads((directory / "result.json").read_text())
    assert f"| recycled | 1.9 M | {result['fully_right']:.3f} | {result['scores']['cider']:.2f} | 1 |" in page
    captions = json.loads((directory / "captions.json").read_text())
    records = captioned_in("nld", packaged_records("test"))
    right = Counter(names_all(text, records[name].scene, wording=WORDINGS["nld"]) for name, text in captions.items())
    assert result["fully_right"] == right[True] / 4 and (directory / "model" / "config.json").is_file()
    assert not list(directory.glob("*.ckpt"))

    monkeypatch.setattr(clipcap_languages, "train", lambda config: pytest.fail("trained again"))
    main(dutch)
    with pytest.raises(UserError, match="was begun with steps 2, now it is 3"):
        main(Config(**options | {"steps": 3}, modes=("fine-tuned",), shares=(1.0,)))
    for change, said in (
        ({"modes": ("x",)}, "mode is 'x'"),
        ({"shares": (2.0,)}, "share is 2"),
        ({"steps": 0}, "steps"),
    ):
        with pytest.raises(UserError, match=said):
            main(Config(**options | change))
