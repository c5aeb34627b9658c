"""Caption metrics against pycocoevalcap itself."""

import shutil

import pytest

from clipcap.metrics import score_captions, tokenize
from common.checks import UserError

REFERENCES = {
    "1": ["A red cube, next to a ball.", "There's one red cube and a ball!", "a cube and a ball"],
    "2": ["Two dogs don't run on the beach.", "dogs at the seaside"],
    "3": ["A man's hat (black) on a table; it is old.", "a black hat"],
}
CANDIDATES = {"1": "a red cube and a ball", "2": "two dogs run on a beach", "3": "a hat on a table"}


@pytest.mark.skipif(not shutil.which("java"), reason="Java is not installed")
def test_words_agrees_with_ptb():
    assert tokenize(REFERENCES, "words")[0] == tokenize(REFERENCES, "ptb")[0]


def test_words_without_java():
    found, name = tokenize({"1": ['A red-ish cube; it isn\'t "big".']}, "words")
    assert found == {"1": ["a red-ish cube it is n't big"]} and name == "words"


def test_scores_are_pycocoevalcaps():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    hypotheses, _ = tokenize({k: [v] for k, v in CANDIDATES.items()}, "words")
    truths, _ = tokenize(REFERENCES, "words")
    scores = score_captions(CANDIDATES, REFERENCES, tokenizer="words")
    assert scores.bleu == pytest.approx(Bleu(4).compute_score(truths, hypotheses, verbose=0)[0])
    cider, each = Cider().compute_score(truths, hypotheses)
    assert scores.cider == pytest.approx(cider)
    assert list(scores.cider_per_image.values()) == pytest.approx(list(each))


def test_perfect_captions_beat_wrong_ones():
    right = score_captions({k: v[0] for k, v in REFERENCES.items()}, REFERENCES, tokenizer="words")
    wrong = score_captions(dict.fromkeys(REFERENCES, "nothing of that kind here"), REFERENCES, tokenizer="words")
    assert right.bleu[3] == pytest.approx(1.0, abs=1e-6) and right.cider > 3
    assert wrong.bleu[3] < 1e-4 and wrong.cider < 0.01


def test_order_of_ids_does_not_matter():
    backwards = {k: CANDIDATES[k] for k in reversed(CANDIDATES)}
    one, two = (score_captions(c, REFERENCES, tokenizer="words") for c in (CANDIDATES, backwards))
    assert one.cider_per_image == pytest.approx(two.cider_per_image)


def test_bad_input():
    with pytest.raises(UserError, match="no caption"):
        score_captions({}, REFERENCES)
    with pytest.raises(UserError, match="'7' has no reference"):
        score_captions({"7": "x"}, REFERENCES)
