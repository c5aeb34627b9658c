"""Published tables: what is missing is said at once, estimates count what is there, dry runs at full size, small runs."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from clipcap.data.journal import place_of, url_key
from common.checks import UserError
from common.pretrained import ASSETS
from common.runtime import RuntimeConfig
from experiments.captions.nocaps import scenes_by_domain
from experiments.captions.tables import SCENES
from experiments.reproduce import costs, fields, languages, needs
from experiments.reproduce.config import BLENDER, CLIP, GPT2, MEDIUM, Config
from experiments.reproduce.fields import ENCODERS, field_table
from experiments.reproduce.tables import TABLES, main
from tests.dietnerf.ball import write_scene

CPU = RuntimeConfig(device="cpu")
WHICH = shutil.which


def needs_nerfstudio(name):
    mark = pytest.mark.skipif(importlib.util.find_spec("nerfstudio") is None, reason="nerfstudio is not installed")
    return pytest.param(name, marks=mark) if name.startswith("dietnerf") else name


NAMES = [needs_nerfstudio(name) for name in TABLES if name not in ("clipcap-conceptual", "clipcap-nocaps")]


@pytest.mark.parametrize("name", TABLES)
def test_everything_that_is_missing_is_named_at_once(name, tmp_path, capsys):
    config = Config(name, data=tmp_path / "d", weights=tmp_path / "w", matrix_rate=100, runtime=CPU)
    needs = [need for need in TABLES[name].needs(config) if not need.optional]
    with pytest.raises(UserError, match=f"^{len(needs) + len(TABLES[name].weights)} of what {name} needs is missing"):
        main(config)
    said = capsys.readouterr().out
    assert all(f"  {need.path}\n" in said and need.what in said for need in needs)
    assert "in all" in said and "GFLOP/s (as given)" in said
    assert said.index("missing:") < said.index("optional, without it") < said.index("estimate at")
    first = needs[0].path  # then one thing less
    if name.startswith("dietnerf"):
        write_scene(first.parent, splits={"train": 2})
    elif first.suffix:
        first.parent.mkdir(parents=True)
        row = {"filename": "a.jpg", "filepath": "train2014", "sentences": [{"raw": "a cat"}]}
        first.write_text(json.dumps({"images": [row]}))
    else:
        first.mkdir(parents=True)
        (first / "text.txt").write_text("de kat")
    with pytest.raises(UserError, match=f"^{len(needs) + len(TABLES[name].weights) - 1} of"):
        main(config)


def wrongs(name, config):
    """What is wrong with each thing that exists, by its path below the data."""
    needs = TABLES[name].needs(config)
    return {str(need.path.relative_to(config.data)): need.wrong for need in needs if need.wrong and not need.met}


def test_weights_without_a_file_are_missing(tmp_path):
    place = tmp_path / "gpt2"
    shutil.copytree(ASSETS / "gpt2-tiny", place)
    assert needs.find_weights(tmp_path, GPT2) == str(place)
    for file in ("model.safetensors", "tokenizer.json"):
        (place / file).unlink()
        assert needs.find_weights(tmp_path, GPT2) is None
    assert needs.missing_weights(tmp_path, GPT2).lines == [
        f"  {place}",
        f"      hf download gpt2 --local-dir {place}",
        "      it is there, but without model.safetensors, tokenizer.json",
    ]
    (place / "merges.txt").touch()
    (place / "pytorch_model.bin.index.json").touch()
    assert needs.find_weights(tmp_path, GPT2) == str(place)


def test_images_that_are_named_have_to_be_there(tmp_path):
    config = Config("clipcap-nocaps", data=tmp_path, out=tmp_path / "out" / "clipcap-nocaps")
    for folder, files in {"coco/train2014": "ab", "coco/val2014": "c", "nocaps/images": "x"}.items():
        (tmp_path / folder).mkdir(parents=True)
        for name in files:
            (tmp_path / folder / f"{name}.jpg").touch()
    places = {"a": "train2014", "b": "train2014", "c": "val2014"}
    rows = [{"filename": f"{k}.jpg", "filepath": v, "sentences": [{"raw": "a cat"}]} for k, v in places.items()]
    (tmp_path / "coco" / "dataset_coco.json").write_text(json.dumps({"images": rows}))
    images = [{"id": 0, "file_name": "x.jpg", "domain": "in-domain"}]
    notes = [{"id": 0, "image_id": 0, "caption": "a cat"}]
    nocaps = tmp_path / "nocaps" / "nocaps_val_4500_captions.json"
    nocaps.write_text(json.dumps({"images": images, "annotations": notes}))
    assert wrongs("clipcap-coco", config) == wrongs("clipcap-nocaps", config) == {}
    (tmp_path / "coco" / "train2014" / "b.jpg").unlink()
    (tmp_path / "nocaps" / "images" / "x.jpg").rename(tmp_path / "nocaps" / "images" / "y.jpg")
    assert wrongs("clipcap-nocaps", config) == {
        "coco/train2014": "1 of 2 images are missing, such as b.jpg",
        "nocaps/images": "1 of 1 images are missing, such as x.jpg",
    }
    nocaps.write_text("{}")
    assert "has none of the JSON layouts" in wrongs("clipcap-nocaps", config)[f"nocaps/{nocaps.name}"]
    for name in ("transformer-frozen", "mlp-tuned"):  # then nothing is trained
        model = tmp_path / "out" / "clipcap-coco" / name / "model"
        model.mkdir(parents=True)
        (model / "config.json").touch()
        assert "coco/train2014" in wrongs("clipcap-nocaps", config)
        (model / "model.safetensors").touch()
    assert set(wrongs("clipcap-nocaps", config)) == {f"nocaps/{nocaps.name}"}
    phases = [cost.phase for cost in TABLES["clipcap-nocaps"].costs(config)]
    assert phases[0] == "embedding the images" and len(phases) == 3 and not any("training" in p for p in phases)


def test_scenes_have_to_have_their_images(tmp_path):
    config = Config("dietnerf-synthetic", data=tmp_path, scenes=("lego",))
    scene = write_scene(tmp_path / "nerf_synthetic" / "lego", splits={"train": 2, "test": 3})
    assert wrongs("dietnerf-synthetic", config) == {}
    (scene / "test" / "r_1.png").unlink()
    (scene / "transforms_train.json").write_text("{}")
    assert wrongs("dietnerf-synthetic", config) == {
        "nerf_synthetic/lego/transforms_train.json": "it names no images",
        "nerf_synthetic/lego/transforms_test.json": "1 of 3 images are missing, such as r_1",
    }


def image_of(number):
    """Where `clipcap download` puts the image of this number's URL."""
    return place_of(url_key(f"http://x.org/{number}"), ".png")


