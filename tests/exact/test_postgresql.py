"""A ledger on a PostgreSQL server: what it is asked for, what breaks, and what no message says."""

import contextlib
import os
import select
import shutil
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llm_unlearn.cli import app
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact import database, ledger
from llm_unlearn.exact.ledger import Ledger
from llm_unlearn.exact.postgresql import ADDRESS_NAME, Address, checked_url
from llm_unlearn.exact.run import S3TRun
from tests.exact.killing import start
from tests.exact.ledgers import Place, asked, fill, target
from tests.postgres import PASSWORD, QUOTED, Server
from tests.tiny import (
    make_stub_run,
    stubbed_training,
    tiny_arguments,
    tiny_records,
    train_stub,
)

SOCKET = ".s.PGSQL.5432"
SECRET = "hunter2"


@pytest.fixture
def on_server(tmp_path: Path, postgresql: Server) -> Place:
    place = Place(tmp_path, postgresql)
    fill(place.open())
    return place


@pytest.fixture
def guarded(postgresql: Server) -> str:
    """A URL with a password in it."""
    postgresql.execute("GRANT CREATE ON DATABASE postgres TO guarded")
    return postgresql.url().replace("tester@", f"guarded:{QUOTED}@")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ada@db.example.org:5433/ledgers?sslmode=verify-full&connect_timeout=3",
        "postgres://ada:secret%20word%40home@[::1]/ledgers",
        "postgresql+psycopg://one:5432,two:5433/ledgers?target_session_attrs=read-write",
        "postgresql://ada@/ledgers?host=/var/run/postgresql",
        "postgresql://?service=ledgers",
        "postgresql://",
    ],
)
def test_what_libpq_reads_is_taken(url: str) -> None:
    assert checked_url(url) == url.replace("+psycopg", "")


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://ada:{SECRET}@db/ledgers",
        f"ada:{SECRET}@db/ledgers",
        f"sqlite:///{SECRET}",
        f"host=db password={SECRET}",
        f"postgresql://ada:pa@{SECRET}@db/ledgers",
        f"postgresql://ada:pa/{SECRET}@db/ledgers",
        f"postgresql://ada:12/{SECRET}@db/ledgers",
        f"postgresql://ada:12?{SECRET}@db/ledgers",
        f"postgresql://ada:12#{SECRET}@db/ledgers",
        f"postgresql://ada:pa%{SECRET}@db/ledgers",
        f"postgresql://ada:{SECRET}%00@db/ledgers",
        f"postgresql://ada:{SECRET} x@db/ledgers",
        f"postgresql://ada:{SECRET}\n@db/ledgers",
        f"postgresql://ada@db:{SECRET}/ledgers",
        f"postgresql://ada@db/ledgers?{SECRET}",
        f"postgresql://ada@db/ledgers?password=a&{SECRET}=b",
        f"postgresql://ada@db/ledgers?nonsense={SECRET}",
    ],
)
def test_what_is_no_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(UserError, match="--ledger_url is") as refused:
        Address.new(url)
    assert "\n" not in str(refused.value) and SECRET not in str(refused.value)
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


