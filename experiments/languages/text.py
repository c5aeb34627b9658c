"""The texts of the recycling experiments: Dutch and Italian manuals without their English parts, split by genre."""

from __future__ import annotations

import hashlib
import lzma
import re
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from common.checks import UserError, require_directory
from common.files import write_text
from recycle_gpt2.documents import Document
from recycle_gpt2.lexicon import Entry

LANGUAGES = {"nld": "Dutch", "ita": "Italian"}
STOP_WORDS = {
    "eng": "the of and to is you this with that are be for it will your can not which from".split(),
    "nld": "de het een van en te is dat voor met op wordt kunt die zijn als niet om bij of dit deze u".split(),
    "ita": "di il la che per e un una in è del della con non le si da sono questo alla nel i al come".split(),
}
SECOND = re.compile(r"\b(?:Debian|aptitude|dpkg|apt-get|APT|Ubuntu)\b|/etc/|/usr/")
"""What tells a system administrator's manual from those of the office and graphics programs."""
SPLITS = ("train", "test", "second")


def is_english(paragraph: str, language: str) -> bool:
    """Whether more of a paragraph's words are among English's commonest than among the language's own."""
    words = re.findall(r"\w+", paragraph.lower())
    counts = {name: sum(word in STOP_WORDS[name] for word in words) for name in ("eng", language)}
    return counts["eng"] > counts[language]


def read_split(directory: Path, language: str, split: str) -> list[str]:
    """Documents of LANG.SPLIT.txt or .txt.xz, without paragraphs in English."""
    for path in (directory / f"{language}.{split}.txt", directory / f"{language}.{split}.txt.xz"):
        if path.exists():
            opener = lzma.open if path.suffix == ".xz" else open
            with opener(path, "rt", encoding="utf-8") as file:
                documents = file.read().split("\n\n")
            break
    else:
        raise UserError(
            f"{str(directory)!r} holds no {language}.{split}.txt or .xz: make it with "
            f"experiments/backbones/build_corpus.py."
        )
    kept = []
    for document in documents:
        lines = [line for line in document.strip().split("\n") if line and not is_english(line, language)]
        if sum(map(len, lines)) >= 200:
            kept.append("\n".join(lines))
    return kept


def second_genre(text: str) -> bool:
    """Whether a document is of the second genre, which is never trained on."""
    return len(SECOND.findall(text)) >= 2


def write_texts(source: Path, language: str, out: Path, *, second_bytes: int = 80_000) -> dict[str, Path]:
    """Write OUT/train.txt (first genre), OUT/test.txt (the same, held out) and OUT/second.txt (the other genre).

    A document is of the second genre from two mentions of its words on. Of its documents, which are in no training
    text, as many are taken, in the order of a hash, as make up `second_bytes`.
    """
    require_directory(source, "text directory")
    paths = {split: out / f"{split}.txt" for split in SPLITS}
    if all(path.exists() for path in paths.values()):
        return paths
    train, held_out = (read_split(source, language, split) for split in ("train", "valid"))
    others = sorted(
        {text for text in train + held_out if second_genre(text)}, key=lambda t: hashlib.sha256(t.encode()).hexdigest()
    )
    taken, size = [], 0
    for text in others:
        if size >= second_bytes:
            break
        taken.append(text)
        size += len(text.encode())
    known = set(train)
    parts = {
        "train": [text for text in train if not second_genre(text)],
        "test": [text for text in dict.fromkeys(held_out) if not second_genre(text) and text not in known],
        "second": taken,
    }
    for split, texts in parts.items():
        write_text(paths[split], "\n\n".join(texts) + "\n")
    return paths


def held_out(directory: Path) -> dict[str, list[Document]]:
    """The documents of test and second that `write_texts` wrote."""
    return {
        split: [Document(text, split, split) for text in (directory / f"{split}.txt").read_text().strip().split("\n\n")]
        for split in SPLITS[1:]
    }


def surest_new_words(entries: Iterable[Entry], english_tokenizer: PreTrainedTokenizerFast) -> list[Entry]:
    """Entries of more than three letters that are no English token (those began as that token), surest first."""
    known = english_tokenizer.get_vocab()
    new = [entry for entry in entries if len(entry.word) > 3 and "Ġ" + entry.word not in known]
    return sorted(new, key=lambda entry: -entry.scores[0])
