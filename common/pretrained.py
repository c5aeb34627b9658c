"""Find pre-trained weights by name, and trust nothing that comes with them: packaged, a local directory or a hub id.

A directory of weights is somebody's download. No code in it is run, what its configuration says is checked before
anything is made of it, and what cannot be had or used is said in one line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError

from common.checks import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase
    from transformers.configuration_utils import PreTrainedConfig

ASSETS = Path(__file__).parent / "assets"
CAPTION_LANGUAGES = {"eng": "photo", "nld": "tiny-nld", "ita": "tiny-ita"}
"""Language (ISO 639-3) -> the packaged captioner that writes it."""
CAPTIONERS = {name: ASSETS / f"captioner-{name}" for name in (*CAPTION_LANGUAGES.values(), "tiny")}
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
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{what} {name!r}: the weights file is corrupt, or holds more than weights, which could run code and is "
            f"refused: copy it again, or save the weights alone."
        ) from error
    except (SafetensorError, EOFError) as error:
        raise UserError(
            f"{what} {name!r}: the weights file is corrupt or cut short ({error}): copy it again."
        ) from error
    except Exception as error:  # the libraries have many kinds for a file that is damaged or missing
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{what} {name!r} asks to run code that comes with it, which is never done: use weights of an "
                f"architecture that transformers itself knows."
            ) from error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if Path(name).expanduser().exists():
            raise UserError(
                f"{what} {name!r} cannot be loaded ({reason.rstrip('.')}): copy it again, all of its files."
            ) from error
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
def saving(place: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn a full disk and every other failure to write into one UserError; safetensors has an error of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(
            f"{what} {str(place)!r} cannot be written ({reason}): free some space or give another place."
        ) from error


class Rule(NamedTuple):
    """What a field of somebody's configuration may be."""

    holds: Callable[[Any], bool]
    words: str
    """The same, as what follows "use"."""

    def __or__(self, other: Any) -> Rule:
        """Also a single value, such as None."""
        return Rule(lambda value: value is other or self.holds(value), f"{self.words}, or {json.dumps(other)}")


def whole(least: int, most: int) -> Rule:
    """A whole number from `least` to `most`."""
    return Rule(lambda value: type(value) is int and least <= value <= most, f"a whole number from {least} to {most}")


def number(least: float, most: float) -> Rule:
    """A number from `least` to `most`, neither NaN nor infinite."""
    words = f"a number from {least} to {most}"
    return Rule(lambda value: type(value) in (int, float) and least <= value <= most, words)


def one_of(*choices: Any) -> Rule:
    """One of a few values, which are told apart by type too: 1 is not true."""
    return Rule(
        lambda value: any(type(value) is type(choice) and value == choice for choice in choices),
        f"one of {', '.join(map(json.dumps, choices))}" if len(choices) > 1 else json.dumps(choices[0]),
    )


def tokens(vocabulary: int) -> Rule:
    """One token id of a vocabulary of this size, or a list of some."""
    token = whole(0, vocabulary - 1).holds
    return Rule(
        lambda value: token(value) or (type(value) is list and value != [] and all(map(token, value))),
        f"a token id from 0 to {vocabulary - 1}, or a list of some",
    )


SIZE = whole(1, 10_000_000)
"""Of a table or a matrix; `require_room` compares the whole with the weights there are."""
LAYERS = whole(1, 256)
SWITCH = one_of(True, False)
EPSILON = number(1e-30, 1.0)
DROPOUT = number(0.0, 0.999)


def checked(fields: Any, rules: Mapping[str, Rule], place: str) -> dict[str, Any]:
    """Those of a configuration's fields that `rules` name, each as its rule asks; all others are left out.

    Others may choose how attention is computed, which code is fetched for it, or how numbers are packed.

    Raises:
        UserError: a value that breaks its rule, or no fields at all.
    """
    if not isinstance(fields, Mapping):
        raise UserError(f"{place} is {_cut(fields)} instead of named values: use what was saved with the weights.")
    for name, rule in rules.items():
        if name in fields and not rule.holds(fields[name]):
            raise UserError(f"{place}: {name} is {_cut(fields[name])}: use {rule.words}.")
    return {name: fields[name] for name in rules if name in fields}


