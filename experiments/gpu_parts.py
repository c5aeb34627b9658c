"""What `experiments.gpu_check` measures: each part alone, at full size with random weights, as one line of JSON.

python -m experiments.gpu_parts decode --device cuda
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.files import plain
from common.pretrained import ASSETS
from common.runtime import RuntimeConfig, fork_generators, provenance, start
from experiments.reproduce.rehearsal import clock, peak_memory, random_clip

if TYPE_CHECKING:
    from lightning import LightningModule
    from transformers import CLIPConfig, GPT2Config

    from common.clip import FrozenCLIP

BATCH, CAPTION, PREFIX = 40, 13, 10
"""ClipCap's: captions in a batch, tokens of a caption with its end (COCO's mean), positions of the prefix."""
BEAMS, TOKENS = 5, 20
VOCABULARY, BLOCK, BLOCKS = 40_000, 1024, 8
"""Recycling's: the new language's vocabulary, tokens of a block, blocks of a batch (de Vries & Nissim 2021)."""
OPTIMIZER_BYTES = 28
"""That Adam moves at least for a trained number: reads weight, gradient and two moments, writes back three, in fp32."""


@dataclass(frozen=True)
class Measurement:
    """How long some work took, and the least that it needs."""

    what: str
    precision: str
    """Of its matrix products: fp32 is TF32 on a GPU that has it."""
    unit: str
    items: float
    """How many of `unit` were done in `seconds`."""
    seconds: float
    flops: float
    """Floating-point operations of its matrix products."""
    moved: float
    """Bytes that have to be read and written at the least."""
    peak_bytes: float
    """The most held since the part before it: GPU memory, or all of the process on a CPU."""
    notes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """Where a part runs, and at which sizes."""

    device: torch.device
    small: bool = False
    """Tiny models, a few steps: the dry run."""
    seed: int = 0

    def pick(self, full: Any, small: Any) -> Any:
        """One of two sizes."""
        return small if self.small else full

    def wait(self) -> None:
        """Until the GPU has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget_peak(self) -> None:
        """Let the next `peak_memory` be of what comes now; of a CPU's process it is of all since its start."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def seconds(self, work: Callable[[], object], *, times: int = 1, repeats: int = 3) -> float:
        """Of one call of `work`: the best of `repeats` rounds of `times` calls each, after one call to warm up."""
        work()
        times, best = self.pick(times, 1), float("inf")
        for _ in range(self.pick(repeats, 1)):
            self.wait()
            begun = clock()
            for _ in range(times):
                work()
            self.wait()
            best = min(best, clock() - begun)
        return best / times


def gpt2_config(work: Work, **changes: Any) -> GPT2Config:
    """GPT-2 124M."""
    from transformers import GPT2Config

    small = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 200, "n_positions": 64}
    config = GPT2Config(**work.pick({}, small) | changes)
    config.bos_token_id = config.eos_token_id = config.vocab_size - 1
    return config


def clip_config(work: Work) -> CLIPConfig:
    """CLIP's ViT-L/14, with one layer of the text tower, which no part uses."""
    from transformers import CLIPConfig

    tower = work.pick(
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    )
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = tower | {"image_size": work.pick(224, 28), "patch_size": 14}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=work.pick(768, 16))


def load_random_clip(work: Work, config: CLIPConfig) -> FrozenCLIP:
    """A CLIP of these sizes with random weights, in bf16."""
    from common.clip import load_clip

    with tempfile.TemporaryDirectory() as place:
        return load_clip(random_clip(Path(place), config), device=work.device, dtype=torch.bfloat16)


def rates(work: Work) -> list[Measurement]:
    """The roofline: a large matrix product in each precision, and a large copy in memory."""
    side, found = work.pick(8192, 256), []
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        work.forget_peak()
        x, y = (torch.randn(side, side, device=work.device).to(dtype) for _ in range(2))
        out = torch.empty_like(x)
        seconds = work.seconds(lambda x=x, y=y, out=out: torch.mm(x, y, out=out), times=10, repeats=5)  # type: ignore[misc]
        moved = 3.0 * side**2 * dtype.itemsize
        name = "matrix product"
        found.append(Measurement(name, precision, "products", 1, seconds, 2.0 * side**3, moved, peak_memory()))
    work.forget_peak()
    source = torch.ones(work.pick(1 << 28, 1 << 20), device=work.device)
    target = torch.empty_like(source)
    seconds = work.seconds(lambda: target.copy_(source), times=10, repeats=5)
    moved = 2.0 * source.numel() * source.itemsize
    return [*found, Measurement("copy in memory", "fp32", "copies", 1, seconds, 0.0, moved, peak_memory())]


