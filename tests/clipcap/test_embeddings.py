"""The embedding store: right rows, resume, mismatch, damage, killed workers, a full disk."""

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from clipcap.cli import main
from clipcap.data import embeddings
from clipcap.data import store as store_module
from clipcap.data.dataset import CaptionDataset, read_dataset
from clipcap.data.embeddings import build_store, clip_fingerprint, encode
from clipcap.data.images import read_image
from clipcap.data.store import EmbeddingStore, StoreWriter
from common.checks import UserError
from common.clip import load_clip
from common.gpt2 import load_gpt2


@pytest.mark.parametrize(("inputs", "workers"), [("embedding", 0), ("embedding", 2), ("patches", 0)])
def test_every_row_is_its_images_embedding(items, clip, tmp_path, inputs, workers):
    store = build_store(
        items, clip, tmp_path / "store", inputs=inputs, batch_size=5, dtype="float32", workers=workers, rows_per_shard=4
    )
    assert len(store) == 12 and store.skipped == {} and store.ids == [item.image_id for item in items]
    assert len(list((tmp_path / "store").glob("shard-*.bin"))) == 3
    for item in items:
        alone = encode(clip, clip.preprocess([read_image(item.path)]), inputs)[0]
        assert torch.allclose(store[store.row(item.image_id)], alone, atol=1e-5)
    assert "gone.jpg" not in store
    with pytest.raises(KeyError):
        store.row("gone.jpg")
    copy = pickle.loads(pickle.dumps(store))  # as for a DataLoader's spawned worker
    assert torch.equal(copy[3], store[3]) and len(pickle.dumps(store)) < 1000


