"""Images embedded and captioned in parts: the bytes of one process, parts continued alone, faults named."""

import pickle
import shutil
from dataclasses import replace

import pytest

from clipcap.captioning import CaptionConfig
from clipcap.captioning import caption as caption_images
from clipcap.cli import main
from clipcap.data.embeddings import EmbedConfig, build_store, build_store_part
from clipcap.data.embeddings import run as embed
from clipcap.data.store import EmbeddingStore, StoreWriter
from common.checks import UserError
from common.parts import Part, ProcessesConfig

LAUNCHED = "from clipcap.cli import main\nraise SystemExit(main())"
FORKING = f"""
import multiprocessing
get = multiprocessing.get_context
multiprocessing.get_context = lambda method=None: get("fork")
{LAUNCHED}
"""
"""The processes that it starts need not import torch again."""
PRELOAD = ("clipcap.data.embeddings", "common.encoders.hugging_face", "transformers.models.clip.modeling_clip")


def contents(directory):
    """Every file below a directory with its bytes, but locks."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def embed_in_parts(items, clip, directory, world, order=None, **options):
    """What each process returns, one after the other."""
    order = range(world) if order is None else order
    return [build_store_part(items, clip, directory, Part(rank, world), **options) for rank in order]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 9])
def test_parts_join_to_the_bytes_of_one_process(items, clip, tmp_path, world):
    items[3].path.write_bytes(b"not an image")
    options = {"batch_size": 3, "rows_per_shard": 4}
    build_store(items, clip, tmp_path / "one", **options)
    *before, last = embed_in_parts(items, clip, tmp_path / "many", world, reversed(range(world)), **options)
    assert before == [None] * (world - 1) and len(last) == 11 and list(last.skipped) == [items[3].image_id]
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    again = embed_in_parts(items, clip, tmp_path / "many", world, **options)  # nothing is left to do
    assert [len(store) for store in again] == [11] * world and not (tmp_path / "many" / "parts").exists()


def test_new_images_are_joined_to_a_store(items, clip, tmp_path):
    for name in ("one", "many"):
        build_store(items[:5], clip, tmp_path / name, batch_size=2, dtype="float32", rows_per_shard=4)
    build_store(items, clip, tmp_path / "one", batch_size=2)
    first, second = embed_in_parts(items, clip, tmp_path / "many", 2, batch_size=2)
    assert first is None and len(second) == 12 and contents(tmp_path / "many") == contents(tmp_path / "one")


def test_an_interrupted_part_is_continued_alone(items, clip, tmp_path, capsys):
    build_store(items, clip, tmp_path / "one", batch_size=2, rows_per_shard=4)

    def interrupt(done):
        if done == 4:
            raise KeyboardInterrupt

    def part(rank, **more):
        return build_store_part(items, clip, tmp_path / "many", Part(rank, 2), batch_size=2, rows_per_shard=4, **more)

    assert part(0) is None
    with pytest.raises(KeyboardInterrupt):
        part(1, progress=interrupt)
    kept = contents(tmp_path / "many" / "parts" / "00001")
    capsys.readouterr()
    assert part(0) is None and contents(tmp_path / "many" / "parts" / "00001") == kept  # nothing is done again
    assert "part 1 of 2 is done; whoever finishes last joins all. Not done yet: 2" in capsys.readouterr().err
    seen = []
    assert len(part(1, progress=seen.append)) == 12 and seen == [6]
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_a_join_that_was_killed_is_begun_again(items, clip, tmp_path, monkeypatch):
    options = {"batch_size": 2, "rows_per_shard": 4}
    for name in ("one", "many"):
        build_store(items[:3], clip, tmp_path / name, **options)
    build_store(items, clip, tmp_path / "one", **options)
    extend, calls = StoreWriter.extend, []

    def killed(writer, store):
        extend(writer, store)
        calls.append(len(store))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "extend", killed)
        with pytest.raises(KeyboardInterrupt):
            embed_in_parts(items, clip, tmp_path / "many", 3, **options)
    assert len(EmbeddingStore(tmp_path / "many")) == 3  # what was there can be read meanwhile
    assert len(embed_in_parts(items, clip, tmp_path / "many", 3, [1], **options)[0]) == 12
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_a_part_without_a_readable_image(items, clip, tmp_path):
    for item in items[:6]:
        item.path.write_bytes(b"not an image")
    build_store(items, clip, tmp_path / "one", batch_size=3)
    first, second = embed_in_parts(items, clip, tmp_path / "many", 2, batch_size=3)
    assert first is None and len(second) == 6 and contents(tmp_path / "many") == contents(tmp_path / "one")
    for item in items[6:]:
        item.path.write_bytes(b"not an image")
    with pytest.raises(UserError, match="none of the 12 images can be read"):
        embed_in_parts(items, clip, tmp_path / "none", 2, batch_size=3)


def test_what_does_not_fit_the_parts_is_refused(items, clip, tmp_path):
    store = tmp_path / "store"
    embed_in_parts(items, clip, store, 2, [0], batch_size=2)
    for match, call in {
        "begun with processes 2, now it is 3": lambda: embed_in_parts(items, clip, store, 3, [1], batch_size=2),
        "begun with batch_size 2, now it is 4": lambda: embed_in_parts(items, clip, store, 2, [1], batch_size=4),
        "begun with dtype 'float16', now it is 'float32'": lambda: embed_in_parts(
            items, clip, store, 2, [1], batch_size=2, dtype="float32"
        ),
        "begun with precision 'fp32', now it is 'bf16'": lambda: embed_in_parts(
            items, clip, store, 2, [1], batch_size=2, precision="bf16"
        ),
        "begun with images": lambda: embed_in_parts(items[1:], clip, store, 2, [1], batch_size=2),
        "holds parts of several processes: run as many again": lambda: build_store(items, clip, store),
    }.items():
        with pytest.raises(UserError, match=match):
            call()
    held = store / "parts" / "00001"
    shutil.copytree(held / "store", tmp_path / "copy")
    build_store([replace(items[0], image_id="another")], clip, held / "store")
    with pytest.raises(UserError, match="holds 7 rows instead of 6: delete it and .*00001.json', and run it again"):
        embed_in_parts(items, clip, store, 2, [1], batch_size=2)
    shutil.rmtree(held)
    with pytest.raises(UserError, match="has no manifest.json"):
        embed_in_parts(items, clip, store, 2, [1], batch_size=2)
    (store / "parts" / "00001.json").unlink()
    assert len(embed_in_parts(items, clip, store, 2, [0], batch_size=2)[0]) == 12
    embed_in_parts(items, clip, tmp_path / "damaged", 2, [0], batch_size=2)
    for name, content in (("00001.json", "[]"), ("plan.json", "{"), ("plan.json", "{}")):
        (tmp_path / "damaged" / "parts" / name).write_text(content)
        with pytest.raises(UserError, match=f"{name}' is damaged: delete"):
            embed_in_parts(items, clip, tmp_path / "damaged", 2, [1], batch_size=2)


def environment(rank, world):
    """What torchrun tells a process."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}


