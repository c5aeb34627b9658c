"""Readers of captioned images: each layout on a small file of its real shape, and errors that name the row."""

import json
import tarfile
from hashlib import sha256
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from clipcap.data.members import open_file
from clipcap.data.readers import Format, is_plain_text, read_dataset
from common.checks import UserError
from tests.clipcap.layouts import karpathy, original, original_pickle, parquet, row, tar


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
    with pytest.raises(UserError, match=r"1 missing images.*gone\.jpg.*--skip-missing"):
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


def coco(domains=None):
    rows = [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": "b.png"}, {"id": 7, "file_name": "c.jpg"}]
    for image, domain in zip(rows, domains or (), strict=False):
        image["domain"] = domain
    texts = ((6, "two"), (5, "one\n"), (6, "three"))
    notes = [{"id": 90 + n, "image_id": image, "caption": text} for n, (image, text) in enumerate(texts)]
    return {"info": {}, "licenses": [], "images": rows, "annotations": notes}


def test_coco_annotations(folder, capsys):
    (folder / "annotations").mkdir()
    (folder / "val2017").mkdir()
    (folder / "b.png").rename(folder / "val2017" / "b.png")
    path = folder / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps(coco()))
    items = read_dataset(path)
    assert [(i.image_id, i.captions, i.split) for i in items] == [
        ("a.jpg", ("one",), "val"),
        ("b.png", ("two", "three"), "val"),
    ]
    assert items[1].path == folder / "val2017" / "b.png"
    train = {"images": [{"id": 5, "file_name": "c.jpg"}], "annotations": [{"id": 1, "image_id": 5, "caption": "x"}]}
    (folder / "annotations" / "captions_train2017.json").write_text(json.dumps(train))
    assert [item.split for item in read_dataset(folder)] == ["train", "val", "val"]
    assert read_dataset(folder / "annotations", images=folder) == read_dataset(folder)
    assert capsys.readouterr() == ("", "")  # pycocotools talks


