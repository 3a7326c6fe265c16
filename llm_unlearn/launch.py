"""What every recipe does before and after its own work: quick help, and words about processes."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llm_unlearn.console import attack_progress, stdout, warn
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from trl import TrlParser


def wants_short_help(argv: Sequence[str]) -> bool:
    """`--help` prints the recipe's own words at once; `--help_all` lists every flag of TRL."""
    return any(argument in ("-h", "--help") for argument in argv)


def expand_help(argv: Sequence[str]) -> list[str]:
    return ["--help" if argument == "--help_all" else argument for argument in argv]


def config_of(argv: Sequence[str]) -> Mapping[str, Any]:
    """The flags in the file that `--config` names; none without it.

    Raises:
        UserError: it cannot be read, or is no YAML mapping.
    """
    if "--config" not in argv:
        return {}
    import yaml

    name = "".join(argv[argv.index("--config") + 1 :][:1])
    if not name:
        raise UserError("--config needs the name of a YAML file")
    try:
        content = yaml.safe_load(Path(name).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read --config {name}: {_one_line(error)}") from None
    if not isinstance(content, Mapping):
        raise UserError(
            f"--config {name}: expected a flag and its value on each line, as in seed: 1"
        )
    return content


def parse_flags(parser: "TrlParser", argv: Sequence[str], partly: bool = False) -> tuple[Any, ...]:
    """The dataclasses of the flags, and of those in `--config`.

    Args:
        partly: other flags are not this parser's, and let be.

    Raises:
        UserError: an unknown flag, or a value that does not fit.
    """

    parser.error = refuse
    config_of(argv)
    try:
        *parsed, unknown = parser.parse_args_and_config(list(argv), return_remaining_strings=True)
    except (ValueError, TypeError) as error:
        raise UserError(_one_line(error)) from None
    if unknown and not partly:
        shown = re.sub(r"://[^@\s]*@", "://***@", " ".join(unknown))  # no password on the screen
        raise UserError(f"unknown flag: {shown} (see --help and --help_all)")
    return tuple(parsed)


def typed(kind: type, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags from a file, as the command line would read them: YAML takes 1e-4 for a text.

    Args:
        kind: the dataclass whose fields they are.

    Raises:
        UserError: an unknown flag, or a value that does not fit.
    """
    from trl import TrlParser

    if not isinstance(flags, Mapping):
        raise UserError(f"expected flags and their values, got {flags!r}")
    parser = TrlParser([kind])  # pyright: ignore[reportArgumentType]
    parser.error = refuse
    if unknown := parser.set_defaults_with_config(**flags):
        raise UserError(f"unknown flag: {' '.join(unknown)}")
    values = parser.parse_args([])
    return {name: getattr(values, name) for name in flags}


def refuse(message: str) -> NoReturn:
    """What a parser says of a mistake, in one line and without its usage: `parser.error = refuse`."""
    raise UserError(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def publish_result(arguments: Any, path: Path) -> None:
    """`--push_to_hub`: publish what was written, and say what became of it."""
    from llm_unlearn.hub.publishing import check_purged, publish

    with attack_progress() as say:
        done = publish(arguments, path, say)
    lines = [line for one in done for line in one.lines()]
    stdout.print("\n".join(lines), highlight=False, soft_wrap=True)
    check_purged([one.purged for one in done if one.purged])


def refuse_push(argv: Sequence[str]) -> None:
    """Raises UserError for `--push_to_hub` where there is no one model to publish."""
    if any(argument.split("=")[0] == "--push_to_hub" for argument in argv):
        raise UserError(
            "--push_to_hub is refused: many models are compared here. Publish one of them with "
            "`llm-unlearn push DIRECTORY REPO_ID`"
        )


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
