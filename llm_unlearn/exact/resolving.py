"""From what people ask for to requests: where the records are, and what depends on them."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llm_unlearn.data.partition import CORE, SliceName
from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError
from llm_unlearn.exact.asks import Ask
from llm_unlearn.exact.ledger import Target
from llm_unlearn.exact.store import RunDirectory

Slice = tuple[int, int]


class NoSuchSubjectError(UserError):
    """Nobody of that name is held, or only in the permanent core."""


@dataclass(frozen=True)
class Found:
    """Where the subjects of some asks live.

    Attributes:
        targets: by subject, one for each slice that holds some of it.
        records: by subject, those that go.
        gone: subjects that were deleted before.
    """

    targets: dict[str, list[Target]] = field(default_factory=dict)
    records: dict[str, dict[str, Record]] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()

    def all_records(self) -> list[Record]:
        """Every record that goes, once."""
        return [record for held in self.records.values() for record in held.values()]


def find_subjects(run: RunDirectory, asks: Sequence[Ask]) -> Found:
    """Look up everybody who is asked for; each slice is read once.

    Raises:
        UserError: some are unknown, or in the permanent core alone; it names the first with its
            line, and how many more there are.
    """
    subjects = list(dict.fromkeys(subject for ask in asks for subject in ask.subjects))
    pseudonyms = {subject: run.key.pseudonym("subject", subject) for subject in subjects}
    tombstones = run.ledger.deleted(list(pseudonyms.values()))
    gone = frozenset(subject for subject in subjects if pseudonyms[subject] in tombstones)
    targets: dict[str, list[Target]] = defaultdict(list)
    records: dict[str, dict[str, Record]] = defaultdict(dict)
    for name, here in run.slices.homes(s for s in subjects if s not in gone).items():
        held = run.slices.read(name, here)
        counts = Counter(record.subject for record in held)
        for record in held:
            records[record.subject][record.id] = record
        for subject in sorted(counts):
            target = Target("subject", pseudonyms[subject], *name, records=counts[subject])
            targets[subject].append(target)
    if unknown := [s for s in subjects if s not in gone and s not in records]:
        raise _unknown(run, asks, unknown)
    return Found(targets, records, gone)


def _unknown(run: RunDirectory, asks: Sequence[Ask], unknown: list[str]) -> UserError:
    held = run.slices.read(CORE, set(unknown)) if run.core else []
    if held:
        return NoSuchSubjectError(
            f"{min(record.subject for record in held)!r} is in the permanent core, which cannot be "
            "deleted; it would need a new run. Nothing was deleted"
        )
    named = set(unknown)
    lines = [ask.line for ask in asks if ask.line and named.intersection(ask.subjects)]
    where = f" (line{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:5]))})" if lines else ""
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    first = unknown[0] if len(unknown[0]) <= 100 else unknown[0][:100] + "..."
    return NoSuchSubjectError(
        f"no such subject in {run.path}: {first!r}{more}{where}. Nothing was deleted; "
        f"a subject is spelled as in the column that the run was made with{_look_alikes(run, unknown[0])}"
    )


def _skeleton(name: str) -> str:
    """What is left of a name when case, white space, accents and width are taken away."""
    decomposed = unicodedata.normalize("NFKD", name).casefold()
    return "".join(c for c in decomposed if not unicodedata.combining(c) and not c.isspace())


def _look_alikes(run: RunDirectory, unknown: str) -> str:
    """Nobody is deleted for looking like somebody else; but whoever asks should know."""
    wanted = _skeleton(unknown)
    names = (subject for name in run.slices.names for subject in run.slices.subjects(name))
    alike = next((name for name in names if _skeleton(name) == wanted), None)
    return "" if alike is None else f"; there is {alike!r}, which is written otherwise"


def copy_targets(run: RunDirectory, copies: dict[SliceName, list[Record]]) -> list[Target]:
    """Targets for copies held by others.

    A subject of whom nothing else is held is named itself: asked for later, it counts as deleted.
    """
    targets: list[Target] = []
    for name, held in copies.items():
        taken = Counter(record.subject for record in held)
        counts = Counter(record.subject for record in run.slices.read(name, set(taken)))
        # With public keys a subject's other records can be anywhere: its copies go one by one.
        whole = sorted(
            subject
            for subject in taken
            if run.slices.is_keyed and taken[subject] == counts[subject]
        )
        targets += [
            Target("subject", run.key.pseudonym("subject", subject), *name, records=taken[subject])
            for subject in whole
        ]
        targets += [
            Target("record", run.key.pseudonym("record", record.id), *name, records=1)
            for record in held
            if record.subject not in whole
        ]
    return targets


def dependents(run: RunDirectory, shards: Iterable[int]) -> dict[Slice, set[str]]:
    """By slice, keys of the trained nodes that saw it, or stand on a node that saw it."""
    found: dict[Slice, set[str]] = defaultdict(set)
    for shard in set(shards):
        nodes = {node.key: node for path in run.paths(shard) for node in path if not node.is_core}
        for key, node in nodes.items():
            if run.nodes.exists(key):
                for part in node.path:
                    found[shard, part].add(key)
    return found


def nodes_of(targets: Iterable[Target], dependent: dict[Slice, set[str]]) -> tuple[str, ...]:
    """Keys of the nodes that go with some targets."""
    hit = {(target.shard, target.slice) for target in targets}
    return tuple(sorted(set().union(*(dependent.get(place, set()) for place in hit))))
