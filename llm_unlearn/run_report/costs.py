"""What a run takes on disk, and what its training took and would take again."""

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from llm_unlearn.exact.ledger import Event

# Entries of the run directory by what a person calls them.
KINDS = {
    "records": "records",
    "nodes": "nodes",
    "generations": "served adapters",
    "certificates": "certificates",
    "ledger.sqlite": "ledger",
    "ledger.sqlite-journal": "ledger",
    "ledger.head": "ledger",
    "cache": "caches of training",
    "trainer": "caches of training",
}
ALWAYS: tuple[str, ...] = ("records", "nodes", "served adapters", "certificates", "ledger")
OTHER = "everything else"


@dataclass(frozen=True)
class Storage:
    """Files of one kind."""

    kind: str
    files: int
    size: int


@dataclass(frozen=True)
class Training:
    """Seconds that training took, as the ledger saw it.

    Attributes:
        spent: on all nodes ever, those that were dropped since included.
        trainings: how many that were.
        held: on the nodes that are there and wanted.
        missing: how many wanted nodes are not there.
        rebuild: expected for those, by the mean of their stage; None if nothing was ever trained.
    """

    spent: float
    trainings: int
    held: float
    missing: int
    rebuild: float | None


def read_storage(path: Path) -> tuple[Storage, ...]:
    """Bytes and files by kind."""
    count: Counter[str] = Counter(dict.fromkeys(ALWAYS, 0))
    size: Counter[str] = Counter()
    for folder, _, names in os.walk(path):
        top = Path(folder).relative_to(path).parts[:1]
        for name in names:
            kind = KINDS.get(top[0] if top else name, OTHER)
            # Training makes and removes files meanwhile.
            with contextlib.suppress(FileNotFoundError):
                size[kind] += os.lstat(os.path.join(folder, name)).st_size
                count[kind] += 1
    return tuple(Storage(kind, count[kind], size[kind]) for kind in count)


def read_training(events: Sequence[Event], wanted: Mapping[str, int], held: set[str]) -> Training:
    """What training took and a rebuild would.

    Args:
        wanted: the stage of every node that the run wants, by key.
        held: keys of those that are there.
    """
    # Without a node: an edited entry, of which the chain speaks.
    trained = [e.payload for e in events if e.kind == "trained" and "node" in e.payload]
    last = {payload["node"]: float(payload["seconds"]) for payload in trained}
    by_stage: dict[int, list[float]] = defaultdict(list)
    for key, stage in wanted.items():
        if key in last:
            by_stage[stage].append(last[key])
    missing = [stage for key, stage in wanted.items() if key not in held]
    anything = fmean(last.values()) if last else 0.0
    rebuild = sum(fmean(by_stage[stage]) if stage in by_stage else anything for stage in missing)
    return Training(
        spent=sum(float(payload["seconds"]) for payload in trained),
        trainings=len(trained),
        held=sum(last.get(key, 0.0) for key in wanted if key in held),
        missing=len(missing),
        rebuild=rebuild if last or not missing else None,
    )
