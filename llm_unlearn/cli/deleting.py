"""delete, correct, records."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_unlearn import console
from llm_unlearn.cli.application import (
    MOST_SHARDS,
    REQUESTS,
    Json,
    RunPath,
    app,
    open_run,
    rebuild_run,
)
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_unlearn.exact.deletion import Deletion
    from llm_unlearn.exact.near_duplicates import NearDuplicate
    from llm_unlearn.exact.policy import Policy
    from llm_unlearn.exact.run import S3TRun


Rebuild = Annotated[
    bool, typer.Option(help="Then train what went, as if the old records had never been.")
]
PolicyPath = Annotated[
    Path | None, typer.Option(help="What is trained afterwards, and when (RUN/policy.toml).")
]


@app.command(rich_help_panel=REQUESTS)
def delete(  # noqa: PLR0913 - typer makes an option of every argument
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
    reason: Annotated[
        str | None, typer.Option(help="Why, for the ledger; with --subject. Nobody's name.")
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(help="By when, such as 2026-12-31; with --subject.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Asked again under it, nothing is done twice.")
    ] = None,
    with_duplicates: Annotated[
        bool, typer.Option(help="Also delete other subjects' records with the same text.")
    ] = False,
    near_duplicates: Annotated[
        str | None,
        typer.Option(
            help="Nearly the same text, held by others: warn, refuse, take or ignore (warn, up to 20,000 records)."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Say what would go, and who holds copies; change nothing.")
    ] = False,
    rebuild: Rebuild = False,
    policy: PolicyPath = None,
    as_json: Json = False,
) -> None:
    """Delete subjects exactly, all or none: what is served afterwards never saw them."""
    from llm_unlearn.exact.asks import make_ask, read_asks
    from llm_unlearn.exact.deletion import NEAR

    opened = open_run(run)
    asks = [make_ask(subject, reason, deadline, idempotency_key)] if subject else []
    asks += read_asks(from_file) if from_file else []
    if not asks:
        raise UserError("name at least one subject to delete: --subject NAME, or --from-file FILE")
    chosen = _policy(opened, policy, rebuild)
    if near_duplicates not in (None, *NEAR):
        raise UserError(f"--near-duplicates is {near_duplicates!r}, expected {', '.join(NEAR)}")
    done = opened.delete_all(asks, with_duplicates, dry_run, near_duplicates)
    if not as_json:
        _print_deletion(done, dry_run, near_duplicates == "take")
    after = _follow(opened, chosen, quiet=as_json) if done.requests else {}
    if as_json:
        console.print_json({**done.to_dict(), "dry_run": dry_run, "rebuilt_nodes": None, **after})


@app.command(rich_help_panel=REQUESTS)
def correct(
    run: RunPath,
    from_file: Annotated[
        Path,
        typer.Option(
            help="JSON lines: subject, record (its id), the columns of the new text; reason, "
            "deadline, idempotency_key."
        ),
    ],
    rebuild: Rebuild = False,
    policy: PolicyPath = None,
    as_json: Json = False,
) -> None:
    """Replace records, all or none: what depended on the old ones goes as in a deletion."""
    from llm_unlearn.exact.asks import read_corrections

    opened = open_run(run)
    corrections = read_corrections(from_file)
    chosen = _policy(opened, policy, rebuild)
    done = opened.correct(corrections)
    made = [answer.request for answer in done.answers if answer.state == "corrected"]
    if not as_json:
        repeated = len(corrections) - len(made)
        print(
            f"corrected {len(made)} records in {done.seconds:.2f} s: {done.nodes_removed} nodes "
            f"dropped; certificates: {run}/certificates"
            + (
                f"; {repeated} had been asked for under the same idempotency key"
                if repeated
                else ""
            )
        )
    after = _follow(opened, chosen, quiet=as_json) if made else {}
    if as_json:
        console.print_json({**asdict(done), "rebuilt_nodes": None, **after})


@app.command(rich_help_panel=REQUESTS)
def records(
    run: RunPath,
    subject: Annotated[str, typer.Option(help="Whose records.")],
    as_json: Json = False,
) -> None:
    """The records of a subject with their ids, as the run holds them."""
    held = open_run(run).records_of(subject)
    if as_json:
        console.print_json([asdict(record) for record in held])
        return
    for record in held:
        print(f"{record.id}  {json.dumps(record.content, ensure_ascii=False)}")


def _policy(opened: "S3TRun", path: Path | None, rebuild: bool) -> "Policy":
    """Read before anything is deleted, so that a mistake in it changes nothing."""
    from llm_unlearn.exact.policy import REBUILD, Policy, read_policy

    return Policy(after_deletion=REBUILD) if rebuild else read_policy(opened.directory, path)


def _follow(opened: "S3TRun", policy: "Policy", quiet: bool) -> dict[str, Any]:
    """Do what the policy says after a deletion; returns what JSON says of it."""
    from llm_unlearn.exact.policy import BACKGROUND, REBUILD, decide, rebuild_in_background

    decision = decide(opened.directory, policy)
    if decision.action == REBUILD:
        trained = rebuild_run(opened, quiet)
        if not quiet:
            print(f"rebuilt {trained} nodes without the deleted data ({decision.reason})")
        return {"rebuilt_nodes": trained, "policy": asdict(decision)}
    if decision.action == BACKGROUND:
        log = rebuild_in_background(opened.directory)
        if not quiet:
            print(f"rebuilding in the background ({decision.reason}); log: {log}")
    return {"policy": asdict(decision)}


def _describe_near(found: "Sequence[NearDuplicate]") -> str:
    holders = sorted({copy.other.subject for copy in found})
    more = f" and {len(holders) - 3} more" if len(holders) > 3 else ""
    return (
        f"{len(found)} records of others ({', '.join(map(repr, holders[:3]))}{more}) hold nearly the "
        "same text and stay (--near-duplicates take takes them, refuse deletes nobody then)"
    )


def _print_deletion(done: "Deletion", dry_run: bool, took_near: bool) -> None:
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
    if done.near_duplicates and not took_near:
        console.warn(_describe_near(done.near_duplicates))
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
