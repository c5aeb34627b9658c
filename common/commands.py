"""A command with subcommands, each in a module of its own that is imported only when it is asked for."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Annotated, Any, get_type_hints

import tyro

from common.checks import UserError, require_usable, run_command


@dataclass(frozen=True)
class Subcommand:
    """Where a subcommand lives: `config` is a frozen dataclass, `run` takes one and may return an exit code.

    Where defaults depend on another option, the dataclass's `for_arguments` gives those of a command line.
    """

    module: str
    config: str
    run: str
    summary: str
    """One line for the list of subcommands."""


def run_cli(prog: str, description: str, subcommands: dict[str, Subcommand], arguments: list[str] | None = None) -> int:
    """Run the subcommand that the first argument names; a user's mistake is one line and exit code 2.

    Args:
        prog: name of the command.
        description: what it is for, in one sentence.
        subcommands: by name, in the order of the help.
        arguments: of the command line; None takes the process's.
    """
    given = sys.argv[1:] if arguments is None else arguments

    def run() -> int | None:
        if not given or given[0] in ("-h", "--help"):
            print(_overview(prog, description, subcommands))
            return 0 if given else 2
        name, *rest = given
        if name not in subcommands:
            raise UserError(f"{prog} has no command {name!r}: choose one of {', '.join(subcommands)}.")
        chosen = subcommands[name]
        module = importlib.import_module(chosen.module)
        kind = getattr(module, chosen.config)
        config = tyro.cli(
            kind,
            default=kind.for_arguments(rest) if hasattr(kind, "for_arguments") else None,
            prog=f"{prog} {name}",
            args=rest,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        require_usable(config)
        return getattr(module, chosen.run)(config)

    # Names of files need not be UTF-8, nor need a terminal be.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return run_command(run)


def named(config: type, names: Mapping[str, str] | None = None) -> Any:
    """What annotates a field that holds a `config` or None, so that the options of its fields have these names."""
    hints = get_type_hints(config, include_extras=True)
    options: list[Any] = []
    for one in fields(config):
        default = field(default_factory=one.default_factory) if one.default is MISSING else one.default
        option = tyro.conf.arg(name=(names or {}).get(one.name, one.name))
        options.append((one.name, Annotated[hints[one.name], option], default))
    namespace = {"__new__": lambda cls, **values: config(**values), "__doc__": config.__doc__}
    return tyro.conf.arg(
        constructor=make_dataclass(config.__name__, options, bases=(config,), frozen=True, namespace=namespace)
    )


def _overview(prog: str, description: str, subcommands: dict[str, Subcommand]) -> str:
    width = max(map(len, subcommands))
    lines = [f"usage: {prog} COMMAND [OPTIONS]", "", description, ""]
    lines += [f"  {name:<{width}}  {chosen.summary}" for name, chosen in subcommands.items()]
    return "\n".join([*lines, "", f"{prog} COMMAND --help explains a command's options."])