def embed(work: Work) -> list[Measurement]:
    """Images through ViT-L/14 in bf16, as `clipcap embed` encodes them."""
    from clipcap.data.embeddings import encode

    found, config = [], clip_config(work)
    clip = load_random_clip(work, config)
    vision = config.vision_config
    patches = 1 + (vision.image_size // vision.patch_size) ** 2
    tower: Any = clip.backbone
    matrices = sum(p.numel() for p in tower.model.vision_model.encoder.parameters() if p.ndim == 2)
    attention = 2.0 * vision.num_hidden_layers * patches**2 * vision.hidden_size
    for batch in work.pick((1, 64, 256), (1, 2)):
        work.forget_peak()
        pixels = torch.randn(batch, 3, clip.image_size, clip.image_size, device=work.device)
        seconds = work.seconds(lambda pixels=pixels: encode(clip, pixels, "embedding"), times=5)  # type: ignore[misc]
        flops = 2.0 * batch * (patches * matrices + attention)
        name = f"embedding with ViT-L/14, batch {batch}"
        found.append(Measurement(name, "bf16", "images", batch, seconds, flops, 2.0 * matrices, peak_memory()))
    return found


def decode(work: Work) -> list[Measurement]:
    """Captions by GPT-2 124M in bf16, 5 beams of 20 tokens; and whether those in fp32 are those of `generate`."""
    from clipcap.config import ClipCapConfig
    from clipcap.decoding import decode as search
    from clipcap.model import ClipCapModel

    config = ClipCapConfig(gpt2_config=gpt2_config(work).to_dict(), clip_width=512, prefix_length=PREFIX)
    with fork_generators(work.seed):
        model = ClipCapModel(config).to(work.device).eval()
        embeddings = torch.randn(work.pick(256, 4), 512).to(work.device)

    def captions(batch: int) -> list[list[int]]:
        options: dict[str, Any] = {"strategy": "beam", "num_beams": BEAMS, "max_new_tokens": TOKENS}
        return [best[0].token_ids for best in search(model, embeddings[:batch], stop_token_ids=[], **options)]

    few = work.pick(8, 2)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would decide differently between tokens that are nearly equal
    with torch.inference_mode():
        prefix, gpt2 = model.prefix(embeddings[:few]), model.gpt2
        gpt2.generation_config.eos_token_id = None  # type: ignore[union-attr]
        theirs = gpt2.generate(  # type: ignore[operator]
            inputs_embeds=prefix, attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long, device=work.device),
            num_beams=BEAMS, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS, pad_token_id=0,
        ).tolist()  # fmt: skip
    same = sum(a == b for a, b in zip(captions(few), theirs, strict=True)) / few
    torch.set_float32_matmul_precision(before)

    model.to(torch.bfloat16)
    blocks = sum(p.numel() for p in model.gpt2.transformer.h.parameters() if p.ndim == 2)  # type: ignore[union-attr]
    head = model.gpt2.get_output_embeddings().weight.numel()
    each = PREFIX * blocks + head + (TOKENS - 1) * BEAMS * (blocks + head)
    found = []
    for batch in work.pick((1, 8, 64, 256), (1, 4)):
        work.forget_peak()
        seconds = work.seconds(lambda batch=batch: captions(batch))  # type: ignore[misc]
        read = 2.0 * TOKENS * (blocks + head)  # every weight once a step
        name = f"captions by GPT-2 124M, {BEAMS} beams, batch {batch}"
        notes = {"same_as_generate_in_fp32": same}
        found.append(
            Measurement(name, "bf16", "captions", batch, seconds, 2.0 * batch * each, read, peak_memory(), notes)
        )
    return found