def write_conceptual(data, count=12):
    """Captions and what `clipcap download` makes of them, of the packaged scenes."""
    rows = [row for row in json.loads(SCENES.read_text())["images"] if row["split"] == "train"][:count]
    place = data / "conceptual"
    for split, file in (("train", "Train_GCC-training.tsv"), ("validation", "Validation_GCC-1.1.0-Validation.tsv")):
        journal = []
        (place / split / "images").mkdir(parents=True)
        for number, row in enumerate(rows):
            name = image_of(number)
            (place / split / name).parent.mkdir(exist_ok=True)
            shutil.copy(SCENES.parent / row["filename"], place / split / name)
            journal.append(json.dumps({"key": url_key(f"http://x.org/{number}"), "file": name}))
        (place / split / "journal.jsonl").write_text("\n".join(journal))
        lines = [f"{row['sentences'][0]['raw']}\thttp://x.org/{number}" for number, row in enumerate(rows)]
        (place / file).write_text("\n".join(lines))
    return place


def test_few_images_of_urls_are_an_error_and_some_are_said(tmp_path):
    place, config = write_conceptual(tmp_path, 4), Config("clipcap-conceptual", data=tmp_path)

    def journal():
        return next(n for n in TABLES[config.name].needs(config) if n.path == place / "train" / "journal.jsonl")

    assert journal().met
    (place / "train" / image_of(0)).unlink()
    assert not journal().met and journal().lines[0].startswith("optional, URLs die")
    assert journal().wrong == "3 of the 4 lines have their image"
    for number in (1, 2):
        (place / "train" / image_of(number)).unlink()
    assert not journal().met and not journal().optional and journal().wrong.startswith("1 of the 4 lines")


