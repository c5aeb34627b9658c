"""The whole run in six scripts: with and without spaces between words, with and without combining marks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import regex
import torch

from common.checks import UserError
from common.runtime import RuntimeConfig
from common.words import has_unspaced
from recycle_gpt2.judge import JudgeConfig, run_form
from recycle_gpt2.lexicon import build_lexicon, word_tokens
from recycle_gpt2.run import RunConfig, recycle
from recycle_gpt2.tokenizer import TokenizerOptions, describe, load_tokenizer, save_tokenizer, train_tokenizer
from recycle_gpt2.training import StageConfig

SCRIPTS = Path(__file__).parent / "scripts"
CODES = {"chinese": "zho", "japanese": "jpn", "thai": "tha", "hindi": "hin", "arabic": "ara", "russian": "rus"}
UNSPACED = ("chinese", "japanese", "thai")
MARKS = ("thai", "hindi")


def sentences(script: str) -> list[str]:
    return (SCRIPTS / f"{script}.txt").read_text(encoding="utf-8").splitlines()


def documents(script: str, number: int = 60) -> list[str]:
    """Documents of four sentences each, in a random order; each paragraph is new."""
    rng = random.Random(script)
    space = "" if script in ("chinese", "japanese") else " "
    return ["\n".join(space.join(rng.sample(sentences(script), 2)) for _ in range(2)) for _ in range(number)]


@pytest.mark.slow
@pytest.mark.parametrize("script", CODES)
def test_the_whole_run(script, tmp_path, english_models, capsys):
    (tmp_path / "text.txt").write_text("\n\n".join(documents(script)), encoding="utf-8")
    config = RunConfig(
        text=(tmp_path / "text.txt",),
        out=tmp_path / "out",
        language=CODES[script],
        small=str(english_models[0]),
        vocab_size=400,
        block=32,
        shares=(0.8, 0.1, 0.1),
        unfreeze="none",
        stage=StageConfig(tokens=512, batch_size=8, lr=3e-3),
        runtime=RuntimeConfig(device="cpu"),
    )
    out = recycle(config)
    card = (out / "README.md").read_text(encoding="utf-8")
    split = "keep their combining marks" if script in MARKS else "GPT-2's split into words"
    assert f"language: {CODES[script]}" in card and split in card
    assert "| 5-gram (Kneser-Ney) | all |" in card and "- minus 5-gram (Kneser-Ney): +" in card  # it was hardly trained
    assert (out / "model.safetensors").is_file()
    lexicon = json.loads((tmp_path / "out.stages" / "lexicon" / "done.json").read_text())
    words = [line.split("\t")[0] for line in Path(lexicon["lexicon"]).read_text(encoding="utf-8").splitlines()]
    assert words and (script not in UNSPACED or any(map(has_unspaced, words)))
    tokenizer = load_tokenizer(out)
    assert all(tokenizer.decode(tokenizer(text).input_ids) == text for text in sentences(script))


def test_a_lexicon_that_cannot_be_made_leaves_the_model_whole(tmp_path, english_models, capsys):
    # 258 tokens of Chinese: hardly a character is whole, and no word of the dictionary is there.
    (tmp_path / "text.txt").write_text("\n\n".join(documents("chinese")), encoding="utf-8")
    (tmp_path / "dictionary.tsv").write_text("huis\thouse\n")
    config = RunConfig(
        text=(tmp_path / "text.txt",), out=tmp_path / "out", language="zho", small=str(english_models[0]),
        vocab_size=258, block=32, shares=(0.8, 0.1, 0.1), unfreeze="none", dictionary=tmp_path / "dictionary.tsv",
        stage=StageConfig(tokens=256, batch_size=8), runtime=RuntimeConfig(device="cpu"),
    )  # fmt: skip
    assert (recycle(config) / "model.safetensors").is_file()
    assert "the lexicon is left out: " in capsys.readouterr().out
    done = json.loads((tmp_path / "out.stages" / "lexicon" / "done.json").read_text())
    assert done["lexicon"] is None and done["left_out"]


@pytest.mark.parametrize("script", MARKS)
def test_marks_stay_with_their_letters_and_save_tokens(script):
    texts = documents(script)
    size = [
        sum(len(tokenizer(text).input_ids) for text in texts)
        for tokenizer in (
            train_tokenizer(texts, 440, options=TokenizerOptions(split_pattern=split)) for split in ("gpt2", "auto")
        )
    ]
    assert size[1] < 0.95 * size[0]


@pytest.mark.slow
@pytest.mark.parametrize("pieces", ["bpe", "unigram"])
@pytest.mark.parametrize("split", ["gpt2", "marks", "none"])
@pytest.mark.parametrize("nfc", [False, True])
def test_every_kind_comes_back_from_the_disk_as_it_was(pieces, split, nfc, tmp_path):
    from transformers import AutoTokenizer, GPT2Config

    texts = documents("hindi") + documents("japanese")
    options = TokenizerOptions(pieces=pieces, split_pattern=split, nfc=nfc)
    tokenizer = train_tokenizer(texts, 400, options=options)
    assert len(tokenizer) == 400 and tokenizer.eos_token_id == 0
    GPT2Config(vocab_size=400, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    for found in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert [found(text).input_ids for text in texts[:9]] == [tokenizer(text).input_ids for text in texts[:9]]
        assert describe(found) == describe(tokenizer)
        for text in (*texts[:9], "  x\n\n y\t", "👩‍👩‍👧 \U0010ffff\0", "don't  cut"):
            assert found.decode(found(text).input_ids) == text
        assert found.decode(found("e\u0301").input_ids) == ("é" if nfc else "e\u0301")
    expected = {"bpe": "byte-level BPE", "unigram": "byte-level Unigram"}[pieces]
    assert describe(tokenizer).startswith(expected) and describe(tokenizer).endswith("NFC" if nfc else "normalisation")


def test_tokens_of_a_script_without_spaces_are_its_words(english_tokenizer):
    tokenizer = train_tokenizer(documents("japanese"), 400)
    words = word_tokens(tokenizer, unspaced=True)
    assert {"の", "町"} & words.keys() and len(words) > 30 and not any("�" in word for word in words)
    assert len(word_tokens(tokenizer)) == 0
    tables = torch.randn(400, 8), torch.randn(len(english_tokenizer), 8)
    assert [entry.word for entry in build_lexicon(tables[0], tokenizer, tables[1], english_tokenizer)] == list(words)
    bytes_only = train_tokenizer(["ab"], 257)
    with pytest.raises(UserError, match="no token that begins a word"):
        build_lexicon(torch.randn(257, 8), bytes_only, tables[1], english_tokenizer)


@pytest.mark.parametrize(("script", "length"), [("chinese", 20), ("thai", 20), ("hindi", 5)])
def test_judges_get_texts_of_one_length_in_characters_or_words(script, length, tmp_path):
    for name in ("human", "model"):
        texts = documents(script)[:30] if name == "human" else documents(script)[30:]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = JudgeConfig(
        (tmp_path / "human.jsonl",), (f"m={tmp_path / 'model.jsonl'}",), tmp_path / "form", per_model=5, words=length
    )
    run_form(config)
    page = (tmp_path / "form" / "form.html").read_text(encoding="utf-8")
    items = json.loads(page.split("const form = ")[1].split(";\nconst $")[0])["items"]
    for item in items:
        units = item["text"].split() if script == "hindi" else regex.findall(r"\X", item["text"].replace(" ", ""))
        assert len(units) == length
