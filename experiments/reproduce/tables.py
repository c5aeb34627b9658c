"""One published table with one command: what is missing, what it costs here, the run, its numbers beside the published.

    python -m experiments.reproduce clipcap-coco                 # DATA and WEIGHTS are ./data and ./weights
    python -m experiments.reproduce recycle-dutch --dry-run      # full size, random weights, two steps of each phase

The work is that of the other scripts of this directory with the papers' settings; each resumes, so the same command
resumes a run that was stopped. docs/reproduce.md has the list of data and weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from common.checks import UserError, require_fields_at_least
from common.runtime import free_memory, hardware, resolve_dtype, start
from experiments.reproduce.captioners import (
    coco_needs,
    conceptual_needs,
    nocaps_costs,
    nocaps_needs,
    rehearse_captioners,
    run_coco,
    run_conceptual,
    run_nocaps,
)
from experiments.reproduce.config import CLIP, GPT2, MEDIUM, Config
from experiments.reproduce.costs import (
    Cost,
    captioner_costs,
    duration,
    field_costs,
    matrix_rate,
    recycling_costs,
)
from experiments.reproduce.fields import (
    ENCODERS,
    FIELD_ARMS,
    rehearse_encoders,
    rehearse_fields,
    run_encoders,
    run_fields,
    scene_needs,
)
from experiments.reproduce.languages import LANGUAGES, rehearse_language, run_language, text_needs
from experiments.reproduce.needs import Need, find_weights, missing_weights
from experiments.reproduce.rehearsal import peak_memory


@dataclass(frozen=True)
class Table:
    """A published table."""

    title: str
    needs: Callable[[Config], list[Need]]
    weights: tuple[str, ...]
    """Hub ids, or library:name."""
    costs: Callable[[Config], list[Cost]]
    run: Callable[[Config, dict[str, str]], None]
    """Takes the weights by name, as found."""
    rehearse: Callable[[Config], Iterator[str]]
    """The dry run: yields a line after each phase."""


def check(config: Config, table: Table) -> tuple[dict[str, str], int]:
    """The weights by name, as found, and how much is missing; that and what is optional is printed."""
    found = {name: find_weights(config.weights, name) for name in table.weights}
    needs = table.needs(config)
    needs += [missing_weights(config.weights, name) for name, place in found.items() if place is None]
    missing = [need for need in needs if not need.met and not need.optional]
    print("missing:" if missing else "nothing is missing.")
    for need in missing + [need for need in needs if not need.met and need.optional]:
        print("\n".join(need.lines))
    return {name: place for name, place in found.items() if place is not None}, len(missing)


def estimate(config: Config, table: Table, device: torch.device) -> list[str]:
    """Lines that say what each phase takes in time and memory."""
    rate, how = 1e9 * config.matrix_rate, "as given"
    if not config.matrix_rate:
        rate = matrix_rate(device, resolve_dtype(config.runtime.precision))
        how = f"a {config.runtime.precision} matrix product measured here: {hardware()}"
    costs = table.costs(config)
    lines = [f"estimate at {rate / 1e9:,.0f} GFLOP/s ({how})"]
    for cost in costs:
        lines.append(
            f"  {cost.phase:<48} {cost.flops:9.2e} FLOP  {duration(cost.flops / rate):>10}  "
            f"{cost.memory / 2**30:6.1f} GiB"
        )
    total = sum(cost.flops for cost in costs)
    lines.append(f"  {'in all':<48} {total:9.2e} FLOP  {duration(total / rate):>10}")
    lines.append(
        "  Time is arithmetic over that rate and so the least; docs/clipcap_speed.md has the share of it that "
        "is reached."
    )
    lines.append(
        f"  For another machine: python -m experiments.reproduce {config.name} --dry-run --matrix-rate RATE, "
        f"its GFLOP/s in {config.runtime.precision}, in which this run computes (--precision)."
    )
    free, most = free_memory(device), max(cost.memory for cost in costs)
    if not config.matrix_rate and most > free:
        lines.append(f"  MEMORY: {most / 2**30:.1f} GiB are needed and {free / 2**30:.1f} are free here.")
    return lines


TABLES: dict[str, Table] = {
    "clipcap-coco": Table(
        "ClipCap on COCO (Mokady et al. 2021, table 1)", coco_needs, (CLIP, GPT2),
        lambda config: captioner_costs(123_287, 566_747, 5_000), run_coco, rehearse_captioners,
    ),
    "clipcap-conceptual": Table(
        "ClipCap on Conceptual Captions (Mokady et al. 2021, table 1)", conceptual_needs, (CLIP, GPT2),
        lambda config: captioner_costs(3_334_173, 3_318_333, 15_840), run_conceptual, rehearse_captioners,
    ),
    "clipcap-nocaps": Table(
        "ClipCap on nocaps (Mokady et al. 2021, table 1)", nocaps_needs, (CLIP, GPT2),
        nocaps_costs, run_nocaps, rehearse_captioners,
    ),
    "dietnerf-synthetic": Table(
        "DietNeRF from 8 views (Jain et al. 2021, table 1)", scene_needs, (CLIP,),
        lambda config: field_costs(FIELD_ARMS | {"nerf, 100 views": (256, False)}, len(config.scenes)),
        run_fields, rehearse_fields,
    ),
    "dietnerf-encoders": Table(
        "DietNeRF with other encoders (Jain et al. 2021, ablation)", scene_needs, tuple(ENCODERS.values()),
        lambda config: field_costs(dict.fromkeys(ENCODERS, (256, True)), len(config.scenes)),
        run_encoders, rehearse_encoders,
    ),
} | {
    f"recycle-{settings['name']}": Table(
        f"GPT-2 recycled, {settings['name'].capitalize()} (de Vries & Nissim 2021, sec. 4)",
        text_needs(language), (GPT2, MEDIUM),
        lambda config, language=language, settings=settings: recycling_costs(  # type: ignore[misc]
            config.data / "text" / language, settings["vocab_size"]
        ),
        run_language(language), rehearse_language(language),
    )
    for language, settings in LANGUAGES.items()
}  # fmt: skip


def main(config: Config) -> None:
    """Say what is missing and what it costs, and run when nothing is missing; or the costs and the dry run."""
    require_fields_at_least(config, 0, "steps", "matrix_rate")
    warnings.filterwarnings("ignore", module=r"nerfstudio\b|torch\b")  # of what they will drop one day
    table, device = TABLES[config.name], start(config.runtime)
    print(table.title)
    weights, missing = ({}, 0) if config.dry_run else check(config, table)
    print("\n".join(estimate(config, table, device)), flush=True)
    if config.dry_run:
        for line in table.rehearse(config):
            print(f"dry run: {line}; peak {peak_memory() / 2**30:.1f} GiB", flush=True)
        print("every phase ran.")
        return
    if missing:
        raise UserError(
            f"{missing} of what {config.name} needs is missing: put it where the list above says, or give "
            f"--data and --weights (--dry-run needs none of it)."
        )
    table.run(config, weights)
