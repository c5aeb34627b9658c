"""What must be present before a published table can be made: data sets and weights."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.pretrained import require_reachable


@dataclass(frozen=True)
class Need:
    """Something that must be present before a table can be made."""

    path: Path
    what: str
    """What it is, and where it is from."""
    wrong: str = ""
    """What is wrong with what is there."""
    optional: str = ""
    """What goes without it, where it need not be present."""

    @property
    def met(self) -> bool:
        """Whether the file, or something in the directory, is there and nothing is wrong with it."""
        there = self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir()))
        return there and not self.wrong

    @property
    def lines(self) -> list[str]:
        """What to print of it."""
        head = f"optional, {self.optional}: {self.path}" if self.optional else f"  {self.path}"
        return [head, *(f"      {line}" for line in (self.what, self.wrong) if line)]


PARTS = {
    "config.json": ("config.json",),
    "model.safetensors": (
        "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    ),
    "tokenizer.json": ("tokenizer.json", "merges.txt"),
}  # fmt: skip
"""What a model's directory has to have, and the files of which any one will do."""


def find_weights(directory: Path, name: str) -> str | None:
    """Weights called `name`, in `directory` or on the hub or in its cache, as the loaders take them; None: nowhere."""
    library, _, model = name.partition(":")
    if model:
        path = directory / f"{model}.pth"
        return f"{name}:{path}" if path.is_file() else None
    local = directory / name.rpartition("/")[2]
    if not lacking_parts(local):
        return str(local)
    try:
        for files in PARTS.values():
            require_reachable(name, files)
    except OSError:
        return None
    return name


def lacking_parts(directory: Path) -> list[str]:
    """What a model's directory does not have."""
    return [part for part, files in PARTS.items() if not any((directory / file).is_file() for file in files)]


def missing_weights(directory: Path, name: str) -> Need:
    """Where weights called `name` go."""
    library, _, model = name.partition(":")
    if model:
        return Need(directory / f"{model}.pth", f"{library}'s ImageNet weights of {model}, its state_dict")
    path = directory / name.rpartition("/")[2]
    wrong = f"it is there, but without {', '.join(lacking_parts(path))}" if path.is_dir() else ""
    return Need(path, f"hf download {name} --local-dir {path}", wrong)


def without_images(paths: Iterable[Path]) -> str:
    """How many of these images, whose names may lack the suffix, are missing, and one of them; nothing when all are.

    Each directory is listed once.
    """
    from common.images import IMAGE_SUFFIXES

    listed: dict[Path, set[str]] = {}
    count, absent = 0, []
    for path in paths:
        folder = path.parent
        if folder not in listed:
            names = [Path(name) for name in os.listdir(folder)] if folder.is_dir() else []
            listed[folder] = {n.name for n in names} | {n.stem for n in names if n.suffix.lower() in IMAGE_SUFFIXES}
        count += 1
        if path.name not in listed[folder]:
            absent.append(path.name)
    return f"{len(absent):,} of {count:,} images are missing, such as {absent[0]}" if absent else ""
