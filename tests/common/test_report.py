"""The page is one file, says what it was told, and is never half written."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from common.checks import UserError
from common.files import write_json, write_text
from common.report import Page, contact_sheet, data_uri, plot_bars, plot_lines

NASTY = "<script>alert('x')</script> & \"quoted\" 'single' é 日本"


class Reader(HTMLParser):
    """Tags with their attributes, the text, and whether every element was closed in order."""

    VOID = frozenset("meta link img br hr input".split())

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def picture(size: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8))


def full_page(tmp_path: Path) -> Page:
    gif, video = tmp_path / "a.gif", tmp_path / "a.mp4"
    picture().save(gif)
    video.write_bytes(b"not really a video")
    return (
        Page(NASTY, NASTY)
        .section(NASTY, NASTY)
        .text(NASTY)
        .note(NASTY)
        .command(NASTY)
        .table([{NASTY: NASTY, "n": 1.0}], caption=NASTY)
        .image(picture(), NASTY)
        .figure(plot_bars({"a": 1.0}), NASTY)
        .gallery([(picture(), NASTY, [NASTY]), (np.zeros((4, 4)), "", [])], pixelated=True)
        .section("two")
        .video(gif, NASTY)
        .video(video, NASTY)
        .section("three")
        .details(NASTY, {NASTY: [1, math.nan]})
    )


def test_page_is_self_contained_and_well_formed(tmp_path):
    page = full_page(tmp_path).html()
    reader = Reader(page)
    tags = [tag for tag, _ in reader.tags]
    assert not {"script", "iframe", "object"} & set(tags)
    for _tag, attributes in reader.tags:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), value
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page and "@import" not in page and "http" not in re.sub(r"base64,[\w+/=]+", "", page)
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page and 'lang="en"' in page
    identifiers = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    links = [attributes["href"] for tag, attributes in reader.tags if tag == "a"]
    assert links == [f"#{identifier}" for identifier in identifiers] and len(links) == 3


def test_every_text_is_escaped_and_every_picture_has_words(tmp_path):
    reader = Reader(full_page(tmp_path).html())
    assert reader.text.count(NASTY) >= 12
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(images) == 5 and all(attributes["alt"] for attributes in images)
    assert images[0]["alt"] == NASTY


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("run `a <b>` now", "<p>run <code>a &lt;b&gt;</code> now</p>"),
        ("one ` alone", "<p>one ` alone</p>"),
        ("`a` and `", "<p><code>a</code> and `</p>"),
        ("first\n\n\n second", "<p>first</p>\n<p>second</p>"),
    ],
)
def test_text_marks(text, shown):
    assert shown in Page("t").text(text).html()


def test_table():
    rows = [{"model": "MLP", "bleu": 0.12345, "n": 12000}, {"model": "Transformer", "bleu": math.nan, "extra": True}]
    page = Page("t").table(rows, caption="c").html()
    for cell in (
        '<td class="number">0.123</td>',
        "12,000",
        "–",
        '<th scope="row">MLP</th>',
        "yes",
        "<caption>c</caption>",
        '<th scope="col" class="number">bleu</th>',
        '<th scope="col">model</th>',
    ):
        assert cell in page, cell
    assert re.findall(r'<th scope="col"[^>]*>(\w+)', page) == ["model", "bleu", "n", "extra"]
    sequence = Page("t").table([(1, 2.5), (None, np.float32(1e-5))], ["a", "b"]).html()
    assert "2.500" in sequence and "1e-05" in sequence
    assert "<tbody></tbody>" in Page("t").table([], ["a"]).html()
    with pytest.raises(ValueError, match="has 1 cells: give 2"):
        Page("t").table([(1,)], ["a", "b"])


@pytest.mark.parametrize(
    "image",
    [
        picture(),
        picture().convert("L"),
        picture().convert("RGBA"),
        picture().convert("P"),
        picture().convert("CMYK"),
        Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)),
        np.random.default_rng(0).random((8, 8, 3)),
        np.zeros((8, 8), dtype=np.uint8),
    ],
)
def test_pictures_of_every_kind_can_be_read_back(image):
    media, content = data_uri(image).removeprefix("data:").split(";base64,")
    assert media == "image/png"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (8, 8)


def test_small_pictures_are_exact_and_large_ones_small():
    image = picture()
    back = Image.open(io.BytesIO(base64.b64decode(data_uri(image).split(",")[1])))
    assert np.array_equal(np.asarray(back.convert("RGB")), np.asarray(image))
    assert data_uri(picture(600)).startswith("data:image/jpeg")


def test_float_pictures_are_clipped():
    array = np.array([[[-1.0, 0.5, 2.0], [np.nan, 0.0, 1.0]]])
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(data_uri(array).split(",")[1]))))
    assert back.tolist() == [[[0, 128, 255], [0, 0, 255]]]


def test_files_are_inlined_as_they_are(tmp_path):
    path = tmp_path / "a.JPG"
    picture().save(path, "JPEG")
    assert base64.b64decode(data_uri(path).split(",")[1]) == path.read_bytes()
    with pytest.raises(UserError, match="does not exist"):
        data_uri(tmp_path / "no.png")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="convert it first"):
        data_uri(tmp_path / "a.txt")


def test_figures_are_drawings_and_the_same_every_time():
    def figure() -> Figure:
        return plot_lines({"a": ([1, 2], [3, 4]), "b": ([1, 2], [4, 3])}, x="step", y="loss", log_x=True)

    assert data_uri(figure()).startswith("data:image/svg+xml")
    assert data_uri(figure()) == data_uri(figure())


def test_contact_sheet():
    sheet = contact_sheet(
        [picture(), np.zeros((4, 8, 3)), picture(30)], ["short", "many words to wrap " * 5, ""], columns=2
    )
    assert sheet.mode == "RGB" and sheet.width == 2 * 200 + 8 and sheet.height > 2 * 200
    assert contact_sheet([picture()]).size == (208, 208)
    with pytest.raises(UserError, match="0 images"):
        contact_sheet([])
    with pytest.raises(UserError, match="1 images but 2 captions"):
        contact_sheet([picture()], ["a", "b"])


@dataclass(frozen=True)
class Settings:
    out: Path
    rate: float = 0.1


def test_json_takes_what_results_hold(tmp_path):
    value = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf, np.float32("nan")],
        "array": np.arange(3),
        "tensor": torch.tensor([[1.5, math.nan]]),
        "scalar": (np.int64(3), torch.tensor(2)),
        "settings": Settings(Path("a/b")),
        Path("key"): None,
        4: True,
        "text": "é\n",
    }
    path = write_json(tmp_path / "deep" / "r.json", value)

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "nan": None,
        "inf": [None, None, None],
        "array": [0, 1, 2],
        "tensor": [[1.5, None]],
        "scalar": [3, 2],
        "settings": {"out": "a/b", "rate": 0.1},
        "key": None,
        "4": True,
        "text": "é\n",
    }


def test_writing_is_all_or_nothing(tmp_path):
    path = write_json(tmp_path / "r.json", {"a": 1})
    before = path.read_text()
    with pytest.raises(TypeError, match="has no JSON form"):
        write_json(path, {"a": 2, "b": object()})
    assert path.read_text() == before
    path = tmp_path / "page.html"
    Page("one").write(path)
    Page("two").write(path)
    assert "two" in path.read_text()
    assert {file.name for file in tmp_path.iterdir()} == {"r.json", "page.html"}
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError):
        write_text(tmp_path / "x", "text")
    assert not list(tmp_path.iterdir())
