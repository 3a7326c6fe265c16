"""Copies of what was served: exports, merges, quantised files, repositories on the Hub.

Each is registered in the ledger (`copied`) with the nodes that it was made of, before it is made. A copy is
stale when one of them depends on something deleted since; a stale copy that is not known to be gone
(`copy gone`) is outstanding. Both events name copies by random ids, and hold no name and no text.

    copied      id, kind, place, local, served; parent, if it was made from another copy; what its maker adds;
                nodes, or in nodes_of the id of an earlier copy with the same
    copy gone   id, how
"""

import os
import secrets
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm_unlearn import files
from llm_unlearn.errors import UserError
from llm_unlearn.exact.served import (
    digest_of_lineages,
    lineages_served,
)
from llm_unlearn.exact.store import RunDirectory

HUB = "hub"
NOT_FOUND, REPLACED = "not at its place any more", "its place was given to"

State = Literal["current", "stale", "gone"]


@dataclass(frozen=True)
class Copy:
    """One copy that is known.

    Attributes:
        kind: what it is: `merged`, `gguf-ready`, `vllm`, `hub`, or a word of the user's.
        place: where it is: a path, or `repository@revision`.
        served: digest of what was served when it was made.
        nodes: keys of the nodes in it.
        gone: how it is known to be gone; None while it is not.
        parent: id of the copy that it was made from; None for what was made from the run.
        is_local: `place` is a path that this machine can look at.
    """

    id: str
    kind: str
    place: str
    served: str | None
    nodes: tuple[str, ...]
    made_at: float
    gone: str | None = None
    parent: str | None = None
    is_local: bool = False

    def is_stale(self, wanted: Container[str]) -> bool:
        """Does it depend on deleted data?

        Args:
            wanted: keys of the nodes that the run wants now.
        """
        return any(node not in wanted for node in self.nodes)

    @property
    def half_written(self) -> Path:
        """Where it is while it is written or removed; what a crash leaves is found there."""
        return Path(self.place).with_name(f"{files.TEMPORARY_PREFIX}{self.id}")

    @property
    def is_half_written(self) -> bool:
        """Was it cut off while it was made or removed (or is that going on now)?"""
        return self.is_local and os.path.lexists(self.half_written)

    def is_at(self, place: str) -> bool:
        """Is it known to lie, whole, at a path of this machine?"""
        is_whole = self.gone is None and not self.is_half_written
        return self.is_local and self.place == place and is_whole

    @property
    def has_vanished(self) -> bool:
        """A local copy that is not there any more needs nobody's word.

        Where the whole directory above it is away, it may be a disk that is not mounted, so that
        counts as there.
        """
        if not self.is_local or self.is_half_written:
            return False
        return Path(self.place).parent.is_dir() and not os.path.lexists(self.place)


@dataclass(frozen=True)
class CopyStatus:
    """A copy and what became of it. `to_dict` is what `--json` prints."""

    copy: Copy
    state: State
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        copy = self.copy
        return {
            "id": copy.id,
            "kind": copy.kind,
            "place": copy.place,
            "state": self.state,
            "note": self.note,
            "made_at": copy.made_at,
            "parent": copy.parent,
            "served": copy.served,
            "nodes": len(copy.nodes),
        }


def nodes_served(run: RunDirectory) -> list[str]:
    """Keys of the nodes that are served now."""
    return _nodes_in(lineages_served(run))


