"""An evaluation as one HTML page: no script, no network, nothing personal unless asked for.

The template escapes whatever a model said. Plots are images inside the page: an image cannot run
anything, and its names cannot clash with those of another plot.
"""

import base64
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn import files
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation import plots, tradeoff
from llm_unlearn.evaluation.catalogue import ARROWS, MEANINGS, describe, format_number, in_percent
from llm_unlearn.evaluation.results import Columns, Evaluation, Results, Text, Value

EXAMPLES = 12
SHOWN_ROLES = ("before", "model", "retrained")
# What a verdict is drawn as: a class of the style sheet and a sign, so that colour is not alone.
VERDICTS = {
    "passed": ("good", "✓"),
    "failed": ("bad", "✗"),
    "undecided": ("open", "?"),
    "no baseline": ("open", "–"),
}
# The first of these columns that a section has tells how much an answer changed.
CHANGE = ("rougeL_recall", "rougeL_f1", "exact")


@dataclass(frozen=True)
class Picture:
    """A plot with its caption."""

    title: str
    source: str
    caption: str


@dataclass(frozen=True)
class MetricRow:
    """One metric as the table shows it: everything is text already."""

    title: str
    name: str
    arrow: str
    meaning: str
    value: str
    interval: str
    n: int
    unscorable: int
    others: list[str]
    difference: str
    note: str


@dataclass(frozen=True)
class Example:
    """One prompt and what each role answered; texts are redacted already."""

    section: str
    row: int
    column: str
    prompt: str
    reference: str
    answers: list[tuple[str, str, str]]  # role, number, text
    change: float


def write_report(results: Results, path: Path, show_text: bool = False) -> None:
    """Write the page, readable by its owner only.

    Args:
        show_text: show prompts, references and answers; otherwise only how long they are.

    Raises:
        UserError: the directory does not exist.
    """
    roles = [role for role in results.others if role in ("retrained", "before")]
    decoys = [role for role in results.others if role not in roles]
    page = render(
        "report.html.jinja",
        results=results,
        verdicts=VERDICTS,
        others=[*roles, *decoys],
        metrics=[metric_row(results, name, [*roles, *decoys]) for name in results.model.values],
        pictures=_pictures(results),
        versus=next((d.versus for d in results.differences.values()), ""),
        examples=examples(results, show_text),
        show_text=show_text,
        evaluations=[results.model, *results.others.values()],
        configuration=json.dumps(results.configuration, indent=1, sort_keys=True, default=str),
        readings=readings(results.model.values),
        cost=cost,
    )
    write_page(path, page)


