"""Words of any script: marks stay with their letters, and where no spaces stand each character is a word."""

from __future__ import annotations

import unicodedata

import pytest

from common.words import has_unspaced, is_unspaced, is_word, lower, mark_share, words


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        (
            'A red-ish cube; it isn\'t "big".',
            "en",
            ["a", "red-ish", "cube", ";", "it", "is", "n't", '"', "big", '"', "."],
        ),
        ("He cannot see John's 3.5 m", "en", ["he", "can", "not", "see", "john", "'s", "3.5", "m"]),
        ("L'homme n'est pas là", "fr", ["l'homme", "n'est", "pas", "là"]),
        ("हिन्दी विकिपीडिया।", "hi", ["हिन्दी", "विकिपीडिया", "।"]),
        ("हिन्दी विकिपीडिया", "en", ["हिन्दी", "विकिपीडिया"]),
        ("שָׁלוֹם עוֹלָם", "he", ["שָׁלוֹם", "עוֹלָם"]),
        ("می\u200cخواهم بروم", "fa", ["می\u200cخواهم", "بروم"]),
        ("一只小猫。", "zh", ["一", "只", "小", "猫", "。"]),
        ("コーヒーを飲む", "ja", ["コ", "ー", "ヒ", "ー", "を", "飲", "む"]),
        ("กำลังดี", "th", ["ก", "ำ", "ลั", "ง", "ดี"]),
        ("iPhone 15是新的", "zh", ["iphone", "15", "是", "新", "的"]),
        ("e\u0301te\u0301", "fr", ["été"]),
        ("", "en", []),
    ],
)
def test_words(text, language, expected):

    found = words(text, language)
    if language == "he":  # NFC orders the points
        expected = [unicodedata.normalize("NFC", word) for word in expected]
    assert found == expected


def test_no_letter_is_lost():
    for text in ("सुबह की हवा ठंडी थी", "เช้านี้อากาศเย็น", "朝の電車は", "Утро было холодным", "قال الولد: السَّلامُ"):
        assert "".join(words(text, "xx")) == text.replace(" ", "").lower()


def test_small_letters_of_turkish():
    assert lower("ISPARTA İzmir", "tr") == "ısparta izmir"
    assert lower("ISPARTA", "en") == "isparta"


def test_what_a_word_is():
    assert all(map(is_word, ("huis", "हिन्दी", "שָׁלוֹם", "猫")))
    assert not any(map(is_word, ("", "a1", "a b", "\u0301a", "�", "don't")))


def test_scripts_without_spaces():
    assert is_unspaced(["一只小猫"]) and is_unspaced(["เช้านี้", "朝"])
    assert not is_unspaced(["हिन्दी"]) and not is_unspaced(["a cat 猫"]) and not is_unspaced([])
    assert has_unspaced("a 猫") and not has_unspaced("a cat")


def test_share_of_marks():
    assert mark_share("हिन्दी विकिपीडिया") > 0.3 and mark_share("เช้านี้อากาศเย็น") > 0.2
    assert mark_share("het huis") == mark_share("") == mark_share("朝の電車") == 0
