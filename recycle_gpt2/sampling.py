"""Text written by a model: greedy, by beam, top-k or nucleus."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from common.checks import (
    UserError,
    printable,
    require_at_least,
    require_one_of,
    require_place,
    require_share,
    require_temperature,
    require_text,
)
from common.decoders.families import numbers_cached, positions
from common.files import write_text
from common.runtime import RuntimeConfig, autocast, fork_generators, require_memory, require_seed, start
from recycle_gpt2.evaluate import with_end

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


STRATEGIES: tuple[str, ...] = ("greedy", "beam", "top_k", "nucleus")


@dataclass(frozen=True)
class SampleConfig:
    """Let a model write."""

    model: tyro.conf.Positional[str]
    """Directory, hub id, tiny or tiny-medium."""
    prompts: tuple[str, ...] = ()
    """Beginnings to continue; none lets the model begin by itself."""
    strategy: Literal["greedy", "beam", "top_k", "nucleus"] = "nucleus"
    """How tokens are chosen."""
    count: int = 1
    """Samples of each prompt (more than one only with top_k and nucleus)."""
    max_new_tokens: int = 60
    """Longest continuation."""
    top_k: int = 50
    """Likeliest tokens that top_k samples from."""
    top_p: float = 0.9
    """Probability that nucleus samples from."""
    temperature: float = 1.0
    """Temperature of top_k and nucleus."""
    num_beams: int = 5
    """Beams."""
    out: Path | None = None
    """JSON Lines file (text, prompt, strategy, seed), which `recycle-gpt2 judge` reads, instead of standard output."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = "",
    *,
    strategy: str = "nucleus",
    count: int = 1,
    max_new_tokens: int = 60,
    top_k: int = 50,
    top_p: float = 0.9,
    temperature: float = 1.0,
    num_beams: int = 5,
    seed: int = 0,
) -> list[str]:
    """Continuations of `prompt` (prompt included), up to the end token; the same seed gives the same texts.

    Raises:
        UserError: an unknown strategy, a setting out of its range, or a prompt that leaves no position free.
    """
    import torch

    require_one_of("strategy", strategy, STRATEGIES)
    for name, value in (
        ("count", count),
        ("max_new_tokens", max_new_tokens),
        ("top_k", top_k),
        ("num_beams", num_beams),
    ):
        require_at_least(name, value, 1)
    require_share("top_p", top_p)
    require_temperature(temperature)
    require_seed(seed)
    require_text("prompt", prompt)
    if count > 1 and strategy in ("greedy", "beam"):
        raise UserError(f"count is {count} but {strategy} always writes the same: use 1, or top_k or nucleus.")
    ids = with_end(tokenizer, prompt)
    room = positions(model.config) - len(ids)
    if room < 1:
        raise UserError(
            f"the prompt has {len(ids) - 1} tokens but the model {positions(model.config)} positions: "
            f"shorten the prompt."
        )
    width = max(count, num_beams if strategy == "beam" else 1)
    longest = len(ids) + min(max_new_tokens, room)
    size = width * 4 * (numbers_cached(model.config) * longest + 4 * len(tokenizer))
    require_memory(f"{width} texts are written at once", size, model.device, "use a smaller count, or fewer beams")
    how: dict[str, Any] = {
        "greedy": dict(do_sample=False),
        "beam": dict(do_sample=False, num_beams=num_beams),
        "top_k": dict(do_sample=True, top_k=min(top_k, len(tokenizer)), temperature=temperature),
        "nucleus": dict(do_sample=True, top_k=0, top_p=top_p, temperature=temperature),
    }
    chosen = how[strategy]
    inputs = torch.tensor([ids], device=model.device)
    end = tokenizer.eos_token_id
    model.eval()
    with fork_generators(seed), torch.no_grad():
        found = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=min(max_new_tokens, room),
            num_return_sequences=count,
            eos_token_id=end,
            pad_token_id=end,
            **chosen,
        )
    return [tokenizer.decode(row[1:], skip_special_tokens=True) for row in found]


def run_sample(config: SampleConfig) -> int:
    """`recycle-gpt2 sample`: print or write what the model continues."""
    from common.gpt2 import load_gpt2

    if config.out:
        require_place(config.out)
    device = start(config.runtime)
    model, tokenizer = load_gpt2(config.model, device=device, frozen=True)
    lines = []
    for number, prompt in enumerate(config.prompts or ("",)):
        require_text("prompt", prompt)
        room = positions(model.config) - len(with_end(tokenizer, prompt))
        if 1 <= room < config.max_new_tokens:
            print(
                f"max_new_tokens is {config.max_new_tokens} but after the prompt the model has positions for {room}: "
                f"texts end there.",
                file=sys.stderr,
            )
        with autocast(device, config.runtime.precision):
            texts = sample(
                model,
                tokenizer,
                prompt,
                strategy=config.strategy,
                count=config.count,
                max_new_tokens=config.max_new_tokens,
                top_k=config.top_k,
                top_p=config.top_p,
                temperature=config.temperature,
                num_beams=config.num_beams,
                seed=config.runtime.seed + number,
            )
        for text in texts:
            record = {"text": text, "prompt": prompt, "strategy": config.strategy, "seed": config.runtime.seed}
            lines.append(json.dumps(record, ensure_ascii=False))
            if config.out is None:
                print(printable(text, lines=True), end="\n\n")
    if config.out:
        write_text(config.out, "\n".join(lines) + "\n")
        print(f"{len(lines)} samples written to {config.out}")
    return 0