def register(
    run: RunDirectory,
    kind: str,
    place: str,
    parent: Copy | None = None,
    nodes: Sequence[str] | None = None,
    details: Mapping[str, Any] | None = None,
    is_local: bool | None = None,
) -> Copy:
    """Log a copy before it is made, so that a crash leaves none that nobody knows of.

    What was registered at the same path on this machine is replaced by it, and noted as gone.

    Args:
        parent: the copy that it was made from; what is served now by default.
        nodes: keys of those in it, where it holds a part of that.
        details: what else its maker has to know of it later; it goes into the same event.
        is_local: by default, absolute paths are.
    """
    if parent is not None:
        served, whole = parent.served, parent.nodes
    else:
        lineages = lineages_served(run)
        served = digest_of_lineages(lineages) if run.served.exists() else None
        whole = _nodes_in(lineages)
    held = tuple(whole if nodes is None else nodes)
    if is_local is None:
        is_local = kind != HUB and Path(place).is_absolute()
    before = known(run)
    identity = secrets.token_hex(8)
    for copy in before:
        if is_local and copy.is_at(place):
            run.ledger.append("copy gone", {"id": copy.id, "how": f"{REPLACED} {identity}"})
    payload: dict[str, Any] = dict(details or {})
    payload |= {"id": identity, "kind": kind, "place": place, "served": served, "local": is_local}
    payload |= {"parent": parent.id} if parent else {}
    same = next((copy for copy in before if copy.nodes == held), None)
    run.ledger.append("copied", payload | ({"nodes_of": same.id} if same else {"nodes": held}))
    return _copy(payload, held, time.time(), None)


def find(run: RunDirectory, identity: str) -> Copy:
    """The copy of an id.

    Raises:
        UserError: no such copy.
    """
    found = next((copy for copy in known(run) if copy.id == identity), None)
    if found is None:
        raise UserError(
            f"no copy {identity!r} is known: `llm-unlearn copies {run.path}` lists them"
        )
    return found


def mark_gone(run: RunDirectory, identity: str, how: str) -> None:
    """Note that a copy does not exist any more; noting it twice is the same as once.

    Args:
        how: who says so: `deleted`, `purged and asked for`, `declared by the operator`.

    Raises:
        UserError: no such copy.
    """
    if find(run, identity).gone is None:
        run.ledger.append("copy gone", {"id": identity, "how": how})


def known(run: RunDirectory) -> list[Copy]:
    """All copies ever registered, oldest first."""
    gone = {event.payload["id"]: event.payload["how"] for event in run.ledger.events("copy gone")}
    copies: dict[str, Copy] = {}
    for event in run.ledger.events("copied"):
        payload = event.payload
        same = payload.get("nodes_of")
        nodes = copies[same].nodes if same else tuple(payload["nodes"])
        copies[payload["id"]] = _copy(payload, nodes, event.time, gone.get(payload["id"]))
    return list(copies.values())


def statuses(run: RunDirectory, wanted: Container[str] | None = None) -> list[CopyStatus]:
    """Every copy ever registered and its state, oldest first.

    Args:
        wanted: keys of the nodes that the run wants now, if the caller has them.
    """
    copies = known(run)
    if wanted is None and any(copy.gone is None for copy in copies):
        wanted = run.wanted()
    return [_status(copy, wanted or ()) for copy in copies]


def _status(copy: Copy, wanted: Container[str]) -> CopyStatus:
    if copy.gone is not None:
        return CopyStatus(copy, "gone", copy.gone)
    if copy.has_vanished:
        return CopyStatus(copy, "gone", NOT_FOUND)
    state: State = "stale" if copy.is_stale(wanted) else "current"
    note = "half written: the next export removes it" if copy.is_half_written else None
    return CopyStatus(copy, state, note)


def outstanding(run: RunDirectory, wanted: Container[str] | None = None) -> list[Copy]:
    """Stale copies that are not known to be gone."""
    return [status.copy for status in statuses(run, wanted) if status.state == "stale"]


def _copy(
    payload: dict[str, Any], nodes: tuple[str, ...], made_at: float, gone: str | None
) -> Copy:
    return Copy(
        id=payload["id"],
        kind=payload["kind"],
        place=payload["place"],
        served=payload["served"],
        nodes=nodes,
        made_at=made_at,
        gone=gone,
        parent=payload.get("parent"),
        is_local=payload.get("local", False),
    )


def _nodes_in(lineages: Iterable[dict[str, Any] | None]) -> list[str]:
    return [node["key"] for entry in lineages if entry for node in entry["nodes"]]
