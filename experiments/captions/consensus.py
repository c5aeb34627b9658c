"""Captions without a language model: of the nearest photograph, the consensus of many, and one for all (baselines).

Devlin et al. 2015, "Exploring nearest neighbor approaches for image captioning": the captions of an image's nearest
training images are candidates, and the one most like the others is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer

from clipcap.evaluation.metrics import tokenize

ORDERS = (1, 2, 3, 4)


def caption_vectors(captions: Sequence[str], images: Sequence[int]) -> csr_matrix:
    """(n, grams): rows whose products are the cosine of TF-IDF over n-grams, averaged over n = 1 to 4, as in CIDEr.

    Args:
        captions: texts.
        images: number of each caption's image; document frequencies are of images (Vedantam et al. 2015, sec. 4).
    """
    words, _ = tokenize({str(row): [text] for row, text in enumerate(captions)}, "words")
    texts = [words[str(row)][0] for row in range(len(captions))]
    documents: dict[int, list[str]] = {}
    for text, image in zip(texts, images, strict=True):
        documents.setdefault(image, []).append(text)
    parts = []
    for order in ORDERS:
        counts = TfidfVectorizer(ngram_range=(order, order), token_pattern=r"\S+", smooth_idf=False)
        counts.fit([" \n ".join(several) for several in documents.values()])
        parts.append(counts.transform(texts) / len(ORDERS) ** 0.5)
    return hstack(parts).tocsr()


def neighbours(
    queries: Float[np.ndarray, "q e"], embeddings: Float[np.ndarray, "n e"], count: int
) -> Int[np.ndarray, "q k"]:
    """Rows of `embeddings` with the largest cosine to each query, best first."""
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, embeddings)]
    return np.argsort(-(unit[0] @ unit[1].T), axis=1, kind="stable")[:, :count]


def consensus(vectors: csr_matrix, candidates: Sequence[int]) -> int:
    """The candidate most similar to all of them together."""
    rows = vectors[list(candidates)]
    return candidates[int(np.argmax(rows @ np.asarray(rows.sum(axis=0)).ravel()))]
