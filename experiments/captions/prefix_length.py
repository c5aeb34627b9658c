"""ClipCap's ablation of the prefix length K (Mokady et al. 2021, figure 4): both captioners at several lengths.

    python -m experiments.captions.prefix_length --data dataset_coco.json --images coco --lengths 1 5 10 20 40
    python -m experiments.captions.prefix_length --small

5 epochs each at full size, as in the paper; the published result is a figure: longer helps the frozen model and
overfits the tuned one. The Transformer's clip length is K, as in the original's long runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.checks import require_at_least, require_one_of, run_command
from common.report import plot_lines
from experiments import from_command_line
from experiments.captions.tables import (
    VARIANTS,
    TableConfig,
    cell,
    cpu_minutes,
    prepare,
    run_captioner,
    score_captioner,
    write_table,
)

METRICS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "CLIPScore")


@dataclass(frozen=True)
class Config(TableConfig):
    """Train the paper's two captioners at several prefix lengths and score them."""

    lengths: tuple[int, ...] = (5, 10, 20)
    """Prefix lengths K."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which captioners: transformer-frozen, mlp-tuned."""


def main(config: Config) -> None:
    """Train, score, and print and write the table and the figure."""
    for length in config.lengths:
        require_at_least("length", length, 1)
    for name in config.variants:
        require_one_of("variant", name, tuple(VARIANTS))
    setting = prepare("clipcap_prefix_length", config, epochs=5, layout="Karpathy's dataset_coco.json, with --images")
    rows, tokenizer = [], ""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for name in config.variants:
        for length in sorted(config.lengths):
            run = f"{name}-{length}"
            model = run_captioner(setting, run, prefix_length=length, clip_length=length, **VARIANTS[name])
            found = score_captioner(setting, model, run)
            tokenizer = found.tokenizer
            xs, ys = curves.setdefault(name, ([], []))
            xs.append(length)
            ys.append(100 * found.scores["CIDEr"])
            scores = {metric: cell(found, metric) for metric in METRICS}
            rows.append({"captioner": name, "K": length} | scores | {"CPU min": cpu_minutes(setting.out / run)})
    figure = plot_lines(curves, x="prefix length K", y="CIDEr x 100")
    text = ["Scores times 100 with 95% intervals over the test images."]
    picture = f"clipcap_prefix_length{'_small' * config.small}.png"
    for folder in (setting.out, config.docs):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / picture, dpi=110)
    lengths = " ".join(map(str, config.lengths))
    write_table(
        setting,
        "Prefix length",
        [*text, "", f"![CIDEr by prefix length]({picture})"],
        rows,
        tokenizer=tokenizer,
        columns=("captioner", "K", *METRICS, "CPU min"),
        options=f" --lengths {lengths}",
    )


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
