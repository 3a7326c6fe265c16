"""delete."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_unlearn import console
from llm_unlearn.cli.application import MOST_SHARDS, Json, RunPath, app, open_run, rebuild_run
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from llm_unlearn.exact.deletion import Deletion


@app.command()
def delete(
    run: RunPath,
    subject: Annotated[
        list[str] | None, typer.Option(help="Subject to delete; repeatable.")
    ] = None,
    from_file: Annotated[
        Path | None,
        typer.Option(
            help="One subject a line, or JSON lines: subject, reason, deadline, idempotency_key."
        ),
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
    from llm_unlearn.exact.asks import Ask, read_asks

    opened = open_run(run)
    asks = [Ask(tuple(subject))] if subject else []
    asks += read_asks(from_file) if from_file else []
    if not asks:
        raise UserError("name at least one subject to delete: --subject NAME, or --from-file FILE")
    done = opened.delete_all(asks, with_duplicates, dry_run)
    trained = rebuild_run(opened, quiet=as_json) if rebuild and not dry_run else None
    if as_json:
        console.print_json({**done.to_dict(), "dry_run": dry_run, "rebuilt_nodes": trained})
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
    elif done.requests:
        depths = ", ".join(f"shard {shard}: {depth}" for shard, depth in done.served.items())
        if len(done.served) > MOST_SHARDS:
            depths = f"{sum(done.served.values())} in {len(done.served)} shards"
        print(
            f"deleted {done.subjects} subjects ({done.records} records) in {done.seconds:.2f} s: "
            f"{done.nodes_removed} nodes dropped; blocks served now: {depths or 'none'}"
        )
        many = f"{len(done.requests)} of them in certificates/"
        print(f"certificate: {done.certificate or many}")
    if repeated := sum(answer.state == "asked before" for answer in done.answers):
        print(
            f"{repeated} had been asked for under the same idempotency key; nothing was done twice"
        )
    for copy in done.outstanding_copies:
        console.warn(
            f"a copy outside holds deleted data: {copy.kind} {copy.place} (`llm-unlearn copies` lists them)"
        )
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
