"""Where a ledger on a PostgreSQL server lives, and how it is reached.

    RUN/ledger.url    the URL and the schema, mode 0600; a run without it has RUN/ledger.sqlite

Every run has a schema of its own, named by a random id, so that runs share a database. A password
may stand in the URL, and comes out of nothing but that file: the URL is read strictly, since
libpq repeats in its messages what it takes for a host or a port, and messages are searched for it.
Better is none at all: libpq finds it in ~/.pgpass, PGPASSWORD or a service file.
"""

import json
import re
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from llm_unlearn import files
from llm_unlearn.errors import RunError, UserError

if TYPE_CHECKING:
    import psycopg

ADDRESS_NAME = "ledger.url"
SCHEMA_PREFIX = "llm_unlearn_"
CONNECT_SECONDS = 10
HOST = r"(\[[0-9A-Fa-f:.]+\]|[\w.%-]*)(:\d+)?"
URL = re.compile(
    r"postgres(ql)?(\+psycopg)?://"
    r"([^:@/?#\s]*(:[^@/?#\s]*)?@)?"  # the user and the password
    rf"{HOST}(,{HOST})*"
    r"(/[^@/?#\s]*)?(\?[^@#\s]*)?",
    re.ASCII,
)
BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})|%00")


@dataclass(frozen=True)
class Address:
    """A ledger on a server: what libpq needs to reach it, and the schema that is the ledger's own."""

    url: str = field(repr=False)
    schema: str

    @classmethod
    def new(cls, url: str) -> "Address":
        """A place for a new ledger; UserError for what is no URL of a PostgreSQL server."""
        return cls(checked_url(url), SCHEMA_PREFIX + secrets.token_hex(8))

    @classmethod
    def read(cls, run: Path) -> "Address | None":
        """The address in a run directory; None if its ledger is a file.

        Raises:
            RunError: the file is damaged.
        """
        path = run / ADDRESS_NAME
        if not path.exists():
            return None
        _driver()
        try:
            stored = json.loads(path.read_bytes())
            address = cls(checked_url(stored["url"]), stored["schema"])
            if not re.fullmatch(rf"{SCHEMA_PREFIX}[0-9a-f]{{16}}", address.schema):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, UserError):
            raise RunError(f"{path} is damaged: restore it from a backup") from None
        return address

    def is_that_of(self, run: Path) -> bool:
        """Does the run keep its ledger under this URL?"""
        stored = Address.read(run)
        return stored is not None and stored.url == self.url

    def write(self, run: Path) -> None:
        files.write_bytes(run / ADDRESS_NAME, json.dumps(asdict(self), indent=2).encode())

    def connect(self) -> "psycopg.Connection":
        """A new connection.

        Raises:
            RunError: the server cannot be reached or refuses; the message is one line without
                the password.
            UserError: the driver is missing.
        """
        psycopg = _driver()
        from psycopg.conninfo import conninfo_to_dict

        defaults = {
            "connect_timeout": CONNECT_SECONDS,
            "tcp_user_timeout": 1000 * CONNECT_SECONDS,
            "fallback_application_name": "llm-unlearn",
            "client_encoding": "UTF8",
        }
        given = conninfo_to_dict(self.url)
        try:
            # Nothing is prepared on the server, so that a connection pooler may stand in between.
            return psycopg.connect(**{**defaults, **given}, prepare_threshold=None)
        except psycopg.Error as error:
            reason = " ".join(str(error).split())
            for name in ("password", "sslpassword"):
                if hidden := given.get(name):
                    reason = reason.replace(str(hidden), "***")
            raise RunError(
                f"the ledger cannot be reached ({reason}); nothing was changed: is the server up, and are "
                f"{ADDRESS_NAME} in the run, PGPASSWORD or ~/.pgpass right?"
            ) from None


def checked_url(url: str) -> str:
    """A URL as libpq reads it.

    Raises:
        UserError: it is none; the message does not repeat it, since it may hold a password.
    """
    if not re.match(r"postgres(ql)?(\+psycopg)?://", url):
        raise UserError(
            "--ledger_url is no URL of a PostgreSQL server: expected postgresql://USER@HOST:PORT/DATABASE "
            "(without the flag the ledger is a SQLite file in the run)"
        )
    psycopg = _driver()
    from psycopg.conninfo import conninfo_to_dict

    plain = url.replace("+psycopg://", "://", 1)
    try:
        if not URL.fullmatch(url) or BAD_PERCENT.search(url):
            raise ValueError
        conninfo_to_dict(plain)
    except (ValueError, psycopg.Error):
        raise UserError(
            "--ledger_url is malformed: expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with %40 for @, "
            "%2F for /, %3A for :, %3F for ?, %23 for # and %25 for % within names and passwords"
        ) from None
    return plain


def _driver() -> ModuleType:
    try:
        import psycopg
    except ImportError:
        raise UserError(
            "a ledger on PostgreSQL needs its driver: pip install 'llm-unlearn[postgresql]'"
        ) from None
    return psycopg