def take_steps(work: Work, module: LightningModule, batches: list[Any], precision: str, warm: int) -> dict[str, float]:
    """Train by Lightning; the mean seconds of the steps after `warm`, and the loss of the second and of the last."""
    from lightning import Callback, Trainer
    from torch.utils.data import DataLoader

    from common.training import LIGHTNING_PRECISION

    class Watch(Callback):
        losses: list[Tensor] = []
        begun = ended = 0.0

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == warm:
                work.wait()
                self.begun = clock()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.losses.append(outputs["loss"].detach())
            if batch_idx == len(batches) - 1:
                work.wait()
                self.ended = clock()

    watch = Watch()
    watch.losses = []
    on_gpu = work.device.type == "cuda"
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_steps=len(batches), accelerator="gpu" if on_gpu else "cpu",
            devices=[work.device.index or 0] if on_gpu else 1, logger=False, gradient_clip_val=1.0,
            precision=LIGHTNING_PRECISION[precision], enable_checkpointing=False,  # type: ignore[arg-type]
            enable_progress_bar=False, enable_model_summary=False, callbacks=[watch],
        )  # fmt: skip
        data: Any = batches
        with fork_generators(work.seed):  # dropout's masks
            trainer.fit(module, DataLoader(data, batch_size=None))
    losses = torch.stack(watch.losses).float().cpu()
    if trainer.global_step != len(batches) or not torch.isfinite(losses).all():
        raise RuntimeError(f"training ended after {trainer.global_step} of {len(batches)} steps, losses {losses}")
    return {
        "seconds": (watch.ended - watch.begun) / (len(batches) - warm),
        "second_loss": float(losses[1]),
        "last_loss": float(losses[-1]),
    }


