"""push, pull, purge."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_unlearn import console
from llm_unlearn.cli.application import PUBLISHING, Json, RunPath, app

if TYPE_CHECKING:
    from llm_unlearn.hub.pull import Pulled
    from llm_unlearn.hub.purge import Purged
    from llm_unlearn.hub.push import Pushed

RepositoryId = Annotated[str, typer.Argument(metavar="REPO_ID", help="NAMESPACE/NAME on the Hub.")]


@app.command(rich_help_panel=PUBLISHING)
def push(
    run: RunPath,
    repository: RepositoryId,
    per_shard: Annotated[
        bool, typer.Option("--per-shard", help="A repository for each shard: REPO_ID-shard-0, ...")
    ] = False,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base_model", "--base-model", help="What the base model is called on the Hub."
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    fresh: Annotated[
        str | None,
        typer.Option(
            metavar="NEW_REPO_ID", help="Publish there, then delete REPO_ID: the hard guarantee."
        ),
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(metavar="OUT", help="Put an evaluation's results on the card; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Publish what a run serves on the Hub; after a deletion, purge what was there before."""
    from llm_unlearn.hub.publishing import Options, check_purged, push

    options = Options(per_shard, base_model, private, fresh, evaluation or ())
    with console.attack_progress(enabled=not as_json) as say:
        done = push(run, repository, options, say=say)
    _show(done, as_json)
    check_purged([one.purged for one in done if one.purged])


def _show(done: "Sequence[Pushed | Purged]", as_json: bool) -> None:
    if as_json:
        console.print_json([asdict(one) for one in done])
        return
    for line in [line for one in done for line in one.lines()]:
        print(line)


@app.command(rich_help_panel=PUBLISHING)
def pull(
    repository: RepositoryId,
    output: Annotated[Path | None, typer.Option(help="Where it goes (./NAME).")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit (main).")] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="PEM", help="The signer's public key, from elsewhere.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch a published run, and refuse it if one byte is not what was signed."""
    from llm_unlearn.hub.pull import pull

    with console.attack_progress(enabled=not as_json) as say:
        pulled = pull(repository, output, revision, key, say=say)
    if as_json:
        console.print_json(asdict(pulled))
        return
    _show_pulled(pulled)


def _show_pulled(pulled: "Pulled") -> None:
    told = pulled.predicate
    print(
        f"{pulled.directory}: revision {pulled.revision[:8]} of {pulled.repository}, every byte as signed by "
        f"the key {pulled.key[:16]}; {len(told['requests'])} requests were carried out"
    )
    if not pulled.is_trusted:
        console.warn(
            f"the key was taken from the repository, and is only as good as that: compare {pulled.key}, "
            "or give the signer's with --key"
        )
    for note in pulled.notes:
        console.warn(note)
    for folder in pulled.folders[:1]:
        path = pulled.directory / folder
        print(f'load it: PeftModel.from_pretrained(base_model, "{path}")   on {pulled.base}')
    if len(pulled.folders) > 1:
        print(f"and {len(pulled.folders) - 1} more adapters beside it")
    if not pulled.folders:
        print(f"it holds no adapter: everything was deleted, and {pulled.base} is what is left")


@app.command(rich_help_panel=PUBLISHING)
def purge(
    run: RunPath,
    repository: Annotated[
        str | None, typer.Argument(metavar="[REPO_ID]", help="All that hold something by default.")
    ] = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete the repository with everything in it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove every earlier revision from the Hub, and ask for all that was ever there."""
    from llm_unlearn.hub.publishing import check_purged, purge

    with console.attack_progress(enabled=not as_json) as say:
        done = purge(run, repository, delete, say=say)
    _show(done, as_json)
    check_purged(done)
