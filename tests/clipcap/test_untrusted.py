"""Files of data sets that would run code, claim too much or reach elsewhere: each is refused in one line."""

import gzip
import io
import os
import pickle
import tarfile

import pytest
import torch
from PIL import Image

from clipcap.data import untrusted
from clipcap.data.members import open_file
from clipcap.data.readers import read_dataset
from common.checks import UserError
from common.files import MARKER
from tests.clipcap.layouts import original_pickle, tar


class Malicious:
    """Unpickled by Python itself, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class InsideTensor:
    """The same one level deeper: torch's own loader of a tensor's numbers is a way to run code."""

    def __init__(self, path):
        inner = io.BytesIO()
        torch.save(Malicious(path), inner, _use_new_zipfile_serialization=False)
        self.data = inner.getvalue()

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


@pytest.mark.parametrize("kind", [Malicious, InsideTensor])
def test_a_pickle_that_would_run_code_is_refused(folder, kind):
    made = folder / "made-by-the-pickle"
    path = folder / "train.pkl"
    path.write_bytes(pickle.dumps({"clip_embedding": torch.zeros(1, 4), "captions": [kind(made)]}))
    with pytest.raises(UserError, match=r"asks to run .*: it is refused") as caught:
        read_dataset(path)
    assert not made.exists() and "\n" not in str(caught.value)
    pickle.loads(path.read_bytes())  # it does run: the refusal is what stops it
    assert made.exists()


def test_a_damaged_pickle_is_one_line(folder):
    path = original_pickle(folder, [{"caption": "x", "clip_embedding": 0}])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="damaged or cut short"):
        read_dataset(path)
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(UserError, match="not the original ClipCap's"):
        read_dataset(path)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("../outside.jpg", b"x"), r"'\.\./outside\.jpg' leaves the directory"),
        (("a/../../outside.jpg", b"x"), "leaves the directory"),
        (("{tmp}/outside.jpg", b"x"), "leaves the directory"),
        (("k.jpg", b"", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (("k.jpg", b"", tarfile.LNKTYPE, "../outside.jpg"), "is a link"),
        (("k.jpg", b"", tarfile.FIFOTYPE, ""), "device"),
        (("k.txt", b"no caption in \xff UTF-8"), r"'k\.txt', line 1 is not UTF-8"),
        (("k.json", b'{"caption": '), r"'k\.json', line 1 is not JSON"),
        (("k.jpg", b"no caption"), "sample 'k': the image has no caption"),
    ],
)
def test_a_bad_member_of_a_tar_is_one_line(tmp_path, member, message):
    shards = tmp_path / "in" / "shards"
    shards.mkdir(parents=True)
    path = tar(shards / "bad.tar", [(member[0].replace("{tmp}", str(tmp_path)), *member[1:])])
    with pytest.raises(UserError, match=message) as caught:
        read_dataset(path)
    assert "\n" not in str(caught.value)
    written = {str(file.relative_to(shards)) for file in tmp_path.rglob("*") if file.is_file() and file.name != MARKER}
    assert written <= {"bad.tar", "bad.images/k.jpg"} and not any(file.is_symlink() for file in tmp_path.rglob("*"))


def test_a_tar_that_is_cut_short_is_one_line(tmp_path):
    path = tar(tmp_path / "cut.tar", [("a.jpg", b"x" * 5000), ("a.txt", b"one")])
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="damaged or cut short"):
        read_dataset(path)
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match="damaged or cut short"):
        read_dataset(path)


def headers(name, size, kind=tarfile.REGTYPE):
    """A member's header, whose content is missing."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("opener", [open, gzip.open])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (headers("a.jpg", 1 << 40), r"'a\.jpg' has 1,099,511,627,776 bytes"),
        (headers("x", 1 << 40, tarfile.XHDTYPE), "header of 1,099,511,627,776"),
        (headers("x", 1 << 40, tarfile.GNUTYPE_LONGNAME), "header of 1,099,511,627,776"),
        (headers("a.jpg", -512), r"'a\.jpg' has -512 bytes"),
        (headers("a", -512, tarfile.DIRTYPE), "has -512 bytes|damaged"),
        (headers("a.jpg", 100, tarfile.GNUTYPE_SPARSE), "sparse"),
    ],
)
def test_what_a_tar_claims_is_not_believed(tmp_path, opener, content, message):
    with opener(tmp_path / "bomb.tar", "wb") as file:
        file.write(content + bytes(1024))
    with pytest.raises(UserError, match=message):
        read_dataset(tmp_path / "bomb.tar")