def _cut(value: Any) -> str:
    """A value as one short line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def read_config(source: str, what: str, model_type: str | None, **hub: Any) -> dict[str, Any]:
    """What the `config.json` of a directory or hub id says, not checked further.

    Args:
        source: as `locate` gives it.
        what: for messages.
        model_type: that it must be of; None leaves that to the caller.
        hub: revision, cache_dir, ... of transformers' `cached_file`.

    Raises:
        UserError: of another type, or its weights are quantized or changed by an adapter.
    """
    from transformers.configuration_utils import PreTrainedConfig

    fields: dict[str, Any] = PreTrainedConfig.get_config_dict(source, **hub)[0]
    kind = fields.get("model_type")
    if model_type is not None and kind != model_type:
        raise UserError(f"{source!r} is a {_cut(kind)} model, not a {what}: give another name or directory.")
    if fields.get("quantization_config") is not None:
        raise UserError(f"{what} {source!r} is quantized (quantization_config): give its unquantized weights.")
    if optional_file(source, "adapter_config.json", hub):
        raise UserError(
            f"{what} {source!r} holds an adapter (adapter_config.json) for other weights: merge the two first, with "
            f"peft's merge_and_unload."
        )
    return fields


def load_tokenizer(
    source: str | os.PathLike[str], config: PreTrainedConfig | None = None, **hub: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id; no code that comes with it is run, and nobody is asked about that.

    Args:
        source: as `locate` gives it.
        config: of the model, when it is known; its file is not read again.
        hub: revision, cache_dir, ... of transformers' `from_pretrained`.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, config=config, trust_remote_code=False, **hub)


def require_tokens(source: str, what: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raise UserError when a tokenizer gives ids for which a token table of `rows` has no row."""
    largest = max([len(tokenizer) - 1, *tokenizer.get_vocab().values()])
    if largest >= rows:
        raise UserError(
            f"{what} {source!r}: the tokenizer has {len(tokenizer)} tokens, ids up to {largest}, but the token table "
            f"{rows} rows: use the tokenizer that the model was trained with."
        )


def require_room(source: str, what: str, build: Callable[[], nn.Module], **hub: Any) -> None:
    """Raise UserError when a model has more numbers than its weights files have bytes; none of it is allocated.

    A number has one byte at least, so such a configuration is not that of the weights: sizes in it are only believed
    after this.
    """
    import torch

    with torch.device("meta"):
        asked = sum(parameter.numel() for parameter in build().parameters())
    held = sum(os.path.getsize(file) for file in _weights_files(source, hub))
    if asked > held > 0:
        raise UserError(
            f"{what} {source!r}: its config.json asks for {asked:,} numbers but its weights files have {held:,} bytes: "
            f"the weights are cut short, or of another model than the config.json: copy both again."
        )


def optional_file(source: str, name: str, hub: dict[str, Any]) -> str | None:
    """A file of a directory or hub id; None where there is none, or none in the cache and no connection."""
    from transformers.utils import cached_file

    return cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )


def _weights_files(source: str, hub: dict[str, Any]) -> list[str]:
    """The files that transformers takes weights from, fetched when they are on the hub."""
    from transformers.utils import (
        SAFE_WEIGHTS_INDEX_NAME,
        SAFE_WEIGHTS_NAME,
        WEIGHTS_INDEX_NAME,
        WEIGHTS_NAME,
    )
    from transformers.utils.hub import get_checkpoint_shard_files

    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        file = optional_file(source, name, hub)
        if file and name.endswith(".json"):
            return get_checkpoint_shard_files(source, file, **hub)[0]
        if file:
            return [file]
    return []


def require_plain(weights: Mapping[Any, Any], place: str) -> None:
    """Raise UserError when something in a checkpoint is no tensor of real numbers that are all in the file.

    A pickled tensor may repeat one number a million million times, be sparse, or have no numbers at all.
    """
    import torch

    for name, value in weights.items():
        if (
            not isinstance(value, torch.Tensor)
            or value.layout != torch.strided
            or value.is_meta
            or value.is_quantized
            or value.is_complex()
            or value.numel() * value.itemsize > value.untyped_storage().nbytes()
        ):
            raise UserError(f"{place}: {_cut(name)} is no plain tensor: save the model's state_dict() alone.")


def require_finite(weights: Mapping[str, Tensor], place: str) -> None:
    """Raise UserError when a tensor holds NaN or infinity, at the cost of one pass over memory."""
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        values = tensor.detach().float() if tensor.itemsize < 2 else tensor.detach()
        if not all(map(math.isfinite, values.aminmax())):  # both are NaN where one is; 20 times as fast as isfinite
            raise UserError(f"{place}: {name} holds NaN or infinity: copy it again, or use an earlier checkpoint.")


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers' bars of the files it reads and writes out of the terminal."""
    from transformers.utils import logging as transformers_logging

    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bar:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the libraries' own retry messages and progress bars out of a user's terminal."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "transformers", "httpx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with no_progress_bar():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
