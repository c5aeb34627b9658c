"""The arms of the experiments with fields: each is `dietnerf train` with other settings."""

from __future__ import annotations

from typing import Any

BARE: dict[str, Any] = dict(
    semantic_weight=0.0, density_variation=0.0, colour_variation=0.0, silhouette=0.0, min_views=1, prune=False
)
"""The grid without any prior: what no image contradicts may be there."""
RELU: dict[str, Any] = dict(method="mlp-small", semantic_weight=0.0, position_bands=10, density_activation="relu")
"""The small MLP with the published frequencies and activation, which degenerates on few views when trained for long."""
BALANCED: dict[str, Any] = dict(semantic_weight=1.0, semantic_balance=True, semantic_poses="published")
"""A semantic loss by the ratio of its gradient to that of the images, from poses all around."""
PHOTO: dict[str, Any] = dict(semantic_encoder="photo", semantic_feature="embedding")
"""The CLIP for photographs."""
IMAGENET: dict[str, Any] = dict(semantic_encoder="photo", semantic_feature="class_token")
"""The pooled features of its image tower, which is EfficientNet-Lite0 with ImageNet's weights."""
TINY: dict[str, Any] = dict(semantic_encoder="tiny", semantic_feature="class_token")
"""The CLIP of rendered toys."""
ARMS: dict[str, dict[str, Any]] = {
    "nerf": dict(method="mlp", semantic_weight=0.0),
    "simplified": dict(method="simplified", semantic_weight=0.0),
    "dietnerf": dict(method="mlp", semantic_weight=0.1, semantic_poses="published"),
    "dietnerf-random": dict(method="mlp", semantic_weight=0.1, semantic_poses="published", semantic_random=True),
    "mlp-small": dict(method="mlp-small", semantic_weight=0.0),
    "mlp-small-clip": dict(method="mlp-small", semantic_weight=0.1),
    "mlp-small-random": dict(method="mlp-small", semantic_weight=0.1, semantic_random=True),
    "mlp-small-clip-weak": dict(method="mlp-small", semantic_weight=0.01),
    "mlp-small-random-weak": dict(method="mlp-small", semantic_weight=0.01, semantic_random=True),
    "nerfacto": dict(method="nerfacto", semantic_weight=0.0),
    "nerfacto-clip": dict(method="nerfacto", semantic_weight=0.01, semantic_hinge=True, semantic_augment=True),
    "nerfacto-random": dict(
        method="nerfacto", semantic_weight=0.01, semantic_random=True, semantic_hinge=True, semantic_augment=True
    ),
    "grid": dict(semantic_weight=0.0),
    "grid-box": dict(semantic_weight=0.0, contraction="off", appearance="off", depth=0.0),
    "grid-space": dict(semantic_weight=0.0, contraction="on", appearance="off", depth=0.0),
    "grid-exposure": dict(semantic_weight=0.0, depth=0.0),
    "grid-poses": dict(semantic_weight=0.0, refine_poses=True),
    "grid-plain": dict(semantic_weight=0.0, density_variation=0.0, colour_variation=0.0),
    "grid-occlusion": dict(semantic_weight=0.0, occlusion=0.01),
    "grid-distortion": dict(semantic_weight=0.0, distortion=0.01),
    "grid-depth": dict(semantic_weight=0.0, depth_smoothness=0.01),
    "grid-background": dict(semantic_weight=0.0, background="random"),
    "grid-clip-strong": dict(semantic_weight=0.1),
    "grid-clip": dict(semantic_weight=0.01),
    "grid-clip-weak": dict(semantic_weight=0.001),
    "grid-hinge": dict(semantic_weight=0.01, semantic_hinge=True),
    "grid-augment": dict(semantic_weight=0.01, semantic_augment=True),
    "grid-hinge-augment": dict(semantic_weight=0.01, semantic_hinge=True, semantic_augment=True),
    "grid-text": dict(semantic_weight=0.01, semantic_feature="embedding"),
    "grid-random-weak": dict(semantic_weight=0.001, semantic_random=True),
    "grid-random": dict(semantic_weight=0.01, semantic_random=True),
    "grid-random-augment": dict(semantic_weight=0.01, semantic_random=True, semantic_hinge=True, semantic_augment=True),
    "grid-photo": BALANCED | PHOTO,
    "grid-photo-random": BALANCED | PHOTO | dict(semantic_random=True),
    "grid-photo-text": BALANCED | PHOTO,
    "grid-imagenet": BALANCED | IMAGENET,
    "grid-imagenet-random": BALANCED | IMAGENET | dict(semantic_random=True),
    "grid-tiny": BALANCED | TINY,
    "grid-tiny-random": BALANCED | TINY | dict(semantic_random=True),
    "mlp-relu": RELU,
    "mlp-relu-imagenet": RELU | BALANCED | IMAGENET,
    "mlp-relu-imagenet-random": RELU | BALANCED | IMAGENET | dict(semantic_random=True),
    "bare": BARE,
    "bare-photo": BARE | BALANCED | PHOTO,
    "bare-photo-random": BARE | BALANCED | PHOTO | dict(semantic_random=True),
    "bare-photo-text": BARE | BALANCED | PHOTO,
    "bare-imagenet": BARE | BALANCED | IMAGENET,
    "bare-imagenet-random": BARE | BALANCED | IMAGENET | dict(semantic_random=True),
    "bare-tiny": BARE | BALANCED | TINY,
    "bare-tiny-random": BARE | BALANCED | TINY | dict(semantic_random=True),
}
"""What each row of the table changes. Names with -random are the control: an encoder with random weights whose gradient
has the norm that the trained encoder's would have; in names that end in -text, --text becomes one more target."""
CONTROL = "-random"
"""What the name of an arm's control adds to its own."""
CHANGE = "+"
"""grid+lr=0.3+rays=4096 is the arm grid with these settings of dietnerf train."""
BASELINES = {
    "grid": "grid",
    "bare": "bare",
    "nerfacto": "nerfacto",
    "mlp-small": "mlp-small",
    "mlp-relu": "mlp-relu",
    "dietnerf": "nerf",
}
"""The row without a semantic loss that each row, by the beginning of its name, is compared with."""
