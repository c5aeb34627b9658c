"""Prefixes as words: nearest tokens by the plain formula, what images share, and the command."""

import json

import pytest
import torch
from torch.nn import functional as F

from clipcap.captioner import Captioner
from clipcap.cli import main
from clipcap.data.images import read_image
from clipcap.evaluation.interpret import common_share, interpret, nearest_tokens
from common.checks import UserError
from common.gpt2 import token_table


def test_nearest_tokens_are_the_nearest(model):
    captioner = Captioner.from_pretrained(model, device="cpu")
    table = token_table(captioner.model.gpt2)
    prefix = torch.randn(3, table.shape[1])
    prefix[1] = 7 * table[65]
    found = nearest_tokens(captioner.model, prefix, k=2)
    for row, several in zip(prefix, found, strict=True):
        similarity = [float(F.cosine_similarity(row, token, dim=0)) for token in table]
        best = sorted(range(len(table)), key=lambda i: -similarity[i])[:2]
        assert [token for token, _ in several] == [captioner.tokenizer.decode([i]) for i in best]
        assert [value for _, value in several] == pytest.approx([similarity[i] for i in best], abs=1e-5)
    assert found[1][0] == (captioner.tokenizer.decode([65]), pytest.approx(1.0, abs=1e-5))
    with pytest.raises(UserError, match="k is 0"):
        nearest_tokens(captioner.model, prefix, k=0)
    with pytest.raises(UserError, match="the vocabulary has"):
        nearest_tokens(captioner.model, prefix, k=10_000)


def test_common_share_at_its_ends():
    def share(prefixes):
        return float(common_share(prefixes.mean(dim=0), prefixes.square().sum(dim=-1).mean(dim=0)))

    one = torch.randn(1, 50, dtype=torch.double)
    assert share(one.expand(8, -1)) == pytest.approx(1)
    assert share(torch.cat([one, -one])) == pytest.approx(0, abs=1e-12)
    unrelated = torch.randn(200, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    assert share(unrelated) == pytest.approx(1 / 200, rel=0.05)
    assert share(torch.zeros(3, 4)) == 0


def test_interpretation_is_that_of_each_prefix(model, photos):
    captioner = Captioner.from_pretrained(model, device="cpu")
    paths = sorted(photos.glob("0[0-4].*"))
    seen = []
    found = interpret(captioner, paths, k=2, batch_size=2, progress=seen.append)
    with torch.no_grad():
        prefixes = captioner.model.prefix(captioner.embed([read_image(path) for path in paths])).double()
    assert sum(seen) == 5 and [one.image for one in found.images] == [str(path) for path in paths]
    assert [one.caption for one in found.images] == captioner.caption(paths, max_new_tokens=30)
    for one, prefix in zip(found.images, prefixes, strict=True):
        plain = nearest_tokens(captioner.model, prefix, k=2)
        assert [[token for token, _ in position] for position in one.tokens] == [[t for t, _ in p] for p in plain]
    mean = prefixes.mean(dim=0)
    assert [p[0][0] for p in found.mean] == [p[0][0] for p in nearest_tokens(captioner.model, mean)]
    energy = sum(float((prefix**2).sum()) for prefix in prefixes) / 5
    assert found.common_share == pytest.approx(float((mean**2).sum()) / energy)
    by_position = [
        float((mean[k] ** 2).sum()) / (sum(float((p[k] ** 2).sum()) for p in prefixes) / 5) for k in range(3)
    ]
    assert found.common_share_by_position == pytest.approx(by_position)


class OnApple(torch.Tensor):
    """A tensor that has no doubles until it is copied to the CPU, as on Apple's GPUs."""

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_sums_are_taken_where_doubles_are(model, photos, monkeypatch):
    captioner = Captioner.from_pretrained(model, device="cpu")
    paths = sorted(photos.glob("0[0-3].*"))
    expected, normalised = interpret(captioner, paths, batch_size=3), []
    prefix, table = captioner.model.prefix, token_table
    monkeypatch.setattr(captioner.model, "prefix", lambda *given: prefix(*given).as_subclass(OnApple))
    monkeypatch.setattr(
        "clipcap.evaluation.interpret.token_table", lambda gpt2: (normalised.append(gpt2), table(gpt2))[1]
    )
    assert interpret(captioner, paths, batch_size=3) == expected
    assert len(normalised) == 1  # the lexical embeddings, once for all images


@pytest.mark.slow
def test_command(model, photos, tmp_path, capsys):
    (photos / "cut.jpg").write_bytes((photos / "00.jpg").read_bytes()[:150])
    assert main(["interpret", str(photos), "--model", str(model)]) == 0
    streams = capsys.readouterr()
    lines = streams.out.splitlines()
    assert len(lines) == 14 and lines[12].startswith("mean of 12 images") and "common to all images" in lines[13]
    assert "skipped 1 of 13" in streams.err and "cut.jpg" in streams.err

    one = str(photos / "00.jpg")
    assert main(["interpret", one, "--model", str(model), "--top", "3", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["images"]) == 1 and [len(position) for position in found["images"][0]["tokens"]] == [3, 3, 3]
    assert found["common_share"] == pytest.approx(1)
    out = tmp_path / "deep" / "page.html"
    assert main(["interpret", str(photos), "--model", str(model), "--format", "html", "--out", str(out)]) == 0
    assert out.read_text().count('class="card"') == 12 and "<script" not in out.read_text()
    capsys.readouterr()

    for arguments, message in (
        ([one, "--format", "html"], "give --out"),
        ([one, "--top", "0"], "top is 0"),
        ([str(photos / "cut.jpg"), "--model", str(model)], "none of the 1 images"),
    ):
        assert main(["interpret", *arguments]) == 2
        assert message in capsys.readouterr().err
