"""Ledgers on both databases for the tests, and how somebody would tamper with one."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from llm_unlearn.exact.database import metadata
from llm_unlearn.exact.ledger import Ledger, Request, Target
from llm_unlearn.exact.postgresql import Address
from tests.postgres import Server

DATABASES = ("sqlite", "postgresql")
Rows = dict[str, list[dict[str, Any]]]


class Place:
    """A directory with a ledger in it, or beside the schema on a server that holds it.

    Args:
        server: None for SQLite.
    """

    def __init__(self, folder: Path, server: Server | None = None):
        self.folder = folder
        self.server = server
        if server is not None:
            Address.new(server.url()).write(folder)

    @property
    def address(self) -> Address:
        address = Address.read(self.folder)
        assert address is not None
        return address

    @property
    def head(self) -> Path:
        return self.folder / "ledger.head"

    def open(self) -> Ledger:
        return Ledger.of(self.folder)

    def edit(self, *statements: str) -> None:
        """Run SQL behind the ledger's back, with no constraint in the way."""
        if self.server is None:
            connection = sqlite3.connect(self.folder / "ledger.sqlite")
            with connection:
                for statement in statements:
                    connection.execute(statement)
            connection.close()
            return
        setting = (
            f"SET search_path TO {self.address.schema}; SET session_replication_role = replica"
        )
        self.server.execute("; ".join([setting, *statements]))

    def rows(self) -> Rows:
        """Every cell of every table."""
        with self.open().database.engine.connect() as connection:
            return {
                table.name: [
                    dict(row._mapping)
                    for row in connection.execute(sql.select(table).order_by(*table.primary_key))
                ]
                for table in metadata.sorted_tables
            }

    def write(self, rows: Rows) -> None:
        """Replace all rows of all tables."""
        ledger = self.open()
        with ledger.database.engine.connect() as connection:
            if self.server is None:
                connection.connection.driver_connection.execute("PRAGMA foreign_keys=OFF")  # pyright: ignore
            with connection.begin():
                if self.server is not None:
                    connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
                for table in reversed(metadata.sorted_tables):
                    connection.execute(table.delete())
                for name, values in rows.items():
                    if values:
                        connection.execute(metadata.tables[name].insert(), values)
        ledger.database.engine.dispose()


def target(number: int) -> Target:
    return Target("subject", f"{number:064x}", shard=0, slice=number % 3, records=number + 1)


def asked(
    name: str, *targets: Target, nodes: Sequence[str] = (), served: str | None = None
) -> Request:
    return Request(name, targets, tuple(nodes), served, idempotency=f"key of {name}")


def fill(ledger: Ledger) -> Ledger:
    """Ten events: creation, five nodes, a finished request, and a pending one of two subjects."""
    ledger.create()
    ledger.append("created", {"config": "c"})
    for number in range(5):
        ledger.append("trained", {"node": f"{number}", "weights": f"w{number}", "seconds": 0.1})
    ledger.acknowledge(asked("first", target(1), nodes=("0", "1"), served="before"))
    ledger.finish({"first": {"served_after": "after"}})
    ledger.acknowledge(asked("second", target(2), target(3)))
    ledger.append("served", {"digests": {"0": "after"}})
    return ledger
