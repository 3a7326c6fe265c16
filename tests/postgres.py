"""A throwaway PostgreSQL server for the tests, on a Unix socket in a directory of its own.

It is skipped with a reason where there is none to start. PostgreSQL refuses root, so root starts
it as another user.
"""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PASSWORD = "sesam ö%&"
QUOTED = "sesam%20%C3%B6%25%26"
ACCESS = """
local all guarded scram-sha-256
local all all trust
"""
SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",  # processes are killed in the tests, not machines
    "max_connections": "60",
    "shared_buffers": "16MB",
    "log_min_messages": "fatal",
}


class Server:
    """A running server.

    Attributes:
        directory: holds its data, and the socket.
    """

    def __init__(self, directory: Path, binaries: Path, prefix: list[str]):
        self.directory = directory
        self._binaries, self._prefix = binaries, prefix
        self._process: subprocess.Popen | None = None

    def url(self, user: str = "tester", database: str = "postgres") -> str:
        """`guarded` has a password, `tester` has none."""
        return f"postgresql://{user}@/{database}?host={self.directory}"

    def initialise(self) -> None:
        data = self.directory / "data"
        command = ["initdb", "-D", str(data), "-U", "tester", "-A", "trust", "-E", "UTF8"]
        self._run(*command, "--locale=C", "--no-sync", "--no-instructions")
        (data / "pg_hba.conf").write_text(ACCESS)
        self.start()
        self.execute(f"CREATE ROLE guarded LOGIN PASSWORD '{PASSWORD}'")

    def start(self) -> None:
        settings = [f"-c{name}={value}" for name, value in SETTINGS.items()]
        command = [
            *self._prefix,
            str(self._binaries / "postgres"),
            "-D",
            str(self.directory / "data"),
        ]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "-k", str(self.directory), *settings], stdout=log, stderr=log
            )
        end = time.monotonic() + 30
        while not self._is_ready():
            assert self._process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < end, "the server did not start in 30 s"
            time.sleep(0.05)

    def stop(self) -> None:
        """At once, as in a crash: what is committed is found again by the next start."""
        if self._process is not None:
            self._process.send_signal(3)  # SIGQUIT: immediate shutdown
            self._process.wait(timeout=30)

    def execute(self, statement: str, user: str = "tester") -> list[tuple]:
        import psycopg

        with psycopg.connect(self.url(user), autocommit=True) as connection:
            cursor = connection.execute(statement)  # pyright: ignore[reportArgumentType]
            return cursor.fetchall() if cursor.description else []

    def _is_ready(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _run(self, name: str, *arguments: str) -> None:
        done = subprocess.run(
            [*self._prefix, str(self._binaries / name), *arguments],
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def _find_binaries() -> Path | None:
    """Where the newest server is: on the path, or where Debian hides it."""
    found = [Path(name).resolve().parent for name in [shutil.which("initdb")] if name]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((path for path in found if (path / "postgres").is_file()), None)


def _other_user() -> pwd.struct_passwd | None:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """A fresh server; the test is skipped where none can be started."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    binaries, prefix, user = _find_binaries(), [], None
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed")
    if os.geteuid() == 0:
        user = _other_user()
        if user is None or shutil.which("setpriv") is None:
            pytest.skip("PostgreSQL refuses root, and there is no other user to start it as")
        ids = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        prefix = ["setpriv", *ids, "--pdeathsig=SIGQUIT"]
    directory = Path(tempfile.mkdtemp(prefix="pg-"))  # a socket's path must be short
    if user is not None:
        os.chown(directory, user.pw_uid, user.pw_gid)
    server = Server(directory, binaries, prefix)
    try:
        server.initialise()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory)
