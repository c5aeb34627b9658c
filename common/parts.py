"""A long list done by several processes, on one machine or many: which part is whose, and who joins the parts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from common.checks import UserError, require_at_least, require_between, require_same_settings, run_command
from common.files import alone, claimed, write_json
from common.signals import Stopped

MOST_NODES = 4096
PER_CORE = 4
"""Most processes on a core: more than one brings no speed, but may be wanted to try what several do."""
LAUNCHERS = {"torchrun": ("RANK", "WORLD_SIZE"), "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")}
"""Variables in which a launcher says which process this is, and of how many."""
NAMED = 10
"""Parts named in a line."""
Item = TypeVar("Item")
Config = TypeVar("Config")


@dataclass(frozen=True)
class ProcessesConfig:
    """Processes that share the work."""

    devices: int = 1
    """Processes or GPUs on each machine."""
    num_nodes: int = 1
    """Machines; on each, start the command with torchrun or srun."""

    @property
    def world(self) -> int:
        """Their number."""
        return self.devices * self.num_nodes

    def check(self) -> None:
        """Raise UserError for a value that cannot work."""
        require_between("num_nodes", self.num_nodes, 1, MOST_NODES)
        require_at_least("devices", self.devices, 1)
        cores = os.cpu_count() or 1
        if self.devices > PER_CORE * cores:
            raise UserError(
                f"devices is {self.devices}: use at most {PER_CORE * cores}, as this machine has {cores} cores, and "
                f"each process takes a gigabyte or more."
            )


class Part(NamedTuple):
    """One process of several, and what it does of a list."""

    rank: int = 0
    """Its number, from 0."""
    world: int = 1
    """How many there are."""

    def take(self, items: Sequence[Item], unit: int = 1) -> Sequence[Item]:
        """Its items: neighbours, in whole units, so that batches of `unit` are those of one process."""
        units = -(-len(items) // unit)
        begin, end = (units * rank // self.world * unit for rank in (self.rank, self.rank + 1))
        return items[begin:end]


def own_part(config: ProcessesConfig) -> Part | None:
    """Which part is this process's, as torchrun or srun says; None if it has yet to start the processes itself.

    Raises:
        UserError: there are not as many processes as `config` says.
    """
    config.check()
    for launcher, names in LAUNCHERS.items():
        rank, world = (os.environ.get(name, "") for name in names)
        if not (rank.isdecimal() and world.isdecimal()):
            continue
        if int(world) != config.world:
            raise UserError(
                f"devices is {config.devices} and num_nodes {config.num_nodes}, but {launcher} started {world} "
                f"processes: give --devices (on each machine) and --num-nodes whose product is {world}."
            )
        return Part(int(rank), int(world))
    if config.num_nodes > 1:
        raise UserError(
            f"num_nodes is {config.num_nodes}, but neither torchrun nor srun started this process: use one of them."
        )
    return Part() if config.devices == 1 else None


def start_processes(run: Callable[[Config], int | None], config: Config, devices: int) -> int:
    """Run a command in processes of its own on this machine, one for each part; returns the highest exit code.

    If one fails, the others finish their parts.

    Raises:
        UserError: what the processes raise, each message once; or one was killed.
    """
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    started = [
        context.Process(target=_child, args=(run, config, Part(rank, devices), errors)) for rank in range(devices)
    ]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join()
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
                process.join()
    messages = []
    while not errors.empty():
        messages.append(errors.get())
    killed = [number for number, process in enumerate(started, 1) if (process.exitcode or 0) < 0]
    if killed:
        messages.append(
            f"process {killed[0]} of {devices} was killed (memory may have run out): what is done is kept, so run it "
            f"again."
        )
    if messages:
        raise UserError(" ".join(dict.fromkeys(messages)))
    return max(process.exitcode or 0 for process in started)


def _child(run: Callable[[Config], int | None], config: Config, part: Part, errors: Any) -> None:
    import torch

    rank, world = map(str, part)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // part.world))

    def body() -> int | None:
        try:
            return run(config)
        except UserError as error:
            errors.put(str(error))
            return 2
        except (KeyboardInterrupt, Stopped):  # the first process says so
            return 1

    raise SystemExit(run_command(body))


class Parts:
    """The parts of one result, in a directory of their own until the process that finishes last joins them.

    No process waits for another, and they need not run at the same time. A part that was interrupted resumes when its
    process is started again.

    Attributes:
        plan: `settings`, and the `kept` of the process that began the first part.

    Args:
        directory: is made; its file system must lock files across the machines.
        part: of this process.
        settings: what all processes must have been asked for, in JSON's types.
        kept: what all processes must know, but find otherwise once the parts are being joined.

    Raises:
        UserError: parts were begun there with other settings.
    """

    def __init__(
        self, directory: Path, part: Part, settings: Mapping[str, Any], kept: Mapping[str, Any] | None = None
    ) -> None:
        self.directory, self.part = directory, part
        settings = {"processes": part.world, **settings}
        if not is_begun(directory):
            write_json(directory / "plan.json", settings | dict(kept or {}))
        self.plan = self._read(directory / "plan.json", "processes", *(kept or {}))
        require_same_settings(directory, self.plan, settings, "use the same again, or delete it")

    def exist(self) -> bool:
        """Whether the parts are not joined yet."""
        return is_begun(self.directory)

    def place(self, rank: int) -> Path:
        """Directory of a part."""
        return self.directory / f"{rank + 1:05}"

    def is_done(self) -> bool:
        """Whether this process's part was finished before."""
        return self._mark(self.part.rank).is_file()

    def own(self) -> contextlib.AbstractContextManager[None]:
        """Keep other runs out of this process's part until the block ends."""
        return claimed(self.place(self.part.rank))

    def finish(self, rows: int, skipped: Any) -> None:
        """Mark this process's part as finished, with its number of rows and what it has skipped."""
        write_json(self._mark(self.part.rank), {"rows": rows, "skipped": skipped})

    @contextlib.contextmanager
    def joined(self) -> Iterator[list[dict[str, Any]] | None]:
        """Yield what `finish` was told of each part, by rank, to the process that joins them; None to all others.

        When the block ends without an error, the parts are deleted.
        """
        missing = [str(rank + 1) for rank in range(self.part.world) if not self._mark(rank).is_file()]
        if missing and self.exist():  # else another process has joined them meanwhile
            named = ", ".join(missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
            done = f"part {self.part.rank + 1} of {self.part.world} is done"
            print(f"{done}; whoever finishes last joins all. Not done yet: {named}", file=sys.stderr)
        if missing:
            yield None
            return
        with alone(self.directory):
            if not self.exist():
                yield None
                return
            yield [self._read(self._mark(rank), "rows", "skipped") for rank in range(self.part.world)]
            (self.directory / "plan.json").unlink()
            shutil.rmtree(self.directory)

    def require_rows(self, rank: int, rows: int, wanted: int) -> None:
        """Raise UserError when a part has not as many rows as when it was finished."""
        if rows != wanted:
            raise UserError(
                f"{str(self.place(rank))!r} holds {rows} rows instead of {wanted}: delete it and "
                f"{str(self._mark(rank))!r}, and run it again, which does this part alone."
            )

    def _mark(self, rank: int) -> Path:
        return self.directory / f"{rank + 1:05}.json"

    def _read(self, path: Path, *names: str) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or not found.keys() >= set(names):
            raise UserError(f"{str(path)!r} is damaged: delete {str(self.directory)!r} and run it again.")
        return found


def is_begun(directory: Path) -> bool:
    """Whether a directory holds parts that are not joined yet."""
    return (directory / "plan.json").is_file()


def require_no_parts(directory: Path) -> None:
    """Raise UserError when several processes have begun what one process is now asked to do."""
    if is_begun(directory):
        raise UserError(f"{str(directory)!r} holds parts of several processes: run as many again, or delete it.")


def digest_of(names: Iterable[str]) -> str:
    """A hash of names in their order, by which processes know that they were given the same list."""
    digest = hashlib.blake2b(digest_size=8)
    for name in names:
        digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
