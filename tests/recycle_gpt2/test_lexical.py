"""How rows begin, what trains and what does not, and the controls: values stay, English goes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from common.checks import UserError
from common.gpt2 import load_gpt2, token_table
from recycle_gpt2.lexical import (
    INITIALISATIONS,
    cooccurrence_embeddings,
    initialise,
    layers_from_top,
    reinitialise_layers,
    replace_lexical,
    same_tokens,
    shuffle_weights,
    sparsemax,
    train_only,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def source(english_tokenizer):
    """A source table whose dimensions differ in mean and variance."""
    generator = torch.Generator().manual_seed(1)
    return 0.1 * torch.arange(1, 9) * torch.randn(len(english_tokenizer), 8, generator=generator) + torch.arange(8)


@pytest.fixture
def model(gpt2_directory):
    return load_gpt2(gpt2_directory)[0]


# Initialisations


def test_random_matches_mean_and_variance(source, english_tokenizer, tokenizer):
    rows = [
        initialise("random", source, english_tokenizer, tokenizer, generator=torch.Generator().manual_seed(seed))
        for seed in range(40)
    ]
    assert rows[0].shape == (320, 8) and not torch.equal(rows[0], rows[1])
    together = torch.cat(rows)
    torch.testing.assert_close(together.mean(0), source.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(together.std(0), source.std(0), atol=0, rtol=0.03)


def test_mean(source, english_tokenizer, tokenizer, generator):
    rows = initialise("mean", source, english_tokenizer, tokenizer, generator=generator)
    torch.testing.assert_close(rows, source.mean(0).expand(320, 8))
    rows[0] = 0  # rows of their own
    assert rows[1].abs().sum() > 0


def test_frequency_is_rank_by_rank(source, english_tokenizer, tokenizer, generator):
    source_counts, target_counts = torch.randperm(310, generator=generator), torch.randperm(320, generator=generator)
    rows = initialise(
        "frequency",
        source,
        english_tokenizer,
        tokenizer,
        generator=generator,
        source_counts=source_counts,
        target_counts=target_counts,
    )
    for rank in (0, 1, 17, 309):
        target = int((target_counts == 319 - rank).nonzero())
        assert torch.equal(rows[target], source[int((source_counts == 309 - rank).nonzero())])
    least = int((target_counts == 0).nonzero())
    assert not (rows[least] == source).all(-1).any()  # more tokens than the source has
    by_id = initialise("frequency", source, english_tokenizer, tokenizer, generator=generator)
    assert torch.equal(by_id[:310], source)


def test_copy(source, english_tokenizer, tokenizer, generator):
    rows = initialise("copy", source, english_tokenizer, tokenizer, generator=generator)
    english, dutch = english_tokenizer.get_vocab(), tokenizer.get_vocab()
    common = set(english) & set(dutch)
    assert 256 < len(common) < 300 and "Ġwater" in common
    for token, index in dutch.items():
        same = (rows[index] == source).all(-1).nonzero().flatten().tolist()
        assert same == ([english[token]] if token in common else [])


def test_end_tokens_match_whatever_they_are_called(dutch, english_tokenizer):
    from recycle_gpt2.tokenizer import train_tokenizer

    target = train_tokenizer(dutch, 260, end_token="</s>")
    pairs = dict(zip(*(ids.tolist() for ids in same_tokens(english_tokenizer, target)), strict=True))
    assert pairs[target.eos_token_id] == english_tokenizer.eos_token_id


def test_focus_mixes_by_similarity(source, english_tokenizer, tokenizer, generator):
    copied = initialise("copy", source, english_tokenizer, tokenizer, generator=generator)
    target_ids, _ = same_tokens(english_tokenizer, tokenizer)
    others = sorted(set(range(320)) - set(target_ids.tolist()))
    auxiliary = torch.randn(320, 6, generator=generator)
    auxiliary[others[0]] = 3 * auxiliary[target_ids[40]]  # one is as another in the new language
    auxiliary[others[1]] = 0  # and one does not occur
    rows = initialise("focus", source, english_tokenizer, tokenizer, generator=generator, auxiliary=auxiliary)
    assert torch.equal(rows[target_ids], copied[target_ids])
    unit = torch.nn.functional.normalize(auxiliary, dim=-1)
    for index in (others[0], others[2], others[-1]):
        similar = unit[target_ids] @ unit[index]
        # The plain formula: the threshold at which what is above it sums to 1.
        low, high = -2.0, 1.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if (similar - middle).clamp(min=0).sum() > 1 else (low, middle)
        expected = (similar - low).clamp(min=0) @ copied[target_ids]
        torch.testing.assert_close(rows[index], expected, atol=1e-4, rtol=1e-4)
    assert not (rows[others[1]] == source).all(-1).any() and torch.isfinite(rows).all()


def test_focus_by_dictionary(source, english_tokenizer, tokenizer, generator, tmp_path):
    path = tmp_path / "dictionary.tsv"
    path.write_text("huis\thouse\nHUIS\twood\nkat\tunheard of\nno such\tcat\n")
    rows = initialise("focus", source, english_tokenizer, tokenizer, generator=generator, dictionary=path)
    house, wood, huis, kat = (
        own(" " + word).input_ids[0]
        for own, word in (
            (english_tokenizer, "house"),
            (english_tokenizer, "wood"),
            (tokenizer, "huis"),
            (tokenizer, "kat"),
        )
    )
    torch.testing.assert_close(rows[huis], (source[house] + source[wood]) / 2)
    torch.testing.assert_close(rows[kat], source[english_tokenizer(" unheard of").input_ids].mean(0))


def test_initialisations_are_reproducible(source, english_tokenizer, tokenizer):
    auxiliary = torch.randn(320, 6, generator=torch.Generator().manual_seed(3))
    for name in INITIALISATIONS:
        first, again = (
            initialise(
                name,
                source.half(),
                english_tokenizer,
                tokenizer,
                generator=torch.Generator().manual_seed(7),
                auxiliary=auxiliary,
            )
            for _ in range(2)
        )
        assert first.dtype == torch.float16 and first.shape == (320, 8) and torch.equal(first, again)


@pytest.mark.usefixtures("any_shape")
def test_initialise_refuses(source, english_tokenizer, tokenizer, generator):
    def attempt(name="random", table=source, **options):
        return initialise(name, table, english_tokenizer, tokenizer, generator=generator, **options)

    with pytest.raises(UserError, match="initialisation is 'zero': choose one of random, mean"):
        attempt("zero")
    with pytest.raises(UserError, match=r"source_table has shape \(300, 8\)"):
        attempt(table=source[:300])
    with pytest.raises(UserError, match="NaN"):
        attempt(table=source * float("nan"))
    with pytest.raises(UserError, match="target_counts has 310 rows but the tokenizer 320"):
        attempt("frequency", target_counts=torch.ones(310))
    with pytest.raises(UserError, match="'focus' with neither"):
        attempt("focus")
    with pytest.raises(UserError, match="auxiliary has 310 rows"):
        attempt("focus", auxiliary=torch.ones(310, 4))


def test_sparsemax(generator):
    weights = sparsemax(torch.randn(50, 30, generator=generator))
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    assert (weights >= 0).all() and (weights == 0).float().mean() > 0.5
    torch.testing.assert_close(sparsemax(torch.tensor([3.0, 1.0])), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(
        sparsemax(torch.tensor([0.5, 0.5, 0.1])), torch.tensor([0.4667, 0.4667, 0.0667]), atol=1e-4, rtol=0
    )


def test_cooccurrence_is_the_plain_formula(monkeypatch):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 12, 400)
    end, window, size = 0, 3, 14
    counts = np.zeros((size, size))
    for left in range(len(ids)):
        for right in range(left + 1, min(left + window + 1, len(ids))):
            if end in ids[left:right]:
                break
            if ids[right] != end:
                counts[ids[left], ids[right]] += 1
                counts[ids[right], ids[left]] += 1
    total, smoothed = counts.sum(1), counts.sum(1) ** 0.75
    with np.errstate(divide="ignore", invalid="ignore"):
        ppmi = np.log(counts / total[:, None] * smoothed.sum() / smoothed)
    ppmi = np.where(np.isfinite(ppmi), ppmi, 0).clip(min=0)
    u, s, _ = np.linalg.svd(ppmi)
    expected = (u[:, :5] * np.sqrt(s[:5])) @ (u[:, :5] * np.sqrt(s[:5])).T
    for piece in (1 << 24, 37):  # in one piece, and in many
        monkeypatch.setattr("recycle_gpt2.lexical.PIECE", piece)
        found = cooccurrence_embeddings(ids, size, dim=5, window=window, end=end).double().numpy()
        np.testing.assert_allclose(found @ found.T, expected, atol=2e-3)
    assert not found[12:].any() and cooccurrence_embeddings(ids, size, dim=20).shape == (14, 20)
    with pytest.raises(UserError, match="0 tokens"):
        cooccurrence_embeddings(ids[:0], size)


def test_cooccurrence_leaves_the_callers_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    cooccurrence_embeddings(np.arange(50) % 7, 7, dim=2)
    assert torch.equal(torch.rand(3), expected)


# The model


def test_replace_lexical(model, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    table = torch.randn(320, 16)
    replace_lexical(model, tokenizer, table)
    assert model.lm_head.weight is model.transformer.wte.weight and torch.equal(token_table(model), table)
    assert model.config.vocab_size == 320 and model.config.eos_token_id == tokenizer.eos_token_id == 0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, found = load_gpt2(tmp_path)
    assert torch.equal(token_table(loaded), table) and len(found) == 320
    assert loaded.generation_config.eos_token_id == 0
    ids = torch.tensor([tokenizer("de kat en het huis").input_ids])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits)
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    with pytest.raises(UserError, match="has 319 rows but the tokenizer 320 tokens"):
        replace_lexical(model, tokenizer, table[:-1])
    with pytest.raises(UserError, match="width 16"):
        replace_lexical(model, tokenizer, table[:, :8])
    with pytest.raises(UserError, match="NaN"):
        replace_lexical(model, tokenizer, table * float("nan"))


WTE, WPE = "transformer.wte.weight", "transformer.wpe.weight"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda name: name == WTE),
        ({"positions": True}, lambda name: name in (WTE, WPE)),
        ({"norms": True}, lambda name: name == WTE or ".ln_" in name),
        ({"layers": [1]}, lambda name: name == WTE or ".h.1." in name),
        ({"layers": "all"}, lambda name: True),
    ],
)
def test_only_the_intended_tensors_train(model, options, expected):
    """A real optimizer step changes these and no others; the others have no gradient and no optimizer state."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # left by what was trained before
    names = train_only(model, **options)
    assert names == [name for name, _ in model.named_parameters() if expected(name)]
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01, amsgrad=True)
    optimizer.zero_grad()
    ids = torch.randint(270, (2, 32))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if expected(name):
            assert not torch.equal(parameter, before[name]) and optimizer.state[parameter]["exp_avg"].shape
        else:
            assert torch.equal(parameter, before[name])
            assert parameter.grad is None and not parameter.requires_grad and parameter not in optimizer.state
    assert len(optimizer.state) == len(names)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_train_only_can_be_asked_again(model):
    train_only(model, layers="all")
    assert train_only(model) == [WTE]
    with pytest.raises(UserError, match="layer 2 is not in the model: its layers are 0 to 1"):
        train_only(model, layers=[2])
    with pytest.raises(UserError, match="layer -1"):
        train_only(model, layers=[-1])