def render(template: str, folder: Path | None = None, **content: Any) -> str:
    """A page from a template in `folder` or beside this file; everything put in is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([*([folder] if folder else []), Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)


def write_page(path: Path, page: str) -> None:
    """Write text durably, mode 0600.

    Raises:
        UserError: the directory does not exist.
    """
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no directory {path.parent}")
    # A model can say half of a surrogate pair, which UTF-8 cannot hold.
    files.write_bytes(path, page.encode("utf-8", errors="replace"))


def picture(title: str, svg: bytes | None, caption: str) -> list[Picture]:
    """The plot as an image inside the page; nothing where nothing was drawn."""
    if svg is None:
        return []
    data = base64.b64encode(svg).decode("ascii")
    return [Picture(title, f"data:image/svg+xml;base64,{data}", caption)]


def readings(names: Iterable[str]) -> list[dict[str, str]]:
    """How to read each metric: formula, range, direction, source and needs."""
    return [
        {
            "title": info.title,
            "name": name,
            "meaning": MEANINGS[info.direction],
            "formula": info.formula or "not in the catalogue",
            "range": _range(info.low, info.high),
            "source": info.source or "–",
            "needs": info.needs or "–",
        }
        for name in names
        for info in [describe(name)]
    ]


def metric_row(results: Results, name: str, others: Iterable[str]) -> MetricRow:
    """One line of the table of metrics."""
    info, value = describe(name), results.model.values[name]
    difference = results.differences.get(name)
    told = ""
    if difference is not None and math.isfinite(difference.mean):
        ends = [difference.lower, difference.upper]
        told = f"{_signed(name, difference.mean, results.profile)}"
        if all(map(math.isfinite, ends)):
            told += " [" + ", ".join(_signed(name, end, results.profile) for end in ends) + "]"
    detail = [f"{key} = {_plain(number)}" for key, number in value.detail.items()]
    return MetricRow(
        info.title,
        name,
        ARROWS[info.direction],
        MEANINGS[info.direction],
        format_number(name, value.value, results.profile)
        + (" %" if in_percent(name, results.profile) else ""),
        interval(name, value, results.profile),
        value.n,
        value.n_unscorable,
        [
            format_number(name, _of(results.others[role], name).value, results.profile)
            for role in others
        ],
        told,
        "; ".join([value.note] * bool(value.note) + detail),
    )


def interval(name: str, value: Value, profile: str) -> str:
    """`[lower, upper]`, or nothing where there is none."""
    if math.isnan(value.lower) or math.isnan(value.upper):
        return ""
    low, high = (format_number(name, end, profile) for end in (value.lower, value.upper))
    return f"[{low}, {high}]"


def examples(results: Results, show_text: bool) -> list[Example]:
    """At most twelve prompts with the answers of every role, the largest change first.

    Change: `|score of the model - score of before|` on the row (of `retrained` without a `before`),
    by ROUGE-L recall or else F1 or exact match. Rows without it come last, in order.
    """
    said = {
        role: {(text.section, text.row): text for text in one.texts}
        for role, one in {**results.others, "model": results.model}.items()
        if role in SHOWN_ROLES
    }
    show = _as_is if show_text else redact
    found = [
        _example(results, key, {role: said[role][key] for role in said if key in said[role]}, show)
        for key in said["model"]
    ]
    found.sort(key=lambda e: (math.isnan(e.change), -e.change, e.section, e.row))
    return found[:EXAMPLES]


def redact(text: str) -> str:
    words = len(text.split())
    return f"redacted ({words} word{'' if words == 1 else 's'})"


def cost(one: Evaluation, name: str) -> str:
    """A cost for people; a dash where it was not measured."""
    value = one.cost.get(name)
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value / 2**30:.2f} GiB" if name.endswith("_bytes") else f"{value:,.0f}"


def _example(
    results: Results,
    key: tuple[str, int],
    texts: Mapping[str, Text],
    show: Callable[[str], str],
) -> Example:
    section, row = key
    evaluations = {"model": results.model, **results.others}
    column = next(
        (name for name in CHANGE if name in results.model.records.get(section, {})), "score"
    )
    scores = {
        role: _number(one.records.get(section, {}), column, row)
        for role, one in evaluations.items()
    }
    reference = next((role for role in ("before", "retrained") if role in scores), "model")
    change = abs(scores["model"] - scores[reference])
    text = texts["model"]
    answers = [
        (role, _plain(scores[role]), show(texts[role].answer))
        for role in SHOWN_ROLES
        if role in texts
    ]
    return Example(section, row, column, show(text.prompt), show(text.reference), answers, change)


def _number(columns: Columns, name: str, row: int) -> float:
    return float(columns[name][row]) if name in columns and row < len(columns[name]) else math.nan


def _pictures(results: Results) -> list[Picture]:
    found = picture(
        "The main questions",
        plots.metric_bars(results),
        "Bars with 95 % intervals. What is asked about forgotten text should be as the retrained "
        "model's, neither above nor below.",
    )
    found += picture(
        "Like retraining?",
        plots.radar(results),
        "The outer ring is the retrained model, the centre as far from it as can be: 1 - |difference| "
        "(PrivLeak: 1 - |value|; utility: its share of the retrained model's, at most 1).",
    )
    found += picture(
        "Forgetting against utility",
        plots.tradeoff_plot(tradeoff.of_results(results)),
        "The star is the retrained model. P-values below 1e-30 are drawn there.",
    )
    found += picture(
        "Membership attacks",
        plots.roc_curves(results),
        "The dashed diagonal is chance. A retrained model need not lie on it.",
    )
    found += picture("By step", plots.curves_plot(results), "Bands are 95 % intervals.")
    return found


def _of(one: Evaluation, name: str) -> Value:
    return one.values.get(name, Value(math.nan))


def _signed(name: str, value: float, profile: str) -> str:
    text = format_number(name, value, profile)
    return text if text.startswith("-") else f"+{text}"


def _range(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return "–"
    return f"{low:g} to {'∞' if math.isinf(high) else format(high, 'g')}"


def _plain(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"


def _as_is(text: str) -> str:
    return text
