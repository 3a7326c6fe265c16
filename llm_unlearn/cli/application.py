"""The application, and what its commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_unlearn import console

if TYPE_CHECKING:
    from llm_unlearn.exact.run import S3TRun

# Headings of the help.
RUNS, REQUESTS, PUBLISHING, EVALUATIONS = "Runs", "Requests", "Publishing", "Evaluations"
SERVING = "Serving"

MOST_SHARDS = 20  # that are shown one by one

app = typer.Typer(
    help="Exact unlearning: answer deletion requests on runs made by recipes/s3t.py, prove it, publish what is left.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def open_run(path: Path) -> "S3TRun":
    from llm_unlearn.exact.run import S3TRun

    return S3TRun.open(path)


def rebuild_run(opened: "S3TRun", quiet: bool) -> int:
    """Train what is missing behind a progress bar; returns how many nodes were."""
    with console.training_progress(enabled=not quiet) as progress:
        return opened.rebuild(progress).trained  # pyright: ignore[reportArgumentType]