def test_what_goes_without_optional_things_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)

    def said(name):
        return [
            need.lines[0] for need in TABLES[name].needs(Config(name, data=tmp_path)) if need.optional and not need.met
        ]

    for name in ("clipcap-coco", "clipcap-conceptual", "clipcap-nocaps"):
        assert said(name)[0] == "optional, without it METEOR and SPICE are not measured: java"
    lpips, distances = said("dietnerf-synthetic")
    assert "LPIPS" in lpips and lpips.endswith("hub/checkpoints/vgg16-397923af.pth") and "FID and KID" in distances
    assert len(said("recycle-dutch")) == 3 and all("'released, " in line for line in said("recycle-dutch"))


def test_published_means_are_beside_ours_of_all_scenes():
    scores = {"psnr": 20.0, "ssim": 0.5, "lpips": 0.25}
    absent = dict.fromkeys(("fid", "kid"), "the weights are not in torch's cache: give --inception")
    runs = [
        {"scene": scene, "arm": "nerf", "views": views, "scores": scores, "not_measured": absent}
        for scene in BLENDER
        for views in (8, 100)
    ]
    published = {"lego": fields.DIETNERF_LEGO, "mean": fields.DIETNERF_MEAN}
    lines = field_table(runs, published)
    ours = "20.00 | {} | 0.500 | {} | 0.250 | {} | not measured | {} | not measured | {} |"
    assert f"| mean of 8 | nerf | {ours.format('14.934', '0.687', '0.318', '228.1', '0.076')}" in lines
    assert f"| mean of 8 | nerf, 100 views | {ours.format('31.153', '0.954', '0.046', '50.5', '0.001')}" in lines
    assert f"| lego | nerf | {ours.format('9.7', *'––––')}" in lines and len(lines[0].split("|")) == 14
    assert "FID of 16 of 16 runs is not measured: the weights are not in torch's cache." in lines
    del runs[-1]["scores"]["lpips"]  # the dictionary is that of all
    runs[-1]["scores"] = scores | {"lpips": 0.75}
    del runs[0]
    lines = field_table(runs, published)
    assert f"| mean of 7 | nerf | {ours.format(*'–––––').replace('0.250', 'not measured')}" in lines
    assert "| ship | nerf, 100 views | 20.00 | – | 0.500 | – | 0.750 |" in "\n".join(lines)
    assert not any("228.1" in line for line in lines) and any("50.5" in line for line in lines)
    lines = field_table([run for run in runs if run["scene"] == "lego"], published)
    assert f"not here are {', '.join(scene for scene in BLENDER if scene != 'lego')}." in "\n".join(lines)


def test_estimates_count_the_weights_that_there_are():
    from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel

    def matrices(module):
        return sum(p.numel() for p in module.parameters() if p.ndim >= 2)

    with torch.device("meta"):
        small = GPT2LMHeadModel(GPT2Config())
        medium = GPT2LMHeadModel(GPT2Config(n_layer=24, n_embd=1024, n_head=16))
        vision = CLIPVisionModel(CLIPVisionConfig())
    assert costs.SMALL == matrices(small.transformer.h) and costs.HEAD == small.lm_head.weight.numel()
    assert costs.blocks(24, 1024) == matrices(medium.transformer.h)
    positions = 50 * 768  # a table, which multiplies nothing
    assert costs.VIT == 50 * (matrices(vision) - positions)
    assert costs.duration(30) == "30.0 s" and costs.duration(7200) == "2.0 hours"
    assert costs.matrix_rate(torch.device("cpu"), torch.float32) > 1e8
    # memory of AdamW: weight, gradient, two moments and a temporary in 4 bytes each, beside the program
    assert costs.training_memory(10, 4, states=2, kept=5) == 4 * (10 + 4 * 4) + 5 + 2**30


def test_estimates_count_the_field():
    pytest.importorskip("nerfstudio")
    from dietnerf.mlp import PublishedField

    assert costs.FIELD == sum(p.numel() for p in PublishedField().parameters() if p.ndim == 2)


