"""What only a GPU can show, in at most 10 minutes on one: training, captioning and embedding against its own roofline.

    python -m experiments.gpu_check                          # out/gpu_check/gpu_check.json and index.html
    python -m experiments.gpu_check --device cpu --small     # a dry run with tiny models

Weights, images and tokens are random and models of full size, so that nothing is downloaded. Each part is a process of
its own (`experiments.gpu_parts`): one that fails or runs out of time is recorded, and the others run all the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from common.checks import UserError, require_at_least, require_place, run_command
from common.files import write_json
from common.report import Page, plot_bars
from common.runtime import require_seed, resolve_device
from experiments import from_command_line

Part = Literal["rates", "embed", "decode", "captioners", "recycling", "field"]
TITLES: dict[Part, str] = {
    "rates": "rates of matrix products and of memory",
    "embed": "embedding with ViT-L/14",
    "decode": "captions by GPT-2 124M",
    "captioners": "training captioners on ViT-L/14",
    "recycling": "recycling GPT-2 124M",
    "field": "DietNeRF's published MLP",
}


@dataclass(frozen=True)
class Config:
    """Measure on one GPU what only a GPU can show, and write one JSON file and one page."""

    device: str = "auto"
    """auto or cuda (the first GPU), cuda:N, or cpu."""
    budget: float = 600.0
    """Seconds in all. A part may take half of what is left of them, the last all; then it is stopped, and that is
    recorded."""
    parts: tuple[Part, ...] = tuple(TITLES)
    """What to run; without rates there is no roofline."""
    small: bool = False
    """Tiny models and a few steps: the dry run, which measures nothing of use."""
    seed: int = 0
    """Seed of weights and data."""
    out: Path = Path("out/gpu_check")
    """Directory of gpu_check.json and index.html."""


def find_device(name: str) -> str:
    """The device to measure.

    Raises:
        UserError: there is none of that name, or it is no CUDA GPU and not asked for as cpu.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            raise UserError(
                "device is 'auto' and no CUDA GPU is here: use a machine with one, or --device cpu --small."
            )
        return "cuda"
    if resolve_device(name).type == "mps":
        raise UserError("device is 'mps', whose memory is not measured: use cuda or cpu.")
    return name


