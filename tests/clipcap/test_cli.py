"""The command `clipcap`: output formats, exit codes and one-line errors."""

import csv
import io
import json
import os
import sys

import pytest
from PIL import Image

from clipcap.cli import SUBCOMMANDS, main


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    assert "Traceback" not in streams.err
    return code, streams.out, streams.err


def test_captions_as_text_json_and_csv(capsys, photos, model, tmp_path):
    options = ("--model", model, "--max-new-tokens", 4, "--num-captions", 2)
    code, text, _ = run(capsys, "caption", photos, *options)
    assert code == 0 and len(text.splitlines()) == 24
    code, found, _ = run(capsys, "caption", photos, *options, "--format", "json")
    rows = json.loads(found)
    assert len(rows) == 12 and all(len(row["captions"]) == len(row["scores"]) == 2 for row in rows)
    out = tmp_path / "deep" / "captions.csv"
    code, printed, _ = run(capsys, "caption", photos, *options, "--format", "csv", "--out", out)
    table = list(csv.DictReader(io.StringIO(out.read_text())))
    assert printed == "" and [row["caption"] for row in table[:2]] == rows[0]["captions"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "json", "jsonl", "csv"])
def test_a_file_of_other_things_is_not_replaced(capsys, photos, model, tmp_path, kind):
    out = tmp_path / "captions.txt"
    options = ("caption", photos, "--model", model, "--max-new-tokens", 3, "--format", kind, "--out", out)
    out.write_text("file_name,caption\n00.jpg,what people said\n")
    code, _, err = run(capsys, *options)
    assert code == 2 and "holds something else than captions that this command wrote" in err
    assert "what people said" in out.read_text()
    out.unlink()
    assert run(capsys, *options)[0] == 0
    written = out.read_bytes()
    assert run(capsys, *options)[0] == 0 and out.read_bytes() == written
    assert run(capsys, *options, "--min-confidence", 0)[0] == 0  # other captions of this command give way


def test_a_batch_goes_on_and_names_what_it_skipped(capsys, photos, model):
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.png").write_text("hello")
    (photos / "cut.jpg").write_bytes((photos / "00.jpg").read_bytes()[:150])
    code, out, err = run(capsys, "caption", photos, photos / "gone.jpg", "--model", model, "--max-new-tokens", 3)
    assert code == 0 and len(out.splitlines()) == 12
    assert "skipped 4 of 16" in err
    for name in ("empty.jpg", "text.png", "cut.jpg", "gone.jpg"):
        assert any(name in line for line in err.splitlines())


