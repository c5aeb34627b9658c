"""Stages train what they should and nothing else, count what they do, resume exactly, and stop on NaN."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from common.checks import UserError
from common.decoders.tables import token_table
from common.language import IGNORE
from common.optimizers import MuonAndAdam
from common.runtime import RuntimeConfig
from common.training import GradientConfig
from recycle_gpt2 import loss as loss_module
from recycle_gpt2.lexical import layers_from_top, train_only
from recycle_gpt2.loss import next_token_loss, positions_at_once, tied_cross_entropy
from recycle_gpt2.training import (
    PUBLISHED,
    Recycling,
    StageConfig,
    build_optimizer,
    flops_per_token,
    plan,
    read_record,
    train_stage,
)

RUNTIME = RuntimeConfig(device="cpu")
VOCAB, BLOCK = 29, 8


class Blocks(TensorDataset):
    """A TensorDataset whose items are plain tensors."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0]


def blocks(count: int, seed: int = 0) -> Blocks:
    return Blocks(torch.randint(1, VOCAB, (count, BLOCK), generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=16,
            n_embd=12,
            n_layer=3,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.1,
            embd_pdrop=0.1,
            attn_pdrop=0.1,
        )
    )


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("logits", [1, 16 * VOCAB + 1, 10**6])
def test_loss_and_gradients_are_those_of_cross_entropy(monkeypatch, logits):
    monkeypatch.setitem(loss_module.LOGITS, "cpu", logits)
    torch.manual_seed(0)
    hidden = torch.randn(50, 6, requires_grad=True)
    table = torch.randn(VOCAB, 6, requires_grad=True)
    labels = torch.randint(0, VOCAB, (50,))
    labels[::7] = IGNORE
    ours, plain = tied_cross_entropy(hidden, table, labels), F.cross_entropy(hidden @ table.T, labels)
    assert ours.item() == pytest.approx(plain.item(), abs=1e-5)
    for ours_grad, grad in zip(
        torch.autograd.grad(3 * ours, (hidden, table)), torch.autograd.grad(3 * plain, (hidden, table)), strict=True
    ):
        assert torch.allclose(ours_grad, grad, atol=1e-6)
    with torch.no_grad():
        assert tied_cross_entropy(hidden, table, labels).item() == pytest.approx(plain.item(), abs=1e-5)


def test_logits_held_do_not_grow_with_the_vocabulary():
    cpu = torch.device("cpu")
    held = [vocab * positions_at_once(vocab, cpu) for vocab in (1000, 40_000, 200_000)]
    assert max(held) <= loss_module.LOGITS["cpu"]


def test_fill_of_a_last_block_is_not_in_the_loss(model):
    model.eval()
    block = torch.tensor([[3, 4, 5, 0, 7, 0, 0, 0]])
    logits = model(input_ids=block).logits[0]
    expected = F.cross_entropy(logits[:5], block[0, 1:6])  # the end token after 7 counts, the fill does not
    assert next_token_loss(model, block).item() == pytest.approx(expected.item(), abs=1e-5)


def test_only_the_lexical_embeddings_change_and_nothing_else_has_state_or_gradient(model, tmp_path):
    train_only(model)
    before = snapshot(model)
    config = StageConfig(epochs=2, batch_size=4, val_every=4, lr=1e-2)
    record = train_stage(model, blocks(16), blocks(4, 1), tmp_path, config, runtime=RUNTIME, progress=False)
    after = snapshot(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"transformer.wte.weight"} == set(record.trained)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert [name for name, p in model.named_parameters() if p.grad is not None and name not in changed] == []
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert set(saved["state_dict"]) == {"model.transformer.wte.weight"}
    (optimizer,) = saved["optimizer_states"]
    tensors = [value for state in optimizer["state"].values() for value in state.values() if value.ndim]
    assert {tuple(value.shape) for value in tensors} == {(VOCAB, 12)}
    assert record.trained_parameters == VOCAB * 12
    assert record.tokens == 2 * 16 * BLOCK
    assert record == read_record(tmp_path)


def test_unfreezing_begins_at_the_output_not_at_block_0(model, tmp_path):
    """The original's indexing unfreezes block 0 first."""
    layers = layers_from_top(model.config.n_layer, 1)
    train_only(model, layers=layers)
    before = snapshot(model)
    train_stage(model, blocks(8), blocks(4, 1), tmp_path, StageConfig(batch_size=4), runtime=RUNTIME, progress=False)
    after = snapshot(model)
    blocks_changed = {
        int(name.split(".")[2]) for name in before if ".h." in name and not torch.equal(before[name], after[name])
    }
    assert blocks_changed == {2}


def test_flops_count_frozen_parts_as_such(model):
    tables = VOCAB * 12
    matrices = sum(p.numel() for name, p in model.named_parameters() if ".h." in name and p.ndim == 2)
    attention = 3 * 4 * BLOCK * 12
    train_only(model, layers="all")
    assert flops_per_token(model, BLOCK) == 6 * (matrices + tables) + 3 * attention
    train_only(model)
    assert flops_per_token(model, BLOCK) == 4 * matrices + 6 * tables + 3 * attention
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert flops_per_token(model, BLOCK) == 2 * (matrices + tables) + attention


