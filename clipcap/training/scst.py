"""Self-critical training: captions are sampled and those with more CIDEr than the greedy one made likelier.

Rennie et al. 2017, sec. 3; the reward is CIDEr-D with the document frequencies of the training captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from clipcap.data.dataset import CaptionedImage
from clipcap.decoding import decode
from clipcap.evaluation.metrics import tokenize
from clipcap.search import Caption
from common.language import IGNORE

if TYPE_CHECKING:
    from clipcap.data.store import EmbeddingStore
    from clipcap.model import ClipCapModel

END = "endofcaption"
"""A word for the end token. Without it the highest reward is of captions that break off, as "a man riding a"."""


class CorpusCider:
    """CIDEr-D of single captions, 0 to 10, with the document frequencies of a whole corpus (Vedantam et al. 2015).

    Args:
        references: the corpus, the reference captions of each image.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        from pycocoevalcap.cider.cider_scorer import CiderScorer

        scorer = CiderScorer()
        for texts in self._words(references, ended=[[True] * len(texts) for texts in references]):
            scorer.cook_append(None, texts)
        scorer.compute_doc_freq()
        self.images, self.frequency = len(references), scorer.document_frequency

    def score(
        self, captions: Sequence[str], references: Sequence[Sequence[str]], ended: Sequence[bool] | None = None
    ) -> Float[np.ndarray, " n"]:
        """CIDEr-D of each caption against its references; `ended` says which of them end (all, when left out).

        References that several captions have in common are tokenized once.
        """
        from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs, cook_test

        scorer = CiderScorer()
        flags = [True] * len(captions) if ended is None else ended
        hypotheses = self._words([[text] for text in captions], [[flag] for flag in flags])
        images = list(dict.fromkeys(map(tuple, references)))
        truths = self._words(images, [[True] * len(texts) for texts in images])
        cooked = dict(zip(images, map(cook_refs, truths), strict=True))
        scorer.ctest = [cook_test(hypothesis) for (hypothesis,) in hypotheses]
        scorer.document_frequency = self.frequency
        rows = [cooked[tuple(texts)] for texts in references]
        scorer.crefs = _OfLength(rows, self.images)  # the scorer takes the corpus's size from it
        return np.asarray(scorer.compute_cider(), dtype=np.float64)

    @staticmethod
    def _words(texts: Sequence[Sequence[str]], ended: Sequence[Sequence[bool]]) -> list[list[str]]:
        split, _ = tokenize({str(row): list(several) for row, several in enumerate(texts)}, "words")
        return [
            [f"{text} {END}".strip() if flag else text for text, flag in zip(split[str(row)], flags, strict=True)]
            for row, flags in enumerate(ended)
        ]


class _OfLength(list[Any]):
    """A list that says it is as long as the corpus that its rows are a part of."""

    def __init__(self, rows: list[Any], length: int) -> None:
        super().__init__(rows)
        self.length = length

    def __len__(self) -> int:
        return self.length


class ReferencedImages(Dataset[dict[str, Any]]):
    """One item per image: its embedding and its reference captions."""

    def __init__(self, items: Sequence[CaptionedImage], store: EmbeddingStore) -> None:
        self.store, self.items = store, [item for item in items if item.image_id in store]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        return {"embedding": self.store[self.store.row(item.image_id)], "references": list(item.captions)}


def join_images(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of `ReferencedImages`: `clip_embeddings` (b, e) and `references`."""
    return {
        "clip_embeddings": torch.stack([item["embedding"] for item in items]),
        "references": [item["references"] for item in items],
    }


def self_critical_loss(
    log_probs: Float[Tensor, "n t"], counted: Float[Tensor, "n t"], advantage: Float[Tensor, " n"]
) -> Float[Tensor, ""]:
    """-Σ (r - b) log p(token) over all counted tokens, not divided by their number (Rennie et al. 2017, eq. 7)."""
    return -(advantage[:, None] * log_probs * counted).sum()


def rewarded_samples(
    model: ClipCapModel,
    embeddings: Float[Tensor, "b ..."],
    references: Sequence[Sequence[str]],
    cider: CorpusCider,
    *,
    samples: int,
    max_new_tokens: int,
) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n t"], Float[Tensor, " n"], Float[Tensor, " b"]]:
    """Sample captions of each image and reward them.

    Returns:
        Token ids of `samples` captions for each image, n = b * samples; labels, the same with IGNORE at padding;
        advantages, their CIDEr less that of the greedy caption; and the CIDEr of the greedy captions.
    """
    with torch.autocast(embeddings.device.type, enabled=False):  # decoding packs weights for their own precision
        best = decode(model, embeddings, strategy="greedy", max_new_tokens=max_new_tokens)
        found = decode(model, embeddings, strategy="sample", num_captions=samples, max_new_tokens=max_new_tokens)
    greedy = [captions[0] for captions in best]
    drawn = [caption for captions in found for caption in captions]
    several = [references[row // samples] for row in range(len(drawn))]
    rewards = _reward(model, [*greedy, *drawn], [*references, *several], cider)
    baseline, reward = rewards[: len(greedy)], rewards[len(greedy) :]
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(caption.token_ids) for caption in drawn], batch_first=True, padding_value=IGNORE
    ).to(embeddings.device)
    advantage = torch.from_numpy(reward - np.repeat(baseline, samples)).float().to(embeddings.device)
    return ids.clamp(min=0), ids, advantage, torch.from_numpy(baseline).float()


def token_log_probs(
    model: ClipCapModel, embeddings: Float[Tensor, "n ..."], ids: Int[Tensor, "n t"], labels: Int[Tensor, "n t"]
) -> Float[Tensor, "n t"]:
    """Log-probability of each token, with its gradient; 0 where labels are IGNORE."""
    logits = model(embeddings, ids).logits
    nats = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return -nats.view(labels.shape)


def _reward(
    model: ClipCapModel, captions: Sequence[Caption], references: Sequence[Sequence[str]], cider: CorpusCider
) -> Float[np.ndarray, " n"]:
    assert model.tokenizer is not None
    end = model.config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    texts = [model.tokenizer.decode(caption.token_ids, skip_special_tokens=True).strip() for caption in captions]
    return cider.score(texts, references, [caption.token_ids[-1] in ends for caption in captions])