def test_animated_and_16_bit_images(capsys, tmp_path, model):
    folder = tmp_path / "odd"
    folder.mkdir()
    frames = [Image.new("P", (20, 10), i) for i in range(3)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    Image.new("I;16", (9, 30), 40000).save(folder / "b.png")
    code, out, err = run(capsys, "caption", folder, "--model", model, "--max-new-tokens", 3)
    assert code == 0 and len(out.splitlines()) == 2 and "skipped" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("caption", "{folder}/gone.jpg", "--model", "{model}", "--max-new-tokens", "5"), "gone.jpg"),
        (("caption", "{empty}", "--model", "{model}"), "no image"),
        (("caption", "{folder}", "--model", "no/such-model"), "no/such-model"),
        (("caption", "{folder}", "--model", "{folder}"), "config.json"),
        (("caption", "{folder}", "--model", "{model}", "--num-captions", "9"), "num_captions"),
        (("caption", "{folder}", "--model", "{model}", "--strategy", "sample", "--top-p", "0"), "top_p"),
        (("caption", "{folder}", "--model", "{model}", "--device", "cuda:77"), "cuda:77"),
        (("caption", "{folder}", "--model", "{model}", "--seed", "1" + 26 * "0"), "seed is 1e+26"),
        (("caption", "{folder}", "--model", "{model}", "--device", "meta"), "device is 'meta'"),
        (("caption", "{folder}", "--model", "{model}", "--temperature", "1e-320"), "temperature is 1e-320"),
        (("caption", "{folder}", "--model", "{model}", "--temperature", "nan"), "temperature is nan"),
        (("caption", "{folder}", "--model", "{model}", "--strategy", "sample", "--top-p", "nan"), "top_p is nan"),
        (("caption", "{folder}", "--model", "{model}", "--num-beams", "1000000000"), "num_beams is 1000000000"),
        (("caption", "{folder}", "--model", "{model}", "--max-new-tokens", "1000000000"), "max_new_tokens is"),
        (("caption", "{folder}", "--model", "gone", "--out", "{folder}"), "is a directory"),
        (("caption", "{folder}", "--model", "gone", "--out", "{folder}/" + 256 * "n"), "name of 256 characters"),
        (("caption", "{folder}", "--model", "gone", "--sheet", "{folder}/" + 256 * "n" + ".png"), "sheet is"),
        (("caption", "{folder}", "--model", "gone", "--spreadsheet"), "use --format csv"),
        (("interpret", "{folder}", "--model", "gone", "--out", "{folder}/00.jpg/x"), "below the file"),
        (("interpret", "{folder}", "--model", "{model}", "--batch-size", "0"), "batch_size is 0"),
        (("evaluate", "--data", "{folder}", "--model", "gone", "--out", "{folder}/00.jpg"), "is a file"),
        (("evaluate", "--data", "gone", "--model", "gone", "--resamples", "1000000000000"), "resamples is"),
        (("train", "--data", "{folder}/gone.json"), "gone.json"),
        (
            ("train", "--data", "{folder}", "--out", "{folder}/00.jpg"),
            "00.jpg' is a file: give the path of a directory",
        ),
        (("train", "--data", "{folder}", "--init", "common/assets/gpt2-tiny"), "is a 'gpt2' model, not a captioner"),
        (("train", "--data", "{binary}"), "video.bin' is not text: give a file of captions"),
        (("embed", "{folder}", "--out", "{folder}/00.jpg"), "00.jpg' is a file: give the path of a directory"),
        (("evaluate", "--data", "{folder}", "--model", "gone", "--language", "klingon"), "language is 'klingon'"),
        (("calibrate", "--data", "{folder}", "--model", "{model}", "--language", "english"), "language is 'english'"),
        (("train", "--data", "{empty}"), "no image"),
        (("convert", "{folder}/00.jpg", "{folder}/out", "--gpt2", "tiny"), "00.jpg"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    capsys, root, tmp_path, photos, model, monkeypatch, arguments, message
):
    empty, binary = tmp_path / "empty", tmp_path / "video.bin"
    empty.mkdir()
    binary.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(90))
    monkeypatch.chdir(root)
    filled = [a.format(folder=photos, empty=empty, binary=binary, model=model) for a in arguments]
    code, _, err = run(capsys, *filled)
    assert code == 2 and message in err
    assert sum(line.startswith("error:") for line in err.splitlines()) <= 1


def test_unknown_flags_and_values_exit_with_2(capsys):
    assert run(capsys, "caption")[0] == 2
    code, _, err = run(capsys, "nothing")
    assert code == 2 and "'nothing'" in err and "train" in err
    for arguments in (["caption", "x.jpg", "--format", "xml"], ["caption", "x.jpg", "--nothing"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    capsys.readouterr()


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in SUBCOMMANDS)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_command_explains_its_options(capsys, name):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0 and f"clipcap {name}" in capsys.readouterr().out


def test_packaged_weights_of_a_changed_size_are_an_error(capsys, photos, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"prefix_length": 5}))
    code, _, err = run(capsys, "caption", photos, "--model", model)
    assert code == 2 and "shape" in err


