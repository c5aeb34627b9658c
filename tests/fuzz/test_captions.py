"""Caption files of every layout, broken: a UserError, no hang, and nothing written but below the target."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipcap.data.journal import read_journal
from clipcap.data.readers import read_dataset
from common.checks import UserError
from tests.fuzz.mutations import FUZZ, JUNK, bad_json, damaged, files_below, only_user_errors

KARPATHY = {
    "images": [
        {"filename": "a.png", "filepath": "", "split": "train", "sentences": [{"raw": "a cat"}, {"raw": "a dog"}]},
        {"filename": "b.png", "split": "val", "sentences": [{"raw": "a hat"}]},
    ]
}
COCO = {
    "images": [
        {"id": 1, "file_name": "a.png", "domain": "in-domain"},
        {"id": 2, "file_name": "b.png", "domain": "near-domain"},
    ],
    "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}, {"id": 2, "image_id": 2, "caption": "a hat"}],
}
ORIGINAL = [{"image_id": "1", "caption": "a cat"}, {"image_id": "2", "caption": "a hat"}]
LAVIS = [{"image": "a.png", "caption": "a cat"}, {"image": "b.png", "caption": ["a hat", "a dog"], "split": "val"}]
LLAVA = [{"image": name, "conversations": [{"from": "gpt", "value": "a cat"}]} for name in ("a.png", "b.png")]
JSON = {
    "karpathy": KARPATHY, "coco": COCO, "nocaps": COCO, "original": ORIGINAL, "lavis": LAVIS, "llava": LLAVA,
}  # fmt: skip
LINES = {
    "table.csv": b'file_name,caption,split\na.png,a cat,train\nb.png,"a ""hat""",val\n',
    "other.csv": b'Image | Caption\r\na.png| a cat\r\n"./b.png"|"a ""hat""\r\nand more"\r\n',
    "table.jsonl": b'{"file_name": "a.png", "caption": ["a cat", "a dog"]}\n{"file_name": "b.png", "caption": "a hat"}\n',
    "flickr.token.txt": b"a.png#0\ta cat\nb.png#0\ta hat\n",
    "conceptual.tsv": b"a cat\thttp://example.org/a.png\na hat\thttp://example.org/b.png\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with two images, in one in which nothing may be written."""
    place = tmp_path_factory.mktemp("fuzz") / "inside"
    place.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4), "red").save(place / name)
    return place


def read(path, **options):
    """Read a file as a command would; nothing appears outside its directory."""
    around = path.parent.parent
    before = {name for name in files_below(around) if not name.startswith("inside")}
    with only_user_errors():
        for item in read_dataset(path, skip_missing=True, **options):
            assert item.captions and all(caption.strip() for caption in item.captions)
    assert {name for name in files_below(around) if not name.startswith("inside")} == before


@pytest.mark.slow
@pytest.mark.parametrize("layout", JSON)
def test_json(layout, place):
    @FUZZ
    @given(bad_json(JSON[layout]), st.booleans())
    def check(data, guess):
        (place / "captions_val.json").write_bytes(data)
        read(place / "captions_val.json", images=place, format="auto" if guess else layout)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_lines(name, place):
    @FUZZ
    @given(damaged(LINES[name]))
    def check(data):
        (place / name).write_bytes(data)
        read(place / name)

    check()


@FUZZ
@given(
    damaged(
        pickle.dumps(
            {
                "clip_embedding": torch.ones(2, 3),
                "captions": [
                    {"caption": "a cat", "clip_embedding": 0, "image_id": "1"},
                    {"caption": "a hat", "clip_embedding": 1, "image_id": "2"},
                ],
            }
        )
    )
)
def test_pickle(place, data):
    (place / "original.pkl").write_bytes(data)
    read(place / "original.pkl")


NAMES = st.one_of(
    st.sampled_from(
        ["a.jpg", "a.txt", "../b.jpg", "../../b.txt", "/tmp/b.jpg", "x/../../c.jpg", "d\\..\\e.jpg", "a.json", ".", ""]
    ),
    st.text(max_size=8).map(lambda text: f"{text}.jpg"),
)


@FUZZ
@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=12), st.sampled_from("fls"), JUNK), max_size=4),
    st.booleans(),
    st.data(),
)
def test_tar(tmp_path_factory, members, cut, data):
    around = tmp_path_factory.mktemp("tar")
    inside = around / "inside"
    inside.mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content, kind, junk in members:
            member = tarfile.TarInfo(name.replace("\0", "").encode("utf-8", "replace").decode())
            content = json.dumps({"caption": junk}).encode() if name.endswith(".json") else content
            member.size = len(content) if kind == "f" else 0
            member.type = {"f": tarfile.REGTYPE, "l": tarfile.LNKTYPE, "s": tarfile.SYMTYPE}[kind]
            member.linkname = "../outside" if kind != "f" else ""
            tar.addfile(member, io.BytesIO(content) if kind == "f" else None)
    raw = buffer.getvalue()
    (inside / "shard.tar").write_bytes(data.draw(damaged(raw)) if cut else raw)
    with only_user_errors():
        read_dataset(inside / "shard.tar", skip_missing=True)
    assert {name.split("/")[0] for name in files_below(around)} == {"inside"}
    allowed = {"shard.tar", "shard.images"}
    assert {name.split("/")[1] for name in files_below(around) if "/" in name} <= allowed


@FUZZ
@given(damaged(b'{"key": "%b", "file": "images/00/%b.jpg", "dropped": "", "again": false}\n' % (b"0" * 40, b"0" * 40)))
def test_journal_of_downloads(place, data):
    (place / "journal.jsonl").write_bytes(data)
    for key, entry in read_journal(place).items():
        assert len(key) == 40 and entry.file in ("", f"images/{key[:2]}/{key}{Path(entry.file).suffix}")


@pytest.mark.parametrize("data, message", [
    (b'{"images": [{"filename": "a.png", "filepath": 5, "sentences": [{"raw": "a cat"}]}]}', "missing"),
    (b'{"images": ' + b"9" * 5000 + b"}", "not JSON"),
])  # fmt: skip
def test_found_by_this(place, data, message):
    (place / "found.json").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_dataset(place / "found.json", images=place)
