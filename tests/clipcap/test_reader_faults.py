"""Faults of readers that users found, each by its name: splits that leak, rows that are cut, layouts that were unknown."""

import json

import pytest
from PIL import Image

from clipcap.data.images import find_images, read_image
from clipcap.data.readers import read_dataset
from clipcap.data.readers.captioned import split_in
from common.checks import UserError
from common.images import UNREAD_SUFFIXES, image_suffixes
from tests.clipcap.layouts import karpathy, parquet, row, tar


def found(source, **options):
    """Id, captions and split of each item."""
    return [(item.image_id, item.captions, item.split) for item in read_dataset(source, **options)]


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "blue").save(path)


@pytest.mark.parametrize(
    ("name", "split", "word"),
    [
        ("latest", "", ""), ("carnival", "", ""), ("trainer2014", "", ""), ("contest", "", ""), ("train_val", "", ""),
        ("captions_val2014", "val", "val2014"), ("nocaps_val_4500_captions", "val", "val"), ("Test", "test", "Test"),
        ("coco_karpathy_train", "train", "train"), ("image_info_test-dev2017", "test", "test"),
        ("captions-validation", "val", "validation"), ("", "", ""), ("train-00000-of-00002", "train", "train"),
    ],
)  # fmt: skip
def test_a_split_is_a_word_of_the_files_name_not_any_substring(name, split, word):
    assert split_in(name) == (split, word)


def test_latest_json_is_no_test_split(folder):
    data = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "one"}],
    }
    for name, split in (("latest.json", "train"), ("carnival.json", "train"), ("captions_test2015.json", "test")):
        (folder / name).write_text(json.dumps(data))
        assert [item.split for item in read_dataset(folder / name, val_share=0)] == [split]


def test_folders_of_splits_with_sidecars_keep_their_splits(tmp_path):
    for place in ("train", "Val", "test", "test/more", "validation", "more/test2017"):
        save(tmp_path / place / "a.jpg")
        (tmp_path / place / "a.txt").write_text("one\n")
    assert {name: split for name, _, split in found(tmp_path)} == {
        "train/a.jpg": "train",
        "Val/a.jpg": "val",
        "validation/a.jpg": "val",
        "test/a.jpg": "test",
        "test/more/a.jpg": "test",
        "more/test2017/a.jpg": "test",
    }
    (tmp_path / "Val" / "captions.csv").write_text("file_name,caption\na.jpg,two\n")  # a table in one of them
    assert ("Val/a.jpg", ("two",), "val") in found(tmp_path) and ("test/a.jpg", ("one",), "test") in found(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.jpg,a dog, running\n", r"line 2 has 3 fields, the header 2: put a caption that holds ','"),
        ("a.jpg,one\nb.png\n", r"line 3 has 1 fields, the header 2"),
        ('a.jpg,"a dog\nb.png,"a cat\n', "line 2 is not CSV"),
        ('a.jpg,one\nb.png,"a cat\nc.jpg,three\n', "line 3 is not CSV"),
        ('a.jpg,"a dog" runs\n', "line 2 is not CSV"),
        ('a.jpg,"a dog\nb.png,a cat"\nc.jpg,three\n', "line 2: a quote opens there that takes in the rows after it"),
    ],
)
def test_rows_with_an_unquoted_comma_or_a_stray_quote_are_named(folder, rows, message):
    (folder / "captions.csv").write_text(f"file_name,caption\n{rows}")
    with pytest.raises(UserError, match=message):
        read_dataset(folder)


def test_commas_and_quotes_in_their_place_are_kept(folder):
    (folder / "captions.csv").write_text(
        'file_name,caption,\na.jpg,"a dog, running",\nb.png, 5" nails,\n\nc.jpg, "one ""two""\nthree",\n'
    )
    assert [captions for _, captions, _ in found(folder)] == [("a dog, running",), ('5" nails',), ('one "two"\nthree',)]


