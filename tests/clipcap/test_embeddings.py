"""The embedding store: right rows, resume, mismatch, damage."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from clipcap.data import read_dataset
from clipcap.embeddings import EmbeddingStore, build_store, encode
from clipcap.images import read_image
from common.checks import UserError
from common.clip import load_clip


@pytest.fixture
def clip(clip_directory):
    return load_clip(clip_directory, device="cpu")


@pytest.mark.parametrize("inputs", ["embedding", "patches"])
def test_every_row_is_its_images_embedding(photos, clip, tmp_path, inputs):
    items = read_dataset(photos / "dataset.json")
    store = build_store(items, clip, tmp_path / "store", inputs=inputs, batch_size=5, dtype="float32")
    assert len(store) == 12 and store.skipped == {}
    for item in items:
        alone = encode(clip, clip.preprocess([read_image(item.path)]), inputs)[0]
        assert torch.allclose(store[store.row(item.image_id)], alone, atol=1e-5)


def test_an_interrupted_store_goes_on_and_equals_the_whole(photos, clip, tmp_path):
    items = read_dataset(photos / "dataset.json")
    whole = build_store(items, clip, tmp_path / "whole", batch_size=4)

    def interrupt(done):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_store(items, clip, tmp_path / "part", batch_size=4, progress=interrupt)
    with pytest.raises(UserError, match=r"no manifest\.json"):
        EmbeddingStore(tmp_path / "part")
    seen = []
    part = build_store(items, clip, tmp_path / "part", batch_size=4, progress=seen.append)
    assert seen == [12]
    assert np.array_equal(part.array, whole.array)


def test_images_that_cannot_be_read_are_left_out_and_named(photos, clip, tmp_path):
    items = read_dataset(photos / "dataset.json")
    items[3].path.write_bytes(b"not an image")
    items[7].path.write_bytes(items[0].path.read_bytes()[:200])
    store = build_store(items, clip, tmp_path / "store", batch_size=4)
    assert set(store.skipped) == {items[3].image_id, items[7].image_id}
    assert items[3].image_id not in store and len(store) == 10
    alone = clip.encode_images(clip.preprocess([read_image(items[8].path)]))[0]
    assert torch.allclose(store[store.row(items[8].image_id)], alone, atol=2e-3)


def test_a_store_is_used_again_only_for_the_same_images_and_backbone(photos, clip, tmp_path):
    items = read_dataset(photos / "dataset.json")

    def encoded(**changes):
        calls = []
        build_store(
            changes.pop("items", items), clip, tmp_path / "store", progress=calls.append, batch_size=6, **changes
        )
        return calls

    assert encoded() == [6, 12]
    assert encoded() == [12]  # nothing was encoded
    assert encoded(inputs="patches") == [6, 12]
    assert encoded(items=items[:6]) == [6]
    items[0].path.write_bytes(items[6].path.read_bytes())
    assert encoded(items=items[:6]) == [6] and encoded(items=items[:6]) == [6]


def test_a_store_that_is_cut_short_is_an_error(photos, clip, tmp_path):
    items = read_dataset(photos / "dataset.json")
    build_store(items, clip, tmp_path / "store")
    path = tmp_path / "store" / "embeddings.bin"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="bytes instead of"):
        EmbeddingStore(tmp_path / "store")


def test_no_readable_image_is_an_error(photos, clip, tmp_path):
    items = [replace(item, path=photos / "dataset.json") for item in read_dataset(photos / "dataset.json")]
    with pytest.raises(UserError, match="can be read"):
        build_store(items, clip, tmp_path / "store")
