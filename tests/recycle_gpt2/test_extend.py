"""An extended vocabulary: English is tokenized and scored as before, and the new language takes fewer tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from common.checks import UserError
from common.gpt2 import load_gpt2, token_table
from common.runtime import RuntimeConfig
from recycle_gpt2.blocks import TokenBlocks
from recycle_gpt2.corpus import build_corpus
from recycle_gpt2.extend import EnglishConfig, extend_tokenizer, extends
from recycle_gpt2.lexical import INITIALISATIONS, RowsConfig, replace_lexical
from recycle_gpt2.replay import WithReplay
from recycle_gpt2.rows import new_rows
from recycle_gpt2.run import RunConfig, recycle
from recycle_gpt2.stages import FinetuneConfig, finetune
from recycle_gpt2.tokenizer import TokenizerConfig, load_tokenizer, save_tokenizer
from recycle_gpt2.tokenizer import run as run_tokenizer
from recycle_gpt2.training import StageConfig
from tests.recycle_gpt2.conftest import SHARES, invent

ADDED = 20


@pytest.fixture(scope="module")
def english() -> list[str]:
    return invent("english", 60, seed=9)


@pytest.fixture(scope="module")
def extended(english_tokenizer, dutch, english):
    return extend_tokenizer(english_tokenizer, dutch, ADDED, keep=english)


def test_english_is_tokenized_as_before_and_dutch_in_fewer_tokens(
    english_tokenizer, extended, english, dutch, tmp_path
):
    assert len(extended) == 310 + ADDED and extends(english_tokenizer, extended)
    assert not extends(extended, english_tokenizer) and not extends(english_tokenizer, english_tokenizer)
    saved = load_tokenizer(save_tokenizer(extended, tmp_path / "tokenizer"))
    for tokenizer in (extended, saved):
        assert tokenizer.eos_token_id == english_tokenizer.eos_token_id
        for text in english:
            assert tokenizer(text).input_ids == english_tokenizer(text).input_ids
        before, after = (sum(len(one(text).input_ids) for text in dutch) for one in (english_tokenizer, tokenizer))
        assert after < 0.9 * before
        assert all(tokenizer.decode(tokenizer(text).input_ids) == text for text in dutch[:20])


def test_merges_are_those_of_the_plain_algorithm(english_tokenizer, dutch, english):
    """Count all pairs, merge the commonest that no English word has, and count again."""
    words = Counter(word for text in dutch for word in text.replace("\n", " \n ").replace(".", " .").split(" "))
    words = Counter({word: number for word, number in words.items() if word.isalpha()})
    pieces = {word: english_tokenizer.tokenize(" " + word) for word in words}
    english_words = {word for text in english for word in text.replace(".", " ").split()}
    kept = {pair for word in english_words for pair in pairwise(english_tokenizer.tokenize(" " + word))}
    found = []
    for _ in range(ADDED):
        counts = Counter()
        for word, number in words.items():
            for pair in pairwise(pieces[word]):
                counts[pair] += number
        allowed = [pair for pair in counts if pair not in kept and "".join(pair) not in english_tokenizer.get_vocab()]
        best = min(allowed, key=lambda pair: (-counts[pair], pair))
        found.append("".join(best))
        for word, parts in pieces.items():
            joined, index = [], 0
            while index < len(parts):
                two = tuple(parts[index : index + 2]) == best
                joined.append("".join(parts[index : index + 1 + two]))
                index += 1 + two
            pieces[word] = joined
    texts = [" " + " ".join(word for word in words for _ in range(words[word]))]
    extended = extend_tokenizer(english_tokenizer, texts, ADDED, keep=[" " + " ".join(sorted(english_words))])
    assert extended.convert_ids_to_tokens(list(range(310, 310 + ADDED))) == found


def test_only_byte_level_bpe_and_what_the_text_supports(english_tokenizer, dutch):
    from recycle_gpt2.tokenizer import TokenizerOptions, train_tokenizer

    with pytest.raises(UserError, match=r"extend is 100000 but the text supports \d+ tokens"):
        extend_tokenizer(english_tokenizer, dutch, 100_000)
    with pytest.raises(UserError, match="'Unigram': only byte-level BPE"):
        extend_tokenizer(train_tokenizer(dutch, 270, options=TokenizerOptions(pieces="unigram")), dutch, 5)


@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_logits_of_english_are_unchanged_before_training(
    initialisation, english_models, extended, english, text, tmp_path
):
    corpus = build_corpus([text], extended, tmp_path / "corpus", block=16, shares=SHARES, progress=False)
    model, english_tokenizer = load_gpt2(english_models[0], frozen=True)
    ids = torch.tensor([english_tokenizer(english[0]).input_ids[:30]])
    expected = model(ids).logits
    config = RowsConfig(initialisation=initialisation)
    rows = new_rows(config, model, english_tokenizer, extended, TokenBlocks(corpus, "train"), seed=0)
    replace_lexical(model, extended, *rows)
    found = model(torch.tensor([extended(english[0]).input_ids[:30]])).logits
    assert found.shape[-1] == 310 + ADDED
    assert torch.equal(found[..., :310], expected)


def test_replayed_blocks_are_the_share_that_was_asked(built, tokenizer, english, tmp_path):
    (tmp_path / "english.txt").write_text("\n\n".join(english))
    train = TokenBlocks(built, "train")
    other = TokenBlocks(
        build_corpus([tmp_path / "english.txt"], tokenizer, tmp_path / "e", block=32, shares=SHARES), "train"
    )
    for share in (0.25, 0.5, 0.9):
        both = WithReplay(train, other, share)
        assert both.replayed / len(both) == pytest.approx(share, abs=0.01)
        assert all(torch.equal(both[i], train[i]) for i in (0, len(train) - 1))
        taken = [both[len(train) + i] for i in range(both.replayed)]
        known = [other[i] for i in range(len(other))]
        assert all(any(torch.equal(block, one) for one in known) for block in taken)
        if both.replayed <= len(other):
            assert len({tuple(block.tolist()) for block in taken}) == both.replayed  # none twice
    assert len(WithReplay(train, other, 0)) == len(train)
    with pytest.raises(IndexError):
        both[len(both)]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (EnglishConfig(replay=1.0, english=("x",)), "replay is 1: use a share"),
        (EnglishConfig(replay=0.1), "replay is 0.1 but there is no English text"),
        (EnglishConfig(english=("x",)), "neither extend nor replay reads it"),
        (EnglishConfig(extend=-1), "extend is -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(kept, message):
    with pytest.raises(UserError, match=message):
        kept.check()


def test_commands_that_cannot_work_are_refused(tmp_path, text, built):
    with pytest.raises(UserError, match="model is '' and extend 5: give both"):
        run_tokenizer(TokenizerConfig(text=(text,), out=tmp_path / "t", extend=5))
    with pytest.raises(UserError, match="vocab_size, pieces, split_pattern and nfc are of a new tokenizer"):
        run_tokenizer(TokenizerConfig(text=(text,), out=tmp_path / "t", extend=5, model="tiny", vocab_size=300))
    with pytest.raises(UserError, match="replay is 0.5 and English None: give both"):
        finetune(FinetuneConfig(model=tmp_path, corpus=built, out=tmp_path / "f", replay=0.5))
    with pytest.raises(UserError, match="nothing is fine-tuned"):
        recycle(
            RunConfig(
                text=(text,), out=tmp_path / "o", language="nld", unfreeze="none",
                kept=EnglishConfig(english=(text,), replay=0.5),
            )
        )  # fmt: skip


@pytest.mark.slow
def test_a_run_that_extends_replays_and_aligns(english_models, text, english, tmp_path, capsys):
    """The large model's English rows are its own until it is trained, and replay leaves it better at English."""
    (tmp_path / "english.txt").write_text("\n\n".join(english))
    config = RunConfig(
        text=(text,),
        out=tmp_path / "both",
        language="nld",
        small=str(english_models[0]),
        large=str(english_models[1]),
        block=32,
        shares=SHARES,
        large_share=0,
        finetune_share=4,
        finetune_lr=1e-2,
        kept=EnglishConfig(extend=ADDED, english=(tmp_path / "english.txt",), replay=0.5),
        rows=RowsConfig(initialisation="subwords"),
        stage=StageConfig(tokens=2 * 8 * 32, batch_size=8, optimizer="adamw"),
        runtime=RuntimeConfig(device="cpu"),
    )
    recycle(config)
    aligned, _ = load_gpt2(tmp_path / "both.stages" / "align" / "model")
    large, english_tokenizer = load_gpt2(english_models[1])
    assert torch.equal(token_table(aligned)[:310], token_table(large))
    recycle(config)  # nothing is made again
    assert "made of another" not in capsys.readouterr().out
    without = replace(config, out=tmp_path / "without", kept=replace(config.kept, replay=0.0))
    recycle(without)
    losses = []
    for out in (config.out, without.out):
        model, tokenizer = load_gpt2(out, frozen=True)
        assert extends(english_tokenizer, tokenizer)
        ids = torch.tensor(
            [tokenizer(one).input_ids[:30] for one in english[:20] if len(tokenizer(one).input_ids) >= 30]
        )
        losses.append(model(ids, labels=ids).loss.item())
    assert losses[0] < losses[1] - 0.1