def test_a_compressed_tar_that_unpacks_to_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "MEMBER_BYTES", 100_000)
    members = [(f"{number}.jpg", bytes(90_000)) for number in range(100)] + [("a.txt", b"zeros")]
    for end in ("gz", "bz2", "xz"):
        path = tmp_path / f"bomb-{end}.tar"
        with tarfile.open(path, f"w:{end}") as archive:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        with pytest.raises(UserError, match="unpacks to more than 50 times its size"):
            read_dataset(path)
    path = tar(
        tmp_path / "plain.tar", [(f"{n}.{end}", bytes([48 + n]) * 90_000) for n in range(9) for end in ("jpg", "txt")]
    )
    assert len(read_dataset(path)) == 9
    [*_] = untrusted.read_tar(path)


def test_texts_that_are_no_captions_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("clipcap.data.readers.tables.LARGEST_TEXT", 50)
    monkeypatch.setattr("clipcap.data.readers.archives.LARGEST_TEXT", 50)
    monkeypatch.setattr("clipcap.data.readers.json_files.LARGEST_JSON", 300)
    monkeypatch.setattr("clipcap.data.readers.text.LONGEST_LINE", 200)
    image = tmp_path / "images"
    image.mkdir()
    Image.new("RGB", (4, 4)).save(image / "a.png")
    (image / "a.txt").write_text("x" * 51)
    for end in ("txt", "json"):
        tar(tmp_path / f"{end}.tar", [("a.jpg", b"x"), (f"a.{end}", b" " * 51)])
    (tmp_path / "large.json").write_text("[" * 301)
    (tmp_path / "large.jsonl").write_text('{"file_name": "a.png", "caption": "' + "x" * 200)
    (tmp_path / "large.csv").write_text("file_name,caption\na.png," + "x" * 200)
    (tmp_path / "large.tsv").write_text("http://a.org\t" + "x" * 200)
    (tmp_path / "large.token.txt").write_text("a.png#0\t" + "x" * 200)
    for name in (
        "images",
        "txt.tar",
        "json.tar",
        "large.json",
        "large.jsonl",
        "large.csv",
        "large.tsv",
        "large.token.txt",
    ):
        with pytest.raises(UserError, match=r"of at most|has more than 200 bytes") as caught:
            read_dataset(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_images_are_not_written_through_links_or_over_others(tmp_path):
    elsewhere, inside = tmp_path / "elsewhere", tmp_path / "inside"
    elsewhere.mkdir()
    inside.mkdir()
    path = tar(inside / "s.tar", [("sub/a.jpg", b"theirs"), ("sub/a.txt", b"one")])
    put = inside / "put"
    put.mkdir()
    images = put / "s"
    for link, target in (
        (images, elsewhere),
        (images / "sub", elsewhere),
        (images / "sub" / "a.jpg", elsewhere / "mine"),
    ):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
        (elsewhere / "mine").write_text("mine")
        with pytest.raises(UserError, match="is a link"):
            read_dataset(path, images=put)
        assert os.listdir(elsewhere) == ["mine"] and (elsewhere / "mine").read_text() == "mine"
        link.unlink()
    (images / "sub" / "a.jpg").write_bytes(b"mine, and")
    with pytest.raises(UserError, match="another image"):
        read_dataset(path, images=put)
    assert (images / "sub" / "a.jpg").read_bytes() == b"mine, and"


def test_an_image_that_changed_in_the_tar_comes_again(tmp_path):
    for data in (b"first.", b"second", b"second"):
        path = tar(tmp_path / "s.tar", [("a.jpg", data), ("a.txt", b"one")])
        for images in (None, tmp_path):
            [item] = read_dataset(path, images=images)
            with open_file(item.path) as file:
                assert file.read() == data


def test_an_archive_inside_a_pickle_is_refused(folder):
    class Zip:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (b"PK\x03\x04",)

    (folder / "a.pkl").write_bytes(pickle.dumps({"clip_embedding": Zip(), "captions": []}))
    with pytest.raises(UserError, match="archive inside a tensor"):
        read_dataset(folder / "a.pkl")
