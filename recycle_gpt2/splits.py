"""Which documents train a model and which are held out: decided by a document's text and a seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from common.checks import UserError

SPLITS: tuple[str, ...] = ("train", "valid", "test")
SHARES = (0.98, 0.01, 0.01)
"""Of train, valid and test."""


def split_of(text: str, shares: Sequence[float], seed: int) -> str:
    """The split of a document with this text: one of SPLITS."""
    place = text_key(f"{seed}\n{text}") / 2**64
    if place < shares[1]:
        return "valid"
    return "test" if place < shares[1] + shares[2] else "train"


def require_shares(shares: Sequence[float]) -> None:
    """Raise UserError unless there are three shares that sum to 1, train's above 0."""
    if len(shares) != len(SPLITS) or min(shares) < 0 or shares[0] == 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"shares are {shares}: use three for train, valid and test that sum to 1, train's above 0.")


def text_key(text: str) -> int:
    """64 bits of a text's hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
