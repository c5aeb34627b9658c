"""Train the packaged tiny GPT-2s: one byte-level BPE tokenizer of 8,192 tokens, a small and a medium model.

    python -m experiments.backbones.train_gpt2 --corpus DIR --size small
    python -m experiments.backbones.train_gpt2 --corpus DIR --size medium

DIR holds eng.train.txt(.xz) and eng.valid.txt(.xz) as experiments/backbones/build_corpus.py writes them: one paragraph
a line, documents separated by an empty line. Hidden matrices are trained by Muon (Jordan et al. 2024), the rest by
AdamW.
"""

from __future__ import annotations

import json
import lzma
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast, PreTrainedTokenizerFast

from common.batches import BatchOrder, ResumableLoader
from common.checks import UserError, run_command
from common.language import chunked_cross_entropy, score
from common.optimizers import MuonAndAdam, scheduled, warmup_cosine
from common.runtime import RuntimeConfig, provenance, start
from common.training import TrainerConfig, build_trainer, fit
from recycle_gpt2.tokenizer import save_tokenizer, train_tokenizer

WARMUP = 100
SIZES = {
    "small": dict(n_layer=4, n_embd=128, n_head=4),
    "medium": dict(n_layer=8, n_embd=160, n_head=5),
    "captions": dict(n_layer=3, n_embd=192, n_head=6),
}
NAMES = {"small": "gpt2-tiny", "medium": "gpt2-tiny-medium", "captions": "gpt2-captions"}


@dataclass(frozen=True)
class Config:
    """Pretraining of a tiny GPT-2."""

    corpus: Path
    """Directory of eng.train.txt(.xz) and eng.valid.txt(.xz)."""
    size: Literal["small", "medium", "captions"] = "small"
    """small: 4 layers of width 128; medium: 8 layers of width 160; captions: 3 layers of width 192."""
    out: Path = Path("out/gpt2")
    """Where runs, the tokenizer and the models go."""
    vocab_size: int = 8192
    """Tokens of the byte-level BPE."""
    block: int = 256
    """Tokens in a training block, and the model's positions."""
    batch_size: int = 8
    """Blocks in a step."""
    epochs: float = 4.0
    """Passes over the corpus."""
    max_steps: int = 0
    """Steps, when not 0, instead of epochs."""
    lr_muon: float = 0.02
    """Muon's rate, for hidden matrices."""
    lr_adam: float = 0.01
    """AdamW's rate, for embeddings, norms and biases."""
    dropout: float = 0.0
    """Dropout in the residual stream."""
    val_every: int = 400
    """Steps between validations."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of matrix products."""
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1))


def read_documents(directory: Path, split: str) -> list[str]:
    """The documents of eng.SPLIT.txt or eng.SPLIT.txt.xz in `directory`."""
    for path in (directory / f"eng.{split}.txt", directory / f"eng.{split}.txt.xz"):
        if path.exists():
            opener = lzma.open if path.suffix == ".xz" else open
            with opener(path, "rt", encoding="utf-8") as file:
                return [text for text in (part.strip() for part in file.read().split("\n\n")) if text]
    raise UserError(
        f"{str(directory)!r} holds no eng.{split}.txt or .xz: make it with experiments/backbones/build_corpus.py."
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """All documents as one array of token ids, an end token before each and after the last."""
    end = tokenizer.eos_token_id
    ids: list[int] = [end]
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False):
        ids += [*encoding.ids, end]
    return np.asarray(ids, dtype=np.int32)


class Blocks(Dataset[Tensor]):
    """Token blocks (block + 1,) that overlap by one token, so that each token is predicted once per epoch."""

    def __init__(self, ids: np.ndarray, block: int) -> None:
        self.ids, self.block = ids, block

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.block

    def __getitem__(self, index: int) -> Tensor:
        begin = index * self.block
        return torch.from_numpy(self.ids[begin : begin + self.block + 1].astype(np.int64))


def next_token_loss(model: GPT2LMHeadModel, blocks: Tensor) -> Tensor:
    """Mean nats per token of blocks (b, t + 1)."""
    hidden = model.transformer(input_ids=blocks[:, :-1], use_cache=False).last_hidden_state  # (b, t, d)
    return chunked_cross_entropy(
        hidden.flatten(0, 1), model.get_output_embeddings().weight, blocks[:, 1:].flatten(), chunk=512
    )


class Pretraining(LightningModule):
    """Optimizer, schedule and logging around GPT-2's loss."""

    def __init__(self, model: GPT2LMHeadModel, config: Config, steps: int) -> None:
        super().__init__()
        self.model, self.config, self.steps = model, config, steps

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = MuonAndAdam(
            self.model, hidden=".h.", lr_muon=self.config.lr_muon, lr=self.config.lr_adam, weight_decay=0.01
        )
        return scheduled(optimizer, warmup_cosine(WARMUP, self.steps))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = next_token_loss(self.model, batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", next_token_loss(self.model, batch), prog_bar=True, batch_size=len(batch))


def main(config: Config) -> None:
    """Train the tokenizer if it is missing, then the model; write it with its scores."""
    start(config.runtime)
    train_documents, valid_documents = (read_documents(config.corpus, split) for split in ("train", "valid"))
    tokenizer_directory = config.out / "tokenizer"
    if (tokenizer_directory / "tokenizer.json").exists():
        tokenizer = GPT2TokenizerFast.from_pretrained(tokenizer_directory)
    else:
        tokenizer = train_tokenizer(train_documents, config.vocab_size)
        save_tokenizer(tokenizer, tokenizer_directory)
    train_ids, valid_ids = encode(tokenizer, train_documents), encode(tokenizer, valid_documents)
    blocks = Blocks(train_ids, config.block)
    steps = config.max_steps or int(config.epochs * len(blocks) / config.batch_size)
    print(f"{len(train_ids):,} training tokens, {steps:,} steps of {config.batch_size * config.block:,} tokens")

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=0.0,
            **SIZES[config.size],
        )
    )
    run = config.out / f"run-{config.size}"
    order = BatchOrder(len(blocks), config.batch_size, seed=config.runtime.seed)
    trainer = build_trainer(
        TrainerConfig(
            max_steps=steps,
            val_every=min(config.val_every, steps),
            precision=config.precision,
            device=config.runtime.device,
        ),
        run,
    )
    validation = torch.utils.data.DataLoader(Blocks(valid_ids, config.block), batch_size=16)
    begun = time.process_time()
    fit(
        trainer,
        Pretraining(model, config, steps),
        run,
        train_dataloaders=ResumableLoader(blocks, order),
        val_dataloaders=validation,
    )
    cpu_seconds = time.process_time() - begun

    model.float().eval()
    exact = score(model, valid_ids, block=config.block, stride=config.block // 2)
    # The bytes that the scored tokens spell: every end token but the first counts as one byte, a line break.
    num_bytes = sum(len(text.encode()) + 1 for text in valid_documents)
    results = {
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "parameters": model.num_parameters(),
        "tokens_seen": steps * config.batch_size * config.block,
        "valid": {
            "nats": exact.nats,
            "tokens": exact.tokens,
            "bytes": num_bytes,
            "perplexity": exact.perplexity,
            "bits_per_byte": exact.bits_per_byte(num_bytes),
        },
        "cpu_seconds": round(cpu_seconds),
        **provenance(),
    }
    directory = config.out / NAMES[config.size]
    model.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "training.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["valid"]))


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(tyro.cli(Config))))
