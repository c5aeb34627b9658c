"""The notebooks in examples/ are short, hold their outputs, and run from their first cell to their last."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"
NAMES = ("captions_of_my_photos", "my_language", "my_scene")
PLACES = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|var|opt|Users|" + "wo" + r"rk)/\w|[A-Z]:\\\\")
"""Paths of a machine."""
SMALLER = {
    "captions_of_my_photos": "",
    "my_scene": """
import shutil
few = Path("few")
few.mkdir()
for number in range(3, 11):
    shutil.copy(photos / f"walk_{number}.jpg", few)
photos, steps, width = few, 20, 32
""",
    "my_language": "text = text.with_name('test.txt.xz'); tokens, shares = 2048, (0.8, 0.1, 0.1)",
}
"""What a test changes after the cell that is tagged `parameters`."""
RUN = """
import sys
from tests.test_notebooks import run
run(*sys.argv[1:])
"""


def cells(name: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def code(name: str) -> list[dict[str, Any]]:
    return [cell for cell in cells(name) if cell["cell_type"] == "code"]


def written(name: str) -> str:
    """The text of all outputs of a notebook."""
    outputs = [output for cell in code(name) for output in cell["outputs"]]
    return "".join("".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outputs)


def run(name: str, place: str) -> None:
    """Run a notebook's cells in the directory `place` and check what they leave; in a process of its own."""
    os.chdir(place)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code(name), start=1):
        exec(compile("".join(cell["source"]), f"{name}, code cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            exec(SMALLER[name], names)
    CHECKS[name](names)


def check_captions(names: dict[str, Any]) -> None:
    found, sure = names["found"], names["sure"]
    assert len(found) == len(names["photos"]) == 8
    for item in found:
        assert len(set(item.captions)) == len(item.captions) == len(item.confidences) == 3
        assert all(0 < confidence < 1 for confidence in item.confidences)
    assert sure == [item for item in found if item.confidences[0] >= 0.4] and 0 < len(sure) < 8
    alone, ranked = names["alone"], names["ranked"]
    assert alone != ranked and len(alone) == len(ranked) == 8
    kept = written("captions_of_my_photos")  # what is stored is what this version says, but for a few roundings
    assert sum(item.captions[0] in kept for item in found) >= 6


def check_scene(names: dict[str, Any]) -> None:
    import numpy as np

    posed, scene, scores = names["posed"], names["scene"], names["scores"]
    assert len(posed.placed) == 8 and not posed.unplaced and posed.error < 1
    assert scene.step + 1 == 20 and scene.holds_views_out
    assert len(scores.ids) == len(scene.held_out_views) == 2  # the 3rd and the 8th
    assert np.isfinite(scores.scores.values["psnr"])
    assert [view.rgb.shape[1] for view in names["orbit"]] == [32] * 4
    assert Path("out/my_scene/run/config.yml").is_file()


def check_language(names: dict[str, Any]) -> None:
    model, tokenizer, sentence = names["model"], names["tokenizer"], names["sentence"]
    assert len(tokenizer) == model.config.vocab_size == 512
    assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence
    bits = {name: found["all"]["bits_per_byte"] for name, found in names["scores"].items()}
    assert bits["recycled"] < bits["English, untouched"]
    assert names["model_directory"] == Path("out/my_language/gpt2-nld")


CHECKS = {"captions_of_my_photos": check_captions, "my_scene": check_scene, "my_language": check_language}


def test_every_notebook_is_tested_and_linked(root):
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES) == sorted(CHECKS)
    readme = (root / "README.md").read_text()
    assert all(f"(examples/{name}.ipynb)" in readme for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_short_and_holds_its_outputs(name):
    assert 6 <= len(cells(name)) <= 11 and cells(name)[0]["cell_type"] == "markdown"
    for cell in cells(name):
        assert len("".join(cell["source"]).splitlines()) <= 16
        assert not PLACES.search("".join(cell["source"]))
    assert [cell["execution_count"] for cell in code(name)] == list(range(1, len(code(name)) + 1))  # in one go
    outputs = [output for cell in code(name) for output in cell["outputs"]]
    assert len(outputs) >= 4 and not any(output["output_type"] == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert not PLACES.search(written(name))
    for target in re.findall(r"\]\(([^)#:]+)\)", "".join("".join(cell["source"]) for cell in cells(name))):
        assert (FOLDER / target).exists(), target


@pytest.mark.slow  # by the import of nbformat alone
def test_notebooks_are_valid_and_small():
    nbformat = pytest.importorskip("nbformat")
    for name in NAMES:
        nbformat.validate(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4))
    assert sum(path.stat().st_size for path in FOLDER.glob("*.ipynb")) < 600_000


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, forks, tmp_path):
    if name == "my_scene" and importlib.util.find_spec("nerfstudio") is None:
        pytest.skip("needs nerfstudio")
    done = forks.run(RUN, name, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
