"""The table, figure and JSON file of the runs on SmolLM2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import write_json, write_text
from common.report import plot_lines
from experiments.languages.text import LANGUAGES

SPLITS = ("test", "second", "English")


def write_page(results: Mapping[str, Mapping[str, Any]], docs: Path) -> Path:
    """Write DOCS/smollm2.md, DOCS/smollm2_LANG.png and DOCS/smollm2.json of the runs that exist."""
    docs.mkdir(parents=True, exist_ok=True)
    lines = ["# SmolLM2-135M in another language", ""]
    kept: dict[str, Any] = {}
    for language, found in results.items():
        runs = found["runs"]
        some = next(iter(runs.values()))
        lines += [
            f"## {LANGUAGES[language]}",
            "",
            f"Bits per byte on held-out documents, 95% intervals by bootstrap over documents; "
            f"{sum(run['cpu_seconds'] for run in runs.values()) / 60:.0f} CPU minutes without the search of the rates, "
            f"{some['precision']}, {some['hardware']}. Below 0 in the last columns is better.",
            "",
            *table(found),
            "",
        ]
        curves = {
            name: ([tokens for tokens, _ in run["curve"]], [bits for _, bits in run["curve"]])
            for name, run in runs.items()
            if len(run["curve"]) > 1
        }
        if curves:
            path = docs / f"smollm2_{language}.png"
            plot_lines(curves, x="training tokens", y="validation, bits per byte").savefig(path, dpi=110)
            lines += [f"![{LANGUAGES[language]}: validation against training tokens]({path.name})", ""]
        without = {"held_out", "minus_ngrams"}
        kept[language] = {
            name: {key: value for key, value in run.items() if key not in without}
            | {"held_out": {split: _without_scores(part) for split, part in run["held_out"].items()}}
            | {"minus_ngrams": run["minus_ngrams"]}
            for name, run in runs.items()
        } | {found["ngrams"]["name"]: {split: _without_scores(found["ngrams"][split]) for split in SPLITS[:2]}}
    write_json(docs / "smollm2.json", kept)
    return write_text(docs / "smollm2.md", "\n".join(lines).rstrip() + "\n")


def table(found: Mapping[str, Any]) -> list[str]:
    """A row for each run, and one of the n-gram model."""
    lines = [
        "| model | seed | tokens | rate | same genre | second genre | English | minus untouched, same genre "
        "| minus 5-gram, same genre |",
        "|---|--:|--:|--:|---|---|---|---|---|",
    ]
    for run in found["runs"].values():
        cells = [_with_interval(run["held_out"][split]) for split in SPLITS]
        cells += [_difference(run.get(name, {}).get("test")) for name in ("minus_untouched", "minus_ngrams")]
        rate = f"{run['rate']:g}" if run["tokens"] else "–"
        lines.append(f"| {run['arm']} | {run['seed']} | {run['tokens']:,} | {rate} | {' | '.join(cells)} |")
    ngrams = found["ngrams"]
    cells = [_with_interval(ngrams[split]) for split in SPLITS[:2]]
    lines.append(f"| {ngrams['name']}, all of the text | | | – | {' | '.join(cells)} | – | – | – |")
    return lines


def _with_interval(part: Mapping[str, Any]) -> str:
    ends = part["bits_per_byte_interval"]
    return f"{part['bits_per_byte']:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    ends = found["interval"]
    return f"{found['bits_per_byte']:+.3f}" + (f" ({ends[0]:+.3f} to {ends[1]:+.3f})" if ends else "")


def _without_scores(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name != "scores"}
