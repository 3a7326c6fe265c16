"""report."""

from pathlib import Path
from typing import Annotated

import typer

from llm_unlearn import console
from llm_unlearn.cli.application import REQUESTS, Json, RunPath, app


@app.command(rich_help_panel=REQUESTS)
def report(
    run: RunPath,
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("report.html"),
    before: Annotated[
        Path | None, typer.Option(help="Evaluation before the deletions (its --output_dir).")
    ] = None,
    after: Annotated[Path | None, typer.Option(help="Evaluation after them.")] = None,
    as_json: Json = False,
) -> None:
    """One page: is everything that was asked for done, and what is left? --json writes no page."""
    from llm_unlearn.run_report.headline import headline
    from llm_unlearn.run_report.page import write_run_report
    from llm_unlearn.run_report.reading import read_contents

    if as_json:
        contents = read_contents(run, before, after)
        console.print_json(contents.to_dict() | {"headline": vars(headline(contents))})
        return
    told = headline(write_run_report(run, output, before, after))
    print(f"{told.sentence} {told.served} {told.chain}")
    print(f"page: {output}")
