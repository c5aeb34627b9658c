"""torchvision's image classifiers without their last layer: a pooled embedding, and no patches."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from common.checks import UserError
from common.encoders.checkpoint import put_in, read_weights, split_name
from common.encoders.interface import TORCHVISION_PREFIX, Backbone, ImageFeatures, widths
from common.encoders.preprocess import Preprocess
from common.encoders.processors import IMAGENET_MEAN, IMAGENET_STD
from common.pretrained import require_finite
from common.runtime import fork_generators

CLASSES = 1000


class _Torchvision(Backbone):
    has_text = False
    has_patches = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> ImageFeatures:
        embedding = self.model(pixels)
        return ImageFeatures(embedding, embedding[:, None][:, :0], embedding)


def load_torchvision(name: str) -> tuple[Backbone, Preprocess]:
    """A classifier by "torchvision:NAME" (its weights fetched) or "torchvision:NAME/PATH"."""
    from torchvision import models

    arch, path = split_name(name, TORCHVISION_PREFIX, models.list_models(module=models))
    weights = models.get_model_weights(arch).DEFAULT
    state = None if path is None else read_weights(path, f"encoder {name!r}")
    extra = {"init_weights": True} if arch in ("inception_v3", "googlenet") and path is not None else {}
    with fork_generators(0):
        try:
            model = models.get_model(arch, weights=None if path else weights, **extra)
        except Exception as error:  # urllib's and torch's own for what is missing
            if path is not None:
                raise
            raise UserError(
                f"encoder {name!r}: its weights are not at hand and cannot be fetched ({type(error).__name__}): "
                f"give a file, {TORCHVISION_PREFIX}{arch}/PATH."
            ) from error
    last = _last_layer(model)
    parent, _, child = last.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    if state is not None:
        put_in(model, state, f"encoder {name!r}", spared=[f"{last}."])
    else:
        require_finite(model.state_dict(), f"encoder {name!r}")
    transform: Any = weights.transforms()
    [size], [resize] = transform.crop_size, transform.resize_size
    preprocess = Preprocess(
        size, IMAGENET_MEAN, IMAGENET_STD, transform.interpolation.value, resize=None if resize == size else resize
    )
    backbone = _Torchvision(model)
    backbone.width = backbone.patch_width = widths(backbone, size)[0]
    return backbone, preprocess


def _last_layer(network: nn.Module) -> str:
    """The name of the layer that gives the classes."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    return [name for name, layer in layers.items() if layer.weight.shape[0] == CLASSES][-1]
