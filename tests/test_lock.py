"""The lock: what it holds, what it leaves out on purpose, and that nothing of ours asks for that.

`make lock` leaves out what [tool.uv] in pyproject.toml lists; `pip install` brings it all. Both environments must do.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import subprocess
import sys

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODULES = {"nuscenes-devkit": "nuscenes", "python-socketio": "socketio"}
"""Modules whose name is not that of their package."""
REPLACED = {"opencv-python"}
"""Packages whose module another one brings."""


def normal(requirement: str) -> str:
    """A requirement's package, in the one spelling that all of its spellings have (PEP 503)."""
    return re.sub("[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


@pytest.fixture(scope="module")
def project(root) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def left_out(project) -> set[str]:
    return set(project["tool"]["uv"]["exclude-dependencies"])


@pytest.fixture(scope="module")
def locked(root) -> set[str]:
    lines = (root / "requirements.lock").read_text().splitlines()
    return {normal(line) for line in lines if line and not line.startswith(" ")}


def test_lock_has_names_versions_and_hashes_only(root):
    kinds = {"package": 0, "hash": 0}
    for line in (root / "requirements.lock").read_text().splitlines():
        found = re.fullmatch(
            r"(?P<package>[a-z0-9._-]+==[\w.+!]+( ; [^/@\\]+?)?)( \\)?|    (?P<hash>--hash=sha256:[0-9a-f]{64})( \\)?",
            line,
        )
        assert found, line
        kinds["hash" if found["hash"] else "package"] += 1
    assert kinds["hash"] > kinds["package"] > 300


def test_the_lock_holds_what_the_project_names_and_not_what_it_leaves_out(project, left_out, locked):
    named = project["project"]["dependencies"] + sum(project["project"]["optional-dependencies"].values(), [])
    named = {normal(requirement) for requirement in named} - {project["project"]["name"]}
    assert not named - locked
    assert not left_out & named and not left_out & locked
    assert {normal(requirement) for requirement in project["tool"]["uv"]["override-dependencies"]} <= locked


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_what_breaks_in_minor_versions_is_bounded_by_the_next_one(root, project, name):
    """After the newest that the lock has, which is what the tests run with."""
    versions = re.findall(rf"^{name}==(\d+)\.(\d+)", (root / "requirements.lock").read_text(), flags=re.MULTILINE)
    major, minor = max((int(major), int(minor)) for major, minor in versions)
    [requirement] = [item for item in project["project"]["dependencies"] if normal(item) == name]
    assert requirement.endswith(f",<{major}.{minor + 1}")


WITHOUT = """
import importlib
import sys

hidden, wanted = (set(argument.split(",")) for argument in sys.argv[1:])
sys.modules.update(dict.fromkeys(hidden - set(sys.modules)))  # importing one raises ImportError
for name in sorted(wanted):
    importlib.import_module(name)
"""
COMMANDS = ("train", "eval", "render", "viewer.run_viewer")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("nerfstudio") is None, reason="needs nerfstudio")
def test_our_ways_never_import_what_the_lock_leaves_out(root, left_out, forks):
    """dietnerf, and nerfstudio's commands that open its runs, in a process where these modules cannot be imported."""
    hidden = {MODULES.get(name, name.replace("-", "_")) for name in left_out - REPLACED}
    wanted = {f"nerfstudio.scripts.{command}" for command in COMMANDS}
    wanted |= {f"dietnerf.{path.stem}" for path in (root / "dietnerf").glob("*.py") if path.stem != "__main__"}
    done = forks.run(WITHOUT, ",".join(hidden), ",".join(wanted))
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_missing_triton_is_not_warned_of():
    import common  # noqa: F401

    assert not logging.getLogger("torch.utils.flop_counter").isEnabledFor(logging.WARNING)


@pytest.mark.slow
def test_pip_check_finds_only_what_the_lock_leaves_out_or_overrides(project, left_out, locked):
    """Of the lock's packages; nothing at all where `pip install` has brought everything."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip")
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    overridden = {normal(requirement) for requirement in project["tool"]["uv"]["override-dependencies"]}
    for line in done.stdout.splitlines():
        missing = re.fullmatch(r"(\S+) \S+ requires (\S+), which is not installed\.", line)
        other = re.fullmatch(r"(\S+) \S+ has requirement (.+), but you have .+\.", line)
        found = missing or other
        if found and normal(found[1]) in locked:
            assert normal(found[2]) in (left_out if missing else overridden), line
