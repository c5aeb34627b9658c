"""Alignment against the original's numbers, plain formulas, and maps that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.checks import UserError
from recycle_gpt2.alignment import (
    AlignmentOptions,
    align,
    choose_options,
    fit_knn,
    fit_least_squares,
    fit_procrustes,
    held_out_error,
    neighbour_overlap,
)


@pytest.fixture(scope="module")
def golden(root):
    return load_file(root / "tests" / "golden" / "recycle_alignment.safetensors")


@pytest.fixture(scope="module")
def tables(golden):
    return golden["small_source"], golden["large_source"], golden["small_target"]


def test_knn_makes_no_second_copy_of_the_large_table(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    small, large, target = (torch.randn(rows, width, generator=generator) for rows, width in ((40, 6), (40, 9), (5, 6)))
    shapes, plain = [], torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda self: shapes.append(tuple(self.shape)) or plain(self))
    fit_knn(small, large, target, k=3, chunk=2)
    assert (2, 3, 9) in shapes and large.shape not in shapes


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lstsq", {"method": "least_squares"}),
        ("procrustes", {"method": "procrustes"}),
        ("knn1", {"method": "knn", "k": 1}),
        ("knn10", {"method": "knn", "k": 10}),
    ],
)
def test_golden(golden, tables, name, options):
    aligned = align(*tables, **options)
    assert aligned.dtype == torch.float32
    torch.testing.assert_close(aligned, golden[f"large_target.{name}"], atol=1e-4, rtol=0)


def test_least_squares_is_the_default(golden, tables):
    torch.testing.assert_close(align(*tables), golden["large_target.lstsq"], atol=1e-4, rtol=0)


def test_least_squares_is_numpys(tables):
    small, large, _ = (table.double() for table in tables)
    weights = torch.rand(len(small), dtype=torch.float64) + 0.1
    plain = np.linalg.lstsq(small.numpy(), large.numpy(), rcond=None)[0]
    np.testing.assert_allclose(fit_least_squares(small, large).numpy(), plain, atol=1e-9)
    root = weights.sqrt()[:, None]
    weighted = np.linalg.lstsq((root * small).numpy(), (root * large).numpy(), rcond=None)[0]
    np.testing.assert_allclose(fit_least_squares(small, large, weights=weights).numpy(), weighted, atol=1e-9)
    # Ridge is least squares with rows sqrt(λ) I, which should map to 0, below.
    penalty = 0.3 * float(small.square().sum(0).mean())
    below = np.sqrt(penalty) * np.eye(small.shape[1])
    ridge = np.linalg.lstsq(
        np.vstack([small.numpy(), below]), np.vstack([large.numpy(), np.zeros((16, 24))]), rcond=None
    )[0]
    np.testing.assert_allclose(fit_least_squares(small, large, ridge=0.3).numpy(), ridge, atol=1e-9)


def test_least_squares_without_rank(generator):
    small = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    small = torch.cat([small, small[:, :2]], dim=1)  # two columns twice
    large = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    least = np.linalg.lstsq(small.numpy(), large.numpy(), rcond=1e-10)[0]
    np.testing.assert_allclose(fit_least_squares(small, large).numpy(), least, atol=1e-8)


def test_procrustes_is_the_padded_one(tables):
    small, large, _ = (table.double() for table in tables)
    padded = torch.nn.functional.pad(small, (0, 8))
    u, s, v = torch.linalg.svd(padded.T @ large)
    rotation, scale = fit_procrustes(small, large)
    torch.testing.assert_close(rotation, (u @ v)[:16])
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(16, dtype=torch.float64))  # orthogonal
    assert scale == pytest.approx(float(s.sum() / small.square().sum()))


def test_known_maps_are_recovered(generator):
    small = torch.randn(80, 6, generator=generator, dtype=torch.float64)
    target = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    linear = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    shift = torch.randn(9, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(align(small, small @ linear, target), target @ linear)
    torch.testing.assert_close(align(small, small @ linear + shift, target, centre=True), target @ linear + shift)
    weights = torch.rand(80, generator=generator)
    found = align(small, small @ linear + shift, target, centre=True, weights=weights)
    torch.testing.assert_close(found, target @ linear + shift)
    orthogonal = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64)).Q[:6]
    rotated, expected = 3 * small @ orthogonal, 3 * target @ orthogonal
    torch.testing.assert_close(align(small, rotated, target, method="procrustes", scale=True), expected)
    torch.testing.assert_close(align(small, rotated, target, method="procrustes"), expected / 3)
    found = align(small, rotated + shift, target, method="procrustes", scale=True, centre=True, weights=weights)
    torch.testing.assert_close(found, expected + shift)
    # From the larger model to the smaller one, too: the small table is the wider one.
    narrow = torch.linalg.qr(torch.randn(6, 4, generator=generator, dtype=torch.float64)).Q
    assert align(small, small @ narrow, target, method="procrustes").shape == (20, 4)


def test_weights_choose_the_rows_that_count(generator):
    small = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    first, second = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    large = torch.cat([small[:30] @ first, small[30:] @ second])
    weights = torch.cat([torch.ones(30), torch.zeros(30)])
    torch.testing.assert_close(align(small, large, small, weights=weights), small @ first)


@pytest.mark.parametrize("k", [1, 3, 60])
def test_knn_is_the_plain_formula(generator, k):
    small, large = torch.randn(60, 4, generator=generator), torch.randn(60, 5, generator=generator)
    target = torch.randn(11, 4, generator=generator)
    target[3] = small[17]  # at distance 0
    expected = torch.empty(11, 5)
    for row, x in enumerate(target.double()):
        distance = (small.double() - x).norm(dim=-1)
        near = distance.argsort()[:k]
        weight = 1 / distance[near].clamp(min=1e-30)
        expected[row] = ((weight / weight.sum()) @ large[near].double()).float()
    for chunk in (1, 4, 100):
        torch.testing.assert_close(fit_knn(small, large, target, k=k, chunk=chunk), expected)
    assert torch.equal(fit_knn(small, large, target, k=k)[3], large[17])


def test_knn_never_holds_all_distances(monkeypatch, generator):
    seen = []
    plain = torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b: seen.append(len(a) * len(b)) or plain(a, b))
    fit_knn(torch.randn(50, 4), torch.randn(50, 5), torch.randn(1000, 4), chunk=64)
    assert len(seen) == 16 and max(seen) == 64 * 50


def test_held_out_error(generator):
    small = torch.randn(300, 4, generator=generator)
    linear = torch.randn(4, 6, generator=generator)
    assert held_out_error(small, small @ linear) < 1e-9
    noise = torch.randn(300, 6, generator=generator)
    assert 0.9 < held_out_error(small, noise) < 1.3
    # By hand: fitted on the rows that the same generator leaves.
    large = small @ linear + 0.5 * noise
    order = torch.randperm(300, generator=torch.Generator().manual_seed(5))
    held, fitted = order[:60], order[60:]
    mapping = np.linalg.lstsq(small[fitted].numpy(), large[fitted].numpy(), rcond=None)[0]
    error = np.square(small[held].numpy() @ mapping - large[held].numpy()).sum()
    spread = np.square(large[held].numpy() - large[fitted].numpy().mean(0)).sum()
    found = held_out_error(small, large, share=0.2, generator=torch.Generator().manual_seed(5))
    assert found == pytest.approx(error / spread, rel=1e-4)


def test_options_are_chosen_by_held_out_rows(generator):
    small = torch.randn(300, 4, generator=generator)
    linear, shift = torch.randn(4, 6, generator=generator), 5 * torch.randn(6, generator=generator)
    shifted = choose_options(small, small @ linear + shift)
    assert shifted.centre and shifted.ridge == 0 and not shifted.weighted and shifted.error < 1e-9
    plain = choose_options(small, small @ linear)
    assert plain == AlignmentOptions(error=plain.error)  # of equals the plainest
    wide = torch.randn(60, 50, generator=generator)  # hardly more rows than columns: only a penalty helps
    assert choose_options(wide, wide[:, :6] + 3 * torch.randn(60, 6, generator=generator)).ridge > 0
    scaled = choose_options(small, 4 * small, method="procrustes")
    assert scaled.scale and scaled.error < 1e-9
    counts = torch.cat([torch.full((150,), 1000.0), torch.ones(150)])
    large = torch.cat([small[:150] @ linear, small[150:] @ torch.randn(4, 6, generator=generator)])
    weighted = choose_options(small, large, counts=counts)
    assert weighted.weighted and weighted.error < 0.05
    assert weighted.arguments(counts)["weights"] is counts and plain.arguments(counts)["weights"] is None
    assert align(small, large, small, **weighted.arguments(counts)).shape == (300, 6)
    neighbours = choose_options(small, large, method="knn", k=3)
    assert neighbours.error == pytest.approx(held_out_error(small, large, method="knn", k=3))


def test_neighbour_overlap(generator):
    small_source, small_target = torch.randn(40, 4, generator=generator), torch.randn(15, 4, generator=generator)
    large_source, large_target = torch.randn(40, 6, generator=generator), torch.randn(15, 6, generator=generator)

    def plain(queries, table, k, own):
        found = []
        for row, x in enumerate(queries):
            distance = (table - x).norm(dim=-1)
            if own:
                distance[row] = torch.inf
            found.append(set(distance.argsort()[:k].tolist()))
        return found

    for own, tables in ((True, {}), (False, {"small_source": small_source, "large_source": large_source})):
        before = plain(small_target, small_target if own else small_source, 5, own)
        after = plain(large_target, large_target if own else large_source, 5, own)
        expected = np.mean([len(a & b) / 5 for a, b in zip(before, after, strict=True)])
        assert neighbour_overlap(small_target, large_target, k=5, chunk=4, **tables) == pytest.approx(expected)
    orthogonal = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q[:4]
    assert neighbour_overlap(small_target, small_target @ orthogonal, k=5) == 1


@pytest.mark.usefixtures("any_shape")
def test_bad_input(tables):
    small, large, target = tables
    with pytest.raises(UserError, match=r"\(600, 16\) and large_source \(599, 24\).*one English vocabulary"):
        align(small, large[:-1], target)
    with pytest.raises(UserError, match=r"\(200, 15\).*16 wide"):
        align(small, large, target[:, :15])
    for place, name in enumerate(("small_source", "large_source", "small_target")):
        spoilt = [table.clone() for table in tables]
        spoilt[place][3, 2] = float("nan")
        with pytest.raises(UserError, match=f"{name} holds NaN"):
            align(*spoilt)
    with pytest.raises(UserError, match="method is 'linear': choose one of least_squares"):
        align(*tables, method="linear")
    with pytest.raises(UserError, match="k is 0"):
        align(*tables, method="knn", k=0)
    with pytest.raises(UserError, match="k is 601: use 1 to 600"):
        align(*tables, method="knn", k=601)
    for method, option in (
        ("knn", {"ridge": 0.1}),
        ("knn", {"centre": True}),
        ("least_squares", {"k": 3}),
        ("least_squares", {"scale": True}),
        ("procrustes", {"ridge": 0.1}),
    ):
        with pytest.raises(UserError, match=f"method is '{method}', which has no {next(iter(option))}"):
            align(*tables, method=method, **option)
    with pytest.raises(UserError, match="ridge is -1"):
        align(*tables, ridge=-1)
    with pytest.raises(UserError, match=r"weights have shape \(5,\): give 600"):
        align(*tables, weights=torch.ones(5))
    with pytest.raises(UserError, match="share is 0.0001"):
        held_out_error(small, large, share=0.0001)
    with pytest.raises(UserError, match="k is 200: use 1 to 199"):
        neighbour_overlap(target, target, k=200)
    with pytest.raises(UserError, match="200 rows before and 199 after"):
        neighbour_overlap(target, target[:-1])
