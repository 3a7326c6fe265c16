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
    """An acknowledged deletion request; finished when nothing served depends on its targets.

    Attributes:
        nodes: keys of the trained nodes that depended on the targets.
        served_before: digest of what was served when the request was acknowledged.
    """

    id: str
    acknowledged_at: float
    finished_at: float | None
    targets: tuple[Target, ...]
    nodes: tuple[str, ...]
    served_before: str | None


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

    def acknowledge(
        self, request_id: str, targets: list[Target], nodes: list[str], served_before: str | None
    ) -> None:
        """Write a request, all of it or nothing. When this returns, it is on disk.

        Raises:
            RunError: a target was deleted before, or is named twice in one slice.
        """
        if len(set(targets)) < len(targets):
            raise RunError(f"request {request_id} names a target twice: nothing was acknowledged")
        details = {
            "targets": [vars(t) for t in targets],
            "nodes": nodes,
            "served_before": served_before,
        }
        text = _text(details)
        with self._transaction() as connection:
            moment = self._append(
                connection, "request", {"request": request_id, "details": digest(text)}
            )
            connection.execute(
                requests.insert().values(id=request_id, acknowledged_at=moment, details=text)
            )
            connection.execute(
                tombstones.insert(),
                [
                    {"pseudonym": pseudonym, "request": request_id}
                    for pseudonym in dict.fromkeys(target.pseudonym for target in targets)
                ],
            )

    def finish(self, request_id: str, payload: Mapping[str, Any]) -> None:
        """Mark a request as carried out, and log what was done for it.

        Raises:
            RunError: there is no such request, or it was carried out before.
        """
        with self._transaction() as connection:
            moment = self._append(connection, "deleted", {"request": request_id, **payload})
            pending = (requests.c.id == request_id) & requests.c.finished_at.is_(None)
            done = connection.execute(requests.update().where(pending).values(finished_at=moment))
            if done.rowcount != 1:
                raise RunError(f"request {request_id} is not pending: nothing was changed")

    def append(self, kind: str, payload: Mapping[str, Any]) -> None:
        with self._transaction() as connection:
            self._append(connection, kind, payload)

    def _append(self, connection: sql.Connection, kind: str, payload: Mapping[str, Any]) -> float:
        """Append one entry; returns its moment."""
        return self._append_all(connection, kind, [payload])

    def _append_all(
        self, connection: sql.Connection, kind: str, payloads: Sequence[Mapping[str, Any]]
    ) -> float:
        """Append entries of one moment, which is returned."""
        moment, rows = time.time(), []
        end, previous = last_link(connection) or (-1, GENESIS)
        for sequence, payload in enumerate(payloads, start=end + 1):
            text = _text(payload)
            made = event_digest(sequence, moment, kind, text, previous)
            rows.append(
                {
                    "sequence": sequence,
                    "time": moment,
                    "kind": kind,
                    "payload": text,
                    "previous": previous,
                    "digest": made,
                }
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
        return [
            _request(row.id, row.acknowledged_at, row.finished_at, json.loads(row.details))
            for row in rows
        ]

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

    def events(self, kind: str | None = None) -> list[Event]:
        query = sql.select(events).order_by(events.c.sequence)
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

    def check_chain(self) -> list[str]:
        """What is wrong with the ledger, one line each; empty if every cell of it is as it was written."""
        head = read_head(self.head)
        with self.database.reading() as connection:
            return [*self.database.problems(connection), *check_chain(connection, head)]


def _request(
    identity: str, acknowledged: float, finished: float | None, details: dict[str, Any]
) -> Request:
    targets = tuple(Target(**target) for target in details["targets"])
    return Request(
        identity, acknowledged, finished, targets, tuple(details["nodes"]), details["served_before"]
    )


def _text(value: Mapping[str, Any]) -> str:
    """JSON in ASCII, which every encoding of a database keeps as it is."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
