"""One process writes, whatever has started the others."""

import pytest

from common.processes import is_first_process

LAUNCHERS = {
    "alone": ({}, True),
    "lightning, first": ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
    "lightning, another machine": ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
    "torchrun, first": ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),
    "torchrun, second": ({"RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0"}, False),
    "torchrun, another machine": ({"RANK": "4", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),
    "srun, first": ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True),
    "srun, second": ({"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, False),
    "jsrun, second": ({"JSM_NAMESPACE_RANK": "1"}, False),
    "sbatch and lightning, second": ({"SLURM_PROCID": "0", "LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_leader(launcher, monkeypatch):
    for name in (
        "LOCAL_RANK",
        "NODE_RANK",
        "RANK",
        "GROUP_RANK",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "JSM_NAMESPACE_RANK",
    ):
        monkeypatch.delenv(name, raising=False)
    variables, expected = LAUNCHERS[launcher]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() is expected
