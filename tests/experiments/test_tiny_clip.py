"""The losses that train the tiny CLIP, against their naive formulas."""

import math
import random

import pytest
import torch
from torch.nn import functional as F

from common.runtime import RuntimeConfig
from experiments.backbones import clip_recipe as tiny_clip_recipe
from experiments.backbones.train_clip import augment, contrastive_loss, looks, phrase_loss, view_loss
from experiments.scenes.graph import COLOURS, HELD_OUT, SHAPES, sample_family


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_looks_name_the_only_shape_of_each_colour():
    for index in range(40):
        scene = sample_family(0, "train", index).scenes[0]
        found = looks(scene)
        for colour, shape in zip(COLOURS, found, strict=True):
            shapes = [thing.shape for thing in scene.objects if thing.colour == colour]
            assert shape == (SHAPES.index(shapes[0]) if len(shapes) == 1 else -1)


def test_phrase_loss_is_the_mean_over_objects_and_leaves_held_out_pairs_out():
    images, phrases, scale = unit(5, 6), unit(len(COLOURS), len(SHAPES), 6, seed=1), torch.tensor(7.0)
    rng = random.Random(0)
    target = torch.full((5, len(COLOURS)), -1)
    terms = []
    for row in range(5):
        for c, colour in enumerate(COLOURS):
            if rng.random() < 0.4:
                allowed = [s for s, shape in enumerate(SHAPES) if (colour, shape) not in HELD_OUT]
                target[row, c] = rng.choice(allowed)
                scores = {s: 7.0 * float(images[row] @ phrases[c, s]) for s in allowed}
                total = math.log(sum(map(math.exp, scores.values())))
                terms.append(total - scores[int(target[row, c])])
    assert phrase_loss(images, phrases, target, scale).item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_contrastive_loss_counts_only_what_can_be_compared():
    images, texts, wrong, scale = unit(4, 6), unit(4, 6, seed=1), unit(4, 1, 6, seed=2), torch.tensor(5.0)
    everything = torch.ones(4, 4, dtype=torch.bool)
    plain = F.cross_entropy(
        torch.cat([5 * images @ texts.T, 5 * (images * wrong[:, 0]).sum(1, keepdim=True)], 1), torch.arange(4)
    )
    plain = (plain + F.cross_entropy(5 * texts @ images.T, torch.arange(4))) / 2
    assert contrastive_loss(images, texts, wrong, scale, everything).item() == pytest.approx(plain.item(), abs=1e-5)
    only_own = torch.eye(4, dtype=torch.bool)
    own = (images * texts).sum(1) * 5
    against_wrong = -F.logsigmoid(own - 5 * (images * wrong[:, 0]).sum(1)).mean() / 2  # nothing else is left
    assert contrastive_loss(images, texts, wrong, scale, only_own).item() == pytest.approx(
        against_wrong.item(), abs=1e-5
    )


def test_view_loss_is_smallest_for_equal_views():
    first = unit(6, 8)
    assert view_loss(first, first) < view_loss(first, first.roll(1, 0))


def test_augmentation_of_strength_zero_changes_nothing_and_keeps_the_range():
    pixels = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment(pixels, 0.0), pixels)
    torch.manual_seed(0)
    changed = augment(pixels, 1.0, zoom_out=2.0)
    assert changed.shape == pixels.shape and changed.min() >= 0 and changed.max() <= 1
    assert not torch.allclose(changed, pixels)


def test_augmentation_draws_where_the_images_are():
    assert augment(torch.rand(3, 3, 24, 24, device="meta")).device.type == "meta"  # any device but the CPU will do


def test_every_stage_of_the_recipe_gets_the_runtime_and_a_seed_of_its_own(tmp_path, monkeypatch):
    stages = []
    monkeypatch.setattr(tiny_clip_recipe, "train", stages.append)
    tiny_clip_recipe.main(tiny_clip_recipe.Config(out=tmp_path))
    assert [stage.runtime.seed for stage in stages] == [0, 1, 2, 3, 4]
    assert {(stage.precision, stage.runtime.threads) for stage in stages} == {("bf16", 1)}
    assert [stage.init for stage in stages] == [None, *(stage.out / "clip-tiny" for stage in stages[:-1])]
    stages.clear()
    runtime = RuntimeConfig(device="cpu", precision="fp32", seed=10, threads=2)
    tiny_clip_recipe.main(tiny_clip_recipe.Config(out=tmp_path, runtime=runtime))
    assert [(stage.runtime.seed, stage.precision) for stage in stages] == [(seed, "fp32") for seed in range(10, 15)]
    assert {(stage.runtime.device, stage.runtime.threads) for stage in stages} == {("cpu", 2)}
