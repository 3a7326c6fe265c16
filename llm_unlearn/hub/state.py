"""What the Hub holds of a run, as far as the ledger knows: read without the network.

Events, in the order in which a push writes them:

    copied      before anything is sent: the copy (kind `hub`, place: the repository), and what is meant
                to go there: `asked` (the repository that the person named), `per_shard`, `members`,
                `weights` (SHA-256 and size of every weight file, by path), `files` (digest of all files)
                and `parent` (the commit on which alone it can land)
    published   the `copy` is the `revision` of its repository; again after a squash
    purging     before anything is removed: every revision and LFS object that will be asked for
    purged      what each of them answered; `left` names what is still served
    copy gone   written only when nothing was left

So a copy that is not gone may be on the Hub, and one that is gone was asked for.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from llm_unlearn.exact.copies import HUB, Copy, known
from llm_unlearn.exact.served import read_lineage
from llm_unlearn.exact.store import RunDirectory

PUBLISHED, PURGING, PURGED = "published", "purging", "purged"


@dataclass(frozen=True)
class Publication:
    """One upload to one repository: intended, and perhaps done.

    Attributes:
        asked: the repository that the person named; with `per_shard` this is one of its parts.
        members: names of the directories of `served/` that it holds.
        weights: `sha256` and `size` of every weight file, by path in the repository.
        files: digest of all that it was to hold.
        parent: the commit on which alone it could land; None for the first of a repository.
        revisions: commits that are known to hold it, the newest last.
    """

    copy: Copy
    asked: str
    per_shard: bool
    members: tuple[str, ...]
    weights: dict[str, dict[str, Any]]
    files: str
    parent: str | None
    revisions: tuple[str, ...]

    @property
    def repository(self) -> str:
        return self.copy.place

    @property
    def is_gone(self) -> bool:
        return self.copy.gone is not None

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the weight files by path."""
        return {path: str(file["sha256"]) for path, file in self.weights.items()}


def publications(run: RunDirectory, repository: str | None = None) -> list[Publication]:
    """All uploads ever intended, oldest first; to one repository, or to any."""
    revisions: dict[str, list[str]] = {}
    for event in run.ledger.events(PUBLISHED):
        revisions.setdefault(event.payload["copy"], []).append(event.payload["revision"])
    details = {event.payload["id"]: event.payload for event in run.ledger.events("copied")}
    return [
        Publication(
            copy=copy,
            asked=details[copy.id]["asked"],
            per_shard=details[copy.id]["per_shard"],
            members=tuple(details[copy.id]["members"]),
            weights=details[copy.id]["weights"],
            files=details[copy.id]["files"],
            parent=details[copy.id]["parent"],
            revisions=tuple(revisions.get(copy.id, ())),
        )
        for copy in known(run)
        if copy.kind == HUB and "asked" in details[copy.id]
        if repository in (None, copy.place)
    ]


def purges(run: RunDirectory, repository: str) -> list[dict[str, Any]]:
    """What was found out by purging a repository, or those that it replaced; the oldest first."""
    return [
        {"asked_at": event.time, **event.payload}
        for event in run.ledger.events(PURGED)
        if repository in (event.payload["repository"], event.payload["replaced_by"])
    ]


def repositories(run: RunDirectory) -> list[str]:
    """Repositories that may hold something of the run."""
    return list(dict.fromkeys(p.repository for p in publications(run) if not p.is_gone))


def is_due(run: RunDirectory, repository: str, wanted: Container[str]) -> bool:
    """May a repository still serve what depends on deleted data?"""
    return any(
        publication.copy.is_stale(wanted)
        for publication in publications(run, repository)
        if not publication.is_gone
    )


def describe(run: RunDirectory) -> list[str]:
    """What each repository serves, one line each, and what has to be done about it.

    Nothing that was deleted and may still be on the Hub is left out: a copy is registered before
    it is uploaded, and counts as gone only when all of it was asked for in vain.
    """
    held: dict[str, list[Publication]] = {}
    for publication in publications(run):
        if not publication.is_gone:
            held.setdefault(publication.repository, []).append(publication)
    wanted = run.wanted() if held else {}
    return [line for name, found in held.items() for line in _lines(run, name, found, wanted)]


def _lines(
    run: RunDirectory, repository: str, held: Sequence[Publication], wanted: Container[str]
) -> list[str]:
    command = push_command(run, held[-1])
    if stale := [publication for publication in held if publication.copy.is_stale(wanted)]:
        own = [p for p in purges(run, repository) if p["repository"] == repository]
        if own and own[-1]["left"]:
            return [f"{repository}: {line}" for line in own[-1]["left"]] + [
                f"{repository} still serves what was deleted: `{command}` asks again (the Hub may take "
                f"a day or two), `{command} --fresh NEW_REPO_ID` publishes elsewhere and deletes it"
            ]
        return [_stale_line(run, publication, command) for publication in stale]
    done = [publication for publication in held if publication.revisions]
    if not done:
        return [f"{repository}: an upload was not finished: run `{command}`"]
    served = f"{repository} serves revision {done[-1].revisions[-1][:8]}"
    if sorted(done[-1].copy.nodes) != sorted(_nodes_of(run, done[-1].members)):
        return [f"{served}, an earlier state of the run: `{command}` brings it up to date"]
    return [f"{served}: what is served here"]


def _stale_line(run: RunDirectory, publication: Publication, command: str) -> str:
    """One publication that depends on what a request deleted."""
    nodes = set(publication.copy.nodes)
    requests = [r.id for r in run.ledger.requests() if not nodes.isdisjoint(r.nodes)]
    before = f"of before request {requests[0]}" if requests else "of before a deletion"
    what = (
        f"still serves revision {publication.revisions[-1][:8]}, {before}"
        if publication.revisions
        else f"may serve what an upload that was broken off left, {before}"
    )
    return f"{publication.repository} {what}: run `{command}`"


def _nodes_of(run: RunDirectory, members: Sequence[str]) -> list[str]:
    lineages = [read_lineage(run.served / member) or {"nodes": []} for member in members]
    return [node["key"] for lineage in lineages for node in lineage["nodes"]]


def push_command(run: RunDirectory, publication: Publication) -> str:
    """The command that brings a repository up to date."""
    option = " --per-shard" if publication.per_shard else ""
    return f"llm-unlearn push {run.path} {publication.asked}{option}"
