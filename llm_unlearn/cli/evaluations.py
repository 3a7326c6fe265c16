"""compare, fuse."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llm_unlearn import console
from llm_unlearn.cli.application import EVALUATIONS, Json, app


@app.command(rich_help_panel=EVALUATIONS)
def compare(
    outs: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Directories of evaluations.")
    ],
    csv: Annotated[Path | None, typer.Option(help="Write the table as CSV.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Write a booktabs table.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with the plot.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the trade-off as PNG.")] = None,
    mixed: Annotated[bool, typer.Option(help="Allow different suites, profiles or data.")] = False,
    across_seeds: Annotated[
        bool, typer.Option(help="Means over runs of the same method or label.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Evaluations side by side, with the retrained reference marked."""
    from llm_unlearn.evaluation.compare import compare_command

    found = compare_command(outs, csv, latex, html, plot, mixed, across_seeds)
    if as_json:
        console.print_json(found.to_dict())
        return
    console.print_table(f"{found.suite}, profile {found.profile}", found.header, found.to_rows())
    for note in found.notes:
        console.warn(note)


@app.command(rich_help_panel=EVALUATIONS)
def fuse(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Directories that --method eul wrote.")
    ],
    output: Annotated[Path, typer.Option(help="Where the fused adapter goes.")],
    rank: Annotated[int | None, typer.Option(help="Its rank (the sum of all: exact).")] = None,
    ridge: Annotated[float, typer.Option(help="Times the mean diagonal; holds the rest.")] = 1e-6,
    as_json: Json = False,
) -> None:
    """Several requests' unlearning adapters as one ordinary LoRA, in closed form."""
    from llm_unlearn.approximate.fusion import fuse

    done = fuse(adapters, output, ridge, rank)
    if as_json:
        console.print_json(asdict(done))
        return
    print(
        f"fused {done.adapters} adapters of {done.layers} layers into {done.output}: rank {done.rank}, "
        f"{done.error:.1e} of a change left out at most"
    )
    console.warn(
        "gram.safetensors tells about the forget sets: delete it when nothing more is fused"
    )
