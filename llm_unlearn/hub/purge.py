"""Purging: what a repository held before is removed, and then asked for, one by one.

A new commit alone removes nothing: the old one goes on answering. So every other branch and every tag is
deleted, main is squashed to one commit, LFS objects that it does not name are deleted for good, and then
every revision and every object that the run ever put there is asked for. What is to be asked is in the ledger
before anything is removed, since a squashed history tells nothing; a copy counts as gone only when all of
it answered that it is.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_unlearn.errors import RunError
from llm_unlearn.exact.copies import mark_gone
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.hub.client import GONE, MAIN, Hub, References
from llm_unlearn.hub.content import OUT_OF_REACH
from llm_unlearn.hub.state import (
    PUBLISHED,
    PURGED,
    PURGING,
    Publication,
    publications,
    push_command,
)

Say = Callable[[str], None]
SQUASHED, DELETED = "squashed", "deleted"
NOT_FOUND = "404"


def silent(_: str) -> None:
    """Says nothing."""


@dataclass
class Purged:
    """What became of a repository's past.

    Attributes:
        how: `squashed`, or `deleted` with the repository.
        revisions, objects: what each answered, by commit and by SHA-256.
        left: what is still served, one line each; empty if the purge is complete.
        references: branches and tags that were deleted.
    """

    repository: str
    how: str
    revisions: dict[str, str] = field(default_factory=dict)
    objects: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    out_of_reach: list[str] = field(default_factory=lambda: list(OUT_OF_REACH))

    def lines(self) -> list[str]:
        """What a person reads."""
        asked = f"asked for {len(self.revisions)} revisions and {len(self.objects)} weight files"
        found = [
            f"{self.repository} was {self.how}: {asked}, {'NOT all' if self.left else 'all'} gone"
        ]
        if self.references:
            found.append(f"  branches and tags that were deleted: {', '.join(self.references)}")
        found += [f"  still there: {line}" for line in self.left]
        return [*found, "  out of reach:", *(f"  - {line}" for line in self.out_of_reach)]


@dataclass(frozen=True)
class Past:
    """What is to be asked for.

    Attributes:
        copies: publications that are gone if none of it answers.
        revisions: commits.
        objects: sizes of their weight files in bytes, by SHA-256.
        old: SHA-256 of every weight file that was ever there and is not to be there now.
        pulls: by commit, a pull request that keeps it.
    """

    copies: tuple[Publication, ...]
    revisions: frozenset[str]
    objects: Mapping[str, int]
    old: frozenset[str] = frozenset()
    pulls: Mapping[str, str] = field(default_factory=dict)


def purge(
    run: RunDirectory, hub: Hub, repository: str, everything: bool = False, say: Say = silent
) -> Purged:
    """Leave nothing in a repository but what was published last, and ask whether that is so.

    Args:
        everything: ask again for what answered that it is gone before.

    Raises:
        RunError: main serves what was deleted, or another thing than was published.
    """
    current = _current(run, hub, repository)
    say(f"looking for what {repository} held before")
    references = hub.references(repository)
    past = _past(run, hub, current, references, everything)
    names = [copy.copy.id for copy in past.copies]
    revisions = sorted(past.revisions)
    _log(run, PURGING, repository, copies=names, revisions=revisions, objects=dict(past.objects))
    removed = _remove_references(hub, repository, references, say)
    say(f"squashing {repository}")
    hub.squash(repository)
    head = _note_head(run, hub, current)
    remaining = hub.references(repository)
    say(f"deleting old files of {repository} for good")
    if hub.delete_objects(repository, keep=set(current.digests.values())):
        head = _note_head(run, hub, current)  # rewriting a history may move its end
    found = Purged(repository, SQUASHED, references=removed)
    found.left += [
        f"{name} could not be deleted"
        for name in (*remaining.branches, *remaining.tags)
        if name != MAIN
    ]
    _ask(hub, found, past, head, say)
    _finish(run, found, past)
    return found


def take_down(
    run: RunDirectory,
    hub: Hub,
    repository: str,
    accounts: Collection[str],
    replaced_by: str | None = None,
    say: Say = silent,
) -> Purged:
    """Delete a repository, and ask whether it is gone.

    Args:
        accounts: those of the token. Where nothing answers before anything was deleted, only theirs
            is known to be gone: others' may be private.
        replaced_by: the repository that now holds what this one held.

    Raises:
        RunError: it cannot be told whether it is gone.
    """
    live = [p for p in publications(run) if not p.is_gone]
    copies = tuple(p for p in live if p.repository == repository)
    elsewhere = _objects([p for p in live if p.repository != repository])
    revisions = frozenset(revision for copy in copies for revision in copy.revisions)
    objects = {oid: size for oid, size in _objects(copies).items() if oid not in elsewhere}
    past = Past(copies, revisions, objects)
    is_owner = repository.split("/")[0] in accounts
    if hub.head(repository) is None and not is_owner:
        raise RunError(
            f"{repository} does not answer, and is not this token's: whether it is gone or private cannot be "
            "told. Use a token of its owner"
        )
    names = [copy.copy.id for copy in copies]
    _log(run, PURGING, repository, copies=names, revisions=sorted(revisions), objects={})
    say(f"deleting {repository}")
    hub.delete(repository)
    found = Purged(repository, DELETED)
    if hub.head(repository) is None:
        found.revisions = dict.fromkeys(sorted(revisions), NOT_FOUND)
        found.objects = dict.fromkeys(sorted(past.objects), NOT_FOUND)
    else:
        found.left.append("the repository still answers after it was deleted")
    _finish(run, found, past, replaced_by)
    return found


def _current(run: RunDirectory, hub: Hub, repository: str) -> Publication:
    """What main is to go on serving.

    Raises:
        RunError: it depends on deleted data, or nothing was published there.
    """
    held = [p for p in publications(run, repository) if not p.is_gone and p.revisions]
    if not held:
        raise RunError(f"{run.path} published nothing to {repository} that could be purged")
    if held[-1].copy.is_stale(run.wanted()):
        raise RunError(
            f"{repository} still serves what was deleted: run `{push_command(run, held[-1])}`, which "
            "publishes what is left and purges"
        )
    return held[-1]


def _past(
    run: RunDirectory,
    hub: Hub,
    current: Publication,
    references: References,
    everything: bool,
) -> Past:
    """All that the ledger and the repository itself know of what was there.

    What answered 404 is not asked for again: a commit does not come back. A file could, with another
    upload, so those of all copies that are not gone are asked for.
    """
    repository, keep = current.repository, set(current.digests.values())
    ever = publications(run, repository)
    copies = tuple(p for p in ever if not p.is_gone and p.copy.id != current.copy.id)
    revisions = {revision for copy in ever for revision in copy.revisions}
    for event in _events(run, PURGING, repository):
        revisions |= set(event["revisions"])
    if not everything:
        for event in _events(run, PURGED, repository):
            revisions -= {r for r, answer in event["revisions"].items() if answer == NOT_FOUND}
    for name in (*references.branches, *references.tags):
        revisions |= set(hub.history(repository, name))
    pulls: dict[str, str] = {}
    for name in references.pulls:
        pulls |= dict.fromkeys(hub.history(repository, name), name)
    asked = _objects(ever if everything else copies)
    return Past(
        copies=copies,
        revisions=frozenset(revisions | pulls.keys()),
        objects={oid: size for oid, size in asked.items() if oid not in keep},
        old=frozenset(_objects(ever).keys() - keep),
        pulls=pulls,
    )


def _objects(copies: Collection[Publication]) -> dict[str, int]:
    return {file["sha256"]: int(file["size"]) for copy in copies for file in copy.weights.values()}


def _remove_references(hub: Hub, repository: str, references: References, say: Say) -> list[str]:
    """Delete what may keep an old commit: every branch but main, and every tag."""
    branches = [name for name in references.branches if name != MAIN]
    for name in branches:
        say(f"deleting branch {name} of {repository}")
        hub.delete_branch(repository, name)
    for name in references.tags:
        say(f"deleting tag {name} of {repository}")
        hub.delete_tag(repository, name)
    return [*branches, *references.tags]


def _note_head(run: RunDirectory, hub: Hub, current: Publication) -> str:
    """The commit that main is now, if it serves what it should.

    Raises:
        RunError: somebody changed it meanwhile.
    """
    repository = current.repository
    head = hub.head(repository)
    held = hub.files(repository, head.revision) if head else {}
    weights = {
        path: hub.sha256_of(repository, head.revision, path, file)
        for path, file in held.items()
        if head and path.endswith(".safetensors")
    }
    if head is None or weights != current.digests:
        raise RunError(
            f"{repository} was changed by somebody else meanwhile: run "
            f"`{push_command(run, current)}`"
        )
    known = {p.copy.id: p.revisions for p in publications(run, repository)}[current.copy.id]
    if not known or known[-1] != head.revision:
        run.ledger.append(PUBLISHED, {"copy": current.copy.id, "revision": head.revision})
    return head.revision


def _ask(hub: Hub, found: Purged, past: Past, head: str, say: Say) -> None:
    """Ask for everything that must be gone, and note what it answers."""
    repository = found.repository
    revisions = sorted(past.revisions - {head})
    say(f"asking {repository} for {len(revisions)} revisions and {len(past.objects)} files")
    for revision in revisions:
        answer, served = _ask_revision(hub, repository, revision, past.old)
        found.revisions[revision] = answer
        keeper = f", kept by {past.pulls[revision]}" if revision in past.pulls else ""
        found.left += [f"revision {revision[:8]} still has {path}{keeper}" for path in served]
    for oid, status in hub.statuses_of_objects(repository, past.objects).items():
        found.objects[oid] = str(status)
        if status not in GONE:
            found.left.append(f"an old weight file still answers ({oid[:12]}: {status})")


def _ask_revision(
    hub: Hub, repository: str, revision: str, old: Collection[str]
) -> tuple[str, list[str]]:
    """What a revision answers, and which old weight files it still serves."""
    if hub.is_gone(repository, revision):
        return NOT_FOUND, []
    served, refused = [], []
    for path, file in hub.files(repository, revision).items():
        if not path.endswith(".safetensors"):
            continue
        if hub.sha256_of(repository, revision, path, file) in old:
            status = hub.status_of_file(repository, revision, path)
            (refused if status in GONE else served).append(path)
    if served:
        return "serves old weight files", served
    return ("its old weight files are refused" if refused else "holds no old weight file"), []


def _finish(run: RunDirectory, found: Purged, past: Past, replaced_by: str | None = None) -> None:
    """Log the answers; only when nothing is left do the copies count as gone."""
    _log(
        run, PURGED, found.repository,
        how=found.how, revisions=found.revisions, objects=found.objects, left=found.left,
        out_of_reach=found.out_of_reach, replaced_by=replaced_by,
    )  # fmt: skip
    if not found.left:
        for copy in past.copies:
            mark_gone(run, copy.copy.id, f"{found.how} on the Hub, and asked for in vain")


def _log(run: RunDirectory, kind: str, repository: str, **payload: Any) -> None:
    run.ledger.append(kind, {"repository": repository, **payload})


def _events(run: RunDirectory, kind: str, repository: str) -> list[dict[str, Any]]:
    return [
        event.payload
        for event in run.ledger.events(kind)
        if event.payload["repository"] == repository
    ]
