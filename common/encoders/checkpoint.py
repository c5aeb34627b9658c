"""Weights from a file or a directory, without running any code that it may hold, held against what a model needs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checks import UserError, require_file
from common.pretrained import require_finite, require_plain

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


def split_name(name: str, prefix: str, known: Sequence[str]) -> tuple[str, Path | None]:
    """The model and the file in "PREFIX:NAME" or "PREFIX:NAME/PATH" ("PREFIX:NAME:PATH", in older runs, is the same).

    Raises:
        UserError: a model that is not one of `known` (without what follows its first point), or no such file.
    """
    rest = name.removeprefix(prefix)
    cut = min((place for place in (rest.find("/"), rest.find(":")) if place >= 0), default=len(rest))
    model, path = rest[:cut], rest[cut + 1 :]
    if model.partition(".")[0] not in known:
        near = ", ".join(difflib.get_close_matches(model.partition(".")[0], known)) or "such as resnet18"
        raise UserError(f"{name!r}: {prefix[:-1]} has no model {model!r}: did you mean {near}?")
    if not path:
        return model, None
    return model, require_file(Path(path).expanduser(), f"{prefix[:-1]} checkpoint")


def read_weights(path: Path, place: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a state dict that torch saved, by their names.

    Args:
        path: file; a training script's checkpoint may hold them as "state_dict" or "model".
        place: for messages.

    Raises:
        UserError: a file that is corrupt, or holds anything else.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            held: Any = load_file(path)
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
            for name in ("state_dict", "model"):
                held = held[name] if isinstance(held.get(name), dict) else held
        state = {str(key).removeprefix("module."): value for key, value in held.items()}
    except Exception as error:  # pickle, zip, safetensors and torch each have their own for a broken file
        raise UserError(
            f"{place}: {str(path)!r} is corrupt, cut short or holds more than weights: copy it again, or save the "
            f"model's state_dict() alone."
        ) from error
    require_plain(state, place)
    require_finite(state, place)
    return state


def put_in(network: nn.Module, state: dict[str, Tensor], place: str, *, spared: Sequence[str] = ()) -> None:
    """Put weights into a network, exactly: none missing, left over or of another size.

    Args:
        network: to be filled.
        state: weights by name.
        place: for messages.
        spared: beginnings of the names of the classifier's last layer, which may be left over.

    Raises:
        UserError: they do not fit.
    """
    needed = network.state_dict()
    fix = "use the weights of this model."
    for key in sorted(needed.keys() & state.keys()):
        if needed[key].shape != state[key].shape:
            raise UserError(
                f"{place}: {key} has shape {tuple(state[key].shape)} but the model needs {tuple(needed[key].shape)}: "
                f"the weights do not fit, {fix}"
            )
    missing = sorted(key for key in needed.keys() - state.keys() if not key.endswith("num_batches_tracked"))
    if missing:
        raise UserError(f"{place} lacks {missing[0]!r} and {len(missing) - 1} more: the weights do not fit, {fix}")
    extra = sorted(key for key in state.keys() - needed.keys() if not key.startswith(tuple(spared)))
    if extra:
        raise UserError(f"{place} holds {extra[0]!r} and {len(extra) - 1} more too many: they do not fit, {fix}")
    network.load_state_dict({key: state[key] for key in needed.keys() & state.keys()}, strict=False)


def put_in_order(network: nn.Module, path: Path, what: str) -> None:
    """Put a file's weights into a network that has them in the same order under other names.

    What the file has behind them, such as a classifier, is left out.

    Raises:
        UserError: they do not fit.
    """
    place = f"{what} {str(path)!r}"
    given = read_weights(require_file(path, what), place).values()
    put_in(network, dict(zip(network.state_dict(), given, strict=False)), place)


def load_weights(kind: Any, source: str, config: Any, what: str) -> tuple[Any, list[str]]:
    """A model of transformers in float32, and the names of weights that `source` lacks, sorted.

    Raises:
        UserError: a weight has another shape than `config` asks for.
    """
    model, report = kind.from_pretrained(
        source,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
    )
    for key, found, needed in sorted(report["mismatched_keys"]):
        raise UserError(
            f"{what} {source!r}: {key} has shape {tuple(found)} but its config.json asks for {tuple(needed)}: "
            f"use the config.json that the weights were saved with."
        )
    return model, sorted(report["missing_keys"])
