"""The tokenizer keeps any text, is saved as Hugging Face loads it, and says when the text is too small for it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.checks import UserError
from common.files import MARKER
from recycle_gpt2 import tokenizer as module
from recycle_gpt2.documents import read_documents
from recycle_gpt2.tokenizer import (
    TokenizerConfig,
    load_tokenizer,
    run,
    save_tokenizer,
    texts_but_test,
    tokenizer_hash,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """The tokenizer, written and read."""
    return load_tokenizer(save_tokenizer(tokenizer, tmp_path_factory.mktemp("tokenizer") / "new"))


def test_lossless_on_any_unicode(saved):
    @settings(max_examples=300, deadline=None)
    @given(st.text(st.characters(exclude_categories=("Cs",))))
    def check(text: str) -> None:
        assert saved.decode(saved(text).input_ids) == text

    check()
    for text in (" 's  n't ,\n\n . ?", "\r\n\t\0", "é e\u0301 ñ ﬁ 你好 👩‍👩‍👧 \U0010ffff", "'t Huis , en . zo !"):
        assert saved.decode(saved(text).input_ids) == text


def test_vocabulary(tokenizer, saved, dutch):
    assert len(saved) == 320 and saved.eos_token_id == saved.bos_token_id == 0
    assert saved.is_fast and saved.convert_ids_to_tokens(0) == "<|endoftext|>"
    assert saved(dutch[0]).input_ids == tokenizer(dutch[0]).input_ids
    assert len(saved(dutch[0]).input_ids) < 0.6 * len(dutch[0])  # words are merged
    assert set(range(257)) <= set(saved.get_vocab().values())


def test_auto_tokenizer_loads_it(tokenizer, tmp_path):
    from transformers import AutoTokenizer, GPT2Config

    save_tokenizer(tokenizer, tmp_path)
    GPT2Config(vocab_size=320).save_pretrained(tmp_path)  # as in a model's directory
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found("de kat op  het huis.\n").input_ids == tokenizer("de kat op  het huis.\n").input_ids
    assert found.decode(found("de kat , en het huis .").input_ids) == "de kat , en het huis ."
    assert tokenizer_hash(found) == tokenizer_hash(tokenizer)


def test_hash_tells_tokenizers_apart(tokenizer, english_tokenizer):
    assert tokenizer_hash(tokenizer) != tokenizer_hash(english_tokenizer)


def test_same_text_same_tokenizer(tokenizer, dutch):
    assert tokenizer_hash(train_tokenizer(iter(dutch), 320)) == tokenizer_hash(tokenizer)


def test_too_little_text():
    with pytest.raises(UserError, match=r"vocab_size is 1000 but the text supports \d+ tokens"):
        train_tokenizer(["de kat en de kat"], 1000)
    with pytest.raises(UserError, match="0 documents"):
        train_tokenizer([], 300)
    with pytest.raises(UserError, match="vocab_size is 256: use at least 257"):
        train_tokenizer(["de kat"], 256)


def test_the_size_that_is_left_out_goes_with_the_text(dutch, monkeypatch):
    monkeypatch.setattr(module, "FEWEST", 270)
    monkeypatch.setattr(module, "VOCAB_SIZE", 320)
    size = sum(len(text.encode()) for text in dutch)
    for bytes_a_token, expected in ((size, 270), (size // 300, size // (size // 300)), (1, 320)):
        monkeypatch.setattr(module, "BYTES_A_TOKEN", bytes_a_token)
        found = train_tokenizer(iter(dutch))
        assert len(found) == expected
        assert tokenizer_hash(found) == tokenizer_hash(train_tokenizer(dutch, expected))
    assert 257 <= len(train_tokenizer(["de kat en de kat"])) < 270  # what so little text supports


def test_the_supported_number_is_enough(dutch):
    with pytest.raises(UserError) as error:
        train_tokenizer(dutch, 100_000)
    supported = int(str(error.value).split("supports ")[1].split()[0])
    assert len(train_tokenizer(dutch, supported)) == supported


def test_other_end_token():
    tokenizer = train_tokenizer(["de kat en de kat"], 258, end_token="<end>")
    assert tokenizer.eos_token == "<end>" and tokenizer.eos_token_id == 0


def test_run(text, tmp_path, capsys):
    run(TokenizerConfig(text=(text,), out=tmp_path / "out", vocab_size=300))
    assert len(load_tokenizer(tmp_path / "out")) == 300
    assert "300 tokens" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [MARKER]
    run(TokenizerConfig(text=(text,), out=tmp_path / "out", vocab_size=290))
    assert len(load_tokenizer(tmp_path / "out")) == 290


def test_the_documents_that_are_held_out_for_the_test_are_not_seen(text, tmp_path, tokenizer):
    from recycle_gpt2.corpus import build_corpus, load_documents

    shares = (0.6, 0.1, 0.3)
    seen = list(texts_but_test(read_documents([text]), shares, 5))
    corpus = build_corpus([text], tokenizer, tmp_path / "corpus", block=32, shares=shares, seed=5, progress=False)
    held_out = {document.text for document in load_documents(corpus, "test")}
    assert len(held_out) > 20 and held_out.isdisjoint(seen)
    assert len(seen) + len(held_out) == len(list(read_documents([text])))
    run(TokenizerConfig((text,), tmp_path / "out", vocab_size=300, shares=shares, seed=5))
    assert tokenizer_hash(load_tokenizer(tmp_path / "out")) == tokenizer_hash(train_tokenizer(seen, 300))


def test_what_lies_there_is_not_replaced_and_the_text_not_read(text, tmp_path, tokenizer, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "other")
    before = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    monkeypatch.setattr("recycle_gpt2.tokenizer.train_tokenizer", None)
    with pytest.raises(UserError, match="which was not written by this command: move it away"):
        run(TokenizerConfig(text=(text,), out=tmp_path / "other", vocab_size=300))
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()} == before


def test_a_full_disk_is_one_line_and_leaves_the_tokenizer_that_was_there(text, tmp_path, monkeypatch):
    run(TokenizerConfig(text=(text,), out=tmp_path / "out", vocab_size=300))

    def full(self, *args, **kwargs):  # what the library in Rust raises
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(OSError, match=r"No space left on device: .*out'"):
        run(TokenizerConfig(text=(text,), out=tmp_path / "out", vocab_size=290))
    with pytest.raises(OSError, match="No space left"):
        save_tokenizer(load_tokenizer(tmp_path / "out"), tmp_path / "out")
    assert len(load_tokenizer(tmp_path / "out")) == 300
    assert {path.name for path in tmp_path.iterdir()} == {"text", "out"}


def test_unreadable(tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)
