"""Every option of every command, given absurd values: done, or one line and exit code 2; nothing written elsewhere.

The options come from the configurations themselves, so that new ones are tried too. Each is given a few values, and all
values are given to some option of a command; with --exhaustive, each option is given all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import resource
import shutil
import signal
import traceback
import types
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro
from PIL import Image

import clipcap.cli
import common.probing.cli
import dietnerf.cli
import recycle_gpt2.cli
from common.checks import UserError
from tests.clipcap.conftest import clip_directory  # noqa: F401, a fixture
from tests.dietnerf.ball import write_scene
from tests.fuzz.mutations import files_below
from tests.recycle_gpt2.conftest import invent

COMMANDS = {
    "clipcap": clipcap.cli,
    "clip-probe": common.probing.cli,
    "recycle-gpt2": recycle_gpt2.cli,
    "dietnerf": dietnerf.cli,
}
SECONDS = 60
"""A case that takes longer hangs."""
MEMORY = 4 << 30
"""Bytes that a case may take beside what the tests have."""
SAMPLED = 2
"""Values that an option is given, unless --exhaustive."""
LARGE = 10**26
VALUES: dict[type, list[Any]] = {
    int: [-1, 0, 10**12, LARGE],
    float: [-1.0, float("nan"), float("inf"), 1e-320, 1e308],
    str: ["", "a\0b", "n" * 300, "../..", "😀", "\udcff", "\x1b[31m", "FILE", "DIRECTORY", "nowhere/at/all"],
    Path: [Path(text) for text in ("", "a\0b", "n" * 300, "../..", "😀", "\udcff", "FILE", "DIRECTORY", "FILE/below")],
}
WORDS = ["-1", "0", str(LARGE), "nan", "inf", "-inf", "1e-320", "1e308", "", "a\0b", "n" * 300, "../..", "😀", "\udcff"]
LONG_STEPS = {
    ("clipcap", "serve"): "clipcap.serve.build_page",
    ("clipcap", "train"): "clipcap.training.train.fit",
    ("clipcap", "calibrate"): "clipcap.calibrate.encoded",
    ("recycle-gpt2", "run"): "recycle_gpt2.training.fit",
    ("recycle-gpt2", "relearn"): "recycle_gpt2.training.fit",
    ("recycle-gpt2", "finetune"): "recycle_gpt2.training.fit",
    ("dietnerf", "train"): "dietnerf.training.fit",
    ("dietnerf", "pose"): "dietnerf.posing._structure",
}
"""Where a command has made all its checks and would begin to compute for long."""
NERFSTUDIO = importlib.util.find_spec("nerfstudio") is not None
CASES = [(program, name) for program, module in COMMANDS.items() for name in module.SUBCOMMANDS]


class Hangs(BaseException):
    """Past what any handler takes for its own."""


class Place:
    """A directory with what commands need, below others in which nothing may appear."""

    def __init__(self, root: Path, gpt2: Path, clip: Path) -> None:
        import torch
        from transformers import AutoTokenizer, GPT2LMHeadModel

        from clipcap import ClipCapConfig, ClipCapModel
        from recycle_gpt2.cli import main as recycle

        self.root, self.inside, self.gpt2, self.clip = root, root / "above" / "inside", gpt2, clip
        self.inside.mkdir(parents=True)
        self.file, self.directory = self.inside / "file.bin", self.inside / "directory"
        self.file.write_bytes(b"\x00\x01")
        self.directory.mkdir()
        (self.directory / "mine").write_text("mine")
        photos = self.inside / "photos"
        photos.mkdir()
        for name in ("a", "b", "c", "d"):
            Image.new("RGB", (8, 8), "red").save(photos / f"{name}.png")
        (photos / "captions.csv").write_text(
            "file_name,caption,split\na.png,the cat,train\nb.png,the hat,train\nc.png,the bat,val\nd.png,the mat,test\n"
        )
        for number, colour in enumerate(("red", "blue")):
            (self.inside / "classes" / colour).mkdir(parents=True)
            for size in range(8, 12):
                Image.new("RGB", (size, 8 + number), colour).save(self.inside / "classes" / colour / f"{size}.png")
        torch.manual_seed(0)
        config = ClipCapConfig(clip_width=12, prefix_length=2, gpt2=str(gpt2), clip=str(clip))
        ClipCapModel.from_backbones(config).save_pretrained(self.inside / "captioner")
        sized = GPT2LMHeadModel.from_pretrained(gpt2)
        sized.resize_token_embeddings(512, mean_resizing=False)  # as the checkpoint that is converted
        shutil.copytree(gpt2, self.inside / "gpt2-512")
        sized.save_pretrained(self.inside / "gpt2-512")
        (self.inside / "given.csv").write_text("image,rank,caption,score\nd.png,1,the mat,-1\n")
        (self.inside / "urls.tsv").write_text("a cat\thttp://127.0.0.1:1/a.png\n")
        (self.inside / "few.txt").write_text("\n\n".join(invent("dutch", 3)))
        (self.inside / "text.txt").write_text("\n\n".join(invent("dutch", 120)))
        text, tokenizer = str(self.inside / "text.txt"), str(self.inside / "tokenizer")
        assert recycle(["tokenizer", "--text", text, "--vocab-size", "300", "--out", tokenizer]) == 0
        assert recycle(["corpus", "--text", text, "--tokenizer", str(gpt2), "--block", "16", "--shares", "0.8", "0.1",
                        "0.1", "--out", str(self.inside / "corpus")]) == 0  # fmt: skip
        assert AutoTokenizer.from_pretrained(tokenizer)
        assert recycle(["judge", "--human", text, "--machine", f"m={text}", "--per-model", "2", "--words", "5", "--out",
                        str(self.inside / "judge")]) == 0  # fmt: skip
        (self.inside / "answers.json").write_text(
            f'{{"form": {(self.inside / "judge/key.json").read_text().split(":")[1].split(",")[0]}, '
            '"judge": "me", "answers": {"t1": "human"}}'
        )
        write_scene(self.inside / "scene", size=12)
        if not NERFSTUDIO:
            return
        assert dietnerf.cli.main(
            ["train", str(self.inside / "scene"), "--out", str(self.inside / "run"), "--steps", "1", "--rays", "16",
             "--resolutions", "8", "--no-progress", "--device", "cpu", "--val-views", "0", "--semantic-weight", "0"]
        ) == 0  # fmt: skip

    def arguments(self, program: str, name: str, out: Path) -> list[str]:
        """A small invocation that works."""
        at, gpt2 = {path.name: str(path) for path in self.inside.iterdir()}, str(self.gpt2)
        probe = ["--clip", str(self.clip), "--device", "cpu"]
        stage = ["--epochs", "1", "--val-every", "1", "--device", "cpu"]
        found: list[str] = {
            ("clipcap", "caption"): [f"{at['photos']}/a.png", "--model", at["captioner"], "--max-new-tokens", "3"],
            ("clipcap", "serve"): ["--model", at["captioner"], "--port", "0", "--max-new-tokens", "3"],
            ("clipcap", "train"): ["--data", at["photos"], "--clip", str(self.clip), "--gpt2", gpt2, "--steps", "1",
                                   "--prefix-length", "2", "--clip-length", "2", "--mapper-layers", "1",
                                   "--mapper-heads", "1", "--workers", "0"],
            ("clipcap", "evaluate"): ["--data", at["photos"], "--captions", at["given.csv"], "--clip-score", "",
                                      "--tokenizer", "words", "--resamples", "5"],
            ("clipcap", "interpret"): [f"{at['photos']}/a.png", "--model", at["captioner"]],
            ("clipcap", "embed"): [at["photos"], "--clip", str(self.clip), "--workers", "0"],
            ("clipcap", "download"): [at["urls.tsv"], "--retries", "0", "--workers", "1"],
            ("clipcap", "convert"): [str(Path(__file__).parent.parent / "golden/clipcap_mlp.pt"), "OUT", "--gpt2", at["gpt2-512"],
                                     "--clip", str(self.clip), "--n-head", "4", "--stop", ""],
            ("clipcap", "bundle"): [at["captioner"], "OUT"],
            ("clipcap", "calibrate"): ["--data", at["photos"], "--model", at["captioner"]],
            ("clip-probe", "zero-shot"): [at["classes"], *probe],
            ("clip-probe", "retrieve"): [at["photos"], *probe, "--queries", "a cat", "--captions",
                                         f"{at['photos']}/captions.csv"],
            ("clip-probe", "linear"): [at["classes"], *probe],
            ("clip-probe", "few-shot"): [at["classes"], *probe, "--shots", "1", "--repeats", "1"],
            ("recycle-gpt2", "run"): ["--text", at["text.txt"], "--language", "nld", "--small", gpt2, "--vocab-size",
                                      "300", "--shares", "0.8", "0.1", "0.1", *stage],
            ("recycle-gpt2", "tokenizer"): ["--text", at["text.txt"], "--vocab-size", "300"],
            ("recycle-gpt2", "corpus"): ["--text", at["text.txt"], "--tokenizer", at["tokenizer"], "--block", "16",
                                         "--shares", "0.8", "0.1", "0.1"],
            ("recycle-gpt2", "relearn"): ["--corpus", at["corpus"], "--tokenizer", gpt2, "--model", gpt2, *stage],
            ("recycle-gpt2", "align"): ["--recycled", gpt2, "--small", gpt2, "--large", gpt2, "--device", "cpu"],
            ("recycle-gpt2", "finetune"): ["--model", gpt2, "--corpus", at["corpus"], *stage],
            ("recycle-gpt2", "evaluate"): [gpt2, "--text", at["few.txt"], "--max-documents", "1", "--resamples", "5"],
            ("recycle-gpt2", "sample"): [gpt2, "--max-new-tokens", "3", "--prompts", "the"],
            ("recycle-gpt2", "lexicon"): ["--model", gpt2, "--source", gpt2, "--words", "5"],
            ("recycle-gpt2", "judge"): ["--human", at["text.txt"], "--machine", f"m={at['text.txt']}", "--per-model",
                                        "2", "--words", "5"],
            ("recycle-gpt2", "judge-report"): ["--answers", at["answers.json"], "--key", f"{at['judge']}/key.json"],
            ("dietnerf", "train"): [at["scene"], "--steps", "1", "--rays", "16", "--resolutions", "8", "--no-progress",
                                    "--val-views", "1", "--semantic-weight", "0", "--device", "cpu"],
            ("dietnerf", "pose"): [at["photos"], "OUT"],
            ("dietnerf", "render"): [str(self.inside / "run"), "--frames", "2", "--device", "cpu", "--no-depth"],
            ("dietnerf", "evaluate"): [str(self.inside / "run"), "--device", "cpu"],
            ("dietnerf", "consistency"): [at["scene"], "--device", "cpu", "--views", "2"],
        }[program, name]  # fmt: skip
        return [str(out) if word == "OUT" else word for word in found] + (
            [] if "OUT" in found or name in ("serve", "calibrate") else ["--out", str(out)]
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory, gpt2_directory, clip_directory):  # noqa: F811
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster on tensors this small
    yield Place(tmp_path_factory.mktemp("commands"), gpt2_directory, clip_directory)
    torch.set_num_threads(threads)


def options(config: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type]]:
    """Paths of the fields of a configuration that are no choice among few, with the type of one value."""
    hints = typing.get_type_hints(type(config), include_extras=False)
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), (*above, field.name)
        if dataclasses.is_dataclass(value):
            yield from options(value, path)
            continue
        kinds = [hints[field.name]]
        while any(typing.get_origin(kind) in (tuple, typing.Union, types.UnionType) for kind in kinds):
            kinds = [inner for kind in kinds for inner in typing.get_args(kind) or (kind,)]
        yield from ((path, kind) for kind in VALUES if kind in kinds)


def changed(config: Any, path: tuple[str, ...], value: Any) -> Any:
    """A configuration with another value at one place; of a field of several values, the first is another."""
    name, *rest = path
    before = getattr(config, name)
    if rest:
        value = changed(before, tuple(rest), value)
    elif isinstance(before, tuple):
        value = (value, *before[1:])
    elif "tuple" in str(typing.get_type_hints(type(config))[name]):
        value = (value,)
    return dataclasses.replace(config, **{name: value})


@contextlib.contextmanager
def bounded(seconds: int = SECONDS) -> Iterator[None]:
    """Neither time nor memory without end."""

    def stop(*_: object) -> None:
        raise Hangs

    before, limits = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def ended(program: str, arguments: list[str], seconds: int = SECONDS) -> tuple[Any, str]:
    """The exit code of a command, and what it said on standard error."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=how) for how in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), bounded(seconds):
        try:
            code: Any = COMMANDS[program].main(arguments)
        except SystemExit as stopped:
            code = stopped.code
    err.seek(0)
    return code, err.read()