def test_an_interrupted_store_goes_on_and_equals_the_whole(items, clip, tmp_path):
    whole = build_store(items, clip, tmp_path / "whole", batch_size=4, rows_per_shard=5)

    def interrupt(done):
        if done == 8:
            raise KeyboardInterrupt

    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        build_store(items, clip, part, batch_size=4, progress=interrupt, rows_per_shard=5)
    with pytest.raises(UserError, match=r"no manifest\.json"):
        EmbeddingStore(part)
    for name in ("shard-00001.bin", "names.bin", "rows.bin"):  # killed while it wrote
        with open(part / name, "ab") as file:
            file.write(b"half of a row")
    seen = []
    store = build_store(items, clip, part, batch_size=4, progress=seen.append)
    assert seen == [12]
    assert np.array_equal(list(store.array), list(whole.array)) and store.ids == whole.ids
    for name in ("shard-00000.bin", "shard-00001.bin", "shard-00002.bin", "names.bin", "rows.bin"):
        assert (part / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_new_images_are_added_and_the_old_are_not_encoded_again(items, clip, tmp_path):
    def encoded(part):
        calls = []
        store = build_store(part, clip, tmp_path / "store", progress=calls.append, batch_size=4)
        return calls, store

    assert encoded(items[:6])[0] == [4, 6]
    assert encoded(items[:6])[0] == [6]  # nothing was encoded
    calls, store = encoded([*items, *items])  # each image once, however often it is named
    assert len(store) == 12 and calls[-1] == 24
    calls, store = encoded(items[3:5])  # a part of what exists
    assert calls == [2] and len(store) == 12
    shutil.copytree(items[0].path.parent, tmp_path / "copy")
    moved = [replace(item, path=tmp_path / "copy" / item.path.name) for item in items]
    for item in moved:
        os.utime(item.path, (1, 1))
    assert encoded(moved)[0] == [12]
    assert EmbeddingStore(tmp_path / "store").records["mtime"].tolist() == [1_000_000_000] * 12


def test_images_that_cannot_be_read_are_left_out_named_and_tried_again(items, clip, tmp_path):
    good = items[3].path.read_bytes()
    items[3].path.write_bytes(b"not an image")
    items[7].path.write_bytes(items[0].path.read_bytes()[:200])
    store = build_store(items, clip, tmp_path / "store", batch_size=4)
    assert set(store.skipped) == {items[3].image_id, items[7].image_id}
    assert items[3].image_id not in store and len(store) == 10
    alone = clip.encode_images(clip.preprocess([read_image(items[8].path)]))[0]
    assert torch.allclose(store[store.row(items[8].image_id)], alone, atol=2e-3)
    items[3].path.write_bytes(good)
    store = build_store(items, clip, tmp_path / "store", batch_size=4)
    assert set(store.skipped) == {items[7].image_id} and items[3].image_id in store


def test_a_mismatch_is_an_error_and_never_a_silent_one(items, clip, clip_directory, tmp_path, monkeypatch):
    store = tmp_path / "store"
    build_store(items, clip, store)
    shutil.copytree(clip_directory, tmp_path / "elsewhere")
    assert clip_fingerprint(load_clip(tmp_path / "elsewhere", device="cpu")) == clip_fingerprint(clip)
    build_store(items, load_clip(tmp_path / "elsewhere", device="cpu"), store)  # the same weights in another place
    with pytest.raises(UserError, match=r"other weights.*'tiny'"):
        build_store(items, load_clip("tiny", device="cpu"), store)
    with pytest.raises(UserError, match=r"other inputs \(\"embedding\" instead of \"patches\""):
        build_store(items, clip, store, inputs="patches")
    with pytest.raises(UserError, match="is float16, not float32"):
        build_store(items, clip, store, dtype="float32")
    monkeypatch.setattr(clip, "preprocess", replace(clip.preprocess, interpolation="bilinear"))
    with pytest.raises(
        UserError,
        match=r"other preprocessing \(\{\"interpolation\": \"bicubic\"\} instead of \{\"interpolation\": \"bilinear\"\}",
    ):
        build_store(items, clip, store)
    monkeypatch.undo()
    items[0].path.write_bytes(items[6].path.read_bytes())
    with pytest.raises(UserError, match=r"1 images have changed.*00\.jpg"):
        build_store(items, clip, store)


def test_rows_of_two_precisions_never_mix(items, clip, tmp_path):
    plain = build_store(items, clip, tmp_path / "plain", dtype="float32")
    build_store(items[:6], clip, tmp_path / "exact", dtype="float32")
    store = build_store(items, clip, tmp_path / "exact", precision="bf16")  # begun in fp32, so the rest is too
    assert torch.allclose(torch.tensor(store.array[11]), torch.tensor(plain.array[11]), atol=1e-6)
    assert store.manifest["precision"] == "fp32"
    fast = build_store(items[:6], clip, tmp_path / "fast", dtype="float32", precision="bf16")
    assert fast.manifest["precision"] == "bf16" and not np.array_equal(fast.array[0], plain.array[0])
    with pytest.raises(UserError, match=r"was computed in bf16, not fp32: .* --precision bf16"):
        build_store(items, clip, tmp_path / "fast")
    assert len(build_store(items, clip, tmp_path / "fast", precision="bf16")) == 12
    assert len(build_store(items, clip, tmp_path / "fast")) == 12  # nothing is missing
    manifest = json.loads((tmp_path / "plain" / "manifest.json").read_text())
    del manifest["precision"]  # as of stores made before it was kept
    (tmp_path / "plain" / "manifest.json").write_text(json.dumps(manifest))
    for precision in ("fp32", "bf16"):
        assert len(build_store(items, clip, tmp_path / "plain", precision=precision)) == 12


def test_the_precision_of_an_interrupted_store_is_kept(items, clip, tmp_path):
    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_store(items, clip, tmp_path, batch_size=4, precision="bf16", progress=interrupt)
    with pytest.raises(UserError, match="was computed in bf16, not fp32"):
        build_store(items, clip, tmp_path)


def test_no_worker_is_started_for_nothing(items, clip, tmp_path, monkeypatch):
    build_store(items, clip, tmp_path)
    monkeypatch.setattr(multiprocessing.Process, "start", lambda self: pytest.fail("a process is started"))
    assert len(build_store(items, clip, tmp_path, workers=2)) == 12


def test_files_that_are_cut_short_are_named(items, clip, tmp_path):
    store = tmp_path / "store"
    build_store(items, clip, store, rows_per_shard=5)
    for name in ("shard-00001.bin", "rows.bin"):
        whole = (store / name).read_bytes()
        (store / name).write_bytes(whole[:-7])
        for use in (EmbeddingStore, lambda directory: build_store(items, clip, directory)):
            with pytest.raises(UserError, match=rf"{name}.*is cut short \({len(whole) - 7} bytes instead of"):
                use(store)
        (store / name).write_bytes(whole)
    assert len(EmbeddingStore(store)) == 12
    (store / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        EmbeddingStore(store)
    (store / "manifest.json").write_text('{"key": {"format": 1}}')
    with pytest.raises(UserError, match="format 1 instead of 2"):
        EmbeddingStore(store)


def test_no_readable_image_is_an_error(items, photos, clip, tmp_path):
    broken = [replace(item, path=photos / "dataset.json") for item in items]
    with pytest.raises(UserError, match="none of the 12 images can be read"):
        build_store(broken, clip, tmp_path / "store")


def test_a_killed_worker_is_one_line_and_nothing_is_lost(items, clip, tmp_path, monkeypatch):
    def read_or_die(path, **options):
        if path == items[9].path and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_image(path, **options)

    monkeypatch.setattr(embeddings, "read_image", read_or_die)
    assert multiprocessing.get_start_method() == "fork"  # or the workers would not have the patch
    with pytest.raises(UserError, match=r"worker was killed after \d+ of 12") as caught:
        build_store(items, clip, tmp_path / "store", batch_size=2, workers=1)
    assert "\n" not in str(caught.value)
    kept = (tmp_path / "store" / "rows.bin").stat().st_size // store_module.RECORD.itemsize
    assert kept >= 2
    os.kill(os.getpid(), signal.SIGCHLD)  # some other child ends: it is not taken for the worker's death again
    seen = []
    build_store(items, clip, tmp_path / "store", batch_size=2, progress=seen.append)
    assert len(seen) == (12 - kept) // 2 and seen[-1] == 12


def test_a_full_disk_is_one_line_and_nothing_is_lost(items, clip, tmp_path):
    (tmp_path / "store").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as if the disk ended after 7 rows of 4 x 16 halves
    try:
        with pytest.raises(UserError, match=r"no room for embedding store .* after 6 of 12 images"):
            build_store(items, clip, tmp_path / "store", batch_size=2, inputs="patches")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    store = build_store(items, clip, tmp_path / "store", batch_size=2, inputs="patches")
    whole = build_store(items, clip, tmp_path / "whole", batch_size=2, inputs="patches")
    assert np.array_equal(list(store.array), list(whole.array))


def test_a_full_disk_at_the_end_loses_nothing(items, clip, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_module.StoreWriter, "finish", full)
        with pytest.raises(UserError, match=r"no room for embedding store .* after 12 of 12 images"):
            build_store(items, clip, tmp_path / "store")
    seen = []
    build_store(items, clip, tmp_path / "store", progress=seen.append)
    assert seen == [12]  # none is encoded again


SILLY = [
    {"row_shape": [2**40, 2**40]}, {"row_shape": [1]}, {"row_shape": [3, 4]}, {"row_shape": [12.0]}, {"row_shape": [True]},
    {"row_shape": [-12]}, {"row_shape": []}, {"row_shape": None}, {"row_shape": [24]}, {"rows": 2**60}, {"rows": 13},
    {"rows": 0}, {"rows": True}, {"rows": "12"}, {"rows_per_shard": 1}, {"rows_per_shard": 0}, {"rows_per_shard": 4.0},
    {"dtype": ["float16"]}, {"dtype": "object"}, {"dtype": "float32"}, {"precision": ["fp32"]}, {"skipped": {"a": 1}},
    {"key": {}}, {"key": {"inputs": ["embedding"]}}, {"key": {"inputs": "patches"}}, {"clip": None}, {"format": [2]},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("change", SILLY, ids=str)
def test_a_manifest_that_does_not_fit_its_files_is_refused(items, clip, tmp_path, change):
    build_store(items, clip, tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    manifest = json.loads(path.read_text())
    before = {file.name: file.read_bytes() for file in path.parent.glob("*.bin")}
    path.write_text(json.dumps(manifest | change))
    with pytest.raises(UserError) as caught:
        EmbeddingStore(path.parent)
    assert len(str(caught.value).splitlines()) == 1
    with contextlib.suppress(UserError):  # nor does a writer spoil what exists
        store_module.StoreWriter(path.parent, manifest["key"], "clip").close()
    assert {file.name: file.read_bytes() for file in path.parent.glob("*.bin")} == before


def test_names_that_do_not_fit_their_rows_are_refused(items, clip, tmp_path):
    build_store(items, clip, tmp_path / "store")
    names = tmp_path / "store" / "names.bin"
    good = names.read_bytes()
    names.write_bytes(good[:-1])
    with pytest.raises(UserError, match="does not fit names.bin"):
        EmbeddingStore(names.parent)
    names.write_bytes(b"\xff" * len(good))
    with pytest.raises(UserError, match="names.bin of .* is damaged"):
        EmbeddingStore(names.parent).ids  # noqa: B018


def test_a_store_that_is_added_to_can_be_read_meanwhile(items, clip, tmp_path):
    build_store(items, clip, tmp_path / "store", dtype="float32")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    writer = store_module.StoreWriter(tmp_path / "store", manifest["key"], "clip")
    writer.append(["new"], np.ones((1, 12), np.float32), [store_module.Source(1, 2, 3)])
    assert len(EmbeddingStore(tmp_path / "store")) == 12
    writer.close()
    writer.finish()
    assert len(EmbeddingStore(tmp_path / "store")) == 13


def test_numbers_beyond_half_precision_are_an_error(tmp_path):
    tmp_path.joinpath("store").mkdir()
    writer = StoreWriter(tmp_path / "store", {}, "clip")
    with pytest.raises(UserError, match="use dtype float32"):
        writer.append(["a"], np.full((1, 4), 1e6, np.float32), [store_module.Source(1, 2, 3)])


def test_the_originals_pickle_needs_no_images(clip, gpt2_directory, tmp_path):
    vectors = torch.randn(4, 12)
    captions = [("7", "the cat"), ("7", "the hat"), ("9", "the bat"), ("11", "the mat")]
    rows = [
        {"image_id": image_id, "caption": caption, "id": n, "clip_embedding": n}
        for n, (image_id, caption) in enumerate(captions)
    ]
    path = tmp_path / "oscar_split_train.pkl"
    path.write_bytes(pickle.dumps({"clip_embedding": vectors, "captions": rows}))
    items = read_dataset(path)
    store = build_store(items, clip, tmp_path / "store", dtype="float32")
    assert [torch.equal(store[store.row(i)], vectors[n]) for i, n in (("7", 0), ("9", 2), ("11", 3))] == [True] * 3
    assert build_store(items, clip, tmp_path / "store", progress=[].append).ids == ["7", "9", "11"]
    assert build_store(items, clip, tmp_path / "bf16", precision="bf16").manifest["precision"] == "fp32"
    data = CaptionDataset(items, store, load_gpt2(gpt2_directory)[1], max_tokens=9)
    assert len(data) == 4 and torch.equal(data[1]["embedding"], vectors[0])
    with pytest.raises(UserError, match="no patches"):
        build_store(items, clip, tmp_path / "other", inputs="patches")
    with pytest.raises(UserError, match="width 12, 'tiny' gives"):
        build_store(items, load_clip("tiny", device="cpu"), tmp_path / "other")


def test_the_command_embeds_once_and_training_takes_the_store(capsys, photos, clip_directory, tmp_path):
    (photos / "03.png").write_bytes(b"no image")
    arguments = ["embed", photos / "dataset.json", "--out", tmp_path / "store", "--clip", clip_directory]
    arguments = [str(a) for a in (*arguments, "--dtype", "float32", "--workers", 1, "--device", "cpu")]
    assert main(arguments) == 0
    streams = capsys.readouterr()
    assert "11 images, 12 float32 each" in streams.out and "skipped 1" in streams.err and "03.png" in streams.err
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["rows"] == 11 and manifest["key"]["normalization"] == "none" and manifest["versions"]["torch"]
    before = (tmp_path / "store" / "shard-00000.bin").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (tmp_path / "store" / "shard-00000.bin").stat().st_mtime_ns == before
    assert main([*arguments, "--inputs", "patches"]) == 2
    assert "other inputs" in capsys.readouterr().err
