"""Every example of the README and of docs/ runs as it stands, but for those marked as needing what is not here."""

import importlib
import importlib.util
import re
import shlex
import sys

import pytest
import tyro

MARKS = ("# needs real weights", "# needs your own data", "# takes hours")
PROGRAMS = {
    "clipcap": "clipcap.cli",
    "clip-probe": "common.probing.cli",
    "dietnerf": "dietnerf.cli",
    "recycle-gpt2": "recycle_gpt2.cli",
}
LAUNCHERS = ("srun", "torchrun")
NERFSTUDIO = {
    "ns-eval": "nerfstudio.scripts.eval",
    "ns-process-data": "nerfstudio.process_data.base_converter_to_nerfstudio_dataset",
    "ns-render": "nerfstudio.scripts.render",
    "ns-viewer": "nerfstudio.scripts.viewer.run_viewer",
}
"""nerfstudio's commands -> where their options are declared."""
COMMANDS = "|".join([*PROGRAMS, "ns-train", *NERFSTUDIO, "python -m"])


def blocks(root, language, page="README.md"):
    return re.findall(rf"```{language}\n(.*?)```", (root / page).read_text(), flags=re.DOTALL)


def pages(root):
    return ["README.md", *(str(path.relative_to(root)) for path in sorted((root / "docs").glob("*.md")))]


def lines(block):
    """The commands of a shell block as lists of words, comments left out."""
    found = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    return [words for words in found if words]


def program(words):
    """The command's name and arguments, without what launches it; None where it is not one of ours."""
    if words[0] in LAUNCHERS and "-m" in words:
        module, *arguments = words[words.index("-m") + 1 :]
        return next(name for name, place in PROGRAMS.items() if place == module), arguments
    words = words[1:] if words[0] in LAUNCHERS else words
    return (words[0], words[1:]) if words[0] in PROGRAMS else None


def check_options(name, arguments):
    """The subcommand exists, and takes these options."""
    chosen = importlib.import_module(PROGRAMS[name]).SUBCOMMANDS[arguments[0]]
    config = getattr(importlib.import_module(chosen.module), chosen.config)
    tyro.cli(config, args=arguments[1:], config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))


def check_nerfstudio(words):
    """nerfstudio's command takes these options."""
    if words[0] == "ns-train":
        from dietnerf.methods import method_config
        from dietnerf.plugin import METHODS

        assert words[1] in METHODS
        config = method_config(words[1])
        tyro.cli(type(config), default=config, args=words[2:])
    else:
        source = importlib.util.find_spec(NERFSTUDIO[words[0]]).loader.get_source(NERFSTUDIO[words[0]])
        declared = set(re.findall(r"^    (\w+): ", source, flags=re.MULTILINE))
        assert {word[2:].replace("-", "_") for word in words if word.startswith("--")} <= declared, words


def has_nerfstudio():
    return importlib.util.find_spec("nerfstudio") is not None


def test_every_make_target_of_the_pages_exists(root):
    targets = set(re.findall(r"^([a-z]+):.*##", (root / "Makefile").read_text(), flags=re.MULTILINE))
    named = set()
    for page in [*pages(root), "CONTRIBUTING.md"]:
        named |= set(re.findall(r"(?:^ {4}|`)make ([a-z]+)", (root / page).read_text(), flags=re.MULTILINE))
        for block in blocks(root, "bash", page):
            named |= set(re.findall(r"^make ([a-z]+)", block, flags=re.MULTILINE))
    assert {"demo", "test", "lock"} <= named <= targets


