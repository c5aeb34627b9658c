"""Self-critical training: the reward is CIDEr of the corpus, the gradient that of the formula, a run with --init."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocoevalcap.cider import cider_scorer
from pycocoevalcap.cider.cider import Cider

from clipcap.config import ClipCapConfig
from clipcap.model import ClipCapModel
from clipcap.training.scst import END, CorpusCider, rewarded_samples, self_critical_loss, token_log_probs
from clipcap.training.settings import TrainConfig
from clipcap.training.train import train
from common.runtime import seed_everything

CORPUS = [
    ["a red cube on the floor", "a cube that is red"],
    ["a blue ball near a green cone", "the ball is blue and the cone green"],
    ["two cats sit on a mat", "cats on a mat"],
    ["a dog runs over the grass", "a running dog"],
]


def test_reward_is_cider_with_the_frequencies_of_the_corpus():
    captions = ["a red cube", "a green ball near a cone", "two cats sit on a mat", "the grass"]
    expected, each = Cider().compute_score(
        {n: [f"{text} {END}" for text in texts] for n, texts in enumerate(CORPUS)},
        {n: [f"{text} {END}"] for n, text in enumerate(captions)},
    )
    cider = CorpusCider(CORPUS)
    assert np.allclose(cider.score(captions, CORPUS), each)
    assert np.allclose(cider.score(captions[2:3], CORPUS[2:3]), each[2])  # whatever else is in the batch
    assert expected > 0.5
    ended, broken = cider.score(["two cats sit on a"] * 2, CORPUS[2:3] * 2, [True, False])
    assert ended != broken


def test_gradient_is_that_of_the_expected_reward():
    """With every caption of a tiny policy weighed by its probability, the loss's gradient is -∇ E[r]."""
    logits = torch.randn(3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reward = torch.tensor([1.0, 4.0, 2.5])
    baseline = 2.0
    log_probs, p = logits.log_softmax(-1), logits.softmax(-1).detach()
    loss = self_critical_loss(log_probs[:, None], torch.ones(3, 1), p * (reward - baseline))
    (found,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(-(logits.softmax(-1) * reward).sum(), logits)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.fixture
def model(gpt2_directory):
    torch.manual_seed(0)
    return ClipCapModel.from_backbones(ClipCapConfig(clip_width=12, prefix_length=3, gpt2=str(gpt2_directory)))


def test_samples_and_their_log_probabilities(model):
    seed_everything(0)
    images, cider = torch.randn(2, 12), CorpusCider(CORPUS)
    ids, labels, advantage, greedy = rewarded_samples(model, images, CORPUS[:2], cider, samples=3, max_new_tokens=6)
    assert len(ids) == 6 and advantage.shape == (6,) and greedy.shape == (2,)
    log_probs = token_log_probs(model, images.repeat_interleave(3, 0), ids, labels)
    logits = model(images.repeat_interleave(3, 0), ids).logits.log_softmax(-1)
    for row in range(6):
        for place in range(ids.shape[1]):
            expected = logits[row, place, ids[row, place]].item() if labels[row, place] >= 0 else 0.0
            assert log_probs[row, place].item() == pytest.approx(expected, abs=1e-4)


def test_references_are_prepared_once_for_an_image(model, monkeypatch):
    cider, prepared, cook = CorpusCider(CORPUS), [], cider_scorer.cook_refs
    monkeypatch.setattr(cider_scorer, "cook_refs", lambda texts: prepared.append(texts) or cook(texts))
    rewarded_samples(model, torch.randn(2, 12), CORPUS[:2], cider, samples=5, max_new_tokens=6)
    assert [len(texts) for texts in prepared] == [2, 2]


@pytest.mark.slow
def test_sampled_captions_get_better(model):
    """A few hundred captions of a random model whose reward is to end: nearly none do, then many."""
    seed_everything(0)
    model.gpt2.requires_grad_(True)

    class Short:
        def score(self, captions, references, ended):
            return np.array([1.0 if flag else 0.0 for flag in ended])  # a caption that ends is a good one

    images = torch.randn(4, 12)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    rates = []
    for _ in range(30):
        ids, labels, advantage, greedy = rewarded_samples(
            model, images, [["x"]] * 4, Short(), samples=16, max_new_tokens=4
        )
        reward = advantage + greedy.repeat_interleave(16)
        rates.append(reward.mean().item())
        log_probs = token_log_probs(model, images.repeat_interleave(16, 0), ids, labels)
        optimizer.zero_grad()
        (self_critical_loss(log_probs, (labels >= 0).float(), advantage) / len(ids)).backward()
        optimizer.step()
    assert np.mean(rates[-5:]) > np.mean(rates[:5]) + 0.3, rates


@pytest.mark.slow
def test_run(tiny_run, tmp_path):
    plain = replace(tiny_run, out=tmp_path / "plain", steps=2, val_captions=0)
    first = train(plain)
    directory = train(
        TrainConfig(
            data=plain.data,
            out=tmp_path / "scst",
            init=first,
            scst=True,
            scst_samples=2,
            steps=10,
            batch_size=4,
            val_every=5,
            max_tokens=10,
            lr=1e-3,
            runtime=plain.runtime,
        )
    )
    before, after = ClipCapModel.from_pretrained(first), ClipCapModel.from_pretrained(directory)
    assert after.config.clip == before.config.clip and after.config.mapper == "mlp"
    with open(tmp_path / "scst" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert any(row["train/sampled_cider"] for row in rows) and sum(bool(row["val/cider"]) for row in rows) == 2
    last = torch.load(tmp_path / "scst" / "last.ckpt", weights_only=False)
    assert last["global_step"] == 10
    changed = [not torch.equal(last["state_dict"][f"model.{n}"], p) for n, p in before.named_parameters() if "map" in n]
    assert all(changed)
