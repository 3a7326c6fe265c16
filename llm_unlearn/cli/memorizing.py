"""memorization."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_unlearn import console
from llm_unlearn.cli.application import EVALUATIONS, Json, app

if TYPE_CHECKING:
    from llm_unlearn.memorizing.findings import Findings


@app.command(rich_help_panel=EVALUATIONS)
def memorization(  # noqa: PLR0913 - typer makes an option of every argument
    target: Annotated[
        Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run, or a model's directory.")
    ],
    scores: Annotated[
        list[str] | None,
        typer.Option(help="Which scores; the first sorts. Repeatable; default: what was tracked."),
    ] = None,
    records: Annotated[
        str | None, typer.Option(help="Of a model: file or Hub dataset that it learnt.")
    ] = None,
    holdout: Annotated[
        str | None, typer.Option(help="--scores holdout: file or Hub dataset it never saw.")
    ] = None,
    counterfactual: Annotated[
        int, typer.Option(help="Train this many runs of the reference first.")
    ] = 0,
    most: Annotated[int, typer.Option(min=0, help="Most memorized records to list.")] = 10,
    show_text: Annotated[
        bool, typer.Option("--show_text", "--show-text", help="With ids, subjects and texts.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write histograms to this PNG file.")] = None,
    as_json: Json = False,
) -> None:
    """Which records a run or model has memorized: scores, histogram, agreement with the reference."""
    from llm_unlearn.memorizing.findings import find_memorized, plot_histograms
    from llm_unlearn.scoring import quiet
    from llm_unlearn.unlearning import read_source

    quiet()
    with console.stages_progress(not as_json) as advance:
        found = find_memorized(
            target, scores or (), read_source(records) if records else None,
            read_source(holdout) if holdout else (), counterfactual, advance,
        )  # fmt: skip
    if plot is not None:
        plot_histograms(found, plot)
    if as_json:
        console.print_json(found.to_dict(most, show_text))
        return
    _show(found, most, show_text)


def _show(found: "Findings", most: int, show_text: bool) -> None:
    from llm_unlearn.memorizing.findings import in_words

    rows = []
    for line in found.lines:
        values = (line.mean, line.low, line.middle, line.high)
        least = 1e-6 * max(map(abs, values))  # what only breaks ties
        numbers = [_cell(0.0 if abs(value) <= least else value, 4) for value in values]
        rho = "–"
        if line.agreement is not None and line.agreement.rho == line.agreement.rho:
            rho = (
                f"{line.agreement.rho:.2f} [{line.agreement.lower:.2f}, {line.agreement.upper:.2f}]"
            )
        flat = "flat" if line.flat else ""
        rows.append([line.name, *numbers, _cell(line.length), rho, _cell(line.controlled), flat])
    console.print_table(
        f"{found.label}: {len(found.records)} records, higher = more memorized",
        ("score", "mean", "low third", "middle", "high third", "with length", "with reference",
         "controlled", ""),
        rows,
    )  # fmt: skip
    if found.reference is not None:
        told = found.reference.reliability
        reliable = "reliability not known (four runs or more tell)"
        if told == told:
            best = max(told, 0) ** 0.5
            reliable = f"reliability {told:.2f} (a perfect score would reach about {best:.2f})"
        print(
            f"reference: {found.reference.runs} runs, {found.reference.seconds:.0f} s, {reliable}"
        )
    (sorts,) = [line for line in found.lines if line.name == found.order]
    print(f"\n{found.order}: {in_words(sorts)}")
    for bar in found.bars():
        print(bar)
    listed = found.most(most, show_text)
    if listed:
        cells = [[_cell(value) for value in row.values()] for row in listed]
        console.print_table("Most memorized", list(listed[0]), cells)
        if not show_text:
            print("whose they are, and what they say: --show_text")
    for note in found.notes:
        console.warn(note)


def _cell(value: object, digits: int = 3) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
