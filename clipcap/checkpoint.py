"""A captioner's files: found, fetched, put in their place whole, and compared with what its config asks for."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import cached_file

from common.checks import UserError
from common.files import move_into
from common.pretrained import optional_file

if TYPE_CHECKING:
    from clipcap.config import ClipCapConfig

OLD_WEIGHTS = re.compile(r"(model(-\d{5}-of-\d{5})?|confidence)\.safetensors")
"""Of an earlier captioner, with what was calibrated for it."""


def take_places(source: Path, target: Path) -> None:
    """Move all files of `source` to `target`, config.json last, without which nothing is loaded from there.

    Weights of an earlier captioner that would be loaded instead of the new ones or beside them, or never, go.
    """
    for file in target.iterdir():
        if OLD_WEIGHTS.fullmatch(file.name) and not (source / file.name).exists():
            file.unlink()
    move_into(source, target, last="config.json")


def local_file(source: str, name: str, hub: dict[str, Any]) -> Path:
    """A file of a captioner, fetched when the captioner is on the hub."""
    if os.path.isdir(source):
        return Path(source) / name
    return Path(cached_file(source, name, **hub))


def has_tokenizer(source: str, hub: dict[str, Any]) -> bool:
    return any(optional_file(source, name, hub) for name in ("tokenizer.json", "vocab.json"))


def require_fit(source: str, info: dict[str, Any]) -> None:
    """Raise UserError when the weights in a file are not those that its config asks for."""
    for name, *shapes in sorted(info["mismatched_keys"]):
        found, wanted = (tuple(shape) for shape in shapes)
        raise UserError(
            f"{source!r}: {name} has shape {found} but its config.json asks for {wanted}: "
            f"use the config.json that was saved with these weights."
        )
    for problem, keys in (("lacks", info["missing_keys"]), ("has unknown weights", info["unexpected_keys"])):
        if keys:
            raise UserError(f"{source!r} {problem} {sorted(keys)[0]}: use the config.json that was saved with it.")


def one_dtype(dtype: Any, torch_dtype: Any) -> Any:
    """The dtype under either of its two names.

    Raises:
        UserError: both are given, and differ.
    """
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise UserError(f"dtype is {dtype} and torch_dtype {torch_dtype}: give one of them.")
    return torch_dtype if dtype is None else dtype


def resolve_dtype(dtype: torch.dtype | str | None, config: ClipCapConfig) -> torch.dtype:
    """A dtype as from_pretrained takes it: "auto" is that of the file, None float32."""
    name = config.dtype if dtype == "auto" else dtype
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else name or torch.float32
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype is {dtype!r}: use float32, bfloat16 or float16.")
    return found
