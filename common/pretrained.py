"""Find pre-trained weights by name: packaged, a local directory or a hub id; say clearly when they cannot be had."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from common.checks import UserError

ASSETS = Path(__file__).parent / "assets"
CAPTION_LANGUAGES = {"eng": "tiny", "nld": "tiny-nld", "ita": "tiny-ita"}
"""Language (ISO 639-3) -> the packaged captioner that writes it."""
CAPTIONERS = {name: ASSETS / f"captioner-{name}" for name in CAPTION_LANGUAGES.values()}
"""Packaged captioners by name."""


def locate(name: str | os.PathLike[str], packaged: dict[str, Path], what: str) -> str:
    """Resolve a backbone's name to what `from_pretrained` takes.

    A packaged name gives its directory; something that looks like a path must exist; anything else is
    returned as it is, a hub id.

    Raises:
        UserError: a path that does not exist, or a directory without a `config.json`.
    """
    text = os.fspath(name)
    if not text:
        raise UserError(f"{what} name is empty: give one of {', '.join(packaged)}, a directory or a hub id.")
    if text in packaged:
        return str(packaged[text])
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{what} directory {text!r} has no config.json: give a Hugging Face model directory.")
        return str(path)
    if path.is_file():
        raise UserError(f"{what} {text!r} is a file: give a model directory, a packaged name or a hub id.")
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise UserError(f"{what} {text!r} does not exist: check the path, or use one of {', '.join(packaged)}.")
    return text


@contextlib.contextmanager
def loading(name: str, packaged: dict[str, Path], what: str) -> Iterator[None]:
    """Turn every failure to load the weights called `name` into one UserError that names the cure."""
    try:
        with _quiet_hub():
            yield
    except UserError:
        raise
    except (SafetensorError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{what} {name!r}: the weights file is corrupt or cut short ({error}): copy it again."
        ) from error
    except Exception as error:  # the libraries have many kinds for a file that is damaged or missing
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if Path(name).expanduser().exists():
            raise UserError(f"{what} {name!r} cannot be loaded: {reason}") from error
        raise UserError(
            f"{what} {name!r} is not a packaged name ({', '.join(packaged)}), not a directory here, "
            f"and could not be fetched from the hub: check the name and the connection, "
            f"or download it elsewhere and give its directory."
        ) from error


def require_reachable(repository: str, files: tuple[str, ...]) -> None:
    """Raise OSError at once when the hub cannot give `repository` and none of `files` is in the local cache.

    The hub's own client would retry for half a minute.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
        return
    try:
        HfApi().model_info(repository, timeout=10)
    except Exception as error:  # the client's library decides which: no connection, timeout, no such repository
        raise OSError(str(error)) from error


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the libraries' own retry messages and progress bars out of a user's terminal."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "transformers", "httpx")]
    levels = [logger.level for logger in loggers]
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bar:
            transformers_logging.enable_progress_bar()
