from __future__ import annotations

import math

import pytest
import torch
from nerfstudio.field_components.encodings import NeRFEncoding
from nerfstudio.model_components.losses import lossfun_distortion

from dietnerf.regularizers import (
    depth_smoothness,
    distortion_loss,
    field_variation,
    frequency_mask,
    occlusion_loss,
    total_variation,
)


def naive_mask(bands, step, total, include_input):
    """Where each output of NeRFEncoding comes from is found by asking the encoding itself."""
    encoding = NeRFEncoding(
        in_dim=3, num_frequencies=bands, min_freq_exp=0, max_freq_exp=bands - 1, include_input=include_input
    )
    weights = []
    base = torch.rand(3, dtype=torch.float64) * 0.01
    for output in range(encoding.get_out_dim()):
        x = base.clone().requires_grad_()
        value = encoding(x)[output]
        (gradient,) = torch.autograd.grad(value, x)
        axis = int(gradient.abs().argmax())
        slope = float(gradient.abs().max())
        if include_input and output >= encoding.get_out_dim() - 3:
            weights.append(1.0)
            continue
        phase = math.asin(float(value.detach().clamp(-1, 1)))
        amplitude = abs(math.cos(phase)) if abs(math.cos(phase)) > 1e-9 else 1.0
        band = round(math.log2(slope / amplitude / (2 * math.pi)))
        assert 0 <= axis < 3
        weights.append(min(max(bands * step / total - band, 0.0), 1.0) if step < total else 1.0)
    return torch.tensor(weights)


@pytest.mark.parametrize("include_input", [True, False])
@pytest.mark.parametrize("step", [0, 130, 500, 999, 1000, 5000])
def test_frequency_mask_fits_nerfstudios_layout(step, include_input):
    torch.manual_seed(0)
    mask = frequency_mask(4, step, 1000, include_input=include_input)
    torch.testing.assert_close(mask, naive_mask(4, step, 1000, include_input), atol=1e-6, rtol=0)


def test_frequency_mask_hides_high_bands_first():
    mask = frequency_mask(10, 300, 1000)
    assert mask[:10].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert mask[-3:].tolist() == [1, 1, 1]
    assert frequency_mask(10, 350, 1000)[3] == pytest.approx(0.5)


def test_occlusion_counts_only_density_near_the_camera():
    density = torch.tensor([[2.0, 3.0, 5.0], [7.0, 11.0, 13.0]])
    starts = torch.tensor([[2.0, 2.4, 2.6], [3.0, 3.4, 3.6]])
    near = torch.tensor([[2.0], [3.0]])
    assert occlusion_loss(density, starts, near, 0.5) == pytest.approx((2 + 3 + 7 + 11) / 6)
    assert occlusion_loss(density, starts, near, 0.0) == 0


def test_total_variation_is_the_naive_sum_in_world_units(generator):
    grid, voxel = torch.randn(3, 4, 5, 2, generator=generator), torch.tensor([0.5, 0.25, 2.0])
    total, count = 0.0, 0
    for x in range(2):
        for y in range(3):
            for z in range(4):
                for c in range(2):
                    here = grid[x, y, z, c]
                    differences = [
                        (grid[x + 1, y, z, c] - here) / 0.5,
                        (grid[x, y + 1, z, c] - here) / 0.25,
                        (grid[x, y, z + 1, c] - here) / 2.0,
                    ]
                    total, count = total + math.sqrt(sum(float(d) ** 2 for d in differences)), count + 1
    assert total_variation(grid, voxel) == pytest.approx(total / count, rel=1e-4)


def test_gradient_of_the_total_variation(generator):
    grid = torch.randn(3, 4, 5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: 3 * total_variation(values, torch.tensor([0.5, 0.25, 2.0])), grid)


def test_total_variation_does_not_change_with_the_resolution():
    def ramp(n):
        line = torch.linspace(0, 3, n)
        return line[:, None, None, None].expand(n, n, n, 1), torch.full((3,), 1.5 / (n - 1))

    assert total_variation(*ramp(9)) == pytest.approx(2.0, rel=1e-4)  # rises by 3 over 1.5 units
    assert total_variation(*ramp(33)) == pytest.approx(2.0, rel=1e-4)


def test_flat_grids_have_no_variation_and_a_finite_gradient():
    grid = torch.full((4, 4, 4, 1), 0.7, requires_grad=True)
    value = total_variation(grid, torch.ones(3))
    value.backward()
    assert value < 1e-3 and torch.isfinite(grid.grad).all()


def test_field_variation_is_the_gradients_length(generator):
    slope = torch.tensor([1.0, -2.0, 2.0])
    positions = torch.rand(50, 3, generator=generator)
    found = field_variation(lambda x: torch.stack([x @ slope, 2 * (x @ slope)], dim=1), positions, 1e-2)
    assert found.tolist() == pytest.approx([3.0, 6.0], rel=1e-3)


def test_distortion_is_nerfstudios(generator):
    edges = torch.rand(6, 9, generator=generator).sort(dim=-1).values
    weights = torch.rand(6, 8, generator=generator) / 8
    expected = lossfun_distortion(edges, weights).mean()
    torch.testing.assert_close(distortion_loss(weights, edges[:, :-1], edges[:, 1:]), expected)


def test_distortion_is_least_when_density_is_compact():
    edges = torch.linspace(0, 1, 9)[None]
    spread, compact = torch.full((1, 8), 1 / 8), torch.zeros(1, 8)
    compact[0, 3] = 1
    assert distortion_loss(compact, edges[:, :-1], edges[:, 1:]) < 0.2 * distortion_loss(
        spread, edges[:, :-1], edges[:, 1:]
    )


def test_depth_smoothness_is_the_naive_mean_over_neighbours(generator):
    depth, alpha = 2 + torch.rand(2, 3, 3, generator=generator), 0.2 + 0.8 * torch.rand(2, 3, 3, generator=generator)
    surface = (depth - (1 - alpha) * 6.0) / alpha
    pairs = []
    for n in range(2):
        for i in range(3):
            for j in range(3):
                for k, m in ((i + 1, j), (i, j + 1)):
                    if k < 3 and m < 3:
                        height = abs(float(surface[n, i, j] - surface[n, k, m]))
                        pairs.append(float(alpha[n, i, j] * alpha[n, k, m]) * height)
    assert depth_smoothness(depth, alpha, 6.0) == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)


def test_depth_smoothness_leaves_silhouettes_and_planes_alone():
    depth = torch.full((1, 4, 4), 6.0)  # background
    depth[:, :, :2] = 3.0
    alpha = (depth < 6).float()
    assert depth_smoothness(depth, alpha, 6.0) == 0
    alpha = torch.ones_like(depth)
    assert depth_smoothness(depth, alpha, 6.0) > 0.4
