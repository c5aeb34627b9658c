"""Several processes that train together: which of them writes, and that only one run does."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from common.files import claimed


def is_first_process() -> bool:
    """Whether this process is the one that writes results and speaks to the user."""
    # Lightning's own launcher sets the first two, torchrun the third, srun the last; the attribute is for other ones.
    ranks = ("LOCAL_RANK", "NODE_RANK", "RANK", "SLURM_PROCID")
    return getattr(rank_zero_only, "rank", 0) == 0 and all(os.environ.get(name, "0") == "0" for name in ranks)


def sole_run(directory: Path) -> contextlib.AbstractContextManager[None]:
    """Keep other runs out of `directory` until the block ends (see `common.files.claimed`); the first process asks.

    Raises:
        UserError: another run uses it.
    """
    return claimed(directory) if is_first_process() else contextlib.nullcontext()
