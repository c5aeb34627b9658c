"""The pipeline: every stage killed and resumed ends in the same weights, and bad input is one line."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.checks import UserError
from common.files import MARKER
from common.gpt2 import load_gpt2
from common.runtime import RuntimeConfig
from recycle_gpt2 import rows as rows_module
from recycle_gpt2 import run as run_module
from recycle_gpt2 import stages as stages_module
from recycle_gpt2 import takeover
from recycle_gpt2.alignment import AlignmentConfig
from recycle_gpt2.corpus import build_corpus
from recycle_gpt2.hub import upload
from recycle_gpt2.lexical import RowsConfig
from recycle_gpt2.run import RunConfig, recycle
from recycle_gpt2.stages import (
    AlignConfig,
    FinetuneConfig,
    RelearnConfig,
    align_models,
    finetune,
    relearn,
    save_model,
)
from recycle_gpt2.texts import text_hash
from recycle_gpt2.training import StageConfig, StageRecord


def long(test):
    """Slow, and much slower on a machine that is shared."""
    return pytest.mark.slow(pytest.mark.timeout(1200)(test))


def settings(text: Path, models: tuple[Path, Path], out: Path) -> RunConfig:
    return RunConfig(
        text=(text,),
        out=out,
        language="nld",
        small=str(models[0]),
        large=str(models[1]),
        vocab_size=320,
        block=32,
        shares=(0.8, 0.1, 0.1),
        large_share=0.5,
        finetune_share=0.5,
        unfreeze="top",
        stage=StageConfig(epochs=1.0, batch_size=8, val_every=5, lr=3e-3),
        runtime=RuntimeConfig(device="cpu", seed=3),
    )


KILLS = """
import os, pickle, signal, sys
import torch
torch.set_num_threads(1)
import recycle_gpt2.run as run, recycle_gpt2.stages as stages, recycle_gpt2.corpus as corpus, recycle_gpt2.texts as texts
from recycle_gpt2.training import Recycling

config, whole = pickle.load(open(sys.argv[1], "rb"))

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

step = Recycling.training_step
def die_in(folder, at):
    def training_step(self, batch, batch_idx):
        if folder in self.trainer.default_root_dir.split(os.sep) and self.global_step == at:
            die()
        return step(self, batch, batch_idx)
    Recycling.training_step = training_step

def patch(owner, name):
    return lambda: setattr(owner, name, die)

points = [
    ("text", patch(texts, "write_json")),
    ("tokenizer", patch(run, "save_tokenizer")),
    ("corpus", patch(corpus, "write_json")),
    ("relearn", lambda: die_in("relearn", 7)),
    ("relearn's model", patch(stages, "save_model")),
    ("align", patch(stages, "save_model")),
    ("relearn-large", lambda: die_in("relearn-large", 3)),
    ("finetune, first step", lambda: die_in("step-1", 1)),
    ("finetune, last step", lambda: die_in("step-3", 1)),
    ("evaluate", patch(run, "sample")),
    ("lexicon", patch(run, "run_lexicon")),
    ("card", patch(run, "save_model")),
]
for name, prepare in points:
    child = os.fork()
    if not child:
        prepare()
        run.recycle(config)
        os._exit(0)  # it was not killed
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, status)
    assert not config.out.exists(), name
