"""What may still be held: the nodes that nothing deleted is in, derived from ledger, records and trie.

A request counts from its acknowledgement, so what it takes is residue from then on, carried out or not.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.errors import RunError
from llm_unlearn.exact.adapters import NAME, adapter_name, served_digest, to_bytes
from llm_unlearn.exact.copies import known
from llm_unlearn.exact.ledger import Request
from llm_unlearn.exact.served import read_lineage
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.exact.trie import Node
from llm_unlearn.export.adapters import Adapter
from llm_unlearn.serving.probe.looks import LiveAdapter


@dataclass(frozen=True)
class Clean:
    """One moment of a run.

    Attributes:
        epoch: entries of the ledger.
        nodes: keys of the nodes that may be held.
        deleted: by key of a node that may not, the request that took it, where one names it.
        weights: by SHA-256 of the weights of a node that may not be held, its key.
        requests: all, pending ones too.
        last: when the last of them was acknowledged or carried out; None without any.
    """

    epoch: int
    nodes: frozenset[str]
    deleted: dict[str, str]
    weights: dict[str, str]
    requests: tuple[Request, ...]
    last: float | None

    @classmethod
    def of(cls, run: RunDirectory) -> "Clean":
        epoch = run.ledger.count()
        requests = run.ledger.requests()
        wanted = run.wanted()
        taken = _pending_slices(requests)
        nodes = frozenset(key for key, node in wanted.items() if not _reads(node, taken))
        deleted = {
            key: request.id for request in requests for key in request.nodes if key not in nodes
        }
        deleted |= {
            key: taken_by for key, taken_by in _pending_nodes(wanted, taken) if key not in nodes
        }
        weights = {
            event.payload["weights"]: event.payload["node"]
            for event in run.ledger.events("trained")
            if event.payload["node"] not in nodes
        }
        moments = [m for r in requests for m in (r.acknowledged_at, r.finished_at) if m is not None]
        return cls(epoch, nodes, deleted, weights, tuple(requests), max(moments, default=None))

    @property
    def is_pending(self) -> bool:
        """Is a request acknowledged and not carried out?"""
        return any(request.finished_at is None for request in self.requests)

    def problem_of(self, nodes: Iterable[str]) -> str | None:
        """Why something made of these nodes must not be held any more."""
        for key in nodes:
            if key not in self.nodes:
                by = self.deleted.get(key)
                why = f"deleted by request {by}" if by else "which the run does not hold (any more)"
                return f"is made of node {key[:12]}, {why}"
        return None


def _pending_slices(requests: Iterable[Request]) -> dict[tuple[int, int], str]:
    """The slices that requests change that are not carried out, each with the id of one."""
    pending = [request for request in requests if request.finished_at is None]
    return {(target.shard, target.slice): r.id for r in pending for target in r.targets}


def _reads(node: Node, taken: dict[tuple[int, int], str]) -> bool:
    return any((node.shard, part) in taken for part in node.path)


def _pending_nodes(
    wanted: dict[str, Node], taken: dict[tuple[int, int], str]
) -> Iterable[tuple[str, str]]:
    for key, node in wanted.items():
        for part in node.path:
            if (node.shard, part) in taken:
                yield key, taken[node.shard, part]


def read_adapter(directory: Path, place: str, clean: Clean) -> LiveAdapter:
    """An adapter in a directory: its content, and whether it may be there."""
    lineage = read_lineage(directory)
    nodes = _nodes_of(lineage)
    try:
        held = Adapter.read(directory)
        data = to_bytes(held.tensors)
    except (RunError, OSError, ValueError, KeyError, TypeError, AttributeError):
        told = clean.problem_of(nodes or ()) or "cannot be read, so what it holds is not known"
        return LiveAdapter(directory.name, place, None, None, nodes or (), told)
    digest, tensors = served_digest(data, held.config), hashlib.sha256(data).hexdigest()
    if tensors in clean.weights:
        problem = clean.problem_of([clean.weights[tensors]])
    elif nodes is None:
        problem = "does not say what it is made of"
    else:
        problem = clean.problem_of(nodes)
        if problem is None and isinstance(lineage, dict) and lineage.get("digest") != digest:
            problem = "is not what its lineage says: its content is not known"
    return LiveAdapter(directory.name, place, digest, tensors, nodes or (), problem)


def _nodes_of(lineage: Any) -> tuple[str, ...] | None:
    """Keys of the nodes that a lineage names, of a served adapter or an exported one."""
    try:
        made_of = lineage.get("made_of", [lineage])
        return tuple(str(node["key"]) for entry in made_of for node in entry["nodes"])
    except (AttributeError, KeyError, TypeError):
        return None


def served_now(run: RunDirectory, clean: Clean) -> list[LiveAdapter]:
    """Every adapter in `served/`, by the name that a server gives it."""
    found = []
    for member in sorted(path.name for path in run.served.iterdir()) if run.served.exists() else ():
        read = read_adapter(run.served / member, f"served/{member}", clean)
        name = adapter_name(member, read.digest) if read.digest else member
        found.append(
            LiveAdapter(name, read.place, read.digest, read.tensors, read.nodes, read.problem)
        )
    return found


def retired_names(run: RunDirectory, current: Iterable[str]) -> list[str]:
    """Names under which adapters were served before, as far as the ledger and the register know.

    Args:
        current: names that are served now.
    """
    names: dict[str, None] = {}
    for event in run.ledger.events("served"):
        for member, digest in event.payload["digests"].items():
            shown = f"shard-{member}" if member.isdigit() else member
            names[adapter_name(shown, digest)] = None
    for copy in known(run):
        name = Path(copy.place).name
        if NAME.fullmatch(name):
            names[name] = None
    held = set(current)
    return [name for name in names if name not in held]
