"""ClipCap's ablations on photographs: which captioners are trained, and the table of what they scored."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from common.checks import UserError
from common.pretrained import ASSETS
from common.runtime import RuntimeConfig
from experiments.captions import photograph_ablations, photographs
from experiments.captions.photograph_ablations import Config, Run, row, runs_of, write_page
from tests.conftest import save_tokenizer
from tests.experiments.test_photographs import data  # noqa: F401, a fixture


def test_the_papers_pair_has_the_lengths_and_the_seeds():
    names = [run.name for run in runs_of(Config(seeds=2, lengths=(2, 4), captioners=("mlp-frozen", "mlp-tuned")))]
    assert names == ["mlp-frozen-4-seed0", "mlp-tuned-4-seed0", "mlp-tuned-2-seed0", "mlp-tuned-4-seed1"]
    everything = list(runs_of(Config()))
    assert len(everything) == len(set(everything)) == 7 + 2 * 4 + 2 * 2
    assert Run("mlp-text-only", 4, 0) in everything and Run("mlp-text-only", 4, 1) not in everything


def scores(**changes):
    found = {"captioner": "mlp-tuned", "K": 4, "seed": 0, "BLEU-4": 0.2, "ROUGE-L": 0.5, "CIDEr": 0.5, "distinct": 90}
    found |= {"photographs": 100, "loss": 2.8, "falling": False, "trained": 2_000_000, "cpu_seconds": 60}
    return found | changes


def test_a_row_is_the_mean_of_the_seeds_and_marks_a_loss_that_still_fell():
    assert row([scores(falling=True)]) | {"CIDEr": "50.00", "val loss": "2.80 ↓", "seeds": "1"} == row(
        [scores(falling=True)]
    )
    two = row([scores(), scores(seed=1, CIDEr=0.6, falling=True, cpu_seconds=180)])
    assert two["CIDEr"] == "55.00 ± 7.07" and two["val loss"] == "2.80 ± 0.00" and two["CPU min"] == "2"


def test_the_figure_is_of_the_lengths(tmp_path):
    config = Config(out=tmp_path / "out", docs=tmp_path / "docs")
    write_page([scores()], config)
    assert not (tmp_path / "docs" / "photograph_prefix_length.png").exists()
    table = write_page([scores(K=16, CIDEr=0.4), scores(), scores(captioner="mlp-frozen")], config)
    assert [line.split("|")[1:3] for line in table.splitlines()[2:]] == [
        [" mlp-frozen ", " 4 "],
        [" mlp-tuned ", " 4 "],
        [" mlp-tuned ", " 16 "],
    ]
    assert (tmp_path / "docs" / "photograph_prefix_length.png").stat().st_size > 5000


@pytest.mark.slow
def test_captioners_of_a_dozen_pictures(data, tmp_path):  # noqa: F811
    made = tmp_path / "made"
    made.mkdir()
    photographs.cleaned(data, data.parent, made)
    (made / "clip").mkdir()
    (made / "clip" / "clip-photo").symlink_to(ASSETS / "clip-photo")
    tokenizer = save_tokenizer(made / "gpt2" / "gpt2-captions")
    torch.manual_seed(0)
    sizes = {"n_positions": 128, "n_embd": 24, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
    gpt2.save_pretrained(made / "gpt2" / "gpt2-captions")
    config = Config(
        made=made,
        images=data.parent,
        out=tmp_path / "out",
        captioners=("mlp-tuned", "mlp-text-only", "mlp-retrieval"),
        seeds=2,
        length=2,
        lengths=(3,),
        views=2,
        steps=2,
        batch_size=4,
        runtime=RuntimeConfig(device="cpu", threads=1),
    )
    photograph_ablations.main(config)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [(run["captioner"], run["K"], run["seed"]) for run in found] == [
        ("mlp-tuned", 2, 0),
        ("mlp-text-only", 2, 0),
        ("mlp-retrieval", 2, 0),
        ("mlp-tuned", 3, 0),
        ("mlp-tuned", 2, 1),
    ]
    assert all(run["photographs"] == 2 and 0 <= run["CIDEr"] and run["loss"] > 0 for run in found)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("last.ckpt")}
    photograph_ablations.main(config)  # all is there
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("last.ckpt")}
    assert len(before) == 5


def test_what_is_not_there_is_refused_first(tmp_path):
    config = Config(made=tmp_path, out=tmp_path / "out")
    with pytest.raises(UserError, match=r"photographs\.json' does not exist"):
        photograph_ablations.main(config)
    with pytest.raises(UserError, match="captioners is 'x'"):
        photograph_ablations.main(replace(config, captioners=("x",)))
    with pytest.raises(UserError, match="length is 0"):
        photograph_ablations.main(replace(config, lengths=(0,)))
