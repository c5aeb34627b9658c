"""The data set of (embedding, caption) pairs, batches of captions of similar length, and how a batch is joined."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipcap.data.readers import read_dataset
from clipcap.data.readers.captioned import CaptionedImage
from clipcap.data.tokens import tokenize
from common.checks import UserError
from common.language import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from clipcap.data.store import EmbeddingStore

__all__ = ["CaptionDataset", "CaptionedImage", "collate", "read_dataset"]


class CaptionDataset(Dataset[dict[str, Any]]):
    """One item per caption: the image's embedding and the caption's token ids, which end with the end token.

    A caption of more than `max_tokens` tokens is cut, and a line on stderr says how many were. There is no Python
    object for each pair: rows and token ids are flat arrays.

    Args:
        items: captioned images; those that are not in the store are left out.
        store: their embeddings.
        tokenizer: of GPT-2.
        max_tokens: longest caption, its end token included.
        cache: directory where token ids are kept, memory-mapped, for the next run with this tokenizer and these
            captions; None tokenizes again.

    Raises:
        UserError: no item is in the store.
    """

    def __init__(
        self,
        items: Sequence[CaptionedImage],
        store: EmbeddingStore,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        cache: Path | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos_token, which ends captions: use a GPT-2 with one.")
        self.store = store
        kept = [item for item in items if item.image_id in store]
        texts = [caption for item in kept for caption in item.captions]
        if not texts:
            raise UserError("no captioned image is left to train on: check the messages about skipped images.")
        self.rows = np.repeat(
            np.array([store.row(item.image_id) for item in kept], np.int64), [len(item.captions) for item in kept]
        )
        self.tokens = tokenize(texts, tokenizer, cache=cache)
        self.max_tokens, self.end = max_tokens, int(tokenizer.eos_token_id)
        cut = int((self.tokens.lengths >= max_tokens).sum())
        if cut:
            print(
                f"{cut} of {len(texts)} captions have more than {max_tokens - 1} tokens and are cut there, the longest "
                f"{texts[int(self.tokens.lengths.argmax())][:60]!r}... ({self.tokens.lengths.max()} tokens).",
                file=sys.stderr,
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, ids = self.pair(index)
        return {"embedding": self.store[row], "ids": ids}

    def pair(self, index: int) -> tuple[int, list[int]]:
        """The store's row and the token ids, with the end token, of one caption."""
        return int(self.rows[index]), [*self.tokens[index][: self.max_tokens - 1], self.end]

    @property
    def lengths(self) -> np.ndarray:
        """(n,) token ids of each caption, the end token included."""
        return np.minimum(self.tokens.lengths, self.max_tokens - 1) + 1


def collate(pad_id: int) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Join items into `clip_embeddings`, `input_ids` padded to the longest, `attention_mask` and `labels`."""

    def join(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(item["ids"]) for item in items)
        ids = torch.full((len(items), longest), pad_id)
        mask = torch.zeros(len(items), longest, dtype=torch.long)
        for row, item in enumerate(items):
            ids[row, : len(item["ids"])] = torch.tensor(item["ids"])
            mask[row, : len(item["ids"])] = 1
        return {
            "clip_embeddings": torch.stack([item["embedding"] for item in items]),
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, IGNORE),
        }

    return join
