"""The paper's qualitative study: people say, blind, whether a text is by a human or a machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class JudgeConfig:
    """Make a form (one HTML file) in which people judge texts, blind, and the key to it."""

    human: tuple[Path, ...]
    """Texts by humans: anything that `recycle-gpt2 corpus` reads, such as a corpus's test documents."""
    machine: tuple[str, ...]
    """NAME=PATH of each model's texts, such as nld-small=samples/small.jsonl."""
    out: Path = Path("judge")
    """Directory for form.html (give it to the judges) and key.json (keep it)."""
    per_model: int = 20
    """Texts of each model, and of humans."""
    words: int = 60
    """Words that a text is cut to, so that length tells nothing."""
    title: str = "Human or machine?"
    """Heading of the form."""
    question: str = "Could this text have been written by a human?"
    """Question under each text; write it in the judges' language."""
    yes: str = "Human"
    """Label of the button for human."""
    no: str = "Machine"
    """Label of the button for machine."""
    language: str = "en"
    """Language code of the texts (nl, it), for fonts and hyphenation."""
    seed: int = 0
    """Which texts, and in which order."""


@dataclass(frozen=True)
class JudgeReportConfig:
    """Read judges' answers and say how often each model was taken for human."""

    answers: tuple[Path, ...]
    """Answer files that the form has saved, or directories of them."""
    key: Path
    """key.json of the form."""
    out: Path | None = None
    """JSON file for the report, beside the printed table."""


def run_form(config: JudgeConfig) -> None:
    """Write form.html and key.json."""
    raise NotImplementedError


def run_report(config: JudgeReportConfig) -> None:
    """Print, and write, how often each model was taken for human, with Wilson intervals."""
    raise NotImplementedError
