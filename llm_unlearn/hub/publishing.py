"""What the commands and the recipes call: an exact run or an approximate result, by its directory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.hub import push as exact
from llm_unlearn.hub.client import Hub
from llm_unlearn.hub.names import check_base, check_repository
from llm_unlearn.hub.purge import Purged, Say, silent, take_down
from llm_unlearn.hub.purge import purge as purge_one
from llm_unlearn.hub.push import Options, Pushed
from llm_unlearn.hub.state import publications, repositories
from llm_unlearn.hub.unlearned import REPORT_NAME, push_result


def push(
    path: Path,
    repository: str,
    options: Options | None = None,
    hub: Hub | None = None,
    say: Say = silent,
) -> list[Pushed]:
    """Publish an exact run (`hub.push`), or what an approximate method left (`hub.unlearned`)."""
    if (path / REPORT_NAME).is_file():
        return [push_result(path, repository, options or Options(), hub, say)]
    return exact.push(RunDirectory.open(path), repository, options, hub, say)


def purge(
    path: Path,
    repository: str | None = None,
    delete: bool = False,
    hub: Hub | None = None,
    say: Say = silent,
) -> list[Purged]:
    """Remove every earlier revision of a run's repositories, and ask for all that was ever there.

    Args:
        repository: one of them; all that may hold something by default.
        delete: delete the repository itself.

    Raises:
        UserError: the run published nothing there.
        RunError: main itself serves what was deleted.
    """
    run = RunDirectory.open(path)
    if repository is not None:
        check_repository(repository)
    names = repositories(run)
    if repository is not None:
        known = {name for p in publications(run) for name in (p.asked, p.repository)}
        if repository not in known:
            raise UserError(f"{path} never published to {repository}: nothing was purged")
        parts = {p.repository for p in publications(run) if p.asked == repository}
        names = [name for name in names if name == repository or name in parts]
    if delete and repository is None:
        raise UserError("which repository is to be deleted? Give its REPO_ID with --delete")
    if not names:
        return []
    hub = hub or Hub()
    accounts = hub.accounts()
    if delete:
        return [take_down(run, hub, name, accounts, say=say) for name in names]
    return [purge_one(run, hub, name, everything=True, say=say) for name in names]


def check_purged(done: Sequence[Purged]) -> None:
    """Raises RunError where something is left: it was said what."""
    if left := [one.repository for one in done if one.left]:
        raise RunError(
            f"{', '.join(left)} still serves what was deleted: delete pull requests on its page, give the Hub a "
            "day or two, and push again; or push with --fresh NEW_REPO_ID"
        )


# Flags of the trainers that would publish in another way than this, with the reason.
_REFUSED = {
    "hub_always_push": "one revision is published, at the end",
    "hub_revision": "a run is published on main, where it can be purged",
}


def check_flags(arguments: Any, base: str) -> None:
    """Refuse, before anything is trained, what could not be published afterwards.

    Args:
        arguments: of the trainer, with its own flags of the Hub.
        base: the base model's name or path.

    Raises:
        UserError: names the flag.
    """
    if not arguments.push_to_hub:
        return
    for name, reason in _REFUSED.items():
        if getattr(arguments, name):
            raise UserError(f"--{name} is refused: {reason}")
    if "checkpoint" in str(arguments.hub_strategy).lower():
        raise UserError("--hub_strategy is refused: checkpoints are residues, and stay here")
    check_repository(repository_of(arguments))
    try:
        check_base(base, arguments.hub_base_model)
    except UserError as error:
        raise UserError(str(error).replace("--base_model", "--hub_base_model")) from None
    Hub(token=arguments.hub_token).accounts()


def repository_of(arguments: Any) -> str:
    """Where it goes: `--hub_model_id`, or the name of the output directory in the own namespace."""
    return str(arguments.hub_model_id or Path(str(arguments.output_dir)).resolve().name)


def publish(arguments: Any, path: Path, say: Say = silent) -> list[Pushed]:
    """Do what `--push_to_hub` asks for, when all is written.

    Raises:
        UserError, RunError: as `push`; the run itself is whole, and can be pushed later.
    """
    options = Options(base_model=arguments.hub_base_model, private=bool(arguments.hub_private_repo))
    return push(path, repository_of(arguments), options, Hub(token=arguments.hub_token), say)