@pytest.mark.parametrize("kind", ["table", "karpathy", "lavis", "parquet", "tar"])
def test_null_captions_are_no_captions(kind, folder, tmp_path):
    if kind == "table":
        path = folder / "captions.jsonl"
        path.write_text('{"image": "a.jpg", "captions": ["one", null, NaN]}\n{"image": "b.png", "captions": [null]}\n')
    elif kind == "karpathy":
        path = karpathy(folder, [row("a.jpg", captions=("one", None)), row("b.png", captions=(None,))])
    elif kind == "lavis":
        path = folder / "list.json"
        path.write_text(json.dumps([{"image": "a.jpg", "caption": ["one", None]}, {"image": "b.png", "caption": None}]))
    elif kind == "parquet":
        rows = [{"file_name": "a.jpg", "caption": ["one", None]}, {"file_name": "b.png", "caption": None}]
        path = parquet(folder / "rows.parquet", rows)
    else:
        jpeg = (folder / "a.jpg").read_bytes()
        path = tar(folder / "0.tar", [("a.jpg", jpeg), ("a.json", b'{"caption": ["one", null]}'),
                                      ("b.jpg", jpeg), ("b.json", b'{"caption": null}')])  # fmt: skip
    with pytest.raises(UserError, match="no caption that is not empty: add one, or use --skip-missing"):
        read_dataset(path)
    [item] = read_dataset(path, skip_missing=True)
    assert item.captions == ("one",) and item.image_id.endswith(("a.jpg", "/a"))


def test_a_caption_that_is_no_text_is_named(folder):
    (folder / "captions.jsonl").write_text('{"image": "a.jpg", "captions": ["one", 5]}\n')
    with pytest.raises(UserError, match="line 1: a caption is '5', a int: give text"):
        read_dataset(folder)


def test_a_picture_in_two_splits_is_refused(folder):
    (folder / "captions.csv").write_text("file_name,caption,split\na.jpg,one,train\n./a.jpg,two,test\n")
    with pytest.raises(UserError, match=r"line 3: image 'a\.jpg' is in split 'test' here and in 'train' above"):
        read_dataset(folder)
    path = karpathy(folder, [row("a.jpg", "train"), row("./a.jpg", "val")])
    with pytest.raises(UserError, match=r"one picture is in split 'train' as 'a\.jpg' and in 'val' as '\./a\.jpg'"):
        read_dataset(path)


def test_a_jpg_and_dot_slash_a_jpg_are_one_picture(folder):
    (folder / "captions.csv").write_text(f"file_name,caption\na.jpg,one\n./a.jpg,two\nx/../a.jpg,3\n{folder}/a.jpg,4\n")
    assert [captions for _, captions, _ in found(folder)] == [("one", "two", "3", "4")]
    path = karpathy(folder, [row("a.jpg", captions=("one",)), row("./a.jpg", captions=("two",))])
    assert found(path) == [("a.jpg", ("one", "two"), "train")]


def test_pictures_of_other_kinds_are_counted_and_named(folder, capsys):
    for name in ("d.jxl", "e.jxl", "f.PSD", "g.mp3"):
        (folder / name).write_bytes(b"x")
    (folder / "a.jpg").rename(folder / "a.jfif")
    (folder / "a.txt").write_text("one")
    wanted = "has 3 pictures of kinds that are not read, left out: 2 .jxl, 1 .psd, the first"
    assert [path.name for path in find_images([folder])] == ["a.jfif", "b.png", "c.jpg"]
    assert wanted in capsys.readouterr().err
    assert [name for name, _, _ in found(folder)] == ["a.jfif"]
    error = capsys.readouterr().err
    assert wanted in error and "2 of 3 images in" in error and "'b.png'" in error  # have no text
    jpeg = (folder / "c.jpg").read_bytes()
    path = tar(folder / "0.tar", [("a.jpg", jpeg), ("a.txt", b"one"), ("b.jxl", b"x"), ("b.txt", b"two")])
    assert len(read_dataset(path)) == 1
    assert "0.tar' has 1 pictures of kinds that are not read, left out: 1 .jxl" in capsys.readouterr().err
    assert not UNREAD_SUFFIXES & image_suffixes() - {".heic", ".heif", ".hif"}


def test_heic_is_read_where_pillow_heif_is(folder, capsys):
    (folder / "d.heic").write_bytes(b"x")
    if ".heic" not in image_suffixes():
        assert len(find_images([folder])) == 3
        assert "1 .heic" in (error := capsys.readouterr().err) and "pip install pillow-heif" in error
        return
    Image.new("RGB", (8, 8), "blue").save(folder / "d.heic", "HEIF")
    (folder / "d.txt").write_text("one")
    [item] = read_dataset(folder)
    assert item.path.name == "d.heic" and read_image(item.path).size == (8, 8)


