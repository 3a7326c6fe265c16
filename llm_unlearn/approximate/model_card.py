"""The card that is written beside an unlearned model: what was done, and that nothing is guaranteed."""

from typing import TYPE_CHECKING, Any

from llm_unlearn.approximate.method import Method
from llm_unlearn.approximate.travelled import describe

if TYPE_CHECKING:
    from llm_unlearn.approximate.result import Report

NO_GUARANTEE = (
    "**This carries no guarantee.** The method is approximate: it lowers the measured knowledge of the "
    "forget set and may leave traces in the weights, which attacks such as relearning, quantisation or "
    "other prompts can bring back. A deletion that must be certain needs exact unlearning."
)
SUPPRESSION = (
    "**This suppresses, it does not remove.** The weights still hold what was to be forgotten; taking "
    "the wrapper away brings it back, and what the wrapper stores was computed from the forget set."
)


def model_card(method: Method, report: "Report") -> str:
    """Markdown with the Hub's metadata. It tells numbers of records and no text of any."""
    card = method.card
    front = {
        "base_model": report.base_model or None,
        "library_name": "peft" if report.is_adapter else "transformers",
        "tags": ["unlearning", "approximate-unlearning", report.method],
    }
    lines = ["---", *_yaml(front), "---", "", f"# Unlearned with {card.title}", ""]
    lines += [SUPPRESSION, ""] if report.is_suppression else []
    lines += [NO_GUARANTEE, "", "## What was done", "", card.idea, f"Source: {card.source}.", ""]
    if card.differs:
        lines += [f"Differs from it: {card.differs}", ""]
    rows = {
        "forget records": report.forget_records,
        "retain records": report.retain_records,
        "optimizer steps": report.steps,
        "trained parameters": f"{report.trained_parameters:,}",
        "seconds": f"{report.seconds:.1f}",
        "how far": describe(report.travelled),
        **report.flags,
        **{name: value for name, value in report.training.items() if value is not None},
    }
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    if report.diverged_at is not None:
        lines += [
            f"Training diverged at step {report.diverged_at}; these weights are the last whose loss was "
            "a number.",
            "",
        ]
    lines += [f"Note: {note}." for note in report.notes]
    lines += _standings(report)
    lines += ["## When it fails", "", card.fails_when, ""]
    return "\n".join(lines)


def _standings(report: "Report") -> list[str]:
    if not report.standings:
        return []
    rows = [
        f"| {epoch}{' (kept)' if epoch == report.kept_epoch else ''} | {one.forget:.3f} | {one.utility:.3f} |"
        for epoch, one in report.standings.items()
    ]
    head = ["## On the way", "", "| epoch | forget set known | utility |", "|---|---|---|"]
    return [*head, *rows, ""]


def _yaml(values: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"- {item}" for item in value)]
        elif value is not None:
            lines.append(f"{name}: {value}")
    return lines
