"""plan, status, rebuild, verify."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_unlearn import console
from llm_unlearn.cli.application import MOST_SHARDS, RUNS, Json, RunPath, app, open_run, rebuild_run
from llm_unlearn.errors import RunError, UserError

if TYPE_CHECKING:
    from llm_unlearn.exact.run import RunStatus


@app.command(rich_help_panel=RUNS)
def plan(  # noqa: PLR0913 - typer makes an option of every argument
    num_shards: Annotated[int, typer.Option(help="Shards m.")] = 1,
    num_slices: Annotated[int, typer.Option(help="Slices L of a shard.")] = 4,
    num_sequences: Annotated[int, typer.Option(help="Sequences B per shard.")] = 2,
    sequence_method: Annotated[str, typer.Option(help="cyclic or random.")] = "cyclic",
    blocks: Annotated[str, typer.Option(help="ranks or layers.")] = "ranks",
    slice_data: Annotated[str, typer.Option(help="cumulative or disjoint.")] = "cumulative",
    adapter_bytes: Annotated[int | None, typer.Option(help="Size of one complete adapter.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this PNG file.")] = None,
    as_json: Json = False,
) -> None:
    """What m, L and B buy, before anything is trained: deletions, cost and storage."""
    from llm_unlearn.exact.plan import make_plan, plan_table, plot_plan

    try:
        made = make_plan(
            num_shards,
            num_slices,
            num_sequences,
            method=sequence_method,
            adapter_bytes=adapter_bytes,
            slice_data=slice_data,  # pyright: ignore[reportArgumentType]
            blocks=blocks,  # pyright: ignore[reportArgumentType]
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if plot is not None:
        plot_plan(made, plot)
    if as_json:
        console.print_json(made.to_dict())
        return
    console.print_table(
        f"m={num_shards} shards, L={num_slices} slices, B={num_sequences} sequences",
        ("what", "value"),
        plan_table(made),
    )


@app.command(rich_help_panel=RUNS)
def status(run: RunPath, as_json: Json = False) -> None:
    """What a run holds and serves, and which requests it has answered."""
    from llm_unlearn.hub.state import describe

    opened = open_run(run)
    current = opened.status()
    with opened.directory.changing("reading its status"):
        published = describe(opened.directory)
    if as_json:
        console.print_json(current.to_dict() | {"hub": published})
        return
    _print_status(current)
    for line in published:
        print(f"Hub: {line}")


def _print_status(current: "RunStatus") -> None:
    shown = current.shards[:MOST_SHARDS]
    more = len(current.shards) - len(shown)
    console.print_table(
        f"{current.path}: {current.blocks} blocks on {current.base_model}"
        + (f" (the first {len(shown)} shards; {more} more)" if more else ""),
        ("shard", "served", "of", "nodes", "missing", "subjects", "records", "by slice"),
        [
            (
                s.shard,
                s.served_depth,
                s.full_depth,
                s.nodes,
                s.missing_nodes,
                s.subjects,
                s.records,
                " ".join(map(str, s.slice_records)),
            )
            for s in shown
        ],
    )
    print(
        f"{current.requests} requests, {current.pending_requests} pending, "
        f"{current.deleted_subjects} subjects deleted; {current.storage_bytes / 1e6:.1f} MB on disk"
    )
    _print_deadlines(current)
    for copy in current.outstanding_copies:
        if copy.kind != "hub":  # said below, with what to do
            console.warn(f"a copy outside holds deleted data: {copy.kind} {copy.place} ({copy.id})")
    if current.core_records is not None:
        print(f"permanent core: {current.core_records} records, which cannot be deleted")
    if current.key_store is not None:
        print(f"encrypted at rest; keys in {current.key_store}")
    if not current.is_served:
        print("nothing is served yet")
    for shard in shown:
        if current.is_served and shard.served_depth == 0:
            alone = "base model" if current.core_records is None else "permanent core"
            print(f"shard {shard.shard} serves the {alone}")
    if any(shard.missing_nodes for shard in current.shards):
        print(f"to train what is missing: llm-unlearn rebuild {current.path}")
    for warning in current.warnings:
        console.warn(warning)


def _print_deadlines(current: "RunStatus") -> None:
    states = Counter(entry.state for entry in current.deadlines)
    if states:
        print("deadlines: " + ", ".join(f"{count} {state}" for state, count in states.items()))
    for entry in current.deadlines:
        if entry.state in ("open", "overdue"):
            due = datetime.fromtimestamp(entry.deadline, UTC)
            console.warn(f"request {entry.request} is {entry.state}: due {due:%Y-%m-%d %H:%M} UTC")


@app.command(rich_help_panel=RUNS)
def rebuild(run: RunPath, as_json: Json = False) -> None:
    """Finish pending requests, then train every missing or damaged node."""
    trained = rebuild_run(open_run(run), quiet=as_json)
    if as_json:
        console.print_json({"rebuilt_nodes": trained})
    else:
        print(f"trained {trained} nodes" if trained else "nothing was missing")


@app.command(rich_help_panel=RUNS)
def verify(
    run: RunPath,
    replay: Annotated[
        int, typer.Option(help="Train this many random nodes again and compare bits.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Check ledger, records, nodes, what is served and residues; exit 1 if anything is wrong."""
    checks = open_run(run).verify(replay)
    if as_json:
        console.print_json([{**vars(check), "passed": check.passed} for check in checks])
    else:
        for check in checks:
            verdict = "ok" if check.passed else "FAILED"
            print(
                f"{verdict:>6}  {check.name}: {check.examined} examined"
                + (f"; {check.skipped}" if check.skipped else "")
            )
            for problem in check.problems:
                print(f"        - {problem}")
    if not all(check.passed for check in checks):
        raise RunError(f"{run} failed verification")
