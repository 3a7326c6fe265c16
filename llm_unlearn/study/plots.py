"""The study's plots as SVG bytes, in the style of every other report."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_unlearn.evaluation import plots
from llm_unlearn.study.aims import best_gated, knowledge
from llm_unlearn.study.configurations import CONFIGURATIONS, SERVED
from llm_unlearn.study.results import Results
from llm_unlearn.study.worlds import WORDINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = tuple[str, str]
LINES = ("-", "--", ":", "-.")
COLORS = (plots.GREY, plots.INK, plots.ORANGE, *plots.SERIES)
SCORES = {"exact": "facts answered right", "probability": "answer probability"}


def over_deletions(results: Results) -> bytes | None:
    """Knowledge about those who stay against the number of deletions, by wording."""
    rows = [row for row in results.rows if row[0] != CONFIGURATIONS[0].name]
    if not rows:
        return None
    with plots.styled():
        figure = plots.new_figure(11.5, 5.2)
        panels: Any = figure.subplots(1, len(WORDINGS), sharey=True, squeeze=False)[0]
        for axes, wording in zip(panels, WORDINGS, strict=True):
            for row in rows:
                _draw_line(axes, results, row, f"retained {wording} {knowledge(results)}")
            _draw_aim(axes, results, f"retained {wording} {knowledge(results)}")
            axes.set_title(f"questions: {wording.replace('_', '-')}")
            axes.set_xlabel("deletions, without retraining")
            axes.set_xticks(range(len(results.deletions)), map(str, results.deletions))
            axes.set_ylim(-0.03, 1.05)
        panels[0].set_ylabel(SCORES.get(knowledge(results), knowledge(results)))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return plots.to_bytes(figure, "svg")


def knowledge_against_damage(results: Results) -> bytes | None:
    """Knowledge before any deletion against what it costs elsewhere."""
    name = f"retained named {knowledge(results)}"
    points = [
        (row, results.get(row, 0, "shift").mean, results.get(row, 0, name).mean)
        for row in results.rows
    ]
    points = [point for point in points if all(map(math.isfinite, point[1:]))]
    if not points:
        return None
    with plots.styled():
        figure = plots.new_figure(9.5, 4.6)
        axes = figure.subplots()
        for row, damage, known in points:
            number = _number(row)
            marker = plots.MARKERS[_way(row) % len(plots.MARKERS)]
            color = COLORS[number % len(COLORS)]
            axes.scatter(damage, known, s=80, marker=marker, color=color, label=label(row))
        axes.set_xlabel("loss out of domain over the base model's, nats a token (0 = untouched)")
        axes.set_ylabel(SCORES.get(knowledge(results), knowledge(results)))
        axes.set_ylim(-0.03, 1.05)
        figure.legend(loc="outside right upper")
        return plots.to_bytes(figure, "svg")


def _draw_aim(axes: "Axes", results: Results, name: str) -> None:
    """Where the better gate of a plain LoRA is before any deletion."""
    line = best_gated(results, name)
    if math.isfinite(line):
        style: Any = {"color": plots.GREY, "linewidth": 1, "linestyle": (0, (1, 2)), "zorder": 1}
        axes.axhline(line, **style, label="aim: a gated plain LoRA before any deletion")


def label(row: Row) -> str:
    return f"{row[0]}: {row[1]}"


def _draw_line(axes: "Axes", results: Results, row: Row, name: str) -> None:
    cells = [results.get(row, count, name) for count in results.deletions]
    means = [cell.mean for cell in cells]
    places = list(range(len(cells)))
    color = COLORS[_number(row) % len(COLORS)]
    axes.plot(
        places,
        means,
        color=color,
        linestyle=LINES[_way(row) % len(LINES)],
        marker=plots.MARKERS[_way(row) % len(plots.MARKERS)],
        markersize=5,
        label=label(row),
    )
    if any(math.isfinite(cell.lower) for cell in cells):
        lower, upper = [max(0.0, c.lower) for c in cells], [min(1.0, c.upper) for c in cells]
        axes.fill_between(places, lower, upper, color=color, alpha=0.1, linewidth=0)


def _number(row: Row) -> int:
    return _place(row[0], [one.name for one in CONFIGURATIONS])


def _way(row: Row) -> int:
    return _place(row[1], list(SERVED))


def _place(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else len(names)