def test_unfreezing_begins_with_the_last_layer(model):
    """The original's indexing unfroze block 0 first, which is the farthest from the output."""
    assert layers_from_top(12, 3) == [11, 10, 9] and layers_from_top(12, 0) == []
    assert layers_from_top(12, 12) == list(range(11, -1, -1))
    names = train_only(model, layers=layers_from_top(2, 1))
    assert any(".h.1." in name for name in names) and not any(".h.0." in name for name in names)
    for count in (-1, 13):
        with pytest.raises(UserError, match=f"{count} layers are to be unfrozen but the model has 12"):
            layers_from_top(12, count)


def test_shuffled_weights_have_the_same_values(model):
    before = copy.deepcopy(model.state_dict())
    shuffle_weights(model, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten().sort().values, before[name].flatten().sort().values)
        assert torch.equal(parameter, before[name]) == (name == WTE)
    again = load_state(model, before)
    shuffle_weights(again, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model.lm_head.weight is model.transformer.wte.weight


def load_state(model, state):
    found = copy.deepcopy(model)
    found.load_state_dict(state)
    return found


def test_reinitialised_layers_are_as_gpt2_begins(model):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    fresh = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=64, n_embd=64, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    own = copy.deepcopy(fresh)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.fill_(9)
    reinitialise_layers(own, torch.Generator().manual_seed(0))
    for (name, expected), found in zip(fresh.named_parameters(), own.parameters(), strict=True):
        if name == WTE:
            assert (found == 9).all()
        else:
            assert found.detach().std().item() == pytest.approx(expected.detach().std().item(), rel=0.06), name
            assert found.detach().mean().item() == pytest.approx(expected.detach().mean().item(), abs=2e-3), name