@pytest.mark.parametrize("kind", ["karpathy", "coco", "original", "flickr8k", "conceptual", "csv", "sidecar", "saved"])
def test_one_picture_without_a_caption_does_not_end_a_data_set_with_skip_missing(kind, folder, capsys):
    if kind == "karpathy":
        path = karpathy(folder, [row("a.jpg", captions=("one",)), row("b.png", captions=(" ",))])
    elif kind == "coco":
        path = folder / "captions.json"
        rows = [{"id": 1, "image_id": 1, "caption": "one"}, {"id": 2, "image_id": 2, "caption": None}]
        images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.png"}]
        path.write_text(json.dumps({"images": images, "annotations": rows}))
    elif kind == "original":
        path = folder / "train_caption.json"
        path.write_text(json.dumps([{"image_id": 1, "caption": "one"}, {"image_id": 2, "caption": None}]))
    elif kind == "flickr8k":
        path = folder / "token.txt"
        path.write_text("a.jpg#0\tone\nb.png#0\t\n")
    elif kind == "conceptual":
        path = folder / "train.tsv"
        path.write_text("one\thttps://x.example/a\n \thttps://x.example/b\n")
    elif kind == "csv":
        path = folder / "captions.csv"
        path.write_text("file_name,caption\na.jpg,one\nb.png,\n")
    elif kind == "sidecar":
        path = folder
        (folder / "a.txt").write_text("one")
        (folder / "b.txt").write_text("\n")
    else:
        datasets = pytest.importorskip("datasets")
        path = folder / "saved"
        datasets.Dataset.from_list([{"text": "one"}, {"text": None}]).save_to_disk(str(path))
    options = {"need_images": kind in ("karpathy", "coco", "csv", "sidecar", "flickr8k")}
    with pytest.raises(UserError, match="no caption|no 'caption'"):
        read_dataset(path, **options)
    capsys.readouterr()
    [item] = read_dataset(path, skip_missing=True, **options)
    assert item.captions == ("one",)
    assert "1 images or rows have no caption and are left out, the first: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "header", ["file_name;caption", "file_name\tcaption", " File Name , Caption ", "IMAGE|Text", "n;Image-Path;COMMENT"]
)
def test_headers_of_other_delimiters_case_and_spaces(header, folder):
    delimiter = next(mark for mark in ";\t|," if mark in header)
    first = f"7{delimiter}" if header.startswith("n") else ""
    for name in ("captions.csv", "captions.txt", "captions.tsv"):
        (folder / name).write_text(f"{header}\n{first}a.jpg{delimiter}one\n{first}b.png{delimiter} two\n")
        assert [(name, texts) for name, texts, _ in found(folder / name)] == [("a.jpg", ("one",)), ("b.png", ("two",))]


def test_headers_that_are_not_known_show_the_columns_found(folder):
    (folder / "captions.csv").write_text("Bild;Unterschrift\na.jpg;one\n")
    with pytest.raises(UserError, match="has the columns 'bild', 'unterschrift': it needs one for the image, such as"):
        read_dataset(folder)
    (folder / "captions.csv").write_text("image,caption,Caption\na.jpg,one,two\n")
    with pytest.raises(UserError, match="has the column 'caption' twice"):
        read_dataset(folder)
    (folder / "captions.jsonl").write_text('{"bild": "a.jpg", "caption": "one"}\n')
    with pytest.raises(UserError, match="line 1 has the columns 'bild', 'caption': it needs"):
        read_dataset(folder / "captions.jsonl")


def test_lavis_json(folder):
    save(folder / "val2014" / "d.jpg")
    rows = [{"caption": "one", "image": "val2014/d.jpg", "image_id": "coco_1"}, {"caption": "two", "image": "a.jpg"},
            {"caption": "three", "image": "val2014/d.jpg", "image_id": "coco_1"}]  # fmt: skip
    path = folder / "coco_karpathy_train.json"
    path.write_text(json.dumps(rows))
    assert found(path) == [("val2014/d.jpg", ("one", "three"), "train"), ("a.jpg", ("two",), "train")]
    path = folder / "coco_karpathy_val.json"
    path.write_text(json.dumps([{"caption": ["one", "two"], "image": "val2014/d.jpg"}]))
    assert found(path) == [("val2014/d.jpg", ("one", "two"), "val")]
    path.write_text(json.dumps([{"caption": "one", "image": "a.jpg"}, {"caption": "one"}]))
    with pytest.raises(UserError, match=r"\[1\] has the columns 'caption'"):
        read_dataset(path)


