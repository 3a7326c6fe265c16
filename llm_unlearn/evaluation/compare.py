"""Several evaluations side by side: one table, the trade-off plane, and the Pareto front.

Only what was asked the same way is compared: the same suite, profile and data. Runs of one method
with other seeds can be taken together; their interval then speaks of seeds, not of rows.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llm_unlearn import files
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation import plots, tradeoff
from llm_unlearn.evaluation.catalogue import ARROWS, describe, format_number, in_percent
from llm_unlearn.evaluation.report import interval, picture, readings, render, write_page
from llm_unlearn.evaluation.results import Evaluation, Results, Value, read_results

RETRAINED = "retrained"
ENDS = ("value", "lower", "upper", "n", "n_unscorable")
CAPTION = (
    "The upper right is best; the star is the retrained model; rings and the dashed line mark the Pareto "
    "front: no other model is better on one axis without being worse on the other."
)
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "∞": r"$\infty$",
    "…": r"\ldots{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
LATEX_ARROWS = {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "≈": r"$\approx$"}


@dataclass(frozen=True)
class Column:
    """One model of the table.

    Attributes:
        role: `model`, or `retrained` for the reference.
        profile: whose conventions its values follow.
        retrained: values of the retrained model that it was held against, if any.
        seeds: evaluations behind it.
    """

    label: str
    role: str
    profile: str
    values: dict[str, Value]
    retrained: dict[str, Value] | None = None
    seeds: int = 1

    @property
    def title(self) -> str:
        return f"{self.label} ({self.seeds} seeds)" if self.seeds > 1 else self.label


@dataclass(frozen=True)
class Comparison:
    """The table, ready to be printed or written.

    Attributes:
        metrics: what any of the models has, in the order of the first that has it.
        notes: what a reader should know before believing it.
        plane: forgetting against utility, with `before` of the first result that has one.
    """

    suite: str
    profile: str
    columns: list[Column]
    metrics: list[str]
    plane: tradeoff.Tradeoff
    notes: list[str] = field(default_factory=list)

    @property
    def header(self) -> list[str]:
        return ["metric", "", *plots.shorten_all([column.title for column in self.columns])]

    def best(self, metric: str) -> set[int]:
        """Columns with the best value among at least two models; the reference does not compete.

        Empty where best is to equal the retrained model, and between different profiles.
        """
        direction = describe(metric).direction
        scored = {
            index: column.values[metric].value
            for index, column in enumerate(self.columns)
            if column.role == "model"
            and metric in column.values
            and not math.isnan(column.values[metric].value)
        }
        mixed = len({column.profile for column in self.columns}) > 1
        if direction == RETRAINED or len(scored) < 2 or mixed:
            return set()
        best = (max if direction == "higher" else min)(scored.values())
        return {index for index, value in scored.items() if value == best}

    def to_rows(self) -> list[list[str]]:
        """A row for each metric: title, arrow, and value with interval for each column."""
        return [
            [
                describe(name).title,
                ARROWS[describe(name).direction],
                *(_cell(column, name) for column in self.columns),
            ]
            for name in self.metrics
        ]

    def to_csv(self) -> str:
        """A line for each metric; each model has its value, the ends of its interval, and n.

        What cannot be scored is empty.
        """
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        ends = ("value", "lower", "upper", "n")
        titles = [column.title for column in self.columns]
        parts = [f"{title} {end}" if end != "value" else title for title in titles for end in ends]
        writer.writerow(["metric", "direction", *parts])
        for name in self.metrics:
            values = [column.values.get(name) for column in self.columns]
            numbers = [_raw(value, end) for value in values for end in ends]
            writer.writerow([name, describe(name).direction, *numbers])
        return stream.getvalue()

    def to_latex(self) -> str:
        """A table for the `booktabs` package; the best model of a metric is bold."""
        head = ["Metric", "", *map(_latex, self.header[2:])]
        lines = [
            r"\begin{tabular}{ll" + "r" * len(self.columns) + "}",
            r"\toprule",
            " & ".join(head) + r" \\",
            r"\midrule",
        ]
        for name, (title, arrow, *cells) in zip(self.metrics, self.to_rows(), strict=True):
            best = self.best(name)
            told = [
                rf"\textbf{{{_latex(cell)}}}" if index in best else _latex(cell)
                for index, cell in enumerate(cells)
            ]
            lines.append(" & ".join([_latex(title), LATEX_ARROWS[arrow], *told]) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; NaN is null."""
        return {
            "suite": self.suite,
            "profile": self.profile,
            "notes": self.notes,
            "models": [
                {
                    "label": column.label,
                    "role": column.role,
                    "profile": column.profile,
                    "seeds": column.seeds,
                    "values": {
                        name: {end: _finite(getattr(value, end)) for end in ENDS}
                        for name, value in column.values.items()
                    },
                }
                for column in self.columns
            ],
            "pareto_front": [point.label for point in self.plane.points if point.on_front],
        }

    def to_html(self, path: Path) -> None:
        """One page in the style of the report, with the trade-off inside.

        Raises:
            UserError: the directory does not exist.
        """
        rows = [
            {"name": name, "cells": row, "best": self.best(name)}
            for name, row in zip(self.metrics, self.to_rows(), strict=True)
        ]
        page = render(
            "comparison.html.jinja",
            comparison=self,
            rows=rows,
            front=[point.label for point in self.plane.points if point.on_front],
            pictures=picture(
                "Forgetting against utility", plots.tradeoff_plot(self.plane), CAPTION
            ),
            readings=readings(self.metrics),
        )
        write_page(path, page)

    def to_png(self, path: Path) -> None:
        """The trade-off plot.

        Raises:
            UserError: no model has both a forget and a utility metric; no such directory.
        """
        image = plots.tradeoff_plot(self.plane, "png")
        if image is None:
            raise UserError(
                "there is no trade-off to plot: no model has both a utility (model_utility or "
                "retain_knowmem) and a forget metric with a retrained reference"
            )
        _need_directory(path)
        files.write_bytes(path, image)