@pytest.fixture
def caption(capsys, monkeypatch, photos, model):
    """Runs `clipcap caption` as one process of several; gives its exit code and what it says on standard error."""

    def run(rank, world, *more):
        with monkeypatch.context() as patch:
            for name, value in environment(rank, world).items():
                patch.setenv(name, value)
            options = (
                "--model",
                model,
                "--max-new-tokens",
                4,
                "--num-captions",
                2,
                "--batch-size",
                2,
                "--devices",
                world,
            )
            code = main([str(one) for one in ("caption", photos, *options, *more)])
        return code, capsys.readouterr().err

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv", "captions.txt"])
def test_captions_in_parts_are_the_bytes_of_one_process(caption, photos, tmp_path, name):
    (photos / "05.jpg").write_bytes(b"not an image")
    assert caption(0, 1, "--out", tmp_path / "one" / name)[0] == 0
    out = tmp_path / "many" / name
    for rank in (2, 0):
        code, err = caption(rank, 3, "--out", out)
        assert code == 0 and f"part {rank + 1} of 3 is done" in err and "skipped" not in err and not out.exists()
    sheet = tmp_path / "sheet.jpg"
    code, err = caption(1, 3, "--out", out, "--sheet", sheet)
    assert code == 0 and "05.jpg" in err and sheet.exists()
    assert contents(tmp_path / "many") == contents(tmp_path / "one") and [*out.parent.iterdir()] == [out]


