"""The study as one page, one table for a README, and the numbers for machines."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_unlearn import files
from llm_unlearn.evaluation.report import picture, render, write_page
from llm_unlearn.evaluation.statistics import Interval
from llm_unlearn.study import plots
from llm_unlearn.study.aims import AIMS, Row, is_judged, knowledge
from llm_unlearn.study.configurations import BASE
from llm_unlearn.study.results import Results

DASH = "–"
NOT_PRINTED = ("loss there", "orphans to base", "MB", "training, s")
SIGNS = {True: ("good", "✓"), False: ("bad", "✗"), None: ("", "")}
WHAT = {
    "exact": "facts answered right, %",
    "probability": "answer probability, % (TOFU's, the geometric mean over the answer's tokens)",
}


@dataclass(frozen=True)
class Cell:
    """A number as it is shown, and the class of the style sheet that colours it."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Table:
    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def to_markdown(self) -> str:
        lines = [
            "| " + " | ".join(self.columns) + " |",
            "|---" + "|---:" * (len(self.columns) - 1) + "|",
        ]
        lines += ["| " + " | ".join(cell.text for cell in row) + " |" for row in self.rows]
        return "\n".join(lines)


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, what it shows of a row, and which aim it stands for."""

    head: str
    show: Callable[[Results, Row], str]
    aim: str = ""


def write_study(results: Results, output: Path, command: str) -> list[Path]:
    """Write results.json, study.html and summary.md; returns their paths."""
    paths = [output / name for name in ("results.json", "study.html", "summary.md")]
    files.write_bytes(paths[0], json.dumps(results.to_dict(), indent=1).encode(), mode=0o644)
    tables = [headline(results), orphans(results), neighbours(results)]
    tables += [who_answers(results), out_of_domain(results), costs(results)]
    page = render(
        "study.html.jinja",
        Path(__file__).parent,
        about=results.about,
        what=WHAT[knowledge(results)],
        aims=AIMS,
        tables=[table for table in tables if table.rows],
        pictures=[
            *picture(
                "Knowledge about those who stay",
                plots.over_deletions(results),
                "Everybody who is left at that moment. Bands are 95 % intervals over seeds. The "
                "retrained model is trained again for every number of deletions.",
            ),
            *picture(
                "Knowledge against damage elsewhere",
                plots.knowledge_against_damage(results),
                "Before any deletion. What is always on answers questions that it was not trained for.",
            ),
        ],
        command=command,
    )
    write_page(paths[1], page)
    files.write_bytes(paths[2], (summary(results) + "\n").encode(), mode=0o644)
    return paths


def summary(results: Results) -> str:
    """The first table in Markdown, with what it says and how far the aims are reached."""
    table = headline(results)
    aims = "; ".join(aim.title for aim in AIMS.values())
    return "\n\n".join([f"**{table.title}**", table.to_markdown(), table.caption, f"Aims: {aims}."])


def headline(results: Results) -> Table:
    score, last = knowledge(results), max(results.deletions, default=0)
    counts = results.deletions
    columns = [
        Column(f"{n} deleted", _percent(f"retained named {score}", n), "before" if not n else "")
        for n in counts
    ]
    columns += [
        Column("kept, %", lambda r, row: _share(AIMS["kept"].value(r, row)), "kept"),
        Column("paraphrased", _percent(f"retained paraphrased {score}", 0)),
        Column(f"after {last}", _percent(f"retained paraphrased {score}", last)),
        Column("out of domain", _percent(f"public {score}", 0)),
        Column("loss there", _number("shift", 0, "+.2f")),
        Column("orphans to base", _percent("orphans by_base", last)),
        Column("deletion, s", lambda r, row: _plain(AIMS["deletion"].value(r, row)), "deletion"),
        Column("inference", _number("inference_ratio", 0, ".1f"), "inference"),
        Column("MB", _number("served_bytes", 0, ".1f", 1e-6)),
        Column("training, s", _number("training_seconds", 0, ".0f")),
    ]
    caption = (
        f"Knowledge about those who stay ({WHAT[score]}), mean ± half of the 95 % interval over "
        f"seeds where there are several. kept: share of the same people's after {last} deletions. "
        "loss there: nats a token over the base model's, out of domain. inference: seconds a prompt over "
        "one adapter's alone. ✓ and ✗: the aims, for methods that are exact without retraining; before "
        "any deletion against the best gated plain LoRA. A retrained model's deletion is its training, "
        "a rebuilt one's all deletions and the rebuild."
    )
    return _table("Does exact unlearning cost quality?", caption, results, columns)


def orphans(results: Results) -> Table:
    """What is said about those who went."""
    score, last = knowledge(results), max(results.deletions, default=0)
    if not last:
        return Table("", "", (), ())
    columns = [
        Column("named", _percent(f"orphans named {score}", last)),
        Column("paraphrased", _percent(f"orphans paraphrased {score}", last)),
        Column("name-free", _percent(f"orphans name_free {score}", last)),
        Column("ROUGE-L recall", _percent("orphans named rouge", last)),
        Column("probability", _percent("orphans named probability", last)),
        Column("extraction", _number("orphans extraction_strength", last, ".2f")),
        Column("another's fact", _percent("orphans substituted", last)),
        Column("to base", _percent("orphans by_base", last)),
        Column("KL to base", _number("orphans kl base", last, ".3f")),
        Column("KL to retrained", _number("orphans kl retrained", last, ".3f")),
        Column("KL to rebuilt", _number("orphans kl rebuilt", last, ".3f")),
        Column("forget quality p", _number("forget quality", last, ".2g")),
        Column("PrivLeak", _number("privleak", last, "+.0f")),
    ]
    caption = (
        f"Questions about the {last} deleted, before any rebuild. The retrained model beside which forget "
        "quality, PrivLeak and the divergence stand is served alike: gated beside gated, always on beside "
        "always on. Nothing of a deleted subject is left anywhere; what differs is who answers for them, and "
        "another's fact in place is what any model does that answers at all (read it beside the base)."
    )
    return _table(f"The forgotten, after {last} deletions", caption, results, columns)


def neighbours(results: Results) -> Table:
    """Those who share a slice with a deleted subject, beside all others."""
    score = knowledge(results)
    counts = [count for count in results.deletions if count]
    columns = [
        column
        for n in counts
        for column in (
            Column(f"{n} deleted: bystanders", _percent(f"bystanders {score}", n)),
            Column("how many", _number("bystanders", n, ".0f")),
            Column("others", _percent(f"others {score}", n)),
            Column("all", _percent(f"retained named {score}", n)),
        )
    ]
    caption = (
        "Bystanders share a slice with somebody who was deleted. Their knowledge is gone until "
        "`llm-unlearn rebuild` trains the slice again without the deleted."
    )
    judged = [row for row in results.rows if is_judged(row)]
    return _table("Bystanders", caption, results, columns, judged)


def who_answers(results: Results) -> Table:
    """Right unit, other unit or base: where a selection loses."""
    columns = []
    for wording in ("named", "paraphrased", "name_free"):
        head = wording.replace("_", "-")
        columns += [
            Column(f"{head}: own", _percent(f"retained {wording} by_own", 0)),
            Column("base", _percent(f"retained {wording} by_base", 0)),
            Column("knowledge", _percent(f"retained {wording} {knowledge(results)}", 0)),
        ]
    columns.append(Column("out of domain: base", _percent("public by_base", 0)))
    caption = (
        "Before any deletion, % of the weight in the answers: of the subject's own unit and of the base model; "
        "the rest is other units'. A knowledge below the own share is what its training did not teach; "
        "an own share below 100 % is what the selection loses."
    )
    return _table("What limits it: who answers", caption, results, columns)


def out_of_domain(results: Results) -> Table:
    """Each public set on its own."""
    sets = list(results.about["public"])
    columns = [
        Column(f"{name}: {head}", _percent(f"{name} {score}", 0))
        for name in sets
        for head, score in (("probability", "probability"), ("ROUGE", "rouge"), ("exact", "exact"))
    ]
    caption = "Before any deletion. %: answer probability, ROUGE-L recall and exact match."
    return _table("Out of domain", caption, results, columns)


def costs(results: Results) -> Table:
    columns = [
        Column("parameters", _number("parameters", 0, ",.0f")),
        Column("times a record is seen", _number("rows_seen", 0, ".0f")),
        Column("optimiser steps", _number("steps", 0, ",.0f")),
        Column("training, s", _number("training_seconds", 0, ".0f")),
        Column("served, MB", _number("served_bytes", 0, ".2f", 1e-6)),
        Column("all nodes, MB", _number("kept_bytes", 0, ".2f", 1e-6)),
        Column("ms a prompt", _number("prompt_seconds", 0, ".1f", 1e3)),
        Column("alone, ms", _number("alone_seconds", 0, ".1f", 1e3)),
    ]
    caption = (
        "The budget: in every sequence of every method a record is seen equally often on average, with equal "
        "batches. Steps and seconds count all sequences and shards."
    )
    return _table("Budgets and costs", caption, results, columns)


def _table(
    title: str,
    caption: str,
    results: Results,
    columns: Sequence[Column],
    rows: Sequence[Row] | None = None,
) -> Table:
    shown = results.rows if rows is None else rows
    heads = ("", *(column.head for column in columns))
    body = [[_name(row), *(_cell(results, row, c) for c in columns)] for row in shown]
    return Table(title, caption, heads, body)


def _name(row: Row) -> Cell:
    return Cell(row[0] if row[0] == BASE.name else plots.label(row))


def _cell(results: Results, row: Row, column: Column) -> Cell:
    text = column.show(results, row)
    if not column.aim or not is_judged(row) or text == DASH:
        return Cell(text)
    style, sign = SIGNS[AIMS[column.aim].verdict(results, row)]
    return Cell(f"{text} {sign}".strip(), style)


def _percent(name: str, deletions: int) -> Callable[[Results, Row], str]:
    return _number(name, deletions, ".0f", 100)


def _number(
    name: str, deletions: int, form: str, factor: float = 1.0
) -> Callable[[Results, Row], str]:
    def show(results: Results, row: Row) -> str:
        return _with_interval(results.get(row, deletions, name), form, factor)

    return show


def _with_interval(value: Interval, form: str, factor: float) -> str:
    if not math.isfinite(value.mean):
        return DASH
    text = format(value.mean * factor, form)
    if not math.isfinite(value.upper):
        return text
    reach = format((value.upper - value.mean) * factor, form.replace("+", ""))
    return text if float(reach.replace(",", "")) == 0 else f"{text} ± {reach}"


def _plain(value: float) -> str:
    return DASH if math.isnan(value) else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _share(value: float) -> str:
    return DASH if math.isnan(value) else f"{100 * value:.1f}"


def print_headline(results: Results, show: Callable[..., None]) -> None:
    """The first table without what a terminal has no room for."""
    table = headline(results)
    kept = [i for i, head in enumerate(table.columns) if head not in NOT_PRINTED]
    rows = [[row[i].text for i in kept] for row in table.rows]
    show(table.title, [table.columns[i] for i in kept], rows)
