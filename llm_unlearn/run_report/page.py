"""The contents as one page that needs nothing else: no script, no network, good on paper."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.report import render, write_page
from llm_unlearn.run_report.contents import Contents
from llm_unlearn.run_report.evaluations import AFTER, BEFORE, Metric
from llm_unlearn.run_report.headline import headline
from llm_unlearn.run_report.outside import CURRENT, GONE, HOLDS, UNKNOWN
from llm_unlearn.run_report.reading import read_contents
from llm_unlearn.run_report.requests import CARRIED_OUT, OVERDUE, PENDING, RequestRow
from llm_unlearn.run_report.timeline import draw_timeline
from llm_unlearn.run_report.trie_picture import draw
from llm_unlearn.run_report.tries import ShardTrie
from llm_unlearn.run_report.words import duration, estimate, many, moment, size

AT_ONCE, MOST = 50, 1000  # rows of a table that are shown, and that can be unfolded
SIGNS = {
    "done": ("good", "✓"), "open": ("open", "…"), "wrong": ("bad", "✗"),
    CARRIED_OUT: ("good", "✓"), PENDING: ("open", "…"), OVERDUE: ("bad", "✗"),
    CURRENT: ("good", "✓"), GONE: ("", "–"), HOLDS: ("bad", "✗"), UNKNOWN: ("open", "?"),
}  # fmt: skip
ASKS = {
    "by subject": "every subject that is held asks once, all equally likely to be next",
    "by slice": "every slice with records is equally likely, over and over (as `llm-unlearn plan`)",
}


def write_run_report(
    path: Path,
    output: Path,
    before: Path | None = None,
    after: Path | None = None,
    now: float | None = None,
) -> Contents:
    """Write the page about a run, readable by its owner only; returns what it says.

    Args:
        before, after: directories of evaluations to show.
        now: the clock, seconds since the epoch.

    Raises:
        UserError: no run, no evaluation, or a page that would lie inside the run.
        RunError: run.json or the key is damaged, or the run is busy.
    """
    contents = read_contents(path, before, after, now)
    if output.resolve().is_relative_to(path.resolve()):
        raise UserError(
            f"{output} is inside the run, where a deletion would take it for a residue: "
            "choose another --output"
        )
    write_page(output, to_html(contents))
    return contents


def to_html(contents: Contents) -> str:
    """The page."""
    tries, lacking = contents.shards, _lacking(contents.shards)
    return render(
        "run_report.html.jinja",
        Path(__file__).parent,
        contents=contents,
        about=contents.about,
        headline=headline(contents),
        requests=fold(contents.requests),
        has={
            name: any(getattr(row, name) is not None for row in contents.requests)
            for name in ("deadline", "reason")
        },
        classes=_classes(contents.requests),
        drawing=draw(tries),
        shards=fold(lacking),
        complete=len(tries) - len(lacking),
        timeline=draw_timeline(contents.moments, contents.made_at),
        metrics=fold(
            [(metric, draw_metric(contents, metric)) for metric in _metrics(contents)], 12
        ),
        asks=ASKS,
        signs=SIGNS,
        moment=moment,
        size=size,
        estimate=estimate,
        fold=fold,
        duration=duration,
        many=many,
    )


def fold(rows: Sequence, at_once: int = AT_ONCE) -> dict[str, Sequence | int]:
    """Rows that are shown, rows that can be unfolded, and how many are only counted."""
    return {"shown": rows[:at_once], "folded": rows[at_once:MOST], "more": max(0, len(rows) - MOST)}


def _lacking(tries: Sequence[ShardTrie]) -> list[ShardTrie]:
    """Shards that lack something, those that lack most first."""
    return sorted(
        (trie for trie in tries if trie.is_lacking),
        key=lambda trie: (trie.served_depth - trie.full_depth, trie.shard),
    )


def _classes(rows: Sequence[RequestRow]) -> list[tuple[str, int]]:
    """How many certificates name which class of exactness."""
    return sorted(Counter(row.exactness for row in rows if row.exactness is not None).items())


def _metrics(contents: Contents) -> Sequence[Metric]:
    return contents.evaluation.metrics if contents.evaluation else ()


def draw_metric(contents: Contents, metric: Metric) -> Markup:
    """The values of a metric and their intervals on a scale from 0 to 1; nothing for other scales."""
    columns = contents.evaluation.columns if contents.evaluation else ()
    shown = [
        (column, value.share)
        for column, value in zip(columns, metric.values, strict=True)
        if value.share is not None
    ]
    if not shown:
        return Markup("")
    marks = {
        BEFORE: '<circle class="before" cx="{x:.1f}" cy="{y}" r="3.5"/>',
        AFTER: '<circle class="after" cx="{x:.1f}" cy="{y}" r="4"/>',
    }
    diamond = '<path class="retrained" d="M{x:.1f} {y}m0 -4.5l4.5 4.5l-4.5 4.5l-4.5 -4.5z"/>'
    parts = []
    for number, (column, (value, lower, upper)) in enumerate(shown):
        y = 8 + 12 * number
        parts.append(
            Markup('<line class="whisker" x1="{:.1f}" y1="{y}" x2="{:.1f}" y2="{y}"/>').format(
                8 + 150 * lower, 8 + 150 * upper, y=y
            )
        )
        parts.append(Markup(marks.get(column, diamond)).format(x=8 + 150 * value, y=y))
    return Markup(
        '<svg class="metric" width="166" height="{h}" aria-hidden="true">'
        '<line class="axis" x1="8" y1="{b}" x2="158" y2="{b}"/>{parts}</svg>'
    ).format(h=12 * len(shown) + 6, b=12 * len(shown) + 3, parts=Markup("").join(parts))
