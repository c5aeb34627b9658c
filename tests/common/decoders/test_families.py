"""Decoders of every family, tiny and random: loss, captions, tables, LoRA and resume as the library's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from clipcap import cache
from clipcap.decoding import decode
from clipcap.packing import can_use_int8, decoding_parts
from common.checks import UserError
from common.decoders import base_model, blocks, positions, width
from common.decoders.families import (
    UNLIMITED,
    blocks_name,
    cache_name,
    is_norm,
    numbers_cached,
    position_embeddings,
)
from common.decoders.heads import OutputHead, library_logits, output_head, require_known_head
from common.gpt2 import is_tied, load_gpt2, replace_token_table, token_table, token_tables
from common.language import IGNORE, head_cross_entropy, score
from common.optimizers import MuonAndAdam
from experiments.backbones import decoders_table as table
from recycle_gpt2.evaluate import with_end
from recycle_gpt2.lexical import replace_lexical, tables_to_align, train_only
from recycle_gpt2.training import StageConfig, build_optimizer, flops_per_token

EVERY = tuple(table.FAMILIES)
SOME = ("llama", "opt", "gemma2", "phi")
UNTIED = ("llama", "qwen3", "mistral", "gpt_neox", "phi")


@pytest.fixture(scope="module")
def tokenizer():
    return table.small_tokenizer()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """Directory of a family's tiny decoder; read it, do not write to it."""
    place, made = tmp_path_factory.mktemp("decoders"), {}

    def directory(family: str):
        if family not in made:
            made[family] = table.save_tiny(family, place / family.replace(", ", "-"), tokenizer)
        return made[family]

    return directory


def test_the_cache_is_given_by_the_name_that_the_library_has_for_it():
    assert cache_name(lambda inputs_embeds, past_key_values=None: 0) == "past_key_values"  # before 5.24
    assert cache_name(lambda inputs_embeds, cache=None, use_cache=None: 0) == "cache"
    assert cache_name(lambda inputs_embeds, state=None: 0) is None


@pytest.mark.parametrize("family", EVERY)
def test_sizes_and_parts_are_found(saved, family):
    model, tokenizer = load_gpt2(saved(family))
    config = model.config
    wide = 16 if family == "opt" else 32
    assert width(config) == wide == token_table(model).shape[1]
    assert positions(config) == (UNLIMITED if family == "bloom" else 64)
    assert len(blocks(model)) == 2 and dict(model.named_modules())[blocks_name(model)] is blocks(model)
    assert sum(map(is_norm, model.modules())) >= 3
    assert len(position_embeddings(model)) == (family in ("gpt2", "opt"))
    assert is_tied(model) == config.tie_word_embeddings == (family not in UNTIED)
    assert len(token_tables(model)) == (2 if family in UNTIED else 1)
    ids = torch.tensor([tokenizer("a red cube", add_special_tokens=False).input_ids])
    with torch.no_grad():
        states = base_model(model)(input_ids=ids, use_cache=True)
        kept = sum(layer.keys.numel() + layer.values.numel() for layer in states.past_key_values.layers)
        assert kept == ids.shape[1] * numbers_cached(config)
        torch.testing.assert_close(output_head(model).logits(states.last_hidden_state), model(ids).logits)


@pytest.mark.parametrize("family", EVERY)
def test_loss_and_gradients_are_the_library_s(saved, family):
    assert table.loss_difference(saved(family)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_are_those_of_generate(saved, family, num_beams):
    same, images = table.captions_equal(table.captioner(saved(family)), num_beams)
    assert same == images


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "opt"])
def test_a_shared_cache_finds_what_a_row_for_every_beam_finds(saved, family, monkeypatch):
    """All beams in order, of images that end at different steps."""
    model = table.captioner(saved(family))
    endless = decode(model, table.embeddings(), strategy="greedy", max_new_tokens=12, stop_token_ids=[])
    stops = [found[0].token_ids[2 * image] for image, found in enumerate(endless)]
    options = {"num_beams": 4, "num_captions": 4, "max_new_tokens": 12, "stop_token_ids": stops}
    shared = decode(model, table.embeddings(), **options)
    monkeypatch.setattr(cache, "TREE_ATTENTION", frozenset())
    own = decode(model, table.embeddings(), **options)
    assert [[c.token_ids for c in found] for found in shared] == [[c.token_ids for c in found] for found in own]
    assert len({len(found[0].token_ids) for found in own}) > 1
    for ours, theirs in zip(shared, own, strict=True):
        assert [c.score for c in ours] == pytest.approx([c.score for c in theirs], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY)
