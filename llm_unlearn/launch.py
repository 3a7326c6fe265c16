"""What every recipe does before and after its own work: quick help, and words about processes."""

import os
import sys
from collections.abc import Sequence
from itertools import pairwise

from llm_unlearn.console import warn


def wants_short_help(argv: Sequence[str]) -> bool:
    """`--help` prints the recipe's own words at once; `--help_all` lists every flag of TRL."""
    return any(argument in ("-h", "--help") for argument in argv)


def expand_help(argv: Sequence[str]) -> list[str]:
    return ["--help" if argument == "--help_all" else argument for argument in argv]


def requested_processes() -> int:
    """How many processes the launcher above us was asked for on its command line; 1 if unknown."""
    import psutil

    try:
        command = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return 1
    for flag, value in pairwise(command):
        if flag in ("--num_processes", "--num-processes") and value.isdigit():
            return int(value)
    return 1


def check_processes(running: int) -> None:
    """Say so when the launcher was asked for more processes than it started."""
    asked = requested_processes()
    if running == 1 and asked > 1:
        warn(
            f"the launcher was asked for {asked} processes but started one: on a machine without GPUs use "
            f"`torchrun --nproc-per-node {asked} {sys.argv[0]}` or `accelerate launch --multi_gpu "
            f"--num_processes {asked} ...`"
        )
