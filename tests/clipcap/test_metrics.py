"""Caption metrics against pycocoevalcap itself, and against their formulas written plainly."""

import random
import shutil

import numpy as np
import pytest

from clipcap.evaluation import metrics
from clipcap.evaluation.clip_score import PROMPT, clip_scores, measure_clip
from clipcap.evaluation.metrics import (
    Metric,
    bootstrap,
    diversity,
    mean_metric,
    measure,
    sacrebleu_score,
    score_captions,
    tokenize,
)
from common.checks import UserError

REFERENCES = {
    "1": ["A red cube, next to a ball.", "There's one red cube and a ball!", "a cube and a ball"],
    "2": ["Two dogs don't run on the beach.", "dogs at the seaside"],
    "3": ["A man's hat (black) on a table; it is old.", "a black hat"],
}
CANDIDATES = {"1": "a red cube and a ball", "2": "two dogs run on a beach", "3": "a hat on a table"}

needs_java = pytest.mark.skipif(not shutil.which("java"), reason="Java is not installed")


def corpus(images=20, seed=0):
    rng = random.Random(seed)
    words = "a the red blue running run dogs dog cube cubes on of with big large table man quickly".split()

    def text():
        return " ".join(rng.choices(words, k=rng.randint(2, 12)))

    references = {str(i): [text() for _ in range(rng.randint(1, 5))] for i in range(images)}
    return {key: rng.choice([text(), texts[0]]) for key, texts in references.items()}, references


@needs_java
def test_words_agrees_with_ptb():
    assert tokenize(REFERENCES, "words")[0] == tokenize(REFERENCES, "ptb")[0]


@needs_java
def test_ptb_keeps_line_ends_and_empty_captions_in_their_place():
    found, _ = tokenize({"a": ["", "one\rtwo\u2028three\nfour"], "b": ["five"], "c": ["", " "]}, "ptb")
    assert found == {"a": ["", "one two three four"], "b": ["five"], "c": ["", ""]}


def test_words_without_java():
    found, name = tokenize({"1": ['A red-ish cube; it isn\'t "big".']}, "words")
    assert found == {"1": ["a red-ish cube it is n't big"]} and name == "words"


def test_captions_in_any_script_are_split_into_their_words(no_java):
    found, name = tokenize(
        {"1": ["एक छोटी बिल्ली।", "हिन्दी"], "2": ["一只猫。"], "3": ["L'homme «rouge»"]}, "auto", "hi"
    )
    assert name == "words"
    assert found == {"1": ["एक छोटी बिल्ली", "हिन्दी"], "2": ["一 只 猫"], "3": ["l'homme rouge"]}
    hindi = {"1": ["एक छोटी बिल्ली मेज़ पर है।"], "2": ["लाल घन के पास नीली गेंद है।"]}
    scores, name, absent = measure({key: several[0] for key, several in hindi.items()}, hindi, language="hi")
    assert name == "words" and scores["BLEU-4"].value == pytest.approx(1) and set(absent) == {"METEOR", "SPICE"}
    assert absent["METEOR"] == "it is English's, the captions' language is 'hi'"
    with pytest.raises(UserError, match="tokenizer is 'ptb', which is English's, but language is 'hi'"):
        tokenize(hindi, "ptb", "hi")


def test_a_chinese_caption_is_not_one_word():
    given, references = {"1": "一只白色的小猫"}, {"1": ["一只黑色的小猫"]}
    assert 0.5 < measure(given, references, tokenizer="words", language="zh")[0]["BLEU-1"].value < 1
    assert diversity(["一只白色的小猫"], language="zh")["mean words"] == 7
    value, signature = sacrebleu_score(["一只白色的小猫"], [["一只白色的小猫"]])
    assert value == pytest.approx(1) and "tok:char" in signature


def test_scores_are_pycocoevalcaps(no_java):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    hypotheses, _ = tokenize({k: [v] for k, v in CANDIDATES.items()}, "words")
    truths, _ = tokenize(REFERENCES, "words")
    bleu, bleu_each = Bleu(4).compute_score(truths, hypotheses, verbose=0)
    cider, cider_each = Cider().compute_score(truths, hypotheses)
    rouge, rouge_each = Rouge().compute_score(truths, hypotheses)

    scores = score_captions(CANDIDATES, REFERENCES, tokenizer="words")
    assert list(scores.bleu) == bleu and scores.cider == cider
    assert list(scores.cider_per_image.values()) == list(cider_each)

    found, name, absent = measure(CANDIDATES, REFERENCES, tokenizer="words")
    assert name == "words" and "CIDEr" not in absent
    assert [found[f"BLEU-{n}"].value for n in (1, 2, 3, 4)] == bleu
    assert [found[f"BLEU-{n}"].per_image.tolist() for n in (1, 2, 3, 4)] == bleu_each
    assert found["CIDEr"].value == cider and found["ROUGE-L"].value == rouge
    assert found["ROUGE-L"].per_image.tolist() == list(rouge_each)


