"""The ledger: all or nothing, a chain that shows every edit, and no word about a person."""

import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_unlearn.data.records import digest
from llm_unlearn.errors import RunError
from llm_unlearn.exact import database
from llm_unlearn.exact.chain import GENESIS, event_digest
from llm_unlearn.exact.ledger import Ledger, Request, Target
from tests.tiny import make_rows, make_stub_run, stubbed_training, tiny_records, train_stub


def target(number: int) -> Target:
    return Target("subject", f"{number:064x}", shard=0, slice=number % 3, records=number + 1)


def asked(
    name: str, *targets: Target, nodes: tuple[str, ...] = (), served: str | None = None
) -> Request:
    return Request(name, targets, nodes, served)


def open_ledger(folder: Path) -> Ledger:
    return Ledger(f"sqlite:///{folder / 'ledger.sqlite'}", folder / "ledger.head")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Ten events: creation, five nodes, a finished request, and a pending one of two subjects."""
    made = open_ledger(tmp_path)
    made.create()
    made.append("created", {"config": "c"})
    for number in range(5):
        made.append("trained", {"node": f"{number}", "weights": f"w{number}", "seconds": 0.1})
    made.acknowledge(asked("first", target(1), nodes=("0", "1"), served="before"))
    made.finish({"first": {"served_after": "after"}})
    made.acknowledge(asked("second", target(2), target(3)))
    made.append("served", {"digests": {"0": "after"}})
    return made


def execute(folder: Path, *statements: str) -> None:
    connection = sqlite3.connect(folder / "ledger.sqlite")
    with connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def test_what_was_written_is_read_back(ledger: Ledger, tmp_path: Path) -> None:
    again = open_ledger(tmp_path)
    assert again.requests() == ledger.requests()
    first, second = again.requests()
    assert (
        first.targets == (target(1),)
        and first.nodes == ("0", "1")
        and first.served_before == "before"
    )
    assert first.finished_at is not None and first.finished_at >= first.acknowledged_at
    assert again.requests(pending=True) == [second]
    assert again.tombstones() == {target(number).pseudonym for number in (1, 2, 3)}
    assert again.deleted([target(2).pseudonym, target(9).pseudonym]) == {target(2).pseudonym}
    assert [event.kind for event in again.events()] == [
        "created", *["trained"] * 5, "request", "deleted", "request", "served",
    ]  # fmt: skip
    assert [event.payload["node"] for event in again.events("trained")] == list("01234")


def test_many_pseudonyms_are_looked_up_at_once(ledger: Ledger) -> None:
    asked = [target(number).pseudonym for number in range(2000)]
    assert ledger.deleted(asked) == ledger.tombstones()
    assert ledger.deleted([]) == set()


def test_the_chain_is_whole_after_many_events(ledger: Ledger, tmp_path: Path) -> None:
    for number in range(40):
        open_ledger(tmp_path).append(
            "trained", {"node": str(number), "weights": "é", "seconds": 1 / 3}
        )
        ledger.append("served", {"digests": {}})
    events = ledger.events()
    assert ledger.check_chain() == []
    assert [event.sequence for event in events] == list(range(90))
    assert [event.previous for event in events] == [
        GENESIS,
        *[event.digest for event in events[:-1]],
    ]


def state(ledger: Ledger) -> tuple[object, ...]:
    return ledger.requests(), ledger.tombstones(), ledger.events(), ledger.head.read_bytes()


@pytest.mark.parametrize(
    ("request_id", "targets"),
    [
        pytest.param("new", [target(7), target(2)], id="deleted before"),
        pytest.param("new", [target(7), target(7)], id="named twice"),
        pytest.param("first", [target(7)], id="request of the same name"),
    ],
)
def test_a_request_is_written_whole_or_not_at_all(
    ledger: Ledger, request_id: str, targets: list[Target]
) -> None:
    before = state(ledger)
    with pytest.raises(RunError):
        ledger.acknowledge(asked(request_id, *targets, nodes=("0",)))
    assert state(ledger) == before
    ledger.acknowledge(asked("new", target(7)))
    assert ledger.check_chain() == []


def rewrite_chain(folder: Path, edit: str) -> None:
    """Run `edit`, then forge digests and head so that the chain of events is whole again."""
    execute(folder, edit)
    connection = sqlite3.connect(folder / "ledger.sqlite")
    rows = connection.execute("SELECT time, kind, payload FROM events ORDER BY sequence").fetchall()
    connection.execute("DELETE FROM events")
    previous = GENESIS
    for sequence, (moment, kind, payload) in enumerate(rows):
        made = event_digest(sequence, moment, kind, payload, previous)
        connection.execute(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)",
            (sequence, moment, kind, payload, previous, made),
        )
        previous = made
    connection.commit()
    connection.close()
    head = {"sequence": len(rows) - 1, "digest": previous}
    (folder / "ledger.head").write_text(json.dumps(head))


def forge_request(folder: Path) -> None:
    """The row of a request edited, and its event with it."""
    connection = sqlite3.connect(folder / "ledger.sqlite")
    (text,) = connection.execute("SELECT details FROM requests WHERE id = 'first'").fetchone()
    connection.close()
    edited = text.replace(target(1).pseudonym, target(8).pseudonym)
    assert edited != text
    execute(folder, f"UPDATE requests SET details = '{edited}' WHERE id = 'first'")
    payload = json.dumps({"details": digest(edited), "request": "first"}, separators=(",", ":"))
    rewrite_chain(folder, f"UPDATE events SET payload = '{payload}' WHERE sequence = 6")


def run_sql(*statements: str) -> Callable[[Path], None]:
    return lambda folder: execute(folder, *statements)


SWAP = (
    "UPDATE events SET sequence = -1 WHERE sequence = 2",
    "UPDATE events SET sequence = 2 WHERE sequence = 3",
    "UPDATE events SET sequence = 3 WHERE sequence = -1",
)
TRUNCATE = "DELETE FROM events WHERE sequence >= 9"
EDIT = "UPDATE events SET payload = replace(payload, 'w2', 'w7') WHERE sequence = 3"

TAMPERINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "edited payload": (run_sql(EDIT), "entry 3 was edited"),
    "edited kind": (run_sql("UPDATE events SET kind = 'x' WHERE sequence = 4"), "entry 4 was edited"),
    "edited time": (run_sql("UPDATE events SET time = time + 1 WHERE sequence = 0"), "entry 0 was edited"),
    "edited digest": (
        run_sql(f"UPDATE events SET digest = '{'f' * 64}' WHERE sequence = 3"),
        "entry 4 does not follow",
    ),
    "edited previous": (
        run_sql(f"UPDATE events SET previous = '{'f' * 64}' WHERE sequence = 5"),
        "entry 5 does not follow",
    ),
    "entry dropped in the middle": (run_sql("DELETE FROM events WHERE sequence = 4"), "entry 4 is missing"),
    "entry dropped and the rest renumbered": (
        run_sql(
            "DELETE FROM events WHERE sequence = 4",
            *(f"UPDATE events SET sequence = {n - 1} WHERE sequence = {n}" for n in range(5, 10)),
        ),
        "entry 4 does not follow",
    ),
    "first entry dropped": (run_sql("DELETE FROM events WHERE sequence = 0"), "entry 0 is missing"),
    "reordered": (run_sql(*SWAP), "entry 2 was edited"),
    "entry added": (
        run_sql(f"INSERT INTO events VALUES (10, 1.0, 'trained', '{{}}', '{GENESIS}', 'x')"),
        "entry 10 does not follow",
    ),
    "all entries dropped": (run_sql("DELETE FROM events"), "truncated"),
    "last entry dropped": (run_sql(TRUNCATE), "truncated: entry 9 is gone"),
    "request cut off, head forged": (
        lambda folder: rewrite_chain(folder, "DELETE FROM events WHERE sequence >= 8"),
        "requests in the ledger differ",
    ),
    "fulfilment cut off, head forged": (
        lambda folder: rewrite_chain(folder, "DELETE FROM events WHERE kind IN ('deleted', 'served')"),
        "finished requests",
    ),
    "last entry rewritten, head kept": (
        run_sql(
            "DELETE FROM events WHERE sequence = 9",
            f"INSERT INTO events SELECT 9, 1.0, 'served', '{{}}', digest, '{'0' * 64}' "
            "FROM events WHERE sequence = 8",
        ),
        "entry 9 is not the one remembered",
    ),
    "chain rewritten, head kept": (
        lambda folder: _keep_head(folder, lambda: rewrite_chain(folder, EDIT)),
        "entry 9 is not the one remembered",
    ),
    "head file missing": (lambda folder: (folder / "ledger.head").unlink(), "ledger.head is missing"),
    "head file damaged": (lambda folder: (folder / "ledger.head").write_text("[") and None, "ledger.head"),
    "edited request row": (
        run_sql("UPDATE requests SET details = replace(details, '\"slice\":1', '\"slice\":2')"),
        "requests in the ledger differ",
    ),
    "dropped request row": (
        run_sql("DELETE FROM tombstones WHERE request = 'second'", "DELETE FROM requests WHERE id = 'second'"),
        "requests in the ledger differ",
    ),
    "request marked as finished": (
        run_sql("UPDATE requests SET finished_at = 1.0 WHERE id = 'second'"),
        "finished requests",
    ),
    "request marked as pending": (
        run_sql("UPDATE requests SET finished_at = NULL WHERE id = 'first'"),
        "finished requests",
    ),
    "request row edited with its event": (forge_request, "tombstone"),
    "dropped tombstone": (
        run_sql(f"DELETE FROM tombstones WHERE pseudonym = '{target(2).pseudonym}'"),
        "tombstone",
    ),
    "added tombstone": (
        run_sql(f"INSERT INTO tombstones VALUES ('{target(9).pseudonym}', 'first')"),
        "tombstone",
    ),
}  # fmt: skip


def _keep_head(folder: Path, work: Callable[[], None]) -> None:
    head = (folder / "ledger.head").read_bytes()
    work()
    (folder / "ledger.head").write_bytes(head)


@pytest.mark.parametrize("case", TAMPERINGS)
def test_tampering_is_seen(ledger: Ledger, tmp_path: Path, case: str) -> None:
    tamper, expected = TAMPERINGS[case]
    assert ledger.check_chain() == []
    ledger.database.engine.dispose()
    tamper(tmp_path)
    problems = open_ledger(tmp_path).check_chain()
    assert any(expected in problem for problem in problems), problems


def test_a_head_left_behind_by_a_crash_is_no_problem(ledger: Ledger) -> None:
    """The head is written after the event; killed in between, it names an older entry."""
    head = ledger.head.read_bytes()
    ledger.append("served", {})
    ledger.head.write_bytes(head)
    assert ledger.check_chain() == []


@pytest.mark.parametrize(
    "use",
    [
        lambda ledger: ledger.append("served", {}),
        lambda ledger: ledger.acknowledge(asked("third", target(5))),
        lambda ledger: ledger.finish({"second": {}}),
    ],
    ids=["append", "acknowledge", "finish"],
)
def test_a_locked_ledger_is_said_to_be_locked(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[Ledger], object]
) -> None:
    before = state(ledger)
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    waiting = open_ledger(tmp_path)
    other = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(RunError, match="the ledger is locked by another process"):
        use(waiting)
    assert state(waiting) == before  # who only reads does not wait
    other.execute("ROLLBACK")
    other.close()
    assert state(ledger) == before
    use(waiting)
    assert waiting.check_chain() == []


def overwrite(path: Path, start: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(start)
        stream.write(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"this is not a database" * 300),
        lambda path: overwrite(path, 4096, b"\xff" * (path.stat().st_size - 4096)),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
    ids=["garbage", "pages overwritten", "cut short", "empty", "missing"],
)
def test_a_damaged_ledger_is_one_clear_error(
    ledger: Ledger, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    ledger.database.engine.dispose()
    damage(tmp_path / "ledger.sqlite")
    for use in (Ledger.requests, lambda broken: broken.append("served", {})):
        with pytest.raises(RunError, match=r"the ledger (is damaged|cannot be used)"):
            use(open_ledger(tmp_path))
    try:
        assert "the ledger is damaged" in open_ledger(tmp_path).check_chain()[0]
    except RunError as error:
        assert re.match(r"the ledger (is damaged|cannot be used)", str(error))


def test_a_full_disk_acknowledges_nothing(ledger: Ledger) -> None:
    before = state(ledger)
    with ledger.database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    many = [target(number) for number in range(100, 1500)]
    with pytest.raises(RunError, match="full"):
        ledger.acknowledge(asked("third", *many))
    assert state(ledger) == before
    assert ledger.check_chain() == []


def test_nothing_personal_is_in_the_ledger(tmp_path: Path) -> None:
    with stubbed_training():
        run = make_stub_run(tmp_path / "run", tiny_records())
        train_stub(run)
        run.delete(["person 3", "person 4"])
    ledger = run.directory.ledger
    words = {row["subject"] for row in make_rows()} | {"dish number", "Question", "eat on"}
    words |= {record.id for record in tiny_records()}
    stored = b"".join(path.read_bytes() for path in run.path.glob("ledger.*"))
    records = b"".join(path.read_bytes() for path in (run.path / "records").rglob("*.jsonl"))
    assert not [word for word in words if word.encode() in stored]
    assert sum(word.encode() in records for word in words) > 20
    assert all(
        t.pseudonym.encode() in stored for request in ledger.requests() for t in request.targets
    )
