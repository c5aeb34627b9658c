"""`python -m experiments.demo`."""

from common.checks import run_command
from experiments import from_command_line
from experiments.demo.page import Config, main

if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(from_command_line(Config))))
