"""The ledger: all or nothing, a chain that shows every edit, and no word about a person."""

import copy
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql

from llm_unlearn.data.records import canonical, digest
from llm_unlearn.errors import RunError
from llm_unlearn.exact import database
from llm_unlearn.exact.chain import GENESIS, Link, advance_head, event_digest, read_head
from llm_unlearn.exact.database import metadata
from llm_unlearn.exact.ledger import Ledger, Target
from tests.exact.ledgers import Place, asked, fill, target
from tests.tiny import make_rows, make_stub_run, stubbed_training, tiny_records, train_stub


@pytest.fixture
def ledger(place: Place) -> Ledger:
    return fill(place.open())


@pytest.fixture
def file_ledger(tmp_path: Path) -> Ledger:
    return fill(Ledger.of(tmp_path))


def test_what_was_written_is_read_back(ledger: Ledger, place: Place) -> None:
    again = place.open()
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


def test_the_chain_is_whole_after_many_events(ledger: Ledger, place: Place) -> None:
    for number in range(40):
        place.open().append(
            "trained", {"node": str(number), "weights": "é\x00\ud800", "seconds": 1 / 3}
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


def rewrite_chain(place: Place, edit: str) -> None:
    """Run `edit`, then forge digests and head so that the chain of events is whole again."""
    place.edit(edit)
    rows, previous = place.rows(), GENESIS
    for sequence, row in enumerate(rows["events"]):
        row |= {"sequence": sequence, "previous": previous}
        previous = event_digest(sequence, row["time"], row["kind"], row["payload"], previous)
        row["digest"] = previous
    place.write(rows)
    head = {"digest": previous, "sequence": len(rows["events"]) - 1}
    place.head.write_bytes(canonical(head))


def forge_request(place: Place) -> None:
    """The row of a request edited, and its event with it."""
    text = next(row["details"] for row in place.rows()["requests"] if row["id"] == "first")
    edited = text.replace(target(1).pseudonym, target(8).pseudonym)
    assert edited != text
    place.edit(f"UPDATE requests SET details = '{edited}' WHERE id = 'first'")
    payload = json.dumps({"details": digest(edited), "request": "first"}, separators=(",", ":"))
    rewrite_chain(place, f"UPDATE events SET payload = '{payload}' WHERE sequence = 6")


def run_sql(*statements: str) -> Callable[[Place], None]:
    return lambda place: place.edit(*statements)


SWAP = (
    "UPDATE events SET sequence = -1 WHERE sequence = 2",
    "UPDATE events SET sequence = 2 WHERE sequence = 3",
    "UPDATE events SET sequence = 3 WHERE sequence = -1",
)
TRUNCATE = "DELETE FROM events WHERE sequence >= 9"
EDIT = "UPDATE events SET payload = replace(payload, 'w2', 'w7') WHERE sequence = 3"

TAMPERINGS: dict[str, tuple[Callable[[Place], object], str]] = {
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
        lambda place: rewrite_chain(place, "DELETE FROM events WHERE sequence >= 8"),
        "requests in the ledger differ",
    ),
    "fulfilment cut off, head forged": (
        lambda place: rewrite_chain(place, "DELETE FROM events WHERE kind IN ('deleted', 'served')"),
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
        lambda place: _keep_head(place, lambda: rewrite_chain(place, EDIT)),
        "entry 9 is not the one remembered",
    ),
    "head file missing": (lambda place: place.head.unlink(), "ledger.head is missing"),
    "head file damaged": (lambda place: place.head.write_text("[") and None, "ledger.head"),
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


def _keep_head(place: Place, work: Callable[[], None]) -> None:
    head = place.head.read_bytes()
    work()
    place.head.write_bytes(head)


@pytest.mark.parametrize("case", TAMPERINGS)
def test_tampering_is_seen(ledger: Ledger, place: Place, case: str) -> None:
    tamper, expected = TAMPERINGS[case]
    assert ledger.check_chain() == []
    ledger.database.engine.dispose()
    tamper(place)
    problems = place.open().check_chain()
    assert any(expected in problem for problem in problems), problems


def spoilt(value: Any, is_key: bool, is_file: bool) -> list[Any]:
    """Other values for a cell; on SQLite also of another type."""
    if isinstance(value, str):
        changed = [
            value + "x",
            value[:-1],
            value.swapcase(),
            value.replace("a", "b"),
            "",
            " " + value,
        ]
        changed += [value.encode()] if is_file else []
    elif isinstance(value, int):
        changed = [value + 100, -1 - value]
    elif isinstance(value, float):
        changed = [math.nextafter(value, 0), value + 1, -value, 0.0, 1e300]
    else:
        changed = [1.0, 0.0]
    changed = changed if is_file else changed[:2]
    return [other for other in [*changed, *([] if is_key else [None])] if other != value]


def problems_of(place: Place) -> list[str]:
    try:
        return place.open().check_chain()
    except RunError as error:
        return [str(error)]


def test_every_cell_of_every_row_of_every_table_is_covered(ledger: Ledger, place: Place) -> None:
    whole, seen = place.rows(), 0
    assert ledger.check_chain() == []
    ledger.database.engine.dispose()
    assert {name: len(rows) for name, rows in whole.items()} == {
        "requests": 2, "tombstones": 3, "events": 10,
    }  # fmt: skip
    for name, rows in whole.items():
        for number, row in enumerate(rows):
            for column, value in row.items():
                is_key = bool(metadata.tables[name].columns[column].primary_key)
                for other in spoilt(value, is_key, place.server is None):
                    edited = copy.deepcopy(whole)
                    edited[name][number][column] = other
                    try:
                        place.write(edited)
                    except (sql.exc.IntegrityError, sql.exc.StatementError):
                        continue  # no such value can be stored
                    assert problems_of(place), f"{name}, {row}: {column} became {other!r}"
                    seen += 1
    assert seen > 130
    place.write(whole)
    assert place.open().check_chain() == []


def test_every_row_more_or_less_is_seen(ledger: Ledger, place: Place) -> None:
    whole = place.rows()
    ledger.database.engine.dispose()
    for name, rows in whole.items():
        (key,) = (column.name for column in metadata.tables[name].primary_key)
        for row in rows:
            for other in (
                [each for each in rows if each != row],
                [*rows, {**row, key: 10 if name == "events" else "another", **unique(name)}],
            ):
                place.write({**whole, name: other})
                assert problems_of(place), f"{name}: {row} dropped or doubled"
    for first, second in itertools.combinations(range(10), 2):
        swapped = copy.deepcopy(whole)
        one, two = swapped["events"][first], swapped["events"][second]
        one["sequence"], two["sequence"] = two["sequence"], one["sequence"]
        place.write(swapped)
        assert problems_of(place), f"entries {first} and {second} swapped"


def unique(name: str) -> dict[str, str]:
    return {"idempotency": "another"} if name == "requests" else {}


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE more (id INTEGER)",
        "ALTER TABLE events ADD COLUMN more TEXT",
        "ALTER TABLE requests ADD COLUMN more FLOAT",
        "CREATE VIEW more AS SELECT * FROM events",
        "DROP TABLE tombstones",
        "ALTER TABLE events RENAME COLUMN payload TO load",
    ],
)
def test_tables_and_columns_that_are_not_ours_are_seen(
    ledger: Ledger, place: Place, statement: str
) -> None:
    ledger.database.engine.dispose()
    place.edit(statement)
    assert problems_of(place)


