"""Rays of the training views: which pixels are drawn, whose colours they have, and from what they follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("nerfstudio")

from common.checks import UserError
from dietnerf.data import FewViewParserConfig
from dietnerf.rays import FewViewDataManagerConfig, draw_pixels
from tests.dietnerf.test_data import masked_scene


def test_draw_pixels():
    generator = torch.Generator().manual_seed(0)
    pixels = draw_pixels(5, 10, 20, number=4000, generator=generator)
    assert pixels.amin(0).tolist() == [0, 0, 0] and pixels.amax(0).tolist() == [4, 9, 19]
    centre = draw_pixels(5, 10, 20, number=4000, one_image=True, crop=0.5, generator=generator)
    assert len(centre[:, 0].unique()) == 1
    assert centre[:, 1].min() == 2 and centre[:, 1].max() == 6 and centre[:, 2].min() == 5 and centre[:, 2].max() == 14


@pytest.mark.parametrize("one_image, crop", [(False, 1.0), (True, 1.0), (False, 0.5), (True, 0.5)])
def test_what_masks_hide_is_never_drawn_and_the_rest_evenly(one_image, crop):
    masks = torch.ones(3, 10, 20, 1, dtype=torch.bool)
    masks[:, :, :8] = masks[1, :6] = False
    pixels = draw_pixels(
        3, 10, 20, number=8000, one_image=one_image, crop=crop, masks=masks, generator=torch.Generator().manual_seed(0)
    )
    view, row, column = pixels.unbind(-1)
    assert masks[view, row, column].all() and len(view.unique()) == (1 if one_image else 3)
    allowed = masks[..., 0].clone()
    if crop < 1:
        allowed[:, [0, 1, 7, 8, 9]] = allowed[:, :, [*range(5), *range(15, 20)]] = False
    counts = torch.zeros(3, 10, 20)
    counts.index_put_((view, row, column), torch.ones(len(view)), accumulate=True)
    found = counts[view.unique()][allowed[view.unique()]]
    assert found.sum() == 8000 and (found - found.mean()).abs().max() < 6 * found.mean().sqrt()


@pytest.mark.parametrize("one_image", [False, True])
def test_a_mask_that_hides_the_centre_leaves_the_rest(one_image):
    masks = torch.zeros(3, 10, 20, 1, dtype=torch.bool)
    for view in range(3):
        masks[view, view, :2] = True
    seen = set()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        pixels = draw_pixels(
            3, 10, 20, number=50, one_image=one_image, crop=0.5, masks=masks, generator=generator
        ).tolist()
        assert len({view for view, _, _ in pixels}) == (1 if one_image else 3)
        seen |= set(map(tuple, pixels))
    assert seen == {(view, view, column) for view in range(3) for column in (0, 1)}


def test_rays_see_nothing_that_is_masked(tmp_path):
    mask = np.full((16, 16), 255, np.uint8)
    mask[2:9, 3:9] = 0
    config = FewViewDataManagerConfig(
        train_num_rays_per_batch=600, crop_steps=0, pyramid=(4,), pyramid_steps=(1,), rays_from="all"
    )
    config.dataparser = FewViewParserConfig(data=masked_scene(tmp_path, mask))
    manager = config.setup(device="cpu")
    _, row, column = manager.next_train(1)[1]["indices"].unbind(-1)
    assert mask[row, column].all() and len(set(zip(row.tolist(), column.tolist(), strict=True))) > 150
    _, row, column = manager.next_train(0)[1]["indices"].unbind(-1)
    assert sorted(set(zip(row.tolist(), column.tolist(), strict=True))) == [
        (r, c) for r in range(4) for c in range(4) if mask[4 * r : 4 * r + 4, 4 * c : 4 * c + 4].all()
    ]
    _, row, column = manager.next_eval(0)[1]["indices"].unbind(-1)
    assert mask[row, column].all()


def test_rays_follow_from_seed_rank_and_step(ball_scene, monkeypatch):
    def manager(**settings):
        config = FewViewDataManagerConfig(train_num_rays_per_batch=64, rays_from="all", crop_steps=0, **settings)
        config.dataparser = FewViewParserConfig(data=ball_scene, num_views=3)
        return config.setup(device="cpu")

    one, again = manager(), manager()
    again.next_train(3)  # what was asked for before does not matter
    (rays, batch), (same, other) = one.next_train(7), again.next_train(7)
    assert torch.equal(batch["indices"], other["indices"]) and torch.equal(rays.directions, same.directions)
    again.local_rank = 1
    assert not torch.equal(again.next_train(7)[1]["indices"], batch["indices"])
    # colours and rays belong to each other
    view, row, column = batch["indices"][5].tolist()
    assert torch.equal(batch["image"][5], one.train_dataset.images[view, row, column])
    expected = one.train_dataset.cameras.generate_rays(
        camera_indices=torch.tensor([[view]]), coords=torch.tensor([[row + 0.5, column + 0.5]])
    )
    assert torch.allclose(rays.directions[5], expected.directions[0]) and torch.allclose(
        rays.origins[5], expected.origins[0]
    )
    # too many pixels to keep: the same rays, made when drawn
    monkeypatch.setattr("dietnerf.rays.CACHED_PIXELS", 0)
    drawn, _ = manager().next_train(7)
    assert torch.allclose(drawn.directions, rays.directions) and drawn.shape == rays.shape
    assert torch.equal(drawn.camera_indices, rays.camera_indices)


def test_pyramid_of_sizes(ball_scene):
    config = FewViewDataManagerConfig(
        train_num_rays_per_batch=500, crop_steps=0, pyramid=(4, 2), pyramid_steps=(10, 20), rays_from="all"
    )
    config.dataparser = FewViewParserConfig(data=ball_scene)
    manager = config.setup(device="cpu")
    assert [manager.factor(step) for step in (0, 9, 10, 19, 20, 99)] == [4, 4, 2, 2, 1, 1]
    rays, batch = manager.next_train(0)
    assert int(batch["indices"][:, 1:].max()) == 3
    view, row, column = batch["indices"][0].tolist()
    block = manager.train_dataset.images[view, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
    assert torch.allclose(batch["image"][0], block.mean(dim=(0, 1)), atol=1e-6)
    # a coarse pixel's ray goes through the middle of its block
    fine = manager.train_dataset.cameras.generate_rays(
        camera_indices=torch.tensor([[view]]), coords=torch.tensor([[4.0 * row + 2, 4.0 * column + 2]])
    )
    assert torch.allclose(rays.directions[0], fine.directions[0], atol=1e-6)
    with pytest.raises(UserError, match="pyramid has 2 stages but pyramid_steps 1"):
        FewViewDataManagerConfig(
            dataparser=FewViewParserConfig(data=ball_scene), pyramid=(4, 2), pyramid_steps=(10,)
        ).setup(device="cpu")