@needs_java
@pytest.mark.slow
def test_everything_is_cocoevalcaps_own_output(monkeypatch, capfd):
    """All of COCOEvalCap on the same input, without SPICE, whose parser is fetched by it."""
    from pycocoevalcap import eval as coco_eval

    class Annotations:
        def __init__(self, texts):
            self.imgToAnns = {key: [{"caption": text} for text in several] for key, several in texts.items()}

        def getImgIds(self):  # noqa: N802
            return list(self.imgToAnns)

    class NoSpice:
        def compute_score(self, gts, res):
            return 0.0, [0.0] * len(gts)

        def method(self):
            return "none"

    monkeypatch.setattr(coco_eval, "Spice", NoSpice)
    candidates, references = corpus(12)  # some candidates are references, word for word
    candidates |= CANDIDATES | {"empty": ""}
    references |= REFERENCES | {"empty": ["a dog"]}
    theirs = coco_eval.COCOEvalCap(Annotations(references), Annotations({k: [v] for k, v in candidates.items()}))
    theirs.evaluate()
    capfd.readouterr()

    seen = []
    found, name, absent = measure(candidates, references, tokenizer="ptb", progress=seen.append)
    assert capfd.readouterr() == ("", "")
    assert name == "ptb" and seen[-1] == len(candidates)
    ours = {f"Bleu_{n}": found[f"BLEU-{n}"] for n in (1, 2, 3, 4)}
    ours |= {"METEOR": found["METEOR"], "ROUGE_L": found["ROUGE-L"], "CIDEr": found["CIDEr"]}
    for metric, value in ours.items():
        assert value.value == theirs.eval[metric], metric
        assert value.per_image.tolist() == [theirs.imgToEval[key][metric] for key in candidates], metric
    check_parts(found)


def check_parts(found):
    """The parts of all images give the corpus's score, those of one image its own."""
    for name, metric in found.items():
        everything = np.arange(len(metric.per_image))
        assert metric.of(everything) == pytest.approx(metric.value, abs=1e-9), name
        assert [metric.of(np.array([i])) for i in everything] == pytest.approx(metric.per_image.tolist(), abs=1e-9), (
            name
        )


def test_parts_add_up_to_any_subset(no_java):
    candidates, references = corpus()
    candidates["empty"], references["empty"] = "", ["a dog"]
    found, _, _ = measure(candidates, references, tokenizer="words")
    check_parts(found)
    keys = list(candidates)[3:12]
    part, _, _ = measure({k: candidates[k] for k in keys}, references, tokenizer="words")
    for name in ("BLEU-4", "ROUGE-L"):  # CIDEr's document frequencies are the whole corpus's
        assert found[name].of(np.arange(3, 12)) == pytest.approx(part[name].value, abs=1e-9), name


@needs_java
def test_java_that_dies_is_not_measured_and_nothing_hangs(monkeypatch, tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found, name, absent = measure(CANDIDATES, REFERENCES)
    assert (
        name == "words" and "METEOR" in absent and "failed" in absent["METEOR"] and "failed" in absent["PTB tokenizer"]
    )
    assert found["CIDEr"].value == score_captions(CANDIDATES, REFERENCES, tokenizer="words").cider
    with pytest.raises(UserError, match="java -version"):
        measure(CANDIDATES, REFERENCES, tokenizer="ptb")


def test_without_java_what_needs_it_is_named(no_java):
    found, name, absent = measure(CANDIDATES, REFERENCES)
    assert name == "words" and set(found) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"}
    assert set(absent) == {"PTB tokenizer", "METEOR", "SPICE"} and all("Java" in reason for reason in absent.values())
    with pytest.raises(UserError, match="'ptb' but Java"):
        measure(CANDIDATES, REFERENCES, tokenizer="ptb")


def test_spice_is_measured_where_its_parser_is(monkeypatch):
    from pycocoevalcap.spice import spice

    class Spice:
        def compute_score(self, gts, res):
            ids = sorted(gts)
            print("chatter")
            return 0.0, [{"All": {"f": float(key) / 10}} for key in ids]

    monkeypatch.setattr(spice, "Spice", Spice)
    monkeypatch.setattr(metrics.shutil, "which", lambda name: "java")
    with pytest.raises(metrics.NotMeasured, match=r"stanford-corenlp-3.6.0.jar"):
        metrics._spice({"2": ["a"], "1": ["b"]}, {"2": ["a"], "1": ["b"]})
    monkeypatch.setattr(metrics, "SPICE_JARS", ())
    found = metrics._spice({"2": ["a"], "1": ["b"]}, {"2": ["a"], "1": ["b"]})
    assert found.per_image.tolist() == [0.2, 0.1] and found.value == pytest.approx(0.15)


def test_perfect_captions_beat_wrong_ones():
    right = score_captions({k: v[0] for k, v in REFERENCES.items()}, REFERENCES, tokenizer="words")
    wrong = score_captions(dict.fromkeys(REFERENCES, "nothing of that kind here"), REFERENCES, tokenizer="words")
    assert right.bleu[3] == pytest.approx(1.0, abs=1e-6) and right.cider > 3
    assert wrong.bleu[3] < 1e-4 and wrong.cider < 0.01


def test_order_of_ids_does_not_matter():
    backwards = {k: CANDIDATES[k] for k in reversed(CANDIDATES)}
    one, two = (score_captions(c, REFERENCES, tokenizer="words") for c in (CANDIDATES, backwards))
    assert one.cider_per_image == pytest.approx(two.cider_per_image)


def test_clip_score_is_its_formula():
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(5, 7)), rng.normal(size=(5, 7))
    references = [rng.normal(size=(n, 7)) for n in (1, 2, 3, 1, 4)]
    references[0] = -texts[:1]  # nothing in common: RefCLIPScore is 0
    images[1] = texts[1] * 3

    def cosine(a, b):
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    plain, with_references = [], []
    for image, text, several in zip(images, texts, references, strict=True):
        score = 2.5 * max(cosine(image, text), 0)
        nearest = max(max(cosine(text, one) for one in several), 0)
        plain.append(score)
        with_references.append(0 if score + nearest == 0 else 2 * score * nearest / (score + nearest))
    found, found_with = clip_scores(images, texts, references)
    assert found.tolist() == pytest.approx(plain) and found_with.tolist() == pytest.approx(with_references)
    assert found[1] == pytest.approx(2.5) and found_with[0] == 0
    assert clip_scores(images, texts)[1] is None