def test_llava_json(folder):
    def talk(*answers, **more):
        turns = [turn for text in answers for turn in ({"from": "human", "value": "<image>\nSay."},
                                                       {"from": "gpt", "value": text})]  # fmt: skip
        return {"id": "1", "conversations": turns} | more

    path = folder / "blip_laion_cc_sbu_558k.json"
    path.write_text(json.dumps([talk("one", image="a.jpg"), talk("two", image="b.png")]))
    assert [(name, texts) for name, texts, _ in found(path)] == [("a.jpg", ("one",)), ("b.png", ("two",))]
    path.write_text(json.dumps([talk("one", image="a.jpg"), talk("yes")]))
    with pytest.raises(UserError, match=r"\[1\]: it has no 'image'"):
        read_dataset(path)
    assert len(read_dataset(path, skip_missing=True)) == 1
    path.write_text(json.dumps([talk("one", "two", image="a.jpg")]))
    with pytest.raises(UserError, match=r"\[0\]: it has 2 answers"):
        read_dataset(path)


def test_parquet_with_bytes_and_with_names(folder, tmp_path):
    jpeg, png = ((folder / name).read_bytes() for name in ("a.jpg", "b.png"))
    place = tmp_path / "hub"
    (place / "data").mkdir(parents=True)
    parquet(
        place / "data" / "train-00000-of-00001.parquet",
        [{"image": {"bytes": jpeg, "path": "x.jpg"}, "caption": ["one", "two"]},
         {"image": {"bytes": png, "path": None}, "caption": ["three"]}],
    )  # fmt: skip
    parquet(place / "data" / "test-00000-of-00001.parquet", [{"image": {"bytes": png}, "caption": ["four"]}])
    items = read_dataset(place)
    assert [(item.captions, item.split) for item in items] == [
        (("four",), "test"), (("one", "two"), "train"), (("three",), "train"),
    ]  # fmt: skip
    assert [item.path.read_bytes() for item in items] == [png, jpeg, png]
    assert len({item.image_id for item in items}) == 3 and read_dataset(place) == items
    rows = [{"Image": "a.jpg", "Text": "one", "split": "val"}, {"Image": "b.png", "Text": "two", "split": "train"}]
    assert found(parquet(folder / "rows.parquet", rows)) == [("a.jpg", ("one",), "val"), ("b.png", ("two",), "train")]
    with pytest.raises(UserError, match="rows.parquet' has the columns 'file', 'words'"):
        read_dataset(parquet(folder / "rows.parquet", [{"file": "a.jpg", "words": "one"}]))
    (folder / "rows.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"rows\.parquet' cannot be read .*: copy it again"):
        read_dataset(folder / "rows.parquet")


def test_caption_sidecars(folder):
    (folder / "a.caption").write_text("one\n")
    (folder / "b.txt").write_text("two\n")
    assert [texts for _, texts, _ in found(folder)] == [("one",), ("two",)]
    assert [texts for _, texts, _ in found(folder, need_images=False)] == [("one",), ("two",)]


def test_names_with_dots_in_tar_files(folder):
    jpeg = (folder / "a.jpg").read_bytes()
    members = [
        ("a.b.jpg", jpeg),
        ("a.b.txt", b"one"),
        ("v1.2/c.d.JPG", jpeg),
        ("v1.2/c.d.json", b'{"caption": "two"}'),
        ("e.jpg", jpeg),
        ("e.mask.png", jpeg),
        ("e.txt", b"three"),
        ("f.big.jpg", jpeg),
        ("f.txt", b"four"),
    ]
    # fmt: skip
    assert [(name, texts) for name, texts, _ in found(tar(folder / "0.tar", members))] == [
        ("0/a.b", ("one",)), ("0/v1.2/c.d", ("two",)), ("0/e", ("three",)), ("0/f.big", ("four",)),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"sample 'a\.b' \(its captions would be in a\.b\.txt, \.caption or \.json\)"):
        read_dataset(tar(folder / "0.tar", [("a.b.jpg", jpeg), ("x.txt", b"one")]))
