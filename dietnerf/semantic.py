"""Semantic consistency: renders from random poses should look, to a frozen image encoder, like the training views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from nerfstudio.cameras.cameras import Cameras
    from nerfstudio.cameras.rays import RayBundle

Feature = Literal["class_token", "embedding", "patches"]
PoseKind = Literal["published", "sphere", "interpolate"]


@dataclass(frozen=True)
class SemanticConfig:
    """The semantic loss and its schedule (Jain et al. 2021, section 4)."""

    weight: float = 0.0
    """Weight λ of the loss; 0 switches it off. Published: 0.1."""
    encoder: str = "tiny"
    """Image encoder: a CLIP by `common.clip.load_clip`'s names (tiny, a Hugging Face id, open_clip:ARCH/TAG), or
    timm:NAME or torchvision:NAME with random weights, or timm:NAME:PATH and torchvision:NAME:PATH with a file's."""
    feature: Feature = "class_token"
    """What is compared: the class token before the final layer norm and projection (the original's choice), the
    projected embedding, or patches by their best match. Only the pooled embedding exists for timm and torchvision."""
    random_weights: bool = False
    """Control: the encoder's weights are replaced by random ones of the same scale, and its gradient is scaled to the
    norm that the trained encoder's would have."""
    every: int = 10
    """Compute the loss every so many steps."""
    start: int = 0
    """First step with the loss."""
    end: int = 0
    """First step without it, from where on the images alone train (MSE fine-tuning); 0 means never."""
    resolution: int = 168
    """Side of the rendered view, in pixels; it is then resized to what the encoder sees."""
    targets: int = 1
    """Training views compared with in a step; 0 means all."""
    hinge: bool = False
    """Ask for no more similarity than the training views have among each other."""
    augment: bool = False
    """Zoom, shift and brighten the render at random before it is embedded, as in the encoder's own training."""
    poses: PoseKind = "published"
    """published (a sphere around the origin), sphere (ranges estimated from the training cameras) or interpolate
    (between three training cameras)."""
    text: str = ""
    """A description of the scene: its text embedding becomes one more target (CLIP encoders only)."""
    text_weight: float = 1.0
    """Weight of the text target relative to an image target."""
    chunk: int = 4096
    """Rays rendered at once; memory grows with it and not with the resolution."""


def semantic_consistency_loss(rendered: Float[Tensor, "e"], targets: Float[Tensor, "n e"]) -> Float[Tensor, "n"]:
    """-cos(φ(target), φ(render)) for each target, unweighted (Jain et al. 2021, equation 5)."""
    raise NotImplementedError


class Encoder:
    """φ: images in [0, 1] -> features, differentiable, from weights that never change. `load_encoder` makes one."""

    name: str
    size: int
    """Side of the square that it sees."""

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> dict[Feature, Tensor]:
        """Resized to the encoder's size with antialiasing; class_token (b, w), embedding (b, e), patches (b, n, w)."""
        raise NotImplementedError

    def embed_text(self, text: str) -> Float[Tensor, "1 e"]:
        """The text's embedding, to compare with "embedding". UserError where the encoder knows no text."""
        raise NotImplementedError


def load_encoder(name: str, *, random_weights: bool = False, device: str | torch.device = "auto") -> Encoder:
    """The encoder of `SemanticConfig.encoder`. Raises UserError for an unknown name or unusable weights."""
    raise NotImplementedError


class SemanticLoss:
    """The loss with its encoder, its embedded targets and its schedule; nothing of it is trained or checkpointed."""

    config: SemanticConfig

    def __init__(self, config: SemanticConfig, images: Float[Tensor, "n 3 h w"], device: torch.device) -> None:
        """Load the encoder and embed the training views, in [0, 1] over the scene's background, once."""
        raise NotImplementedError

    def __call__(self, rendered: Float[Tensor, "h w 3"], generator: torch.Generator | None = None) -> Float[Tensor, ""]:
        """Mean over this step's targets, unweighted."""
        raise NotImplementedError

    def similarity(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n"]:
        """Cosine similarity of images with every training view, without gradients."""
        raise NotImplementedError


def is_due(config: SemanticConfig, step: int) -> bool:
    """Whether `step` computes the semantic loss."""
    raise NotImplementedError


class ViewSampler:
    """Random views for the semantic loss: random pose, the training cameras' field of view, the whole frame."""

    def __init__(self, config: SemanticConfig, cameras: Cameras) -> None:
        """Args: cameras: the training cameras (never a held-out one), on any device."""
        raise NotImplementedError

    def camera(self, generator: torch.Generator | None = None) -> Cameras:
        """One camera (1,) of `resolution` x `resolution` pixels at a random pose."""
        raise NotImplementedError

    def __call__(self, generator: torch.Generator | None = None) -> RayBundle:
        """Its rays, shape (resolution, resolution): what a batch holds as "semantic_view"."""
        raise NotImplementedError
