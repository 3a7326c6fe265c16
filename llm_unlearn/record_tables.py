"""Tables of numbers about records: parquet, under keyed pseudonyms, readable by their owner alone.

What a training run shows of a record is a residue of the record, so these files hold neither names nor
texts, and a deletion takes their rows.
"""

import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_unlearn import files
from llm_unlearn.data.partition import PartitionKey
from llm_unlearn.data.records import Record, canonical, digest
from llm_unlearn.errors import RunError

if TYPE_CHECKING:
    import pyarrow as pa

RECORD, SUBJECT = "record", "subject"
SUFFIX = ".parquet"
KEY_NAME = "secret.key"
FOLDER = "memorization"
"""Where the tables are, in a run and beside a model."""
_ABOUT = b"about"


@dataclass(frozen=True)
class RecordTable:
    """Columns of equal length, and what they are about.

    Attributes:
        columns: `record` (pseudonyms, 64 hexadecimal digits), perhaps `subject`, and numbers.
        about: digests of configuration, base and data, and how the numbers came about.
    """

    columns: Mapping[str, np.ndarray]
    about: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.columns[RECORD])

    def holds_numbers(self) -> bool:
        """Whether names are texts and everything else is numbers."""
        kinds = {name: values.dtype.kind for name, values in self.columns.items()}
        names = [kinds.pop(name) for name in (RECORD, SUBJECT) if name in kinds]
        return not len(self) or (set(names) == {"U"} and set(kinds.values()) <= set("biuf"))

    def where(self, chosen: np.ndarray) -> "RecordTable":
        """The rows that a mask chooses; the digest of the data is theirs."""
        columns = {name: values[chosen] for name, values in self.columns.items()}
        return RecordTable(columns, {**self.about, "data": data_digest(columns[RECORD])})

    def without(self, gone: Collection[str]) -> "RecordTable":
        """The rows that are of none of these records or subjects."""
        doomed = list(gone)
        keep = ~np.isin(self.columns[RECORD], doomed)
        if SUBJECT in self.columns:
            keep &= ~np.isin(self.columns[SUBJECT], doomed)
        return self if keep.all() else self.where(keep)

    def to_bytes(self) -> bytes:
        """The table as a parquet file."""
        import pyarrow as pa
        from pyarrow import parquet

        arrays = {name: pa.array(values) for name, values in self.columns.items()}
        table = pa.table(arrays).replace_schema_metadata({_ABOUT: canonical(dict(self.about))})
        stream = io.BytesIO()
        parquet.write_table(table, stream, compression="zstd")
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "RecordTable":
        """Raises RunError for anything but what `to_bytes` wrote."""
        import pyarrow as pa
        from pyarrow import parquet

        try:
            table = parquet.read_table(pa.BufferReader(data))
            columns = {name: _numbers_or_texts(table[name]) for name in table.column_names}
            about = json.loads((table.schema.metadata or {})[_ABOUT])
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise RunError(f"it is no table of records ({type(error).__name__})") from None
        told = cls(columns, about)
        if RECORD not in columns or not isinstance(about, dict) or not told.holds_numbers():
            raise RunError("it is no table of records (other columns)")
        return told


def _numbers_or_texts(column: "pa.ChunkedArray") -> np.ndarray:
    values = column.to_numpy()
    return values.astype(str) if values.dtype == object else values


def data_digest(pseudonyms: np.ndarray) -> str:
    """Names a set of records without telling them."""
    return digest(sorted(set(pseudonyms.tolist())))


def make_table(
    key: PartitionKey,
    records: Sequence[Record],
    columns: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
) -> RecordTable:
    """A table with a row for each record, in order."""
    names = {
        RECORD: np.array([key.pseudonym("record", one.id) for one in records], dtype=str),
        SUBJECT: np.array([key.pseudonym("subject", one.subject) for one in records], dtype=str),
    }
    data = {"data": data_digest(names[RECORD]), "salt_id": key.salt_id}
    return RecordTable({**names, **columns}, {**about, **data})


class TableFolder:
    """The tables in a directory beside a model, with the key of their pseudonyms; all of mode 0600."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def key(self) -> PartitionKey:
        """The key of the pseudonyms, made when it is first asked for."""
        place = self.path / KEY_NAME
        if not place.exists():
            self.make()
            files.write_bytes(place, PartitionKey.random().secret)
        try:
            return PartitionKey(place.read_bytes())
        except ValueError as error:
            raise RunError(f"{place} is damaged ({error}): remove {self.path}") from None

    def make(self) -> None:
        """The directory, open to its owner alone.

        Raises:
            RunError: something else is in its place.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise RunError(f"{self.path} is no directory: move it away") from None
        self.path.chmod(0o700)

    def names(self) -> list[str]:
        return sorted(path.stem for path in self.path.glob(f"[!.]*{SUFFIX}"))

    def read(self, name: str, *needed: str) -> RecordTable:
        """A table that has all columns (or entries of `about`) that are needed.

        Raises:
            RunError: it is missing or damaged, or lacks one.
        """
        path = self.path / f"{name}{SUFFIX}"
        try:
            table = RecordTable.from_bytes(self._read(path))
            if lacking := set(needed) - {*table.columns, *table.about}:
                raise RunError(f"it has no {min(lacking)!r}")
        except (OSError, RunError) as error:
            raise RunError(
                f"{path} cannot be read ({error}): remove it, and measure again"
            ) from None
        return table

    def write(self, name: str, table: RecordTable) -> None:
        self.make()
        self._write(self.path / f"{name}{SUFFIX}", table.to_bytes())

    def _read(self, path: Path) -> bytes:
        return path.read_bytes()

    def _write(self, path: Path, data: bytes) -> None:
        files.write_bytes(path, data)