def test_new_tables_survive_saving(saved, family, tmp_path):
    assert table.table_survives(saved(family), tmp_path / "replaced")


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY)
def test_a_captioner_is_saved_and_loaded_exactly(saved, family, tmp_path):
    assert table.captioner_reloads(saved(family), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", SOME)
def test_lora_is_merged_into_a_plain_decoder(saved, family, tmp_path):
    assert table.lora_merges(saved(family), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", SOME)
def test_two_steps_help_and_resume_is_exact(saved, family, tmp_path):
    losses, exact = table.resumes_exactly(saved(family), tmp_path)
    assert losses[1] < losses[0] and exact


@pytest.mark.parametrize("family", EVERY)
def test_packed_parts_compute_the_same(saved, family):
    model, _ = load_gpt2(saved(family), frozen=True)
    transformer, head = decoding_parts(model)
    prefix = torch.randn(3, 5, width(model.config), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(inputs_embeds=prefix).logits
        found = torch.cat(list(head.chunks(transformer(inputs_embeds=prefix).last_hidden_state)), -1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not can_use_int8(), reason="this processor has no exact 8-bit products")
def test_int8_is_close_in_llama(saved):
    model, _ = load_gpt2(saved("llama"), frozen=True)
    prefix = 0.3 * torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = base_model(model)(inputs_embeds=prefix).last_hidden_state
        found = decoding_parts(model, int8=True)[0](inputs_embeds=prefix).last_hidden_state
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize(("scale", "softcap", "with_bias"), [(1, None, True), (0.3, None, False), (2.5, 4.0, True)])
def test_the_chunked_loss_knows_bias_scale_and_softcap(chunk, scale, softcap, with_bias):
    generator = torch.Generator().manual_seed(0)
    hidden, rows, bias = (torch.randn(*shape, generator=generator) for shape in ((9, 6), (23, 6), (23,)))
    labels = torch.tensor([3, 0, IGNORE, 22, 7, 7, 1, IGNORE, 5])
    leaves = [t.mul(3).requires_grad_() for t in ((hidden, rows, bias) if with_bias else (hidden, rows))]
    head = OutputHead(leaves[1], leaves[2] if with_bias else None, scale, softcap)
    plain = F.cross_entropy(head.logits(leaves[0]), labels, ignore_index=IGNORE)
    ours = head_cross_entropy(leaves[0], head, labels, chunk=chunk)
    torch.testing.assert_close(ours, plain)
    expected, found = torch.autograd.grad(plain, leaves), torch.autograd.grad(ours, leaves)
    for theirs, mine in zip(expected, found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_logits_far_above_the_softcap_are_nearly_the_softcap():
    head = OutputHead(torch.eye(3), softcap=5.0)
    torch.testing.assert_close(head.logits(torch.tensor([1e4, -1e4, 0.0])), torch.tensor([5.0, -5.0, 0.0]))


def test_a_head_that_is_not_known_is_refused_by_name(saved, monkeypatch):
    model, _ = load_gpt2(saved("gemma2"))
    hidden = torch.randn(1, 4, 32)
    torch.testing.assert_close(output_head(model).logits(hidden), library_logits(model, hidden))
    require_known_head(model, "gemma")
    monkeypatch.setattr(
        "common.decoders.heads.output_head", lambda model: OutputHead(model.get_output_embeddings().weight)
    )
    with pytest.raises(UserError, match="'gemma' is a 'gemma2' model, whose output head"):
        require_known_head(model, "gemma")
    assert base_model(model) is model.model  # the stand-in has gone


def test_scaled_embeddings_stay_scaled(saved):
    model, _ = load_gpt2(saved("gemma3_text"))
    rows = torch.randn(20, 32)
    replace_token_table(model, rows)
    torch.testing.assert_close(model.get_input_embeddings()(torch.tensor([4])), rows[4:5] * 32**0.5)


@pytest.mark.parametrize(("family", "given"), [("llama", 1), ("opt", 2)])
def test_one_table_for_two_or_two_for_one(saved, family, given):
    model, _ = load_gpt2(saved(family))
    with pytest.raises(UserError, match="two tables" if given == 1 else "one table"):
        replace_token_table(model, *[torch.zeros(9, width(model.config))] * given)


@pytest.mark.parametrize("family", EVERY)
def test_only_the_tables_train(saved, family):
    model, _ = load_gpt2(saved(family))
    names = train_only(model)
    tables = {id(model.get_input_embeddings().weight), *map(id, model.get_output_embeddings().parameters())}
    assert {id(p) for p in model.parameters() if p.requires_grad} == tables
    assert len(names) == {"phi": 3}.get(family, 2 if family in UNTIED else 1)
    with_norms = train_only(model, norms=True, layers=[1])
    assert all(name in with_norms for name in names) and len(with_norms) > len(names) + 2


def test_positions_train_where_there_are_some(saved):
    model, _ = load_gpt2(saved("opt"))
    assert any("embed_positions" in name for name in train_only(model, positions=True))
    model, _ = load_gpt2(saved("llama"))
    with pytest.raises(UserError, match="'llama' models learn none"):
        train_only(model, positions=True)


@pytest.mark.parametrize("family", EVERY)
def test_muon_trains_the_matrices_of_the_blocks(saved, family):
    model, _ = load_gpt2(saved(family))
    optimizer = build_optimizer(model, StageConfig(optimizer="muon"))
    assert isinstance(optimizer, MuonAndAdam)
    by_muon = {id(p) for group in optimizer.parts[0].param_groups for p in group["params"]}
    assert by_muon == {id(p) for p in blocks(model).parameters() if p.ndim == 2}


def test_flops_of_an_untied_model_count_both_ends(saved):
    """6 for every weight of a matrix of the blocks and of the head, and the attention's."""
    model, _ = load_gpt2(saved("llama"))
    matrices = sum(p.numel() for p in blocks(model).parameters() if p.ndim == 2)
    head = model.lm_head.weight.numel()
    assert flops_per_token(model, 10) == 6 * (matrices + head) + 2 * 3 * 4 * 10 * 32
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)  # nothing below it is trained
    assert flops_per_token(model, 10) == 2 * matrices + 2 * 4 * 10 * 32 + 4 * head


def test_rows_of_no_token_take_no_part_in_alignment(saved):
    model, tokenizer = load_gpt2(saved("qwen2"))
    large, _ = load_gpt2(saved("llama"))
    tokens = len(tokenizer)
    assert len(token_table(model)) == tokens + table.PAD
    several = tables_to_align(model, large, model, tokens)
    assert [len(small) for small, _, _ in several] == [tokens, tokens]  # input and output of the large model
    assert [len(rows) for _, rows, _ in several] == [tokens, tokens]
    assert torch.equal(several[1][1], large.lm_head.weight[:tokens])


def test_new_lexical_tables_of_an_untied_model(saved, tokenizer, tmp_path):
    model, _ = load_gpt2(saved("llama"))
    new = [torch.randn(len(tokenizer), 32) for _ in range(2)]
    replace_lexical(model, tokenizer, *new)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_gpt2(tmp_path)
    assert all(map(torch.equal, token_tables(again), new)) and not again.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
def test_scores_are_those_of_the_library(saved, family):
    model, tokenizer = load_gpt2(saved(family), frozen=True)
    ids = with_end(tokenizer, "two blue balls lie behind the cube")
    found = score(model, ids, block=64, stride=32)
    with torch.no_grad():
        expected = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert found.nats / found.tokens == pytest.approx(expected, abs=1e-4)


def test_texts_begin_with_the_token_that_the_tokenizer_puts_before_them(tokenizer, tmp_path):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    assert with_end(tokenizer, "a cube")[0] == tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path)
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path, bos_token="!", eos_token="<|endoftext|>")
    begin = other.convert_tokens_to_ids("!")
    assert with_end(other, "a cube")[0] == other.eos_token_id  # it has one, but puts it nowhere
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(single="! $A", special_tokens=[("!", begin)])
    assert with_end(other, "a cube") == [begin, *tokenizer("a cube").input_ids]
