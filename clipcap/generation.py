"""What users of transformers type for `generate`, put in the words of `clipcap.decoding.decode`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from clipcap.decoding import decode
from common.checks import UserError, reason_of, require_at_least

FILE = "generation_config.json"
LENGTHS = frozenset({"max_new_tokens", "max_length", "generation_config"})
"""Options that say how long a caption may be."""
OURS = frozenset(inspect.signature(decode).parameters) - {"model", "clip_embeddings"}
"""Names that `decode` itself takes."""
SAMPLING = {"top_k": 50, "top_p": 1.0, "temperature": 1.0}
"""Options of sampling alone, with what transformers has for each where nothing is said."""
BEAMS = ("length_penalty", "early_stopping")
"""Options of strategy "beam" alone."""
NEUTRAL: dict[str, Any] = {
    "use_cache": True,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "min_p": 0.0,
}
"""Values of transformers' other options that ask for nothing; so do None, False and an empty list for any of them."""
WITHOUT_EFFECT = ("bos_token_id", "pad_token_id", "transformers_version", "attention_mask", "tokenizer")
"""Fields that say nothing about which tokens are chosen."""


def default_generation(room: int) -> GenerationConfig:
    """What a captioner does when nothing is asked: five beams, at most 67 tokens, or what there is room for."""
    return GenerationConfig(num_beams=5, max_new_tokens=max(1, min(67, room)))


def read_generation(path: str) -> GenerationConfig:
    """The one saved with a captioner.

    Raises:
        UserError: no fields that transformers takes.
    """
    try:
        return GenerationConfig(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path!r} is no generation config ({reason_of(error)}): correct it, or delete it.") from error


def decode_options(asked: Mapping[str, Any], saved: GenerationConfig, prompt: int = 0) -> dict[str, Any]:
    """Options of `decode` for those of transformers' `generate`, or of `decode` itself.

    `num_return_sequences` is `num_captions`; `do_sample` chooses strategy "sample", and one beam "greedy". What is not
    asked is taken from `generation_config`, and what is missing from the captioner's own. Of these two, options that
    the strategy has no use for are left out, as transformers does.

    Args:
        asked: what the caller typed.
        saved: the captioner's own.
        prompt: tokens of the prompt, which `max_length` and `min_length` count.

    Raises:
        UserError: something that cannot be honoured, or two options that contradict each other.
    """
    typed = {name: value for name, value in asked.items() if value is not None}
    given = typed.pop("generation_config", None)
    if not isinstance(given, GenerationConfig | None):
        raise UserError(f"generation_config is {given!r}: give a transformers.GenerationConfig.")
    typed = _renamed(typed, prompt)
    configured = {} if given is None else _renamed(_fields(given), prompt)
    beams = (configured | typed).get("num_beams", 1)
    found = _renamed(_fields(saved), prompt) | configured
    if "strategy" in typed:
        found.pop("do_sample", None)
    found |= typed
    sample = found.pop("do_sample", False)
    if "strategy" not in found:
        if sample:
            found["strategy"] = "sample"
        else:
            found["strategy"] = "greedy" if found.get("num_beams") == 1 else "beam"
    elif "do_sample" in typed and sample != (found["strategy"] == "sample"):
        raise UserError(f"do_sample is {sample} with strategy {found['strategy']!r}: give one of them.")
    strategy = found["strategy"]
    if strategy == "sample":
        if beams != 1 and "strategy" not in typed:
            raise UserError(f"do_sample is True with num_beams {beams}: beams are not sampled, leave one out.")
        if "strategy" not in typed:  # as transformers samples; by our own name, from the whole distribution
            found = SAMPLING | found
    for names, user in ((SAMPLING, strategy == "sample"), (BEAMS, strategy == "beam")):
        for name in names:
            if not user and name not in typed:
                found.pop(name, None)
    if strategy == "sample" and found.get("top_k") == 0:
        found.pop("top_k")
    if strategy == "sample" and found.get("top_p") == 1:
        found.pop("top_p")
    if strategy in ("sample", "greedy") and "num_beams" not in typed:
        found.pop("num_beams", None)
    if strategy == "greedy" and "num_captions" not in typed:
        found.pop("num_captions", None)
    return found


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A text's tokens as captions begin with them: without special tokens, and spaces around it."""
    return tokenizer(prompt.strip(), add_special_tokens=False)["input_ids"] if prompt.strip() else []


def _fields(config: GenerationConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_diff_dict().items() if value is not None}


def _renamed(options: dict[str, Any], prompt: int) -> dict[str, Any]:
    """Options by `decode`'s names, those without effect left out."""
    found = {name: value for name, value in options.items() if name in OURS or name == "do_sample"}
    for name, value in options.items():
        if name == "num_return_sequences":
            if found.setdefault("num_captions", value) != value:
                raise UserError(f"num_return_sequences is {value} and num_captions {found['num_captions']}: give one.")
        elif name == "eos_token_id":
            found.setdefault("stop_token_ids", value)
        elif name == "max_length":
            if type(value) is not int or value <= prompt:
                raise UserError(
                    f"max_length is {value!r} with a prompt of {prompt} tokens: use more, or max_new_tokens."
                )
            found.setdefault("max_new_tokens", value - prompt)
        elif name == "min_length":
            require_at_least("min_length", value, 0)
            found.setdefault("min_new_tokens", max(0, value - prompt))
        elif name not in found and name not in WITHOUT_EFFECT and not _asks_nothing(name, value):
            raise UserError(f"{name} is {value!r}, which captioners cannot honour: leave it out.")
    return found


def _asks_nothing(name: str, value: Any) -> bool:
    if name in NEUTRAL:
        return value == NEUTRAL[name]
    return value is False or (isinstance(value, list | dict) and not value)
