"""English blocks among those of the new language, so that fine-tuning forgets less of it."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from recycle_gpt2.blocks import TokenBlocks
from recycle_gpt2.extend import require_share


class WithReplay(Dataset[Tensor]):
    """All blocks of one corpus and as many of another as make up a share; shuffled together, batches have that share.

    If the other corpus has fewer blocks they are repeated; if it has more, they are taken evenly from all of it.
    """

    def __init__(self, train: TokenBlocks, english: TokenBlocks, share: float) -> None:
        """`share` of the blocks is `english`, whose blocks are as long as those of `train`.

        Raises:
            UserError: the share is not from 0 to below 1.
        """
        require_share(share)
        self.train, self.english = train, english
        self.replayed = round(len(train) * share / (1 - share))

    def __len__(self) -> int:
        return len(self.train) + self.replayed

    def __getitem__(self, index: int) -> Int[Tensor, " block"]:
        if index < len(self.train):
            return self.train[index]
        number = index - len(self.train)
        if number >= self.replayed:
            raise IndexError(f"block {index} of {len(self)}")
        spread = max(1, len(self.english) // self.replayed)
        return torch.as_tensor(self.english[number * spread % len(self.english)])
