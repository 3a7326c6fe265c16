"""Copies of what was served: exports, merges, quantised files, repositories on the Hub.

Each is registered in the ledger with the nodes that it was made of. A copy is stale when one of them
depends on something deleted since; a stale copy that is not known to be gone is outstanding.
"""

import secrets
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.errors import UserError
from llm_unlearn.exact.served import digest_of_served, read_lineage
from llm_unlearn.exact.store import RunDirectory

HUB = "hub"


@dataclass(frozen=True)
class Copy:
    """One copy that is known.

    Attributes:
        kind: what it is: `merged`, `gguf-ready`, `vllm`, `hub`, or a word of the user's.
        place: where it is: a path, or `repository@revision`.
        served: digest of what was served when it was made.
        nodes: keys of the nodes in it.
        gone: how it is known to be gone; None while it is not.
    """

    id: str
    kind: str
    place: str
    served: str | None
    nodes: tuple[str, ...]
    made_at: float
    gone: str | None = None

    def is_stale(self, wanted: Container[str]) -> bool:
        """Does it depend on deleted data?

        Args:
            wanted: keys of the nodes that the run wants now.
        """
        return any(node not in wanted for node in self.nodes)


def nodes_served(run: RunDirectory) -> list[str]:
    """Keys of the nodes that are served now."""
    lineages = [read_lineage(run.served / run.member_name(member)) for member in run.members]
    return [node["key"] for entry in lineages if entry for node in entry["nodes"]]


def register(
    run: RunDirectory,
    kind: str,
    place: str,
    parent: Copy | None = None,
    nodes: Sequence[str] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Copy:
    """Log a copy before it is made, so that a crash leaves none that nobody knows of.

    Args:
        parent: the copy that it was made from; what is served now by default.
        nodes: keys of the nodes in it, where it holds a part of its parent.
        details: what else its maker has to know of it later; it goes into the same event.
    """
    if nodes is None:
        nodes = parent.nodes if parent else nodes_served(run)
    served = parent.served if parent else digest_of_served(run)
    identity = secrets.token_hex(8)
    told = {"id": identity, "kind": kind, "place": place, "served": served, "nodes": list(nodes)}
    run.ledger.append("copied", {**(details or {}), **told})
    return next(copy for copy in known(run) if copy.id == identity)


def mark_gone(run: RunDirectory, identity: str, how: str) -> None:
    """Note that a copy does not exist any more.

    Args:
        how: who says so: `deleted`, `purged and asked for`, `declared by the operator`.

    Raises:
        UserError: no such copy.
    """
    if identity not in {copy.id for copy in known(run)}:
        raise UserError(
            f"no copy {identity!r} is known: `llm-unlearn copies {run.path}` lists them"
        )
    run.ledger.append("copy gone", {"id": identity, "how": how})


def known(run: RunDirectory) -> list[Copy]:
    """All copies ever registered, oldest first."""
    gone = {event.payload["id"]: event.payload["how"] for event in run.ledger.events("copy gone")}
    return [
        Copy(
            id=event.payload["id"],
            kind=event.payload["kind"],
            place=event.payload["place"],
            served=event.payload["served"],
            nodes=tuple(event.payload["nodes"]),
            made_at=event.time,
            gone=gone.get(event.payload["id"]),
        )
        for event in run.ledger.events("copied")
    ]


def outstanding(run: RunDirectory, wanted: Container[str] | None = None) -> list[Copy]:
    """Stale copies that are not known to be gone."""
    copies = [copy for copy in known(run) if copy.gone is None]
    if not copies:
        return []
    keys = run.wanted() if wanted is None else wanted
    return [copy for copy in copies if copy.is_stale(keys) and not _has_vanished(copy)]


def _has_vanished(copy: Copy) -> bool:
    """A local copy that is not there any more needs nobody's word."""
    return copy.kind != HUB and Path(copy.place).is_absolute() and not Path(copy.place).exists()
