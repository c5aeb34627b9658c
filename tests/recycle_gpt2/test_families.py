"""Recycling a decoder of another family: an untied Llama, whose output has a table of its own, and padded tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.checks import UserError
from common.gpt2 import load_gpt2, token_tables
from common.runtime import RuntimeConfig
from recycle_gpt2.alignment import AlignmentConfig
from recycle_gpt2.blocks import TokenBlocks
from recycle_gpt2.lexical import RowsConfig
from recycle_gpt2.run import RunConfig, recycle
from recycle_gpt2.stages import AlignConfig, align_models
from recycle_gpt2.training import StageConfig

PAD = 5


def save_llama(directory: Path, tokenizer, *, layers: int, width: int, padding: float | None = None) -> Path:
    """An untied Llama with random weights; `padding` scales random rows that are no token's."""
    torch.manual_seed(layers)
    rows = len(tokenizer) + (0 if padding is None else PAD)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, max_position_embeddings=32, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if padding is not None:
        with torch.no_grad():
            for table in (model.model.embed_tokens.weight, model.lm_head.weight):
                table[-PAD:] = padding * torch.randn(PAD, width)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory, english_tokenizer, dutch) -> tuple[RunConfig, Path]:
    """A finished run from a small and a large Llama, and the folder of everything."""
    place = tmp_path_factory.mktemp("llamas")
    (place / "text.txt").write_text("\n\n".join(dutch[:120]), encoding="utf-8")
    small = save_llama(place / "small", english_tokenizer, layers=2, width=16, padding=1.0)
    large = save_llama(place / "large", english_tokenizer, layers=3, width=24)
    config = RunConfig(
        text=(place / "text.txt",),
        out=place / "dutch",
        language="nld",
        small=str(small),
        large=str(large),
        vocab_size=320,
        block=32,
        shares=(0.8, 0.1, 0.1),
        rows=RowsConfig(initialisation="copy"),
        stage=StageConfig(tokens=4 * 8 * 32, batch_size=8, lr=3e-3, optimizer="muon"),
        runtime=RuntimeConfig(device="cpu", seed=3),
    )
    recycle(config)
    return config, place


def part(config: RunConfig, stage: str) -> Path:
    """A stage's model."""
    found = sorted(config.out.parent.glob(f"**/{stage}/model/config.json"))
    assert len(found) == 1, found
    return found[0].parent


@pytest.mark.slow
def test_the_result_is_a_llama_with_two_dutch_tables(run):
    config, _ = run
    model, tokenizer = load_gpt2(config.out)
    assert isinstance(model, LlamaForCausalLM) and not model.config.tie_word_embeddings
    assert [tuple(table.shape) for table in token_tables(model)] == [(320, 24)] * 2 and len(tokenizer) == 320
    assert not torch.equal(*token_tables(model))


def test_relearning_trains_both_tables_and_nothing_else(run):
    config, _ = run
    before, _ = load_gpt2(config.small)
    after, _ = load_gpt2(part(config, "relearn"))
    english = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert parameter.shape == (320, 16)
        else:
            assert torch.equal(parameter, english[name]), name


def test_both_tables_are_aligned(run):
    """By least squares, a table that was aligned lies in the span of the small one's rows."""
    config, _ = run
    small, _ = load_gpt2(part(config, "relearn"))
    large, _ = load_gpt2(part(config, "align"))
    for ours, theirs in zip(token_tables(small), token_tables(large), strict=True):
        rows = torch.cat([ours, torch.ones(len(ours), 1)], 1)  # they may have been centred
        fitted = rows @ torch.linalg.lstsq(rows, theirs).solution
        torch.testing.assert_close(fitted, theirs, rtol=1e-3, atol=1e-3)


def test_rows_of_no_token_do_not_move_the_alignment(run, english_tokenizer, tmp_path):
    """Whatever stands in the padding of both English tables."""
    config, _ = run
    found = []
    for padding in (0.0, 50.0):
        place = tmp_path / str(padding)
        small = save_llama(place / "small", english_tokenizer, layers=2, width=16, padding=padding)
        large = save_llama(place / "large", english_tokenizer, layers=3, width=24, padding=padding)
        aligned = align_models(
            AlignConfig(
                part(config, "relearn"),
                place / "out",
                small=str(small),
                large=str(large),
                alignment=AlignmentConfig(choose=False),
            )
        )
        found.append(token_tables(load_gpt2(aligned)[0]))
    assert all(map(torch.equal, *found))


def test_positions_that_are_not_learned_are_refused_first(run, tmp_path):
    config, _ = run
    with pytest.raises(UserError, match="'llama' models learn none"):
        recycle(replace(config, out=tmp_path / "other", rows=RowsConfig(positions=True)))
    assert not list(tmp_path.rglob("tokenizer.json"))


def test_its_corpus_has_no_token_beyond_the_tables(run):
    config, _ = run
    (corpus,) = {path.parent for path in config.out.parent.glob("**/corpus/manifest.json")}
    assert TokenBlocks(corpus, "train").vocab_size == 320