def trained_numbers(module: torch.nn.Module) -> int:
    """Parameters that train."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def captioners(work: Work) -> list[Measurement]:
    """Both of ClipCap's captioners on ViT-L/14's embeddings of random images, trained in bf16 at the batch of 40."""
    from clipcap.config import ClipCapConfig
    from clipcap.data.embeddings import encode
    from clipcap.model import ClipCapModel
    from clipcap.training.module import CaptionTraining
    from experiments.captions.tables import VARIANTS

    clip = load_random_clip(work, clip_config(work))
    batch_size, steps = work.pick(BATCH, 4), work.pick(40, 4)
    with fork_generators(work.seed):
        pixels = torch.randn(batch_size, 3, clip.image_size, clip.image_size)
        ids = torch.randint(gpt2_config(work).vocab_size, (batch_size, CAPTION))
    embeddings = encode(clip, pixels, "embedding").float().cpu()
    batch = {"clip_embeddings": embeddings, "input_ids": ids, "labels": ids}
    width = clip.width
    del clip
    found = []
    for name, variant in VARIANTS.items():
        work.forget_peak()
        sizes = work.pick({}, {"mapper_layers": 1, "mapper_heads": 2})
        with fork_generators(work.seed):
            model = ClipCapModel(
                ClipCapConfig(gpt2_config=gpt2_config(work).to_dict(), clip_width=width, **sizes, **variant)
            )
        module = CaptionTraining(model.train(), lr=1e-4, warmup=1, total=steps, weight_decay=0.01, schedule="linear")
        taken = take_steps(work, module, [batch] * steps, "bf16", warm=work.pick(10, 2))
        gpt2: Any = model.gpt2
        blocks = sum(p.numel() for p in gpt2.transformer.h.parameters() if p.ndim == 2)
        head = gpt2.get_output_embeddings().weight.numel()
        through = 6 if variant["tune_gpt2"] else 4
        flops = float(through) * batch_size * (blocks * (PREFIX + CAPTION - 1) + head * CAPTION)
        tokens = batch_size * CAPTION
        notes = {key: value / tokens for key, value in taken.items() if key != "seconds"}  # its losses are sums
        moved = float(OPTIMIZER_BYTES * trained_numbers(model))
        what = f"training {name} on ViT-L/14, GPT-2 124M"
        found.append(
            Measurement(what, "bf16", "captions", batch_size, taken["seconds"], flops, moved, peak_memory(), notes)
        )
        del model, module, gpt2
    return found


def recycling(work: Work) -> list[Measurement]:
    """GPT-2 124M with a new vocabulary on batches of 8 x 1,024 tokens in bf16: embeddings alone, then everything."""
    from transformers import GPT2LMHeadModel

    from recycle_gpt2.lexical import train_only
    from recycle_gpt2.training import Plan, Recycling, StageConfig

    block, blocks, steps = work.pick((BLOCK, BLOCKS, 30), (32, 2, 4))
    config = gpt2_config(work, **work.pick({"vocab_size": VOCABULARY}, {}))
    found = []
    for name, lr, layers in (("relearning the embeddings", 1e-3, ()), ("fine-tuning everything", 1e-4, "all")):
        work.forget_peak()
        with fork_generators(work.seed):
            model = GPT2LMHeadModel(config).train()
            batch = torch.randint(config.vocab_size - 1, (blocks, block))
        train_only(model, layers=layers)  # type: ignore[arg-type]
        tokens = block * blocks
        module = Recycling(model, StageConfig(lr=lr), Plan(steps, steps, tokens), block)
        taken = take_steps(work, module, [batch] * steps, "bf16", warm=work.pick(5, 2))
        seconds, flops = taken.pop("seconds"), float(module.flops_per_token) * tokens
        moved = float(OPTIMIZER_BYTES * trained_numbers(model))
        what = f"{name} of GPT-2 124M, {blocks} x {block:,} tokens"
        found.append(Measurement(what, "bf16", "tokens", tokens, seconds, flops, moved, peak_memory(), taken))
        del model, module
    return found


def radiance_field(work: Work) -> list[Measurement]:
    """DietNeRF's published MLP for 500 steps on the packaged scene, every tenth with a semantic view of 168 x 168."""
    from dietnerf.cli import silence_nerfstudio
    from dietnerf.methods import method_config
    from dietnerf.training import FewViewTraining

    silence_nerfstudio()
    config = method_config("dietnerf")
    data = config.pipeline.datamanager
    model: Any = config.pipeline.model
    data.data = data.dataparser.data = ASSETS / "samples" / "multiview"
    steps = work.pick(500, 6)
    work.forget_peak()
    with tempfile.TemporaryDirectory() as place:
        encoder = work.pick("random", "tiny")
        if encoder == "random":
            encoder = random_clip(Path(place))
        model.semantic = replace(model.semantic, encoder=encoder)
        if work.small:
            data.train_num_rays_per_batch = 16
            model.semantic = replace(model.semantic, every=2, resolution=8)
            model.num_coarse_samples = model.num_importance_samples = 4
            model.num_layers, model.layer_width = 2, 16
        with fork_generators(work.seed):
            module = FewViewTraining(config)
            every, rays = model.semantic.every, data.train_num_rays_per_batch
            taken = take_steps(work, module, list(range(steps)), "fp32", warm=every)
    matrices = sum(p.numel() for p in module.model.parameters() if p.ndim == 2 and p.requires_grad) / 2  # of two
    samples = 2 * model.num_coarse_samples + model.num_importance_samples
    # As in experiments/reproduce/costs.py: the semantic view is rendered again in the backward pass.
    flops = matrices * samples * (6.0 * rays + 8.0 * model.semantic.resolution**2 / every)
    seconds, moved = taken.pop("seconds"), float(OPTIMIZER_BYTES * trained_numbers(module.model))
    what = f"DietNeRF's published MLP, a step of {rays:,} rays, the mean of {steps - every} with their semantic views"
    return [Measurement(what, "fp32", "rays", rays, seconds, flops, moved, peak_memory(), taken)]


PARTS: dict[str, Callable[[Work], list[Measurement]]] = {
    "rates": rates, "embed": embed, "decode": decode, "captioners": captioners, "recycling": recycling,
    "field": radiance_field,
}  # fmt: skip
"""In the order in which they run: the longest comes last."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--small", action="store_true", help="tiny models and a few steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    given = parser.parse_args(arguments)
    device = start(RuntimeConfig(device=given.device, seed=given.seed))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    found = PARTS[given.part](Work(device, given.small, given.seed))
    print(json.dumps(plain({**provenance(), "measurements": found})))


if __name__ == "__main__":
    main()
