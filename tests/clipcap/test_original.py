"""The original project's checkpoints, against numbers that its own code computed (tests/golden)."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from clipcap import Captioner, ClipCapModel, load_original_checkpoint
from clipcap.cli import main
from clipcap.decoding import decode
from clipcap.original import convert
from common.checks import UserError

GOLDEN = Path(__file__).parent.parent / "golden"
KINDS = ("mlp", "transformer")


def golden(kind: str):
    model = load_original_checkpoint(GOLDEN / f"clipcap_{kind}.pt", n_head=4)
    meta = json.loads((GOLDEN / f"clipcap_{kind}.json").read_text())
    return model, meta, torch.load(GOLDEN / f"clipcap_{kind}.io.pt", weights_only=True)


def original_loss(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """The original's loss: mean over all tokens but those with id 0, which it takes for padding.

    Token 0 is "!" in GPT-2's vocabulary, so a caption's "!" is never learned, and the original has no end token.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), input_ids.flatten(), ignore_index=0)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_prefix_logits_and_loss_equal_the_original(kind):
    model, meta, io = golden(kind)
    assert model.config.mapper == kind and model.config.clip_width == meta["prefix_size"]
    assert model.config.prefix_length == meta["prefix_length"]
    if kind == "transformer":
        assert (model.config.clip_length, model.config.mapper_layers) == (meta["clip_length"], meta["mapper_layers"])
    torch.testing.assert_close(model.prefix(io["clip_embedding"]), io["prefix"], atol=1e-4, rtol=0)
    logits = model(io["clip_embedding"], io["tokens"], attention_mask=io["mask"]).logits
    torch.testing.assert_close(logits, io["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(original_loss(logits, io["tokens"]), io["loss"], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [6, 1])
def test_captions_equal_the_original(kind, at_once):
    """All five beams in their order, and greedy, token for token; all images in one batch, and one by one."""
    model, meta, io = golden(kind)
    options = dict(max_new_tokens=meta["max_new_tokens"], stop_token_ids=meta["stop_token_id"])
    beams, greedy = [], []
    for x in io["clip_embedding"].split(at_once):
        beams += decode(model, x, strategy="beam_original", num_beams=5, num_captions=5, **options)
        greedy += decode(model, x, strategy="greedy", **options)
    assert [[c.token_ids for c in captions] for captions in beams] == meta["beam_token_ids"]
    assert [captions[0].token_ids for captions in greedy] == meta["greedy_token_ids"]
    assert all(a.score >= b.score for captions in beams for a, b in zip(captions, captions[1:], strict=False))


@pytest.mark.parametrize("kind", KINDS)
def test_converted_checkpoint_is_exact(kind, tmp_path):
    model, _, io = golden(kind)
    convert(GOLDEN / f"clipcap_{kind}.pt", tmp_path / "out", n_head=4)
    again = ClipCapModel.from_pretrained(tmp_path / "out")
    batch = (io["clip_embedding"], io["tokens"])
    assert torch.equal(again(*batch).logits, model(*batch).logits)


def test_command_gives_a_captioner_that_stops_where_the_original_does(tmp_path, gpt2_directory, capsys):
    from transformers import GPT2LMHeadModel

    sized = GPT2LMHeadModel.from_pretrained(gpt2_directory)
    sized.resize_token_embeddings(512, mean_resizing=False)  # as the checkpoints' own
    shutil.copytree(gpt2_directory, tmp_path / "gpt2")
    sized.save_pretrained(tmp_path / "gpt2")
    options = ("--gpt2", tmp_path / "gpt2", "--n-head", 4)

    def run(kind, *more):
        return main([str(a) for a in ("convert", GOLDEN / f"clipcap_{kind}.pt", tmp_path / kind, *options, *more)])

    assert run("mlp") == 0
    model, _, io = golden("mlp")
    again = ClipCapModel.from_pretrained(tmp_path / "mlp")
    [dot] = again.tokenizer(".")["input_ids"]
    assert again.config.eos_token_id == dot and not again.config.normalize_embeddings
    for captioner in (model, again):
        captioner.gpt2.transformer.wte.weight.data[dot] *= 3  # so that the captions come upon it
    batch, length = io["clip_embedding"], {"max_new_tokens": 20}
    expected = decode(model, batch, strategy="beam_original", stop_token_ids=dot, **length)
    found = decode(again, batch, strategy="beam_original", **length)
    assert [c.token_ids for [c] in found] == [c.token_ids for [c] in expected]
    ended = [c for [c] in found if len(c.token_ids) < 20]
    assert ended and all(c.token_ids.index(dot) == len(c.token_ids) - 1 for c in ended)
    text = Captioner(again, SimpleNamespace(name="any", width=32)).text
    assert all(text(c).endswith(".") and text(c).count(".") == 1 for c in ended)  # it stays, as in the original

    assert run("transformer", "--normalize-embeddings", "--mapper-heads", 4, "--stop", "") == 0
    config = ClipCapModel.from_pretrained(tmp_path / "transformer").config
    assert config.normalize_embeddings and config.mapper_heads == 4 and config.eos_token_id is None
    capsys.readouterr()
    assert run("mlp", "--stop", "a cat.") == 2
    assert "stop is 'a cat.', " in capsys.readouterr().err
    with pytest.raises(UserError, match="stop is '.' but the GPT-2 .* was not named"):
        convert(GOLDEN / "clipcap_mlp.pt", tmp_path / "out", stop=".", n_head=4)


def test_a_tokenizer_of_another_size_is_refused(tmp_path, gpt2_directory, capsys):
    arguments = ["convert", str(GOLDEN / "clipcap_mlp.pt"), str(tmp_path / "out"), "--n-head", "4"]
    assert main([*arguments, "--gpt2", str(gpt2_directory)]) == 2
    error = capsys.readouterr().err
    assert "has 512 tokens but GPT-2" in error and "name the GPT-2 it was trained on" in error
    assert not (tmp_path / "out").exists()


def test_buffers_of_old_transformers_and_data_parallel_names_are_ignored(tmp_path):
    model, _, io = golden("mlp")
    weights = torch.load(GOLDEN / "clipcap_mlp.pt", weights_only=True)
    for layer in range(2):
        weights[f"gpt.transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.uint8)
        weights[f"gpt.transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "old.pt")
    again = load_original_checkpoint(tmp_path / "old.pt", n_head=4)
    assert torch.equal(again.prefix(io["clip_embedding"]), model.prefix(io["clip_embedding"]))


def test_prefix_only_checkpoint_takes_gpt2_by_name(tmp_path):
    from transformers import PreTrainedTokenizerFast

    model, meta, io = golden("transformer")
    model.gpt2.save_pretrained(tmp_path / "gpt2")
    from tokenizers import Tokenizer, models

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(
        tmp_path / "gpt2"
    )
    weights = torch.load(GOLDEN / "clipcap_transformer.pt", weights_only=True)
    alone = {name: value for name, value in weights.items() if name.startswith("clip_project.")}
    torch.save(alone, tmp_path / "prefix.pt")
    with pytest.raises(UserError, match="holds the mapper alone: name the GPT-2"):
        load_original_checkpoint(tmp_path / "prefix.pt")
    again = load_original_checkpoint(tmp_path / "prefix.pt", gpt2=str(tmp_path / "gpt2"))
    assert not again.config.tune_gpt2
    batch = (io["clip_embedding"], io["tokens"])
    assert torch.equal(again(*batch).logits, model(*batch).logits)
    again.save_pretrained(tmp_path / "out")
    assert torch.equal(ClipCapModel.from_pretrained(tmp_path / "out")(*batch).logits, model(*batch).logits)


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_bad_files_are_refused_by_name(tmp_path, capsys):
    weights = torch.load(GOLDEN / "clipcap_mlp.pt", weights_only=True)
    whole = (GOLDEN / "clipcap_mlp.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:5000])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"clip_project.model.0.weight": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({k: v for k, v in weights.items() if "h.1.ln_2.weight" not in k}, tmp_path / "hole.pt")
    torch.save(weights | {"clip_project.model.0.weight": torch.zeros(3, 32)}, tmp_path / "shape.pt")
    torch.save(weights | {"clip_project.extra": torch.zeros(3)}, tmp_path / "extra.pt")
    for name, message in [
        ("missing.pt", "does not exist"),
        ("cut.pt", "damaged"),
        ("text.pt", "damaged|run code"),
        ("evil.pt", "could run code"),
        ("evil.pkl", "could run code|damaged"),
        ("other.pt", "not the original ClipCap's"),
        ("list.pt", "not a state_dict"),
        ("hole.pt", "lacks gpt.transformer.h.1.ln_2.weight"),
        ("shape.pt", r"clip_project.model.0.weight has shape \(3, 32\)"),
        ("extra.pt", "clip_project.extra"),
    ]:
        with pytest.raises(UserError, match=message):
            load_original_checkpoint(tmp_path / name, n_head=4)
    assert "never run" not in capsys.readouterr().out
    with pytest.raises(UserError, match="n_head is 12: use a divisor of this GPT-2's width 64."):
        load_original_checkpoint(GOLDEN / "clipcap_mlp.pt")


def test_a_foreign_directory_is_refused_before_anything_is_read(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="'notes.txt', which was not written by this command"):
        convert(tmp_path / "there-is-no-such-checkpoint.pt", out)
    assert [file.name for file in out.iterdir()] == ["notes.txt"]


def test_a_conversion_is_written_whole_and_again(tmp_path, monkeypatch):
    source, out = GOLDEN / "clipcap_mlp.pt", tmp_path / "out"
    convert(source, out, n_head=4)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    convert(source, out, n_head=4)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="cannot be written .No space left on device."):
            convert(source, out, n_head=4)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
