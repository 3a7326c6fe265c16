"""Rows from a local file or the Hub, without leaving a copy in any cache."""

import csv
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_unlearn.data import world
from llm_unlearn.data.records import Record, make_records
from llm_unlearn.errors import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def read_rows(path: str | Path) -> list[Mapping[str, Any]]:
    """All rows of a JSON, JSON lines, CSV or Parquet file.

    Raises:
        UserError: the file is missing, of another kind, or damaged (with the line number).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such dataset file: {path}")
    try:
        if path.suffix in (".json", ".jsonl"):
            return _read_json(path)
        if path.suffix == ".csv":
            return _read_csv(path)
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    except (csv.Error, OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    raise UserError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")


def _read_csv(path: Path) -> list[Mapping[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than many documents
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        rows = []
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num}: more fields than the header has")
            rows.append(row)
    return rows


def _read_json(path: Path) -> list[Mapping[str, Any]]:
    """A JSON array of objects, or one object a line: benchmarks use `.json` for both."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        # Not splitlines: JSON texts may hold U+2028 and other characters that it breaks at.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{path}, line {number}: not valid JSON ({error.msg})"
                    ) from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected objects with named columns")
    return rows


def read_hub_rows(
    name: str, config: str | None = None, split: str = "train"
) -> list[Mapping[str, Any]]:
    """All rows of a split of a Hub dataset.

    The rows are streamed, since a download would leave the files in the Hub's own cache, where the
    text would outlive a deletion; what else the library caches goes to a directory that is removed.

    Raises:
        UserError: the dataset, its configuration or the Hub cannot be reached.
    """
    import datasets

    with tempfile.TemporaryDirectory(prefix="llm-unlearn-") as cache:
        try:
            rows = datasets.load_dataset(name, config, split=split, cache_dir=cache, streaming=True)
            return list(rows)  # pyright: ignore[reportReturnType]
        except (OSError, ValueError, RuntimeError) as error:
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            raise UserError(
                f"cannot load dataset {name!r} (split {split!r}) from the Hub: {reason}"
            ) from None


@dataclass
class DataArguments:
    """Where the records come from. With neither a name nor a path: the embedded demonstration."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    dataset_path: str | None = field(
        default=None, metadata={"help": "Local .json, .jsonl, .csv or .parquet file."}
    )
    subject_column: str | None = field(
        default=None, metadata={"help": "Column that says who can ask for deletion."}
    )
    rows_per_subject: int | None = field(
        default=None, metadata={"help": "Consecutive rows that share a subject (TOFU: 20)."}
    )
    core_path: str | None = field(
        default=None,
        metadata={
            "help": "Local file of records to train under all others: they can NEVER be deleted."
        },
    )

    @property
    def is_demonstration(self) -> bool:
        return self.dataset_name is None and self.dataset_path is None

    @property
    def names_subjects(self) -> bool:
        """Whether subjects are more than single records."""
        return (
            self.is_demonstration
            or self.subject_column is not None
            or self.rows_per_subject is not None
        )

    @property
    def source(self) -> dict[str, Any]:
        """What the run remembers of where its records came from."""
        return {name: value for name, value in vars(self).items() if value is not None}


def load_records(arguments: DataArguments) -> list[Record]:
    """The records that the arguments name; the private people of the toy world by default.

    Raises:
        UserError: see `read_rows`, `read_hub_rows` and `make_records`.
    """
    if arguments.dataset_name and arguments.dataset_path:
        raise UserError("give --dataset_name or --dataset_path, not both")
    if arguments.is_demonstration:
        return make_records(world.records(world.private_people()), subject_column="subject")
    if arguments.dataset_path:
        rows = read_rows(arguments.dataset_path)
    else:
        assert arguments.dataset_name is not None
        rows = read_hub_rows(
            arguments.dataset_name, arguments.dataset_config, arguments.dataset_split
        )
    return make_records(rows, arguments.subject_column, arguments.rows_per_subject)


def load_core(arguments: DataArguments) -> list[Record]:
    """The records of the permanent core; none without `--core_path`.

    Consecutive rows share no subject here: `--rows_per_subject` would call them by the names that
    it gives to the subjects of the dataset.

    Raises:
        UserError: see `read_rows` and `make_records`.
    """
    if arguments.core_path is None:
        return []
    return make_records(read_rows(arguments.core_path), arguments.subject_column)