def compare(
    results: Sequence[Results],
    labels: Sequence[str] | None = None,
    mixed: bool = False,
    across_seeds: bool = False,
) -> Comparison:
    """Put evaluations side by side, with the retrained reference of the first that has one.

    Args:
        labels: one for each result; by default what was evaluated. Equal ones are numbered.
        mixed: take results of different suites, profiles or data together all the same. Values
            are shown as they are, and none is called best between profiles.
        across_seeds: take results with the same `method` in their configuration, or else with the
            same label, for runs of one method with other seeds: mean and interval over seeds.

    Raises:
        UserError: nothing to compare, or evaluations that were not asked the same.
        ValueError: not as many labels as results.
    """
    if not results:
        raise UserError("nothing to compare: name at least one evaluation")
    names = [one.model.label for one in results] if labels is None else list(labels)
    if len(names) != len(results):
        raise ValueError(f"expected a label for each of {len(results)} results, got {len(names)}")
    notes = _differences(results, mixed)
    columns = [_column(one, name) for one, name in zip(results, names, strict=True)]
    if across_seeds:
        columns = _merge_seeds(results, columns)
    columns = _distinct(columns)
    reference, disagreement = _reference(results)
    notes += disagreement
    if reference is not None:
        held = [replace(c, retrained=c.retrained or reference.values) for c in columns]
        columns = [*held, reference]
    plane = tradeoff.place(_candidates(columns, results))
    if plane.points and plane.unplaced:
        notes.append(f"not in the plot, since a value is missing: {', '.join(plane.unplaced)}")
    metrics = list(dict.fromkeys(name for column in columns for name in column.values))
    suites = _all_of(one.suite for one in results)
    return Comparison(
        suites, _all_of(one.profile for one in results), columns, metrics, plane, notes
    )


def compare_command(
    outs: Sequence[Path],
    csv: Path | None = None,
    latex: Path | None = None,
    html: Path | None = None,
    plot: Path | None = None,
    mixed: bool = False,
    across_seeds: bool = False,
) -> Comparison:
    """Read evaluations from their directories, compare them, and write the files asked for.

    Raises:
        UserError: as `read_results` and `compare`; a file whose directory does not exist.
    """
    for path in (csv, latex, html, plot):
        if path is not None:
            _need_directory(path)
    found = compare([read_results(out) for out in outs], mixed=mixed, across_seeds=across_seeds)
    if csv is not None:
        write_page(csv, found.to_csv())
    if latex is not None:
        write_page(latex, found.to_latex())
    if html is not None:
        found.to_html(html)
    if plot is not None:
        found.to_png(plot)
    return found


def _differences(results: Sequence[Results], mixed: bool) -> list[str]:
    """What is not the same everywhere, as notes; refused where it makes numbers incomparable."""
    asked = {
        "suites": [one.suite for one in results],
        "profiles": [one.profile for one in results],
        "data": [one.digests.get("data", "") for one in results],
    }
    different = [name for name, values in asked.items() if len(set(values)) > 1]
    if different and not mixed:
        told = "; ".join(f"{name} {', '.join(sorted(set(asked[name])))}" for name in different)
        raise UserError(
            f"these evaluations differ in {told}: evaluate again on the same, or pass --mixed to put "
            "them side by side all the same"
        )
    notes = [f"different {name}: values are not comparable" for name in different]
    if len({one.digests.get("configuration", "") for one in results}) > 1:
        notes.append("evaluated under different configurations (template, system prompt, ...)")
    return notes