def test_nocaps_keeps_its_domains(folder):
    (folder / "nocaps_val_4500_captions.json").write_text(json.dumps(coco(("in-domain", "out-domain", "near-domain"))))
    items = read_dataset(folder / "nocaps_val_4500_captions.json")
    assert [(item.domain, item.split) for item in items] == [("in-domain", "val"), ("out-domain", "val")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"][1].update(id=5), r"images\[1\]: id 5 occurs twice"),
        (lambda d: d["images"][2].pop("file_name"), r"images\[2\]: it has no 'file_name'"),
        (lambda d: d["annotations"][2].update(id=90), r"annotations\[2\]: id 90 occurs twice"),
        (lambda d: d["annotations"][1].update(image_id=8), r"annotations\[1\]: image_id 8 is not in 'images'"),
        (lambda d: d["annotations"][0].pop("caption"), r"annotations\[0\]: it has no 'caption'"),
        (lambda d: d["annotations"][1].update(caption="  "), r"images\[0\]: the image has no caption"),
        (lambda d: d["annotations"].insert(1, "text"), r"annotations\[1\]: it is a str"),
    ],
)
def test_broken_coco_files_name_the_row(folder, change, message):
    data = coco()
    change(data)
    (folder / "captions_val2017.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        read_dataset(folder / "captions_val2017.json")


def test_the_originals_train_caption_json(folder):
    (folder / "train2014").mkdir()
    (folder / "a.jpg").rename(folder / "train2014" / "COCO_train2014_000000318556.jpg")
    (folder / "c.jpg").rename(folder / "COCO_val2014_000000000042.jpg")
    rows = [
        {"image_id": "318556", "id": 48, "caption": "A clean bathroom. "},
        {"image_id": 42, "id": 49, "caption": "A cat."},
        {"image_id": "318556", "id": 67, "caption": "A sink."},
    ]
    items = read_dataset(original(folder, rows))
    assert [(item.image_id, item.captions) for item in items] == [
        ("COCO_train2014_000000318556.jpg", ("A clean bathroom.", "A sink.")),
        ("COCO_val2014_000000000042.jpg", ("A cat.",)),
    ]
    with pytest.raises(UserError, match=r"\[1\]: it has no 'image_id'"):
        read_dataset(original(folder, [rows[0], {"caption": "x"}]))
    with pytest.raises(UserError, match=r"'beach' is no COCO number"):
        read_dataset(original(folder, [{"image_id": "beach", "caption": "x"}]))
    with pytest.raises(UserError, match="row 1: the image has no caption"):
        read_dataset(original(folder, [rows[0], rows[1] | {"caption": ""}]))


def without_images(folder, name):
    """Two captions, "one" and "two", in a layout whose images were never there."""
    names, texts = ("x.jpg", "y.jpg"), ("one", "two")
    rows = [{"file_name": n, "caption": t} for n, t in zip(names, texts, strict=True)]
    if name == "karpathy":
        return karpathy(folder, [row(n, captions=(t,)) for n, t in zip(names, texts, strict=True)])
    if name in ("coco", "nocaps"):
        domain = {"domain": "in-domain"} if name == "nocaps" else {}
        images = [{"id": i, "file_name": n} | domain for i, n in enumerate(names)]
        notes = [{"id": i, "image_id": i, "caption": t} for i, t in enumerate(texts)]
        (folder / "all.json").write_text(json.dumps({"images": images, "annotations": notes}))
        return folder / "all.json"
    if name == "original":
        return original(folder, [{"image_id": i, "caption": t} for i, t in zip((7, "beach"), texts, strict=True)])
    if name in ("lavis", "llava"):
        talk = [{"image": n, "conversations": [{"from": "gpt", "value": t}]} for n, t in zip(names, texts, strict=True)]
        (folder / "list.json").write_text(json.dumps(rows if name == "lavis" else talk))
        return folder / "list.json"
    if name == "parquet":
        return parquet(folder / "rows.parquet", rows)
    if name == "conceptual":
        (folder / "cc.tsv").write_text("".join(f"{t}\thttps://images.example/{t}.jpg\n" for t in texts))
        return folder / "cc.tsv"
    if name == "flickr8k":
        (folder / "Flickr8k.token.txt").write_text("".join(f"{n}#0\t{t}\n" for n, t in zip(names, texts, strict=True)))
        return folder / "Flickr8k.token.txt"
    if name == "datasets":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
        return folder / "saved"
    if name == "webdataset":
        return tar(folder / "0.tar", [("a.txt", b"one"), ("b.json", b'{"caption": "two"}')])
    inner = folder / "inner"
    place = inner / "train" if name == "imagefolder" else inner
    place.mkdir(parents=True)
    if name == "folder":
        for n, t in zip("ab", texts, strict=True):
            (inner / f"{n}.txt").write_text(t)
        return inner
    (place / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return inner / "captions.jsonl" if name == "table" else inner


@pytest.mark.parametrize("name", [n for n in get_args(Format)[1:] if n != "original-pickle"])
def test_captions_without_images(folder, name):
    source = without_images(folder, name)
    with pytest.raises(UserError):
        read_dataset(source, format=name)
    items = read_dataset(source, format=name, need_images=False)
    assert [item.captions for item in items] == [("one",), ("two",)]
    assert not any(item.path.is_file() for item in items)
    assert not is_plain_text(source)
    assert read_dataset(source, need_images=False) == items


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_the_originals_pickle(folder, protocol):
    rows = [{"image_id": "8", "caption": f"text {n}", "id": n, "clip_embedding": n} for n in range(2)]
    items = read_dataset(original_pickle(folder, [*rows, {"caption": "no image_id", "clip_embedding": 2}], protocol))
    assert [(i.image_id, i.captions, i.embedding_row) for i in items] == [
        ("8", ("text 0", "text 1"), 0),
        ("2", ("no image_id",), 2),
    ]
    with pytest.raises(UserError, match=r"captions\[1\]: clip_embedding is 3, of 3"):
        read_dataset(original_pickle(folder, [rows[0], rows[1] | {"clip_embedding": 3}]))


@pytest.mark.parametrize("order", ["cc3m", "cc12m"])
def test_conceptual_captions_in_both_orders(folder, order):
    from clipcap.data.journal import url_key

    urls = [f"https://images.example/{n}.jpg?x=1" for n in range(4)]
    pairs = [("a cat", urls[0]), ("a dog", urls[1]), ("the cat again", urls[0]), ("gone", urls[2])]
    rows = [f"{c}\t{u}" if order == "cc3m" else f"{u}\t{c}" for c, u in pairs]
    path = folder / "train.tsv"
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(UserError, match="clipcap download"):
        read_dataset(path)
    out = folder / "downloaded"
    out.mkdir()
    keys = [url_key(url) for url in urls]
    names = [f"images/{keys[0][:2]}/{keys[0]}.jpg", f"images/{keys[1][:2]}/{keys[1]}.png"]
    entries = [{"file": names[0]}, {"file": names[1]}, {"dropped": "HTTP 404"}]
    lines = [json.dumps({"key": url_key(u), **entry}) for u, entry in zip(urls, entries, strict=False)]
    (out / "journal.jsonl").write_text("\n".join(lines) + '\n{"key": "cut sh')
    for name, place in zip(("a.jpg", "b.png"), names, strict=True):
        (out / place).parent.mkdir(parents=True)
        (folder / name).rename(out / place)
    items = read_dataset(path, images=out)
    assert [(item.path, item.captions) for item in items] == [
        (out / names[0], ("a cat", "the cat again")),
        (out / names[1], ("a dog",)),
    ]
    path.write_text(path.read_text() + rows[0].replace(urls[0], urls[3]) + "\n")
    with pytest.raises(UserError, match="1 missing images"):
        read_dataset(path, images=out)
    for line in ("no tab", "a caption\tno address", f"  \t{urls[1]}"):
        path.write_text("\n".join([*rows, line]))
        with pytest.raises(UserError, match="line 5"):
            read_dataset(path, images=out)


def test_flickr8k_token_file_and_its_splits(folder):
    path = folder / "Flickr8k.token.txt"
    path.write_text("a.jpg#0\tA child .\na.jpg#1\tA girl , #1 .\nb.png#0\tA dog .\n\nc.jpg#0\tA cat .\n")
    items = read_dataset(path)
    assert items[0].captions == ("A child .", "A girl , #1 .") and len(items) == 3
    for name, listed in (("trainImages", "a.jpg"), ("devImages", "b.png"), ("testImages", "")):
        (folder / f"Flickr_8k.{name}.txt").write_text(f"{listed}\n")
    assert [(i.image_id, i.split) for i in read_dataset(path)] == [("a.jpg", "train"), ("b.png", "val")]
    path.write_text("a.jpg#0\tA child .\nb.png\tA dog .\n")
    with pytest.raises(UserError, match="line 2"):
        read_dataset(path)
    path.write_text("a.jpg#0\tA child .\nb.png#0\t\n")
    with pytest.raises(UserError, match="line 2.*no caption"):
        read_dataset(path)


def test_a_table_by_itself_and_kaggles_captions_txt(folder):
    (folder / "captions.txt").write_text('image,caption\na.jpg,"one, ""two""\nand three"\nb.png,four\n')
    items = read_dataset(folder / "captions.txt")
    assert items[0].captions == ('one, "two"\nand three',) and items[1].path == folder / "b.png"
    (folder / "notes.txt").write_text("hello\n")
    with pytest.raises(UserError, match="'hello'.*name the layout"):
        read_dataset(folder / "notes.txt")
    assert len(read_dataset(folder / "captions.txt", format="table")) == 2
    with pytest.raises(UserError, match="line 1"):
        read_dataset(folder / "captions.txt", format="flickr8k")
    with pytest.raises(UserError, match="format is 'xml'"):
        read_dataset(folder / "captions.txt", format="xml")


def test_hugging_face_imagefolder(folder):
    for split, name in (("train", "a.jpg"), ("validation", "b.png"), ("test", "c.jpg")):
        (folder / split).mkdir()
        (folder / name).rename(folder / split / name)
        (folder / split / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": split}) + "\n")
    (folder / "test" / "metadata.jsonl").rename(folder / "test" / "metadata.csv")
    (folder / "test" / "metadata.csv").write_text("file_name,text\nc.jpg,test\n")
    assert [(i.image_id, i.captions, i.split) for i in read_dataset(folder)] == [
        ("train/a.jpg", ("train",), "train"),
        ("validation/b.png", ("validation",), "val"),
        ("test/c.jpg", ("test",), "test"),
    ]
    (folder / "train" / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "x"}\n{"file_name": "a.jpg"}\n')
    with pytest.raises(UserError, match="line 2"):
        read_dataset(folder)


def test_the_images_of_an_imagefolder_may_be_elsewhere(folder, tmp_path):
    for name in ("train", "validation"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "metadata.csv").write_text(f"file_name,text\n{name}.jpg,of {name}\n")
        (tmp_path / "pixels" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pixels" / name / f"{name}.jpg")
    with pytest.raises(UserError, match="give their directory with --images"):
        read_dataset(tmp_path / "texts")
    items = read_dataset(tmp_path / "texts", images=tmp_path / "pixels")
    assert [(item.path, item.captions, item.split) for item in items] == [
        (tmp_path / "pixels" / "train" / "train.jpg", ("of train",), "train"),
        (tmp_path / "pixels" / "validation" / "validation.jpg", ("of validation",), "val"),
    ]


def test_half_a_character_is_replaced_in_captions(folder):
    text = r"half a \ud83d face, a whole \ud83d\ude00"
    (folder / "captions.jsonl").write_text(f'{{"file_name": "a.jpg", "caption": "{text}"}}\n')
    (folder / "dataset.json").write_text(
        f'{{"images": [{{"filename": "a.jpg", "split": "train", "sentences": [{{"raw": "{text}"}}]}}]}}'
    )
    for source in (folder, folder / "dataset.json"):
        [item] = read_dataset(source)
        assert item.captions == ("half a \ufffd face, a whole \U0001f600",)


def test_a_data_set_saved_by_datasets(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [str(folder / "a.jpg"), str(folder / "b.png")], "caption": [["one", "two"], ["three"]]}
    part = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    inside = part.map(lambda row: row, features=part.features)  # holds the images' bytes
    saved = tmp_path / "saved"
    datasets.DatasetDict({"train": inside, "test": part.select([1])}).save_to_disk(str(saved))
    items = read_dataset(saved)
    assert [(i.captions, i.split) for i in items] == [
        (("one", "two"), "train"),
        (("three",), "train"),
        (("three",), "test"),
    ]
    assert [Image.open(item.path).size for item in items] == [(20, 16)] * 3
    assert read_dataset(saved) == items
    datasets.Dataset.from_dict({"caption": ["x"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(UserError, match="columns caption"):
        read_dataset(tmp_path / "text")
    empty = datasets.Dataset.from_dict(rows | {"caption": [["one"], [""]]}).cast_column("image", datasets.Image())
    empty.save_to_disk(str(tmp_path / "empty-caption"))
    with pytest.raises(UserError, match="row 1: the image has no caption"):
        read_dataset(tmp_path / "empty-caption")


def test_webdataset_shards(folder, tmp_path):
    jpeg = (folder / "a.jpg").read_bytes()
    shards = tmp_path / "shards"
    shards.mkdir()
    tar(shards / "00000.tar", [("000000.jpg", jpeg), ("000000.json", b'{"caption": "not this"}'), ("000000.txt", b"one"),
                               ("000001.json", b'{"caption": "two", "url": ""}'), ("000001.jpg", jpeg)])  # fmt: skip
    tar(
        shards / "00001.tar", [("deep", b"", tarfile.DIRTYPE, ""), ("deep/x.png", jpeg), ("deep/x.txt", b"three\nfour")]
    )
    items = read_dataset(shards)
    assert [(i.image_id, i.captions) for i in items] == [
        ("00000/000000", ("one",)),
        ("00000/000001", ("two",)),
        ("00001/deep/x", ("three", "four")),
    ]
    assert all(open_file(item.path).read() == jpeg for item in items)
    assert sorted(path.name for path in shards.iterdir()) == ["00000.tar", "00001.tar"]  # nothing is written
    assert [i.captions for i in read_dataset(shards / "{00000..00001}.tar")] == [i.captions for i in items]
    (tmp_path / "put").mkdir()
    [item, _] = read_dataset(shards / "00000.tar", images=tmp_path / "put")
    assert item.path == tmp_path / "put" / "00000" / "000000.jpg"


def test_a_shard_of_the_webdataset_library(root):
    """Written by its TarWriter, 1.0.2; keys, captions and images are those that its WebDataset gives."""
    items = read_dataset(root / "tests" / "golden" / "webdataset.tar")
    found = [(i.image_id, i.captions, sha256(open_file(i.path).read()).hexdigest()[:16]) for i in items]
    assert found == [
        ("webdataset/000000000", ("a red square",), "9e46667359a8349a"),
        ("webdataset/000000001", ("a blue square",), "36fe6ab71ec56fa1"),
        ("webdataset/more/000000002", ("a green square", "something green"), "6ab4c7a3c289dfc4"),
    ]


@pytest.mark.parametrize("name", ["captions_val2017.json", "captions.csv", "captions.jsonl", "token.txt", "train.tsv"])
def test_text_that_is_not_utf8_names_its_line(folder, name):
    lines = {
        "captions_val2017.json": ['{"images": [],', '"annotations": ["\xff"]}'],
        "captions.csv": ["file_name,caption", "a.jpg,\xff"],
        "captions.jsonl": ['{"file_name": "a.jpg", "text": "x"}', '{"file_name": "b.png", "text": "\xff"}'],
        "token.txt": ["a.jpg#0\tone", "b.png#0\t\xff"],
        "train.tsv": ["a cat\thttps://x.example/a", "\xff\thttps://x.example/b"],
    }[name]
    (folder / name).write_bytes("\n".join(lines).encode("latin1"))
    (folder / "journal.jsonl").write_text(json.dumps({"key": "0" * 40, "dropped": "HTTP 404"}) + "\n")
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        read_dataset(folder / name)


def test_every_format_is_read_by_some_test():
    """A layout that is offered by name must be one that `read_dataset` explains."""
    assert all(f"| {name} |" in (read_dataset.__doc__ or "") for name in get_args(Format) if name != "auto")
    assert np.unique(get_args(Format)).size == len(get_args(Format))


def test_old_and_quoted_line_ends_of_tables(folder):
    (folder / "mac.csv").write_bytes(b"file_name,caption\ra.jpg,one\rb.jpg,two\r")
    (folder / "quoted.csv").write_bytes(b'file_name,caption\r\na.jpg,"one\r\nmore"\r\n')
    for name, captions in (("mac.csv", ["one", "two"]), ("quoted.csv", ["one\nmore"])):
        found = read_dataset(folder / name, need_images=False)
        assert [item.captions[0] for item in found] == captions
