"""Build the English, Dutch and Italian text corpora from Debian's documentation packages and WordNet's glosses.

    python -m experiments.backbones.build_corpus --languages eng nld ita --out out/corpus

Needs a Debian or Ubuntu machine with a package index (`apt-get update`); nothing is installed. Writes LANG.train.txt.xz
and LANG.valid.txt.xz, one paragraph a line and documents separated by an empty line; corpus.json with the packages'
versions and the sizes; LICENSES.md. The same packages always give the same files. A run that was stopped resumes with
the packages that it has.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.checks import UserError, require_at_least, run_command
from common.files import write_json, write_text
from common.running_text import RunningText
from experiments import from_command_line

Language = Literal["eng", "nld", "ita"]

HANDBOOK = "usr/share/doc/debian-handbook/html"
GUIDE = "usr/share/doc/installation-guide-amd64"
HARDEN = "usr/share/doc/harden-doc/html"
SOURCES: dict[str, dict[str, str]] = {
    "eng": {
        "libreoffice-help-en-us": "usr/share/libreoffice/help/en-US/**/*.html",
        "gimp-help-en": "usr/share/gimp/*/help/en/**/*.html",
        "aptitude-doc-en": "usr/share/doc/aptitude/html/en/**/*.html",
        "debian-handbook": f"{HANDBOOK}/en-US/**/*.html",
        "debian-policy": "usr/share/doc/debian-policy/policy.html/**/*.html",
        "debian-reference-en": "usr/share/debian-reference/*.en.html",
        "developers-reference": "usr/share/developers-reference/*.html",
        "debmake-doc": "usr/share/doc/debmake-doc/html/*.en.html",
        "harden-doc": f"{HARDEN}/en-US/**/*.html",
        "installation-guide-amd64": f"{GUIDE}/en/**/*.html",
        "wordnet-base": "usr/share/wordnet/data.*",
    },
    "nld": {
        "libreoffice-help-nl": "usr/share/libreoffice/help/nl/**/*.html",
        "gimp-help-nl": "usr/share/gimp/*/help/nl/**/*.html",
        "aptitude-doc-nl": "usr/share/doc/aptitude/html/nl/**/*.html",
        "debian-handbook": f"{HANDBOOK}/nl-NL/**/*.html",
        "installation-guide-amd64": f"{GUIDE}/nl/**/*.html",
    },
    "ita": {
        "libreoffice-help-it": "usr/share/libreoffice/help/it/**/*.html",
        "gimp-help-it": "usr/share/gimp/*/help/it/**/*.html",
        "aptitude-doc-it": "usr/share/doc/aptitude/html/it/**/*.html",
        "debian-handbook": f"{HANDBOOK}/it-IT/**/*.html",
        "debian-reference-it": "usr/share/debian-reference/*.it.html",
        "developers-reference-it": "usr/share/developers-reference/it/**/*.html",
        "harden-doc": f"{HARDEN}/it-IT/**/*.html",
        "installation-guide-amd64": f"{GUIDE}/it/**/*.html",
    },
}
"""By language: package, and where in it the text lies."""

FUNCTION_WORDS: dict[str, frozenset[str]] = {
    "eng": frozenset("the of and to is in that for it with as are this be you by or from on can not".split()),
    "nld": frozenset("de het een van en is dat voor met op zijn niet te die u of wordt worden kunt deze".split()),
    "ita": frozenset("il la di e che è per un una con non del della le gli si sono da nel questo o i".split()),
}
"""Common words that tell the languages apart: translations leave paragraphs in English."""


@dataclass(frozen=True)
class Config:
    """Text corpora from Debian's documentation packages."""

    languages: tuple[Language, ...] = ("eng", "nld", "ita")
    """Which corpora to build."""
    out: Path = Path("out/corpus")
    """Where the corpora, the licences and the downloaded packages go."""
    valid_percent: int = 5
    """Share of the documents, in percent, that is held out for validation."""
    min_words: int = 4
    """Words that a paragraph has at least."""


def download(package: str, directory: Path) -> Path:
    """The .deb file of `package` in `directory`, downloaded if it is missing."""
    present = sorted(directory.glob(f"{package}_*.deb"))
    if present:
        return present[-1]
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix="partial-") as partial:
        found = subprocess.run(["apt-get", "download", "-q", package], cwd=partial, capture_output=True, text=True)
        files = list(Path(partial).glob("*.deb"))
        if found.returncode or not files:
            reason = next((line for line in found.stderr.splitlines() if line.startswith("E:")), "no file came")
            raise UserError(f"package {package!r} cannot be downloaded ({reason}): run `apt-get update` and try again.")
        return files[0].replace(directory / files[0].name)