@pytest.mark.parametrize("epochs, tokens, every", [(1, 0, 3), (2.5, 0, 100), (1, 777, 5), (1, 1, 5)])
def test_plan_ends_with_a_validation(epochs, tokens, every):
    config = StageConfig(
        epochs=epochs, tokens=tokens, batch_size=4, gradients=GradientConfig(accumulate=2), val_every=every
    )
    found = plan(100, BLOCK, config)
    wanted = (tokens or epochs * 100 * BLOCK) / (8 * BLOCK)
    assert found.steps % found.val_every == 0
    assert wanted <= found.steps <= math.ceil(wanted) + found.steps / found.val_every


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 10, 11, 19, 99, 305, 499, 500, 700, 5000, 12_345])
def test_a_stage_is_validated_about_ten_times_or_more_and_at_least_every_val_every_steps(steps):
    for every in (1, 7, 500):
        found = plan(steps, BLOCK, StageConfig(epochs=1, batch_size=1, val_every=every))
        validations = found.steps / found.val_every
        assert found.val_every <= every
        assert min(steps, 6) <= validations <= max(10, math.ceil(steps / every))
        assert validations >= 10 or steps < 100
        assert steps <= found.steps <= max(steps + 1, 1.1 * steps)


@pytest.mark.parametrize(
    "tokens, passes", [(1_000, 4), (400_000, 4), (500_000, 4), (1_000_000, 2), (1_600_000, 1.25), (10**9, 1)]
)
def test_a_short_text_is_passed_over_four_times_and_a_long_one_once(tokens, passes):
    assert StageConfig().length(tokens) == pytest.approx(passes * tokens)
    assert StageConfig(share=0.25).length(tokens) == pytest.approx(passes * tokens / 4)
    assert StageConfig(epochs=3, share=0.5).length(tokens) == pytest.approx(1.5 * tokens)
    assert StageConfig(tokens=500, epochs=3, share=0.5).length(tokens) == 250
    assert PUBLISHED.length(tokens) == tokens


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_rate_goes_with_the_scale_of_the_rows(model, scale):
    with torch.no_grad():
        token_table(model).mul_(scale / token_table(model).std())

    def rate(layers, **settings) -> float:
        train_only(model, layers=layers)
        optimizer = build_optimizer(model, StageConfig(**settings))
        return min(group["lr"] for group in optimizer.param_groups)

    assert rate(()) == pytest.approx(0.025 * scale)
    assert rate("all") == rate([0]) == pytest.approx(0.005 * scale)
    assert rate("all", optimizer="muon", lr_muon=1e3) == pytest.approx(0.025 * scale)
    assert rate("all", lr=0.3) == 0.3


@pytest.mark.slow
@pytest.mark.parametrize("count, accumulate, epochs", [(10, 2, 2), (40, 8, 4), (9, 3, 1)])
def test_a_stage_of_accumulated_batches_is_validated_at_its_end(model, tmp_path, count, accumulate, epochs):
    train_only(model)
    config = StageConfig(epochs=epochs, batch_size=2, gradients=GradientConfig(accumulate=accumulate), val_every=2)
    planned = plan(count, BLOCK, config)
    record = train_stage(model, blocks(count), blocks(4, 1), tmp_path, config, runtime=RUNTIME, progress=False)
    steps = [point["step"] for point in record.curve]
    assert steps == list(range(planned.val_every, planned.steps + 1, planned.val_every))
    assert record.tokens == record.curve[-1]["tokens"] > 0
    assert record.seconds == pytest.approx(record.curve[-1]["seconds"], abs=0.06)  # validation is no training time


def test_stages_of_another_order_see_other_blocks_first(model, tmp_path, monkeypatch):
    seen: dict[int, list[list[int]]] = {}
    original = Recycling.training_step

    def spy(self, batch, batch_idx):
        seen[order].append(sorted(row[0].item() for row in batch))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Recycling, "training_step", spy)
    train_only(model)
    numbered = Blocks(torch.arange(1, 25)[:, None].expand(24, BLOCK).clone())
    for order in (0, 1):
        seen[order] = []
        train_stage(
            model,
            numbered,
            blocks(4, 1),
            tmp_path / str(order),
            StageConfig(epochs=0.5, batch_size=4),
            runtime=RUNTIME,
            order=order,
            progress=False,
        )
    assert len(seen[0]) == len(seen[1]) == 3 and seen[0] != seen[1]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, schedule", [("amsgrad", "plateau"), ("adamw", "cosine"), ("muon", "cosine")])
