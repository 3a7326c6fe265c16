"""The hash chain of a ledger: every entry carries the digest of the one before it.

`ledger.head`, beside the database and never in it, remembers how far the chain went, so that cutting
entries off its end is seen. What the other tables hold follows from the entries and is
compared with them, cell by cell.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sql

from llm_unlearn import files
from llm_unlearn.data.records import canonical, digest
from llm_unlearn.errors import RunError
from llm_unlearn.exact.database import events, requests, tombstones

GENESIS = "0" * 64
LOCK_NAME = "ledger.lock"
PART_SUFFIX = ".part"


class Link(NamedTuple):
    """An entry of the chain, by its number and digest."""

    sequence: int
    digest: str


def event_digest(sequence: int, moment: float, kind: str, payload: str, previous: str) -> str:
    return digest([sequence, repr(moment), kind, payload, previous])


def last_link(connection: sql.Connection) -> Link | None:
    """The end of the chain; None while it is empty."""
    query = sql.select(events.c.sequence, events.c.digest)
    row = connection.execute(query.order_by(events.c.sequence.desc()).limit(1)).first()
    return Link(row.sequence, row.digest) if row else None


def read_head(path: Path) -> Link | None:
    """The entry that a head file remembers; None if it is missing or not as it was written."""
    try:
        written = path.read_bytes()
        held = json.loads(written)
        head = Link(int(held["sequence"]), str(held["digest"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return head if canonical(head._asdict()) == written else None


def head_follows(path: Path, connection: sql.Connection, before: Link | None) -> bool:
    """May the head move on from where it is? Not if that is no entry of the chain (any more).

    A head that is missing, damaged or of another chain stays what it is, for `verify` to report.

    Args:
        before: the end of the chain before the transaction.
    """
    head = read_head(path)
    if head is None:
        return before is None and not path.exists()
    query = sql.select(events.c.digest).where(events.c.sequence == head.sequence)
    return connection.execute(query).scalar() == head.digest


def advance_head(path: Path, last: Link) -> None:
    """Remember an entry that is committed, unless a later one is remembered already.

    Raises:
        RunError: another process holds the head; the entry itself is in the ledger.
    """
    from filelock import FileLock, Timeout

    part = path.with_name(path.name + PART_SUFFIX)
    try:
        with FileLock(path.with_name(LOCK_NAME), timeout=files.LOCK_TIMEOUT_SECONDS):
            head = read_head(path)
            if head is None or head.sequence < last.sequence:
                _write(part, canonical(last._asdict()))
                os.replace(part, path)
                files.fsync(path.parent)
    except Timeout:
        raise RunError(
            f"{path} is held by another process, which hangs: end it. What was asked for is in the ledger; "
            "running the command again carries it out"
        ) from None


def _write(path: Path, data: bytes) -> None:
    """To disk, under one name for all processes: the lock lets one write, and no purge takes it."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


class Account:
    """What the entries of a chain say that the other tables must hold."""

    def __init__(self) -> None:
        self.acknowledged: dict[str, tuple[float, str]] = {}
        self.finished: dict[str, float] = {}
        self.problems: list[str] = []

    def take(self, kind: str, moment: float, payload: dict[str, Any]) -> None:
        if kind == "request":
            request = payload["request"]
            if request in self.acknowledged:
                self.problems.append(f"request {request} was acknowledged twice")
            self.acknowledged[request] = (moment, payload["details"])
        elif kind == "deleted":
            request = payload["request"]
            if request not in self.acknowledged:
                self.problems.append(f"request {request} was carried out but never acknowledged")
            if request in self.finished:
                self.problems.append(f"request {request} was carried out twice")
            self.finished[request] = moment


def check_chain(connection: sql.Connection, head: Link | None) -> list[str]:
    """What is wrong with entries, head and the tables beside them, one line each.

    Args:
        head: what `read_head` gave before the transaction began.
    """
    account = Account()
    query = sql.select(events).order_by(events.c.sequence).execution_options(yield_per=1000)
    problems, found = _check_entries(connection.execute(query), account, head)
    if head is None:
        problems.append(
            "ledger.head is missing or damaged: a truncation of the ledger could not be seen"
        )
    elif found is None:
        problems.append(f"the ledger was truncated: entry {head.sequence} is gone")
    elif found != head.digest:
        problems.append(f"ledger entry {head.sequence} is not the one remembered")
    return [*problems, *account.problems, *_check_tables(connection, account)]


def _check_entries(
    rows: Iterable[Any], account: Account, head: Link | None
) -> tuple[list[str], str | None]:
    """Problems of the entries, and the digest of the one that the head remembers."""
    problems, previous, remembered = [], GENESIS, None
    for expected, row in enumerate(rows):
        if row.sequence != expected:
            problems.append(f"ledger entry {expected} is missing")
            break
        if row.previous != previous:
            problems.append(f"ledger entry {expected} does not follow the one before it")
        if row.digest != _digest_of(row):
            problems.append(f"ledger entry {expected} was edited")
        elif row.kind in ("request", "deleted"):
            try:
                account.take(row.kind, row.time, json.loads(row.payload))
            except (ValueError, KeyError, TypeError):
                problems.append(f"ledger entry {expected} is no {row.kind}")
        if head is not None and row.sequence == head.sequence:
            remembered = row.digest
        previous = row.digest
    return problems, remembered


def _digest_of(row: Any) -> str | None:
    """None for a row that holds what no entry can."""
    try:
        return event_digest(row.sequence, row.time, row.kind, row.payload, row.previous)
    except (TypeError, ValueError):
        return None


def _check_tables(connection: sql.Connection, account: Account) -> list[str]:
    """Requests and tombstones must be those that the chain speaks of, in every cell."""
    held, finished, named = {}, {}, set()
    for row in connection.execute(sql.select(requests)):
        held[row.id] = (row.acknowledged_at, _details_digest(row))
        if row.finished_at is not None:
            finished[row.id] = row.finished_at
        if held[row.id] == account.acknowledged.get(row.id):
            targets = json.loads(row.details)["targets"]
            named |= {(target["pseudonym"], row.id) for target in targets}
    tombs = {tuple(row) for row in connection.execute(sql.select(tombstones))}
    problems = []
    if held != account.acknowledged:
        problems.append("the requests in the ledger differ from those in its chain")
    if finished != account.finished:
        problems.append(
            "the finished requests in the ledger are not those that its chain saw carried out"
        )
    if tombs != named:
        problems.append("the tombstones in the ledger are not those of its requests")
    return problems


def _details_digest(row: Any) -> str | None:
    """None if they are not what was written, or the column differs from what they say."""
    try:
        same = json.loads(row.details)["idempotency"] == row.idempotency
        return digest(row.details) if same else None
    except (ValueError, KeyError, TypeError):
        return None
