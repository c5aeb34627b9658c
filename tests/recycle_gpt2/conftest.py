"""What the recycling tests share: invented text in a language of few words, and tokenizers of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

WORDS = {
    "dutch": "de kat en het huis zijn op een mat van hout die nacht was koud water lopen huizen katten groot groter",
    "english": "the cat and a house are on one mat of wood that night was cold water walk houses cats great greater",
}

SHARES = (0.8, 0.1, 0.1)


def invent(language: str, documents: int, *, seed: int = 0) -> list[str]:
    """Documents of one to four paragraphs of random words; the same seed gives the same."""
    rng = random.Random(f"{language} {seed}")
    words = WORDS[language].split()

    def paragraph() -> str:
        return " ".join(rng.choices(words, k=rng.randint(8, 40))) + "."

    return ["\n".join(paragraph() for _ in range(rng.randint(1, 4))) for _ in range(documents)]


@pytest.fixture(scope="session")
def dutch() -> list[str]:
    """200 documents."""
    return invent("dutch", 200)


@pytest.fixture(scope="session")
def tokenizer(dutch: list[str]):
    """A tokenizer of 320 tokens for the Dutch text."""
    from recycle_gpt2.tokenizer import train_tokenizer

    return train_tokenizer(dutch, 320)


@pytest.fixture(scope="session")
def english_tokenizer():
    """A tokenizer of 310 tokens for the English text."""
    from recycle_gpt2.tokenizer import train_tokenizer

    return train_tokenizer(invent("english", 200), 310)


@pytest.fixture
def text(tmp_path: Path, dutch: list[str]) -> Path:
    """A folder of two genres: plain text at the top, and more inside a subfolder."""
    folder = tmp_path / "text"
    (folder / "news").mkdir(parents=True)
    (folder / "stories.txt").write_text("\n\n".join(dutch[:150]) + "\n", encoding="utf-8")
    (folder / "news" / "today.txt").write_text("\n\n".join(dutch[150:]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def english_models(tmp_path_factory: pytest.TempPathFactory, english_tokenizer) -> tuple[Path, Path]:
    """Directories of a small and a larger random GPT-2 of one English vocabulary; read them, do not write to them."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("english")
    made = []
    for name, layers, width in (("small", 2, 16), ("large", 3, 24)):
        torch.manual_seed(layers)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(english_tokenizer),
                n_positions=32,
                n_embd=width,
                n_layer=layers,
                n_head=2,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
        model.save_pretrained(folder / name)
        english_tokenizer.save_pretrained(folder / name)
        made.append(folder / name)
    return made[0], made[1]


@pytest.fixture
def built(text, tokenizer, tmp_path):
    """A corpus of several shards, with blocks of 32."""
    from recycle_gpt2.corpus import build_corpus

    return build_corpus([text], tokenizer, tmp_path / "corpus", block=32, shares=SHARES, chunk=4000, progress=False)


def contents(directory):
    """Every file of a corpus with its bytes."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
