"""export, copies, near-duplicates."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_unlearn import console
from llm_unlearn.cli.application import PUBLISHING, REQUESTS, Json, RunPath, app, open_run
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from llm_unlearn.exact.copies import CopyStatus
    from llm_unlearn.exact.near_duplicates import NearDuplicate

MOST_SHOWN = 20  # near-duplicates that are shown one by one


@app.command(rich_help_panel=PUBLISHING)
def export(
    run: RunPath,
    output: Annotated[Path, typer.Option(help="A new directory, outside of the run.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="One model: the base model with the adapter in it.")
    ] = False,
    gguf_ready: Annotated[
        bool, typer.Option("--gguf-ready", help="What llama.cpp's converter reads.")
    ] = False,
    vllm: Annotated[
        bool, typer.Option("--vllm", help="Adapters as vLLM loads them, and the line that does.")
    ] = False,
    shard: Annotated[int | None, typer.Option(help="Only this shard.")] = None,
    as_json: Json = False,
) -> None:
    """Write what serving stacks load, registered so that a later deletion calls it stale."""
    from llm_unlearn.export.making import export

    asked = {"merged": merged, "gguf-ready": gguf_ready, "vllm": vllm}
    kinds = [kind for kind, is_wanted in asked.items() if is_wanted]
    if len(kinds) != 1:
        raise UserError("give one of --merged, --gguf-ready and --vllm")
    with console.attack_progress(enabled=not as_json) as say:
        done = export(open_run(run).directory, kinds[0], output, shard, say)
    if as_json:
        console.print_json(asdict(done))
        return
    held = f", {len(done.adapters)} adapters" if done.adapters else ""
    print(f"wrote {done.place} ({done.kind}{held}, {done.bytes / 1e6:.1f} MB) as copy {done.id}")
    print(f"how to load it: {done.place / 'README.md'}")


@app.command(rich_help_panel=PUBLISHING)
def copies(
    run: RunPath,
    add: Annotated[
        str | None, typer.Option(help="Register a copy made elsewhere: where it is.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="With --add: quantised, gguf, backup, ...")
    ] = None,
    parent: Annotated[
        str | None, typer.Option(help="With --add: id of the copy that it was made from.")
    ] = None,
    gone: Annotated[
        str | None, typer.Option(help="Id of a copy that does not exist any more; deletes nothing.")
    ] = None,
    delete: Annotated[
        str | None, typer.Option(help="Id of a stale export of this run: remove its directory.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Copies of what was served (exports, quantised files, the Hub): current, stale or gone."""
    from llm_unlearn.exact import copies as register
    from llm_unlearn.exact import copy_actions

    directory = open_run(run).directory
    if sum(value is not None for value in (add, gone, delete)) > 1:
        raise UserError("give one of --add, --gone and --delete")
    if (add is None and (kind or parent)) or (add is not None and kind is None):
        raise UserError("--add and --kind belong together, and --parent goes with them")
    if add is not None and kind is not None:
        made = copy_actions.add(directory, add, kind, parent)
        _say(as_json, f"registered {made.place} as copy {made.id}, made from {_origin(parent)}")
    elif gone is not None:
        copy_actions.declare_gone(directory, gone)
        _say(as_json, f"noted that copy {gone} is gone")
    elif delete is not None:
        _say(as_json, f"deleted {copy_actions.delete_export(directory, delete)}")
    elif not as_json:
        _print_copies(run, register.statuses(directory))
    if as_json:
        console.print_json([status.to_dict() for status in register.statuses(directory)])


def _say(as_json: bool, text: str) -> None:
    if not as_json:
        print(text)


def _origin(parent: str | None) -> str:
    return f"copy {parent}" if parent else "what is served now"


def _print_copies(run: Path, found: "list[CopyStatus]") -> None:
    if not found:
        print("no copies are known: `llm-unlearn export` makes some, `--add` registers others")
        return
    rows = []
    for status in found:
        made = datetime.fromtimestamp(status.copy.made_at, UTC).strftime("%Y-%m-%d %H:%M")
        note = status.note or ""
        rows.append((status.copy.id, status.copy.kind, status.copy.place, made, status.state, note))
    console.print_table(
        f"copies of {run}",
        ("id", "kind", "place", "made (UTC)", "state", "note"),
        rows,
    )
    stale = sum(status.state == "stale" for status in found)
    if stale:
        console.warn(
            f"{stale} of them hold deleted data: `--delete ID` removes an export, `--gone ID` says that you have "
            "removed another"
        )


@app.command("near-duplicates", rich_help_panel=REQUESTS)
def near_duplicates(
    run: RunPath,
    subject: Annotated[list[str], typer.Option(help="Whose records; repeatable.")],
    threshold: Annotated[
        float, typer.Option(help="Least similarity, above 0 and at most 1.")
    ] = 0.8,
    as_json: Json = False,
) -> None:
    """Who else holds nearly the same text as a subject's records; changes nothing."""
    opened = open_run(run)
    with console.steps_progress("slices", enabled=not as_json) as progress:
        found = opened.near_duplicates(subject, threshold, progress)
    if as_json:
        console.print_json([near.to_dict() for near in found])
    else:
        _print_near_duplicates(found, threshold)


def _print_near_duplicates(found: "list[NearDuplicate]", threshold: float) -> None:
    if not found:
        print(f"nobody else holds a text that is similar by {threshold:g} or more")
        return
    shown = sorted(found, key=lambda near: -near.similarity)[:MOST_SHOWN]
    records, holders = {near.record.id for near in found}, {near.other.subject for near in found}
    more = f" (the {len(shown)} most similar; --json has all)" if len(found) > len(shown) else ""
    console.print_table(
        f"{len(found)} near-duplicates of {len(records)} records, held by {len(holders)} others{more}",
        ("subject", "record", "similarity", "held by", "record of theirs"),
        [
            (
                near.record.subject,
                near.record.id[:12],
                "same text" if near.is_exact else f"{near.similarity:.2f}",
                near.other.subject + (" (permanent core)" if near.is_in_core else ""),
                near.other.id[:12],
            )
            for near in shown
        ],
    )
