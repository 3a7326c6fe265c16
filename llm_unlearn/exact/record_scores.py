"""Tables of per-record numbers in a run. They are residues of records, and a deletion takes them.

RUN/memorization/<node key>.parquet   what training the node showed of its own slice's records; goes with
                                      the node, as every number in it depends on all that the node saw
RUN/memorization/<name>.parquet       what was measured afterwards; loses the rows of what is deleted
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_unlearn import files
from llm_unlearn.data.partition import PartitionKey
from llm_unlearn.data.records import Record
from llm_unlearn.errors import RunError
from llm_unlearn.exact.ledger import Request
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.exact.trie import Node
from llm_unlearn.record_tables import FOLDER, SUFFIX, RecordTable, TableFolder, make_table

KIND = "tables of per-record numbers"
TRACKED = "tracked"
is_of_node = re.compile(r"[0-9a-f]{64}").fullmatch


class RunTables(TableFolder):
    """The tables of a run, encrypted where it is. Callers hold the run's lock for what writes."""

    def __init__(self, run: RunDirectory):
        super().__init__(run.path / FOLDER)
        self.run = run

    @property
    def key(self) -> PartitionKey:
        return self.run.key

    def _read(self, path: Path) -> bytes:
        return self.run.at_rest.read(path)

    def _write(self, path: Path, data: bytes) -> None:
        (seal,) = self.run.at_rest.seals()
        files.write_bytes(path, seal(path, data))


def is_tracked(run: RunDirectory, begin: bool = False) -> bool:
    """Whether trainings of the run are tracked: from the first that was asked to be, and rebuilds too.

    The ledger says so and no configuration: nothing that decides bits depends on it.
    """
    known = bool(run.ledger.events(TRACKED))
    if begin and not known:
        run.ledger.append(TRACKED, {})
    return known or begin


def write_of_node(
    run: RunDirectory, node: Node, records: list[Record], seen: Mapping[str, np.ndarray]
) -> None:
    """Keep what training a node showed of the records of its own slice.

    Args:
        records: those of the slice that the node adds, in any order.
        seen: columns as an observer collects them, with the records' ids as `record_id`.
    """
    by_id = {record.id: record for record in records}
    own = np.array([name in by_id for name in seen["record_id"]], dtype=bool)
    rows = [by_id[name] for name in seen["record_id"][own]]
    columns = {name: values[own] for name, values in seen.items() if name != "record_id"}
    about = {"kind": "training", "node": node.key, **digests(run)}
    RunTables(run).write(node.key, make_table(run.key, rows, columns, about))


def digests(run: RunDirectory) -> dict[str, str]:
    """What every number of the run depends on beside the records."""
    return {"config": run.identity, "base": run.shape.weights}


def drop_deleted(
    run: RunDirectory, wanted: Collection[str], requests: Iterable[Request]
) -> dict[str, int]:
    """Remove what tells of deleted records; how many tables were changed, empty without tables.

    The caller holds the run's lock. Repeatable: killed anywhere, the next call finishes. A table that cannot
    be read cannot be cleaned, so it goes whole.
    """
    tables = RunTables(run)
    if not tables.path.is_dir():
        return {}
    gone = {target.pseudonym for request in requests for target in request.targets}
    changed = 0
    for name in tables.names():
        path = tables.path / f"{name}{SUFFIX}"
        kept = name in wanted if is_of_node(name) else _without(tables, name, gone)
        if kept is True:
            continue
        changed += 1
        if isinstance(kept, RecordTable):
            tables.write(name, kept)
        else:
            files.remove(path)
    files.fsync(tables.path)
    return {KIND: changed}


def _without(tables: RunTables, name: str, gone: set[str]) -> "RecordTable | bool":
    """The table that is left; True if nothing changes, False if nothing is left of it."""
    try:
        table = tables.read(name)
    except RunError:
        return False
    left = table.without(gone)
    return True if len(left) == len(table) else (left if len(left) else False)


def problems(run: RunDirectory) -> list[str]:
    """Tables that should be gone, or hold rows of what was deleted."""
    tables, found = RunTables(run), []
    wanted: Mapping[str, Any] = run.wanted() if tables.path.is_dir() else {}
    deleted = run.ledger.tombstones() if tables.path.is_dir() else set()
    for name in tables.names():
        if is_of_node(name):
            if name not in wanted:
                found.append(f"{FOLDER}/{name[:12]}: numbers of a node that is not wanted any more")
            continue
        try:
            table = tables.read(name)
        except RunError as error:
            found.append(str(error))
            continue
        if len(table.without(deleted)) < len(table):
            found.append(f"{FOLDER}/{name}: it holds rows of deleted records")
    return found
