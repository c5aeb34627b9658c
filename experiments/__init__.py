from typing import TypeVar

Config = TypeVar("Config")


def from_command_line(config: type[Config]) -> Config:
    """A configuration of the command line's options; those of its runtime stand among the others (`--seed`)."""
    import tyro  # not where only Blender is

    return tyro.cli(config, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
