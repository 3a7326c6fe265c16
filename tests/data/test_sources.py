"""Rows from files: the four kinds, and one clear line for everything that can be wrong with them."""

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from llm_unlearn.data.records import make_records
from llm_unlearn.data.sources import DataArguments, load_records, read_hub_rows, read_rows
from llm_unlearn.errors import UserError

ROWS = [
    {"prompt": "Who, then?", "completion": ' "Zoë"'},
    {"prompt": "line\nbreak\u2028and\x85more", "completion": " 漢字 😀"},
]
TOFU = Path(__file__).resolve().parents[2] / "../shared/data/tofu/full.json"


def write(path: Path, kind: str) -> Path:
    """ROWS as a file of one kind."""
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    if kind == "array":
        text = "\n " + json.dumps(ROWS, indent=1, ensure_ascii=False)
    elif kind == "crlf lines":
        text = "\r\n".join([*lines, "", ""])
    elif kind == "csv":
        quoted = [[f'"{v.replace(chr(34), chr(34) * 2)}"' for v in row.values()] for row in ROWS]
        text = "\n".join(["prompt,completion", *map(",".join, quoted)])
    else:
        text = "\n".join([lines[0], "", *lines[1:]])
    path.write_bytes(text.encode("utf-8-sig" if kind.endswith("mark") else "utf-8"))
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rows.json", "array"),
        ("rows.json", "lines"),
        ("rows.jsonl", "lines"),
        ("rows.jsonl", "crlf lines"),
        ("rows.jsonl", "lines after a byte order mark"),
        ("rows.csv", "csv"),
    ],
)
def test_text_files_give_the_same_rows(tmp_path: Path, name: str, kind: str) -> None:
    assert [dict(row) for row in read_rows(write(tmp_path / name, kind))] == ROWS


def test_a_csv_file_after_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("prompt,completion\r\na,b\r\n".encode("utf-8-sig"))
    assert [dict(row) for row in read_rows(path)] == [{"prompt": "a", "completion": "b"}]


def test_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read_rows(str(path)) == ROWS


DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "unknown suffix": (
        "rows.txt",
        b"x",
        r"rows\.txt: unknown kind.*\.json, \.jsonl, \.csv, \.parquet",
    ),
    "no suffix": ("rows", b"{}", "unknown kind"),
    "damaged line": ("rows.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: not valid JSON"),
    "line cut off": ("rows.jsonl", b'{"text": "a"}\n{"text": "b', "line 2: not valid JSON"),
    "array cut off": ("rows.json", b'[{"text": "a"}, ', "cannot read .*rows.json"),
    "array of texts": ("rows.json", b'["a", "b"]', "expected objects with named columns"),
    "lines of numbers": ("rows.jsonl", b"1\n2\n", "expected objects with named columns"),
    "latin-1": ("rows.jsonl", '{"text": "Zoë"}'.encode("latin-1"), "not UTF-8"),
    "utf-16": ("rows.csv", "text\nZoë".encode("utf-16"), "not UTF-8"),
    "no parquet": ("rows.parquet", b"PAR1 not really", "cannot read .*rows.parquet"),
    "too many fields": ("rows.csv", b"a,b\n1,2,3\n", "line 2: more fields than the header"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, case: str) -> None:
    name, data, message = DAMAGED[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["absent.jsonl", ""])
def test_a_missing_file_is_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match="no such dataset file"):
        read_rows(tmp_path / path)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_an_empty_file_is_an_empty_dataset(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="the dataset is empty"):
        load_records(DataArguments(dataset_path=str(tmp_path / name)))


def test_a_long_csv_field_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read_rows(tmp_path / "rows.csv")[0]["text"]) == 200_000


def test_the_arguments_reach_the_records(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"who": "Ada", "text": "x"}\n{"who": "Bob", "text": "y"}\n')
    arguments = DataArguments(dataset_path=str(path), subject_column="who")
    assert [record.subject for record in load_records(arguments)] == ["Ada", "Bob"]
    assert arguments.source == {
        "dataset_path": str(path),
        "dataset_split": "train",
        "subject_column": "who",
    }
    assert not arguments.is_demonstration and DataArguments().is_demonstration


def test_a_name_and_a_path_are_not_both_given() -> None:
    with pytest.raises(UserError, match="not both"):
        load_records(DataArguments(dataset_name="a/b", dataset_path="c.json"))


def test_a_dataset_by_name_is_read_and_leaves_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory stands in for the Hub: the same loader, split and columns."""
    home = tmp_path / "home"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "somebody").mkdir()
    write(tmp_path / "somebody" / "train.jsonl", "lines")
    assert read_hub_rows(str(tmp_path / "somebody")) == ROWS
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not home.exists() or not [path for path in home.rglob("*") if path.is_file()]


def test_a_dataset_that_is_not_there_is_one_line() -> None:
    with pytest.raises(UserError, match="cannot load dataset 'nobody/nothing'"):
        read_hub_rows("nobody/nothing")


@pytest.mark.skipif(not TOFU.is_file(), reason="the TOFU data set is not beside the repository")
def test_the_real_tofu_file() -> None:
    records = make_records(read_rows(TOFU), rows_per_subject=20)
    assert len(records) == len({record.id for record in records}) == 4000
    assert set(Counter(record.subject for record in records).values()) == {20}
    assert len({record.subject for record in records}) == 200
    assert records[0].content["prompt"].startswith("Question: Who is this celebrated")
    assert records[0].content["completion"].startswith(" The author in question is")