PHASES = {
    "clipcap": ["embedding: CLIP ViT-B/32", "training transformer-frozen", "captioning by transformer-frozen",
                "training mlp-tuned", "captioning by mlp-tuned"],
    "dietnerf-synthetic": ["nerf:", "simplified:", "dietnerf:", "dietnerf-tuned:"],
    "dietnerf-encoders": ["CLIP ViT-B/32:", "ImageNet ViT-B/32:", "ImageNet ResNet-50:"],
    "recycle": ["relearning small", "fine-tuning small", "scoring", "alignment", "relearning medium"],
}  # fmt: skip
SIZES = {
    "clipcap": ["155,908,608 parameters, 155,908,608 trained"],
    "recycle-dutch": ["116,562,432 parameters, 30,720,000 trained", "116,562,432 parameters, 116,562,432 trained",
                      "344,320,000 parameters, 40,960,000 trained"],
    "recycle-italian": ["108,882,432 parameters, 23,040,000 trained"],
}  # fmt: skip


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Where all dry runs write, so that the random CLIP is made once."""
    return tmp_path_factory.mktemp("dry")


@pytest.mark.parametrize("name", ["clipcap-conceptual", "clipcap-nocaps"])
def test_dry_run_is_that_of_coco(name):
    """The same models in the same phases, so the test below is theirs too."""
    assert TABLES[name].rehearse is TABLES["clipcap-coco"].rehearse and TABLES[name].weights == (CLIP, GPT2)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_dry_run_at_full_size_within_memory(forks, name, dry):
    """In a process of its own, as the peak is a process's."""
    code = "import runpy\nrunpy.run_module('experiments.reproduce', run_name='__main__')"
    done = forks.run(code, name, "--dry-run", "--out", dry, "--device", "cpu", "--matrix-rate", 100)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert said.index("estimate at 100 GFLOP/s") < said.index("dry run: ") and "missing" not in said
    runs = re.findall(r"^dry run: (.*); peak ([\d.]+) GiB$", said, flags=re.MULTILINE)
    expected = next(phases for start, phases in PHASES.items() if name.startswith(start))
    assert [line for line, _ in runs if not any(line.startswith(phase) for phase in expected)] == []
    assert len(runs) == len(expected) and "every phase ran." in said
    assert max(float(peak) for _, peak in runs) < 8
    for start, sizes in SIZES.items():
        if name.startswith(start):
            assert all(any(size in line for line, _ in runs) for size in sizes), said


@pytest.fixture
def weights(tmp_path):
    """The packaged weights under the names of the real ones."""
    place = tmp_path / "weights"
    place.mkdir()
    for name, packaged in ((CLIP, "clip-tiny"), (GPT2, "gpt2-tiny"), (MEDIUM, "gpt2-tiny-medium")):
        (place / name.rpartition("/")[2]).symlink_to(ASSETS / packaged)
    return place


@pytest.mark.slow
def test_captioning_tables_run_and_nocaps_takes_the_captioners(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "java" else WHICH(name))
    coco = tmp_path / "data" / "coco"
    for folder in ("train2014", "val2014"):
        (coco / folder).mkdir(parents=True)
    rows = json.loads(SCENES.read_text())["images"]
    kept = [row for row in rows if row["split"] == "train"][:6] + [row for row in rows if row["split"] == "val"][:2]
    kept += [row for row in rows if row["split"] == "test" and not row["unseen"]][:2]
    kept += [row for row in rows if row["unseen"]][:2]
    for row in kept:
        shutil.copy(SCENES.parent / row["filename"], coco / "train2014")
        row["filepath"] = "train2014"
    shutil.copy(SCENES.parent / kept[0]["filename"], coco / "val2014")
    (coco / "dataset_coco.json").write_text(json.dumps({"images": kept}))
    options = dict(data=tmp_path / "data", weights=weights, steps=2, matrix_rate=100, runtime=CPU)
    main(Config("clipcap-coco", out=tmp_path / "clipcap-coco", **options))
    said = capsys.readouterr().out
    assert "transformer-frozen, published" in said and "113.08" in said and "| mlp-tuned |" in said
    assert "SPICE is not measured: Java is not installed" in said and "optional, without it METEOR and SPICE" in said
    model = tmp_path / "clipcap-coco" / "mlp-tuned" / "model" / "model.safetensors"
    made = model.stat().st_mtime_ns

    domains, images = scenes_by_domain(coco / "dataset_coco.json", tmp_path / "domains.json")
    place = tmp_path / "data" / "nocaps"
    place.mkdir()
    shutil.copy(domains, place / "nocaps_val_4500_captions.json")
    shutil.copytree(images, place / "images")
    shutil.rmtree(coco)
    main(Config("clipcap-nocaps", out=tmp_path / "clipcap-nocaps", **options))
    said = capsys.readouterr().out
    assert "CIDEr overall" in said and "65.83" in said and "SPICE is not measured: Java is not installed" in said
    table = next((tmp_path / "clipcap-nocaps").glob("*.md")).read_text()
    assert "| transformer-frozen, published | 84.85 | 66.82 | 49.14 | 65.83 | 12.14 | 10.92 | 9.57 | 10.9 |" in table
    assert "| mlp-tuned, published | 79.73 | 67.69 | 49.35 | 65.7 | 12.2 | 11.26 | 9.7 | 11.1 |" in table
    assert model.stat().st_mtime_ns == made and not (tmp_path / "clipcap-nocaps" / "mlp-tuned" / "model").exists()


