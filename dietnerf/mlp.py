"""The published MLP (Mildenhall et al. 2020, figure 7) as a nerfstudio Field, with frequency mask."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from nerfstudio.cameras.rays import RayBundle, RaySamples
from nerfstudio.field_components.encodings import NeRFEncoding
from nerfstudio.field_components.field_heads import FieldHeadNames
from nerfstudio.field_components.mlp import MLP
from nerfstudio.fields.base_field import Field
from nerfstudio.model_components.ray_samplers import LinearDisparitySampler, PDFSampler, UniformSampler
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from common.checks import require_at_least, require_one_of
from dietnerf.contraction import Contraction
from dietnerf.model import FewViewModel, FewViewModelConfig, samples_of
from dietnerf.regularizers import frequency_mask

SKIP_LAYER = 5
"""The density network sees the encoded position again at this layer."""


class PublishedField(Field):
    """Density network of `num_layers` with a skip, a linear feature, one colour layer that sees the direction.

    Nerfstudio's own NeRFField differs: encoding scaled by 2π with the bands ending one octave lower, the skip a layer
    earlier, softplus density, two colour layers and no linear feature.
    """

    def __init__(
        self,
        *,
        num_layers: int = 8,
        layer_width: int = 256,
        position_bands: int = 10,
        direction_bands: int = 4,
        use_view_directions: bool = True,
        density_activation: str = "relu",
        contraction: Contraction | None = None,
    ) -> None:
        super().__init__()
        require_at_least("num_layers", num_layers, 2)
        require_at_least("layer_width", layer_width, 2)
        require_at_least("position_bands", position_bands, 1)
        require_at_least("direction_bands", direction_bands, 1)
        require_one_of("density_activation", density_activation, ("relu", "softplus"))
        self.contraction = contraction
        self.position_encoding = _encoding(position_bands)
        self.direction_encoding = _encoding(direction_bands) if use_view_directions else None
        self.position_mask: Tensor
        self.direction_mask: Tensor
        self.register_buffer("position_mask", torch.ones(6 * position_bands + 3), persistent=False)
        self.register_buffer("direction_mask", torch.ones(6 * direction_bands + 3), persistent=False)
        self.mlp_base = MLP(
            in_dim=6 * position_bands + 3,
            num_layers=num_layers,
            layer_width=layer_width,
            skip_connections=(SKIP_LAYER,) if num_layers > SKIP_LAYER + 1 else None,
            out_activation=nn.ReLU(),
        )
        self.density = nn.Linear(layer_width, 1)
        self.feature = nn.Linear(layer_width, layer_width) if use_view_directions else None
        seen = layer_width + (6 * direction_bands + 3 if use_view_directions else 0)
        self.mlp_head = MLP(in_dim=seen, num_layers=2, layer_width=layer_width // 2, out_dim=3)
        self.activate = F.relu if density_activation == "relu" else F.softplus
        for module in self.modules():
            if isinstance(module, nn.Linear):  # Keras's defaults, which the method was published with
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def set_mask(self, step: int, total_steps: int) -> None:
        """Show the bands that the frequency mask shows at `step`."""
        for encoding, mask in (
            (self.position_encoding, self.position_mask),
            (self.direction_encoding, self.direction_mask),
        ):
            if encoding is not None:
                mask.copy_(frequency_mask(encoding.num_frequencies, step, total_steps))

    def get_density(self, ray_samples: RaySamples) -> tuple[Float[Tensor, "*b 1"], Float[Tensor, "*b w"]]:
        """Density per unit of length at the samples' middles, with what the colour needs."""
        positions = ray_samples.frustums.get_positions()
        if self.contraction is not None:
            positions = self.contraction(positions)
        return self.raw_density(encode(self.position_encoding, positions) * self.position_mask)

    def get_outputs(
        self, ray_samples: RaySamples, density_embedding: Tensor | None = None
    ) -> dict[FieldHeadNames, Tensor]:
        assert density_embedding is not None
        directions = None
        if self.direction_encoding is not None:
            directions = encode(self.direction_encoding, ray_samples.frustums.directions) * self.direction_mask
            directions = directions.expand(*density_embedding.shape[:-1], -1)
        return {FieldHeadNames.RGB: torch.sigmoid(self.raw_colour(density_embedding, directions))}

    def raw_density(self, encoded: Float[Tensor, "*b p"]) -> tuple[Float[Tensor, "*b 1"], Float[Tensor, "*b w"]]:
        """Density and hidden features from encoded positions."""
        hidden = self.mlp_base(encoded)
        return self.activate(self.density(hidden)), hidden

    def raw_colour(self, hidden: Float[Tensor, "*b w"], directions: Float[Tensor, "*b d"] | None) -> Tensor:
        """Colour before the sigmoid, from hidden features and encoded directions."""
        if self.feature is None or directions is None:
            return self.mlp_head(hidden)
        return self.mlp_head(torch.cat([self.feature(hidden), directions], dim=-1))