@pytest.mark.slow
@pytest.mark.parametrize("language", ["nld", "ita"])
def test_captions_in_another_language(capsys, language):
    from common.pretrained import ASSETS
    from experiments.scenes.captions import parse
    from experiments.scenes.wording import WORDINGS

    scene = ASSETS / "samples" / "scenes" / "test_000.jpg"
    code, out, _ = run(capsys, "caption", scene, "--language", language, "--strategy", "greedy")
    named = parse(out.split("\t")[1], wording=WORDINGS[language])
    assert code == 0 and named and all(thing.colour and thing.shape for thing in named)
    english = [run(capsys, "caption", scene, "--strategy", "greedy", *more)[1] for more in ((), ("--language", "eng"))]
    assert english[0] == english[1] != out


def test_languages_have_a_packaged_captioner_each(capsys):
    from common.pretrained import ASSETS, CAPTIONERS

    scene = ASSETS / "samples" / "scenes" / "test_000.jpg"
    for arguments, said in ((("--language", "dutch"), "eng, nld"), (("--language", "nld", "--model", "x/y"), "'x/y'")):
        code, _, err = run(capsys, "caption", scene, *arguments)
        assert code == 2 and said in err and err.count("\n") == 1
    for folder in CAPTIONERS.values():
        assert (folder / "README.md").is_file() and (folder / "model.safetensors").stat().st_size < 6e6
        assert not json.loads((folder / "config.json").read_text())["gpt2"] or folder.name == "captioner-tiny"


def stop_at_the_fourth_batch(monkeypatch) -> list[int]:
    """Ctrl-C as the fourth batch is embedded; returns the sizes of the batches, as they come."""
    from clipcap.captioner import Captioner

    seen, embed = [], Captioner.features

    def dying(self, pixels):
        seen.append(len(pixels))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return embed(self, pixels)

    monkeypatch.setattr(Captioner, "features", dying)
    return seen


def test_an_interrupted_run_goes_on_and_loses_nothing(capsys, photos, model, tmp_path, monkeypatch):
    from clipcap.captioner import Captioner

    options = ("--model", model, "--max-new-tokens", 4, "--batch-size", 2)
    assert run(capsys, "caption", photos, *options, "--out", tmp_path / "whole.jsonl")[0] == 0
    whole = (tmp_path / "whole.jsonl").read_text()
    embed = Captioner.features
    out = tmp_path / "captions.jsonl"
    seen = stop_at_the_fourth_batch(monkeypatch)
    assert run(capsys, "caption", photos, *options, "--out", out)[0] == 130
    partial = tmp_path / "captions.jsonl.partial"
    assert not out.exists() and len(partial.read_text().splitlines()) == 1 + 6
    with open(partial, "a") as file:
        file.write('["half a li')  # a run that was killed
    code, _, err = run(capsys, "caption", photos, *options, "--out", out, "--num-beams", 2)
    assert code == 2 and "num_beams" in err and partial.exists()
    monkeypatch.setattr(Captioner, "features", lambda self, pixels: (seen.append(len(pixels)), embed(self, pixels))[1])
    seen.clear()
    code, _, err = run(capsys, "caption", photos, *options, "--out", out)
    assert code == 0 and "6 of 12" in err and sum(seen) == 6
    assert out.read_text() == whole and not partial.exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="file names are UTF-8 here")
def test_file_names_that_are_not_utf8(capsys, photos, model, tmp_path, monkeypatch):
    from clipcap.captioner import Captioner

    name = os.fsdecode(b"caf\xe9.jpg")
    (photos / "00.jpg").rename(photos / name)
    options = ("--model", model, "--max-new-tokens", 4, "--batch-size", 2)
    code, text, _ = run(capsys, "caption", photos, *options)
    assert code == 0 and text.splitlines()[11].split("\t")[0] == str(photos / r"caf\udce9.jpg")
    code, found, _ = run(capsys, "caption", photos / name, photos, *options, "--format", "json")
    assert code == 0 and json.loads(found)[0]["image"] == str(photos / name)

    embed = Captioner.features
    out, given = tmp_path / "captions.jsonl", ("caption", photos / name, photos, *options)
    stop_at_the_fourth_batch(monkeypatch)
    assert run(capsys, *given, "--out", out)[0] == 130
    monkeypatch.setattr(Captioner, "features", embed)
    code, _, err = run(capsys, *given, "--out", out)
    assert code == 0 and "going on after 7 of 13" in err
    assert [json.loads(line) for line in out.read_text().splitlines()] == json.loads(found)


