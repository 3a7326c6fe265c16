"""`llm-unlearn`: every command calls one function of the library and prints what it returns."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_unlearn import console
from llm_unlearn.errors import RunError, UserError

if TYPE_CHECKING:
    from llm_unlearn.exact.deletion import Deletion
    from llm_unlearn.exact.run import RunStatus, S3TRun

MOST_SHARDS = 20  # that are shown one by one

app = typer.Typer(
    help="Exact unlearning: plan, delete, rebuild and verify runs made by recipes/s3t.py; compare evaluations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def _open(path: Path) -> "S3TRun":
    from llm_unlearn.exact.run import S3TRun

    return S3TRun.open(path)


@app.command()
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


@app.command()
def status(run: RunPath, as_json: Json = False) -> None:
    """What a run holds and serves, and which requests it has answered."""
    current = _open(run).status()
    if as_json:
        console.print_json(current.to_dict())
    else:
        _print_status(current)


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
    if current.core_records is not None:
        print(f"permanent core: {current.core_records} records, which cannot be deleted")
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


@app.command()
def delete(
    run: RunPath,
    subject: Annotated[
        list[str] | None, typer.Option(help="Subject to delete; repeatable.")
    ] = None,
    from_file: Annotated[
        Path | None, typer.Option(help='One subject a line, or JSON lines with "subject".')
    ] = None,
    with_duplicates: Annotated[
        bool, typer.Option(help="Also delete other subjects' records with the same text.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Say what would go, and who holds copies; change nothing.")
    ] = False,
    rebuild: Annotated[
        bool, typer.Option(help="Then train what the deletion took, without it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete subjects exactly, all or none: what is served afterwards never saw them."""
    opened = _open(run)
    subjects = [*(subject or []), *(_read_subjects(from_file) if from_file else [])]
    done = opened.delete(subjects, with_duplicates, dry_run)
    trained = _rebuild(opened, quiet=as_json) if rebuild and not dry_run else None
    if as_json:
        console.print_json({**asdict(done), "dry_run": dry_run, "rebuilt_nodes": trained})
        return
    _print_deletion(done, dry_run)
    if trained is not None:
        print(f"rebuilt {trained} nodes without the deleted data")


def _print_deletion(done: "Deletion", dry_run: bool) -> None:
    if done.already_deleted:
        print(f"{done.already_deleted} of the subjects had been deleted before")
    if dry_run:
        print(
            f"would delete {done.subjects} subjects ({done.records} records) and drop "
            f"{done.nodes_removed} nodes; nothing was changed"
        )
    elif done.request is not None:
        depths = ", ".join(f"shard {shard}: {depth}" for shard, depth in done.served.items())
        if len(done.served) > MOST_SHARDS:
            depths = f"{sum(done.served.values())} in {len(done.served)} shards"
        print(
            f"deleted {done.subjects} subjects ({done.records} records) in {done.seconds:.2f} s: "
            f"{done.nodes_removed} nodes dropped; blocks served now: {depths or 'none'}"
        )
        print(f"certificate: {done.certificate}")
    if done.core_records:
        console.warn(
            f"{done.core_records} records of theirs are in the permanent core and stay: nothing can be "
            "deleted from it, that would need a new run"
        )
    if done.copies_elsewhere:
        console.warn(
            f"{done.copies_elsewhere} records of other subjects hold the same text and stay: they "
            "are theirs (a deletion with --with-duplicates takes those too; --dry-run shows it first)"
        )


def _read_subjects(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    subjects = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            subjects.append(line.strip())
            continue
        try:
            subject = json.loads(line)["subject"]
            if subject is None:
                raise ValueError("no subject")
            subjects.append(str(subject))
        except (ValueError, KeyError):
            raise UserError(
                f'{path}, line {number}: expected JSON with a "subject"; nothing was deleted'
            ) from None
    return subjects


def _rebuild(opened: "S3TRun", quiet: bool) -> int:
    with console.training_progress(enabled=not quiet) as progress:
        return opened.rebuild(progress).trained  # pyright: ignore[reportArgumentType]


@app.command()
def rebuild(run: RunPath, as_json: Json = False) -> None:
    """Finish pending requests, then train every missing or damaged node."""
    trained = _rebuild(_open(run), quiet=as_json)
    if as_json:
        console.print_json({"rebuilt_nodes": trained})
    else:
        print(f"trained {trained} nodes" if trained else "nothing was missing")


@app.command()
def verify(
    run: RunPath,
    replay: Annotated[
        int, typer.Option(help="Train this many random nodes again and compare bits.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Check ledger, records, nodes, what is served and residues; exit 1 if anything is wrong."""
    checks = _open(run).verify(replay)
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


@app.command()
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
    from rich.markup import escape

    from llm_unlearn.evaluation.compare import compare_command

    found = compare_command(outs, csv, latex, html, plot, mixed, across_seeds)
    if as_json:
        console.print_json(found.to_dict())
        return
    rows = [[escape(cell) for cell in row] for row in found.to_rows()]
    title = escape(f"{found.suite}, profile {found.profile}")
    console.print_table(title, [escape(cell) for cell in found.header], rows)
    for note in found.notes:
        console.warn(escape(note))


@app.command()
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


def main() -> None:
    """Entry point: errors that a user can mend are one line."""
    console.run_and_exit(app)
