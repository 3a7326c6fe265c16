"""What a person is shown: a line for each score, its histogram, and the most memorised records."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError
from llm_unlearn.memorization.agreement import Agreement, partial_spearman, spearman
from llm_unlearn.memorization.controls import within_length
from llm_unlearn.memorization.counterfactual import (
    Reference,
    Subsampling,
    read_reference,
    runs_of,
)
from llm_unlearn.memorization.orientation import SCORES, Floats
from llm_unlearn.memorization.refinement import refine
from llm_unlearn.memorizing.scoring import Advance, Scored, score
from llm_unlearn.memorizing.targets import RunTarget, Target, open_target

BINS, WIDTH = 12, 40
MOST = 10


@dataclass(frozen=True)
class Line:
    """One score over all records, oriented: higher = more memorised.

    Attributes:
        mean, low, middle, high: of all records, and of the terciles.
        flat: why a refinement by it would be refused; None where it would not be.
        length: rank correlation with the number of tokens.
        agreement: with the counterfactual reference, where there is one.
        controlled: that correlation without what length and the base model's confidence explain.
    """

    name: str
    what: str
    mean: float
    low: float
    middle: float
    high: float
    flat: str | None
    length: float
    agreement: Agreement | None
    controlled: float | None


@dataclass(frozen=True)
class Findings:
    """Scores of the records of a run or model.

    Attributes:
        order: name of the score by which `most` is sorted.
        within_length: of that score, each record's rank among records of about its length.
    """

    label: str
    records: list[Record]
    pseudonyms: list[str]
    scored: Scored
    lines: list[Line]
    order: str
    within_length: Floats
    reference: Reference | None
    notes: list[str] = field(default_factory=list)

    def most(self, count: int = MOST, show_text: bool = False) -> list[dict[str, Any]]:
        """The most memorised records; texts and ids only where they are asked for."""
        values = self.scored.scores[self.order]
        known = np.flatnonzero(~np.isnan(values))
        found = []
        for number in known[np.argsort(-values[known], kind="stable")][:count]:
            row: dict[str, Any] = {
                "record": self.pseudonyms[number][:16],
                self.order: float(values[number]),
                "within_length": _finite(self.within_length[number]),
                "tokens": _finite(self.scored.tokens[number]),
            }
            if show_text:
                one = self.records[number]
                row |= {"id": one.id, "subject": one.subject, "text": " ".join(one.texts())}
            found.append(row)
        return found

    def histogram(self) -> tuple[list[int], list[float]]:
        """Counts and edges of the score that `most` is sorted by."""
        counts, edges = counted(self.scored.scores[self.order], BINS)
        return counts.tolist(), edges.tolist()

    def bars(self) -> list[str]:
        """The histogram for a terminal."""
        counts, edges = self.histogram()
        most = max(max(counts), 1)
        decimals = max(0, 1 - math.floor(math.log10(edges[1] - edges[0])))
        told = [f"{edge:.{decimals}f}" for edge in edges]
        width = max(map(len, told))
        return [
            f"{low:>{width}} to {high:>{width}}  {'█' * round(WIDTH * count / most):<{WIDTH}} {count}"
            for low, high, count in zip(told, told[1:], counts, strict=False)
        ]

    def to_dict(self, count: int = MOST, show_text: bool = False) -> dict[str, Any]:
        counts, edges = self.histogram()
        lines = [
            {**asdict(line), "agreement": line.agreement and line.agreement._asdict()}
            for line in self.lines
        ]
        told: dict[str, Any] = {
            "label": self.label,
            "records": len(self.records),
            "scores": [{name: _finite(value) for name, value in line.items()} for line in lines],
            "sorted_by": self.order,
            "histogram": {"counts": counts, "edges": edges},
            "most_memorized": self.most(count, show_text),
            "notes": self.notes,
        }
        if self.reference is not None:
            told["reference"] = {
                "runs": self.reference.runs,
                "reliability": _finite(self.reference.reliability),
                "seconds": self.reference.seconds,
            }
        return told


def find_memorized(
    path: Path,
    wanted: Sequence[str] = (),
    records: Sequence[Record] | None = None,
    holdout: Sequence[Record] = (),
    counterfactual: int = 0,
    advance: Advance = lambda _what, _done, _total: None,
) -> Findings:
    """Everything that `llm-unlearn memorization` shows.

    Args:
        records: what a model learnt; a run knows its own.
        counterfactual: runs of the reference to train first, those that are there not again.

    Raises:
        UserError: what cannot be scored, and what to do.
    """
    target = open_target(path, records)
    if counterfactual:
        from llm_unlearn.memorizing.counterfactuals import of_run

        if not isinstance(target, RunTarget):
            raise UserError(
                "--counterfactual trains with a run's own flags: of a model, benchmarks/memorization.py and "
                "memorizing.counterfactuals.measure_counterfactual do"
            )
        of_run(target, Subsampling(counterfactual), lambda d, t: advance("counterfactual", d, t))
    if "counterfactual" in wanted and len(runs_of(target.tables)) < 2:
        raise UserError(f"{path} has no counterfactual runs: --counterfactual 16 trains them")
    scored = score(target, wanted, holdout, advance)
    return findings_of(target, scored, wanted[0] if wanted else None)


def findings_of(target: Target, scored: Scored, order: str | None = None) -> Findings:
    """What scores say, beside the reference where there is one.

    Args:
        order: the score that sorts; the first by default.

    Raises:
        UserError: no record has one of the scores.
    """
    names, reference = target.pseudonyms(), read_reference(target.tables)
    truth, notes = None if reference is None else reference.of(names), list(scored.notes)
    if truth is not None and np.isnan(truth).all():
        truth = None
        notes.append(
            "counterfactual: each record was in all runs or in none, so it takes more runs"
        )
    if truth is not None:
        scored.scores["counterfactual"] = truth
    for name, values in scored.scores.items():
        if unknown := int(np.isnan(values).sum()):
            notes.append(f"{name}: {unknown} of {len(names)} records have none")
    controls = [scored.tokens]
    if scored.base_confidence is not None:
        controls.append(scored.base_confidence)
    lines = [
        line_of(name, values, scored.tokens, truth, controls)
        for name, values in scored.scores.items()
    ]
    if order not in scored.scores:
        order = next(iter(scored.scores))
    ranks = within_length(scored.scores[order], scored.tokens)
    return Findings(
        target.label, target.records, names, scored, lines, order, ranks, reference, notes
    )


def line_of(
    name: str, values: Floats, tokens: Floats, truth: Floats | None, controls: Sequence[Floats]
) -> Line:
    """A score in one line."""
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        raise UserError(f"no record has the score {name!r}: its training was not tracked")
    low, middle, high = (
        float(part.mean()) if len(part) else np.nan for part in np.array_split(known, 3)
    )
    agreement = controlled = None
    if truth is not None and name != "counterfactual":
        agreement = spearman(values, truth)
        controlled = partial_spearman(values, truth, controls)
    length = spearman(values, tokens, resamples=1).rho
    return Line(
        name, SCORES[name].what, float(known.mean()), low, middle, high, why_flat(known), length,
        agreement, controlled,
    )  # fmt: skip


def why_flat(values: Floats) -> str | None:
    """Why terciles by these scores would be refused; None where they would not be."""
    try:
        refine(values)
    except UserError as error:
        return str(error)
    return None


def counted(values: Floats, bins: int) -> tuple[NDArray[np.intp], Floats]:
    """Counts and edges, in single precision as it was measured: no bin is narrower than a rounding error."""
    told = values[~np.isnan(values)].astype(np.float32).astype(np.float64)
    return np.histogram(told, bins=bins)


def plot_histograms(findings: Findings, path: Path) -> None:
    """A histogram of every score, as PNG.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(findings.lines))
    rows = -(-len(findings.lines) // columns)
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)
    figure = Figure(figsize=(4 * columns, 2.6 * rows + 0.4), layout=layout)
    title = f"{findings.label}: {len(findings.records)} records, further right = more memorized"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, line in zip(axes, findings.lines, strict=False):
        counts, edges = counted(findings.scored.scores[line.name], 2 * BINS)
        axis.stairs(counts, edges, fill=True, color="#bbbbbb" if line.flat else "#4477aa")
        flat = "  (flat)" if line.flat else ""
        axis.set_title(line.name + flat, fontsize=10, loc="left", weight="bold")
        axis.set_xlabel(in_words(line), fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axis in axes[::columns]:
        axis.set_ylabel("records", fontsize=8)
    for axis in axes[len(findings.lines) :]:
        axis.remove()
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise UserError(f"cannot write --plot {path}: {error.strerror}") from None


def in_words(line: Line) -> str:
    """What a score's values are."""
    return ("minus " if SCORES[line.name].sign < 0 else "") + line.what


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
