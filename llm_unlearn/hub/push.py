"""Push: publish what a run serves, and purge what was published before a deletion.

Every step can be repeated: the repository is compared with what it is to hold, only what differs is sent, and
what the ledger says decides what is purged. Killed anywhere, the same command goes on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact.copies import HUB, register
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.hub.card import make_card
from llm_unlearn.hub.client import GONE, Head, Hub, RemoteFile
from llm_unlearn.hub.content import (
    CARD_NAME,
    OF_THE_HUB,
    STATEMENT_NAME,
    Content,
    make_content,
    with_card,
)
from llm_unlearn.hub.evaluations import Evaluated, read_evaluation
from llm_unlearn.hub.names import check_base, check_repository
from llm_unlearn.hub.purge import Purged, Say, purge, silent, take_down
from llm_unlearn.hub.snapshot import Member, Snapshot, take_snapshot
from llm_unlearn.hub.state import PUBLISHED, is_due, publications
from llm_unlearn.signing import SignatureError, Signer


@dataclass(frozen=True)
class Options:
    """How to publish.

    Attributes:
        per_shard: a repository for every served adapter, named after it.
        base_model: what the base model is called on the Hub, where the run does not know.
        fresh: publish there instead, then delete the repository that was named.
        evaluations: directories whose results go into the card.
    """

    per_shard: bool = False
    base_model: str | None = None
    private: bool = False
    fresh: str | None = None
    evaluations: Sequence[Path] = ()


@dataclass(frozen=True)
class Pushed:
    """What became of one repository.

    Attributes:
        revision: what it serves now; None for one that was deleted.
        uploaded: did anything have to be sent?
        purged: what became of its past, where something was deleted since.
    """

    repository: str
    revision: str | None
    uploaded: bool
    purged: Purged | None = None

    def lines(self) -> list[str]:
        """What a person reads."""
        state = "is published" if self.uploaded else "held all of it already"
        own = [f"{self.repository} {state}: revision {self.revision[:8]}"] if self.revision else []
        return [*own, *(self.purged.lines() if self.purged else [])]


@dataclass(frozen=True)
class Push:
    """One push: what all of its repositories have in common."""

    run: RunDirectory
    hub: Hub
    accounts: tuple[str, ...]
    asked: str
    options: Options
    snapshot: Snapshot
    evaluations: Sequence[Evaluated]
    say: Say


def push(
    run: RunDirectory,
    repository: str,
    options: Options | None = None,
    hub: Hub | None = None,
    say: Say = silent,
) -> list[Pushed]:
    """Publish what a run serves.

    Args:
        repository: `namespace/name`, or a name in the account's own namespace.
        say: told what is being done.

    Raises:
        UserError: an impossible name, a base model that only this machine knows, a repository that
            holds something else, nobody logged in.
        RunError: nothing is served, a deletion came in between, or the Hub cannot be reached.
    """
    options = options or Options()
    for name in (repository, *([options.fresh] if options.fresh else [])):
        check_repository(name)
    base = check_base(run.shape.name_or_path, options.base_model)
    evaluations = [_evaluation(run, path) for path in options.evaluations]
    hub = hub or Hub()
    accounts = hub.accounts()
    asked = _full_name(repository, accounts)
    target = _full_name(options.fresh, accounts) if options.fresh else asked
    if options.fresh:
        _check_fresh(run, asked, target)
    if options.base_model is None and hub.head(base) is None:
        raise UserError(
            f"the base model {base} is not on the Hub, or not this token's: say what it is called there "
            "with --base_model NAMESPACE/NAME"
        )
    say("reading what is served")
    snapshot = take_snapshot(run, base)
    doing = Push(run, hub, accounts, target, options, snapshot, evaluations, say)
    parts = _parts(doing)
    done = {name: _publish(doing, name, members) for name, members in parts.items()}
    for taken_down, replaced_by in _remove_others(doing, asked, parts):
        done[taken_down.repository] = taken_down
        if replaced_by in parts:  # its statement tells what became of its predecessor
            content = _content(doing, replaced_by, parts[replaced_by])
            revision, _ = _bring_up(doing, content, _open(doing, replaced_by))
            done[replaced_by] = replace(done[replaced_by], revision=revision)
    with run.changing("looking whether anything changed meanwhile"):
        snapshot.check_current()
    return list(done.values())


def _evaluation(run: RunDirectory, path: Path) -> Evaluated:
    """An evaluation of what is served now.

    Raises:
        UserError: it was made before the last deletion, of another model therefore.
    """
    found = read_evaluation(path)
    deletions = run.ledger.events("deleted")
    if deletions and found.made_at < deletions[-1].time:
        raise UserError(
            f"{path} was made before the last deletion: evaluate what is served now, and publish that"
        )
    return found


def _full_name(name: str, accounts: Sequence[str]) -> str:
    return check_repository(name if "/" in name else f"{accounts[0]}/{name}")


def _check_fresh(run: RunDirectory, old: str, new: str) -> None:
    if new == old:
        raise UserError(f"--fresh wants another repository than {old}, which it deletes")
    if not any(p.asked == old for p in publications(run)):
        raise UserError(
            f"{run.path} never published to {old}: without --fresh, push publishes there"
        )


def _parts(doing: Push) -> dict[str, tuple[Member, ...]]:
    """Which served adapters go where."""
    members = doing.snapshot.members
    if not doing.options.per_shard:
        return {doing.asked: members}
    return {_part_name(doing.asked, member.name): (member,) for member in members}


def _part_name(asked: str, member: str) -> str:
    return check_repository(f"{asked}-{member}")


def _publish(doing: Push, repository: str, members: Sequence[Member]) -> Pushed:
    """Bring one repository to what it is to hold, and purge its past if that is due."""
    hub, run = doing.hub, doing.run
    held = _open(doing, repository)
    revision, uploaded = _bring_up(doing, _content(doing, repository, members), held)
    if not is_due(run, repository, run.wanted()):
        return Pushed(repository, revision, uploaded)
    purged = purge(run, hub, repository, say=doing.say)
    # The statement tells what was purged, which is known only now.
    revision, _ = _bring_up(doing, _content(doing, repository, members), _open(doing, repository))
    return Pushed(repository, revision, uploaded, purged)


def _content(doing: Push, repository: str, members: Sequence[Member]) -> Content:
    content = make_content(doing.snapshot, repository, members)
    return with_card(doing.snapshot, content, make_card(doing.snapshot, content, doing.evaluations))


def _open(doing: Push, repository: str) -> Head:
    """The repository, made if it is not there.

    Raises:
        UserError: it is public and was to be private.
    """
    hub, private = doing.hub, doing.options.private
    head = hub.head(repository)
    if head is None:
        doing.say(f"making {repository}")
        hub.create(repository, private)
        head = hub.head(repository)
    if head is None:
        raise RunError(f"{repository} was made and does not answer: run the same command again")
    if private and not head.private:
        raise UserError(f"{repository} is public already: make it private on its page, then push")
    return head


def _bring_up(doing: Push, content: Content, head: Head) -> tuple[str, bool]:
    """Make main hold exactly this, in one commit; returns the revision, and whether one was made.

    The copy is in the ledger before anything is sent.
    """
    hub, run, repository = doing.hub, doing.run, content.repository
    held = hub.files(repository, head.revision)
    _check_ours(doing, repository, head, held)
    write, remove = content.changes(held)
    if not write and not remove:
        _note(doing, content, head.revision)
        return head.revision, False
    copy = _register(doing, content, head.revision)
    doing.say(f"uploading {len(write)} files to {repository}")
    add = {path: content.files[path] for path in write}
    revision = hub.commit(
        repository, add, remove, f"Publish {copy} with llm-unlearn", head.revision
    )
    run.ledger.append(PUBLISHED, {"copy": copy, "revision": revision})
    _check_served(hub, content, revision, write)
    return revision, True


def _register(doing: Push, content: Content, parent: str | None) -> str:
    """Log what is about to be uploaded; returns the id of the copy.

    Raises:
        RunError: a deletion came in since the snapshot.
    """
    with doing.run.changing("registering what it publishes"):
        doing.snapshot.check_current()
        details = {
            "asked": doing.asked,
            "per_shard": doing.options.per_shard,
            "members": [member.name for member in content.members.values()],
            "weights": content.weights,
            "files": content.digest,
            "parent": parent,
        }
        copy = register(doing.run, HUB, content.repository, nodes=content.nodes, details=details)
    return copy.id


def _note(doing: Push, content: Content, revision: str) -> None:
    """The repository holds this already: the copy that brought it there has this revision."""
    known = [
        p
        for p in publications(doing.run, content.repository)
        if not p.is_gone and p.files == content.digest
    ]
    copy = known[-1].copy.id if known else _register(doing, content, None)
    if not known or revision not in known[-1].revisions:
        doing.run.ledger.append(PUBLISHED, {"copy": copy, "revision": revision})


def _check_served(hub: Hub, content: Content, revision: str, sent: Sequence[str]) -> None:
    """Does the new revision hold what it should and nothing else, and can what was sent be had?"""
    repository = content.repository
    write, remove = content.changes(hub.files(repository, revision))
    refused = [
        path
        for path in content.weights.keys() & set(sent)
        if hub.status_of_file(repository, revision, path) in GONE
    ]
    if wrong := [*write, *remove, *refused]:
        raise RunError(
            f"{repository} does not hold what was sent ({sorted(wrong)[0]}): run the same command again"
        )


def _check_ours(doing: Push, repository: str, head: Head, held: dict[str, RemoteFile]) -> None:
    """A repository that holds something else is not written over.

    Raises:
        UserError: it does.
    """
    if any(not p.is_gone for p in publications(doing.run, repository)):
        return
    foreign = sorted(held.keys() - {*OF_THE_HUB, CARD_NAME})
    if not foreign:
        return
    if STATEMENT_NAME in held:
        signed = doing.hub.read(repository, head.revision, STATEMENT_NAME)
        try:
            Signer.of(doing.run.path).public.read(signed)
            return
        except SignatureError:
            raise UserError(
                f"{repository} holds what another run published: choose another REPO_ID"
            ) from None
    raise UserError(
        f"{repository} holds {foreign[0]!r}, which this run did not publish: choose another REPO_ID"
    )


def _remove_others(
    doing: Push, asked: str, parts: dict[str, tuple[Member, ...]]
) -> Iterator[tuple[Pushed, str]]:
    """Delete the repositories of shards that are no more, and with `--fresh` those that were replaced.

    Yields what became of each, and the repository that replaces it.
    """
    options = doing.options
    old = {
        p.repository: p.members
        for p in publications(doing.run)
        if not p.is_gone and p.asked == asked and p.repository not in parts
        if options.fresh or (p.per_shard and options.per_shard)
    }
    for repository, members in old.items():
        is_part = options.per_shard and len(members) == 1
        heir = _part_name(doing.asked, members[0]) if is_part else doing.asked
        purged = take_down(doing.run, doing.hub, repository, doing.accounts, heir, doing.say)
        yield Pushed(repository, None, False, purged), heir
