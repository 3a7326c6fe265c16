"""The ledger: requests, tombstones and a hash-chained log of events, in one SQL database.

A request is acknowledged when its row is on disk, and not before. The ledger holds pseudonyms
only, never a subject's name or text. Every event carries the digest of the one before it, and
`ledger.head` beside the database remembers how far the chain went.
"""

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import event
from sqlalchemy.exc import DatabaseError, OperationalError

from llm_unlearn import files
from llm_unlearn.data.records import canonical, digest
from llm_unlearn.errors import RunError

GENESIS = "0" * 64
BUSY_SECONDS = 30

metadata = sql.MetaData()
requests = sql.Table(
    "requests",
    metadata,
    sql.Column("id", sql.String, primary_key=True),
    sql.Column("idempotency", sql.String, unique=True),
    sql.Column("acknowledged_at", sql.Float, nullable=False),
    sql.Column("finished_at", sql.Float),
    sql.Column("details", sql.Text, nullable=False),
)
tombstones = sql.Table(
    "tombstones",
    metadata,
    sql.Column("pseudonym", sql.String, primary_key=True),
    sql.Column("request", sql.String, sql.ForeignKey("requests.id"), nullable=False),
)
events = sql.Table(
    "events",
    metadata,
    sql.Column("sequence", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("time", sql.Float, nullable=False),
    sql.Column("kind", sql.String, nullable=False),
    sql.Column("payload", sql.Text, nullable=False),
    sql.Column("previous", sql.String, nullable=False),
    sql.Column("digest", sql.String, nullable=False),
)

COLUMNS = tuple(column.name for column in events.columns)


@dataclass(frozen=True)
class Target:
    """What a request removes: a subject or a single record, by pseudonym, and where it lives."""

    kind: str
    pseudonym: str
    shard: int
    slice: int
    records: int


@dataclass(frozen=True)
class Request:
    """A deletion or a correction; finished when nothing served depends on its targets.

    Attributes:
        nodes: keys of the trained nodes that depended on the targets.
        served_before: digest of what was served when the request was acknowledged.
        kind: `delete`, or `correct`: a record goes and another comes in its place.
        inserted: where the records of a correction go, by the pseudonyms of their ids.
        reason: words of whoever asked; nobody's name.
        deadline: seconds since the epoch by which it must be carried out.
        idempotency: pseudonym of the key under which it was asked for.
        asked_for: pseudonyms of what was asked for under it.
        acknowledged_at: None for one that is not in the ledger yet.
    """

    id: str
    targets: tuple[Target, ...]
    nodes: tuple[str, ...]
    served_before: str | None
    kind: str = "delete"
    inserted: tuple[Target, ...] = ()
    reason: str | None = None
    deadline: float | None = None
    idempotency: str | None = None
    asked_for: tuple[str, ...] = ()
    acknowledged_at: float | None = None
    finished_at: float | None = None

    def to_details(self) -> str:
        """What the ledger keeps of it and its chain covers, as JSON."""
        told = vars(self) | {
            "targets": [vars(target) for target in self.targets],
            "inserted": [vars(target) for target in self.inserted],
        }
        moments = ("acknowledged_at", "finished_at")
        return canonical({name: told[name] for name in told if name not in moments}).decode()


@dataclass(frozen=True)
class Event:
    sequence: int
    time: float
    kind: str
    payload: dict[str, Any]
    previous: str
    digest: str


def event_digest(sequence: int, moment: float, kind: str, payload: str, previous: str) -> str:
    return digest([sequence, repr(moment), kind, payload, previous])


class Ledger:
    """One ledger of one run.

    Args:
        url: a SQLAlchemy URL; a SQLite file by default.
        head: file that remembers the length and last digest of the chain, to see a truncation.
    """

    def __init__(self, url: str, head: Path):
        self.head = head
        self.engine = sql.create_engine(
            url, connect_args={"timeout": BUSY_SECONDS} if "sqlite" in url else {}
        )
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _durable_sqlite)
            event.listen(self.engine, "begin", _begin_immediate)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sql.Connection]:
        try:
            with self.engine.begin() as connection:
                yield connection
        except OperationalError as error:
            reason = str(error.orig)
            if "locked" in reason or "busy" in reason:
                raise RunError(
                    "the ledger is locked by another process; nothing was changed, try again"
                ) from None
            raise RunError(f"the ledger cannot be used ({reason}); nothing was changed") from None
        except DatabaseError as error:
            raise RunError(
                f"the ledger is damaged ({error.orig}): restore it from a backup"
            ) from None

    def create(self) -> None:
        with self._transaction() as connection:
            metadata.create_all(connection)

    def acknowledge(self, *asked: Request) -> None:
        """Write requests, all of them or nothing. When this returns, they are on disk.

        Raises:
            RunError: a target was deleted before, or is named twice in one slice.
        """
        for request in asked:
            if len(set(request.targets)) < len(request.targets):
                raise RunError(
                    f"request {request.id} names a target twice: nothing was acknowledged"
                )
        moment = time.time()
        texts = {request.id: request.to_details() for request in asked}
        rows = [
            {
                "id": request.id,
                "idempotency": request.idempotency,
                "acknowledged_at": moment,
                "details": texts[request.id],
            }
            for request in asked
        ]
        stones = [
            {"pseudonym": pseudonym, "request": request.id}
            for request in asked
            for pseudonym in dict.fromkeys(target.pseudonym for target in request.targets)
        ]
        payloads = [{"request": name, "details": digest(text)} for name, text in texts.items()]
        with self._transaction() as connection:
            connection.execute(requests.insert(), rows)
            connection.execute(tombstones.insert(), stones)
            self._append(connection, "request", payloads)
        self._remember_head()

    def finish(self, done: Mapping[str, Mapping[str, Any]]) -> None:
        """Mark requests as carried out, and log what was done for each.

        Args:
            done: by the request's id, what the log says of it.
        """
        moment = time.time()
        payloads = [{"request": name, **payload} for name, payload in done.items()]
        with self._transaction() as connection:
            connection.execute(
                requests.update()
                .where(requests.c.id == sql.bindparam("request"))
                .values(finished_at=moment),
                [{"request": name} for name in done],
            )
            self._append(connection, "deleted", payloads)
        self._remember_head()

    def append(self, kind: str, payload: Mapping[str, Any]) -> None:
        with self._transaction() as connection:
            self._append(connection, kind, [payload])
        self._remember_head()

    def _append(
        self, connection: sql.Connection, kind: str, payloads: Sequence[Mapping[str, Any]]
    ) -> None:
        last = connection.execute(
            sql.select(events).order_by(events.c.sequence.desc()).limit(1)
        ).first()
        sequence, previous = (last.sequence + 1, last.digest) if last else (0, GENESIS)
        rows, moment = [], time.time()
        for payload in payloads:
            text = canonical(payload).decode()
            made = event_digest(sequence, moment, kind, text, previous)
            rows.append(
                dict(zip(COLUMNS, (sequence, moment, kind, text, previous, made), strict=True))
            )
            sequence, previous = sequence + 1, made
        connection.execute(events.insert(), rows)

    def _remember_head(self) -> None:
        with self._transaction() as connection:
            last = connection.execute(
                sql.select(events).order_by(events.c.sequence.desc()).limit(1)
            ).one()
        files.write_bytes(self.head, canonical({"sequence": last.sequence, "digest": last.digest}))

    def requests(self, pending: bool = False) -> list[Request]:
        """All requests in the order of their acknowledgement, or only the unfinished ones."""
        query = sql.select(requests).order_by(requests.c.acknowledged_at, requests.c.id)
        if pending:
            query = query.where(requests.c.finished_at.is_(None))
        with self._transaction() as connection:
            rows = connection.execute(query).all()
        return [_request(row) for row in rows]

    def asked_under(self, keys: Sequence[str]) -> dict[str, Request]:
        """The requests that were asked for under these pseudonyms of idempotency keys."""
        found: list[sql.Row] = []
        with self._transaction() as connection:
            for start in range(0, len(keys), 500):
                part = keys[start : start + 500]
                query = sql.select(requests).where(requests.c.idempotency.in_(part))
                found += connection.execute(query).all()
        return {row.idempotency: _request(row) for row in found}

    def deleted(self, pseudonyms: list[str]) -> set[str]:
        """Those of the pseudonyms that have a tombstone."""
        found: set[str] = set()
        with self._transaction() as connection:
            for start in range(0, len(pseudonyms), 500):
                part = pseudonyms[start : start + 500]
                query = sql.select(tombstones.c.pseudonym).where(tombstones.c.pseudonym.in_(part))
                found.update(connection.execute(query).scalars())
        return found

    def tombstones(self) -> set[str]:
        with self._transaction() as connection:
            return set(connection.execute(sql.select(tombstones.c.pseudonym)).scalars())

    def events(self, kind: str | None = None) -> list[Event]:
        query = sql.select(events).order_by(events.c.sequence)
        if kind is not None:
            query = query.where(events.c.kind == kind)
        with self._transaction() as connection:
            rows = connection.execute(query).all()
        return [
            Event(r.sequence, r.time, r.kind, json.loads(r.payload), r.previous, r.digest)
            for r in rows
        ]

    def check_chain(self) -> list[str]:
        """What is wrong with the chain, one line each; empty if it is whole."""
        problems, previous = [], GENESIS
        with self._transaction() as connection:
            rows = connection.execute(sql.select(events).order_by(events.c.sequence)).all()
        for expected, row in enumerate(rows):
            if row.sequence != expected:
                problems.append(f"ledger entry {expected} is missing")
                break
            if row.previous != previous:
                problems.append(f"ledger entry {expected} does not follow the one before it")
            if row.digest != event_digest(
                row.sequence, row.time, row.kind, row.payload, row.previous
            ):
                problems.append(f"ledger entry {expected} was edited")
            previous = row.digest
        problems += self._check_head([row.digest for row in rows])
        problems += self._check_requests()
        return problems

    def _check_head(self, digests: list[str]) -> list[str]:
        try:
            head = json.loads(self.head.read_bytes())
            sequence, expected = int(head["sequence"]), str(head["digest"])
        except (OSError, ValueError, KeyError):
            return [
                "ledger.head is missing or damaged: a truncation of the ledger could not be seen"
            ]
        if sequence >= len(digests):
            return [f"the ledger was truncated: entry {sequence} is gone"]
        return (
            []
            if digests[sequence] == expected
            else [f"ledger entry {sequence} is not the one remembered"]
        )

    def _check_requests(self) -> list[str]:
        """Requests and tombstones must be those that the chain speaks of."""
        logged = {e.payload["request"]: e.payload["details"] for e in self.events("request")}
        with self._transaction() as connection:
            held = {row.id: digest(row.details) for row in connection.execute(sql.select(requests))}
        carried_out = {event.payload["request"] for event in self.events("deleted")}
        finished = {request.id for request in self.requests() if request.finished_at is not None}
        named = {target.pseudonym for request in self.requests() for target in request.targets}
        problems = (
            [] if logged == held else ["the requests in the ledger differ from those in its chain"]
        )
        if carried_out != finished:
            problems.append(
                "the finished requests in the ledger are not those that its chain saw carried out"
            )
        return problems + (
            [] if named == self.tombstones() else ["a tombstone is missing from the ledger"]
        )


def _request(row: sql.Row) -> Request:
    details = json.loads(row.details)
    for name in ("targets", "inserted"):
        details[name] = tuple(Target(**target) for target in details[name])
    for name in ("nodes", "asked_for"):
        details[name] = tuple(details[name])
    return Request(**details, acknowledged_at=row.acknowledged_at, finished_at=row.finished_at)


def _durable_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    """Every commit reaches the disk, and what is removed is overwritten.

    Transactions are begun by `_begin_immediate`, not by the driver, which would begin too late.
    """
    connection.isolation_level = None
    for pragma in (
        "journal_mode=DELETE",
        "synchronous=FULL",
        "secure_delete=ON",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_immediate(connection: sql.Connection) -> None:
    """Take the write lock at once, so that reading the last event and appending are one step."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")