def _column(results: Results, label: str) -> Column:
    retrained = results.others.get(RETRAINED)
    return Column(
        label,
        "model",
        results.profile,
        results.model.values,
        retrained.values if retrained else None,
    )


def _merge_seeds(results: Sequence[Results], columns: Sequence[Column]) -> list[Column]:
    groups: dict[tuple[str, str, str], list[int]] = {}
    for index, (one, column) in enumerate(zip(results, columns, strict=True)):
        method = str(one.configuration.get("method") or column.label)
        groups.setdefault((method, one.suite, one.profile), []).append(index)
    merged = []
    for (method, _, _), members in groups.items():
        digests = [results[index].model.digest for index in members]
        if len(set(digests)) < len(digests):
            raise UserError(
                f"{method}: the same model was given twice, which is no further seed; name it once"
            )
        merged.append(_over_seeds(method, [columns[index] for index in members]))
    return merged


def _over_seeds(label: str, columns: Sequence[Column]) -> Column:
    if len(columns) == 1:
        return replace(columns[0], label=label)
    return Column(
        label,
        columns[0].role,
        columns[0].profile,
        _mean_values([column.values for column in columns]),
        _mean_values([column.retrained for column in columns if column.retrained]) or None,
        len(columns),
    )


def _mean_values(values: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    from llm_unlearn.evaluation.statistics import across_seeds

    names = dict.fromkeys(name for each in values for name in each)
    found = {}
    for name in names:
        seeds = np.array([each[name].value if name in each else math.nan for each in values])
        seeds[~np.isfinite(seeds)] = math.nan
        # P-values span orders of magnitude: their mean and its interval are those of the logarithm.
        logarithmic = describe(name).unit == "p-value"
        if logarithmic:
            seeds = np.log10(np.maximum(seeds, tradeoff.SMALLEST_P_VALUE))
        over = across_seeds(seeds)
        mean, lower, upper = (
            min(1.0, 10**end) if logarithmic else end for end in (over.mean, over.lower, over.upper)
        )
        note = "geometric mean, n counts seeds" if logarithmic else "n counts seeds"
        found[name] = Value(mean, lower, upper, over.n, over.n_unscorable, note)
    return found


def _distinct(columns: Sequence[Column]) -> list[Column]:
    """Number the labels that occur more than once, or that are the reference's."""
    taken = {RETRAINED}
    found = []
    for column in columns:
        label, number = column.label, 2
        while label in taken:
            label, number = f"{column.label} ({number})", number + 1
        taken.add(label)
        found.append(replace(column, label=label))
    return found


def _reference(results: Sequence[Results]) -> tuple[Column | None, list[str]]:
    """The retrained model of the first result that has one, and whether others have another."""
    having = [one for one in results if RETRAINED in one.others]
    if not having:
        return None, []
    notes = []
    if len({one.others[RETRAINED].digest for one in having}) > 1:
        notes.append(
            "the evaluations have different retrained models: each is held against its own, the first "
            "is shown"
        )
    first: Evaluation = having[0].others[RETRAINED]
    return Column(RETRAINED, RETRAINED, having[0].profile, first.values), notes


def _candidates(columns: Sequence[Column], results: Sequence[Results]) -> list[tradeoff.Candidate]:
    found = [tradeoff.Candidate(c.title, c.role, c.values, c.retrained, c.profile) for c in columns]
    for one in results:
        before, retrained = one.others.get("before"), one.others.get(RETRAINED)
        if before is not None:
            held = retrained.values if retrained else None
            found.append(tradeoff.Candidate("before", "before", before.values, held, one.profile))
            break
    return found


def _cell(column: Column, name: str) -> str:
    value = column.values.get(name, Value(math.nan))
    text = format_number(name, value.value, column.profile)
    percent = " %" if in_percent(name, column.profile) and math.isfinite(value.value) else ""
    return f"{text}{percent} {interval(name, value, column.profile)}".strip()


def _raw(value: Value | None, end: str) -> str:
    number = math.nan if value is None else getattr(value, end)
    return "" if isinstance(number, float) and math.isnan(number) else repr(number)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def _all_of(names: Any) -> str:
    return ", ".join(dict.fromkeys(names))


def _need_directory(path: Path) -> None:
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no directory {path.parent}")
