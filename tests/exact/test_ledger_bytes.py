"""Every byte of a small SQLite ledger and of its head, changed: seen, or of no meaning."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event

from llm_unlearn.errors import RunError
from llm_unlearn.exact.ledger import Ledger
from tests.exact.ledgers import fill

CHANGES = (0x01, 0x80, 0xFF)
PAGE_SIZE = 512  # the smallest: a small file, of which much is in use


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger.of(tmp_path)
    event.listen(
        made.database.engine,
        "connect",
        lambda connection, _: connection.execute(f"PRAGMA page_size={PAGE_SIZE}"),
        insert=True,
    )
    fill(made)
    made.database.engine.dispose()
    return made


def problems_in(folder: Path) -> list[str]:
    opened = Ledger.of(folder)
    try:
        return opened.check_chain()
    except RunError as error:
        assert "\n" not in str(error)
        return [str(error)]
    finally:
        opened.database.engine.dispose()


def content(path: Path) -> list[list[tuple]]:
    """The schema and all rows of all tables, as SQLite itself reads them."""
    connection = sqlite3.connect(path)
    schema = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
    tables = ("requests", "tombstones", "events")
    queries = [schema, *(f"SELECT * FROM {table} ORDER BY 1" for table in tables)]
    try:
        return [connection.execute(query).fetchall() for query in queries]
    finally:
        connection.close()


def mutations(whole: bytes, step: int) -> Iterator[tuple[int, bytes]]:
    for position in range(0, len(whole), step):
        for change in CHANGES:
            mutated = bytearray(whole)
            mutated[position] ^= change
            yield position, bytes(mutated)


def change_bytes(ledger: Ledger, step: int) -> tuple[int, int]:
    """Change bytes one by one; returns how many changes were seen, and how many meant nothing."""
    path = ledger.head.with_name("ledger.sqlite")
    whole, before = path.read_bytes(), content(path)
    seen = harmless = 0
    for position, mutated in mutations(whole, step):
        path.write_bytes(mutated)
        if problems_in(path.parent):
            seen += 1
            continue
        assert content(path) == before, f"byte {position} became {mutated[position]} unseen"
        harmless += 1
    path.write_bytes(whole)
    assert problems_in(path.parent) == []
    return seen, harmless


def test_a_changed_byte_is_seen_or_means_nothing(ledger: Ledger) -> None:
    seen, harmless = change_bytes(ledger, step=7)
    assert 0.4 < seen / (seen + harmless) < 0.6  # half of the small file is unused space


@pytest.mark.slow
def test_every_changed_byte_is_seen_or_means_nothing(ledger: Ledger) -> None:
    seen, harmless = change_bytes(ledger, step=1)
    assert seen > 14_000
    assert seen + harmless == 3 * ledger.head.with_name("ledger.sqlite").stat().st_size


def test_every_changed_byte_of_the_head_is_seen(ledger: Ledger) -> None:
    whole = ledger.head.read_bytes()
    for position, mutated in mutations(whole, 1):
        ledger.head.write_bytes(mutated)
        assert problems_in(ledger.head.parent), f"byte {position} became {mutated[position]} unseen"
    for end in range(len(whole)):
        ledger.head.write_bytes(whole[:end])
        assert problems_in(ledger.head.parent), f"cut to {end} bytes unseen"
    ledger.head.write_bytes(whole)
    assert problems_in(ledger.head.parent) == []
