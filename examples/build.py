"""Run the notebooks of this folder again and save them with their outputs: `python examples/build.py [NAME.ipynb ...]`.

What the notebooks write goes to a temporary directory.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
BAR = re.compile(r"^.*\d+%\|.*\n?|\r", re.MULTILINE)
"""A line of a progress bar."""
WIDGET = "application/vnd.jupyter.widget-view+json"


def build(path: Path) -> None:
    """Run a notebook from its first cell to its last, and save it; an error of a cell leaves the file as it was."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as place:
        resources = {"metadata": {"path": place}}
        NotebookClient(notebook, timeout=None, record_timing=False, resources=resources).execute()
    tidy(notebook)
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def tidy(notebook: Any) -> None:
    """Keep what a reader looks at: no progress, no libraries' warnings (stderr), each picture once, as JPEG."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # not the version of whoever ran it
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        kept: list[Any] = []
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/jpeg" in data:
                output["data"] = {"image/jpeg": data["image/jpeg"]}
            if output.get("name") == "stdout" and kept and kept[-1].get("name") == "stdout":
                kept[-1]["text"] += output["text"]
            elif output.get("name") != "stderr" and WIDGET not in data:
                kept.append(output)
        for output in kept:
            if output.output_type == "stream":
                output["text"] = BAR.sub("", output["text"])
        cell.outputs = kept


if __name__ == "__main__":
    for chosen in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        build(chosen)
        print(f"{chosen.name}: {chosen.stat().st_size / 1000:.0f} kB")