def run_part(name: str, config: Config, device: str, seconds: float) -> dict[str, Any]:
    """A part in a process of its own: what it measured, or `error`, the last line of what it said."""
    command = [sys.executable, "-m", "experiments.gpu_parts", name, "--device", device, "--seed", str(config.seed)]
    try:
        done = subprocess.run(
            command + ["--small"] * config.small, capture_output=True, text=True, timeout=max(seconds, 0.1)
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {seconds:.0f} s, its share of the budget of {config.budget:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"ended with code {done.returncode}", "said": done.stderr[-4000:]}
    return {"error": None, **json.loads(done.stdout.splitlines()[-1])}


def roofline(measurements: list[dict[str, Any]]) -> dict[str, float]:
    """From the part `rates`: operations a second by precision, and bytes a second as `memory`."""
    found = {one["precision"]: one["flops"] / one["seconds"] for one in measurements if one["flops"]}
    copy = next(one for one in measurements if not one["flops"])
    return found | {"memory": copy["moved"] / copy["seconds"]}


def against(roof: Mapping[str, float], one: dict[str, Any]) -> dict[str, Any]:
    """A measurement with its rates and, where there is a roofline, the share of it that was reached.

    The least time is that of the arithmetic, or that of moving the bytes that have to be moved, whichever is longer.
    """
    shown = one | {"items_per_second": one["items"] / one["seconds"], "flops_per_second": one["flops"] / one["seconds"]}
    if roof:
        times = {"arithmetic": one["flops"] / roof[one["precision"]], "memory": one["moved"] / roof["memory"]}
        bound = max(times, key=lambda name: times[name])
        shown |= {"bound_by": bound, "of_roofline": times[bound] / one["seconds"]}
    return shown


def check(config: Config, device: str) -> dict[str, Any]:
    """Run the parts one after the other within the budget; what is there is written after each.

    A part may take half of the time that is left, and the last one all of it: one that hangs leaves the others some.
    """
    begun = time.monotonic()
    roof: dict[str, float] = {}
    result: dict[str, Any] = {"config": config, "device": device, "roofline": roof, "parts": {}}
    for name in config.parts:
        started = time.monotonic()
        left = config.budget - (started - begun)
        share = left if name == config.parts[-1] else left / 2
        found: dict[str, Any] = {"error": "not begun: the budget was used up"}
        if left > 0:
            found = run_part(name, config, device, share)
        if not found["error"]:
            result |= {key: found.pop(key) for key in ("hardware", "versions")}
            if name == "rates":
                roof = result["roofline"] = roofline(found["measurements"])
        seconds = time.monotonic() - started
        part: dict[str, Any] = {"seconds": seconds, "measurements": [], **found}
        result["parts"][name] = part
        if name != "rates":
            part["measurements"] = [against(roof, one) for one in part["measurements"]]
        print(f"{TITLES[name]}: {part['error'] or 'done'} ({seconds:.0f} s)", flush=True)
        for one in part["measurements"]:
            reached = f", {one['of_roofline']:.0%} of the roofline" if "of_roofline" in one else ""
            print(f"  {one['what']}: {one['seconds']:.4g} s, {one['peak_bytes'] / 2**30:.2f} GiB at most{reached}")
        result["seconds"] = time.monotonic() - begun
        write_json(config.out / "gpu_check.json", result)
    return result


def page_of(result: dict[str, Any], command: str) -> Page:
    """The results as one page."""
    config: Config = result["config"]
    page = Page("What one GPU does", result.get("hardware", result["device"])).command(command)
    if config.small:
        page.note("A dry run with tiny models: the numbers say nothing about the device.")
    parts = result["parts"]
    size = "tiny" if config.small else "of full size"
    page.section("Parts", f"Each is a process of its own. Weights, images and tokens are random, models {size}.")
    page.table(
        [{"part": TITLES[name], "result": part["error"] or "done", "seconds": part["seconds"]}
         for name, part in parts.items()]
    )  # fmt: skip
    if roof := result["roofline"]:
        page.section("The device's own rates", "Of a large product of square matrices, and of a large copy in memory.")
        page.table(
            [{"rate": f"{name}, TFLOP/s", "measured": roof[name] / 1e12} for name in ("bf16", "fp32")]
            + [{"rate": "memory, GB/s, read and written", "measured": roof["memory"] / 1e9}]
        )
    measured = [one for name, part in parts.items() if name != "rates" for one in part["measurements"]]
    if measured:
        page.section(
            "Measured",
            "The roofline is the time of the matrix products' arithmetic at the rate above, or that of the bytes that "
            "have to be moved, whichever is longer. fp32 is TF32 where the GPU has it.",
        )
        page.table([row_of(one) for one in measured])
    if shares := {one["what"]: one["of_roofline"] for one in measured if "of_roofline" in one}:
        page.figure(plot_bars(shares, x="share of the roofline"), "Share of the roofline that was reached.")
    if notes := [{"what": one["what"], **one["notes"]} for one in measured if one["notes"]]:
        page.section("Checks", "Losses, in nats for language models, are of the second step and of the last one.")
        page.table([{name.replace("_", " "): value for name, value in row.items()} for row in notes])
    return page.details("everything as JSON", result)


def row_of(one: dict[str, Any]) -> dict[str, Any]:
    """A row of the table of measurements."""
    return {
        "what": one["what"],
        "precision": one["precision"],
        "seconds": one["seconds"],
        "a second": f"{one['items_per_second']:,.1f} {one['unit']}",
        "TFLOP/s": one["flops_per_second"] / 1e12,
        "of the roofline": f"{one['of_roofline']:.0%}" if "of_roofline" in one else None,
        "bound by": one.get("bound_by"),
        "peak GiB": one["peak_bytes"] / 2**30,
    }


def main(config: Config) -> int:
    """Check, write, and say which parts failed; 1 if any did."""
    require_at_least("budget", config.budget, 1)
    require_seed(config.seed)
    if not config.parts:
        raise UserError("parts is empty: name at least one.")
    require_place(config.out, "out", directory=True)
    device = find_device(config.device)
    if config.small:
        print("dry run: every model is tiny, whatever its name below, and the numbers say nothing about the device.")
    result = check(config, device)
    command = f"python -m experiments.gpu_check --device {device}" + " --small" * config.small
    place = page_of(result, command).write(config.out / "index.html")
    failed = [name for name, part in result["parts"].items() if part["error"]]
    print(f"written to {config.out / 'gpu_check.json'} and {place}, after {result['seconds']:.0f} s")
    if failed:
        print(f"error: {len(failed)} of {len(config.parts)} parts did not end: {', '.join(failed)}.", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