run.recycle(config)
run.recycle(whole)
"""


@pytest.fixture(scope="module")
def runs(forks, tmp_path_factory, dutch, english_models) -> tuple[RunConfig, RunConfig]:
    """A run that was killed in every stage, and one that was not."""
    import pickle

    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").mkdir()
    (folder / "text" / "stories.txt").write_text("\n\n".join(dutch[:120]))
    (folder / "text" / "news.txt").write_text("\n\n".join(dutch[120:]))
    config = settings(folder / "text", english_models, folder / "killed")
    whole = replace(config, out=folder / "whole")
    (folder / "configs.pkl").write_bytes(pickle.dumps((config, whole)))
    done = forks.run(KILLS, folder / "configs.pkl")
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-500:]
    return config, whole


@long
def test_killed_in_every_stage_a_run_ends_in_the_same_weights(runs):
    killed, whole = (load_file(config.out / "model.safetensors") for config in runs)
    assert killed.keys() == whole.keys()
    assert all(torch.equal(killed[name], whole[name]) for name in killed)
    for config in runs:
        assert not [path for path in config.out.parent.iterdir() if path.name.startswith(".")], "half-written files"
    lexicons = [(config.out.with_name(config.out.name + ".stages") / "lexicon" / "lexicon.tsv") for config in runs]
    assert lexicons[0].read_text() == lexicons[1].read_text()


@long
def test_the_model_is_an_ordinary_directory_with_its_tokenizer_and_card(runs):
    config = runs[1]
    model = AutoModelForCausalLM.from_pretrained(config.out)
    tokenizer = AutoTokenizer.from_pretrained(config.out)
    ours, same = load_gpt2(config.out)
    assert model.config.vocab_size == len(tokenizer) == len(same) == 320
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert (model.config.n_embd, model.config.n_layer) == (24, 3)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.transformer.wte.weight, ours.transformer.wte.weight)
    card = (config.out / "README.md").read_text()
    for part in ("language: nld", "documents of", "relearn-large", "finetune", "hours", "bits per byte", "threads"):
        assert part in card, part
    assert "Rows began by `focus`; adamw, cosine." in card and "| 0.003 |" in card
    assert str(config.small) not in card and str(config.out.parent) not in card


@long
def test_training_helped_and_every_stage_has_its_record(runs):
    stages = runs[1].out.with_name("whole.stages")
    scores = json.loads((stages / "evaluate" / "done.json").read_text())["scores"]
    bits = {name: groups["all"]["bits_per_byte"] for name, groups in scores.items()}
    assert bits["recycled"] < bits["English, untouched"]
    assert set(scores["recycled"]) == {"all", "stories", "news"}
    relearned = json.loads((stages / "relearn" / "done.json").read_text())
    assert relearned["trained"] == ["transformer.wte.weight"]
    aligned = json.loads((stages / "align" / "done.json").read_text())
    assert 0 <= aligned["neighbour_overlap"] <= 1


@long
def test_a_finished_run_trains_nothing_and_other_settings_are_named(runs, monkeypatch):
    config = runs[1]
    monkeypatch.setattr("recycle_gpt2.training.Recycling.training_step", None)
    before = (config.out / "model.safetensors").stat().st_mtime_ns
    assert recycle(config) == config.out
    assert (config.out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="begun with stage.lr 0.003, now it is 0.01"):
        recycle(replace(config, stage=replace(config.stage, lr=0.01)))
    # Where and with how many processes a run resumes is free.
    with pytest.raises(UserError, match="align.* was begun with choose True, now it is False"):
        recycle(replace(config, alignment=AlignmentConfig(choose=False)))
    recycle(replace(config, workers=2, runtime=RuntimeConfig(device="cpu", seed=3, threads=1)))


@long
def test_what_was_made_of_a_deleted_stage_or_of_other_text_is_made_again(tmp_path, text, english_models, capsys):
    config = replace(
        settings(text, english_models, tmp_path / "out"), large="", unfreeze="all", stage=StageConfig(tokens=256)
    )
    stages = tmp_path / "out.stages"

    def made() -> dict[str, int]:
        found = {path.parent.name: path.stat().st_mtime_ns for path in stages.glob("*/done.json")}
        return found | {"out": (config.out / "model.safetensors").stat().st_mtime_ns}

    def again(config: RunConfig) -> set[str]:
        """What the same command makes again."""
        before = made()
        recycle(config)
        after = made()
        same = load_file(config.out / "model.safetensors"), load_file(stages / "finetune/model/model.safetensors")
        assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
        return {name for name, time in after.items() if before.get(name) != time}

    last = {"evaluate", "lexicon", "card", "out"}
    recycle(config)
    assert again(config) == set()

    config = replace(config, finetune_lr=1e-2)
    with pytest.raises(UserError, match=r"finetune' was begun with stage.lr None, .* delete the directory"):
        recycle(config)
    shutil.rmtree(stages / "finetune")
    assert again(config) == {"finetune", *last}

    config = replace(config, stage=StageConfig(tokens=256, lr=1e-2))
    shutil.rmtree(stages / "relearn")
    capsys.readouterr()
    assert again(config) == {"relearn", "finetune", "finetune.1", *last}
    assert "finetune was made of another model: it is made again, and what was trained" in capsys.readouterr().out

    os.utime(text / "stories.txt", ns=(1, 1))
    assert again(config) == set()  # the same text

    with open(text / "stories.txt", "a", encoding="utf-8") as file:
        file.write("\n\nde kat en het koud water op een mat\n" * 20)
    kept = {"relearn.1", "finetune.2"}
    assert again(config) == {"tokenizer", "corpus", "relearn", "finetune", *kept, *last}
    shutil.rmtree(text)
    assert again(config) == set()  # nothing that is left to do needs the text


def test_a_model_is_uploaded_with_its_card(monkeypatch, tmp_path):
    calls = []

    class Hub:
        def create_repo(self, name, exist_ok):
            calls.append(name)

        def upload_folder(self, *, folder_path, repo_id, ignore_patterns):
            calls.append((folder_path, repo_id, ignore_patterns))
            return "address"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert upload(tmp_path, "me/gpt2-nld") == "address"
    assert calls == ["me/gpt2-nld", (tmp_path, "me/gpt2-nld", [MARKER])]
    monkeypatch.setattr(Hub, "create_repo", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(UserError, match="nothing is trained again"):
        upload(tmp_path, "me/gpt2-nld")


def test_each_training_sees_the_blocks_in_another_order(tmp_path, text, tokenizer, english_models, monkeypatch):
    build_corpus([text], tokenizer, tmp_path / "corpus", block=16, shares=(0.8, 0.1, 0.1), progress=False)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    orders = []

    def train_stage(*args, order, **kwargs):
        orders.append(order)
        return StageRecord((), 0, 0, 0.0, 0.0, 0.0, ())

    monkeypatch.setattr(stages_module, "train_stage", train_stage)
    relearning = RelearnConfig(
        corpus=tmp_path / "corpus", tokenizer=tmp_path / "tokenizer", out=tmp_path / "a", model=str(english_models[1])
    )
    model = relearn(relearning)
    relearn(replace(relearning, out=tmp_path / "b", model=str(model), keep_table=True))
    finetune(FinetuneConfig(model=model, corpus=tmp_path / "corpus", out=tmp_path / "c", unfreeze="top"))
    assert len(orders) == 2 + 3 and len(set(orders)) == len(orders)


def test_focus_with_a_dictionary_still_mixes_the_other_rows(
    tmp_path, text, tokenizer, english_models, english_tokenizer, monkeypatch
):
    build_corpus([text], tokenizer, tmp_path / "corpus", block=16, shares=(0.8, 0.1, 0.1), progress=False)
    (tmp_path / "words.tsv").write_text("kat\tcat\n")
    given = {}
    monkeypatch.setattr(rows_module, "initialise", lambda *args, **kwargs: given.update(kwargs))
    model, english = load_gpt2(english_models[0])
    train = stages_module.TokenBlocks(tmp_path / "corpus", "train")
    rows_module.new_rows(
        RowsConfig(initialisation="focus"), model, english, tokenizer, train, seed=0, dictionary=tmp_path / "words.tsv"
    )
    assert given["auxiliary"].shape[0] == len(tokenizer) and given["dictionary"] == tmp_path / "words.tsv"


def test_the_dictionary_of_focus_does_not_measure_the_lexicon(tmp_path, monkeypatch):
    (tmp_path / "words.tsv").write_text("kat\tcat\n")
    given = []
    monkeypatch.setattr(run_module, "run_lexicon", given.append)
    config = RunConfig(text=(), out=tmp_path, language="nld", dictionary=tmp_path / "words.tsv")
    for initialisation in ("random", "focus"):
        run_module._make_lexicon(replace(config, rows=RowsConfig(initialisation=initialisation)), tmp_path, tmp_path)
    assert [config.dictionary for config in given] == [tmp_path / "words.tsv", None]


@pytest.mark.slow
def test_alignment_is_on_the_device_and_scores_are_in_the_precision_asked_for(
    tmp_path, text, tokenizer, english_models, monkeypatch
):
    small, large = map(str, english_models)
    devices = []

    def load(name, *, device="cpu", **kwargs):
        devices.append(device)
        return load_gpt2(name, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(stages_module, "load_gpt2", load)
        patch.setattr(stages_module, "start", lambda runtime: torch.device("cuda", 0))
        align_models(AlignConfig(recycled=Path(small), out=tmp_path / "align", small=small, large=large))
        assert devices == [torch.device("cuda", 0)] * 3
        patch.setattr(stages_module, "start", lambda runtime: torch.device("mps"))  # has no double precision
        align_models(AlignConfig(recycled=Path(small), out=tmp_path / "again", small=small, large=large))
        assert devices[3:] == [torch.device("cpu")] * 3

    build_corpus([text], tokenizer, tmp_path / "corpus", block=16, shares=(0.8, 0.1, 0.1), progress=False)
    config = settings(text, english_models, tmp_path / "out")
    exact, rough = (
        run_module._evaluate(
            replace(config, runtime=RuntimeConfig(device="cpu", precision=precision)),
            tmp_path / "corpus",
            {"recycled": small},
        )["scores"]["recycled"]["all"]["nats"]
        for precision in ("fp32", "bf16")
    )
    assert exact != rough and rough == pytest.approx(exact, rel=0.01)


def test_a_run_of_version_0_1_goes_on_with_the_text_that_it_had(tmp_path, text, english_models, monkeypatch, capsys):
    """It knew a text by its path, its size and its ends."""
    monkeypatch.chdir(tmp_path)
    config = settings(Path("text"), english_models, tmp_path / "out")
    work = tmp_path / "out.stages"
    sampled = "4b1ae9a4a5c0b63ee1e2a1b0b2a3bb8c0d3a1b8d9a5b9b6a1c0d7c1b0a4b5c6d"
    for stage in ("tokenizer", "corpus"):
        (work / stage).mkdir(parents=True)
        (work / stage / "done.json").write_text('{"tokens": 320}')
    for recorded, same in ((takeover.sampled_hash((Path("text"),)), True), (sampled, False)):
        for stage in ("tokenizer", "corpus"):
            record = {"text": ["text"], "vocab_size": 320, "seed": 0, "inputs": {"text": recorded}}
            (work / stage / "settings.json").write_text(json.dumps(record))
        text_now = text_hash([Path("text")])
        takeover.take_over(config.text, work, text_now)
        printed = capsys.readouterr().out
        assert ("begun by version 0.1 with the same text: it resumes" in printed) is same
        inputs = json.loads((work / "corpus" / "settings.json").read_text())["inputs"]
        assert (inputs["text"] == text_now) is same
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")  # as that version wrote it, without a marker
    for name in ("relearn", "align", "relearn-large", "finetune", "evaluate", "lexicon", "card"):
        (work / name).mkdir()
        (work / name / "done.json").write_text("{}")
    with pytest.raises(UserError, match="take the place of 'config.json'"):
        run_module._require_own(config, work, text_now)  # it is to be made of another text
    record["inputs"]["text"] = takeover.sampled_hash((Path("text"),))
    (work / "corpus" / "settings.json").write_text(json.dumps(record))
    run_module._require_own(config, work, text_now)  # nothing is left to make
    (work / "finetune" / "done.json").unlink()
    with pytest.raises(UserError, match="take the place of 'config.json'"):
        run_module._require_own(config, work, text_now)


@long
def test_two_processes_train_as_one_with_twice_the_batch(forks, runs, tmp_path):
    config = runs[1]
    stages = config.out.with_name("whole.stages")
    model, english = load_gpt2(config.small)
    model.config.resid_pdrop = model.config.embd_pdrop = model.config.attn_pdrop = 0.0  # or the processes' would differ
    small = save_model(model, english, tmp_path / "small")

    def arguments(out: Path, *more: str) -> list[str]:
        return [
            "relearn",
            "--corpus",
            str(stages / "corpus"),
            "--tokenizer",
            str(stages / "tokenizer"),
            "--out",
            str(out),
            "--model",
            str(small),
            "--tokens",
            "1024",
            "--optimizer",
            "adamw",
            "--schedule",
            "cosine",
            "--device",
            "cpu",
            "--threads",
            "1",
            *more,
        ]

    code = "from recycle_gpt2.cli import main\nraise SystemExit(main())"
    done = forks.run(code, *arguments(tmp_path / "one", "--batch-size", "4"))
    assert done.returncode == 0, done.stderr[-2000:]
    forks.run_ranks(code, *arguments(tmp_path / "two", "--batch-size", "2", "--devices", "2", "--strategy", "ddp"))
    one, two = (load_gpt2(tmp_path / name / "model")[0].transformer.wte.weight for name in ("one", "two"))
    assert torch.allclose(one, two, atol=1e-4)
    records = [json.loads((tmp_path / name / "done.json").read_text()) for name in ("one", "two")]
    assert records[0]["tokens"] == records[1]["tokens"] == 1024
    assert records[0]["val_loss"] == pytest.approx(records[1]["val_loss"], abs=1e-3)


@long
def test_stages_by_themselves(runs, tmp_path):
    """relearn with positions and norms; align by kNN; finetune without a second look at the settings."""
    config = runs[1]
    stages = config.out.with_name("whole.stages")
    stage = StageConfig(tokens=500, batch_size=4, lr=1e-3)
    directory = relearn(
        RelearnConfig(
            corpus=stages / "corpus",
            tokenizer=stages / "tokenizer",
            out=tmp_path / "relearn",
            model=config.small,
            rows=RowsConfig(initialisation="focus", positions=True, norms=True),
            stage=stage,
            runtime=config.runtime,
        )
    )
    record = json.loads((tmp_path / "relearn" / "done.json").read_text())
    assert {"transformer.wpe.weight", "transformer.ln_f.bias"} < set(record["trained"])
    assert not [name for name in record["trained"] if "mlp" in name or "attn" in name]
    aligned = align_models(
        AlignConfig(
            recycled=directory,
            out=tmp_path / "align",
            small=config.small,
            large=config.large,
            alignment=AlignmentConfig(method="knn", k=3),
        )
    )
    tuned = finetune(
        FinetuneConfig(
            model=aligned, corpus=stages / "corpus", out=tmp_path / "tuned", stage=stage, runtime=config.runtime
        )
    )
    model, _ = load_gpt2(tuned)
    before, _ = load_gpt2(aligned)
    assert not torch.equal(model.transformer.h[0].mlp.c_fc.weight, before.transformer.h[0].mlp.c_fc.weight)


@long
def test_small_and_large_of_other_english_vocabularies_are_refused(runs, tmp_path, gpt2_directory):
    config = runs[1]
    small = load_gpt2(config.small)[0].config.n_embd
    assert small == 16
    with pytest.raises(UserError, match="English vocabularies of .* differ in .* tokens, such as"):
        recycle(replace(config, large=str(gpt2_directory), out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    relearned = config.out.with_name("whole.stages") / "relearn" / "model"
    with pytest.raises(UserError, match="English vocabularies"):
        align_models(AlignConfig(recycled=relearned, out=tmp_path / "a", small=config.small, large=str(gpt2_directory)))
