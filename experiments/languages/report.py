"""The tables and curves of the recycling experiments, made of the runs that are finished.

    python -m experiments.languages.report --out out/recycle --docs docs

Writes DOCS/recycling_results.md and its figures; docs/recycling.md explains them.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.checks import UserError, run_command
from common.files import write_text
from common.gpt2 import load_gpt2, token_table
from common.report import plot_lines
from experiments import from_command_line
from experiments.languages.arms import ARMS, slug
from experiments.languages.recycle import MEDIUM
from experiments.languages.text import LANGUAGES, surest_new_words
from recycle_gpt2.lexicon import build_lexicon
from recycle_gpt2.sampling import sample

PROMPTS = {
    "nld": ("Klik op", "In dit dialoogvenster", "U kunt een tabel"),
    "ita": ("Fate clic su", "In questa finestra", "Potete inserire"),
}


@dataclass(frozen=True)
class Config:
    """Write the tables and figures."""

    out: Path = Path("out/recycle")
    """Where experiments/languages/recycle.py wrote its runs."""
    docs: Path = Path("docs")
    """Where the page and its figures go."""


def read_runs(directory: Path) -> dict[str, dict[str, Any]]:
    """The finished runs of one language by name."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(directory.glob("runs/*/result.json"))}


def bits(result: dict[str, Any], split: str = "test") -> float:
    """Bits per byte on a held-out split."""
    return result["held_out"][split]["bits_per_byte"]


def mean(values: list[float]) -> str:
    """The mean, and with more than one value the spread (sample standard deviation)."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def interval(found: dict[str, Any]) -> str:
    """A 95% interval over documents."""
    ends = found["bits_per_byte_interval"]
    return "–" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def main_table(directory: Path, runs: dict[str, dict[str, Any]]) -> list[str]:
    """Every arm at equal tokens, and the baselines."""
    groups = defaultdict(list)
    for name, run in runs.items():
        if "-seed" in name and run["held_out"]:
            groups[run["arm"]].append(run)
    lines = [
        "| model | seeds | tokens | computed FLOPs | learning rate | same genre, bits/byte | 95% interval, seed 0 "
        "| second genre, bits/byte |",
        "|---|--:|--:|--:|--:|--:|---|--:|",
    ]
    for arm in (*ARMS, *MEDIUM):
        group = sorted(groups.get(arm, []), key=lambda run: run["seed"])
        if not group:
            continue
        one = group[0]
        rate = f"{one['rate']:g}" + (f", then {one['unfrozen_rate']:g}" if one["unfrozen_rate"] else "")
        lines.append(
            f"| {arm} | {len(group)} | {one['tokens']:,} | {one['flops']:.2e} | {rate} "
            f"| {mean([bits(run) for run in group])} | {interval(one['held_out']['test'])} "
            f"| {mean([bits(run, 'second') for run in group])} |"
        )
    path = directory / "baselines.json"
    if path.exists():
        for name, found in json.loads(path.read_text()).items():
            lines.append(
                f"| {name} | | | | | {found['test']['bits_per_byte']:.3f} | {interval(found['test'])} "
                f"| {found['second']['bits_per_byte']:.3f} |"
            )
    return lines


def budgets(runs: dict[str, dict[str, Any]], arm: str) -> dict[int, dict[str, Any]]:
    """The runs of seed 0 of one arm on all of the text by the tokens that they were asked for."""
    begin = slug(arm) + "-"
    found = {
        int(name[len(begin) :]): run
        for name, run in runs.items()
        if name.startswith(begin) and name[len(begin) :].isdigit()
    }
    if found and begin + "seed0" in runs:
        one = runs[begin + "seed0"]
        found[one.get("tokens_asked", round(one["tokens"], -4))] = one
    return dict(sorted(found.items()))


def budget_table(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Bits per byte of both genres at every budget of training tokens."""
    found = {arm: budgets(runs, arm) for arm in (*ARMS, *MEDIUM)}
    tokens = sorted({budget for rows in found.values() for budget in rows})
    if not tokens:
        return []
    heads = " | ".join(f"{budget:,} tokens" for budget in tokens)
    lines = [f"| model | {heads} |", "|---|" + "--:|" * len(tokens)]
    for arm, rows in found.items():
        if rows:
            cells = [f"{bits(rows[b]):.3f}, {bits(rows[b], 'second'):.3f}" if b in rows else "–" for b in tokens]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def paired_table(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Bits per byte of every run (one seed each) minus the Kneser-Ney model's, by paired bootstrap over documents."""
    rows = []
    for name, run in sorted(runs.items()):
        found = run["held_out"] or {}
        if all("minus_ngrams" in part for part in found.values()) and found:
            cells = []
            for split in ("test", "second"):
                difference = found[split]["minus_ngrams"]
                ends = difference["interval"]
                between = "" if ends is None else f" ({ends[0]:+.3f} to {ends[1]:+.3f})"
                cells.append(f"{difference['bits_per_byte']:+.3f}{between}")
            rows.append(f"| {name} | {run['tokens']:,} | {' | '.join(cells)} |")
    return rows and ["| run | tokens | same genre | second genre |", "|---|--:|---|---|", *rows]


def initialisation_table(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Where the rows of the frozen arm began."""
    found = {run["initialisation"]: run for name, run in runs.items() if name.startswith("frozen-English-from-")}
    if not found:
        return []
    if "frozen-English-seed0" in runs:
        found[runs["frozen-English-seed0"]["initialisation"]] = runs["frozen-English-seed0"]
    lines = ["| rows begin as | tokens | same genre | second genre |", "|---|--:|--:|--:|"]
    for name, run in sorted(found.items(), key=lambda item: bits(item[1])):
        lines.append(f"| {name} | {run['tokens']:,} | {bits(run):.3f} | {bits(run, 'second'):.3f} |")
    return lines


def tuning_table(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Validation losses of the rates that were tried."""
    lines = ["| arm | rate | tokens | validation nats per token |", "|---|--:|--:|--:|"]
    for name, run in runs.items():
        if name.startswith("tune-"):
            rate = f"{run['rate']:g}" + (f", then {run['unfrozen_rate']:g}" if run["unfrozen_rate"] else "")
            lines.append(f"| {run['arm']} | {rate} | {run['tokens']:,} | {run['val_loss']:.3f} |")
    return lines if len(lines) > 2 else []


def size_table(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Arms at each share of the text."""
    shares = sorted({run["share"] for name, run in runs.items() if "-share" in name})
    if not shares:
        return []
    lines = [
        "| model | " + " | ".join(f"{share:.0%} of the text" for share in [*shares, 1.0]) + " |",
        "|---|" + "--:|" * (len(shares) + 1),
    ]
    for arm in ARMS:
        found = {run["share"]: run for name, run in runs.items() if run["arm"] == arm and "-share" in name}
        whole = [run for name, run in runs.items() if run["arm"] == arm and name.endswith("-seed0")]
        if found and whole:
            found[1.0] = whole[0]
            cells = [
                f"{bits(found[share]):.3f} ({found[share]['tokens']:,} tokens)" if share in found else "–"
                for share in [*shares, 1.0]
            ]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def alignment_table(directory: Path) -> list[str]:
    """Alignment methods before and after a brief relearning, and random rows trained longer."""
    results = [json.loads(path.read_text()) for path in sorted(directory.glob("alignment/*/result.json"))]
    if not results:
        return []
    budgets = sorted({result["tokens"] for result in results})
    by = {(result["method"], result["tokens"]): result for result in results}
    heads = ["untrained" if not budget else f"{budget:,} tokens" for budget in budgets]
    lines = [
        "| rows of the medium model | neighbours kept | error on held-out English rows | " + " | ".join(heads) + " |",
        "|---|--:|--:|" + "--:|" * len(budgets),
    ]
    for method in dict.fromkeys(result["method"] for result in sorted(results, key=lambda r: r["method"])):
        known = next(result for result in results if result["method"] == method)
        cells = [f"{bits(by[method, b]):.3f}" if (method, b) in by else "–" for b in budgets]
        overlap = "–" if known["overlap"] is None else f"{known['overlap']:.1%}"
        error = "–" if known["held_out_error"] is None else f"{known['held_out_error']:.3f}"
        lines.append(f"| {method} | {overlap} | {error} | {' | '.join(cells)} |")
    return lines