@pytest.mark.slow
def test_conceptual_runs(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "java" else WHICH(name))
    write_conceptual(tmp_path / "data")
    (tmp_path / "data" / "conceptual" / "train" / image_of(3)).unlink()
    options = dict(data=tmp_path / "data", weights=weights, steps=2, matrix_rate=100, runtime=CPU)
    main(Config("clipcap-conceptual", out=tmp_path / "out", **options))
    said = capsys.readouterr().out
    assert "nothing is missing." in said and "11 of the 12 lines have their image" in said
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert [row["captioner"] for row in rows] == [
        "transformer-frozen", "transformer-frozen, published", "mlp-tuned", "mlp-tuned, published",
    ]  # fmt: skip
    assert rows[1] | {"ROUGE-L": "25.12", "CIDEr": "71.82", "SPICE": "16.07"} == rows[1]
    assert rows[3] | {"ROUGE-L": "26.71", "CIDEr": "87.26", "SPICE": "18.5"} == rows[3]
    found = json.loads((tmp_path / "out" / "mlp-tuned" / "evaluation-all" / "results.json").read_text())
    assert found["images"] == 12 and rows[2]["ROUGE-L"].startswith(f"{100 * found['scores']['ROUGE-L']:.2f} (")
    assert json.loads((tmp_path / "out" / "mlp-tuned" / "training.json").read_text())["steps"] == 2
    assert "SPICE is not measured: Java is not installed" in said and rows[2]["SPICE"] == "–"


@pytest.fixture
def small_fields(tmp_path, monkeypatch):
    """A scene of 100 views of 12 pixels, few rays, small fields, and no weights of metrics."""
    pytest.importorskip("nerfstudio")
    from dietnerf.methods import method_config

    def small_method(method):
        config = method_config(method)
        model = config.pipeline.model
        if hasattr(model, "num_importance_samples"):  # the grid has none
            model.layer_width, model.num_coarse_samples = 16, 8
            model.num_importance_samples = min(8, model.num_importance_samples)
        return config

    monkeypatch.setattr("dietnerf.settings.method_config", small_method)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    options, small = fields.published_options, {"sizes": (12,), "rays": 4, "resolution": 8}
    monkeypatch.setattr(
        fields, "published_options", lambda config, out, **changes: options(config, out, **small | changes)
    )
    scene = write_scene(tmp_path / "data" / "nerf_synthetic" / "lego", splits={"train": 100, "test": 2}, size=12)
    for name in set(BLENDER) - {"lego"}:
        scene.with_name(name).symlink_to(scene)
    return dict(data=tmp_path / "data", scenes=("lego",), steps=2, matrix_rate=100, runtime=CPU)