@pytest.mark.slow
def test_captions_stay_readable(capsys, photos, model, tmp_path, monkeypatch):
    from clipcap.captioner import Captioner

    monkeypatch.setattr(Captioner, "text", lambda self, caption: "één kat 😀")
    for kind in ("text", "json", "jsonl", "csv"):
        arguments = ("caption", photos / "00.jpg", "--model", model, "--max-new-tokens", 2, "--format", kind)
        assert "één kat 😀" in run(capsys, *arguments)[1]
        assert run(capsys, *arguments, "--out", tmp_path / kind)[0] == 0
        assert "één kat 😀" in (tmp_path / kind).read_text(encoding="utf-8")


@pytest.mark.slow
def test_sidecars_same_names_in_two_folders_and_a_sheet(capsys, model, tmp_path):
    for folder, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / "in" / folder).mkdir(parents=True)
        Image.new("RGB", (30, 20), colour).save(tmp_path / "in" / folder / "x.png")
    options = ("--model", model, "--max-new-tokens", 4, "--format", "sidecar", "--num-captions", 2)
    out, sheet = tmp_path / "text", tmp_path / "sheets" / "sheet.png"
    both = (tmp_path / "in" / "a", tmp_path / "in" / "b")
    assert run(capsys, "caption", *both, *options, "--out", out, "--sheet", sheet)[0] == 0
    assert all(len((out / f / "x.txt").read_text().splitlines()) == 2 for f in "ab")
    with Image.open(sheet) as picture:
        assert picture.width > 2 * 192 and picture.getpixel((100, 100)) == (255, 0, 0)
    (out / "a" / "x.txt").write_text("mine\n")
    code, _, err = run(capsys, "caption", *both, *options, "--out", out)
    assert code == 0 and "2 of 2" in err and (out / "a" / "x.txt").read_text() == "mine\n"
    assert run(capsys, "caption", tmp_path / "in", *options)[0] == 0
    assert (tmp_path / "in" / "a" / "x.txt").exists()
    Image.new("RGB", (30, 20)).save(tmp_path / "in" / "a" / "x.jpg")
    code, _, err = run(capsys, "caption", tmp_path / "in", *options)
    assert code == 2 and "x.jpg" in err and "rename" in err


def test_captions_in_8_bits(capsys, photos, model):
    code, out, _ = run(capsys, "caption", photos, "--model", model, "--max-new-tokens", 4, "--int8")
    assert code == 0 and len(out.splitlines()) == 12


def test_paths_that_no_file_can_have_are_skipped_as_unreadable_ones_are(capsys, photos, model):
    for format in ("text", "json"):
        arguments = ("--model", model, "--max-new-tokens", 3, "--format", format)
        bad = ("n" * 300 + ".jpg", "a\0b.jpg", f"{photos}/00.jpg/below.jpg", "d/" * 3000 + "x.jpg")
        code, out, err = run(capsys, "caption", *bad, photos / "00.jpg", *arguments)
        assert code == 0 and out.count("00.jpg") == 1 and "skipped 4 of 5 images" in err
    code, _, err = run(capsys, "caption", "n" * 300 + ".jpg", *arguments[:4], "--format", "sidecar")
    assert code == 2 and "skipped 1 of 1" in err


