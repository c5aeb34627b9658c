"""Vectors of tokens that were trained elsewhere, as by fastText: the text format .vec."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from common.checks import UserError, require_file
from recycle_gpt2.formats import COMPRESSED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_vectors(path: Path, tokenizer: PreTrainedTokenizerBase) -> Float[Tensor, "v e"]:
    """A vector for each token that the file has: as the token is spelled ("Ġhuis"), or else as its word ("huis").

    The others have zero rows. Only the vectors that are wanted are held in memory.

    Args:
        path: of the form that fastText, GloVe and word2vec write: a word and its numbers in each line, separated by
            spaces, perhaps after a line with the number of words and of dimensions; also packed, as .gz.
        tokenizer: of the new language.

    Raises:
        UserError: the file is missing or of another form, or has no token of the tokenizer.
    """
    require_file(path, "vectors")
    spelled = tokenizer.get_vocab()
    words: dict[str, list[int]] = {}
    for token, index in spelled.items():
        words.setdefault(tokenizer.convert_tokens_to_string([token]).strip(), []).append(index)
    opener = COMPRESSED.get(Path(path).suffix.lower())
    width, exact = 0, set()
    rows: dict[int, np.ndarray] = {}
    with open(path, "rb") as raw:
        lines: IO[bytes] = opener(raw) if opener else raw
        for number, line in enumerate(lines, 1):
            word, _, numbers = line.rstrip(b"\r\n ").partition(b" ")
            if number == 1 and len(numbers.split()) == 1:
                continue  # the number of words, and of dimensions
            try:
                name = word.decode("utf-8")
            except UnicodeDecodeError:
                if number <= 2:
                    raise _other_form(path, number) from None
                continue  # fastText cuts long words within a character
            wanted = name in spelled or name in words
            if not wanted and number > 2:
                continue
            try:
                values = np.array(numbers.split(), dtype=np.float32)
            except ValueError:
                raise _other_form(path, number) from None
            width = width or len(values)
            if not len(values) or len(values) != width or not np.isfinite(values).all():
                raise _other_form(path, number)
            if name in spelled:
                rows[spelled[name]] = values
                exact.add(spelled[name])
            for index in words.get(name, ()):
                if index not in exact:
                    rows[index] = values
    if not rows:
        raise UserError(
            f"vectors {str(path)!r} has no token of the new tokenizer: train them on text of this language."
        )
    table = torch.zeros(len(tokenizer), width)
    for index, values in rows.items():
        table[index] = torch.from_numpy(values)
    return table


def _other_form(path: Path, number: int) -> UserError:
    return UserError(
        f"vectors {str(path)!r}, line {number} is not a word and as many numbers as in the other lines: give a .vec "
        f"file, as fastText writes it beside its .bin."
    )