def encode(encoding: NeRFEncoding, x: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b d"]:
    """sin and cos of 2^k x without nerfstudio's factor of 2π, in its axis-major layout, and x itself last."""
    return torch.cat([encoding(x / (2 * math.pi)), x], dim=-1)


def _encoding(bands: int) -> NeRFEncoding:
    return NeRFEncoding(in_dim=3, num_frequencies=bands, min_freq_exp=0.0, max_freq_exp=bands - 1.0)


@dataclass
class DietNeRFModelConfig(FewViewModelConfig):
    """The published MLP (Jain et al. 2021, after Mildenhall et al. 2020)."""

    _target: type = field(default_factory=lambda: DietNeRFModel)
    num_coarse_samples: int = 64
    """Samples along a ray for the coarse network."""
    num_importance_samples: int = 128
    """More samples for the fine network; 0: no fine network."""
    num_layers: int = 8
    """Layers of the density network."""
    layer_width: int = 256
    """Their width; the colour layer has half of it."""
    position_bands: int = 10
    """Frequency bands of positions: 2^0 to 2^(bands - 1)."""
    direction_bands: int = 4
    """Frequency bands of view directions."""
    use_view_directions: bool = True
    """Colour depends on where it is seen from."""
    density_activation: Literal["relu", "softplus"] = "relu"
    """relu as published; softplus cannot die."""


class DietNeRFModel(FewViewModel):
    """Coarse and fine MLP with hierarchical sampling."""

    config: DietNeRFModelConfig

    def populate_modules(self) -> None:
        super().populate_modules()
        require_at_least("position_bands", self.config.position_bands, 1)
        require_at_least("num_coarse_samples", self.config.num_coarse_samples, 2)
        require_at_least("num_importance_samples", self.config.num_importance_samples, 0)
        self.field_coarse = self._make_field()
        sampler = UniformSampler if self.contraction is None else LinearDisparitySampler
        self.sampler_uniform = sampler(num_samples=self.config.num_coarse_samples)
        self.field_fine: PublishedField | None = None
        if self.config.num_importance_samples:
            self.field_fine = self._make_field()
            self.sampler_pdf = PDFSampler(num_samples=self.config.num_importance_samples, histogram_padding=1e-5)

    @property
    def field(self) -> PublishedField:
        """The network whose render counts."""
        return self.field_fine or self.field_coarse

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        fields = [self.field_coarse] + ([self.field_fine] if self.field_fine is not None else [])
        return super().get_param_groups() | {"fields": [parameter for one in fields for parameter in one.parameters()]}

    def update_to_step(self, step: int) -> None:
        """Move the frequency mask."""
        if self.config.regularizers.frequency_steps:
            for one in {self.field_coarse, self.field}:
                one.set_mask(step, self.config.regularizers.frequency_steps)

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Any]:  # type: ignore[override]
        samples = self.sampler_uniform(ray_bundle)
        found = self.field_coarse(samples)
        outputs, weights = self._composite(samples, found)
        if self.field_fine is not None:
            outputs = {f"{name}_coarse": value for name, value in outputs.items()}
            samples = self.sampler_pdf(ray_bundle, samples, weights)
            found = self.field_fine(samples)
            fine, weights = self._composite(samples, found)
            outputs |= fine
        if self.training:
            outputs["samples"] = samples_of(samples, found, weights, self.entry(ray_bundle))
        return outputs

    def _make_field(self) -> PublishedField:
        config = self.config
        return PublishedField(
            num_layers=config.num_layers,
            layer_width=config.layer_width,
            position_bands=config.position_bands,
            direction_bands=config.direction_bands,
            use_view_directions=config.use_view_directions,
            density_activation=config.density_activation,
            contraction=self.contraction,
        )


def simplified_nerf_config() -> DietNeRFModelConfig:
    """The *Simplified NeRF* baseline of the authors' released configurations: 6 bands, 128 samples, no fine network
    (trained with Adam at 5e-5)."""
    return DietNeRFModelConfig(position_bands=6, num_coarse_samples=128, num_importance_samples=0)
