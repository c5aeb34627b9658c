"""Text-only training: the noise, the store of captions' embeddings, and a run without any image."""

import json
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clipcap import Captioner
from clipcap.data.readers.captioned import CaptionedImage
from clipcap.training.capdec import NOWHERE, build_text_store, inject_noise, one_item_a_caption, read_captions
from clipcap.training.material import encode_items, read_items
from clipcap.training.module import CaptionTraining
from clipcap.training.settings import TrainConfig
from clipcap.training.train import train
from common.checks import UserError
from common.clip import load_clip


def test_noise():
    torch.manual_seed(0)
    embeddings = 7 * torch.randn(400, 64)
    unit = F.normalize(embeddings, dim=-1)
    assert torch.allclose(inject_noise(embeddings, 0.0), unit, atol=1e-6)
    noisy = inject_noise(embeddings, 0.016)
    assert torch.allclose(noisy.norm(dim=-1), torch.ones(400), atol=1e-5)
    # cos(u, (u + n) / |u + n|) with |n|² = 64 · 0.016
    assert (noisy * unit).sum(-1).mean().item() == pytest.approx((1 + 64 * 0.016) ** -0.5, abs=0.01)


def test_captions_of_a_text_file(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("a cat\n\n  a dog \n" + "".join(f"number {n}\n" for n in range(200)) + "a cat\n")
    items = read_captions(path)
    assert [item.captions[0] for item in items[:2]] == ["a cat", "a dog"] and len(items) == 202
    assert 5 < sum(item.split == "val" for item in items) < 40
    path.write_bytes(b"fine\nbad \xff\n")
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        read_captions(path)
    path.write_text("\n \n")
    with pytest.raises(UserError, match="holds no caption"):
        read_captions(path)


def test_store_goes_on_where_it_stopped(tmp_path, clip_directory):
    clip = load_clip(str(clip_directory))
    image = CaptionedImage("1.jpg", tmp_path, tuple(f"a cube next to {n}" for n in range(7)), "train")
    items = one_item_a_caption([image])
    assert [item.captions for item in items] == [(text,) for text in image.captions]
    calls = []

    class Killed(Exception):
        pass

    def stop(done):
        calls.append(done)
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        build_text_store(items, clip, tmp_path / "store", batch_size=2, progress=stop)
    store = build_text_store(items, clip, tmp_path / "store", batch_size=2, progress=calls.append)
    assert calls == [0, 2, 4, 4, 6, 7]
    expected = F.normalize(clip.encode_texts(list(image.captions)), dim=-1).numpy()
    assert np.allclose(store.array, expected, atol=2e-3)
    assert torch.equal(store[store.row("1.jpg#3")], torch.from_numpy(store.array[3].astype(np.float32)))
    other = build_text_store(items[:3], clip, tmp_path / "store")
    assert len(other) == 3 and other.array.shape == (3, 12)


def caption_items(*texts):
    return [CaptionedImage(text, Path(), (text,), "train") for text in texts]


def test_store_is_never_of_rows_that_were_not_encoded(tmp_path, clip_directory):
    clip, items = load_clip(str(clip_directory), device="cpu"), caption_items("a cube", "a ball", "a red cube")

    def stop(done):
        raise KeyboardInterrupt

    expected = build_text_store(items, clip, tmp_path).array.copy()
    with pytest.raises(KeyboardInterrupt):  # other captions, in the place of these
        build_text_store(caption_items("one", "two", "three"), clip, tmp_path, progress=stop)
    assert np.array_equal(build_text_store(items, clip, tmp_path).array, expected)
    for content in (np.zeros((3, 7), np.float16), np.zeros((3, 12), np.float32)):
        np.save(tmp_path / "text.npy", content)
        assert np.array_equal(build_text_store(items, clip, tmp_path).array, expected)
    (tmp_path / "text.npy").write_bytes((tmp_path / "text.npy").read_bytes()[:-30])
    assert np.array_equal(build_text_store(items, clip, tmp_path).array, expected)


def test_store_is_of_the_weights_not_of_their_name(tmp_path, clip_directory):
    items = caption_items("a cube", "a ball")
    before = build_text_store(items, load_clip(str(clip_directory), device="cpu"), tmp_path).array.copy()
    clip = load_clip(str(clip_directory), device="cpu")
    for parameter in clip.backbone.parameters():
        parameter.data.mul_(-1.5)
    after = build_text_store(items, clip, tmp_path).array
    expected = F.normalize(clip.encode_texts([item.captions[0] for item in items]), dim=-1).numpy()
    assert np.allclose(after, expected, atol=2e-3) and not np.allclose(after, before, atol=0.1)


def test_store_takes_no_nan(tmp_path, clip_directory, monkeypatch):
    clip = load_clip(str(clip_directory), device="cpu")
    monkeypatch.setattr(clip, "encode_texts", lambda texts: torch.full((len(texts), 12), torch.nan))
    with pytest.raises(UserError, match="gives NaN or infinity for captions like 'a cube'"):
        build_text_store(caption_items("a cube"), clip, tmp_path)


def test_processes_that_build_one_store_encode_once(tmp_path, clip_directory, monkeypatch, capfd):
    clip, items = load_clip(str(clip_directory), device="cpu"), caption_items(*(f"a cube {n}" for n in range(6)))
    encode, encoded = clip.encode_texts, []

    def slowly(texts):
        encoded.extend(texts)
        time.sleep(0.1)
        return encode(texts)

    monkeypatch.setattr(clip, "encode_texts", slowly)
    with ThreadPoolExecutor(3) as executor:
        stores = list(executor.map(lambda _: build_text_store(items, clip, tmp_path, batch_size=2), range(3)))
    assert sorted(encoded) == sorted(item.captions[0] for item in items)
    assert all(np.array_equal(store.array, stores[0].array) and store.array.any(1).all() for store in stores)
    assert "waiting for another process" in capfd.readouterr().err


@pytest.mark.parametrize("layout", ["karpathy", "flickr8k"])
def test_captions_of_a_layout_need_no_images(tmp_path, photos, clip_directory, layout):
    data = photos / "dataset.json"
    for image in [*photos.glob("*.jpg"), *photos.glob("*.png")]:
        image.unlink()
    if layout == "flickr8k":
        data = photos / "Flickr8k.token.txt"
        data.write_text("".join(f"{n}.jpg#0\ta cat on mat {n}\n" for n in range(30)))
    config = TrainConfig(data=data, out=tmp_path / "run", text_only=True, clip=str(clip_directory))
    material = encode_items(config, read_items(config), load_clip(str(clip_directory), device="cpu"))
    texts = [item.captions[0] for item in material.items["train"]]
    assert texts[0] == ("the cat and the hat" if layout == "karpathy" else "a cat on mat 0")
    assert len(texts) == 16 if layout == "karpathy" else 20 < len(texts) < 30
    assert material.width == 12 and len(material.stores["train"]) >= len(texts)
    with pytest.raises(UserError, match="missing images"):
        read_items(replace(config, text_only=False))


@pytest.mark.slow
@pytest.mark.parametrize("with_images", [False, True])
def test_trains_without_training_images(tmp_path, photos, tiny_run, with_images, monkeypatch):
    captions = tmp_path / "captions.txt"
    captions.write_text("".join(f"the cat sat on mat {n}\n" for n in range(60)))
    seen, original = [], CaptionTraining._loss

    def spy(self, batch):
        if self.trainer.training:
            seen.append(batch["clip_embeddings"].norm(dim=-1))
        return original(self, batch)

    monkeypatch.setattr(CaptionTraining, "_loss", spy)
    data = photos / "dataset.json" if with_images else captions
    config = replace(tiny_run, data=data, text_only=True, val_captions=5)
    directory = train(config)
    lengths = torch.cat(seen)
    assert len(lengths) > 20 and torch.allclose(lengths, torch.ones(len(lengths)), atol=1e-5)
    record = json.loads((config.out / "training.json").read_text())
    assert record["images"] == ({"train": 16, "val": 2} if with_images else {"train": 48, "val": 12})
    assert "data:image" in (config.out / "samples.html").read_text() or not with_images
    captioner = Captioner.from_pretrained(directory, device="cpu")
    assert captioner.model.config.normalize_embeddings  # images are read as the captions were
    assert isinstance(captioner.caption(photos / "00.jpg", max_new_tokens=5), str)


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"done": 2}', '{"key": KEY, "done": "x"}', '{"key": KEY, "done": -1}',
                                   '{"key": KEY, "done": 1000}', '{"key": KEY, "done": true}', "[" * 50_000])  # fmt: skip
def test_a_damaged_text_store_is_made_again(state, clip_directory, tmp_path):
    items = [CaptionedImage(f"{n}", NOWHERE, (f"the cat {n}",), "train") for n in range(3)]
    clip = load_clip(clip_directory, device="cpu")
    good = build_text_store(items, clip, tmp_path / "store").array[:].copy()
    path = tmp_path / "store" / "text.json"
    path.write_text(state.replace("KEY", json.dumps(json.loads(path.read_text())["key"])))
    assert (build_text_store(items, clip, tmp_path / "store").array == good).all()


def test_a_disk_without_room_for_all_rows_is_one_line(clip_directory, tmp_path):
    """A memory map that finds no room while it is written would end the process."""
    items = [CaptionedImage(f"{n}", NOWHERE, ("the cat",), "train") for n in range(3000)]
    clip = load_clip(clip_directory, device="cpu")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(UserError, match="store of captions' embeddings .* cannot be written"):
            build_text_store(items, clip, tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
