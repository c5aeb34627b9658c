"""Caption metrics: corpus BLEU and CIDEr as pycocoevalcap computes them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from common.checks import UserError

# What pycocoevalcap's PTBTokenizer drops and how it writes brackets (its list of brackets to drop is in upper case,
# its tokens in lower case, so it keeps them).
_PUNCTUATION = {"''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}
_WORD = re.compile(r"n't|'(?:s|re|ve|ll|d|m)\b|\w+(?=n't)|\w+(?:[-.]\w+)*|[^\w\s]", re.IGNORECASE)


@dataclass(frozen=True)
class CaptionScores:
    """Corpus scores, each image's CIDEr, and the tokenizer they were computed with."""

    bleu: tuple[float, float, float, float]
    """BLEU-1 to BLEU-4, 0 to 1 (Papineni et al. 2002)."""
    cider: float
    """CIDEr-D, 0 to 10 (Vedantam et al. 2015); papers print it times 100."""
    cider_per_image: dict[str, float]
    tokenizer: str
    """"ptb" (needs Java, as the published scores) or "words"."""


def tokenize(captions: Mapping[str, Sequence[str]], tokenizer: str = "auto") -> tuple[dict[str, list[str]], str]:
    """Lower-cased captions with spaces between words and without punctuation, and the tokenizer's name.

    "ptb" is Stanford's, through Java; "words" is a plain rule that agrees with it on ordinary captions; "auto" is
    "ptb" where Java is installed.
    """
    if tokenizer == "auto":
        tokenizer = "ptb" if shutil.which("java") else "words"
    if tokenizer == "ptb":
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        wrapped = {key: [{"caption": text} for text in texts] for key, texts in captions.items()}
        with _quiet_java():
            return PTBTokenizer().tokenize(wrapped), tokenizer
    return {key: [_words(text) for text in texts] for key, texts in captions.items()}, tokenizer


def _words(text: str) -> str:
    words = _WORD.findall(text.lower().replace("cannot", "can not"))
    return " ".join(_BRACKETS.get(word, word) for word in words if word not in _PUNCTUATION)


@contextlib.contextmanager
def _quiet_java() -> Iterator[None]:
    """Send the standard error of child processes to nowhere."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def score_captions(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], *, tokenizer: str = "auto"
) -> CaptionScores:
    """Score one caption per image against its references.

    Args:
        candidates: image id to caption.
        references: image id to reference captions; ids without a candidate are left out.
        tokenizer: "auto", "ptb" or "words".

    Raises:
        UserError: no candidates, or an image without references.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    if not candidates:
        raise UserError("there is no caption to score: caption at least one image.")
    for key in candidates:
        if not references.get(key):
            raise UserError(f"image {key!r} has no reference caption: leave it out or add one.")
    keys = list(candidates)
    hypotheses, name = tokenize({key: [candidates[key]] for key in keys}, tokenizer)
    truths, _ = tokenize({key: list(references[key]) for key in keys}, tokenizer)
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, _ = Bleu(4).compute_score(truths, hypotheses)
        cider, per_image = Cider().compute_score(truths, hypotheses)
    one, two, three, four = map(float, bleu)
    each = dict(zip(truths, map(float, per_image), strict=True))
    return CaptionScores((one, two, three, four), float(cider), each, name)