def fault(program: str, arguments: list[str]) -> str:
    """What is wrong with how a command ended; empty when it was done, or said in one line what to mend."""
    try:
        code, said = ended(program, arguments)
    except BaseException:
        return traceback.format_exc(limit=-4)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code not in (0, 2) or code == 2 and len(errors) > 1:
        return f"exit code {code}, {errors}"
    return f"control characters in {errors}" if any("\x1b" in line for line in errors) else ""


@pytest.mark.parametrize(("program", "name"), CASES)
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_absurd_values(program, name, place, monkeypatch, exhaustive):
    if program == "dietnerf" and not NERFSTUDIO:
        pytest.skip("needs nerfstudio")
    out = place.inside / "out" / f"{program}-{name}"
    monkeypatch.chdir(place.inside)

    def passed(*_: object, **__: object) -> None:
        raise UserError("checks passed")

    if (program, name) in LONG_STEPS:
        monkeypatch.setattr(LONG_STEPS[program, name], passed)
    chosen = COMMANDS[program].SUBCOMMANDS[name]
    kind = getattr(importlib.import_module(chosen.module), chosen.config)
    how = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    given = place.arguments(program, name, out)
    good = tyro.cli(kind, args=given, config=how)
    parse = tyro.cli
    code, said = ended(program, [name, *given], 250)  # with its imports
    assert code == 0 or "checks passed" in said or (name == "download" and "could be downloaded" in said), said
    faults = []
    turn: Counter[type] = Counter()
    for path, type_ in options(good):
        values, start = VALUES[type_], turn[type_]
        turn[type_] += SAMPLED
        for value in values if exhaustive else [values[(start + i) % len(values)] for i in range(SAMPLED)]:
            if isinstance(value, (str, Path)):
                value = type(value)(
                    str(value).replace("FILE", str(place.file)).replace("DIRECTORY", str(place.directory))
                )
            try:
                config = changed(good, path, value)
            except UserError:  # refused where it is made, as tyro says in its own words
                continue
            monkeypatch.setattr(tyro, "cli", lambda *_, found=config, **__: found)
            before = files_below(place.root)
            wrong = fault(program, [name])
            new = {file for file in files_below(place.root) - before if not file.startswith("above/inside/out")}
            if new and path[-1] not in ("out", "sheet", "embeddings") and (name, path) != ("pose", ("scene",)):
                wrong += f"wrote {sorted(new)[:3]}"
            if wrong:
                faults.append(f"{program} {name} --{'.'.join(path)} {value!r:.60}: {wrong}")
    monkeypatch.setattr(tyro, "cli", parse)
    first = CASES.index((program, name))
    for word in WORDS if exhaustive else [WORDS[(first + i) % len(WORDS)] for i in (0, 5, 10)]:  # as they are typed
        if wrong := fault(program, [name, *given[1:], word]):
            faults.append(f"{program} {name} {word!r:.60}: {wrong}")
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults)
