"""What people ask for, before it is looked up: deletions and corrections, one by one or from a file."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from llm_unlearn.data.partition import PartitionKey
from llm_unlearn.data.records import canonical
from llm_unlearn.errors import UserError

LONGEST_REASON = 200  # characters
MOST_SHOWN = 5  # lines that are wrong

Asked = TypeVar("Asked", bound="Ask")


@dataclass(frozen=True)
class Ask:
    """One deletion: of one subject, or of several at once.

    Attributes:
        reason: why, for `status` and the report; nobody's name.
        deadline: seconds since the epoch.
        key: idempotency key: asked again under the same key, nothing is done twice.
        line: where it stands in a file.
    """

    subjects: tuple[str, ...]
    reason: str | None = None
    deadline: float | None = None
    key: str | None = None
    line: int | None = None

    def pseudonyms(self, key: PartitionKey) -> tuple[str, ...]:
        """What is asked for, as the ledger may keep it."""
        return tuple(key.pseudonym("subject", subject) for subject in self.subjects)


@dataclass(frozen=True)
class Correction(Ask):
    """One record to be replaced by another of the same subject.

    Attributes:
        record: id of the record that goes.
        row: the columns of the one that comes.
    """

    record: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)

    def pseudonyms(self, key: PartitionKey) -> tuple[str, ...]:
        new = key.pseudonym("row", canonical(dict(self.row)).decode(errors="replace"))
        return (*super().pseudonyms(key), key.pseudonym("record", self.record), new)


def make_ask(
    subjects: Sequence[str],
    reason: str | None = None,
    deadline: str | None = None,
    key: str | None = None,
) -> Ask:
    """One deletion, from the command line.

    Raises:
        UserError: the reason names a subject, or the deadline is no date.
    """
    try:
        for subject in subjects:
            _check_reason(reason, subject)
        moment = None if deadline is None else parse_deadline(deadline)
    except ValueError as error:
        raise UserError(f"{error}. Nothing was deleted") from None
    return Ask(tuple(subjects), reason, moment, key or None)


def read_asks(path: Path) -> list[Ask]:
    """Deletions from a file: JSON lines with `subject` and, where there are any, `reason`,
    `deadline` and `idempotency_key`; or one subject a line.

    Raises:
        UserError: some lines cannot be understood; it names them, and nothing was done.
    """
    return _read(path, _parse_ask, "deleted")


def read_corrections(path: Path) -> list[Correction]:
    """Corrections from a file: JSON lines with `subject`, `record` (its id) and the columns of the
    new text; and what `read_asks` understands.

    Raises:
        UserError: some lines cannot be understood; it names them, and nothing was done.
    """
    return _read(path, _parse_correction, "corrected")


def _read(path: Path, parse: Callable[[str, int], Asked], done: str) -> list[Asked]:
    asks, wrong = [], []
    for number, line in _lines(path):
        try:
            asks.append(parse(line, number))
        except (ValueError, TypeError, RecursionError) as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = f"; and {len(wrong) - MOST_SHOWN} more" if len(wrong) > MOST_SHOWN else ""
        raise UserError(f"{path}, {'; '.join(wrong[:MOST_SHOWN])}{more}. Nothing was {done}")
    if not asks:
        raise UserError(f"{path} is empty: nothing was {done}")
    _refuse_repeated_keys(path, asks)
    return asks


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _parse_ask(line: str, number: int) -> Ask:
    if not line.lstrip().startswith("{"):
        return Ask((line.strip(),), line=number)
    row = _parse_json(line)
    subject = _take_subject(row)
    ask = Ask((subject,), line=number, **_take_common(row, subject))
    if row:
        raise ValueError(f"unknown key {min(row)!r}")
    return ask


def _parse_correction(line: str, number: int) -> Correction:
    row = _parse_json(line)
    subject = _take_subject(row)
    record = row.pop("record", None)
    if not isinstance(record, str) or not record:
        raise ValueError('expected "record", the id of the record to replace')
    common = _take_common(row, subject)
    if not row:
        raise ValueError("expected the columns of the new text, as the run's records have them")
    return Correction((subject,), line=number, record=record, row=row, **common)


def _parse_json(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _take_subject(row: dict[str, Any]) -> str:
    subject = row.pop("subject", None)
    if isinstance(subject, bool) or not isinstance(subject, str | int) or subject == "":
        raise ValueError('expected "subject", a name')
    return str(subject)


def _take_common(row: dict[str, Any], subject: str) -> dict[str, Any]:
    reason, key = row.pop("reason", None), row.pop("idempotency_key", None)
    _check_reason(reason, subject)
    if key is not None and (not isinstance(key, str) or not key):
        raise ValueError('"idempotency_key" must be text')
    deadline = row.pop("deadline", None)
    return {
        "reason": reason,
        "key": key,
        "deadline": None if deadline is None else parse_deadline(deadline),
    }


def _check_reason(reason: object, subject: str) -> None:
    if reason is None:
        return
    if not isinstance(reason, str) or len(reason) > LONGEST_REASON or not reason.isprintable():
        raise ValueError(f'"reason" must be one line of at most {LONGEST_REASON} characters')
    if re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", reason, re.IGNORECASE):
        raise ValueError('"reason" holds the subject\'s name, and would keep it: write it without')


def parse_deadline(text: object) -> float:
    """Seconds since the epoch of an ISO 8601 date (its end, in UTC) or moment (UTC without a zone).

    Raises:
        ValueError: it is neither.
    """
    try:
        if not isinstance(text, str):
            raise ValueError
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f'"deadline" must be a date such as 2026-12-31, got {text!r}') from None
    if len(text) <= len("2026-12-31"):
        moment += timedelta(days=1)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _refuse_repeated_keys(path: Path, asks: list[Asked]) -> None:
    lines: dict[str, Ask] = {}
    for ask in asks:
        if ask.key is not None and (other := lines.setdefault(ask.key, ask)) is not ask:
            raise UserError(
                f"{path}: lines {other.line} and {ask.line} have the same idempotency_key. "
                "Nothing was done; give every line a key of its own"
            )