def figures(language: str, runs: dict[str, dict[str, Any]], docs: Path) -> list[str]:
    """Validation loss against tokens and against computed FLOPs; returns Markdown."""
    lines = []
    for axis, label in (("tokens", "training tokens"), ("flops", "computed training FLOPs")):
        series = {}
        longest = {slug(arm): (list(budgets(runs, arm)) or [0])[-1] for arm in (*ARMS, *MEDIUM)}
        for name, run in runs.items():
            arm = slug(run["arm"])
            if name not in (f"{arm}-seed0", f"{arm}-{longest[arm]}"):
                continue
            xs: list[float] = []
            ys: list[float] = []
            before = 0.0
            for stage in run["stages"]:
                xs += [before + point[axis] for point in stage["curve"]]
                ys += [point["val_loss"] / math.log(2) for point in stage["curve"]]
                before = xs[-1]
            series[run["arm"] + ("" if name.endswith("-seed0") else ", longer")] = (xs, ys)
        if series:
            figure = plot_lines(series, x=label, y="bits per token, validation", log_x=True)
            path = docs / f"recycling_{language}_{axis}.png"
            figure.savefig(path, dpi=110)
            lines.append(f"![{LANGUAGES[language]}: loss against {label}]({path.name})")
    return lines


def texts(directory: Path, language: str) -> list[str]:
    """Samples of the best kept models, and the lexicon's surest entries."""
    lines: list[str] = []
    for name, title in (
        ("aligned-medium-all-1000000", "aligned medium, all, a million tokens"),
        ("all-from-English-1000000", "all from English, a million tokens"),
        ("frozen-English-seed0", "frozen English, 250,000 tokens"),
    ):
        folder = directory / "runs" / name / "model"
        if not folder.is_dir():
            continue
        model, tokenizer = load_gpt2(folder, frozen=True)
        lines += ["", f"{title[0].upper()}{title[1:]} (nucleus 0.9, temperature 0.8, seed 0):", ""]
        for prompt in PROMPTS[language]:
            text = sample(model, tokenizer, prompt, max_new_tokens=40, temperature=0.8, seed=0)[0]
            lines.append("> " + " ".join(text.split()) + "\n")
        if name == "frozen-English-seed0":
            english, english_tokenizer = load_gpt2("tiny", frozen=True)
            entries = build_lexicon(
                token_table(model), tokenizer, token_table(english), english_tokenizer, k=3, words=800
            )
            new = surest_new_words(entries, english_tokenizer)
            lines += ["", "| word (not an English token) | nearest English words |", "|---|---|"]
            lines += [f"| {entry.word} | {', '.join(entry.candidates)} |" for entry in new[:20]]
    return lines


