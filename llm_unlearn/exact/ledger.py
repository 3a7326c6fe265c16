"""The ledger: requests, tombstones and a hash-chained log of events, in one SQL database.

A request is acknowledged when its row is on disk, and not before. The ledger holds pseudonyms
only, never a subject's name or text. Every event carries the digest of the one before it, and
`ledger.head` beside the database remembers how far the chain went.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from llm_unlearn.data.records import digest
from llm_unlearn.errors import RunError
from llm_unlearn.exact import database as databases
from llm_unlearn.exact.chain import (
    GENESIS,
    Link,
    advance_head,
    check_chain,
    event_digest,
    head_follows,
    last_link,
    read_head,
)
from llm_unlearn.exact.database import Database, LostCommitError, events, requests, tombstones
from llm_unlearn.exact.postgresql import Address

RETRY_SECONDS = 1.0
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

    @property
    def places(self) -> tuple[Target, ...]:
        """Everywhere that it changes: what goes, and what a correction brings, which can be elsewhere."""
        return (*self.targets, *self.inserted)

    def to_details(self) -> str:
        """What the ledger keeps of it and its chain covers, as JSON."""
        told = vars(self) | {
            "targets": [vars(target) for target in self.targets],
            "inserted": [vars(target) for target in self.inserted],
        }
        moments = ("acknowledged_at", "finished_at")
        return ascii_json({name: told[name] for name in told if name not in moments})


@dataclass(frozen=True)
class Event:
    sequence: int
    time: float
    kind: str
    payload: dict[str, Any]
    previous: str
    digest: str


class Ledger:
    """One ledger of one run.

    Args:
        place: URL of a SQLite file, or where on a PostgreSQL server it is.
        head: file that remembers the length and last digest of the chain, to see a truncation.
    """

    def __init__(self, place: str | Address, head: Path):
        self.head = head
        self.database = Database(place)

    @classmethod
    def of(cls, run: Path) -> "Ledger":
        """The ledger of a run directory: on the server that it names, or in its own file."""
        place = Address.read(run) or f"sqlite:///{run / 'ledger.sqlite'}"
        return cls(place, run / "ledger.head")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sql.Connection]:
        """Append and change, all of it or nothing; then the head remembers the last entry.

        Raises:
            RunError: nothing was changed; or the server was lost in the commit and stays away.
        """
        last, is_followed = None, False
        try:
            with self.database.writing() as connection:
                before = last_link(connection)
                yield connection
                last = last_link(connection)
                is_followed = last != before and head_follows(self.head, connection, before)
        except LostCommitError:
            if not self._was_committed(last):
                raise RunError(
                    "the connection to the ledger was lost; nothing was changed, try again"
                ) from None
        if last and is_followed:
            advance_head(self.head, last)

    def _was_committed(self, last: Link | None) -> bool:
        """Look a transaction up whose commit was not confirmed.

        Under the ledger's lock, which the server holds until the transaction has ended either way.
        """
        if last is None:
            return False
        query = sql.select(events.c.digest).where(events.c.sequence == last.sequence)
        end = time.monotonic() + databases.BUSY_SECONDS
        while True:
            try:
                with self.database.writing() as connection:
                    return connection.execute(query).scalar() == last.digest
            except (RunError, LostCommitError):
                if time.monotonic() > end:
                    raise RunError(
                        "the connection to the ledger was lost while it wrote, and whether it did is not known: "
                        "run the command again when the server is back, which finds out and goes on"
                    ) from None
            time.sleep(RETRY_SECONDS)

    def create(self) -> None:
        self.database.create()

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
        texts = {request.id: request.to_details() for request in asked}
        payloads = [{"request": name, "details": digest(text)} for name, text in texts.items()]
        stones = [
            {"pseudonym": pseudonym, "request": request.id}
            for request in asked
            for pseudonym in dict.fromkeys(target.pseudonym for target in request.targets)
        ]
        with self._transaction() as connection:
            moment = self._append(connection, "request", payloads)
            rows = [
                {
                    "id": request.id,
                    "idempotency": request.idempotency,
                    "acknowledged_at": moment,
                    "details": texts[request.id],
                }
                for request in asked
            ]
            connection.execute(requests.insert(), rows)
            connection.execute(tombstones.insert(), stones)

    def finish(self, done: Mapping[str, Mapping[str, Any]]) -> None:
        """Mark requests as carried out, and log what was done for each.

        Args:
            done: by the request's id, what the log says of it.

        Raises:
            RunError: one of them is not pending: none was marked.
        """
        payloads = [{"request": name, **payload} for name, payload in done.items()]
        pending = (requests.c.id == sql.bindparam("request")) & requests.c.finished_at.is_(None)
        with self._transaction() as connection:
            moment = self._append(connection, "deleted", payloads)
            marked = connection.execute(
                requests.update().where(pending).values(finished_at=moment),
                [{"request": name} for name in done],
            )
            if marked.rowcount != len(done):
                raise RunError("a request that was carried out is not pending; nothing was changed")

    def append(self, kind: str, *payloads: Mapping[str, Any]) -> None:
        """Log entries of a kind, all of them or none."""
        with self._transaction() as connection:
            self._append(connection, kind, payloads)

    def _append(
        self, connection: sql.Connection, kind: str, payloads: Sequence[Mapping[str, Any]]
    ) -> float:
        """Append entries of one moment, which is returned."""
        end, previous = last_link(connection) or (-1, GENESIS)
        rows, moment = [], time.time()
        for sequence, payload in enumerate(payloads, start=end + 1):
            text = ascii_json(payload)
            made = event_digest(sequence, moment, kind, text, previous)
            rows.append(
                dict(zip(COLUMNS, (sequence, moment, kind, text, previous, made), strict=True))
            )
            previous = made
        connection.execute(events.insert(), rows)
        return moment

    def requests(self, pending: bool = False) -> list[Request]:
        """All requests in the order of their acknowledgement, or only the unfinished ones."""
        query = sql.select(requests).order_by(requests.c.acknowledged_at, requests.c.id)
        if pending:
            query = query.where(requests.c.finished_at.is_(None))
        with self.database.reading() as connection:
            rows = connection.execute(query).all()
        return [_request(row) for row in rows]

    def asked_under(self, keys: Sequence[str]) -> dict[str, Request]:
        """The requests that were asked for under these pseudonyms of idempotency keys."""
        found: list[sql.Row] = []
        with self.database.reading() as connection:
            for start in range(0, len(keys), 500):
                part = keys[start : start + 500]
                query = sql.select(requests).where(requests.c.idempotency.in_(part))
                found += connection.execute(query).all()
        return {row.idempotency: _request(row) for row in found}

    def deleted(self, pseudonyms: list[str]) -> set[str]:
        """Those of the pseudonyms that have a tombstone."""
        found: set[str] = set()
        with self.database.reading() as connection:
            for start in range(0, len(pseudonyms), 500):
                part = pseudonyms[start : start + 500]
                query = sql.select(tombstones.c.pseudonym).where(tombstones.c.pseudonym.in_(part))
                found.update(connection.execute(query).scalars())
        return found

    def tombstones(self) -> set[str]:
        with self.database.reading() as connection:
            return set(connection.execute(sql.select(tombstones.c.pseudonym)).scalars())

    def events(self, kind: str | None = None, since: int = 0) -> list[Event]:
        """The entries of the chain, of all kinds or one, from a number of entries on."""
        query = sql.select(events).order_by(events.c.sequence).where(events.c.sequence >= since)
        if kind is not None:
            query = query.where(events.c.kind == kind)
        with self.database.reading() as connection:
            rows = connection.execute(query).all()
        return [
            Event(r.sequence, r.time, r.kind, json.loads(r.payload), r.previous, r.digest)
            for r in rows
        ]

    def count(self) -> int:
        """How many entries the chain has."""
        with self.database.reading() as connection:
            return connection.execute(sql.select(sql.func.count()).select_from(events)).scalar_one()

    def epoch(self) -> int:
        """How many entries the chain has, by its last one: quick, however long it is."""
        with self.database.reading() as connection:
            last = connection.execute(sql.select(sql.func.max(events.c.sequence))).scalar()
        return 0 if last is None else last + 1

    def check_chain(self) -> list[str]:
        """What is wrong with the ledger, one line each; empty if every cell of it is as it was written."""
        head = read_head(self.head)
        with self.database.reading() as connection:
            return [*self.database.problems(connection), *check_chain(connection, head)]


def _request(row: sql.Row) -> Request:
    details = json.loads(row.details)
    for name in ("targets", "inserted"):
        details[name] = tuple(Target(**target) for target in details[name])
    for name in ("nodes", "asked_for"):
        details[name] = tuple(details[name])
    return Request(**details, acknowledged_at=row.acknowledged_at, finished_at=row.finished_at)


def ascii_json(value: Mapping[str, Any]) -> str:
    """One line of ASCII, which every encoding of a database keeps as it is."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
