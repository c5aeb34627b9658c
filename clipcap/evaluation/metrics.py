"""Caption metrics as pycocoevalcap computes them, CLIPScore, diversity, and bootstrap intervals of each."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float

from common.checks import UserError, require_at_least, require_one_of
from common.words import is_english, is_unspaced, words

# What pycocoevalcap's PTBTokenizer drops and how it writes brackets (its list of brackets to drop is in upper case,
# its tokens in lower case, so it keeps them).
_PUNCTUATION = {"''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_OTHER_PUNCTUATION = set("«»“”„‘’、。，．！？：；・…।॥،؛؟۔¿¡–—")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}

TOKENIZERS = ("auto", "ptb", "words")
MetricName: TypeAlias = Literal["BLEU", "METEOR", "ROUGE-L", "CIDEr", "SPICE"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
"""Against references."""
ENGLISH_ONLY = ("METEOR", "SPICE")
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
NO_JAVA = "Java is not installed (no `java` on the path)"


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


@dataclass(frozen=True)
class Metric:
    """A metric of n images in parts that add up over images, so that any subset or resample has its value too."""

    value: float
    """Of all images, as the metric's own library gives it."""
    per_image: Float[np.ndarray, " n"]
    parts: Float[np.ndarray, "n s"]
    combine: Callable[[Float[np.ndarray, "... s"]], Float[np.ndarray, "..."]]
    """From sums of parts to the metric."""

    def of(self, rows: np.ndarray) -> float:
        """The metric of some images; what it knows of the corpus (CIDEr's document frequencies) stays."""
        return float(self.combine(self.parts[rows].sum(axis=0)))


def mean_metric(scores: Sequence[float]) -> Metric:
    """A metric that is the mean of the images' scores; an image whose score is NaN, as it has none, does not count."""
    each = np.asarray(scores, dtype=np.float64)
    known = ~np.isnan(each)
    parts = np.stack([np.where(known, each, 0), known.astype(np.float64)], axis=1)
    return Metric(float(np.mean(each[known])) if known.any() else np.nan, each, parts, _mean_of)


def _mean_of(sums: Float[np.ndarray, "... 2"]) -> Float[np.ndarray, "..."]:
    """Sum over count; NaN of no image."""
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def tokenize(
    captions: Mapping[str, Sequence[str]], tokenizer: str = "auto", language: str = "en"
) -> tuple[dict[str, list[str]], str]:
    """Lower-cased captions with spaces between words and without punctuation, and the tokenizer's name.

    "ptb" is Stanford's for English, through Java; "words" is `common.words.words`, a plain rule for any script that
    agrees with it on ordinary captions; "auto" is "ptb" for English where Java is installed.

    Raises:
        UserError: "ptb" without a Java that works, or for another language.
    """
    require_one_of("tokenizer", tokenizer, TOKENIZERS)
    if tokenizer == "auto":
        tokenizer = "ptb" if is_english(language) and shutil.which("java") else "words"
    if tokenizer == "ptb":
        if not is_english(language):
            raise UserError(f"tokenizer is 'ptb', which is English's, but language is {language!r}: use 'words'.")
        return _ptb(captions), tokenizer
    return {key: [_words(text, language) for text in texts] for key, texts in captions.items()}, tokenizer


def _words(text: str, language: str) -> str:
    dropped = _PUNCTUATION if is_english(language) else _PUNCTUATION | _OTHER_PUNCTUATION
    return " ".join(_BRACKETS.get(word, word) for word in words(text, language) if word not in dropped)


