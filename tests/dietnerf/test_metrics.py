"""Metrics beside plain formulas, conventions apart, and what is missing named."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from common.checks import UserError
from dietnerf.metrics import (
    MetricsConfig,
    encoder_similarity,
    farthest_views,
    lpips,
    lpips_network,
    psnr,
    score_views,
    ssim,
)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(20, 24, 3, generator=generator)
    return (truth + 0.1 * torch.randn(20, 24, 3, generator=generator)).clamp(0, 1), truth


def test_psnr(pair):
    image, truth = pair
    assert psnr(image, truth) == pytest.approx(-10 * math.log10(float((image - truth).square().mean())), abs=1e-5)
    assert psnr(truth, truth) == math.inf
    mask = torch.zeros(20, 24, dtype=torch.bool)
    mask[3, 4] = mask[5, 6] = True
    error = torch.stack((image[3, 4] - truth[3, 4], image[5, 6] - truth[5, 6])).square().mean()
    assert psnr(image, truth, mask[..., None]) == pytest.approx(-10 * math.log10(float(error)), abs=1e-5)
    assert psnr(truth + 3, truth.new_ones(20, 24, 3)) == math.inf  # a render is clipped to what can be shown


def naive_ssim(a: np.ndarray, b: np.ndarray, window: np.ndarray, *, sample: bool) -> float:
    """Wang et al. 2004, equation 13, pixel by pixel, where the whole window fits."""
    size, values = len(window), []
    count = size * size
    for c in range(3):
        for y in range(a.shape[0] - size + 1):
            for x in range(a.shape[1] - size + 1):
                p, q = a[y : y + size, x : x + size, c], b[y : y + size, x : x + size, c]
                mp, mq = (window * p).sum(), (window * q).sum()
                factor = count / (count - 1) if sample else 1.0
                vp, vq = ((window * p * p).sum() - mp**2) * factor, ((window * q * q).sum() - mq**2) * factor
                cov = ((window * p * q).sum() - mp * mq) * factor
                values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return float(np.mean(values))


def test_ssim_conventions(pair):
    image, truth = (x.double().numpy() for x in pair)
    flat = np.full((7, 7), 1 / 49)
    assert ssim(*pair, convention="paper") == pytest.approx(naive_ssim(image, truth, flat, sample=True), abs=1e-6)
    bell = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    bell = np.outer(bell, bell) / bell.sum() ** 2
    assert ssim(*pair) == pytest.approx(naive_ssim(image, truth, bell, sample=False), abs=1e-5)
    assert ssim(pair[1], pair[1]) == pytest.approx(1)
    with pytest.raises(UserError, match="at least 11 pixels"):
        ssim(torch.rand(8, 8, 3), torch.rand(8, 8, 3))


def test_farthest_views():
    training = torch.tensor([[0.0, 0, 0], [10, 0, 0]])
    held_out = torch.tensor([[1.0, 0, 0], [5, 0, 0], [9, 0, 0], [20, 0, 0]])
    assert farthest_views(held_out, training) == [3]
    assert farthest_views(held_out, training, share=0.5) == [3, 1]


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    from torchvision.models import vgg16

    torch.manual_seed(0)
    state = {k: v for k, v in vgg16(weights=None).state_dict().items() if k.startswith("features")}
    path = tmp_path_factory.mktemp("vgg") / "vgg16-397923af.pth"
    torch.save(state, path)
    return path


@pytest.mark.slow
def test_lpips_reads_torchvisions_weights(vgg_file, tmp_path, pair):
    network = lpips_network(vgg_file)
    state = torch.load(vgg_file, weights_only=True)
    loaded = dict(network.net.named_parameters())
    assert torch.equal(loaded["slice5.28.weight"], state["features.28.weight"]) and len(loaded) == 26
    image, truth = (x.repeat(2, 2, 1) for x in pair)
    assert lpips(network, truth, truth) == pytest.approx(0, abs=1e-7)
    assert lpips(network, image, truth) > 0
    assert lpips(network, image, truth, convention="paper") != pytest.approx(lpips(network, image, truth), rel=1e-3)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="lack features.0.weight"):
        lpips_network(tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not exist"):
        lpips_network(tmp_path / "missing.pth")


def test_scores_name_what_is_not_measured(pair, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    image, truth = pair
    alpha = torch.zeros(20, 24, 1)
    alpha[:10] = 1
    held_out, training = torch.tensor([[0.0, 0, 1], [0, 0, 5]]), torch.zeros(2, 3)
    scores = score_views([image, truth * 0.9], [truth, truth], [alpha, alpha], held_out, training)
    expected = [psnr(image, truth), psnr(truth * 0.9, truth)]
    assert scores.values["psnr"] == pytest.approx(sum(expected) / 2)
    assert scores.values["psnr_farthest"] == pytest.approx(expected[1])
    assert scores.per_view[0]["psnr_foreground"] == pytest.approx(psnr(image[:10], truth[:10]))
    assert set(scores.not_measured) == {"lpips", "fid", "kid", "similarity"}
    bare = score_views([image], [truth], [None], held_out[:1], training)
    assert bare.not_measured["psnr_foreground"] == "the images have no alpha" and "psnr_foreground" not in bare.values
    same = score_views(
        [image],
        [truth],
        [None],
        held_out[:1],
        training,
        config=MetricsConfig(second_encoder="tiny"),
        loss_encoder="tiny",
    )
    assert "was in the loss" in same.not_measured["similarity"]


def test_what_a_mask_hides_is_not_scored(pair, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    image, truth = pair
    mask = torch.ones(20, 24, 1, dtype=torch.bool)
    mask[:, :9] = False
    alpha = torch.ones(20, 24, 1)
    passer_by = torch.where(mask, truth, 1 - truth)
    places = torch.ones(1, 3), torch.zeros(2, 3)
    scores = score_views([image], [passer_by], [alpha], *places, masks=[mask]).values
    assert scores["psnr"] == scores["psnr_foreground"] == pytest.approx(psnr(image[:, 9:], truth[:, 9:]))
    assert scores["ssim"] == pytest.approx(ssim(image, torch.where(mask, truth, image)))
    assert score_views([image], [passer_by], [alpha], *places).values["psnr"] < scores["psnr"] - 1


def test_distances_of_distributions_need_two_views(pair, tmp_path):
    image, truth = pair
    (tmp_path / "inception.pth").write_bytes(b"never read")
    config = MetricsConfig(inception=tmp_path / "inception.pth")
    scores = score_views([image], [truth], [None], torch.ones(1, 3), torch.zeros(2, 3), config=config)
    for name in ("fid", "kid"):
        assert "score 2 views at least" in scores.not_measured[name] and name not in scores.values


def test_encoder_similarity(pair):
    from common.clip import load_clip

    encoder = load_clip("tiny", device="cpu")
    image, truth = pair
    values = encoder_similarity(encoder, [truth, image], [truth, truth])
    assert values[0] == pytest.approx(1, abs=1e-5) and -1 <= values[1] < 1