@pytest.mark.slow
def test_a_part_of_captions_is_continued_alone(caption, tmp_path, monkeypatch):
    from clipcap.captioner import Captioner

    stream = Captioner.stream

    def interrupted(self, images, **options):
        for number, found in enumerate(stream(self, images, **options)):
            if number == 4:
                raise KeyboardInterrupt
            yield found

    one, out = tmp_path / "one.jsonl", tmp_path / "captions.jsonl"
    assert caption(0, 1, "--out", one)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Captioner, "stream", interrupted)
        assert caption(0, 2, "--out", out)[0] == 130
    assert caption(1, 2, "--out", out)[0] == 0
    for match, (rank, world, *more) in {
        "holds parts of several processes": (0, 1),
        "begun with processes 2, now it is 3": (0, 3),
        "begun with num_captions 2, now it is 1": (0, 2, "--num-captions", 1),
    }.items():
        code, err = caption(rank, world, "--out", out, *more)
        assert code == 2 and match in err
    code, err = caption(0, 2, "--out", out)
    assert code == 0 and "going on after 4 of 6 images done before" in err
    assert out.read_bytes() == one.read_bytes() and not out.with_name("captions.jsonl.parts").exists()


def test_captions_that_cannot_be_joined_are_refused(caption, photos, tmp_path):
    assert "2 processes write at once: give --out" in caption(0, 2)[1]
    assert "leave out --sheet" in caption(0, 2, "--format", "sidecar", "--sheet", tmp_path / "sheet.jpg")[1]
    (tmp_path / "captions.csv.partial").touch()
    assert "is what one process has begun" in caption(0, 2, "--out", tmp_path / "captions.csv")[1]


@pytest.mark.slow
def test_sidecars_in_parts(caption, tmp_path):
    assert caption(0, 1, "--format", "sidecar", "--out", tmp_path / "one")[0] == 0
    for rank in range(2):
        assert caption(rank, 2, "--format", "sidecar", "--out", tmp_path / "many")[0] == 0
        assert len(contents(tmp_path / "many")) == 6 * (rank + 1)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.slow
def test_embed_by_torchrun_and_by_itself(forks, photos, clip_directory, tmp_path):
    def arguments(name, *more):
        given = ["embed", photos / "dataset.json", "--out", tmp_path / name, "--clip", clip_directory, *more]
        return [str(one) for one in (*given, "--batch-size", 2, "--workers", 0, "--device", "cpu")]

    assert main(arguments("one")) == 0
    running = [
        forks.start(LAUNCHED, *arguments("three", "--devices", 3), env=environment(rank, 3), preload=PRELOAD)
        for rank in range(3)
    ]
    done = [process.wait() for process in running]
    assert [process.returncode for process in done] == [0, 0, 0], done
    assert sum("12 images, 12 float16 each" in process.stdout for process in done) >= 1
    itself = forks.run(FORKING, *arguments("two", "--devices", 2), preload=PRELOAD)
    assert itself.returncode == 0 and "12 images, 12 float16 each" in itself.stdout, itself.stderr
    for name in ("two", "three"):
        assert contents(tmp_path / name) == contents(tmp_path / "one")


def test_commands_reach_the_processes_that_they_start(tmp_path):
    for work in (
        (embed, EmbedConfig(tmp_path, tmp_path, processes=ProcessesConfig(devices=2))),
        (caption_images, CaptionConfig((str(tmp_path),), processes=ProcessesConfig(devices=2))),
    ):
        assert pickle.loads(pickle.dumps(work)) == work
