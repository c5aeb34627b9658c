"""Every example of the README runs as it stands, but for those marked as needing real weights."""

import re
import shlex

import pytest

from clipcap.cli import main

MARK = "# needs real weights"


def blocks(root, language):
    return re.findall(rf"```{language}\n(.*?)```", (root / "README.md").read_text(), flags=re.DOTALL)


def commands(root):
    lines = [line for block in blocks(root, "bash") if MARK not in block for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("clipcap ")]


def test_command_line_examples(root, tmp_path, monkeypatch, capsys):
    found = commands(root)
    assert len(found) >= 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "common").symlink_to(root / "common")  # examples name files of the repository and write to out/
    for _, *arguments in found:
        assert main(arguments) == 0, arguments
    lines = (tmp_path / "out" / "captions.csv").read_text().splitlines()
    assert len(lines) == 1 + len(list((root / "common/assets/samples/scenes").glob("*.jpg")))
    assert (tmp_path / "out" / "readme" / "model" / "model.safetensors").is_file()
    assert "skipped" not in capsys.readouterr().err


def test_python_examples(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    [block] = blocks(root, "python")
    exec(block, {})
    first, second = capsys.readouterr().out.splitlines()
    assert len(first.split()) > 2 and second.count(",") >= 3


def test_every_make_target_of_the_readme_exists(root):
    targets = set(re.findall(r"^([a-z]+):.*##", (root / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        target for block in blocks(root, "bash") for target in re.findall(r"^make (\w+)", block, flags=re.MULTILINE)
    }
    assert named and named <= targets


@pytest.mark.parametrize("pattern", [r"\]\(([^)#:]+)\)", r"^\| `([a-z]+/)` \|"])
def test_every_path_of_the_readme_exists(root, pattern):
    paths = re.findall(pattern, (root / "README.md").read_text(), flags=re.MULTILINE)
    assert paths
    assert [path for path in paths if not (root / path).exists()] == []
