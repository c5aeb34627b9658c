"""Semantic consistency: renders from random poses should look, to a frozen image encoder, like the training views."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from common.checks import UserError, require_at_least, require_one_of
from common.runtime import resolve_device
from dietnerf.poses import PUBLISHED_RANGES, estimate_ranges, sample_interpolated, sample_sphere

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
    balance: bool = False
    """The weight is the ratio of gradients: at each of its steps, the loss is scaled so that the norm of its gradient
    with respect to the field's parameters is so many times that of the images' squared error."""
    encoder: str = "tiny"
    """Image encoder: tiny, a Hugging Face id or directory, open_clip:ARCH/TAG-or-path, timm:NAME[/PATH] or
    torchvision:NAME[/PATH]."""
    feature: Feature = "class_token"
    """What is compared: the class token before the final layer norm and projection (the original's choice), the
    projected embedding, or patches, each with its best match. torchvision's classifiers have one feature only, the
    pooled embedding."""
    random_weights: bool = False
    """Control: the encoder's weights are replaced by random ones of the same scale, and its gradient is scaled to the
    norm that the trained encoder's has."""
    every: int = 10
    """Compute the loss every so many steps."""
    start: int = 0
    """First step with the loss."""
    end: int = 0
    """First step without it, from where on the images alone train (MSE fine-tuning); 0 means never."""
    resolution: int = 168
    """Side of the rendered view, in pixels, never more than what the encoder sees and it is then resized to."""
    targets: int = 1
    """Training views compared with in a step; 0 means all."""
    hinge: bool = False
    """Ask for no more similarity than the training views have among each other."""
    augment: bool = False
    """Zoom, shift, brighten and blur the render at random before it is embedded, as in the packaged encoder's own
    training."""
    poses: PoseKind = "published"
    """published (on a sphere around the origin, for Blender scenes; elsewhere as sphere), sphere (ranges estimated from
    the training cameras) or interpolate (between three training cameras)."""
    text: str = ""
    """A description of the scene: its text embedding becomes one more target (encoders with a text tower only)."""
    text_weight: float = 1.0
    """Weight of the text target relative to the image targets."""
    chunk: int = 4096
    """Rays rendered at once; memory grows with it and not with the resolution."""


def check_semantic_config(config: SemanticConfig) -> None:
    """Raise UserError when a value makes no sense."""
    require_at_least("semantic.weight", config.weight, 0)
    require_at_least("semantic.text_weight", config.text_weight, 0)
    for name in ("every", "resolution", "chunk"):
        require_at_least(f"semantic.{name}", getattr(config, name), 1)
    for name in ("start", "end", "targets"):
        require_at_least(f"semantic.{name}", getattr(config, name), 0)
    require_one_of("semantic.feature", config.feature, ("class_token", "embedding", "patches"))
    require_one_of("semantic.poses", config.poses, ("published", "sphere", "interpolate"))


def is_due(config: SemanticConfig, step: int) -> bool:
    """Whether `step` computes the semantic loss."""
    running = step >= config.start and (config.end == 0 or step < config.end)
    return config.weight > 0 and running and (step - config.start) % config.every == 0


def semantic_consistency_loss(rendered: Float[Tensor, " e"], targets: Float[Tensor, "n e"]) -> Float[Tensor, " n"]:
    """-cos(φ(target), φ(render)) for each target, unweighted (Jain et al. 2021, equation 5)."""
    return -F.cosine_similarity(rendered[None], targets, dim=-1)


def patch_consistency_loss(rendered: Float[Tensor, "p e"], targets: Float[Tensor, "n p e"]) -> Float[Tensor, " n"]:
    """The same for patches: minus the mean, over the render's patches, of the best cosine in the target.

    Views differ in where things are, so patches are matched by likeness and not by place.
    """
    cosines = torch.einsum("pe,nqe->npq", F.normalize(rendered, dim=-1), F.normalize(targets, dim=-1))
    return -cosines.amax(dim=-1).mean(dim=-1)


class Encoder:
    """φ: images in [0, 1] -> features, differentiable, from weights that never change. `load_encoder` makes one."""

    def __init__(
        self,
        name: str,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        features: Callable[[Tensor], Mapping[str, Tensor]],
        text: Callable[[str], Tensor] | None = None,
        *,
        device: torch.device,
    ) -> None:
        self.name, self.size, self.device = name, size, device
        self._mean = torch.tensor(mean, device=device)[:, None, None]
        self._std = torch.tensor(std, device=device)[:, None, None]
        self._features, self._text = features, text

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Mapping[str, Tensor]:
        """class_token (b, w), embedding (b, e) and, where the encoder has any, patches (b, n, w).

        Images of any size are squeezed to the encoder's square, bicubic with antialiasing; gradients flow.
        """
        pixels = images.to(self.device, torch.float32)
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True)
        return self._features((pixels - self._mean) / self._std)

    def feature_of(self, found: Mapping[str, Tensor], wanted: Feature) -> Feature:
        """Which of its features is meant.

        Raises:
            UserError: it has none such.
        """
        if wanted not in found:
            raise UserError(f"encoder {self.name!r} has no {wanted}: use embedding, or a CLIP.")
        return wanted

    def embed_text(self, text: str) -> Float[Tensor, "1 e"]:
        """The text's embedding, to compare with "embedding". UserError where the encoder knows no text."""
        if self._text is None:
            raise UserError(f"encoder {self.name!r} knows no text: use a CLIP for semantic.text, such as tiny.")
        return self._text(text)


