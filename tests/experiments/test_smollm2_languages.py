"""The experiment on a pre-trained model, with a random Llama in its place: every arm, its resume and its page."""

from __future__ import annotations

import json
import lzma
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.gpt2 import load_gpt2, token_table
from common.runtime import RuntimeConfig
from experiments.languages import smollm2
from recycle_gpt2.tokenizer import train_tokenizer

WORDS = {
    "nld": "de kat en het huis zijn op een mat van hout die nacht was koud water lopen huizen katten groter".split(),
    "eng": "the cat and that house is on a mat of wood for you this with it can your will not".split(),
}


def documents(language: str, count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["\n".join(" ".join(rng.choice(WORDS[language], 30)) + "." for _ in range(4)) for _ in range(count)]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> smollm2.Config:
    """Texts, and a Llama of two layers with an English tokenizer."""
    folder = tmp_path_factory.mktemp("smollm2")
    admin = [text + "\nDebian wordt met apt-get van Debian geplaatst." for text in documents("nld", 4, 1)]
    for name, texts in {
        "nld.train": documents("nld", 150, 3) + admin,
        "nld.valid": documents("nld", 6, 4),
        "eng.valid": documents("eng", 6, 5),
    }.items():
        with lzma.open(folder / f"{name}.txt.xz", "wt", encoding="utf-8") as file:
            file.write("\n\n".join(texts))
    tokenizer = train_tokenizer(documents("eng", 100, 6), 300)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=32, max_position_embeddings=64, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
            tie_word_embeddings=True,
        )
    ).save_pretrained(folder / "model")  # fmt: skip
    tokenizer.save_pretrained(folder / "model")
    return smollm2.Config(
        model=folder / "model", text=folder, languages=("nld",), out=folder / "out", docs=folder / "docs", tokens=512,
        tune_tokens=128, rate=1e-3, vocab_size=320, block=32, valid_blocks=4, held_out_bytes=1000,
        runtime=RuntimeConfig(device="cpu", threads=1),
    )  # fmt: skip


def test_controls_have_the_scale_of_the_model_and_its_logits(config):
    setting = smollm2.prepare_language(config, "nld")
    models = {
        arm: smollm2.begin(arm, setting, 0)[0]
        for arm in (smollm2.FROZEN, smollm2.RANDOM, smollm2.FRESH, smollm2.SHUFFLED)
    }
    blocks = torch.stack([setting.language.train[index] for index in range(2)])
    wanted = smollm2.logit_scale(models[smollm2.FROZEN], blocks)
    weight = models[smollm2.FROZEN].model.layers[1].mlp.up_proj.weight
    for arm in (smollm2.FRESH, smollm2.SHUFFLED):
        assert smollm2.logit_scale(models[arm], blocks) == pytest.approx(wanted, rel=1e-4)
        other = models[arm].model.layers[1].mlp.up_proj.weight
        assert not torch.equal(other, weight)
        assert other.std().item() == pytest.approx(weight.std().item(), rel=0.1)
        assert torch.equal(token_table(models[arm]), token_table(models[smollm2.FROZEN]))
        assert [name for name, p in models[arm].named_parameters() if p.requires_grad] == ["model.embed_tokens.weight"]
    assert torch.equal(models[smollm2.RANDOM].model.layers[1].mlp.up_proj.weight, weight)
    assert not torch.equal(token_table(models[smollm2.RANDOM]), token_table(models[smollm2.FROZEN]))


@pytest.mark.parametrize("best", [1e-3, 8e-3, 2.5e-4])
def test_the_rate_is_searched_beyond_the_first(best):
    tried = []

    def loss(rate):
        tried.append(rate)
        return math.nan if rate > 2e-2 else abs(math.log(rate / best))

    assert smollm2.climb(1e-3, loss) == pytest.approx(best)
    assert len(tried) == len(set(tried)) <= 6


@pytest.mark.slow
def test_every_arm_is_run_once_and_stands_on_the_page(config, monkeypatch):
    smollm2.main(config)
    monkeypatch.setattr(smollm2, "train_stage", None)  # nothing is trained again
    smollm2.main(config)
    page = (config.docs / "smollm2.md").read_text()
    found = json.loads((config.docs / "smollm2.json").read_text())["nld"]
    assert (config.docs / "smollm2_nld.png").is_file()
    for arm in smollm2.ARMS:
        assert page.count(f"| {arm} |") == (2 if arm in smollm2.PAIR else 1), arm
    runs = {(run["arm"], run["seed"]): run for run in found.values() if "arm" in run}
    frozen, random = runs[smollm2.FROZEN, 0], runs[smollm2.RANDOM, 0]
    assert frozen["tokens"] == random["tokens"] >= 512 and frozen["trained_parameters"] == 320 * 16
    own = runs[smollm2.CONTINUED, 0]
    share = [run["tokens"] / run["train_tokens_available"] for run in (own, frozen)]
    assert share[0] == pytest.approx(share[1], rel=0.1)  # the same text
    untouched = runs[smollm2.UNTOUCHED, 0]
    model, tokenizer = load_gpt2(config.model, frozen=True)
    setting = smollm2.prepare_language(config, "nld")
    for split, documents_of in setting.documents.items():
        scores = smollm2.score_documents(model, tokenizer, documents_of, block=32, stride=16)
        assert untouched["held_out"][split]["nats"] == pytest.approx(sum(score.nats for score in scores))
    gained = frozen["held_out"]["test"]["bits_per_byte"] - untouched["held_out"]["test"]["bits_per_byte"]
    assert frozen["minus_untouched"]["test"]["bits_per_byte"] == pytest.approx(gained)
    assert set(frozen["minus_ngrams"]) == {"test", "second"}