def test_a_password_stays_in_its_file(
    tmp_path: Path,
    guarded: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    address = Address.new(guarded)
    with stubbed_training(), caplog.at_level("DEBUG"):
        run = make_stub_run(tmp_path / "run", tiny_records(), ledger=address)
        train_stub(run)
        for command in (["delete", "--subject", "person 3"], ["status"], ["verify"]):
            with pytest.raises(SystemExit, match=r"^0$"):
                app([command[0], str(run.path), *command[1:]])
    hidden = [word.encode() for word in (PASSWORD, QUOTED, guarded)]
    told = "".join((*capsys.readouterr(), caplog.text, repr(address), str(address))).encode()
    assert not [word for word in hidden if word in told]
    holders = [
        path.name
        for path in run.path.rglob("*")
        if path.is_file() and any(word in path.read_bytes() for word in hidden)
    ]
    assert holders == [ADDRESS_NAME]
    assert stat.S_IMODE((run.path / ADDRESS_NAME).stat().st_mode) == 0o600
    assert not (run.path / "ledger.sqlite").exists()
    (run.path / ADDRESS_NAME).chmod(0o644)
    (problem,) = [problem for check in run.verify() for problem in check.problems]
    assert "ledger.url is readable by others" in problem


def test_the_flags_do_not_show_it(guarded: str) -> None:
    arguments = tiny_arguments(ledger_url=guarded)
    shown = [str(arguments), repr(arguments), f"{arguments}", arguments.to_json_string()]
    assert arguments.ledger_url == guarded
    assert not [text for text in shown if QUOTED in text]
    assert "ledger_url=<LEDGER_URL>" in shown[0]


def test_libpq_finds_the_password_elsewhere(
    tmp_path: Path, guarded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = guarded.replace(f":{QUOTED}", "")
    address = Address.new(plain)
    with pytest.raises(RunError, match=r"cannot be reached .*no password supplied"):
        address.connect()
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    address.connect().close()
    monkeypatch.delenv("PGPASSWORD")
    passes = tmp_path / "pgpass"
    passes.write_text(f"*:*:*:guarded:{PASSWORD}\n")
    passes.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(passes))
    address.connect().close()


def refusal(address: Address, folder: Path) -> str:
    """The one line that using a ledger fails with."""
    opened = Ledger(address, folder / "ledger.head")
    messages = set()
    for use in (opened.requests, opened.check_chain, lambda: opened.append("served", {})):
        with pytest.raises(RunError) as failed:
            use()
        assert "\n" not in str(failed.value)
        messages.add(str(failed.value))
    assert not (folder / "ledger.head").exists()
    return messages.pop()


def test_what_cannot_be_reached_is_said_in_one_line(tmp_path: Path, postgresql: Server) -> None:
    schema = Address.new(postgresql.url()).schema
    nowhere = Address(f"postgresql://ada:{SECRET}@/x?host={tmp_path}", schema)
    assert "No such file" in refusal(nowhere, tmp_path)
    closed = Address(f"postgresql://ada:{SECRET}@127.0.0.1:1/x", schema)
    assert "refused" in refusal(closed, tmp_path)
    wrong = Address(postgresql.url().replace("tester@", f"guarded:{SECRET}@"), schema)
    told = refusal(wrong, tmp_path)
    assert "password authentication failed" in told and SECRET not in told
    missing = Address(postgresql.url(database="nowhere"), schema)
    assert 'database "nowhere" does not exist' in refusal(missing, tmp_path)
    assert "is not in the database that ledger.url names" in refusal(
        Address(postgresql.url(), schema), tmp_path
    )


def test_a_password_that_a_message_repeats_is_masked(
    tmp_path: Path, postgresql: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    def refuse(**options: object) -> None:
        raise psycopg.OperationalError(f'nobody is called\n"{options["password"]}"')

    monkeypatch.setattr(psycopg, "connect", refuse)
    told = refusal(Address(f"postgresql://ada:{SECRET}@db/x", "llm_unlearn_0"), tmp_path)
    assert 'nobody is called "***"' in told


def test_a_user_who_may_not_make_a_schema_is_told(tmp_path: Path, postgresql: Server) -> None:
    postgresql.execute("CREATE ROLE humble LOGIN")
    address = Address.new(postgresql.url("humble"))
    with pytest.raises(RunError, match=r"cannot be used \(permission denied .*nothing was changed"):
        make_stub_run(tmp_path / "run", tiny_records(), ledger=address)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_missing_driver_is_said_with_the_command(
    on_server: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    for use in (lambda: Address.new("postgresql://db/x"), lambda: Ledger.of(on_server.folder)):
        with pytest.raises(UserError, match=r"pip install 'llm-unlearn\[postgresql\]'"):
            use()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"url": "postgresql://", "schema": "public"}']
)
def test_a_damaged_address_is_said(on_server: Place, content: bytes) -> None:
    (on_server.folder / ADDRESS_NAME).write_bytes(content)
    with pytest.raises(RunError, match=r"ledger.url is damaged: restore it from a backup"):
        on_server.open()


def state(place: Place) -> tuple[object, ...]:
    return place.rows(), place.head.read_bytes()


def test_a_connection_dropped_half_way_changes_nothing(
    on_server: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(on_server)
    original = ledger.last_link

    def cut(connection):
        """The second look at the chain's end comes when everything is written and not committed."""
        found = original(connection)
        if found is not None and found.sequence > 9:
            backend = connection.connection.driver_connection.info.backend_pid
            on_server.server.execute(f"SELECT pg_terminate_backend({backend}, 5000)")
            original(connection)
        return found

    monkeypatch.setattr(ledger, "last_link", cut)
    for use in (
        lambda held: held.append("served", {}),
        lambda held: held.acknowledge(asked("third", target(5))),
        lambda held: held.finish({"second": {}}),
    ):
        with pytest.raises(RunError, match=r"cannot be used \(.*nothing was changed"):
            use(on_server.open())
        assert state(on_server) == before
    monkeypatch.undo()
    on_server.open().acknowledge(asked("third", target(5)))
    assert on_server.open().check_chain() == []


class Wire:
    """Stands between client and server, and cuts the connection at the next COMMIT.

    Attributes:
        cut: when: `before` the server has it, or `after` it has carried it out and said so.
    """

    def __init__(self, folder: Path, server: Server):
        self.folder, self.server = folder, server
        self.cut: str | None = None
        self.cuts = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / SOCKET))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed at the end of the test
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            server.connect(str(self.server.directory / SOCKET))
            while True:
                ready, _, _ = select.select([client, server], [], [])
                for source in ready:
                    data = source.recv(65536)
                    if not data:
                        return
                    is_cut = source is client and b"COMMIT\0" in data and self.cut
                    if is_cut and self.cut == "before":
                        self.cuts += 1
                        return
                    (server if source is client else client).sendall(data)
                    if is_cut:
                        self.cuts += 1
                        assert b"COMMIT" in server.recv(65536)
                        return

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def wire(on_server: Place, postgresql: Server) -> Iterator[Wire]:
    folder = postgresql.directory / "wire"
    folder.mkdir()
    made = Wire(folder, postgresql)
    address = Address(
        postgresql.url().replace(str(postgresql.directory), str(folder)), on_server.address.schema
    )
    address.write(on_server.folder)
    yield made
    made.close()
    shutil.rmtree(folder)


