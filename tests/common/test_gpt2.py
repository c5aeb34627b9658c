"""Loading GPT-2 by name, freezing it, its token table; what goes wrong is said in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from common.checks import UserError
from common.gpt2 import PACKAGED, freeze, load_gpt2, replace_token_table, token_table


@pytest.fixture
def copy(gpt2_directory, tmp_path):
    """A copy of the tiny random GPT-2 that a test may spoil."""
    return shutil.copytree(gpt2_directory, tmp_path / "copy")


def test_load(gpt2_directory):
    model, tokenizer = load_gpt2(gpt2_directory)
    assert not model.training and model.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    text = "the cat sat on the mat"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
        again = load_gpt2(str(gpt2_directory))[0](ids, labels=ids).loss
    assert torch.isfinite(loss) and torch.equal(loss, again)


def test_load_in_half_and_bf16(gpt2_directory, copy):
    assert load_gpt2(gpt2_directory, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    model, _ = load_gpt2(copy)
    model.half().save_pretrained(copy)
    assert load_gpt2(copy)[0].dtype == torch.float32  # whatever the file holds


def test_frozen_stays_as_it_is_through_a_training_step(gpt2_directory):
    model, _ = load_gpt2(gpt2_directory, frozen=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prefix = torch.randn(2, 3, 16, requires_grad=True)
    optimizer = torch.optim.AdamW([prefix], lr=0.1)
    model(inputs_embeds=prefix).logits.square().mean().backward()
    optimizer.step()
    assert prefix.grad is not None and prefix.grad.abs().sum() > 0  # the gradient flows through
    assert not model.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_freeze_drops_old_gradients(gpt2_directory):
    model, _ = load_gpt2(gpt2_directory)
    model.train()
    ids = torch.arange(6)[None]
    model(ids, labels=ids).loss.backward()
    assert freeze(model) is model
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training


@pytest.mark.parametrize("rows", [5, 270, 400])
@pytest.mark.parametrize("frozen", [False, True])
def test_replaced_table_is_tied_and_survives_saving(gpt2_directory, tmp_path, rows, frozen):
    model, _ = load_gpt2(gpt2_directory, frozen=frozen)
    table = torch.randn(rows, 16, generator=torch.Generator().manual_seed(1))
    replace_token_table(model, table)
    assert torch.equal(token_table(model), table)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.requires_grad is not frozen
    assert model.config.vocab_size == rows
    table.zero_()  # the model has its own copy
    assert token_table(model).abs().sum() > 0
    with torch.no_grad():
        logits = model(torch.tensor([[0, 1, 4]])).logits
    assert logits.shape == (1, 3, rows)
    model.save_pretrained(tmp_path / "saved")
    from transformers import GPT2LMHeadModel

    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(saved(torch.tensor([[0, 1, 4]])).logits, logits)


def test_training_after_replacement_moves_both_ends(gpt2_directory):
    model, _ = load_gpt2(gpt2_directory)
    replace_token_table(model, torch.randn(9, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(9)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (torch.zeros(9, 15), "shape .9, 15.: this model needs rows of width 16"),
        (torch.zeros(16), "shape"),
        (torch.full((9, 16), torch.nan), "NaN or infinity"),
        (torch.full((9, 16), torch.inf), "NaN or infinity"),
    ],
)
@pytest.mark.usefixtures("any_shape")
def test_impossible_tables(gpt2_directory, table, words):
    model, _ = load_gpt2(gpt2_directory)
    with pytest.raises(UserError, match=words):
        replace_token_table(model, table)


def one_line(caught) -> str:
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model"])
def test_unknown_name_offline(name):
    with pytest.raises(UserError) as caught:
        load_gpt2(name)
    message = one_line(caught)
    assert name in message and "tiny" in message and "connection" in message


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent/model", "a/b/c", ""])
def test_paths_that_do_not_exist(name):
    with pytest.raises(UserError, match="does not exist" if name else "name is empty") as caught:
        load_gpt2(name)
    one_line(caught)


def test_file_or_empty_directory_instead_of_a_model(copy, tmp_path):
    with pytest.raises(UserError, match="is a file"):
        load_gpt2(copy / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no config.json"):
        load_gpt2(tmp_path / "empty")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "absent"])
def test_damaged_weights(copy, damage):
    path = copy / "model.safetensors"
    content = path.read_bytes()
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(
            {"truncated": content[: len(content) // 2], "garbage": b"{}garbage" * 99, "empty": b""}[damage]
        )
    with pytest.raises(UserError) as caught:
        load_gpt2(copy)
    assert str(copy) in one_line(caught)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_damaged_config(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        load_gpt2(copy)
    assert str(copy) in one_line(caught)


def change(copy, **values) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_other_architecture(copy):
    change(copy, model_type="bert", architectures=["BertModel"])
    with pytest.raises(UserError, match="is a 'bert' model, not a GPT-2"):
        load_gpt2(copy)


@pytest.mark.parametrize("values", [{"n_layer": 3}, {"n_embd": 32}])
def test_weights_that_do_not_fit_the_config(copy, values):
    change(copy, **values)
    with pytest.raises(UserError) as caught:
        load_gpt2(copy)
    assert str(copy) in one_line(caught)


def test_tokenizer_of_another_model(copy, gpt2_directory):
    model, _ = load_gpt2(copy)
    replace_token_table(model, torch.zeros(100, 16))
    model.save_pretrained(copy)
    with pytest.raises(UserError, match="tokenizer has 270 tokens but the token table 100 rows|tokenizer has"):
        load_gpt2(copy)


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_packaged(name):
    if not PACKAGED[name].is_dir():
        pytest.skip(f"{name} is not packaged yet")
    model, tokenizer = load_gpt2(name, frozen=True)
    ids = tokenizer("The Debian system is free software.").input_ids
    assert len(tokenizer) == model.config.vocab_size and 2 < len(ids) < 20


@pytest.mark.slow
def test_full_size(gpt2_directory, tmp_path):
    """124M random parameters, saved as Hugging Face does and loaded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):  # no time for initialisation
        model = GPT2LMHeadModel(GPT2Config())
    model.to_empty(device="cpu").tie_weights()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(0.01 * number)
    model.save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(gpt2_directory / name, tmp_path / "gpt2" / name)
    loaded, _ = load_gpt2(tmp_path / "gpt2", frozen=True)
    assert loaded.num_parameters() == 124_439_808
    assert token_table(loaded).shape == (50257, 768)
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