def test_resume_ends_in_the_same_weights(model, tmp_path, monkeypatch, optimizer, schedule):
    train_only(model, layers="all")
    begin = snapshot(model)
    config = StageConfig(
        epochs=3,
        batch_size=3,
        gradients=GradientConfig(accumulate=2),
        val_every=3,
        lr=1e-2,
        optimizer=optimizer,
        schedule=schedule,
        patience=0,
    )

    def once(directory):
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(begin[name])
        record = train_stage(model, blocks(24), blocks(5, 1), directory, config, runtime=RUNTIME, progress=False)
        return record, snapshot(model)

    whole, weights = once(tmp_path / "whole")

    class Killed(Exception):
        pass

    step = Recycling.training_step

    def dies(self, batch, batch_idx):
        if self.global_step == 8:
            raise Killed
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Recycling, "training_step", dies)
        with pytest.raises(Killed):
            once(tmp_path / "cut")
    resumed, again = once(tmp_path / "cut")
    assert resumed.tokens == whole.tokens
    assert [p["val_loss"] for p in resumed.curve] == [p["val_loss"] for p in whole.curve]
    assert [p["train_loss"] for p in resumed.curve] == pytest.approx([p["train_loss"] for p in whole.curve])
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    third, loaded = once(tmp_path / "cut")  # finished: nothing is trained again
    assert third.curve == resumed.curve
    assert all(torch.equal(weights[name], loaded[name]) for name in weights)


def test_muon_and_adam_are_the_two_optimizers(model):
    config = StageConfig(optimizer="muon", lr=1e-2, lr_muon=2e-2, weight_decay=0.1)
    train_only(model, layers="all")
    joint = build_optimizer(model, config)
    assert isinstance(joint, MuonAndAdam)
    twin = GPT2LMHeadModel(model.config)
    twin.load_state_dict(model.state_dict())
    named = dict(twin.named_parameters())
    hidden = sorted(name for name, p in named.items() if ".h." in name and p.ndim == 2)
    rest = [p for name, p in named.items() if name not in hidden]
    parts = [
        torch.optim.Muon([named[name] for name in hidden], lr=2e-2, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.1},
                {"params": [p for p in rest if p.ndim != 2], "weight_decay": 0.0},
            ],
            lr=1e-2,
            betas=(0.9, 0.95),
        ),
    ]
    model.eval()
    twin.eval()
    batch = torch.stack([blocks(4)[i] for i in range(4)])
    for step in range(3):
        if step == 2:  # as after a resume
            fresh = build_optimizer(model, config)
            fresh.load_state_dict(joint.state_dict())
            joint = fresh
        joint.zero_grad()
        next_token_loss(model, batch).backward()
        joint.step()
        twin.zero_grad()
        next_token_loss(twin, batch).backward()
        for part in parts:
            part.step()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name


def test_plateau_decays_as_torch(model):
    losses = [5.0, 4.0, 4.1, 4.2, 3.9, 3.95, 3.95, 3.95, 3.95]
    config = StageConfig(patience=1)
    train_only(model)
    module = Recycling(model, config, plan(8, BLOCK, config), BLOCK)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.1)
    for loss in losses:
        module._meet_plateau(loss)
        theirs.step(loss)
        assert module._decayed() == pytest.approx(optimizer.param_groups[0]["lr"])


def test_early_stopping_ends_the_stage(model, tmp_path):
    train_only(model)
    config = StageConfig(epochs=50, batch_size=4, val_every=2, lr=1e-12, early_stopping=2)
    record = train_stage(model, blocks(8), blocks(4, 1), tmp_path, config, runtime=RUNTIME, progress=False)
    assert len(record.curve) < 10
    assert record.tokens < 50 * 8 * BLOCK


def test_nan_stops_and_keeps_the_last_good_checkpoint(model, tmp_path, monkeypatch):
    train_only(model)
    step = Recycling.training_step

    def breaks(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        return loss * math.nan if self.global_step == 5 else loss

    monkeypatch.setattr(Recycling, "training_step", breaks)
    config = StageConfig(epochs=4, batch_size=4, val_every=2)
    with pytest.raises(UserError, match="lower the learning rate"):
        train_stage(model, blocks(16), blocks(4, 1), tmp_path, config, runtime=RUNTIME, progress=False)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert saved["global_step"] == 4
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())


def test_bf16_trains(model, tmp_path):
    train_only(model, layers="all")
    config = StageConfig(epochs=4, batch_size=4, lr=1e-2, val_every=4)
    record = train_stage(
        model, blocks(16), blocks(16), tmp_path, config, runtime=replace(RUNTIME, precision="bf16"), progress=False
    )
    assert record.curve[-1]["val_loss"] < record.curve[0]["val_loss"]
    assert model.transformer.wte.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(lr=0.0), "lr is 0.0"),
        (dict(epochs=0.0), "epochs is 0.0"),
        (dict(batch_size=0), "batch_size is 0"),
    ],
)
def test_settings_that_cannot_work_are_named(model, tmp_path, changes, message):
    train_only(model)
    with pytest.raises(UserError, match=message):
        train_stage(
            model,
            blocks(8),
            blocks(2),
            tmp_path / "x",
            replace(StageConfig(), **changes),
            runtime=RUNTIME,
            progress=False,
        )
    assert not (tmp_path / "x").exists()


def test_blocks_longer_than_the_model_are_named(model, tmp_path):
    model.config.n_positions = 4
    train_only(model)
    with pytest.raises(UserError, match="4 positions"):
        train_stage(model, blocks(8), blocks(2), tmp_path, StageConfig(), runtime=RUNTIME, progress=False)
