"""probe, sync-vllm."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_unlearn import console
from llm_unlearn.cli.application import (
    PUBLISHING,
    REQUESTS,
    Json,
    RunPath,
    app,
)
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from llm_unlearn.serving.outside.vllm import Synced
    from llm_unlearn.serving.probe.looks import Look, Probe

MOST_SHOWN = 12  # lines of one place that are shown
TokenFile = Annotated[
    Path | None, typer.Option("--token_file", help="Holds a bearer token; else LLM_UNLEARN_TOKEN.")
]
Seconds = Annotated[float, typer.Option(help="For one question.", min=0.1)]


@app.command(rich_help_panel=REQUESTS)
def probe(  # noqa: PLR0913 - a command has its options
    target: Annotated[str, typer.Argument(metavar="URL|RUN", help="A server, or a run directory.")],
    run: Annotated[Path | None, typer.Option(help="The run that the server serves.")] = None,
    served: Annotated[
        Path | None, typer.Option(help="Instead of --run: what `probe RUN --json` printed.")
    ] = None,
    token_file: TokenFile = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL: compare the answers, say about who was deleted.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="With --prompts: a run or a server that never saw the subject; else --run."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --prompts: who is asked.")] = None,
    max_tokens: Annotated[int, typer.Option("--max_tokens", help="Of an answer.", min=1)] = 32,
    show_text: Annotated[
        bool, typer.Option("--show_text", help="Show the first answers that differ.")
    ] = False,
    seconds: Seconds = 30.0,
    every: Annotated[bool, typer.Option("--all", help="List the clean adapters too.")] = False,
    as_json: Json = False,
) -> None:
    """Is anything left of what was deleted? On disk, or in a server's memory and caches."""
    from llm_unlearn.serving.probe.answers import Asking, read_prompts
    from llm_unlearn.serving.probe.probe import probe

    if prompts is None and (reference is not None or model is not None):
        raise UserError("--reference and --model go with --prompts")
    asking: Asking | None = None
    if prompts is not None:
        asking = Asking(read_prompts(prompts), max_tokens, model, reference, show_text)
    with console.attack_progress(enabled=not as_json) as say:
        say(f"looking at {target}")
        found = probe(target, run, served, token_file, asking, seconds)
    if as_json:
        console.print_json(found.to_dict())
    else:
        _print(found, every)
    if not found.is_clean:
        raise typer.Exit(1)


def _print(found: "Probe", every: bool) -> None:
    rows = [(look.place, look.examined, look.verdict) for look in found.looks]
    at = f" at epoch {found.epoch}" if found.epoch is not None else ""
    console.print_table(
        f"residue in {found.target}{at}", ("looked at", "how many", "verdict"), rows
    )
    for look in found.looks:
        _print_lines(look, "RESIDUE", look.problems)
        _print_lines(look, "not seen", look.unseen)
        _print_lines(look, "note", look.notes)
    bad = sum(len(look.problems) for look in found.looks)
    unseen = sum(bool(look.unseen) for look in found.looks)
    _print_adapters(found, every)
    places = "1 place" if unseen == 1 else f"{unseen} places"
    aside = f" {places} could not be looked at, or not wholly." if unseen else ""
    findings = "1 finding." if bad == 1 else f"{bad} findings."
    print((findings if bad else "Nothing deleted was found.") + aside)


def _print_adapters(found: "Probe", every: bool) -> None:
    """Those with a finding; the clean ones are a number, unless they are asked for."""
    verdicts = {
        adapter: "residue" if adapter.problem else "clean" if adapter.digest else "by name"
        for adapter in found.adapters
    }
    rows = [
        (adapter.name, (adapter.digest or "not seen")[:12], adapter.place, verdict)
        for adapter, verdict in verdicts.items()
        if every or verdict != "clean"
    ]
    if rows:
        console.print_table("adapters", ("name", "digest", "where", "verdict"), rows)
    counts = Counter(verdicts.values())
    held = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    left = sum(counts.values()) - len(rows)
    more = " (--all lists them by digest)" if left else ""
    print(f"live adapters: {held or 'none'}{more}")


def _print_lines(look: "Look", what: str, lines: list[str]) -> None:
    for line in lines[:MOST_SHOWN]:
        print(f"{what}: {look.place}: {line}")
    if len(lines) > MOST_SHOWN:
        print(f"{what}: {look.place}: and {len(lines) - MOST_SHOWN} more")


@app.command("sync-vllm", rich_help_panel=PUBLISHING)
def sync_vllm(  # noqa: PLR0913 - a command has its options
    run: RunPath,
    url: Annotated[str, typer.Argument(metavar="URL", help="Of a vLLM server.")],
    export: Annotated[
        Path | None, typer.Option(help="Where the adapters go; RUN-vllm beside the run by default.")
    ] = None,
    seen_as: Annotated[
        str | None,
        typer.Option("--seen_as", help="What the server calls that directory, if otherwise."),
    ] = None,
    watch: Annotated[bool, typer.Option(help="Follow the ledger until interrupted.")] = False,
    interval: Annotated[
        float, typer.Option(help="With --watch: seconds between looks.", min=0.05)
    ] = 1.0,
    token_file: TokenFile = None,
    seconds: Seconds = 120.0,
    as_json: Json = False,
) -> None:
    """Keep a vLLM server in step with a run: what is deleted is unloaded first, and its files go."""
    from llm_unlearn.serving.outside.vllm import Follower

    follower = Follower.of(run, url, export, seen_as, token_file, seconds)
    with console.attack_progress(enabled=not as_json) as say:
        if watch:
            follower.watch(interval, lambda done: _print_synced(done, as_json), console.warn)
        done = follower.sync(say)
    _print_synced(done, as_json)


def _print_synced(done: "Synced", as_json: bool) -> None:
    if as_json:
        console.print_json(done.to_dict())
        return
    print(
        f"in step at epoch {done.epoch}: {len(done.loaded)} adapters loaded, {len(done.unloaded)} unloaded, "
        f"{len(done.kept)} kept"
    )
    if done.in_memory:
        console.warn(
            f"{len(done.in_memory)} deleted adapters can still be in the server's memory, where unloading may leave "
            "them: restart it and run this again (docs/vllm.md)"
        )
    for name in done.others:
        console.warn(f"{name} is served there too and is not from this run: it was left alone")
