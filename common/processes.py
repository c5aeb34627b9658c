"""Several processes that train together: which of them writes, and that only one run does."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from common.files import claimed


def is_first_process() -> bool:
    """Whether this process is the one that writes results and speaks to the user."""
    # Lightning's own launcher sets the first two, torchrun the third, srun and jsrun the others. What started the
    # process in another way, Lightning knows: asked only where it is imported, for its import takes seconds.
    ranks = ("LOCAL_RANK", "NODE_RANK", "RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
    known = getattr(sys.modules.get("lightning_utilities.core.rank_zero"), "rank_zero_only", None)
    return getattr(known, "rank", 0) == 0 and all(os.environ.get(name, "0") == "0" for name in ranks)


def sole_run(directory: Path) -> contextlib.AbstractContextManager[None]:
    """Keep other runs out of `directory` until the block ends (see `common.files.claimed`); the first process asks.

    Raises:
        UserError: another run uses it.
    """
    return claimed(directory) if is_first_process() else contextlib.nullcontext()
