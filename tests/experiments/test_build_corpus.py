"""The corpus script on a package made here: extraction, deduplication, split, and the same bytes again."""

import json
import lzma
import shutil
import subprocess

import pytest

from experiments.backbones import build_corpus
from experiments.backbones.build_corpus import Config, Paragraphs, glosses, is_prose, main

PAGE = """<html><head><title>no</title><style>p {{}}</style></head><body><nav>Home of the site and more</nav>
<h1>Titel van deze pagina is dit</h1><p>Dit is een zin van <b>pagina {n}</b>, en het is niet de laatste.<br>
U kunt deze pagina ook voor het andere doel met {n} gebruiken.</p><pre>rm -rf het pad</pre>
<div class="toc">Inhoud van het boek en de rest</div>
<p>This is a paragraph that the translators left in English for you.</p><p>Op elke pagina wordt dit herhaald.</p>
</body></html>"""


def test_running_text_without_navigation_and_code():
    found = Paragraphs.of(PAGE.format(n=3))
    assert found[1] == "Dit is een zin van pagina 3, en het is niet de laatste."
    assert not any(word in text for text in found for word in ("Home", "rm -rf", "Inhoud", "no"))


def test_languages_are_told_apart():
    assert is_prose("Dit is een zin van het boek.", "nld", 4)
    assert not is_prose("This is a sentence of the book.", "nld", 4)
    assert not is_prose("0x12 0x13 == 0x14 -- de het", "nld", 2)


def test_glosses_are_sentences_and_each_occurs_once():
    lines = [
        "  1 This software and database is provided",
        "0001 n 01 dog | a pet that barks at the door; ",
        "x | a pet that barks at the door",
    ]
    assert list(glosses(lines)) == [["A pet that barks at the door."]]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not on this machine")
def test_a_corpus_is_built_from_packages_and_is_the_same_again(tmp_path, monkeypatch):
    package = tmp_path / "tree"
    (package / "DEBIAN").mkdir(parents=True)
    (package / "DEBIAN" / "control").write_text(
        "Package: boek\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: b\n"
    )
    pages = package / "usr/share/doc/boek/html"
    pages.mkdir(parents=True)
    for n in range(60):
        (pages / f"{n:02}.html").write_text(PAGE.format(n=n))
    (package / "usr/share/doc/boek/copyright").write_text("Licence: GFDL")
    monkeypatch.setattr(build_corpus, "SOURCES", {"nld": {"boek": "usr/share/doc/boek/html/*.html"}})
    contents = []
    for run in ("first", "second"):
        out = tmp_path / run
        (out / "packages").mkdir(parents=True)
        subprocess.run(
            ["dpkg-deb", "--build", str(package), str(out / "packages" / "boek_1_all.deb")],
            check=True,
            capture_output=True,
        )
        main(Config(languages=("nld",), out=out, valid_percent=20))
        contents.append([(out / f"nld.{split}.txt.xz").read_bytes() for split in ("train", "valid")])
    assert contents[0] == contents[1]
    train, valid = (lzma.decompress(data).decode().strip().split("\n\n") for data in contents[0])
    assert len(train) + len(valid) == 60 and 2 <= len(valid) <= 30
    paragraphs = [line for document in train + valid for line in document.splitlines()]
    assert len(paragraphs) == len(set(paragraphs)) == 122  # two of each page, and two that all pages share
    assert "GFDL" in (out / "LICENSES.md").read_text()
    assert json.loads((out / "corpus.json").read_text())["corpora"]["nld"]["train"]["documents"] == len(train)