def unpack(archive: Path, directory: Path) -> Path:
    """The files of a .deb in `directory`, which is emptied first."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    done = subprocess.run(["dpkg-deb", "-x", str(archive), str(directory)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"package file {str(archive)!r} cannot be unpacked: delete it and run this again.")
    return directory


class Paragraphs(RunningText):
    """The running text of an HTML page, without navigation, code and tables of contents."""

    BREAKS = frozenset(
        "p div li dd dt td th tr table ul ol dl h1 h2 h3 h4 h5 h6 section article blockquote br hr body".split()
    )
    SKIPPED = frozenset("head script style nav footer pre noscript title button select svg form".split())
    SKIPPED_CLASS = re.compile(
        r"\b(nav\w*|docnav|toc|footer|debug|sphinxsidebar\w*|related|indexterm|index|headerlink)\b"
    )

    @classmethod
    def of(cls, page: str) -> list[str]:
        """The paragraphs of `page`, white space collapsed."""
        parser = cls()
        parser.feed(page)
        parser.close()
        parser.end_paragraph()
        return parser.paragraphs

    def skips(self, tag: str, attrs: dict[str, str | None]) -> bool:
        return super().skips(tag, attrs) or bool(self.SKIPPED_CLASS.search(attrs.get("class") or ""))


def is_prose(paragraph: str, language: str, min_words: int) -> bool:
    """Whether a paragraph is running text in `language`: enough words, mostly letters, and no other language."""
    words = re.findall(r"[^\W\d_]+", paragraph.lower())
    if len(words) < min_words or sum(map(len, words)) < 0.6 * len(paragraph.replace(" ", "")):
        return False
    votes = {name: sum(word in known for word in words) for name, known in FUNCTION_WORDS.items()}
    return votes[language] > 0 and votes[language] == max(votes.values())


def glosses(lines: list[str], per_document: int = 20) -> Iterator[list[str]]:
    """WordNet's definitions with their examples, as sentences, mixed, `per_document` at a time."""
    found = set()
    for line in lines:
        if line.startswith("  ") or "|" not in line:
            continue  # the licence at the head of the file
        gloss = " ".join(line.split("|", 1)[1].replace('"', "").split()).rstrip(";:., ")
        if len(gloss.split()) >= 4:
            found.add(gloss[0].upper() + gloss[1:] + ("" if gloss[-1] in "!?" else "."))
    mixed = sorted(found, key=_digest)  # the files are sorted by meaning
    for begin in range(0, len(mixed), per_document):
        yield mixed[begin : begin + per_document]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def documents(package: str, root: Path, pattern: str, language: str, min_words: int) -> Iterator[list[str]]:
    """The documents of an unpacked package, each a list of paragraphs, in an order that is always the same."""
    files = sorted(path for path in root.glob(pattern) if path.is_file())
    if not files:
        raise UserError(f"package {package!r} holds no {pattern}: its layout has changed; mend SOURCES in this script.")
    if package == "wordnet-base":
        yield from glosses([line for path in files for line in path.read_text(encoding="utf-8").splitlines()])
        return
    for path in files:
        found = Paragraphs.of(path.read_text(encoding="utf-8", errors="replace"))
        yield [text for text in found if is_prose(text, language, min_words)]


def licence(root: Path, package: str) -> str:
    """The package's own copyright file."""
    folder = root / "usr/share/doc" / package
    for path in (folder / "copyright", folder / "copyright.gz"):
        if path.is_file():
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            return content.decode("utf-8", errors="replace").strip()
    return "(the package has no copyright file of its own: see the packages it depends on)"


def build(language: str, config: Config, licences: dict[str, str]) -> dict[str, object]:
    """Write one language's two files; returns their sizes and where they come from."""
    seen: set[str] = set()
    split: dict[str, list[str]] = {"train": [], "valid": []}
    sources = {}
    for package, pattern in SOURCES[language].items():
        print(f"{language}: {package}", flush=True)
        archive = download(package, config.out / "packages")
        characters = 0
        with tempfile.TemporaryDirectory(dir=config.out, prefix="unpacked-") as folder:
            root = unpack(archive, Path(folder) / package)
            licences[archive.stem] = licence(root, package)
            for paragraphs in documents(package, root, pattern, language, config.min_words):
                fresh = [text for text in dict.fromkeys(paragraphs) if text.casefold() not in seen]
                seen.update(text.casefold() for text in fresh)
                if fresh:
                    document = "\n".join(fresh)
                    characters += len(document)
                    held_out = int(_digest(document)[:8], 16) % 100 < config.valid_percent
                    split["valid" if held_out else "train"].append(document)
        sources[archive.stem] = characters
    sizes = {}
    for name, texts in split.items():
        content = ("\n\n".join(texts) + "\n").encode()
        target = config.out / f"{language}.{name}.txt.xz"
        partial = target.with_suffix(".partial")
        partial.write_bytes(lzma.compress(content, preset=6))
        partial.replace(target)
        sizes[name] = {"documents": len(texts), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        print(f"{language}.{name}: {len(texts):,} documents, {len(content) / 1e6:.2f} MB", flush=True)
    return {"characters_by_package": sources, **sizes}


def main(config: Config) -> None:
    """Build the corpora, and write where they come from beside them."""
    require_at_least("valid_percent", config.valid_percent, 1)
    for tool, owner in (("apt-get", "apt"), ("dpkg-deb", "dpkg")):
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is not on this machine: run this on Debian or Ubuntu (package {owner}).")
    config.out.mkdir(parents=True, exist_ok=True)
    licences: dict[str, str] = {}
    results = {language: build(language, config, licences) for language in config.languages}
    write_json(config.out / "corpus.json", {"config": {**config.__dict__, "out": config.out.name}, "corpora": results})
    parts = [
        "# Licences of the text\n\nThe corpora here are made of the documentation in the Debian packages below "
        "(of most, the GNU FDL or GPL, the MPL 2.0, CC BY-SA, or WordNet's own licence). "
        "Each part keeps its licence and its authors, as its package's copyright file states them:"
    ]
    parts += [f"## {name}\n\n```\n{text}\n```" for name, text in sorted(licences.items())]
    write_text(config.out / "LICENSES.md", "\n\n".join(parts) + "\n")
    print(f"written to {config.out}")


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