@pytest.mark.slow
def test_fields_run_and_runs_of_several_machines_make_one_table(small_fields, weights, tmp_path, monkeypatch, capsys):
    from experiments.fields import synthetic as dietnerf_synthetic

    one = Config("dietnerf-synthetic", out=tmp_path / "one", weights=weights, **small_fields)
    main(one)
    assert "FID and KID are not measured: " in capsys.readouterr().out
    table = (tmp_path / "one" / "table.md").read_text()
    runs = {
        path.stem: json.loads(path.read_text()) for path in (tmp_path / "one" / "runs" / "lego" / "12").glob("*.json")
    }
    assert {name: run["steps"] for name, run in runs.items()} == {
        "nerf_v8_s0": 2, "simplified_v8_s0": 2, "dietnerf_v8_s0": 2, "dietnerf-tuned_v8_s0": 2, "nerf_v100_s0": 2,
    }  # fmt: skip
    assert len(runs["nerf_v8_s0"]["training_views"]) == 8 and len(runs["nerf_v100_s0"]["training_views"]) == 100
    for name, arm, figure in (("dietnerf_v8_s0", "dietnerf", 23.9), ("nerf_v100_s0", "nerf, 100 views", 31.6)):
        scores = runs[name]["scores"]
        assert f"| lego | {arm} | {scores['psnr']:.2f} | {figure} | {scores['ssim']:.3f} | – | not measured |" in table
        assert f"| mean of 1 | {arm} | {scores['psnr']:.2f} | – |" in table
    assert "LPIPS of 5 of 5 runs is not measured: vgg16-397923af.pth is not in torch's cache." in table

    for scene in BLENDER:  # as seven other machines would have left them
        place = tmp_path / "all" / "runs" / scene
        shutil.copytree(tmp_path / "one" / "runs" / "lego", place)
        for path in (place / "12").glob("*.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"scene": scene}))
    monkeypatch.setattr(dietnerf_synthetic, "train", lambda settings: pytest.fail("was run again"))
    main(replace(one, out=tmp_path / "all", scenes=BLENDER))
    table = (tmp_path / "all" / "table.md").read_text()
    assert f"| mean of 8 | nerf | {runs['nerf_v8_s0']['scores']['psnr']:.2f} | 14.934 |" in table
    assert table.count("| ship | ") == 5 and table.count("| mean of 8 | ") == 5 and "not here" not in table


@pytest.mark.slow
def test_encoders_run(small_fields, tmp_path):
    config = Config("dietnerf-encoders", out=tmp_path / "out", **small_fields)
    fields.run_encoders(config, dict.fromkeys(ENCODERS.values(), "tiny"))
    table = (tmp_path / "out" / "table.md").read_text()
    for name in ENCODERS:
        place = tmp_path / "out" / name.replace("/", "").replace(" ", "-") / "runs" / "lego" / "12"
        run = json.loads((place / "dietnerf_v8_s0.json").read_text())
        figure = "23.9" if name.startswith("CLIP") else "–"
        assert f"| lego | {name} | {run['scores']['psnr']:.2f} | {figure} |" in table and run["steps"] == 2
    assert table.count("| mean of 1 | ") == 3 and "The paper's figures of the other encoders" in table


@pytest.mark.slow
def test_recycling_runs_and_goes_on(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(languages.LANGUAGES["nld"], "vocab_size", 600)
    text = tmp_path / "data" / "text" / "nld"
    text.mkdir(parents=True)
    shutil.copy(ASSETS / "samples" / "dutch" / "train.txt.xz", text)  # enough that some documents are held out
    config = Config("recycle-dutch", data=tmp_path / "data", weights=weights, out=tmp_path / "out", steps=1,
                    matrix_rate=100, runtime=CPU)  # fmt: skip
    main(config)
    table = (tmp_path / "out" / "table.md").read_text()
    said = capsys.readouterr().out
    assert table in said and "optional, without it 'released, small relearned' is not measured" in said
    for name in ("small relearned", "small fine-tuned", "medium relearned"):
        bits = float(re.search(rf"\| {name} \| ([\d.]+) \|", table)[1])
        assert 1 < bits < 8, table
    assert table.count("not measured") == 3  # the released models are on no disk here
    model = tmp_path / "out" / "small-fine-tuned" / "model" / "model.safetensors"
    made = model.stat().st_mtime_ns
    main(config)
    assert model.stat().st_mtime_ns == made and (tmp_path / "out" / "table.md").read_text() == table
