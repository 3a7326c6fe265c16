"""What a person sees: tables, a progress bar, and errors in one line."""

import errno
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from llm_unlearn.exact.trie import Node

# In a pipe or a file there is no width to keep to, and a squeezed table cannot be read.
# What people wrote is shown as it is: nothing in it is markup.
stdout = Console(width=None if sys.stdout.isatty() else 140, markup=False)
stderr = Console(stderr=True, markup=False)
NUMBER = re.compile(r"\W*(\d.*|nan)?")  # with its sign, unit or interval; or none


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Numbers to the right, words to the left."""
    table = Table(title=title, title_justify="left")
    cells = [[str(cell) for cell in row] for row in rows]
    for index, column in enumerate(columns):
        are_numbers = all(NUMBER.fullmatch(row[index]) for row in cells)
        table.add_column(column, justify="right" if index and are_numbers else "left")
    for row in cells:
        table.add_row(*row)
    stdout.print(table)


def print_json(value: Any) -> None:
    """For machines, on standard output."""
    print(json.dumps(value, indent=2, sort_keys=True, default=str))


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


def _bar(enabled: bool) -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return _progress(columns, enabled)


def _progress(columns: Sequence[ProgressColumn], enabled: bool) -> Progress:
    """Nothing outside a terminal: there is nothing to draw over."""
    enabled = enabled and stderr.is_terminal
    return Progress(*columns, console=stderr, disable=not enabled, transient=True)


@contextmanager
def training_progress(enabled: bool = True) -> Iterator[TrainingProgress]:
    """A progress bar on standard error while the context is open."""
    with _bar(enabled) as bar:
        yield TrainingProgress(bar)


@contextmanager
def steps_progress(what: str, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar over the steps of one training, on standard error while the context is open."""
    with _bar(enabled) as bar:
        task = bar.add_task(what, total=None)
        yield lambda step, total: bar.update(task, completed=step, total=total)


@contextmanager
def stages_progress(enabled: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over whatever is being done, one thing after another, on standard error."""
    with _bar(enabled) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )


class EvaluationProgress:
    """A bar over the rows that are put to a model."""

    def __init__(self, bar: Progress):
        self.bar = bar
        self.task = bar.add_task("", total=None)

    def start(self, what: str, total: int) -> None:
        self.bar.reset(self.task, description=what, total=total, completed=0)

    def advance(self, rows: int) -> None:
        self.bar.advance(self.task, rows)


@contextmanager
def evaluation_progress(enabled: bool = True) -> Iterator[EvaluationProgress]:
    """A progress bar on standard error while the context is open."""
    with _bar(enabled) as bar:
        yield EvaluationProgress(bar)


class StudyProgress(TrainingProgress):
    """Bars over the measurements of a study, and over the nodes of the run in training."""

    def __init__(self, bar: Progress):
        self.measurements = bar.add_task("measurements", total=None)
        super().__init__(bar)

    def plan(self, total: int) -> None:
        self.bar.update(self.measurements, total=total, completed=0)

    def say(self, what: str) -> None:
        self.bar.update(self.measurements, description=what)
        if not stderr.is_terminal:  # a log of a long night wants lines
            stderr.print(what, highlight=False, soft_wrap=True)

    def measured(self, count: int) -> None:
        self.bar.advance(self.measurements, count)


@contextmanager
def study_progress(enabled: bool = True) -> Iterator[StudyProgress]:
    """A progress bar on standard error while the context is open."""
    with _bar(enabled) as bar:
        yield StudyProgress(bar)


@contextmanager
def attack_progress(enabled: bool = True, log: bool = False) -> Iterator[Callable[[str], None]]:
    """Says on standard error what is being done, and for how long.

    Args:
        log: say it outside a terminal too, a line each.
    """
    columns = (TextColumn("{task.description}", markup=False), SpinnerColumn(), TimeElapsedColumn())
    with _progress(columns, enabled) as bar:
        task = bar.add_task("", total=None)

        def say(what: str) -> None:
            bar.update(task, description=what)
            if log and not stderr.is_terminal:
                stderr.print(what, highlight=False, soft_wrap=True)

        yield say
