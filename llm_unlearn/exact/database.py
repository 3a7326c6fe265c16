"""The database of a ledger: its tables, transactions and locks, on SQLite or PostgreSQL.

Whoever changes something holds the one write lock of the ledger until it is committed, so that
reading the last entry and appending the next are one step. Readers wait for nobody, and see one
moment. Every error is a `RunError` of one line, and none is raised half way: what a failed
transaction did is undone.
"""

import contextlib
import functools
import hashlib
import os
import sqlite3
import weakref
from collections.abc import Iterator

import sqlalchemy as sql
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError

from llm_unlearn.errors import RunError
from llm_unlearn.exact.postgresql import ADDRESS_NAME, Address

BUSY_SECONDS = 30
MOST_SHOWN = 200  # characters of what a driver says
READING = "is_reading"

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
sql.Index("events_by_kind", events.c.kind, events.c.sequence)
_unfinished = requests.c.finished_at.is_(None)
sql.Index(
    "requests_unfinished",
    requests.c.acknowledged_at,
    sqlite_where=_unfinished,
    postgresql_where=_unfinished,
)


class LostCommitError(Exception):
    """The connection broke while a transaction was committed: whether it was is not known here."""


class Database:
    """Transactions on the tables of one ledger.

    Args:
        place: URL of a SQLite file, or where on a PostgreSQL server the ledger is.
    """

    def __init__(self, place: str | Address):
        self._place = place
        self.engine = _sqlite(place) if isinstance(place, str) else _postgresql(place)

    @property
    def is_sqlite(self) -> bool:
        return isinstance(self._place, str)

    def create(self) -> None:
        """Make the tables, and on a server the schema that they are in."""
        with self.writing() as connection:
            if isinstance(self._place, Address):
                connection.execute(sql.schema.CreateSchema(self._place.schema))
            metadata.create_all(connection)

    def drop(self) -> None:
        """Remove the schema of a ledger that never came to be. Repeatable."""
        assert isinstance(self._place, Address)
        with self.writing() as connection:
            connection.execute(
                sql.schema.DropSchema(self._place.schema, cascade=True, if_exists=True)
            )

    @contextlib.contextmanager
    def reading(self) -> Iterator[sql.Connection]:
        """A transaction that sees one moment, whatever others append meanwhile, and changes nothing."""
        options = {READING: True}
        if not self.is_sqlite:
            options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with self._explained(), self.engine.connect() as connection:
            yield connection.execution_options(**options)

    @contextlib.contextmanager
    def writing(self) -> Iterator[sql.Connection]:
        """A transaction under the ledger's one write lock, committed to disk at the end.

        Raises:
            RunError: the lock stayed taken, or the database failed: nothing was changed.
            LostCommitError: it failed in the commit itself.
        """
        with self._explained(), self.engine.connect() as connection:
            transaction = connection.begin()
            if isinstance(self._place, Address):
                _lock(connection, self._place)
            yield connection
            try:
                transaction.commit()
            except DBAPIError as error:
                if error.connection_invalidated:
                    raise LostCommitError from None
                raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise RunError(self._explain(error)) from None
        except UnicodeDecodeError:  # an error message of SQLite about names that are none any more
            raise RunError(
                "the ledger is damaged (its tables have no names): restore it from a backup"
            ) from None

    def _explain(self, error: DBAPIError) -> str:
        """One line that says what to do."""
        reason = " ".join(str(error.orig).split())[:MOST_SHOWN]
        code = getattr(error.orig, "sqlstate", None)
        if code == "55P03" or (self.is_sqlite and ("locked" in reason or "busy" in reason)):
            return "the ledger is locked by another process; nothing was changed, try again"
        if isinstance(error, IntegrityError):
            return f"the ledger holds this already ({reason}); nothing was changed"
        if code in ("42P01", "3F000", "42703"):  # no such table, schema, column
            return (
                f"the ledger is not in the database that {ADDRESS_NAME} names, or is damaged ({reason}): "
                "restore the one or correct the other"
            )
        if isinstance(error, OperationalError | InterfaceError) or not self.is_sqlite:
            return f"the ledger cannot be used ({reason}); nothing was changed"
        return f"the ledger is damaged ({reason}): restore it from a backup"

    def problems(self, connection: sql.Connection) -> list[str]:
        """What is wrong with the database itself: its structure, or tables that are not ours."""
        if isinstance(self._place, Address):
            is_ours = _columns(connection, self._place.schema) == _expected_columns()
            return [] if is_ours else ["the tables of the ledger are not those it was made with"]
        found = connection.exec_driver_sql("PRAGMA integrity_check(3)").scalars().all()
        problems = [f"the ledger is damaged: {line}" for line in found if line != "ok"]
        if _sqlite_schema(connection) != _expected_sqlite_schema():
            problems.append("the tables of the ledger are not those it was made with")
        return problems


