"""When queries and deletions arrive: from a file, or invented."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_unlearn.errors import UserError

Homes = Callable[[Iterable[str]], Mapping[str, Sequence[int]]]
"""By subject, the numbers of the shards that hold some of it; who is not held is left out."""

MOST_ARRIVALS = 5_000_000


@dataclass(frozen=True)
class Trace:
    """What arrives, in the order of time, which begins at 0.

    Attributes:
        queries: moments in seconds, (queries,).
        deletions: moments in seconds, (deletions,). At the same moment a deletion comes first.
        hits: the shards of each deletion, counted from 0.
        shards: how many shards there are.
    """

    queries: np.ndarray
    deletions: np.ndarray
    hits: tuple[tuple[int, ...], ...]
    shards: int

    @property
    def seconds(self) -> float:
        """Moment of the last arrival."""
        return float(max([0.0, *self.queries[-1:], *self.deletions[-1:]]))


def invent_trace(
    queries_per_second: float,
    deletions_per_hour: float,
    hours: float,
    shards: int,
    seed: int,
    subjects: np.ndarray | None = None,
) -> Trace:
    """Queries and deletions that arrive independently (Poisson), each deletion in one random shard.

    Args:
        subjects: how many each shard holds, (shards,), of whom each is equally likely to ask; by
            default all shards are equally likely.

    Raises:
        UserError: a number is out of range, or no query arrives.
    """
    for flag, value in (("--rate", queries_per_second), ("--hours", hours)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{flag} is {value}, expected more than 0")
    if not 0 <= deletions_per_hour < math.inf:
        raise UserError(f"--deletions-per-hour is {deletions_per_hour}, expected 0 or more")
    if shards < 1:
        raise UserError(f"--shards is {shards}, expected at least 1")
    if (
        expected := 3600.0 * hours * queries_per_second + hours * deletions_per_hour
    ) > MOST_ARRIVALS:
        raise UserError(f"{expected:.2g} arrivals are too many to simulate: choose fewer --hours")
    generator = np.random.default_rng(seed)
    seconds = 3600.0 * hours

    def arrivals(rate: float) -> np.ndarray:
        return np.sort(generator.uniform(0.0, seconds, generator.poisson(rate * seconds)))

    queries, deletions = arrivals(queries_per_second), arrivals(deletions_per_hour / 3600.0)
    if not len(queries):
        raise UserError("no query arrives in this time: simulate more hours or a higher --rate")
    chances = None if subjects is None or not subjects.any() else subjects / subjects.sum()
    hit = generator.choice(shards, len(deletions), p=chances)
    return Trace(queries, deletions, tuple((int(shard),) for shard in hit), shards)


@dataclass(frozen=True)
class _Line:
    number: int
    time: float
    is_query: bool
    shard: int | None
    subject: str | None


def read_trace(path: Path, shards: Sequence[int], homes: Homes | None = None) -> Trace:
    """Replay a file: a line of JSON for each arrival, in any order.

        {"time": 12.5, "kind": "query"}
        {"time": 13, "kind": "delete", "shard": 3}
        {"time": 14, "kind": "delete", "subject": "ada@example.org"}

    A subject that asks again is deleted already, and is left out. No name is in any message.

    Args:
        shards: numbers of the shards.
        homes: where subjects are; without, a line must name the shard.

    Raises:
        UserError: the file cannot be read, or a line, told by its number, is not as above.
    """
    index = {number: position for position, number in enumerate(shards)}
    lines = []
    for number, text in _texts(path):
        try:
            lines.append(_parse(number, text))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        if len(lines) > MOST_ARRIVALS:
            raise UserError(f"{path} has more than {MOST_ARRIVALS} lines: take a part of it")
    if not any(line.is_query for line in lines):
        raise UserError(
            f"{path} has no query: give lines such as " + '{"time": 0, "kind": "query"}'
        )
    lines.sort(key=lambda line: line.time)
    start = lines[0].time
    subjects = dict.fromkeys(line.subject for line in lines if line.subject is not None)
    known = homes(subjects) if homes else None
    deletions, hits = [], []
    for line in lines:
        if line.is_query or (line.subject is not None and line.subject not in subjects):
            continue
        subjects.pop(line.subject, None)
        try:
            hits.append(tuple(sorted({index[number] for number in _shards_of(line, known)})))
        except (KeyError, ValueError) as error:
            why = error if isinstance(error, ValueError) else "there is no such shard"
            raise UserError(f"{path}, line {line.number}: {why}") from None
        deletions.append(line.time - start)
    queries = [line.time - start for line in lines if line.is_query]
    return Trace(np.array(queries), np.array(deletions), tuple(hits), len(shards))


def _shards_of(line: _Line, known: Mapping[str, Sequence[int]] | None) -> Sequence[int]:
    if line.subject is None:
        assert line.shard is not None
        return [line.shard]
    if known is None:
        raise ValueError('a "subject" needs --run, which says in which shard it is')
    if not known.get(line.subject):
        raise ValueError("the run holds no such subject")
    return known[line.subject]


def _texts(path: Path) -> Iterable[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield number, text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _parse(number: int, text: str) -> _Line:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    time, kind = _time(row.get("time")), row.get("kind")
    if kind == "query":
        return _Line(number, time, True, None, None)
    if kind != "delete":
        raise ValueError('"kind" must be "query" or "delete"')
    shard, subject = row.get("shard"), row.get("subject")
    if (shard is None) == (subject is None):
        raise ValueError('a deletion has "shard" or "subject"')
    if shard is not None and (isinstance(shard, bool) or not isinstance(shard, int)):
        raise ValueError('"shard" must be a whole number')
    if subject is not None and (isinstance(subject, bool) or not isinstance(subject, str | int)):
        raise ValueError('"subject" must be a name')
    return _Line(number, time, False, shard, None if subject is None else str(subject))


def _time(value: Any) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        if not (math.isfinite(value) and value >= 0):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError('"time" must be seconds, 0 or more') from None
