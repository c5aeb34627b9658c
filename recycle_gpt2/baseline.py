"""What a recycled model has to beat: a modified Kneser-Ney 5-gram model of the same tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from common.ngram import KneserNey, NGrams
from recycle_gpt2.blocks import TokenBlocks
from recycle_gpt2.documents import Document
from recycle_gpt2.evaluate import DocumentScore, document_score, with_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ORDER = 5
MOST_TOKENS = 1 << 24
"""Of the training text that are counted, so that memory (about 3 GB then) and time are bounded."""


def fit_ngrams(train: TokenBlocks, order: int = ORDER) -> KneserNey:
    """The model of the first MOST_TOKENS tokens of a corpus, an end token before every document."""
    ids = train.tokens(0, min(train.num_tokens, MOST_TOKENS))
    stream = np.concatenate([[train.end], ids])
    return KneserNey(stream, order=order, vocab_size=train.vocab_size, begin=train.end)


def name_of(train: TokenBlocks) -> str:
    """What the scores of `fit_ngrams` are called; it says where not all tokens were counted."""
    part = f" of the first {MOST_TOKENS:,} tokens" if train.num_tokens > MOST_TOKENS else ""
    return f"{ORDER}-gram (Kneser-Ney){part}"


def score_ngrams(
    model: NGrams, tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document]
) -> list[DocumentScore]:
    """Score every document by itself, as `score_documents` does: each token once, after an end token."""
    scores = []
    for document in documents:
        ids = with_end(tokenizer, document.text)
        if len(ids) > 1:
            nats = model.score(np.asarray(ids))[1:]
            scores.append(document_score(document, float(nats.sum()), len(nats)))
    return scores
