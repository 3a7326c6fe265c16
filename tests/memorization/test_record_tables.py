"""Tables of per-record numbers: what they hold, who can read them, and garbage."""

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_unlearn.data.partition import PartitionKey
from llm_unlearn.errors import RunError
from llm_unlearn.record_tables import RecordTable, TableFolder, make_table
from tests.tiny import tiny_records

KEY = PartitionKey.from_phrase("tables")


def table() -> RecordTable:
    records = tiny_records(3, 2)
    columns = {"score": np.array([0.5, np.nan, -1, 2, 3, 4.0]), "epoch": np.arange(6)}
    return make_table(KEY, records, columns, {"kind": "training", "config": "c"})


def test_a_table_comes_back_as_it_was() -> None:
    told = table()
    again = RecordTable.from_bytes(told.to_bytes())
    assert dict(again.about) == dict(told.about) and again.columns.keys() == told.columns.keys()
    for name, values in told.columns.items():
        assert np.array_equal(values, again.columns[name], equal_nan=values.dtype.kind == "f")
    assert told.to_bytes() == again.to_bytes()


def test_rows_go_by_subject_and_by_record() -> None:
    told = table()
    left = told.without({KEY.pseudonym("subject", "person 1")})
    assert left.columns["epoch"].tolist() == [0, 1, 4, 5]
    assert left.about["data"] != told.about["data"] and left.about["config"] == "c"
    one = told.without({str(told.columns["record"][3])})
    assert one.columns["epoch"].tolist() == [0, 1, 2, 4, 5]
    empty = told.without(set(told.columns["subject"].tolist()))
    assert len(RecordTable.from_bytes(empty.to_bytes())) == 0


def test_nothing_in_a_file_names_anybody(tmp_path: Path) -> None:
    folder = TableFolder(tmp_path / "memorization")
    told = table()
    folder.write("scores", told)
    assert folder.key.salt_id != KEY.salt_id and folder.names() == ["scores"]
    data = (folder.path / "scores.parquet").read_bytes()
    assert b"person" not in data and b"dish" not in data
    assert all(record.id.encode() not in data for record in tiny_records(3, 2))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.path.iterdir()}
    assert modes == {0o600} and stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert folder.key.secret == TableFolder(folder.path).key.secret


@pytest.mark.parametrize("garbage", [b"", b"PAR1", b"garbage" * 99])
def test_garbage_is_one_sentence(garbage: bytes, tmp_path: Path) -> None:
    folder = TableFolder(tmp_path)
    (tmp_path / "scores.parquet").write_bytes(garbage)
    with pytest.raises(RunError, match=r"scores.parquet cannot be read .* measure again"):
        folder.read("scores")
    with pytest.raises(RunError, match="cannot be read"):
        folder.read("nothing")


def test_a_strangers_parquet_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"name": ["Ada"]}), tmp_path / "scores.parquet")
    with pytest.raises(RunError, match="cannot be read"):
        TableFolder(tmp_path).read("scores")
    cut = table().to_bytes()
    (tmp_path / "scores.parquet").write_bytes(cut[: len(cut) // 2])
    with pytest.raises(RunError, match="cannot be read"):
        TableFolder(tmp_path).read("scores")


@pytest.mark.parametrize(
    ("columns", "about"),
    [
        ({"record": ["a"]}, b"[]"),
        ({"record": [1]}, b"{}"),
        ({"record": ["a"], "tokens": ["x"]}, b"{}"),
        ({"record": ["a"], "tokens": [None]}, b"{}"),
    ],
)
def test_other_columns_are_refused(columns: dict[str, Any], about: bytes, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    made = pa.table(columns).replace_schema_metadata({b"about": about})
    parquet.write_table(made, tmp_path / "scores.parquet")
    with pytest.raises(RunError, match="it is no table of records"):
        TableFolder(tmp_path).read("scores")


def test_what_is_needed_and_lacking_is_named(tmp_path: Path) -> None:
    folder = TableFolder(tmp_path)
    folder.write("training", table())
    assert len(folder.read("training", "epoch", "kind")) == 6
    with pytest.raises(RunError, match="it has no 'tokens'"):
        folder.read("training", "epoch", "tokens")


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "memorization").write_text("")
    with pytest.raises(RunError, match="is no directory: move it away"):
        _ = TableFolder(tmp_path / "memorization").key
