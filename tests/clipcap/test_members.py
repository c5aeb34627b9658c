"""Images inside tars, read where they lie: embedded, captioned and trained on without being unpacked."""

import gzip
import io
import tarfile
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clipcap.data.embeddings import build_store, build_store_part
from clipcap.data.images import ImageError, read_image
from clipcap.data.members import exists, is_member, open_file, status_of
from clipcap.data.readers import read_dataset
from clipcap.evaluation.caption_files import _index
from clipcap.training.module import CaptionTraining
from clipcap.training.train import train
from common.checks import UserError
from common.clip import load_clip
from common.parts import Part
from tests.clipcap.layouts import tar

SHARDS = 2_000


def jpeg(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256 * 30, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


def files_below(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_path_into_a_tar(tmp_path):
    path = tar(
        tmp_path / "s.tar", [("x.tar/a.jpg", jpeg(3)), ("x.tar/a.txt", b"one"), ("b.jpg", b"no"), ("b.txt", b"2")]
    )
    good, bad = (item.path for item in read_dataset(path))
    assert good.name.startswith("a.jpg#") and good.stem == "a" and is_member(good) and exists(good)
    assert _index(read_dataset(path))["a.jpg"] == "s/x.tar/a"  # in a file of captions
    assert open_file(good).read() == jpeg(3) and status_of(good) == (len(jpeg(3)), path.stat().st_mtime_ns)
    assert list(read_image(good).getdata()) == list(read_image(Image.open(io.BytesIO(jpeg(3)))).getdata())
    with pytest.raises(ImageError, match=r"s\.tar/b\.jpg#\d+\+2' is not an image"):
        read_image(bad)
    path.unlink()
    assert not exists(good) and not is_member(good)
    with pytest.raises(ImageError, match="does not exist"):
        read_image(good)
    plain = tmp_path / "photo.jpg#1+2"  # a name that only looks like one
    plain.write_bytes(jpeg(5))
    assert exists(plain) and not is_member(plain) and read_image(plain).size == (8, 8)


def test_a_compressed_tar_is_unpacked(tmp_path):
    path = tar(tmp_path / "s.tar", [("a.jpg", jpeg(1)), ("a.txt", b"one")])
    path.write_bytes(gzip.compress(path.read_bytes()))
    [item] = read_dataset(path)
    assert item.path == tmp_path / "s.images" / "a.jpg" and item.path.read_bytes() == jpeg(1)


def test_the_store_of_unpacked_images_fits_the_tar_and_a_change_is_noticed(tmp_path, clip_directory):
    clip = load_clip(clip_directory, device="cpu")
    shards, out = tmp_path / "shards", tmp_path / "out"
    shards.mkdir()
    out.mkdir()
    members = [(f"{n}.{end}", data) for n in range(5) for end, data in (("jpg", jpeg(n)), ("txt", b"one"))]
    path = tar(shards / "s.tar", members)
    build_store(read_dataset(shards, images=out), clip, tmp_path / "store")
    seen = []
    build_store(read_dataset(shards), clip, tmp_path / "store", progress=seen.append)
    assert seen == [5]  # nothing was encoded again
    tar(path, [("3.jpg", jpeg(4)) if name == "3.jpg" else (name, data) for name, data in members])
    with pytest.raises(UserError, match=r"1 images have changed .* the first '.*/s\.tar/3\.jpg#"):
        build_store(read_dataset(shards), clip, tmp_path / "store")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """2,000 tars with a captioned image each."""
    folder = tmp_path_factory.mktemp("wide") / "shards"
    folder.mkdir()
    for number in range(SHARDS):
        image, caption = jpeg(number), f"the cat sat on mat {number}".encode()
        with tarfile.open(folder / f"{number:05}.tar", "w") as file:
            for name, data in (("0.jpg", image), ("0.txt", caption)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return folder


@pytest.mark.slow
def test_two_thousand_shards(shards, clip_directory, tiny_run, tmp_path, monkeypatch):
    items, clip = read_dataset(shards), load_clip(clip_directory, device="cpu")
    assert [item.image_id for item in items] == [f"{number:05}/0" for number in range(SHARDS)]
    one = build_store(items, clip, tmp_path / "one", batch_size=200)
    assert len(one) == SHARDS and not one.skipped
    stop = iter([KeyboardInterrupt])

    def interrupt(done):
        if done == 400:
            raise next(stop, None) or AssertionError

    with pytest.raises(KeyboardInterrupt):
        build_store_part(items, clip, tmp_path / "two", Part(1, 2), batch_size=200, progress=interrupt)
    for rank in range(2):
        two = build_store_part(items, clip, tmp_path / "two", Part(rank, 2), batch_size=200)
    assert (tmp_path / "two" / "rows.bin").read_bytes() == (tmp_path / "one" / "rows.bin").read_bytes()
    assert two.ids == one.ids

    config = replace(
        tiny_run, data=shards, out=tmp_path / "whole", embeddings=tmp_path / "one", steps=6, batch_size=8, val_every=3
    )
    whole = load_file(train(config) / "model.safetensors")
    step = CaptionTraining.training_step

    def die(self, batch, batch_idx):
        if self.global_step == 4:
            raise KeyError("killed")
        return step(self, batch, batch_idx)

    part = replace(config, out=tmp_path / "part")
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(CaptionTraining, "training_step", die)
        train(part)
    resumed = load_file(train(part) / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert files_below(shards) == [f"{number:05}.tar" for number in range(SHARDS)]  # nothing was unpacked
