"""Packed weights in pages of 2 MB: a product with few rows reads them faster, as fewer addresses are looked up.

A step of decoding reads every weight once. In pages of 4 KB, what the processor remembers of their addresses does not
reach far, and it looks up the page tables hundreds of thousands of times.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import torch
from torch import Tensor

SIZE = 2 << 20
"""Bytes of a huge page."""
MADV_COLLAPSE = 25
"""Linux 6.1 and later: move what a range holds to huge pages at once."""


def to_huge_pages(packed: Tensor) -> Tensor:
    """The same packed tensor, moved to huge pages where Linux has them; elsewhere nothing happens."""
    if sys.platform != "linux":
        return packed
    operators: Any = torch.ops.mkldnn
    begin, length = operators.data_ptr(packed), operators._nbytes(packed)
    first, last = -(-begin // SIZE) * SIZE, (begin + length) // SIZE * SIZE
    if last > first:
        libc = ctypes.CDLL(None)
        for advice in (mmap.MADV_HUGEPAGE, MADV_COLLAPSE):  # a hint: what it returns does not matter
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)
    return packed