def test_clip_score_puts_its_words_before_captions(clip_directory, photos):
    from clipcap.data.images import read_image
    from common.clip import load_clip

    clip = load_clip(clip_directory, device="cpu")
    paths = [photos / "00.jpg", photos / "01.jpg", photos / "02.png"]
    texts = ["a red cube", "a blue ball", "a red cube"]
    found = measure_clip(clip, paths, texts, [["a ball"], ["a cube", "a red ball"], ["a ball"]], batch_size=2)
    pixels = clip.preprocess([read_image(path) for path in paths])
    plain, _ = clip_scores(
        clip.encode_images(pixels).numpy(), clip.encode_texts([PROMPT + text for text in texts]).numpy()
    )
    assert PROMPT == "A photo depicts "
    assert found["CLIPScore"].per_image.tolist() == pytest.approx(plain.tolist(), abs=1e-5)
    assert found["RefCLIPScore"].value == pytest.approx(found["RefCLIPScore"].per_image.mean())


def test_bootstrap_is_resampling():
    rng = np.random.default_rng(1)
    each = rng.normal(size=40)
    pair = np.stack([rng.random(40), rng.random(40) + 1], axis=1)
    ratio = Metric(0.0, each, pair, lambda sums: sums[..., 0] / sums[..., 1])
    found = bootstrap({"mean": mean_metric(each.tolist()), "ratio": ratio}, resamples=2000, seed=3)
    counts = np.random.default_rng(3).multinomial(40, np.full(40, 1 / 40), size=2000)
    means, ratios = [], []
    for row in counts:
        drawn = np.repeat(np.arange(40), row)
        means.append(each[drawn].mean())
        ratios.append(pair[drawn, 0].sum() / pair[drawn, 1].sum())
    assert found["mean"] == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))
    assert found["ratio"] == pytest.approx(tuple(np.percentile(ratios, [2.5, 97.5])))
    error = each.std() / np.sqrt(40)
    assert found["mean"][1] - found["mean"][0] == pytest.approx(2 * 1.96 * error, rel=0.1)
    part = bootstrap({"mean": mean_metric(each.tolist())}, seed=3, rows=np.array([4, 4, 4]))
    assert part["mean"] == pytest.approx((each[4], each[4]))
    assert bootstrap({"mean": mean_metric(each.tolist())}, seed=3) == bootstrap(
        {"mean": mean_metric(each.tolist())}, seed=3
    )


def test_sacrebleu_with_as_many_references_as_each_image_has():
    value, signature = sacrebleu_score(["A red cube and a ball", "two dogs"], [REFERENCES["1"], ["two dogs"]])
    assert 0 < value <= 1 and "nrefs:var" in signature and "case:lc" in signature
    assert sacrebleu_score(["Some four word text"], [["some four word text"]])[0] == pytest.approx(1)


def test_diversity():
    found = diversity(["A cat.", "a cat", "two red dogs"], ["a  CAT", "a bird"])
    assert found == {
        "distinct captions": 2,
        "distinct share": pytest.approx(2 / 3),
        "vocabulary": 5,
        "mean words": pytest.approx(7 / 3),
        "novel share": pytest.approx(1 / 3),
    }
    assert "novel share" not in diversity(["a cat"])


def test_bad_input():
    with pytest.raises(UserError, match="no caption"):
        score_captions({}, REFERENCES)
    with pytest.raises(UserError, match="'7' has no reference"):
        score_captions({"7": "x"}, REFERENCES)
    with pytest.raises(UserError, match="tokenizer is 'penn'"):
        tokenize(REFERENCES, "penn")
    with pytest.raises(UserError, match="resamples is 0"):
        bootstrap({"mean": mean_metric([1.0])}, resamples=0)
