"""Which part is whose, whoever starts the processes; processes that are started here, and what they say."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from common.checks import UserError
from common.parts import LAUNCHERS, PER_CORE, Part, Parts, ProcessesConfig, own_part, start_processes


@pytest.mark.parametrize("count", [0, 1, 7, 12, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("unit", [1, 4])
def test_every_item_is_in_one_part_in_order_and_in_whole_units(count, world, unit):
    items = list(range(count))
    taken = [Part(rank, world).take(items, unit) for rank in range(world)]
    assert [item for part in taken for item in part] == items
    assert all(part[0] % unit == 0 for part in taken if part)
    assert max(map(len, taken)) - min(map(len, taken)) <= 2 * unit - 1


@pytest.fixture
def launcher(monkeypatch):
    """Sets the variables of a launcher, and no others."""
    for names in LAUNCHERS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "expected"),
    [
        ({}, 1, 1, Part(0, 1)),
        ({}, 4, 1, None),
        ({"RANK": "5", "WORLD_SIZE": "8"}, 4, 2, Part(5, 8)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, 2, 2, Part(3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, 1, 1, Part(0, 1)),  # in sbatch's script, which srun did not start
        ({"RANK": "", "WORLD_SIZE": "many"}, 1, 1, Part(0, 1)),
    ],
)
def test_own_part(launcher, variables, devices, nodes, expected):
    launcher(**variables)
    assert own_part(ProcessesConfig(devices, nodes)) == expected


def test_counts_that_disagree_are_refused(launcher):
    with pytest.raises(UserError, match="devices is 0: use at least 1"):
        own_part(ProcessesConfig(devices=0))
    most = PER_CORE * os.cpu_count()
    with pytest.raises(UserError, match=f"devices is {most + 1}: use at most {most}, as this machine has"):
        own_part(ProcessesConfig(devices=most + 1))
    with pytest.raises(UserError, match="num_nodes is 2, but neither torchrun nor srun"):
        own_part(ProcessesConfig(num_nodes=2))
    launcher(RANK="0", WORLD_SIZE="3")
    with pytest.raises(UserError, match="devices is 2 and num_nodes 2, but torchrun started 3 processes: give"):
        own_part(ProcessesConfig(2, 2))


def test_processes_that_are_started_here(launcher, monkeypatch, tmp_path):
    monkeypatch.setattr(multiprocessing, "get_context", lambda method, get=multiprocessing.get_context: get("fork"))

    def work(what):
        part = own_part(ProcessesConfig(devices=3))
        (tmp_path / f"{what}-{part.rank}-{os.environ['LOCAL_RANK']}").touch()
        if what == "fails" and part.rank:
            raise UserError("color is 'red': use blue.")
        if what == "dies" and part.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 if what == "ends" and part.rank == 2 else 0

    assert start_processes(work, "works", 3) == 0 and start_processes(work, "ends", 3) == 2
    with pytest.raises(UserError, match=r"^color is 'red': use blue\.$"):
        start_processes(work, "fails", 3)
    with pytest.raises(UserError, match=r"^process 2 of 3 was killed \(memory may have run out\)"):
        start_processes(work, "dies", 3)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{what}-{rank}-{rank}" for what in ("works", "ends", "fails", "dies") for rank in range(3)}


def test_a_stop_ends_the_processes(launcher, monkeypatch, tmp_path, heard):
    monkeypatch.setattr(multiprocessing, "get_context", lambda method, get=multiprocessing.get_context: get("fork"))

    def work(_):
        rank = os.environ["RANK"]
        (tmp_path / f"begun-{rank}").touch()
        time.sleep(60)
        (tmp_path / f"ended-{rank}").touch()

    def stop():
        while len(list(tmp_path.glob("begun-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop).start()
    with pytest.raises(KeyboardInterrupt):
        start_processes(work, None, 2)
    assert not multiprocessing.active_children() and not list(tmp_path.glob("ended-*"))


def test_one_run_at_a_time_has_a_part_and_only_the_last_joins(tmp_path, capsys):
    parts = [Parts(tmp_path / "parts", Part(rank, 2), {"seed": 1}, {"rows": 5 + rank}) for rank in range(2)]
    assert [one.plan["rows"] for one in parts] == [5, 5]
    with parts[0].own(), pytest.raises(UserError, match="is in use by process"), parts[0].own():
        pass
    parts[1].finish(3, ["b"])
    with parts[1].joined() as found:
        assert found is None
    assert capsys.readouterr().err == "part 2 of 2 is done; whoever finishes last joins all. Not done yet: 1\n"
    parts[0].finish(4, ["a"])
    with pytest.raises(KeyboardInterrupt), parts[0].joined() as found:
        raise KeyboardInterrupt
    assert parts[0].is_done() and parts[0].exist()
    with parts[1].joined() as found:
        assert found == [{"rows": 4, "skipped": ["a"]}, {"rows": 3, "skipped": ["b"]}]
    with parts[0].joined() as found:
        assert found is None and not (tmp_path / "parts").exists()
    assert capsys.readouterr().err == ""