def test_a_trigger_is_seen(ledger: Ledger, place: Place) -> None:
    ledger.database.engine.dispose()
    place.edit(
        "CREATE TRIGGER t AFTER INSERT ON events BEGIN DELETE FROM requests; END"
        if place.server is None
        else "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; "
        "CREATE TRIGGER t BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION f()"
    )
    assert problems_of(place)


def test_a_request_is_finished_once(ledger: Ledger) -> None:
    before = state(ledger)
    for name in ("first", "unknown"):
        with pytest.raises(RunError, match="not pending; nothing was changed"):
            ledger.finish({"second": {}, name: {}})
    assert state(ledger) == before


def test_a_request_that_the_chain_carries_out_twice_is_seen(ledger: Ledger) -> None:
    ledger.append("deleted", {"request": "first"})
    assert any("first was carried out twice" in problem for problem in ledger.check_chain())


def test_the_head_only_moves_forward(ledger: Ledger) -> None:
    first, *_, last = [Link(event.sequence, event.digest) for event in ledger.events()]
    assert read_head(ledger.head) == last
    advance_head(ledger.head, first)
    assert read_head(ledger.head) == last
    ledger.append("served", {})
    assert read_head(ledger.head) == Link(10, ledger.events()[-1].digest)


@pytest.mark.parametrize("later", [1, 5])
def test_what_is_appended_after_a_truncation_does_not_hide_it(
    ledger: Ledger, place: Place, later: int
) -> None:
    ledger.database.engine.dispose()
    place.edit(TRUNCATE, "DELETE FROM events WHERE sequence >= 7")
    for number in range(later):
        place.open().append("served", {"number": number})
    (problem, *_) = place.open().check_chain()
    assert "entry 9 is gone" in problem or "entry 9 is not the one remembered" in problem