USES = {
    "append": lambda held: held.append("served", {}),
    "acknowledge": lambda held: held.acknowledge(asked("third", target(5)), asked("4", target(6))),
    "finish": lambda held: held.finish({"second": {}}),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("cut", ["before", "after"])
def test_an_answer_lost_at_the_commit_is_looked_up(
    on_server: Place, wire: Wire, monkeypatch: pytest.MonkeyPatch, cut: str, use: str
) -> None:
    before = state(on_server)
    original = Ledger._was_committed

    def look(self, last):
        wire.cut = None
        return original(self, last)

    monkeypatch.setattr(Ledger, "_was_committed", look)
    opened = on_server.open()
    wire.cut = cut
    if cut == "before":
        with pytest.raises(RunError, match="lost; nothing was changed, try again"):
            USES[use](opened)
        assert state(on_server) == before
        USES[use](opened)
    else:
        USES[use](opened)
    assert wire.cuts == 1
    assert len(on_server.rows()["events"]) == (12 if use == "acknowledge" else 11)
    assert len(opened.requests()) == (4 if use == "acknowledge" else 2)
    assert opened.check_chain() == []
    assert b'"sequence":1' in on_server.head.read_bytes()


def test_what_cannot_be_looked_up_is_found_by_the_next_command(
    tmp_path: Path, postgresql: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server carries out the commit, and is gone before it has said so."""
    folder = postgresql.directory / "gone"
    folder.mkdir()
    wire = Wire(folder, postgresql)
    url = postgresql.url().replace(str(postgresql.directory), str(folder))
    with stubbed_training():
        run = make_stub_run(tmp_path / "run", tiny_records(), ledger=Address.new(url))
        train_stub(run)
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    monkeypatch.setattr(ledger, "RETRY_SECONDS", 0.05)
    wire.cut = "after"
    with pytest.raises(RunError, match="whether it did is not known: run the command again"):
        run.delete(["person 3"])
    wire.cut = None
    monkeypatch.undo()
    (request,) = run.directory.ledger.requests(pending=True)
    done = S3TRun.open(run.path).delete(["person 3"])
    assert (done.request, done.already_deleted) == (None, 1)
    assert [held.id for held in run.directory.ledger.requests()] == [request.id]
    assert all(check.passed for check in run.verify())
    wire.close()
    shutil.rmtree(folder)


def test_a_server_that_restarts_between_two_commands_is_found_again(
    tmp_path: Path, postgresql: Server
) -> None:
    place = Place(tmp_path, postgresql)
    held = fill(place.open())
    postgresql.stop()
    with pytest.raises(RunError, match="cannot be reached"):
        held.append("served", {})
    postgresql.start()
    held.append("served", {})
    assert held.check_chain() == []
    assert len(held.events()) == 11


def test_a_connection_is_kept_and_a_fork_has_its_own(on_server: Place, postgresql: Server) -> None:
    address = on_server.address
    name = f"test_of_{address.schema}"
    named = replace(address, url=f"{address.url}&application_name={name}")
    held = Ledger(named, on_server.head)
    find = f"SELECT pid FROM pg_stat_activity WHERE application_name = '{name}'"

    def look() -> None:
        for _ in range(20):
            held.append("x", {"n": 1})
            held.epoch()

    before = held.epoch()
    kept = postgresql.execute(find)
    assert len(kept) == 1
    children = [start(look) for _ in range(2)]
    look()
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert held.epoch() == before + 60 and held.check_chain() == []
    assert postgresql.execute(find) == kept, "the children left it alone, and nothing was left open"


def test_runs_share_a_database_and_see_nothing_of_each_other(
    tmp_path: Path, postgresql: Server
) -> None:
    with stubbed_training():
        runs = [
            make_stub_run(tmp_path / name, tiny_records(), ledger=Address.new(postgresql.url()))
            for name in ("one", "two")
        ]
        for run in runs:
            train_stub(run)
    runs[0].delete(["person 3"])
    assert [len(run.directory.ledger.requests()) for run in runs] == [1, 0]
    assert all(check.passed for run in runs for check in run.verify())
    # One run under the other's address: the head remembers another chain.
    (tmp_path / "one" / ADDRESS_NAME).write_bytes((tmp_path / "two" / ADDRESS_NAME).read_bytes())
    assert not S3TRun.open(tmp_path / "one").verify()[0].passed


def schemas(server: Server) -> int:
    (row,) = server.execute("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'llm\\_unlearn%'")
    return row[0]


def test_a_creation_that_failed_leaves_no_schema_behind(
    tmp_path: Path, postgresql: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = schemas(postgresql)
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", lambda *_: os._exit(1))
        if (pid := os.fork()) == 0:
            make_stub_run(path, tiny_records(), ledger=Address.new(postgresql.url()))
        os.waitpid(pid, 0)
    assert (path / ADDRESS_NAME).exists() and not (path / "run.json").exists()
    assert schemas(postgresql) == before + 1
    run = make_stub_run(path, tiny_records(), ledger=Address.new(postgresql.url()))
    assert schemas(postgresql) == before + 1
    assert run.directory.ledger.check_chain() == []


def test_commits_are_durable_and_ordered_whatever_the_server_is_set_to(
    tmp_path: Path, postgresql: Server
) -> None:
    postgresql.execute("CREATE ROLE hasty LOGIN SUPERUSER")
    postgresql.execute("ALTER ROLE hasty SET synchronous_commit = off")
    postgresql.execute("ALTER ROLE hasty SET default_transaction_isolation = 'serializable'")
    Address.new(postgresql.url("hasty")).write(tmp_path)
    held = fill(Ledger.of(tmp_path))
    with held.database.writing() as connection:
        shown = [
            connection.exec_driver_sql(f"SHOW {name}").scalar()
            for name in ("synchronous_commit", "transaction_isolation")
        ]
    assert shown == ["on", "read committed"]
    with held.database.reading() as connection:
        shown = connection.exec_driver_sql("SHOW transaction_read_only").scalar()
    assert shown == "on"
