"""A dry run: models of full size with random weights, two steps of each phase."""

from __future__ import annotations

import logging
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.pretrained import ASSETS
from common.runtime import RuntimeConfig

if TYPE_CHECKING:
    from transformers import CLIPConfig


def random_clip(out: Path, sizes: CLIPConfig | None = None) -> str:
    """A directory of a CLIP with random weights, of ViT-B/32 where no sizes are given, written once."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    directory = out / "dry-run" / "clip"
    if not (directory / "tokenizer.json").is_file():
        sizes = sizes or CLIPConfig()
        sizes.text_config.eos_token_id = 2  # as in OpenAI's own files: whatever the tokenizer ends with
        CLIPModel(sizes).half().save_pretrained(directory)
        AutoTokenizer.from_pretrained(ASSETS / "clip-tiny").save_pretrained(directory)
    return str(directory)


def sizes_of(model: torch.nn.Module) -> str:
    """How many parameters there are, and how many of them train."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return f"{sum(n for n, _ in counts):,} parameters, {sum(n for n, trained in counts if trained):,} trained"


def two_steps(module: Any, batch: Any, runtime: RuntimeConfig) -> float:
    """Two optimizer steps by Lightning, without checkpoints; returns the seconds of the second."""
    from lightning import Callback, Trainer
    from torch.utils.data import DataLoader

    from common.runtime import resolve_device
    from common.training import LIGHTNING_PRECISION

    class Watch(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.begun = clock()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            loss: Tensor = outputs["loss"]
            self.loss, self.seconds = loss.item(), clock() - self.begun

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    device, watch = resolve_device(runtime.device), Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_steps=2, accelerator={"cuda": "gpu"}.get(device.type, device.type), devices=1, logger=False,
            precision=LIGHTNING_PRECISION[runtime.precision], gradient_clip_val=1.0,  # type: ignore[arg-type]
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[watch],
        )  # fmt: skip
        twice: Any = [batch, batch]
        trainer.fit(module, DataLoader(twice, batch_size=None))
    if trainer.global_step != 2 or watch.loss != watch.loss:
        raise RuntimeError(f"two steps ended after {trainer.global_step} with the loss {watch.loss}")
    return watch.seconds


def clock() -> float:
    """Seconds: of the processor's work where there is no GPU, so that what else runs here does not count."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def peak_memory() -> float:
    """The most that this process has held, in bytes: of the GPU when one is used, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