def load_encoder(name: str, *, random_weights: bool = False, device: str | torch.device = "auto") -> Encoder:
    """The encoder of `SemanticConfig.encoder`.

    Args:
        random_weights: the same architecture, its weights redrawn (from a fixed seed) at the trained ones' scale.

    Raises:
        UserError: an unknown name, or weights that are missing, corrupt or of another architecture.
    """
    from common.clip import load_clip

    target = resolve_device(device)
    clip = load_clip(name, device=target)
    if random_weights:
        _draw_weights(clip.backbone)  # its one owner hides it from training, which this is not

    def features(pixels: Tensor) -> dict[str, Tensor]:
        found = clip.encode_image_features(pixels)._asdict()
        return {name: value for name, value in found.items() if clip.has_patches or name != "patches"}

    text = (lambda text: clip.encode_texts([text])) if clip.has_text else None
    return Encoder(name, clip.image_size, clip.mean, clip.std, features, text, device=target)


class SemanticLoss:
    """The loss with its encoder and embedded targets; nothing of it is trained or held by a checkpoint."""

    def __init__(
        self, config: SemanticConfig, images: Float[Tensor, "n 3 h w"], device: str | torch.device = "auto"
    ) -> None:
        """Load the encoder and embed the training views, in [0, 1] over the scene's background, once.

        Raises:
            UserError: an unusable encoder, a feature that it lacks, or a hinge with a single view.
        """
        check_semantic_config(config)
        self.config = config
        self.encoder = load_encoder(config.encoder, device=device)
        self._targets = _Targets(config, self.encoder, images)
        self._control: _Targets | None = None
        if config.random_weights:
            control = load_encoder(config.encoder, random_weights=True, device=device)
            self._control = _Targets(config, control, images)

    def __call__(
        self, rendered: Float[Tensor, "v h w 3"], generator: torch.Generator | None = None
    ) -> Float[Tensor, " v"]:
        """For each of several renders of one view, the mean over this step's targets, unweighted."""
        images = rendered.permute(0, 3, 1, 2)
        if self.config.augment:
            images = augment(images, generator)
        count = self.config.targets or self._targets.count
        chosen = torch.randperm(self._targets.count, generator=generator)[:count]
        if self._control is None:
            return self._targets.loss(images, chosen)
        return _with_gradient_norm(self._control, self._targets, images, chosen)

    @torch.no_grad()
    def similarity(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n"]:
        """Cosine similarity of images with every training view, by the trained encoder, without gradients."""
        return self._targets.similarity(self.encoder(images)[self._targets.feature])


@torch.no_grad()
def _draw_zoom(count: int, generator: torch.Generator | None) -> Float[Tensor, "v 2 3"]:
    """The same random zoom and shift for each of several renders of a view."""
    zoom = 0.72 + 0.4 * torch.rand(1, generator=generator)
    reach = 0.08 + 0.8 * (1 - zoom).clamp(min=0)
    shift = (2 * torch.rand(2, 1, generator=generator) - 1) * reach
    return torch.cat([torch.eye(2) * zoom, shift], dim=1).expand(count, 2, 3)


def augment(images: Float[Tensor, "v 3 h w"], generator: torch.Generator | None = None) -> Float[Tensor, "v 3 h w"]:
    """Random zoom and shift, blur, brightness and contrast, one choice for all images; no flips.

    These are the augmentations that the packaged CLIP was trained with, so it looks past them; an image made to please
    it must please it under all of them.
    """
    grid = F.affine_grid(_draw_zoom(len(images), generator).to(images), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    blur, gain, contrast, *tint = torch.rand(6, generator=generator).tolist()
    if blur < 0.25:
        small = F.interpolate(images, scale_factor=0.4, mode="area")
        images = torch.lerp(images, F.interpolate(small, size=images.shape[2:], mode="bilinear"), 4 * blur)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * (0.8 + 0.4 * contrast)
    gains = (0.8 + 0.4 * gain) * (0.95 + 0.1 * images.new_tensor(tint))
    return images * gains[:, None, None]


class ViewSampler:
    """Random views for the semantic loss: random pose, the training cameras' field of view, the whole frame.

    (The original's jittered grid of rays covers 84 or 56 percent of the frame; here every ray stands for a pixel of a
    coarser camera, and the pixels tile the frame.)
    """

    def __init__(self, config: SemanticConfig, cameras: Cameras, encoder_size: int | None = None) -> None:
        """Views for a loss.

        Args:
            cameras: the training cameras (n,), never a held-out one.
            encoder_size: side of what the encoder sees; more pixels than that are not rendered.
        """
        self.config = config
        self.resolution = min(config.resolution, encoder_size or config.resolution)
        self.cameras = cameras
        self.poses = cameras.camera_to_worlds.detach().cpu()
        if config.poses == "interpolate" and len(self.poses) < 2:
            raise UserError(f"{len(self.poses)} training view: interpolated poses need at least 2; use sphere.")
        self.ranges = estimate_ranges(self.poses) if config.poses == "sphere" else PUBLISHED_RANGES

    def camera(self, generator: torch.Generator | None = None) -> Cameras:
        """One camera (1,) of `resolution` x `resolution` pixels at a random pose; a wide frame is squeezed."""
        if self.config.poses == "interpolate":
            pose = sample_interpolated(self.poses, generator)
        else:
            pose = sample_sphere(self.ranges, generator)
        return square_camera(self.cameras, pose, self.resolution)

    def __call__(self, generator: torch.Generator | None = None) -> RayBundle:
        """Its rays, shape (resolution, resolution): what a batch holds as "semantic_view"."""
        return self.camera(generator).generate_rays(camera_indices=0, keep_shape=True)


def square_camera(cameras: Cameras, pose: Float[Tensor, "3 4"], resolution: int) -> Cameras:
    """A camera (1,) at `pose` with the frame of the first of `cameras` and `resolution` x `resolution` pixels."""
    from nerfstudio.cameras.cameras import Cameras

    across = resolution / cameras.width.flatten()[0].item()
    down = resolution / cameras.height.flatten()[0].item()
    return Cameras(
        camera_to_worlds=pose[None].to(cameras.camera_to_worlds),
        fx=cameras.fx.flatten()[:1] * across,
        fy=cameras.fy.flatten()[:1] * down,
        cx=cameras.cx.flatten()[:1] * across,
        cy=cameras.cy.flatten()[:1] * down,
        width=resolution,
        height=resolution,
        camera_type=cameras.camera_type.flatten()[:1],
    )


class _Targets:
    """The training views as one encoder sees them, with the loss against them."""

    def __init__(self, config: SemanticConfig, encoder: Encoder, images: Float[Tensor, "n 3 h w"]) -> None:
        self.encoder = encoder
        self.text_weight = config.text_weight
        self.text = encoder.embed_text(config.text)[0] if config.text else None
        with torch.no_grad():
            views = [encoder(image[None]) for image in images]  # one by one: many large views need not fit together
        if not views:
            raise UserError("no training views: the semantic loss needs at least one.")
        self.feature = encoder.feature_of(views[0], config.feature)
        self.features = torch.cat([view[self.feature] for view in views])
        self.count = len(self.features)
        self.ceilings = self.text_ceiling = None
        if config.hinge:
            if self.count < 2:
                raise UserError("semantic.hinge needs 2 training views at least: switch it off.")
            cosines = self.similarity(self.features)
            self.ceilings = (cosines.sum(dim=0) - cosines.diagonal()) / (self.count - 1)  # (n,)
            if self.text is not None:
                embeddings = torch.cat([view["embedding"] for view in views])
                self.text_ceiling = F.cosine_similarity(embeddings, self.text[None]).mean()

    def similarity(self, features: Tensor) -> Float[Tensor, "b n"]:
        compare = patch_consistency_loss if self.feature == "patches" else semantic_consistency_loss
        return -torch.stack([compare(one, self.features) for one in features])

    def loss(self, images: Float[Tensor, "v 3 h w"], chosen: Tensor) -> Float[Tensor, " v"]:
        found = self.encoder(images)
        cosines = self.similarity(found[self.feature])[:, chosen]  # (v, t)
        if self.ceilings is not None:
            cosines = torch.minimum(cosines, self.ceilings[chosen])
        loss = -cosines.mean(dim=1)
        if self.text is not None:
            likeness = F.cosine_similarity(found["embedding"], self.text[None])
            if self.text_ceiling is not None:
                likeness = torch.minimum(likeness, self.text_ceiling)
            loss = loss - self.text_weight * likeness
        return loss


def _with_gradient_norm(
    control: _Targets, trained: _Targets, images: Float[Tensor, "v 3 h w"], chosen: Tensor
) -> Float[Tensor, " v"]:
    """The control's loss, with a gradient of the control's direction and the trained encoder's norm, image by image."""
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        loss = control.loss(leaf, chosen)
        (direction,) = torch.autograd.grad(loss.sum(), leaf)
        (measure,) = torch.autograd.grad(trained.loss(leaf, chosen).sum(), leaf)
    norms = [gradient.flatten(1).norm(dim=1) for gradient in (measure, direction)]
    scale = norms[0] / norms[1].clamp(min=1e-20)
    step = ((images - leaf.detach()) * direction).flatten(1).sum(dim=1)  # zero, but for its gradient
    return loss.detach() + scale * step


@torch.no_grad()
def _draw_weights(network: nn.Module) -> None:
    """Replace weights by normal ones of the same standard deviation; biases become 0 and the scales of norms 1."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            if name.endswith("bias"):
                weight.zero_()
            elif weight.ndim == 1 and name == "weight":
                weight.fill_(1.0)
            else:
                noise = torch.randn(weight.shape, generator=generator) * weight.float().std(correction=0).cpu()
                weight.copy_(noise.to(weight))
