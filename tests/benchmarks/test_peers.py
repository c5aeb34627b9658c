"""The comparison with other captioners, in tiny sizes: equal work, equal captions, and what is written."""

import json

import pytest

from benchmarks import peers

TINY = peers.Sizes(layers=1, width=32, heads=2, vocabulary=150, blip_vocabulary=150, pixels=32, blip_pixels=48)


def test_all_sides_write_as_many_tokens_and_ours_are_those_of_generate(tmp_path, capsys):
    written = ["--batches", "1", "3", "--precisions", "fp32", "bf16", "--repeats", "1", "--docs", str(tmp_path)]
    result = peers.main(written, sizes=TINY)
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1]) == result
    assert json.loads((tmp_path / "peers.json").read_text()) == {"quick": False, "seed": 0, **result}
    for batch in (1, 3):
        assert result[f"generate_fp32_b{batch}_identical"] == 1
        for precision in ("fp32", "bf16"):
            for other, mine in peers.AGAINST.items():
                end = f"{precision}_b{batch}"
                theirs, ours = (result[f"{name}_{end}_captions_per_second"] for name in (other, mine))
                assert result[f"{other}_{end}_ratio"] == pytest.approx(ours / theirs, rel=0.02, abs=0.001)
    assert said.count("| BLIP base |") == 4


def test_only_those_that_are_asked_for_are_run():
    result = peers.main(
        ["--batches", "1", "--precisions", "fp32", "--repeats", "1", "--against", "generate"], sizes=TINY
    )
    found = {key.partition("_fp32_")[0] for key in result if "_fp32_" in key}
    assert found == {"generate", "ours_on_prefixes"} and result["generate_fp32_b1_identical"] == 1


def test_captions_that_differ_are_an_error_after_all_is_written(monkeypatch, tmp_path, capsys):
    models = peers.build(TINY, 2, seed=0)
    monkeypatch.setattr(peers, "build", lambda *_: models)

    def numbers(begin):
        return lambda models, batch, tokens: [[begin] * tokens] * batch

    monkeypatch.setattr(peers, "SIDES", {name: numbers(name == "generate") for name in peers.SIDES})
    with pytest.raises(SystemExit, match=r"in fp32, captions of batch \[1\] are not those of `generate`"):
        peers.main(["--quick", "--docs", str(tmp_path)])
    assert json.loads((tmp_path / "peers.json").read_text())["generate_fp32_b1_identical"] == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["blip_fp32_b1_ratio"] > 0


def test_work_that_is_not_equal_is_refused(monkeypatch):
    monkeypatch.setattr(peers, "SIDES", dict.fromkeys(peers.SIDES, lambda models, batch, tokens: [[1] * 3] * batch))
    with pytest.raises(RuntimeError, match=r"ours wrote captions of \[3, 3\] tokens, not 2 of 4"):
        peers.compare(None, 2, tokens=4, repeats=1)
