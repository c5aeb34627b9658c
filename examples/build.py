"""Run the notebooks of this folder again and save them with their outputs: `python examples/build.py [NAME.ipynb ...]`.

What the notebooks write goes to a temporary directory. Progress and libraries' warnings (stderr) are not kept, and a
picture is kept once, as JPEG.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def build(path: Path) -> None:
    """Run a notebook from its first cell to its last, and save it; an error of a cell leaves the file as it was."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as place:
        client = NotebookClient(
            notebook, timeout=None, record_timing=False, resources={"metadata": {"path": place}}, kernel_name="python3"
        )
        client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [kept(output) for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}  # not the version of whoever ran it
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def kept(output: Any) -> Any:
    """An output with its picture in one format."""
    if "image/jpeg" in output.get("data", {}):
        output["data"] = {"image/jpeg": output["data"]["image/jpeg"]}
    return output


if __name__ == "__main__":
    for chosen in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        build(chosen)
        print(f"{chosen.name}: {chosen.stat().st_size / 1000:.0f} kB")
