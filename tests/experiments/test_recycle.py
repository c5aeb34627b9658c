"""The recycling experiments, the demo's section and the captioner on a recycled model, all with tiny settings."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.gpt2 import load_gpt2, token_table
from common.pretrained import ASSETS
from common.report import Page
from common.runtime import RuntimeConfig
from experiments.demo.recycling import recycling_section
from experiments.languages import recycle, report
from experiments.languages.text import held_out, is_english, second_genre, write_texts

WORDS = "de kat en het huis zijn op een mat van hout die nacht was koud water lopen huizen katten groter".split()


def documents(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["\n".join(" ".join(rng.choice(WORDS, 30)) + "." for _ in range(4)) for _ in range(count)]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    admin = [text + "\nDebian wordt met apt-get van Debian geplaatst." for text in documents(5, 1)]
    english = ["The cat is on the mat and that is all that you can do with it.\n" + text for text in documents(3, 2)]
    train = documents(150, 3) + admin + english
    for split, texts in (("train", train), ("valid", documents(8, 4) + train[:2])):
        with lzma.open(folder / f"nld.{split}.txt.xz", "wt", encoding="utf-8") as file:
            file.write("\n\n".join(texts))
    return folder


def test_texts_are_split_by_genre_and_none_is_in_two(source, tmp_path):
    paths = write_texts(source, "nld", tmp_path)
    parts = {split: set(path.read_text().strip().split("\n\n")) for split, path in paths.items()}
    assert not parts["train"] & (parts["test"] | parts["second"])
    assert len(parts["second"]) == 5 and all("Debian" in text for text in parts["second"])
    assert not any(second_genre(text) for text in parts["train"] | parts["test"])
    assert not any("The cat is on" in text for texts in parts.values() for text in texts)
    assert len(parts["test"]) == 8
    assert {split: len(found) for split, found in held_out(tmp_path).items()} == {"test": 8, "second": 5}
    assert is_english("the file that you can open", "nld") and not is_english("het bestand dat u kunt openen", "nld")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_are_made_once_and_the_tables_of_what_is_there(source, tmp_path, monkeypatch):
    monkeypatch.setattr(recycle, "RATES", dict.fromkeys(recycle.RATES, (1e-2,)))
    config = recycle.Config(
        text=source,
        out=tmp_path / "out",
        parts=("baselines", "tune", "main", "alignment", "medium", "data_size", "budgets", "initialisations"),
        arms=("frozen English", "relearned, then unfrozen"),
        methods=("least squares", "random rows"),
        initialisations=("copy",),
        vocab_size=300,
        batch_size=4,
        tokens=512,
        tune_tokens=128,
        brief_tokens=128,
        budgets=(256,),
        budget_arms=("frozen English",),
        block=32,
        runtime=RuntimeConfig(device="cpu", threads=1),
    )
    monkeypatch.setattr(recycle, "UNFROZEN_SHARES", (0.5,))
    monkeypatch.setattr(recycle, "MAIN", ("frozen English",))
    recycle.main(config)
    runs = report.read_runs(tmp_path / "out" / "nld")
    frozen = runs["frozen-English-seed0"]
    assert frozen["stages"][0]["trained"] == ["transformer.wte.weight"]
    both = runs["relearned-then-unfrozen-seed0"]
    assert len(both["stages"]) == 2
    assert abs(both["tokens"] - frozen["tokens"]) < 0.1 * frozen["tokens"]  # matched
    assert runs["frozen-English-share0.01"]["tokens"] <= frozen["tokens"]
    assert runs["frozen-English-256"]["tokens"] < frozen["tokens"]
    aligned, random = (runs[f"{rows}-seed0"] for rows in ("aligned-medium-all", "medium-from-random-rows-all"))
    assert aligned["tokens"] == random["tokens"] == frozen["tokens"]
    assert aligned["flops"] > frozen["flops"] and aligned["stages"][0]["curve"][0] != random["stages"][0]["curve"][0]
    monkeypatch.setattr(recycle, "train_stage", None)  # nothing is trained again
    recycle.main(config)
    report.main(report.Config(out=tmp_path / "out", docs=tmp_path / "docs"))
    page = (tmp_path / "docs" / "recycling_results.md").read_text()
    for part in (
        "frozen English",
        "trigram",
        "5-gram (Kneser-Ney)",
        "Minus the Kneser-Ney 5-gram model",
        "untouched English (tiny)",
        "least squares",
        "1% of the text",
        "256 tokens",
        "| copy |",
    ):
        assert part in page, part
    assert (tmp_path / "docs" / "recycling_nld_tokens.png").is_file()


def test_shuffled_layers_hold_the_same_values_elsewhere(source, tmp_path):
    config = recycle.Config(text=source, out=tmp_path, vocab_size=300, block=32)
    language = recycle.prepare(config)
    english, shuffled, fresh = (
        recycle.begin(arm, config, language, 0)
        for arm in ("frozen English", "frozen shuffled English", "frozen fresh layers")
    )
    weights = [model.transformer.h[1].mlp.c_fc.weight.detach() for model in (english, shuffled, fresh)]
    assert not weights[0].equal(weights[1])
    assert weights[0].flatten().sort().values.equal(weights[1].flatten().sort().values)
    assert not weights[0].flatten().sort().values.allclose(weights[2].flatten().sort().values, atol=1e-3)
    assert token_table(english).equal(token_table(shuffled))


@pytest.mark.slow
def test_demo_section_on_the_packaged_sample(tmp_path):
    size = sum(path.stat().st_size for path in (ASSETS / "samples" / "dutch").iterdir())
    assert size < 2e6
    assert "Mozilla Public License" in (ASSETS / "samples" / "dutch" / "README.md").read_text()
    page = Page("test")
    result = recycling_section(page, tmp_path, device="cpu", tokens=20_000, brief_tokens=4_000, documents=160)
    bits = result["bits_per_byte"]
    assert bits["small, relearned"] < bits["small, first Dutch embeddings"]
    assert bits["small, relearned"] < bits["small English model, untouched"]
    assert result["lexicon"] and set(result["samples"]) and json.dumps(result)
    assert "English recycled for Dutch" in page.html()


@pytest.mark.slow
def test_the_captioner_takes_a_recycled_model(tmp_path, english_recycled):
    """`clipcap train --gpt2 DIRECTORY` on two pictures."""
    from clipcap.cli import main
    from clipcap.model import ClipCapModel

    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = ["file_name,caption"]
    for number, colour in enumerate(["red", "blue", "red", "blue"]):
        Image.new("RGB", (32, 32), colour).save(folder / f"{number}.png")
        lines.append(f"{number}.png,een kat op het huis")
    (folder / "captions.csv").write_text("\n".join(lines))
    arguments = [
        "train",
        "--data",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--gpt2",
        str(english_recycled),
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--mapper-layers",
        "1",
        "--mapper-heads",
        "2",
        "--prefix-length",
        "2",
        "--clip-length",
        "2",
        "--device",
        "cpu",
    ]
    assert main(arguments) == 0
    captioner = ClipCapModel.from_pretrained(tmp_path / "out" / "model")
    recycled, tokenizer = load_gpt2(english_recycled)
    assert captioner.gpt2.config.vocab_size == len(tokenizer)
    assert captioner.gpt2.transformer.wte.weight.equal(recycled.transformer.wte.weight)


@pytest.fixture(scope="module")
def english_recycled(tmp_path_factory) -> Path:
    """The tiny English GPT-2 with a Dutch vocabulary, saved as the pipeline saves it."""
    import torch

    from recycle_gpt2.lexical import initialise, replace_lexical
    from recycle_gpt2.stages import save_model
    from recycle_gpt2.tokenizer import train_tokenizer

    model, english = load_gpt2("tiny")
    tokenizer = train_tokenizer(documents(60, 0), 300)
    rows = initialise("copy", token_table(model), english, tokenizer, generator=torch.Generator().manual_seed(0))
    replace_lexical(model, tokenizer, rows)
    return save_model(model, tokenizer, tmp_path_factory.mktemp("recycled") / "gpt2-nld")
