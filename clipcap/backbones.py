"""Where a captioner's backbones are: named in its config relative to its directory, or copied into it.

A name that begins with ./ or ../ is one of a place relative to the captioner's directory; others are packaged names,
hub ids and, in older captioners, absolute paths. A path may also stand after open_clip:, timm: or torchvision:.
"""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import gpt2 as gpt2_backbones
from common.checks import UserError
from common.encoders.interface import PACKAGED as PACKAGED_CLIPS
from common.encoders.interface import PREFIXES
from common.gpt2 import load_gpt2
from common.pretrained import locate

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from clipcap.config import ClipCapConfig

RELATIVE = ("./", "../")
BACKBONES = {"clip": PACKAGED_CLIPS, "gpt2": gpt2_backbones.PACKAGED}
"""Fields of a captioner's config that name one, which is also the folder that it is bundled in; and packaged names."""
SIZES = ("n_embd", "n_layer", "n_head", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Names of a decoder's sizes, in the families that use them."""
SAFE_WEIGHTS, OTHER_WEIGHTS = (".safetensors",), (".bin",)
BESIDE = (".json", ".txt", ".model", ".jinja", ".md")
"""Endings of what else belongs to a backbone: configuration, tokenizer, licence."""


def absolute(name: str) -> str:
    """A backbone's name as it will still be right in another working directory."""
    head, path = _split(name)
    place = Path(path).expanduser()
    if place.is_file() if head else (name not in gpt2_backbones.PACKAGED and place.is_dir()):
        return head + str(place.resolve())
    return name


def located(config: ClipCapConfig, source: str, **hub: Any) -> ClipCapConfig:
    """The config of a captioner at `source`, a directory or hub id, with absolute paths for relative ones."""
    paths = {name: _split(getattr(config, name) or "") for name in BACKBONES}
    paths = {name: (head, path) for name, (head, path) in paths.items() if path.startswith(RELATIVE)}
    if not paths:
        return config
    if not os.path.isdir(source):
        from huggingface_hub import snapshot_download

        source = snapshot_download(source, **{name: value for name, value in hub.items() if name != "subfolder"})
    found = copy.copy(config)
    for name, (head, path) in paths.items():
        setattr(found, name, head + os.path.realpath(Path(os.path.realpath(source), path)))
    return found


def relative(name: str, directory: str | os.PathLike[str]) -> str:
    """A backbone's name for the config of a captioner in `directory`: a path on this machine relative to it."""
    head, path = _split(name)
    if not os.path.isabs(path) or not os.path.exists(path):
        return name
    place = Path(os.path.relpath(os.path.realpath(path), os.path.realpath(directory))).as_posix()
    return head + (place if place.startswith("../") else f"./{place}")


def named_for(config: ClipCapConfig, directory: str | os.PathLike[str]) -> dict[str, str]:
    """The names of both backbones as `relative` gives them."""
    return {name: relative(value, directory) for name in BACKBONES if (value := getattr(config, name)) is not None}


def copy_backbones(config: ClipCapConfig, directory: Path) -> dict[str, str]:
    """Copy the backbones that a captioner loads by name into `directory`; returns their names there.

    Raises:
        UserError: one of them lies in no file on this machine.
    """
    found = {}
    for field in BACKBONES:
        name = getattr(config, field)
        if name is not None and not (field == "gpt2" and config.saves_gpt2):
            found[field] = _copy(field, name, directory / field)
    return found


def load_named_gpt2(
    source: str, config: ClipCapConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen GPT-2 whose name a captioner keeps, checked against the sizes it was trained with."""
    assert config.gpt2 is not None
    try:
        gpt2, tokenizer = load_gpt2(config.gpt2, dtype=dtype, frozen=True)
    except UserError as error:
        raise UserError(
            f"captioner {source!r} needs the GPT-2 {config.gpt2!r} it was trained on, which cannot be loaded ({error}) "
            f'Put it back there, or write its place in {source}/config.json under "gpt2".'
        ) from error
    for name in ("model_type", *SIZES):
        found, wanted = getattr(gpt2.config, name, None), (config.gpt2_config or {}).get(name)
        if wanted is not None and found != wanted:
            raise UserError(
                f"captioner {source!r} was trained on a GPT-2 with {name} {wanted} but {config.gpt2!r} has {found}: "
                f"use the GPT-2 it was trained on."
            )
    return gpt2, tokenizer


def require_copyable(field: str, name: str) -> None:
    """Raise UserError when a backbone is one whose library keeps its weights: ask before any long work."""
    head, path = _split(name)
    if name.startswith(PREFIXES) and not (head and Path(path).expanduser().is_file()):
        raise UserError(
            f"{field} {name!r} cannot be bundled, for its library fetches and keeps it: save its weights in a file "
            f"and name that, {name.partition('/')[0]}/PATH."
        )


def _split(name: str) -> tuple[str, str]:
    """What stands before a path, such as "open_clip:ARCH/", or nothing; and the rest."""
    if not name.startswith(PREFIXES):
        return "", name
    arch, slash, path = name.partition("/")
    return arch + slash, path if slash else ""


def _copy(field: str, name: str, target: Path) -> str:
    require_copyable(field, name)
    head, path = _split(name)
    files = [Path(path).expanduser()] if head else _files(field, name)
    target.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, target / file.name)  # the hub's cache has links
    return f"{head}./{field}/{files[0].name}" if head else f"./{field}"


def _files(field: str, name: str) -> list[Path]:
    """What `from_pretrained` reads of a directory, packaged name or hub id."""
    source = locate(name, BACKBONES[field], field)
    if not os.path.isdir(source):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            source = snapshot_download(source, local_files_only=True)
        except (LocalEntryNotFoundError, OSError, ValueError) as error:
            raise UserError(
                f"{field} {name!r} cannot be bundled, for it is not in the hub's cache on this machine: fetch it with "
                f"hf download {name}."
            ) from error
    held = [file for file in sorted(Path(source).iterdir()) if file.is_file()]
    weights = next((some for ends in (SAFE_WEIGHTS, OTHER_WEIGHTS) if (some := _ending(held, ends))), [])
    if not weights:
        raise UserError(f"{field} {name!r} cannot be bundled: no .safetensors or .bin file is in {source!r}.")
    beside = [f for f in _ending(held, BESIDE) if not f.name.endswith(".index.json") or _indexes(f, weights)]
    return beside + weights


def _ending(files: list[Path], ends: tuple[str, ...]) -> list[Path]:
    return [file for file in files if file.suffix in ends or (ends is BESIDE and file.name.startswith("LICEN"))]


def _indexes(index: Path, weights: list[Path]) -> bool:
    """Whether an index of shards is one of these weights: "model.safetensors.index.json"."""
    return index.name.removesuffix(".index.json").endswith(weights[0].suffix)
