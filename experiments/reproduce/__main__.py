"""`python -m experiments.reproduce NAME`."""

from common.checks import run_command
from experiments import from_command_line
from experiments.reproduce.config import Config
from experiments.reproduce.tables import main

if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
