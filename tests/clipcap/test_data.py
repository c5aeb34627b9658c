"""The (embedding, caption) data set: its pairs, tokens kept on disk, batches."""

import numpy as np
import pytest
import torch

from clipcap.data import tokens
from clipcap.data.dataset import CaptionDataset, collate, read_dataset
from common.batches import BatchOrder
from common.checks import UserError
from common.gpt2 import load_gpt2
from common.language import IGNORE


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
    order = BatchOrder(len(lengths), 8, seed=3, lengths=lengths)
    batches = list(order)
    assert sorted(i for batch in batches for i in batch) == list(range(num))
    assert batches == list(BatchOrder(len(lengths), 8, seed=3, lengths=lengths))
    if num > 1000:
        padded = sum(len(batch) * lengths[batch].max() for batch in batches)
        assert padded < 1.15 * lengths.sum()  # in random order it is about 1.7 times
        firsts = [lengths[batch].mean() for batch in batches]
        assert firsts != sorted(firsts)
        order.epoch = 1
        assert list(order) != batches


def test_captions_are_tokenized_once_for_a_tokenizer_and_a_text(folder, tmp_path, gpt2_directory, monkeypatch):
    (folder / "captions.csv").write_text("file_name,caption\na.jpg,one\nb.png,two é 猫\nb.png,three four\nc.jpg,five\n")
    items, store = read_dataset(folder), Store(["a.jpg", "c.jpg", "b.png"])
    (_, tiny), (_, other) = load_gpt2("tiny"), load_gpt2(gpt2_directory)
    calls, cache, original = [], tmp_path / "cache", tokens._tokenize
    monkeypatch.setattr(tokens, "_tokenize", lambda *a: calls.append(1) or original(*a))

    def build(tokenizer, part=items, limit=67):
        return CaptionDataset(part, store, tokenizer, max_tokens=limit, cache=cache)

    def pairs(data):
        return [data.pair(number) for number in range(len(data))]

    plain = CaptionDataset(items, store, tiny, max_tokens=67)
    naive = [
        (store.row(item.image_id), [*tiny(text)["input_ids"], tiny.eos_token_id])
        for item in items
        for text in item.captions
    ]
    assert pairs(plain) == naive and len(naive) == 4
    calls.clear()
    assert pairs(build(tiny)) == naive and len(calls) == 1
    tiny(["longer text"], truncation=True, max_length=1)  # stays behind in the tokenizer, and is no part of the key
    again = build(tiny, limit=3)
    assert len(calls) == 1 and isinstance(again.tokens.ids.base, np.memmap)  # read from the disk
    assert pairs(again) == [(row, [*ids[:-1][:2], ids[-1]]) for row, ids in naive]
    assert again.lengths.tolist() == [len(ids) for _, ids in pairs(again)]
    build(other)
    assert len(calls) == 2  # another tokenizer
    build(tiny, items[:2])
    assert len(calls) == 3  # other captions
    for file in cache.glob("*.ids.npy"):
        file.write_bytes(file.read_bytes()[:-3])
    assert pairs(build(tiny)) == naive and len(calls) == 4  # a file cut short is made again
    assert not list(cache.glob("*.tmp"))


def test_a_caption_of_10000_characters_is_cut_with_a_notice(folder, gpt2_directory, capsys):
    (folder / "captions.csv").write_text(f"file_name,caption\na.jpg,{'the cat and ' * 834}\nb.png,the hat\n")
    _, tokenizer = load_gpt2(gpt2_directory)
    data = CaptionDataset(read_dataset(folder), Store(["a.jpg", "b.png"]), tokenizer, max_tokens=12)
    assert data.lengths.tolist()[0] == 12 and data[0]["ids"][-1] == tokenizer.eos_token_id
    error = capsys.readouterr().err
    assert "1 of 2 captions have more than 11 tokens and are cut" in error and error.count("\n") == 1


def test_no_caption_left_is_an_error(folder, gpt2_directory):
    (folder / "captions.csv").write_text("file_name,caption\na.jpg,one\n")
    with pytest.raises(UserError, match="no captioned image is left"):
        CaptionDataset(read_dataset(folder), Store([]), load_gpt2(gpt2_directory)[1], max_tokens=9)
