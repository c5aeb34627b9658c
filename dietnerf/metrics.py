"""How good rendered views are: PSNR, SSIM, and where their weights are at hand LPIPS, FID, KID and a second encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from common.checks import UserError, require_file

VGG_FILE = "vgg16-397923af.pth"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


WIDEST_GAP = 6.0
"""Training and held-out PSNR that differ by more decibels are worth a warning."""


@dataclass(frozen=True)
class MetricsConfig:
    """Weights of the metrics that need some; without them these metrics are listed as not measured."""

    vgg: Path | None = None
    """torchvision's VGG-16 weights (vgg16-397923af.pth) for LPIPS; looked for in torch's cache when not given."""
    inception: Path | None = None
    """torch-fidelity's Inception weights for FID and KID; looked for in torch's cache when not given."""
    second_encoder: str = ""
    """Image encoder that was not in the loss: tiny, a Hugging Face id or directory, open_clip:ARCH/TAG-or-path,
    timm:NAME[/PATH] or torchvision:NAME[/PATH]."""


@dataclass
class Scores:
    """Scores of one run, and why the others are missing."""

    values: dict[str, float] = field(default_factory=dict)
    per_view: list[dict[str, float | int]] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)


def psnr(image: Float[Tensor, "h w 3"], truth: Float[Tensor, "h w 3"], mask: Tensor | None = None) -> float:
    """-10 log10 of the mean squared error, over the pixels that `mask` (h, w) or (h, w, 1) selects."""
    error = (image.clamp(0, 1) - truth).double().square()
    if mask is not None:
        error = error[mask.reshape(error.shape[:2])]
    mean = float(error.mean())
    return math.inf if mean == 0 else -10 * math.log10(mean)


def overfitted(training: float, held_out: float) -> str | None:
    """What is wrong where a field knows its training views far better than held-out ones, and the cure; None: nothing.

    Args:
        training, held_out: PSNR.
    """
    if not training - held_out > WIDEST_GAP:
        return None
    return (
        f"PSNR is {training:.1f} on training views but {held_out:.1f} on held-out ones: add photographs between those "
        f"that there are, check the poses, or give a box around what matters (--box-center, --box-size)."
    )


def ssim(image: Float[Tensor, "h w 3"], truth: Float[Tensor, "h w 3"], *, convention: str = "standard") -> float:
    """Structural similarity (Wang et al. 2004) in [-1, 1].

    Args:
        convention: "standard": 11 x 11 Gaussian window of sigma 1.5, population covariance. "paper": as the original
            DietNeRF (and pixelNeRF) computes it, scikit-image's default: 7 x 7 uniform window, sample covariance.

    Raises:
        UserError: images smaller than the window.
    """
    from skimage.metrics import structural_similarity

    least = 7 if convention == "paper" else 11
    if min(image.shape[:2]) < least:
        raise UserError(f"SSIM needs images of at least {least} pixels: these are {tuple(image.shape[:2])}.")
    settings: dict[str, Any] = (
        {} if convention == "paper" else dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    )
    a, b = (x.double().clamp(0, 1).cpu().numpy() for x in (image, truth))
    return float(structural_similarity(a, b, channel_axis=-1, data_range=1.0, **settings))


def lpips_network(weights: Path) -> nn.Module:
    """LPIPS (Zhang et al. 2018) on VGG-16: its linear heads come with torchmetrics, the network from `weights`."""
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    require_file(weights, "VGG weights")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        assert isinstance(state, dict)
    except Exception as error:  # whatever unpickling another file comes upon
        raise UserError(f"VGG weights {str(weights)!r} cannot be read: give torchvision's {VGG_FILE}.") from error
    network = _NoTrainLpips(net="vgg", pnet_rand=True)
    with torch.no_grad():
        for name, parameter in network.net.named_parameters():
            layer = name.split(".", 1)[1]  # slice2.5.weight -> 5.weight
            if f"features.{layer}" not in state:
                raise UserError(f"VGG weights {str(weights)!r} lack features.{layer}: give torchvision's {VGG_FILE}.")
            parameter.copy_(state[f"features.{layer}"])
    return network.eval()


@torch.no_grad()
def lpips(
    network: nn.Module, image: Float[Tensor, "h w 3"], truth: Float[Tensor, "h w 3"], *, convention: str = "standard"
) -> float:
    """LPIPS of one view. "paper" feeds values in [0, 1] as the original does; "standard" maps them to [-1, 1]."""
    a, b = (x.float().clamp(0, 1).permute(2, 0, 1)[None].cpu() for x in (image, truth))
    return float(network(a, b, normalize=convention != "paper"))


def farthest_views(held_out: Float[Tensor, "n 3"], training: Float[Tensor, "m 3"], share: float = 0.25) -> list[int]:
    """The `share` of the held-out cameras that are farthest from their nearest training camera, farthest first."""
    nearest = torch.cdist(held_out.double(), training.double()).min(dim=1).values
    count = max(1, round(share * len(held_out)))
    return nearest.argsort(descending=True, stable=True)[:count].tolist()


@torch.no_grad()
def encoder_similarity(encoder: Any, images: Sequence[Tensor], truths: Sequence[Tensor]) -> list[float]:
    """Cosine similarity of the embeddings of each render and its truth, by a `FrozenCLIP`."""
    found = []
    for image, truth in zip(images, truths, strict=True):
        pixels = torch.stack((image, truth)).clamp(0, 1).permute(0, 3, 1, 2).to(encoder.device)
        a, b = encoder.encode_images(encoder.preprocess(pixels))
        found.append(float(torch.cosine_similarity(a, b, dim=0)))
    return found


def score_views(
    images: Sequence[Float[Tensor, "_ _ 3"]],
    truths: Sequence[Float[Tensor, "_ _ 3"]],
    alphas: Sequence[Float[Tensor, "_ _ 1"] | None],
    held_out_positions: Float[Tensor, "n 3"],
    training_positions: Float[Tensor, "m 3"],
    *,
    convention: str = "standard",
    masks: Sequence[Bool[Tensor, "_ _ 1"] | None] = (),
    config: MetricsConfig | None = None,
    loss_encoder: str = "",
) -> Scores:
    """Every metric that can be had, as means over the views, and each view's own.

    What `masks` hide counts in no PSNR; to the other metrics, which look at neighbourhoods, it is shown as rendered.
    """
    config = config or MetricsConfig()
    scores = Scores()
    masks = masks or [None] * len(images)
    truths = [
        truth if mask is None else torch.where(mask, truth, image.clamp(0, 1))
        for image, truth, mask in zip(images, truths, masks, strict=True)
    ]
    if not images:
        raise UserError("0 views are rendered: give at least 1 to score.")
    network = _lpips_or_reason(config, scores)
    for number, (image, truth, alpha, mask) in enumerate(zip(images, truths, alphas, masks, strict=True)):
        row: dict[str, float | int] = {"view": number, "psnr": psnr(image, truth, mask)}
        row["ssim"] = ssim(image, truth, convention=convention)
        if alpha is not None:
            foreground = alpha > 0.5 if mask is None else (alpha > 0.5) & mask
            if bool(foreground.any()):
                row["psnr_foreground"] = psnr(image, truth, foreground)
        if network is not None:
            row["lpips"] = lpips(network, image, truth, convention=convention)
        scores.per_view.append(row)
    if config.second_encoder:
        from common.clip import load_clip

        if config.second_encoder == loss_encoder:
            scores.not_measured["similarity"] = f"encoder {loss_encoder!r} was in the loss: name another"
        else:
            encoder = load_clip(config.second_encoder, device="cpu")
            for row, value in zip(scores.per_view, encoder_similarity(encoder, images, truths), strict=True):
                row["similarity"] = value
    else:
        scores.not_measured["similarity"] = "no second encoder is named (--second-encoder)"
    for name in ("psnr", "ssim", "psnr_foreground", "lpips", "similarity"):
        values = [float(row[name]) for row in scores.per_view if name in row]
        if values:
            scores.values[name] = sum(values) / len(values)
    if "psnr_foreground" not in scores.values:
        scores.not_measured["psnr_foreground"] = "the images have no alpha"
    far = farthest_views(held_out_positions, training_positions)
    scores.values["psnr_farthest"] = sum(float(scores.per_view[i]["psnr"]) for i in far) / len(far)
    _distances(images, truths, config, scores)
    return scores


def _cached(name: str) -> Path | None:
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    return path if path.is_file() else None


def _lpips_or_reason(config: MetricsConfig, scores: Scores) -> nn.Module | None:
    weights = config.vgg or _cached(VGG_FILE)
    if weights is None:
        scores.not_measured["lpips"] = f"{VGG_FILE} is not in torch's cache: give --vgg"
        return None
    return lpips_network(weights)


def _distances(images: Sequence[Tensor], truths: Sequence[Tensor], config: MetricsConfig, scores: Scores) -> None:
    """FID (Heusel et al. 2017) and KID (Binkowski et al. 2018) between renders and truth."""
    weights = config.inception or _cached(INCEPTION_FILE)
    if weights is None:
        for name in ("fid", "kid"):
            scores.not_measured[name] = f"{INCEPTION_FILE} is not in torch's cache: give --inception"
        return
    if len(images) < 2:
        for name in ("fid", "kid"):
            scores.not_measured[name] = "it compares distributions: score 2 views at least"
        return
    from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
    from torchmetrics.image.kid import KernelInceptionDistance

    require_file(weights, "Inception weights")
    try:
        network = NoTrainInceptionV3(
            name="inception-v3-compat", features_list=["2048"], feature_extractor_weights_path=str(weights)
        )
    except Exception as error:  # whatever unpickling another file comes upon
        raise UserError(f"Inception weights {str(weights)!r} cannot be read: give {INCEPTION_FILE}.") from error
    network.num_features = 2048
    measures = {
        "fid": FrechetInceptionDistance(feature=network, normalize=True),
        "kid": KernelInceptionDistance(feature=network, subset_size=min(50, len(images)), subsets=20, normalize=True),
    }
    for name, measure in measures.items():
        for pictures, real in ((truths, True), (images, False)):
            for picture in pictures:
                eight_bit = (picture.clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(2, 0, 1)[None].cpu()
                measure.update(eight_bit, real=real)
        result = measure.compute()
        scores.values[name] = float(result[0] if isinstance(result, tuple) else result)
