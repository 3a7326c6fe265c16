"""The outcomes as one picture: a row for each policy, so that none hides another."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from llm_unlearn.errors import UserError
from llm_unlearn.serving.simulation.numbers import BASELINE, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GREY, GRID = "#222222", "#8a8f98", "#e3e5e8"
BLUE, PALE, AMBER, RED, GREEN = "#2b6cb0", "#a9c7e8", "#e0a030", "#c53030", "#4c9f70"
SHARES = (
    ("at once: certified, or nothing pending", GREEN),
    ("after waiting", PALE),
    ("clean shards, not certified", AMBER),
    ("not answered", GREY),
    ("with deleted data", RED),
)


def plot_outcomes(outcomes: Sequence[Outcome], path: str | PathLike[str]) -> None:
    """Draw latency, retrains and how queries were answered; a block of rows for each target.

    The format follows the file's ending. Needs matplotlib.

    Raises:
        UserError: the file cannot be written, or has an ending that says no format.
    """
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(outcome.target for outcome in outcomes))
    rows = max(sum(o.target == target for o in outcomes) for target in targets)
    height = len(targets) * (0.32 * rows + 0.9) + 0.7
    figure = Figure(figsize=(12, height), layout="constrained", facecolor="white")
    grid = figure.subplots(len(targets), 3, squeeze=False, width_ratios=(1.2, 1.0, 1.2))
    for target, (latency, retrains, shares) in zip(targets, grid, strict=True):
        shown = [outcome for outcome in outcomes if outcome.target == target]
        _draw_latency(latency, shown)
        _draw_retrains(retrains, shown)
        _draw_shares(shares, shown)
        latency.set_title(f"target: {target}", loc="left", fontsize=10, fontweight="bold")
        for axes in (latency, retrains, shares):
            _clean(axes, shown, has_names=axes is latency)
    handles = [
        *grid[0][0].get_legend_handles_labels()[0],
        *grid[0][2].get_legend_handles_labels()[0],
    ]
    labels = [
        *grid[0][0].get_legend_handles_labels()[1],
        *grid[0][2].get_legend_handles_labels()[1],
    ]
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the plot {path}: {error}") from None


def _draw_latency(axes: "Axes", shown: Sequence[Outcome]) -> None:
    """Half of the answers, 99 of 100, and the mean, in seconds."""
    for row, outcome in enumerate(shown):
        if (latency := outcome.latency) is None:
            continue
        axes.plot([latency.p50, latency.p99], [row, row], color=PALE, linewidth=3, zorder=1)
        for value, marker, color, name in (
            (latency.p99, "s", INK, "99 of 100 answers"),
            (latency.mean, "D", AMBER, "mean"),
            (latency.p50, "o", BLUE, "half of the answers"),
        ):
            axes.plot(value, row, marker, color=color, markersize=6, label="" if row else name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("seconds until the answer")


def _draw_retrains(axes: "Axes", shown: Sequence[Outcome]) -> None:
    for row, outcome in enumerate(shown):
        axes.barh(row, outcome.retrains, height=0.6, color=GREY if _is_baseline(outcome) else BLUE)
        saved = outcome.retrains_saved
        text = "" if _is_baseline(outcome) or saved is None else f"  (saves {saved:.0f} %)"
        axes.text(outcome.retrains, row, f" {outcome.retrains}{text}", va="center", fontsize=8)
    axes.set_xlim(0, 1.45 * max([1, *(outcome.retrains for outcome in shown)]))
    axes.set_xlabel("shards rebuilt")


def _draw_shares(axes: "Axes", shown: Sequence[Outcome]) -> None:
    for row, outcome in enumerate(shown):
        start = 0.0
        for (name, color), share in zip(SHARES, _shares(outcome), strict=True):
            axes.barh(row, share, left=start, height=0.6, color=color, label="" if row else name)
            start += share
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the queries")


def _shares(outcome: Outcome) -> tuple[float, ...]:
    """Percent of the queries by how they were answered, in the order of `SHARES`."""
    unsafe = 100.0 * outcome.unsafe / outcome.queries
    rest = (outcome.waited, outcome.clean, outcome.refused, unsafe)
    return max(0.0, 100.0 - sum(rest)), *rest


def _is_baseline(outcome: Outcome) -> bool:
    return outcome.policy == BASELINE or outcome.is_unsafe


def _clean(axes: "Axes", shown: Sequence[Outcome], has_names: bool) -> None:
    names = [outcome.policy + (" (UNSAFE)" if outcome.is_unsafe else "") for outcome in shown]
    axes.set_yticks(range(len(shown)), names if has_names else [""] * len(shown))
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
