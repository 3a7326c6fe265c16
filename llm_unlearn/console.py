"""What a person sees: tables, a progress bar, and errors in one line."""

import errno
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from llm_unlearn.exact.trie import Node

stdout = Console()
stderr = Console(stderr=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(str, row))
    stdout.print(table)


def warn(message: str) -> None:
    stderr.print(f"warning: {message}", style="yellow", highlight=False, soft_wrap=True)


def exit_code_of(run: Callable[[], None]) -> int:
    """Run a command; a user's mistake becomes one line and an exit code, never a traceback."""
    try:
        run()
    except UserError as error:
        stderr.print(f"error: {error}", style="bold red", highlight=False, soft_wrap=True)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        stderr.print(
            f"error: {error.strerror}: {error.filename or 'the run directory'}. Nothing that was "
            "acknowledged is lost; make room or mend the permissions and run the command again",
            style="bold red",
            highlight=False,
            soft_wrap=True,
        )
        return 1
    except KeyboardInterrupt:
        stderr.print("interrupted; run the same command again to go on", style="bold red")
        return 130
    return 0


def run_and_exit(run: Callable[[], None]) -> None:
    sys.exit(exit_code_of(run))


class TrainingProgress:
    """A bar over the nodes and the steps of the one in training."""

    def __init__(self, bar: Progress):
        self.bar = bar
        self.nodes = bar.add_task("nodes", total=None)
        self.steps = bar.add_task("", total=None, visible=False)

    def node(self, node: "Node", number: int, total: int) -> None:
        slices = " > ".join(str(part) for part in node.path)
        text = f"shard {node.shard}, stage {node.block.stage + 1}: slices {slices}"
        self.bar.update(self.nodes, completed=number - 1, total=total)
        self.bar.reset(self.steps, description=text, visible=True)

    def step(self, step: int, total: int) -> None:
        self.bar.update(self.steps, completed=step, total=total)
        if step == total:
            self.bar.advance(self.nodes)

    def warn(self, message: str) -> None:
        warn(message)


@contextmanager
def training_progress(enabled: bool = True) -> Iterator[TrainingProgress]:
    """A progress bar on standard error while the context is open."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, disable=not enabled, transient=True) as bar:
        yield TrainingProgress(bar)
