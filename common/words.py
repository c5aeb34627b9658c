"""Words of any script: letters with their marks, and characters where a script puts no spaces between words."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import regex

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Scripts whose words stand without spaces between them, for a character class."""
_JOINERS = "\u200c\u200d"  # within words of Persian and of the scripts of India
_CHARACTER = rf"[{UNSPACED}]\p{{M}}*"
_LETTER = rf"(?:(?![{UNSPACED}])[\w\p{{M}}{_JOINERS}])"
_WORD = rf"{_LETTER}+(?:[-.]{_LETTER}+)*"
_ENGLISH = regex.compile(rf"n't|'(?:s|re|ve|ll|d|m)\b|{_LETTER}+(?=n't)|{_CHARACTER}|{_WORD}|[^\w\s]", regex.IGNORECASE)
_ANY = regex.compile(rf"{_CHARACTER}|{_LETTER}+(?:[-.'’]{_LETTER}+)*|[^\w\s]")
_UNSPACED_LETTER = regex.compile(rf"[{UNSPACED}]")
_SPELLED = regex.compile(rf"\p{{L}}[\p{{L}}\p{{M}}{_JOINERS}]*")


def words(text: str, language: str = "en") -> list[str]:
    """Lower-cased words and signs of `text`, in order.

    A word is a run of letters, combining marks and digits, with hyphens and full stops inside. Of the scripts that put
    no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character with its marks is one.

    Args:
        text: in any script; mixed ones too.
        language: its code. "en" splits "isn't", "dog's" and "cannot" as the Penn Treebank does; any other keeps
            apostrophes within words and puts the text in Unicode's form NFC first.
    """
    if is_english(language):
        return _ENGLISH.findall(lower(text).replace("cannot", "can not"))
    return _ANY.findall(lower(unicodedata.normalize("NFC", text), language))


def lower(text: str, language: str = "en") -> str:
    """`text` in small letters; Turkish and Azerbaijani have a dotless i beside the dotted one."""
    if base_language(language) in ("tr", "tur", "az", "aze"):
        text = text.replace("İ", "i").replace("I", "ı")
    return text.lower()


def base_language(code: str) -> str:
    """A code without its region or script: of pt-BR it is pt."""
    return code.lower().replace("_", "-").split("-")[0]


def is_english(code: str) -> bool:
    """Whether a language's code is English's."""
    return base_language(code) in ("en", "eng")


def is_word(text: str) -> bool:
    """Whether `text` is nothing but letters and their marks, a letter first."""
    return _SPELLED.fullmatch(text) is not None


def has_unspaced(text: str) -> bool:
    """Whether a letter of a script without spaces between words is in `text`."""
    return _UNSPACED_LETTER.search(text) is not None


def is_unspaced(texts: Iterable[str]) -> bool:
    """Whether more than half of the letters of `texts` are of scripts without spaces between words."""
    letters = unspaced = 0
    for text in texts:
        letters += sum(map(str.isalpha, text))
        unspaced += sum(map(str.isalpha, _UNSPACED_LETTER.findall(text)))
    return 2 * unspaced > letters


def mark_share(text: str) -> float:
    """Combining marks as a share of letters and marks: over 0.2 in Hindi, Tamil and Thai, 0 in most others."""
    kinds = [unicodedata.category(character)[0] for character in text]
    marks, letters = kinds.count("M"), kinds.count("L")
    return marks / max(1, marks + letters)
