"""Token blocks of a finished corpus, as a memory-mapped data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from common.checks import UserError, require_at_least, require_one_of
from common.language import IGNORE
from recycle_gpt2.corpus import REBUILD, SPLITS, read_manifest
from recycle_gpt2.shards import shard_path


class TokenBlocks(Dataset[Tensor]):
    """Token ids (block,) int64 of one split, from the memory map; every token of the corpus is in exactly one block.

    The last block is filled up with end tokens where the tokens do not fill it; `labels` leaves these out of the loss.

    Attributes:
        num_tokens: tokens of the split, without the fill.
        vocab_size: of the tokenizer.
        tokenizer: its `tokenizer_hash`.
        end: id of the end token.
        block: tokens in a block.
    """

    def __init__(self, directory: Path, split: str, *, block: int | None = None) -> None:
        """Open a split of a corpus that `build_corpus` has written.

        Args:
            directory: of the corpus.
            split: train, valid or test.
            block: tokens in a block; None takes the corpus's own.

        Raises:
            UserError: the corpus is not finished or a shard is cut short, train is shorter than a block, or the
                split has no token.
        """
        require_one_of("split", split, SPLITS)
        manifest = read_manifest(directory)
        self.block = manifest["block"] if block is None else block
        require_at_least("block", self.block, 2)
        self.vocab_size, self.end, self.tokenizer = manifest["vocab_size"], manifest["end"], manifest.get("tokenizer")
        self._dtype = np.dtype(manifest["dtype"])
        lengths = [(number, shard[split]) for number, shard in enumerate(manifest["shards"]) if shard[split]]
        self._files = [shard_path(Path(directory) / "shards", number, f"{split}.bin") for number, _ in lengths]
        self._begins = np.cumsum([0, *(length for _, length in lengths)])
        self.num_tokens = int(self._begins[-1])
        if not self.num_tokens:
            raise UserError(f"corpus {str(directory)!r} has no token in {split}: build it with a share for {split}.")
        if split == "train" and self.num_tokens < self.block:
            raise UserError(
                f"corpus {str(directory)!r} has {self.num_tokens} training tokens, less than a block of {self.block}: "
                f"give more text or a smaller block."
            )
        for file, (_, length) in zip(self._files, lengths, strict=True):
            size, whole = file.stat().st_size if file.is_file() else 0, length * self._dtype.itemsize
            if size != whole:
                raise UserError(f"{str(file)!r} has {size} bytes instead of {whole}: {REBUILD}.")
        self._maps: dict[int, np.memmap] = {}

    def __len__(self) -> int:
        return -(-self.num_tokens // self.block)

    def __getitem__(self, index: int) -> Int[Tensor, " block"]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        begin = index * self.block
        ids = self.tokens(begin, min(begin + self.block, self.num_tokens))
        fill = self.block - len(ids)
        return torch.from_numpy(np.pad(ids, (0, fill), constant_values=self.end) if fill else ids)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a memory map would be pickled with all its values

    def tokens(self, begin: int, end: int) -> Int[np.ndarray, " n"]:
        """Token ids int64 (end - begin,) of the split as one long stream, an end token after each document."""
        parts = []
        shard = int(np.searchsorted(self._begins, begin, side="right")) - 1
        while begin < end:
            first = int(self._begins[shard])
            stop = min(end, int(self._begins[shard + 1]))
            parts.append(self._map(shard)[begin - first : stop - first].astype(np.int64))
            begin, shard = stop, shard + 1
        found = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        if found.size and found.max() >= self.vocab_size:
            raise self._damaged()
        return found

    def counts(self) -> Int[Tensor, " v"]:
        """How often each token of the vocabulary occurs."""
        total = np.zeros(self.vocab_size, dtype=np.int64)
        for shard in range(len(self._files)):
            counted = np.bincount(self._map(shard), minlength=self.vocab_size)
            if len(counted) > self.vocab_size:
                raise self._damaged()
            total += counted
        return torch.from_numpy(total)

    def _damaged(self) -> UserError:
        return UserError(
            f"a shard in {str(self._files[0].parent)!r} holds tokens that are not in the vocabulary: {REBUILD}."
        )

    def _map(self, shard: int) -> np.memmap:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self._files[shard], dtype=self._dtype, mode="r")
        return self._maps[shard]


def labels(blocks: Int[Tensor, "*b t"], end: int) -> Int[Tensor, "*b t"]:
    """`blocks` with IGNORE at the fill of a last block: end tokens that follow an end token."""
    fill = torch.zeros_like(blocks, dtype=torch.bool)
    fill[..., 1:] = (blocks[..., 1:] == end) & (blocks[..., :-1] == end)
    return blocks.masked_fill(fill, IGNORE)