@pytest.mark.parametrize("content", [None, b"", b"[", b"{}", b'{"digest":"x","sequence":"9"}'])
def test_a_head_that_was_removed_or_damaged_is_not_made_anew(
    ledger: Ledger, content: bytes | None
) -> None:
    ledger.head.unlink()
    if content is not None:
        ledger.head.write_bytes(content)
    ledger.append("served", {})
    assert any("ledger.head is missing or damaged" in problem for problem in ledger.check_chain())


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
    ledger: Ledger, place: Place, monkeypatch: pytest.MonkeyPatch, use: Callable[[Ledger], object]
) -> None:
    before = state(ledger)
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    waiting = place.open()
    with place.open().database.writing():
        with pytest.raises(RunError, match="the ledger is locked by another process"):
            use(waiting)
        assert state(waiting) == before  # who only reads does not wait
    assert state(ledger) == before
    use(waiting)
    assert waiting.check_chain() == []


@pytest.mark.parametrize(
    "use",
    [
        lambda held: held.requests(pending=True),
        lambda held: held.deleted([target(number).pseudonym for number in range(20)]),
        lambda held: held.asked_under(["key of first"]),
        lambda held: held.events("copied"),
        lambda held: held.append("served", {}),
        lambda held: held.finish({"second": {}}),
    ],
    ids=["pending", "deleted", "asked_under", "events", "append", "finish"],
)
def test_what_is_asked_often_reads_no_whole_table(
    file_ledger: Ledger, use: Callable[[Ledger], object]
) -> None:
    engine, asked_for = file_ledger.database.engine, []

    @sql.event.listens_for(engine, "before_cursor_execute")
    def note(_connection, _cursor, statement, parameters, _context, many):
        asked_for.append((statement, parameters[0] if many else parameters))

    use(file_ledger)
    queries = [query for query in asked_for if query[0].startswith(("SELECT", "UPDATE"))]
    assert queries
    with engine.connect() as connection:
        for statement, parameters in queries:
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            steps = [row[-1] for row in rows]
            scans = [step for step in steps if step.startswith("SCAN") and "INDEX" not in step]
            is_last = "ORDER BY events.sequence DESC" in statement  # from the end, one row
            assert steps and (is_last or not scans), (statement, steps)


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
    file_ledger: Ledger, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    file_ledger.database.engine.dispose()
    damage(tmp_path / "ledger.sqlite")
    for use in (Ledger.requests, lambda broken: broken.append("served", {})):
        with pytest.raises(RunError, match=r"the ledger (is damaged|cannot be used)"):
            use(Ledger.of(tmp_path))
    try:
        assert "the ledger is damaged" in Ledger.of(tmp_path).check_chain()[0]
    except RunError as error:
        assert re.match(r"the ledger (is damaged|cannot be used)", str(error))


def test_a_full_disk_acknowledges_nothing(file_ledger: Ledger) -> None:
    ledger = file_ledger
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
