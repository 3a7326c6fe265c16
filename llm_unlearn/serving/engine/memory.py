"""The ensemble in memory, in step with the ledger.

The ledger is the truth. Whoever begins an answer first asks how many entries it has (`refresh`); when there
are more than before, what they say is done to the memory before anything is answered: an adapter that a
request reaches becomes zeros, at once, whether or not its files have been changed already, and what is
left of it is loaded when it is there. So no answer that begins after an acknowledgement reads what was deleted.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llm_unlearn.data.partition import CORE
from llm_unlearn.errors import RunError
from llm_unlearn.exact.adapters import MERGED, adapter_name, merged_name, tensors_digest
from llm_unlearn.exact.ensemble import ShardEnsemble
from llm_unlearn.exact.ledger import Request
from llm_unlearn.exact.served import read_lineage
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.exact.trie import CORE_STAGE
from llm_unlearn.serving.policy import Target
from llm_unlearn.serving.queries import Resident
from llm_unlearn.serving.selection_certificate import IndexBounds, retained_indexes

CHANGING = ("request", "deleted", "served")
"""Kinds of entries after which something else is to be served."""


@dataclass(frozen=True)
class Change:
    """What a refresh did to adapters that were served before, by their names.

    Attributes:
        tainted: they held what has been deleted; nothing that read them may go on.
        replaced: they held nothing deleted, and there is a better one now.
    """

    tainted: frozenset[str]
    replaced: frozenset[str]


@dataclass(frozen=True)
class Adapter:
    """What is served of one member of the run; `is_withdrawn`: nobody may read it."""

    member: str
    shard: int | None
    digest: str
    nodes: tuple[str, ...]
    epoch: int
    is_withdrawn: bool

    @property
    def name(self) -> str:
        """Another content has another name, so that nothing kept under it can be taken for new."""
        return adapter_name(self.member, self.digest)


class Memory:
    """Adapters in memory and what the ledger says of them. Used by one thread.

    Args:
        run: whose ensemble it is.
        is_unsafe: go on with what has been deleted until nothing is pending and nothing is to be
            rebuilt any more; for comparison only.

    Attributes:
        epoch: entries of the ledger that the memory knows of.
        withdrawn: shards that a request reaches and whose files still have to be changed.
        shortened: shards that a rebuild would change.
        pending: requests that are acknowledged and not finished.
        is_stale: what is loaded may not be what is served: look again, whatever the ledger says.
        is_lagging: answers may depend on deleted data (unsafe).
    """

    def __init__(self, run: RunDirectory, ensemble: ShardEnsemble, is_unsafe: bool = False):
        if ensemble.library is None:
            raise ValueError("an ensemble without a library cannot follow a run")
        self.run, self.ensemble, self.library = run, ensemble, ensemble.library
        self.is_unsafe = is_unsafe
        self.epoch = -1
        self.withdrawn: frozenset[int] = frozenset()
        self.shortened: frozenset[int] = frozenset()
        self.pending: tuple[Request, ...] = ()
        self.adapters: dict[str, Adapter] = {}
        self.is_stale = self.is_lagging = False
        self._bounds: IndexBounds | None = None
        self._bounds_for: tuple[int, frozenset[int]] = (-1, frozenset())
        self.refresh()

    def affected(self, target: Target) -> frozenset[int]:
        """Shards whose part of an answer is not yet what it will be."""
        return self.withdrawn if target == "deactivated" else self.withdrawn | self.shortened

    @property
    def shards(self) -> list[int]:
        """Numbers of the shards, in the order of the ensemble's adapters."""
        return [int(member.removeprefix("shard-")) for member in self.library.lineages]

    def certify_choice(self, text: str, affected: frozenset[int]) -> bool:
        """Whether the words of a prompt find the same readers, none of them affected, after the execution.

        Made of the retained records when the first prompt asks for it.
        """
        words = self.ensemble.words
        if words is None:
            return False
        if self._bounds is None or self._bounds_for != (self.epoch, affected):
            places = {shard: place for place, shard in enumerate(self.shards)}
            there = affected.intersection(self.run.shards)
            try:
                indexes = retained_indexes(self.run, there)
            except RunError:
                return False  # its records are being taken away
            retained = {places[shard]: indexes.get(shard, []) for shard in affected}
            served = self.library.words() or []
            self._bounds = IndexBounds(served, retained, words.key, words.tokenizer)
            self._bounds_for = (self.epoch, affected)
        return self._bounds.certify(text, self.ensemble.rule).is_certified

    def refresh(self) -> Change | None:
        """Look at the ledger and do what it says; None if it says nothing new."""
        epoch = self.run.ledger.epoch()  # first: what is read below is at least as new
        if epoch == self.epoch and not self.is_stale:
            return None
        if self.epoch >= 0 and not self.is_stale:
            kinds = {event.kind for event in self.run.ledger.events(since=self.epoch)}
            if kinds.isdisjoint(CHANGING):
                self.epoch = epoch
                return None
        self.pending = tuple(self.run.ledger.requests(pending=True))
        if self.is_unsafe and self.adapters:
            self.shortened = self._shortened(self.run.shards)
            self.is_lagging = bool(self.pending or self.shortened)
            if self.is_lagging and not self.is_stale:
                self.epoch = epoch
                return None
        return self._apply(epoch)

    def _apply(self, epoch: int) -> Change:
        reached = _reached(self.run, self.pending)
        self.ensemble.update(reached)
        # Once more: one that was acknowledged meanwhile may have changed the files that were read.
        requests = [*self.pending, *self.run.ledger.requests(pending=True)]
        adapters = self._adapters(reached, epoch)
        fresh = {a.shard for a in adapters.values() if a.epoch == epoch and a.shard is not None}
        shortened = self._shortened(fresh | self.shortened) | _coming(self.pending)
        change = self._change(adapters, {p.shard for request in requests for p in request.places})
        # All at once, and last: where anything failed above, what is to be forgotten is still known.
        self.epoch, self.is_stale, self.adapters = epoch, False, adapters
        self.withdrawn = frozenset(int(member.removeprefix("shard-")) for member in reached)
        self.shortened = shortened
        return change

    def _change(self, adapters: Mapping[str, Adapter], named: Collection[int]) -> Change:
        """What becomes of the adapters that were served until now.

        Args:
            adapters: that are served from now on.
            named: shards that pending requests name.
        """
        names = {a.name for a in adapters.values() if not a.is_withdrawn}
        gone = [a for a in self.adapters.values() if not a.is_withdrawn and a.name not in names]
        clean = {a.name for a in gone if a.shard not in named and self._is_clean(a)}
        tainted = {a.name for a in gone} - clean
        if _merged(adapters) != self.merged_name:
            (tainted if tainted else clean).add(self.merged_name)
        return Change(frozenset(tainted), frozenset(clean))

    def _shortened(self, shards: Iterable[int]) -> frozenset[int]:
        """Those of some shards that have nodes which a rebuild would train."""
        there = set(self.run.shards)
        return frozenset(shard for shard in shards if shard in there and self._lacks_nodes(shard))

    def _lacks_nodes(self, shard: int) -> bool:
        exists = self.run.nodes.exists
        try:
            return not all(exists(node.key) for path in self.run.paths(shard) for node in path)
        except RunError:
            return True  # its records are being taken away: the ledger says so next

    def _is_clean(self, adapter: Adapter) -> bool:
        """A finished deletion has removed the nodes that it reaches: if all are there, none of them was."""
        return all(map(self.run.nodes.exists, adapter.nodes))

    def _adapters(self, reached: frozenset[str], epoch: int) -> dict[str, Adapter]:
        found: dict[str, Adapter] = {}
        lineages: dict[str, Any] = dict(self.library.lineages)
        if self.library.nobody == self.run.member_name(CORE.shard):
            lineages[self.library.nobody] = read_lineage(self.run.served / self.library.nobody)
        for member, lineage in lineages.items():
            if lineage is None:
                continue
            shard = None if member == self.library.nobody else int(member.removeprefix("shard-"))
            keys = tuple(node["key"] for node in lineage["nodes"])
            made = Adapter(member, shard, lineage["digest"], keys, epoch, member in reached)
            known = self.adapters.get(member)
            is_same = known is not None and replace(known, epoch=made.epoch) == made
            found[member] = known if known is not None and is_same else made
        return found

    @property
    def merged_name(self) -> str:
        """Of the one adapter that all are merged into, without those that are withdrawn."""
        return _merged(self.adapters)

    def name_of(self, member: str) -> str:
        """The served name of what the ensemble calls a member; the base model has no other name."""
        if member == MERGED:
            return self.merged_name
        return self.adapters[member].name if member in self.adapters else member

    def residents(self) -> tuple[Resident, ...]:
        """What is served."""
        return tuple(
            Resident(a.name, a.shard, a.digest, a.nodes, a.epoch, self._state(a), in_flight=0)
            for a in self.adapters.values()
        )

    def _state(self, adapter: Adapter) -> Literal["whole", "shortened", "withdrawn"]:
        if adapter.is_withdrawn:
            return "withdrawn"
        return "shortened" if adapter.shard in self.shortened else "whole"

    def loaded(self) -> dict[str, str]:
        """Members that are in memory, by the names under which they are served."""
        members = [*self.library.slots]
        if self.library.nobody in self.adapters:
            members.append(self.library.nobody)
        if self.ensemble.adapters == [MERGED]:
            members.append(MERGED)
        return {self.name_of(member): member for member in members}

    def digests(self) -> dict[str, str]:
        """By name of a loaded adapter, the SHA-256 that a file of its tensors in memory would have."""
        return {
            name: tensors_digest(self.library.tensors(member))
            for name, member in self.loaded().items()
        }


def _coming(pending: Iterable[Request]) -> frozenset[int]:
    """Shards that pending corrections bring records to, some of which may not be there yet."""
    return frozenset(place.shard for request in pending for place in request.inserted)


def _merged(adapters: Mapping[str, Adapter]) -> str:
    return merged_name((a.name, a.is_withdrawn) for a in adapters.values())


def _reached(run: RunDirectory, pending: Iterable[Request]) -> frozenset[str]:
    """Members whose served files still hold what pending requests delete.

    A node of a slice that a request names can only be one that saw what it deletes, or not yet what a
    correction brings there: the slice has not been trained again before the request is finished.
    """
    slices: dict[int, set[int]] = {}
    for request in pending:
        for place in request.places:
            slices.setdefault(place.shard, set()).add(place.slice)
    found = set()
    for shard, named in slices.items():
        member = run.member_name(shard)
        lineage = read_lineage(run.served / member)
        nodes = lineage["nodes"] if lineage else []
        if any(node["stage"] != CORE_STAGE and node["slice"] in named for node in nodes):
            found.add(member)
    return frozenset(found)
