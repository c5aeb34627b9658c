"""What a training step and a rendered megapixel cost in each field, against the published configuration in one run.

    python -m benchmarks.dietnerf_step --docs docs/benchmarks

Published: MLP of 8 x 256, 64 + 128 samples, 1,024 rays a step, a 168 x 168 semantic render every 10 steps. Its step is
linear in the number of rays, so it is measured on few of them (`published_measured_rays`, `published_measured_side`)
and scaled. The other fields take a step as they are, with the packaged encoder, which sees 96 x 96 pixels, so that no
more are rendered; `_168` is the same at the published size. CPU seconds, not wall seconds, because machines are shared.
Each field is measured in a process of its own, for its peak memory.

Keys of the last line: `{field}_step_ratio` and `{field}_render_ratio`, times cheaper than the published configuration,
a step without the semantic loss and a megapixel; `{field}_semantic_overhead`, a step's mean cost with the semantic loss
every 10 steps over its cost without, and `{field}_semantic_overhead_168`; `{field}_step_seconds`,
`{field}_semantic_step_seconds`, `{field}_megapixel_seconds`,
`{field}_memory_mb` (beyond the libraries), for `published`, `nerfacto`, `grid`.
"""

from __future__ import annotations

import multiprocessing
import resource
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import parser_of, print_result
from benchmarks.timing import cpu_seconds
from common.files import write_json
from common.pretrained import ASSETS
from common.runtime import seed_everything
from dietnerf.cli import silence_nerfstudio
from dietnerf.methods import method_config

EVERY = 10
RESOLUTION = 168
RAYS = 1024
FIELDS = {"published": "dietnerf", "nerfacto": "dietnerf-nerfacto", "grid": "dietnerf-grid"}


def measure(field: str, *, quick: bool, seed: int) -> dict[str, float]:
    """Seconds of a step without and with the semantic render, of a megapixel, and peak memory of one field."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.set_num_threads(1)
    seed_everything(seed)
    published = field == "published"
    config = method_config(FIELDS[field])
    data, model_config = config.pipeline.datamanager, config.pipeline.model
    data.data = data.dataparser.data = ASSETS / "samples" / "multiview"
    data.crop_steps = 0
    rays = (16 if quick else 128) if published else (data.train_num_rays_per_batch)
    side = (6 if quick else 16) if published else RESOLUTION
    data.train_num_rays_per_batch = rays
    model_config.semantic = replace(
        model_config.semantic, weight=0.01, encoder="tiny", every=EVERY, resolution=side, poses="sphere"
    )
    config.pipeline.blank_check = 0
    pipeline = config.pipeline.setup(device="cpu", test_mode="val")
    pipeline.train()
    pipeline.prepare()
    model = pipeline.model
    groups = [
        {"params": parameters, "lr": config.optimizers[name]["optimizer"].lr}
        for name, parameters in model.get_param_groups().items()
    ]
    last = 10 * config.max_num_iterations  # every voxel, every band
    last -= last % EVERY
    model.before_step(last)
    optimizer = torch.optim.Adam(groups, fused=True)  # as training does on a CPU

    def step(number: int) -> None:
        optimizer.zero_grad()
        model.before_step(number)
        _, losses, _ = pipeline.get_train_loss_dict(number)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    def train_a_little(number: int) -> None:
        for i in range(number):
            step(last + 1 + i % (EVERY - 1))

    # A field that is still fog costs more than one that has found its surfaces.
    train_a_little(1 if published else (20 if quick else 200))
    model.before_step(last)  # looks which voxels are empty, as training does now and then
    repeats = 1 if published else 3
    plain = cpu_seconds(lambda: step(last + 1), repeats)
    due = next(n for n in range(last + 1, last + EVERY + 1) if model.needs_semantic_view(n))
    semantic = cpu_seconds(lambda: step(due), 1 if published or quick else 2)
    if published:  # linear in rays: the semantic part is what the render adds
        render = max(semantic - plain, 0.0) * (RESOLUTION / side) ** 2
        plain *= RAYS / rays
        large = semantic = plain + render
    else:
        assert pipeline._sampler is not None
        pipeline._sampler.resolution = RESOLUTION
        large = cpu_seconds(lambda: step(due), 1)
    pixels = 8 if published else (64 if quick else 100)
    camera = pipeline.datamanager.train_dataset.cameras[:1]
    camera.rescale_output_resolution(pixels / int(camera.width[0]))
    pipeline.eval()
    frame = cpu_seconds(lambda: model.get_outputs_for_camera(camera), repeats)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "step_seconds": plain,
        "semantic_step_seconds": semantic,
        "semantic_overhead": ((EVERY - 1) * plain + semantic) / (EVERY * plain),
        "semantic_overhead_168": ((EVERY - 1) * plain + large) / (EVERY * plain),
        "measured_rays": rays,
        "measured_side": side if published else min(side, model.semantic_loss.encoder.size),
        "megapixel_seconds": frame / (pixels * pixels) * 1e6,
        "memory_mb": (after - before) / 1024,
    }


def _child(pipe: Connection, field: str, quick: bool, seed: int) -> None:
    pipe.send(measure(field, quick=quick, seed=seed))


def measure_alone(field: str, *, quick: bool, seed: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, field, quick, seed))
    child.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        raise RuntimeError(f"the process that measured {field} ended without a result") from None
    finally:
        child.join()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = parser_of(__doc__, quick="few rays of the published field, short warm-up", seed="weights and rays")
    parser.add_argument("--docs", type=Path, help="directory that gets dietnerf_step.json")
    given = parser.parse_args(arguments)
    silence_nerfstudio()
    result: dict[str, Any] = {"every": EVERY}
    found = {}
    for field in FIELDS:
        found[field] = values = measure_alone(field, quick=given.quick, seed=given.seed)
        result |= {f"{field}_{name}": value for name, value in values.items()}
        print(
            f"{field}: {values['step_seconds']:.3f} s a step, {values['semantic_step_seconds']:.2f} s with the "
            f"semantic render, {values['megapixel_seconds']:.1f} s a megapixel, {values['memory_mb']:.0f} MB",
            flush=True,
        )
    for field in ("nerfacto", "grid"):
        for name, key in (("step", "step_seconds"), ("render", "megapixel_seconds")):
            result[f"{field}_{name}_ratio"] = found["published"][key] / found[field][key]
    said = print_result(result)
    if given.docs:
        write_json(given.docs / "dietnerf_step.json", {"quick": given.quick, "seed": given.seed, **said})
    return said


if __name__ == "__main__":
    main()
