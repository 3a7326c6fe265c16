"""The leaderboard as a page, as CSV, as JSON, and as a table for a terminal."""

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm_unlearn import files
from llm_unlearn.evaluation import plots
from llm_unlearn.evaluation.catalogue import format_number, in_percent
from llm_unlearn.evaluation.report import interval, picture, render, write_page
from llm_unlearn.evaluation.results import Value
from llm_unlearn.leaderboard.running import AREA
from llm_unlearn.leaderboard.standings import Criterion, Leaderboard, Standing

DASH = "–"
SIGNS = {True: ("good", "✓"), False: ("bad", "✗"), None: ("", "")}
# Shown without a verdict, where the suite has them.
MORE = (
    ("still known", ("forget_rouge", "forget_knowmem", "forget_Q_A_ROUGE")),
    ("extraction", ("extraction_strength",)),
    ("retained", ("retain_rouge", "retain_knowmem")),
)
CAPTION = (
    "The upper right is best; the star is the retrained model; rings and the dashed line mark the Pareto "
    "front."
)


@dataclass(frozen=True)
class Cell:
    text: str
    style: str = ""


def write_leaderboard(board: Leaderboard, output: Path, command: str) -> list[Path]:
    """Write leaderboard.html, leaderboard.csv and leaderboard.json; returns their paths."""
    paths = [output / f"leaderboard.{kind}" for kind in ("html", "csv", "json")]
    page = render(
        "leaderboard.html.jinja",
        Path(__file__).parent,
        board=board,
        columns=heads(board),
        rows=[(row, cells(board, row)) for row in board.rows],
        pictures=picture("Forgetting against utility", plots.tradeoff_plot(board.plane), CAPTION),
        command=command,
    )
    write_page(paths[0], page)
    files.write_bytes(paths[1], to_csv(board).encode(), mode=0o644)
    content = json.dumps(board.to_dict(), indent=1)
    files.write_bytes(paths[2], content.encode(), mode=0o644)
    return paths


def heads(board: Leaderboard) -> list[str]:
    judged = [one.title for one in board.criteria]
    return [
        "",
        *judged,
        *(title for title, _ in _more(board)),
        "seconds",
        "of retraining",
        "passes",
    ]


def cells(board: Leaderboard, row: Standing) -> list[Cell]:
    """One row as it is shown; everything is text."""
    shown = [Cell(row.name if row.seeds < 2 else f"{row.name} ({row.seeds} seeds)")]
    shown += [_judged(one, row) for one in board.criteria]
    shown += [Cell(_show(name, row.values.get(name))) for _, name in _more(board)]
    ratio = row.seconds / row.retraining if row.retraining else math.nan
    shown.append(Cell(DASH if math.isnan(row.seconds) else f"{row.seconds:.1f}"))
    shown.append(Cell(DASH if math.isnan(ratio) else f"{ratio:.2f}×"))
    shown.append(Cell(f"{board.passed(row)} of {len(board.criteria)}"))
    return shown


def _more(board: Leaderboard) -> list[tuple[str, str]]:
    judged = {one.metric for one in board.criteria}
    found = []
    for title, names in MORE:
        known = [n for n in names if n not in judged and any(n in row.values for row in board.rows)]
        found += [(title, known[0])] if known else []
    return found


def _judged(criterion: Criterion, row: Standing) -> Cell:
    text = _show(criterion.metric, row.values.get(criterion.metric))
    style, sign = SIGNS[criterion.passes(row)]
    return Cell(f"{text} {sign}".strip(), style)


def _show(name: str, value: Value | None) -> str:
    if value is None or math.isnan(value.value):
        return DASH
    if name == AREA:
        reach = "" if math.isnan(value.upper) else f" ± {value.upper - value.value:.2f}"
        return f"{value.value:+.2f}{reach}"
    percent = " %" if in_percent(name, "default") else ""
    return f"{format_number(name, value.value, 'default')}{percent} {interval(name, value, 'default')}".strip()


def to_csv(board: Leaderboard) -> str:
    """A line for each row; every metric with the ends of its interval. What is missing is empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    metrics = list(dict.fromkeys(name for row in board.rows for name in row.values))
    ends = ("value", "lower", "upper")
    names = [name if end == "value" else f"{name} {end}" for name in metrics for end in ends]
    writer.writerow(["name", "kind", "seeds", "seconds", "passes", *names])
    for row in board.rows:
        numbers = [_raw(row.values.get(name), end) for name in metrics for end in ends]
        writer.writerow([row.name, row.kind, row.seeds, row.seconds, board.passed(row), *numbers])
    return stream.getvalue()


def _raw(value: Value | None, end: str) -> str:
    number = math.nan if value is None else getattr(value, end)
    return "" if math.isnan(number) else repr(number)


def print_leaderboard(board: Leaderboard, show: Callable[..., None]) -> None:
    rows = [[cell.text for cell in cells(board, row)] for row in board.rows]
    show(f"Unlearning on {board.suite}", heads(board), rows)