def main(config: Config) -> None:
    """Write the page of results."""
    lines = [
        "# Recycling, in small: results",
        "",
        "Made by `python -m experiments.languages.report`; see "
        "[recycling.md](recycling.md) for the method and the conclusions.",
        "",
    ]
    config.docs.mkdir(parents=True, exist_ok=True)
    some: dict[str, Any] = {}
    for language, title in LANGUAGES.items():
        directory = config.out / language
        runs = read_runs(directory)
        if not runs:
            continue
        some = next(iter(runs.values()))
        seconds = sum(run["cpu_seconds"] for run in runs.values())
        lines += [
            f"## {title}",
            "",
            f"`python -m experiments.languages.recycle --text DIR --language {language}`: {len(runs)} runs, "
            f"{seconds / 60:.0f} CPU minutes, {some['hardware']}; {some['train_tokens_available']:,} training "
            f"tokens with a vocabulary of {some['vocab_size']:,}.",
            "",
        ]
        lines += [*main_table(directory, runs), ""]
        for heading, table in (
            ("Training tokens (bits per byte, same genre and second genre, seed 0)", budget_table(runs)),
            ("Minus the Kneser-Ney 5-gram model, document by document (bits per byte, 95%)", paired_table(runs)),
            ("Alignment to the medium model (bits per byte, same genre, seed 0)", alignment_table(directory)),
            ("Size of the text (bits per byte, same genre, seed 0)", size_table(runs)),
            ("Initialisations (frozen English layers, seed 0, bits per byte)", initialisation_table(runs)),
            ("Learning rates", tuning_table(runs)),
        ):
            if table:
                lines += [f"### {heading}", "", *table, ""]
        lines += [*figures(language, runs, config.docs), ""]
        lines += [f"### Samples in {title}", *texts(directory, language), ""]
    if not some:
        raise UserError(f"{str(config.out)!r} holds no finished run: run experiments/languages/recycle.py first.")
    path = write_text(config.docs / "recycling_results.md", "\n".join(lines).rstrip() + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
