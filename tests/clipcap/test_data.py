"""Readers of captioned images and the (embedding, caption) data set."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from clipcap.data import BucketedOrder, CaptionDataset, collate, read_dataset
from common.checks import UserError
from common.gpt2 import load_gpt2
from common.language import IGNORE


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.png", "c.jpg"):
        Image.new("RGB", (20, 16), "red").save(tmp_path / name)
    return tmp_path


def karpathy(folder, rows):
    path = folder / "dataset.json"
    path.write_text(json.dumps({"images": rows}))
    return path


def row(name, split="train", captions=("a red square",)):
    return {"filename": name, "split": split, "sentences": [{"raw": text} for text in captions]}


def test_karpathy_splits_and_restval(folder):
    path = karpathy(folder, [row("a.jpg", "restval"), row("b.png", "val"), row("c.jpg", "test", ("one", "two "))])
    items = read_dataset(path)
    assert [item.split for item in items] == ["train", "val", "test"]
    assert items[2].captions == ("one", "two") and items[2].path == folder / "c.jpg"


def test_coco_filepath_is_joined(folder):
    (folder / "val2014").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "val2014" / "x.jpg")
    [item] = read_dataset(karpathy(folder, [row("x.jpg") | {"filepath": "val2014"}]), images=folder)
    assert item.path == folder / "val2014" / "x.jpg"


def test_folder_with_csv(folder):
    (folder / "captions.csv").write_text("file_name,caption,split\na.jpg,one,train\na.jpg,two,train\nb.png,three,val\n")
    items = read_dataset(folder)
    assert [(i.image_id, i.captions, i.split) for i in items] == [
        ("a.jpg", ("one", "two"), "train"),
        ("b.png", ("three",), "val"),
    ]


def test_folder_with_jsonl_and_lists(folder):
    (folder / "captions.jsonl").write_text(
        '{"image": "a.jpg", "captions": ["one", "two"]}\n\n{"image":"b.png","text":"x"}\n'
    )
    assert [item.captions for item in read_dataset(folder)] == [("one", "two"), ("x",)]


def test_folder_with_sidecars(folder):
    (folder / "a.txt").write_text("one\n\ntwo\n")
    (folder / "b.txt").write_text("three")
    assert [item.captions for item in read_dataset(folder)] == [("one", "two"), ("three",)]


def test_validation_split_is_a_function_of_the_id(folder):
    (folder / "captions.csv").write_text(
        "file_name,caption\n" + "".join(f"{i}.jpg,x\n" for i in range(200)) + "a.jpg,y\n"
    )
    for i in range(200):
        (folder / f"{i}.jpg").write_bytes(b"x")
    first, second = read_dataset(folder), read_dataset(folder)
    assert first == second
    assert 5 < sum(item.split == "val" for item in first) < 45


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"{", "line 1"),
        (b"[]", "Karpathy"),
        (b'{"images": [{"filename": "a.jpg"}]}', "Karpathy"),
        (b'{"images": [{"filename": "a.jpg", "sentences": [{"text": "x"}]}]}', r"images\[0\].*raw"),
        (b'{"images": [{"filename": "a.jpg", "sentences": [{"raw": " "}]}]}', r"images\[0\].*no caption"),
        (b'{"images": [{"filename": "a.jpg", "split": "dev", "sentences": [{"raw": "x"}]}]}', r"images\[0\].*dev"),
        (b"\xff\xfe{}", "UTF-8"),
    ],
)
def test_broken_karpathy_files_name_the_place(folder, content, message):
    path = folder / "dataset.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_dataset(path)


def test_broken_tables_name_the_line(folder):
    (folder / "captions.csv").write_text("file_name,caption\na.jpg,one\nb.png,\n")
    with pytest.raises(UserError, match="line 3"):
        read_dataset(folder)
    (folder / "captions.csv").unlink()
    (folder / "captions.jsonl").write_bytes(b'{"image": "a.jpg", "text": "x"}\n{"image": "b.png", "text": "\xff"}\n')
    with pytest.raises(UserError, match="line 2"):
        read_dataset(folder)


def test_missing_images_are_an_error_or_skipped(folder):
    path = karpathy(folder, [row("a.jpg"), row("gone.jpg")])
    with pytest.raises(UserError, match=r"1 images.*gone\.jpg.*--skip-missing"):
        read_dataset(path)
    assert [item.image_id for item in read_dataset(path, skip_missing=True)] == ["a.jpg"]
    with pytest.raises(UserError, match="none of the 1"):
        read_dataset(karpathy(folder, [row("gone.jpg")]), skip_missing=True)


def test_duplicate_ids_and_empty_folders(folder, tmp_path):
    with pytest.raises(UserError, match=r"'a\.jpg' occurs twice"):
        read_dataset(karpathy(folder, [row("a.jpg"), row("a.jpg")]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image"):
        read_dataset(tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist"):
        read_dataset(tmp_path / "nowhere")


class Store(dict):
    """Stands for an EmbeddingStore: ids to rows, rows to embeddings."""

    def __init__(self, ids):
        super().__init__({image_id: number for number, image_id in enumerate(ids)})

    def row(self, image_id):
        return super().__getitem__(image_id)

    def __getitem__(self, row):
        return torch.full((4,), float(row))


def test_every_caption_meets_its_own_image_and_ends_with_the_end_token(folder):
    """Regression: embeddings and captions that come from different lists go out of step."""
    (folder / "captions.csv").write_text("file_name,caption\na.jpg,one\nb.png,two\nb.png,three four\nc.jpg,five\n")
    items = read_dataset(folder)
    _, tokenizer = load_gpt2("tiny")
    data = CaptionDataset(items, Store(["c.jpg", "b.png"]), tokenizer, max_tokens=67)  # a.jpg could not be read
    texts = {tokenizer.decode(data[i]["ids"][:-1]): data[i]["embedding"][0].item() for i in range(len(data))}
    assert texts == {"two": 1.0, "three four": 1.0, "five": 0.0}
    assert all(data[i]["ids"][-1] == tokenizer.eos_token_id for i in range(len(data)))


def test_collate_pads_to_the_longest_and_does_not_label_padding():
    """Regression: the original counts padding in the loss, and leaves real tokens of id 0 out."""
    batch = collate(9)(
        [
            {"embedding": torch.zeros(4), "ids": [5, 0, 9]},
            {"embedding": torch.ones(4), "ids": [9]},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 0, 9], [9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 0, 9], [9, IGNORE, IGNORE]]
    assert np.allclose(batch["clip_embeddings"].sum(1), [0, 4])


@pytest.mark.parametrize("num", [1, 7, 64, 1003])
def test_buckets_hold_every_caption_once_and_little_padding(num):
    lengths = np.random.default_rng(0).integers(3, 40, num)
    order = BucketedOrder(lengths, 8, seed=3)
    batches = list(order)
    assert sorted(i for batch in batches for i in batch) == list(range(num))
    assert batches == list(BucketedOrder(lengths, 8, seed=3))
    if num > 1000:
        padded = sum(len(batch) * lengths[batch].max() for batch in batches)
        assert padded < 1.15 * lengths.sum()  # in random order it is about 1.7 times
        firsts = [lengths[batch].mean() for batch in batches]
        assert firsts != sorted(firsts)
        order.epoch = 1
        assert list(order) != batches