@pytest.mark.skipif(sys.platform != "linux", reason="not every name is allowed elsewhere")
def test_names_and_captions_cannot_write_to_the_terminal(capsys, photos, model, monkeypatch, tmp_path):
    from clipcap.captioner import Captioner

    monkeypatch.setattr(Captioner, "text", lambda self, caption: "a\x1b[31m cat\n")
    name = "x\x1b]0;owned\x07\n\u202egnp.jpg"
    (photos / "00.jpg").rename(photos / name)
    (photos / f"bad-{name}").write_text("no image")
    arguments = ("caption", photos / name, photos / f"bad-{name}", "--model", model, "--max-new-tokens", 2)
    code, out, err = run(capsys, *arguments)
    assert code == 0 and out.count("\n") == 1 and not any(char in out + err for char in "\x1b\x07\u202e")
    assert r"x\x1b]0;owned\x07\n\u202egnp.jpg" in out and r"\x1b[31m cat\n" in out and "bad-x" in err
    code, _, err = run(capsys, "caption", photos / f"bad-{name}", "--model", model)
    assert code == 2 and "\x1b" not in err
    assert run(capsys, *arguments, "--out", tmp_path / "real.json")[0] == 0
    (row,) = json.loads((tmp_path / "real.json").read_text())
    assert row["image"] == str(photos / name) and row["captions"] == ["a\x1b[31m cat\n"]


@pytest.mark.slow
def test_csv_for_a_spreadsheet_has_no_formula(capsys, photos, model, monkeypatch, tmp_path):
    from clipcap.captioner import Captioner

    monkeypatch.chdir(photos)
    (photos / "00.jpg").rename(photos / "=1+1.jpg")
    texts = ("=cmd()", "+1", "-1", "@x", "\tx", "\rx", "a = b", "")
    for text in texts:
        monkeypatch.setattr(Captioner, "text", lambda self, caption, text=text: text)
        rows = []
        for more in ((), ("--spreadsheet",)):
            out = tmp_path / "table.csv"
            arguments = ("=1+1.jpg", "--model", model, "--max-new-tokens", 2, "--out", out, *more)
            assert run(capsys, "caption", *arguments)[0] == 0
            with open(out, newline="") as file:
                rows.append(next(csv.DictReader(file)))
        exact, safe = rows
        assert exact["image"] == "=1+1.jpg" and exact["caption"] == text and safe["image"] == "'=1+1.jpg"
        assert safe["caption"] == (text if text in texts[-2:] else f"'{text}") and safe["score"] == exact["score"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", [b"5", b"[]", b"{}", b'["k", null]', b'["k", {"image": "x", "captions": []}]', b"[" * 99999]
)
def test_a_line_that_no_run_has_written_is_done_again(capsys, photos, model, tmp_path, monkeypatch, line):
    out, options = tmp_path / "c.jsonl", ("--model", model, "--max-new-tokens", 4, "--batch-size", 2)
    from clipcap.captioner import Captioner

    embed = Captioner.features
    stop_at_the_fourth_batch(monkeypatch)
    assert run(capsys, "caption", photos, *options, "--out", out)[0] == 130
    monkeypatch.setattr(Captioner, "features", embed)
    with open(tmp_path / "c.jsonl.partial", "ab") as file:
        file.write(line + b"\n")
    code, _, err = run(capsys, "caption", photos, *options, "--out", out)
    assert code == 0 and "6 of 12" in err and len(out.read_text().splitlines()) == 12


def test_a_sidecar_that_is_not_utf8_is_shown_on_the_sheet_all_the_same(capsys, photos, model, tmp_path):
    (photos / "00.txt").write_bytes(b"caf\xe9")
    arguments = ("--model", model, "--format", "sidecar", "--sheet", tmp_path / "sheet.png")
    assert run(capsys, "caption", photos / "00.jpg", *arguments)[0] == 0
    assert (photos / "00.txt").read_bytes() == b"caf\xe9" and (tmp_path / "sheet.png").is_file()


def test_domains_and_reasons_are_shown_as_they_are(capsys):
    """Rich would take [/x] for a tag that is closed and was never opened."""
    from clipcap.evaluation.page import print_scores
    from clipcap.evaluation.scores import Evaluation

    part = {"images": 1, "scores": {"CIDEr": 1.0}, "intervals": {}}
    print_scores(
        Evaluation({"a": "x"}, {"CIDEr": 1.0}, {}, {"[/x]\x1b[2J": part}, {}, {"SPICE": "[/y]"}, "words", {}, {})
    )
    shown = capsys.readouterr().out
    assert "[/x]" in shown and "[/y]" in shown and "\x1b[2J" not in shown
