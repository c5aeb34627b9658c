"""What version 0.1 wrote, which knew a text by a sampled hash: taken over, so that a run of its goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from common.files import write_json
from recycle_gpt2.documents import find_texts, size_of
from recycle_gpt2.stages import SETTINGS, read_settings


def take_over(paths: Sequence[Path], work: Path, text: str) -> None:
    """Let the records of version 0.1 in `work`, if they are of the text in `paths`, have its hash of today, `text`."""
    sampled, taken = None, False
    for stage in (work / "tokenizer", work / "corpus"):
        settings = read_settings(stage)
        recorded = settings.get("inputs", {}).get("text")
        if recorded not in (None, text):
            sampled = sampled or sampled_hash(paths)
            if recorded == sampled:
                write_json(stage / SETTINGS, {**settings, "inputs": {**settings["inputs"], "text": text}})
                taken = True
    if taken:
        print(f"{work} was begun by version 0.1 with the same text: it resumes.", flush=True)


def sampled_hash(paths: Sequence[Path]) -> str:
    """Version 0.1's of a text: SHA-256 of the files' names, sizes, and a MiB at both ends."""
    digest = hashlib.sha256()
    for path, _ in find_texts(paths):
        size = size_of(path)
        digest.update(json.dumps([str(path), size]).encode())
        if path.is_file():
            with open(path, "rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(0, size - (1 << 20)))
                digest.update(file.read(1 << 20))
    return digest.hexdigest()