def _sqlite(url: str) -> sql.Engine:
    engine = sql.create_engine(url, connect_args={"timeout": BUSY_SECONDS}, hide_parameters=True)
    event.listen(engine, "connect", _durable_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _durable_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    """Every commit reaches the disk, and what is removed is overwritten.

    Transactions are begun by `_begin_sqlite`, not by the driver, which would begin too late.
    """
    connection.isolation_level = None
    for pragma in (
        "journal_mode=DELETE",
        "synchronous=FULL",
        "secure_delete=ON",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: sql.Connection) -> None:
    """Who changes something takes the write lock at once; who reads lets others write."""
    is_reading = connection.get_execution_options().get(READING, False)
    connection.exec_driver_sql("BEGIN" if is_reading else "BEGIN IMMEDIATE")


def _sqlite_schema(connection: sql.Connection) -> list[tuple[str, ...]]:
    query = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
    return [tuple(row) for row in connection.exec_driver_sql(query)]


@functools.cache
def _expected_sqlite_schema() -> list[tuple[str, ...]]:
    engine = sql.create_engine("sqlite://")
    with engine.begin() as connection:
        metadata.create_all(connection)
        return _sqlite_schema(connection)


def _postgresql(address: Address) -> sql.Engine:
    """One connection is kept for the next transaction: to connect takes longer than to look.

    It is tried first, since servers may restart meanwhile, and a fork shares none.
    """
    engine = sql.create_engine(
        "postgresql+psycopg://",
        creator=address.connect,
        pool_size=1,
        max_overflow=-1,
        pool_pre_ping=True,
        isolation_level="READ COMMITTED",  # what is read under the lock is what was committed before
        use_native_hstore=False,
        hide_parameters=True,
    )
    _forgotten_by_forks.add(engine)
    return engine.execution_options(schema_translate_map={None: address.schema})


_forgotten_by_forks: weakref.WeakSet[sql.Engine] = weakref.WeakSet()


def _forget_connections() -> None:
    """In a child process: the connections that it has inherited are its parent's."""
    for engine in _forgotten_by_forks:
        engine.dispose(close=False)


os.register_at_fork(after_in_child=_forget_connections)


def _lock(connection: sql.Connection, address: Address) -> None:
    """Wait for the ledger's write lock, which the server frees with the transaction.

    Whatever the server's defaults are, a commit that returns is on its disk.
    """
    number = int.from_bytes(hashlib.sha256(address.schema.encode()).digest()[:8], signed=True)
    connection.execute(
        sql.select(
            sql.func.set_config("synchronous_commit", "on", True),
            sql.func.set_config("lock_timeout", f"{int(1000 * BUSY_SECONDS)}ms", True),
        )
    )
    connection.execute(sql.select(sql.func.pg_advisory_xact_lock(number)))


def _columns(connection: sql.Connection, schema: str) -> set[tuple[str, ...]]:
    """Every column of every table and view, and every trigger, in a schema."""
    columns = connection.execute(
        sql.text(
            "SELECT table_name, column_name, data_type, is_nullable, coalesce(column_default, '') "
            "FROM information_schema.columns WHERE table_schema = :schema"
        ),
        {"schema": schema},
    )
    triggers = connection.execute(
        sql.text(
            "SELECT c.relname, t.tgname FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid "
            "WHERE NOT t.tgisinternal AND c.relnamespace = CAST(:schema AS regnamespace)"
        ),
        {"schema": schema},
    )
    return {tuple(row) for row in [*columns, *triggers]}


def _expected_columns() -> set[tuple[str, ...]]:
    names = {
        sql.String: "character varying",
        sql.Text: "text",
        sql.Float: "double precision",
        sql.Integer: "integer",
    }
    return {
        (table.name, column.name, names[type(column.type)], "YES" if column.nullable else "NO", "")
        for table in metadata.tables.values()
        for column in table.columns
    }