def _ptb(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    if not shutil.which("java"):
        raise UserError(f"tokenizer is 'ptb' but {NO_JAVA}: install it, or use 'words'.")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # A line is a caption to Java, whose line ends are more than "\n".
    wrapped = {key: [{"caption": " ".join(text.split())} for text in texts] for key, texts in captions.items()}
    try:
        with _quiet_children():
            found = PTBTokenizer().tokenize(wrapped)
    except OSError as error:  # it writes a file beside itself
        raise UserError(f"tokenizer 'ptb' failed ({error}): use 'words'.") from error
    for key, texts in captions.items():
        lines = found.setdefault(key, [])
        if any(text.strip() for text in texts[len(lines) :]):
            raise UserError("tokenizer 'ptb' failed: Java stopped early; check `java -version`, or use 'words'.")
        lines += [""] * (len(texts) - len(lines))  # empty captions at the very end have no line
    return {key: found[key] for key in captions}


@contextlib.contextmanager
def _quiet_children() -> Iterator[None]:
    """Send what child processes print to nowhere."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept, nowhere = {stream: os.dup(stream) for stream in (1, 2)}, os.open(os.devnull, os.O_WRONLY)
    for stream in kept:
        os.dup2(nowhere, stream)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for stream, copy in kept.items():
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)


def _check_references(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not candidates:
        raise UserError("there is no caption to score: caption at least one image.")
    for key in candidates:
        if not references.get(key):
            raise UserError(f"image {key!r} has no reference caption: leave it out or add one.")


def score_captions(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], *, tokenizer: str = "auto"
) -> CaptionScores:
    """BLEU and CIDEr of one caption per image against its references; `measure` gives all metrics.

    Args:
        candidates: image id to caption.
        references: image id to reference captions; ids without a candidate are left out.
        tokenizer: "auto", "ptb" or "words".

    Raises:
        UserError: no candidates, or an image without references.
    """
    _check_references(candidates, references)
    hypotheses, name = tokenize({key: [text] for key, text in candidates.items()}, tokenizer)
    truths, _ = tokenize({key: list(references[key]) for key in candidates}, name)
    bleu, cider = _bleu(truths, hypotheses), _cider(truths, hypotheses)
    one, two, three, four = (metric.value for metric in bleu.values())
    each = dict(zip(truths, cider.per_image.tolist(), strict=True))
    return CaptionScores((one, two, three, four), cider.value, each, name)


def measure(
    candidates: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    tokenizer: str = "auto",
    metrics: Collection[str] = METRICS,
    language: str = "en",
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[dict[str, Metric], str, dict[str, str]]:
    """The metrics that compare a caption with its references and that can be had here.

    Args:
        candidates: image id to caption.
        references: image id to reference captions; ids without a candidate are left out.
        tokenizer: "auto", "ptb" or "words".
        metrics: those that are wanted, of `METRICS`; the programs of the others are not started.
        language: code of the captions' language; METEOR, whose stems, synonyms and paraphrases are English's here, and
            SPICE, whose parser is, are measured for English only.
        progress: called with the number of captions that METEOR, the slow one, has seen.

    Returns:
        Metrics by name (BLEU-1 to BLEU-4, METEOR, ROUGE-L, CIDEr, SPICE), on pycocoevalcap's scale, images in the
        order of `candidates`; the tokenizer's name; and what is not measured, with the reason.

    Raises:
        UserError: no candidates, an image without references, no metric or one that is not known, or the tokenizer
            "ptb" without Java.
    """
    if not metrics:
        raise UserError(f"metrics is empty: choose of {', '.join(METRICS)}.")
    for metric in metrics:
        require_one_of("metrics", metric, METRICS)
    _check_references(candidates, references)
    given = {key: [text] for key, text in candidates.items()}
    absent: dict[str, str] = {}
    try:
        hypotheses, name = tokenize(given, tokenizer, language)
    except UserError as error:
        if tokenizer != "auto":
            raise
        absent["PTB tokenizer"] = str(error)
        hypotheses, name = tokenize(given, "words", language)
    if is_english(language) and not shutil.which("java"):
        absent["PTB tokenizer"] = f"{NO_JAVA}; the tokenizer 'words' was used instead"
    truths, _ = tokenize({key: list(references[key]) for key in candidates}, name, language)
    found = _bleu(truths, hypotheses) if "BLEU" in metrics else {}
    rest: dict[str, Callable[[], Metric]] = {
        "METEOR": lambda: _meteor(truths, hypotheses, progress),
        "ROUGE-L": lambda: _rouge(truths, hypotheses),
        "CIDEr": lambda: _cider(truths, hypotheses),
        "SPICE": lambda: _spice(truths, hypotheses),
    }
    for metric, compute in rest.items():
        if metric not in metrics:
            continue
        try:
            if metric in ENGLISH_ONLY and not is_english(language):
                raise NotMeasured(f"it is English's, the captions' language is {language!r}")
            found[metric] = compute()
        except NotMeasured as error:
            absent[metric] = str(error)
    absent |= {metric: "not asked for (metrics)" for metric in METRICS if metric not in metrics}
    return found, name, absent


class NotMeasured(Exception):
    """A metric cannot be had here; the message says why."""


def _bleu(truths: Mapping[str, list[str]], hypotheses: Mapping[str, list[str]]) -> dict[str, Metric]:
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for key, references in truths.items():
        scorer += (hypotheses[key][0], references)
    values, per_image = scorer.compute_score(option="closest", verbose=0)
    parts = np.array(
        [
            [
                row["testlen"],
                _closest(row),
                *row["guess"],
                *row["correct"],
            ]
            for row in scorer.ctest
        ],
        dtype=np.float64,
    )
    return {
        f"BLEU-{n}": Metric(values[n - 1], np.array(per_image[n - 1]), parts, partial(_bleu_of, n=n))
        for n in range(1, 5)
    }


def _closest(row: Mapping[str, Any]) -> int:
    """The reference length nearest to the candidate's, the shorter of two."""
    return min((abs(length - row["testlen"]), length) for length in row["reflen"])[1]


def _bleu_of(sums: Float[np.ndarray, "... 10"], n: int) -> Float[np.ndarray, "..."]:
    """Corpus BLEU-n with pycocoevalcap's guards against division by zero."""
    length, reference = sums[..., 0], sums[..., 1]
    precision = (sums[..., 6 : 6 + n] + 1e-15) / (sums[..., 2 : 2 + n] + 1e-9)
    ratio = (length + 1e-15) / (reference + 1e-9)
    return np.asarray(precision.prod(axis=-1) ** (1 / n) * np.exp(np.minimum(0, 1 - 1 / ratio)))


def _cider(truths: Mapping[str, list[str]], hypotheses: Mapping[str, list[str]]) -> Metric:
    from pycocoevalcap.cider.cider import Cider

    return mean_metric(Cider().compute_score(truths, hypotheses)[1])


def _rouge(truths: Mapping[str, list[str]], hypotheses: Mapping[str, list[str]]) -> Metric:
    from pycocoevalcap.rouge.rouge import Rouge

    return mean_metric(Rouge().compute_score(truths, hypotheses)[1])


def _meteor(
    truths: Mapping[str, list[str]], hypotheses: Mapping[str, list[str]], progress: Callable[[int], object]
) -> Metric:
    if not shutil.which("java"):
        raise NotMeasured(NO_JAVA)
    from pycocoevalcap.meteor.meteor import Meteor

    class Recorder(Meteor):
        """pycocoevalcap's METEOR that keeps each image's counts and ends its process on every way out."""

        def __init__(self) -> None:
            super().__init__()
            self.counts: list[list[float]] = []

        def _stat(self, hypothesis: str, references: list[str]) -> str:
            line = super()._stat(hypothesis, [text.replace("|||", "") for text in references])
            self.counts.append([float(number) for number in line.split()])
            progress(len(self.counts))
            return line

        def close(self) -> None:
            process: subprocess.Popen[bytes] = self.meteor_p
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(OSError):
                    if pipe:
                        pipe.close()

        def __del__(self) -> None:
            """The parent's waits for a lock that an exception leaves closed."""

    scorer = None
    try:
        scorer = Recorder()
        value, each = scorer.compute_score(truths, hypotheses)
        parts = np.array(scorer.counts)
        if parts.shape != (len(truths), 23):
            raise ValueError(f"{parts.shape} counts")
        # A candidate that is a reference, word for word, has no break: METEOR counts its one chunk as none.
        parts[(parts[:, 20] == 1) & (parts[:, 21] == parts[:, 0]) & (parts[:, 22] == parts[:, 1]), 20] = 0
    except (OSError, ValueError) as error:
        raise NotMeasured(f"METEOR's Java program failed ({error})") from error
    finally:
        if scorer is not None:
            scorer.close()
    return Metric(value, np.array(each), parts, _meteor_of)


def _meteor_of(sums: Float[np.ndarray, "... 23"]) -> Float[np.ndarray, "..."]:
    """METEOR 1.5 for English from its counts (Denkowski & Lavie 2014, sec. 2 and table 2).

    The counts are METEOR's own line: length of the candidate and of the reference, their function words; for each of
    the matchers exact, stem, synonym, paraphrase the content words matched in both and the function words matched in
    both; chunks, and words matched in both.
    """
    alpha, beta, gamma, delta = 0.85, 0.20, 0.60, 0.75
    weights = np.array([1.0, 0.6, 0.8, 0.6])
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)  # (..., matcher, content and function of each side)
    with np.errstate(divide="ignore", invalid="ignore"):

        def rate(side: int) -> np.ndarray:
            matched = delta * matches[..., side] + (1 - delta) * matches[..., 2 + side]
            function = sums[..., 2 + side]
            return (matched * weights).sum(axis=-1) / (delta * (sums[..., side] - function) + (1 - delta) * function)

        precision, recall = rate(0), rate(1)
        mean = precision * recall / (alpha * precision + (1 - alpha) * recall)
        words = (sums[..., 21] + sums[..., 22]) / 2
        return np.asarray(np.nan_to_num(mean * (1 - gamma * (sums[..., 20] / words) ** beta)))