def test_every_extra_of_the_pages_exists(root):
    extras = (root / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    text = "\n".join((root / page).read_text() for page in pages(root))
    named = re.findall(r"pip install '?[\w.-]+\[([\w,]+)\]", text)
    assert named and {name for found in named for name in found.split(",")} <= set(
        re.findall(r"^(\w+) = \[", extras, flags=re.MULTILINE)
    )


@pytest.mark.parametrize("pattern", [r"\]\(([^)#:]+)\)", r"^\| `([a-z]+/)` \|"])
def test_every_path_of_the_readme_exists(root, pattern):
    paths = re.findall(pattern, (root / "README.md").read_text(), flags=re.MULTILINE)
    assert paths
    assert [path for path in paths if not (root / path).exists()] == []


@pytest.fixture(scope="module")
def place(root, tmp_path_factory):
    """A directory with the repository's common/, in which the pages' commands have been run in their order."""
    place = tmp_path_factory.mktemp("pages")
    (place / "common").symlink_to(root / "common")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for page in pages(root):
            for block in blocks(root, "bash", page):
                if any(mark in block for mark in MARKS):
                    continue
                for words in lines(block):
                    ours = program(words)
                    if ours is None:
                        assert words[0] == "make" or words[:2] == ["pip", "install"], (page, words)
                    elif ours[0] != "dietnerf" or has_nerfstudio():
                        assert importlib.import_module(PROGRAMS[ours[0]]).main(ours[1]) == 0, (page, words)
    return place


@pytest.mark.slow
def test_shell_blocks_of_the_pages(place):
    out = place / "out"
    lines = (out / "captions.csv").read_text().splitlines()
    assert len(lines) == 1 + len(list((place / "common/assets/samples/photographs").glob("*.jpg")))
    assert (out / "readme" / "model" / "model.safetensors").is_file()
    assert (out / "mine" / "scores" / "index.html").is_file() and (out / "gpt2-sample" / "README.md").is_file()
    if has_nerfstudio():
        assert (out / "dietnerf" / "evaluation" / "results.json").is_file()


@pytest.mark.slow
def test_python_blocks_of_the_pages(root, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    ran = 0
    for page in pages(root):
        for block in blocks(root, "python", page):
            if not any(mark in block for mark in MARKS) and ("dietnerf" not in block or has_nerfstudio()):
                exec(block, {})
                ran += 1
    assert ran and capsys.readouterr().out.strip()


def test_marked_blocks_name_commands_and_options_that_exist(root):
    checked = 0
    for page in pages(root):
        for block in blocks(root, "bash", page):
            if not any(mark in block for mark in MARKS):
                continue
            for words in lines(block):
                ours = program(words)
                if ours is not None and (ours[0] != "dietnerf" or has_nerfstudio()):
                    check_options(*ours)
                elif words[0] in NERFSTUDIO and has_nerfstudio():
                    check_nerfstudio(words)
                elif words[:2] == ["python", "-m"]:
                    assert importlib.util.find_spec(words[2]), (page, words)
                    if words[2] == "experiments.reproduce":
                        from experiments.reproduce.config import Config

                        tyro.cli(Config, args=words[3:], config=(tyro.conf.OmitArgPrefixes,))
                checked += 1
    assert checked >= 20


def test_indented_commands_and_those_of_cards_name_options_that_exist(root, capsys):
    """What is not run as a block: commands with names of one's own files in them, and those that made a result."""
    cards = [str(path.relative_to(root)) for path in sorted((root / "common" / "assets").rglob("README.md"))]
    helps: dict[str, str] = {}
    checked, nerfstudio = 0, set()
    for page in [*pages(root), *cards]:
        text = re.sub(r"```.*?```", "", (root / page).read_text(), flags=re.DOTALL).replace("\\\n", " ")
        indented = re.findall(rf"^ {{4}}((?:{COMMANDS}) .*)$", text, flags=re.MULTILINE)
        for line in indented + re.findall(r"`((?:(?:OMP_NUM_THREADS=1 )?python -m|ns-[a-z]+) [^`]*)`", text):
            words = shlex.split(line.replace("\n", " "), comments=True)
            words = words[1:] if "=" in words[0] else words
            ours = program(words)
            if words[0].startswith("ns-"):
                if has_nerfstudio():
                    check_nerfstudio(words)
                    nerfstudio.add(words[0])
            elif ours is not None:
                if ours[0] != "dietnerf" or has_nerfstudio():
                    check_options(*ours)
                    checked += 1
            elif words[2].startswith(("experiments.", "benchmarks.")):
                options = {word.partition("=")[0] for word in words[3:] if word.startswith("--")}
                if options:
                    missing = {option for option in options if option not in help_of(words[2], helps, capsys)}
                    assert not missing, (page, line)
                checked += 1
    assert checked >= 60
    assert nerfstudio == ({"ns-train", "ns-eval", "ns-viewer"} if has_nerfstudio() else set())


def help_of(module, known, capsys):
    """The options of an experiment or benchmark."""
    if module not in known:
        place = importlib.import_module(module)
        if hasattr(place, "__path__"):  # a package's command line
            place = importlib.import_module(f"{module}.__main__")
        if hasattr(place, "Config"):
            flat = (tyro.conf.OmitArgPrefixes,) if hasattr(place, "from_command_line") else ()
            with pytest.raises(SystemExit):
                tyro.cli(place.Config, args=["--help"], config=flat)
            known[module] = capsys.readouterr().out
        else:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
                patch.setattr(sys, "argv", [module, "--help"])
                place.main()
            known[module] = capsys.readouterr().out
    return known[module]


def test_links_of_the_pages(root):
    for page in pages(root):
        text = re.sub(r"```.*?```", "", (root / page).read_text(), flags=re.DOTALL)
        for path in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (root / page).parent.joinpath(path).exists(), (page, path)
        assert "@ESTIMATES@" not in text, page
