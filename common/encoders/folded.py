"""A copy of a convolutional tower that is faster on a CPU: batch norms folded into convolutions, channels last."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

Model = TypeVar("Model", bound=nn.Module)
_COPIES: WeakKeyDictionary[nn.Module, nn.Module | None] = WeakKeyDictionary()


def folded(model: Model, run: Callable[[Model], Any]) -> Model | None:
    """`model` with every batch norm that directly follows a convolution inside that convolution, and channels last.

    Made once for each model, in evaluation mode, on the CPU, for inference: the same function up to rounding, at half
    the time. Weights that are changed afterwards are not seen.

    Args:
        model: in evaluation mode.
        run: calls a model on some image, so that one sees what follows what.

    Returns:
        The copy, or None where there is nothing to fold.
    """
    if model not in _COPIES:
        has_norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        _COPIES[model] = _fold(copy.deepcopy(model), run) if has_norms else None
    return _COPIES[model]  # type: ignore[return-value]


def _fold(model: Model, run: Callable[[Model], Any]) -> Model | None:
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensor is kept, or another could get its id
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after_conv(module: nn.Module, given: Any, output: Tensor) -> None:
        made[id(output)] = (module, output)  # type: ignore[assignment]

    def before_norm(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if id(given[0]) in made:
            pairs.append((made.pop(id(given[0]))[0], module))  # type: ignore[arg-type]

    hooks = [m.register_forward_hook(after_conv) for m in model.modules() if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(before_norm) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        run(model)
    for hook in hooks:
        hook.remove()
    if not pairs or len({id(conv) for conv, _ in pairs}) < len(pairs):  # a layer that is used twice
        return None
    norms = {id(norm) for _, norm in pairs}
    for conv, norm in pairs:
        assert norm.running_mean is not None and norm.running_var is not None  # in evaluation mode
        conv.weight, bias = fuse_conv_bn_weights(  # type: ignore[assignment]
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.bias = bias
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if id(child) in norms:  # timm's hold the activation that comes after
                setattr(module, name, getattr(child, "act", nn.Identity()))
    return model.to(memory_format=torch.channels_last).requires_grad_(False)