def _spice(truths: Mapping[str, list[str]], hypotheses: Mapping[str, list[str]]) -> Metric:
    if not shutil.which("java"):
        raise NotMeasured(NO_JAVA)
    from pycocoevalcap.spice import spice

    # pycocoevalcap would fetch the parser by itself; nothing is fetched here without being asked for.
    library = Path(spice.__file__).parent / "lib"
    missing = [jar for jar in SPICE_JARS if not (library / jar).is_file()]
    if missing:
        raise NotMeasured(
            f"its parser is not here: put {' and '.join(missing)} of Stanford CoreNLP 3.6.0 into spice/lib of the "
            f"installed pycocoevalcap"
        )
    try:
        with _quiet_children():
            _, found = spice.Spice().compute_score(truths, hypotheses)
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        raise NotMeasured(f"SPICE's Java program failed ({error})") from error
    each = dict(zip(sorted(truths), found, strict=True))  # it sorts the ids
    return mean_metric([each[key]["All"]["f"] for key in truths])


def sacrebleu_score(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """Corpus BLEU-4 by sacrebleu on lower-cased text with its own tokenizer, 0 to 1, and its signature (Post 2018).

    Its tokenizer is 13a, or char for scripts without spaces between words.
    """
    from sacrebleu.metrics import BLEU

    most = max(map(len, references))
    streams: Any = [[several[i] if i < len(several) else None for several in references] for i in range(most)]
    how = "char" if is_unspaced(text for several in references for text in several) else "13a"
    bleu = BLEU(lowercase=True, force=True, tokenize=how)  # captions that end in " ." are no mistake
    return bleu.corpus_score(list(candidates), streams).score / 100, str(bleu.get_signature())


def diversity(candidates: Sequence[str], training: Sequence[str] = (), language: str = "en") -> dict[str, float | int]:
    """How varied captions are, by their words.

    Returns:
        distinct captions and their share, vocabulary (distinct words), mean words a caption; and, with the captions
        of the training split, the share of captions that do not occur among them.
    """
    split = [_words(text, language) for text in candidates]
    found: dict[str, float | int] = {
        "distinct captions": len(set(split)),
        "distinct share": len(set(split)) / len(split),
        "vocabulary": len({word for text in split for word in text.split()}),
        "mean words": sum(len(text.split()) for text in split) / len(split),
    }
    if training:
        known = {_words(text, language) for text in training}
        found["novel share"] = sum(text not in known for text in split) / len(split)
    return found


def bootstrap(
    metrics: Mapping[str, Metric], *, resamples: int = 1000, seed: int = 0, rows: np.ndarray | None = None
) -> dict[str, tuple[float, float]]:
    """95% intervals by the percentiles of each metric over resamples of the images (Koehn 2004).

    Document frequencies of CIDEr stay those of the whole corpus, so that a resample asks how the images differ, not
    how rare a word is.

    Args:
        metrics: of the same images.
        resamples: draws of as many images as there are, with replacement; all metrics see the same draws.
        seed: of the draws.
        rows: images to draw from; None is all.
    """
    require_at_least("resamples", resamples, 1)
    parts = {name: metric.parts if rows is None else metric.parts[rows] for name, metric in metrics.items()}
    draws: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    rng = np.random.default_rng(seed)
    if not parts:
        return {}
    images = len(next(iter(parts.values())))
    step = max(1, 4_000_000 // images)
    for begin in range(0, resamples, step):
        counts = rng.multinomial(images, np.full(images, 1 / images), size=min(step, resamples - begin))
        for name, metric in metrics.items():
            draws[name].append(metric.combine(counts @ parts[name]))
    drawn = {name: np.concatenate(values) for name, values in draws.items()}
    kept = {name: values[~np.isnan(values)] for name, values in drawn.items()}
    found = {name: np.percentile(values, [2.5, 97.5]) for name, values in kept.items() if len(values)}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}
