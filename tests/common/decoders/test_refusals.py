"""What is no decoder, or cannot be trusted, is refused in one line, before any long work."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from clipcap.config import ClipCapConfig
from clipcap.model import ClipCapModel
from common.checks import UserError
from common.gpt2 import decoder_config, load_gpt2, require_decoder, token_tables
from experiments.backbones import decoders_table as table

LLAMA = {"model_type": "llama", "vocab_size": 61, **table.GROUPED}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny Llama with two tables; read it, do not write to it."""
    return table.save_tiny("llama", tmp_path_factory.mktemp("llama") / "tiny", table.small_tokenizer())


@pytest.fixture
def llama(original, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(original, tmp_path / "copy")


def change(directory, **values) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(load, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert all(word in message for word in words), message


OTHERS = {
    "masked": ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "is a 'bert' model"),
    "encoder-decoder": ({"model_type": "t5", "is_encoder_decoder": True}, "is a 't5' model"),
    "its decoder": ({"model_type": "bart"}, "is a 'bart' model"),
    "recurrent": ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "is a 'mamba' model"),
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "is a 'llama' model"),
    "image and text": (
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "is a 'gemma3' model",
    ),
    "code": ({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}, "code that comes with a model"),
    "no type": ({"model_type": None}, "is a None model"),
    "a list for a type": ({"model_type": ["llama"]}, "model, not a GPT-2 or another causal decoder"),
    "quantized": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized"),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "width": ({"hidden_size": -4}, "hidden_size is -4"),
    "groups": ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    "text for a number": ({"intermediate_size": "wide"}, "intermediate_size is 'wide'"),
    "end token": ({"eos_token_id": 280}, "eos_token_id is 280"),
    "rows": ({"vocab_size": 100}, "the tokenizer has 280 tokens"),
    "activation": ({"hidden_act": 7}, "hidden_act"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_before_any_weights_are_read(llama, name, monkeypatch):
    values, words = OTHERS[name]
    change(llama, **values)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    refused(lambda: require_decoder(llama), words)
    if name != "rows":  # the tokenizer is read after the weights
        refused(lambda: load_gpt2(llama), words)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_half_a_directory(llama, name):
    (llama / name).unlink()
    refused(lambda: load_gpt2(llama), str(llama))


def test_an_untied_head_that_is_not_in_the_file(llama):
    from safetensors.torch import load_file, save_file

    weights = load_file(llama / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: load_gpt2(llama), "lm_head.weight")


def test_a_config_that_says_tied_of_two_tables(original, llama):
    """Whatever of the two is believed, the loaded model and its config say the same, and it is saved as it is."""
    change(llama, tie_word_embeddings=True)
    model, tokenizer = load_gpt2(llama)
    assert model.config.tie_word_embeddings == (len(token_tables(model)) == 1)
    model.save_pretrained(llama)
    tokenizer.save_pretrained(llama)
    again, _ = load_gpt2(llama)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_names_that_choose_code_or_attention_are_not_believed(llama):
    change(
        llama,
        auto_map={"AutoModelForCausalLM": "evil.Evil"},
        attn_implementation="somebody/kernel",
        _attn_implementation="somebody/kernel",
        dtype="float64",
    )
    model, _ = load_gpt2(llama)
    assert model.dtype == torch.float32 and model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "auto_map")


def test_sizes_by_their_older_names():
    config = decoder_config(LLAMA | {"rope_theta": 77.0, "pad_token_id": -1, "torch_dtype": "float16"}, "here")
    assert config.rope_parameters["rope_theta"] == 77.0
    assert config.pad_token_id is None and config.dtype is None


def test_special_tokens_that_are_usual_but_no_rows():
    config = decoder_config({"model_type": "opt", "vocab_size": 2, "hidden_size": 12}, "here")
    assert config.eos_token_id is None  # 2, where nothing is said
    refused(lambda: decoder_config(LLAMA | {"bos_token_id": 61}, "here"), "here: bos_token_id is 61")


def test_a_captioner_s_config_names_no_decoder():
    fields = {"model_type": "bert", "hidden_size": 32}
    refused(lambda: ClipCapModel(ClipCapConfig(gpt2_config=fields)), "gpt2_config is a 'bert' model")


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ({"model_type": "bert"}, {}, "is a 'bert' model"),
        ({}, {"prefix_length": 64}, "prefix_length is 64: GPT-2 has 64 positions"),
    ],
)
def test_training_refuses_before_captions_are_read(llama, tmp_path, monkeypatch, values, options, words):
    from clipcap.training import train as training
    from clipcap.training.settings import TrainConfig

    change(llama, **values)
    monkeypatch.setattr(training, "read_items", lambda config: pytest.fail("captions are read"))
    monkeypatch.setattr(training, "encode_items", lambda *_: pytest.fail("images are embedded"))
    config = TrainConfig(data=tmp_path, out=tmp_path / "out", gpt2=str(llama), **options)
    refused(lambda: training.train(config), words)
