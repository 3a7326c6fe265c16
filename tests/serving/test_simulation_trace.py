"""Traces: what is read, and how everything else is refused by the number of its line."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.serving.simulation import trace as simulation_trace
from llm_unlearn.serving.simulation.trace import Trace, invent_trace, read_trace

QUERY = {"time": 0, "kind": "query"}


def write(path: Path, *rows: object) -> Path:
    file = path / "trace.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n")
    return file


def delete(time: float, shard: object) -> dict[str, object]:
    return {"time": time, "kind": "delete", "shard": shard}


def test_lines_in_any_order_become_a_trace_that_begins_at_zero(tmp_path: Path) -> None:
    rows = [delete(107, 2), {"time": 101.5, "kind": "query"}, "", {"time": 100, "kind": "query"}]
    trace = read_trace(write(tmp_path, *rows, delete(100, 0)), range(3))
    assert trace.queries.tolist() == [0, 1.5]
    assert trace.deletions.tolist() == [0, 7]
    assert (trace.hits, trace.shards, trace.seconds) == (((0,), (2,)), 3, 7)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"time": -1, "kind": "query"}, '"time" must be seconds, 0 or more'),
        ({"time": "now", "kind": "query"}, '"time"'),
        ({"time": True, "kind": "query"}, '"time"'),
        ({"kind": "query"}, '"time"'),
        ('{"time": NaN, "kind": "query"}', '"time"'),
        ('{"time": 1e999, "kind": "query"}', '"time"'),
        ('{"time": 1' + "0" * 400 + ', "kind": "query"}', '"time"'),
        ({"time": 1, "kind": "update"}, '"kind"'),
        ({"time": 1, "kind": ["query"]}, '"kind"'),
        ({"time": 1, "kind": "delete"}, '"shard" or "subject"'),
        ({"time": 1, "kind": "delete", "shard": 1, "subject": "x"}, '"shard" or "subject"'),
        (delete(1, 4), "no such shard"),
        (delete(1, -1), "no such shard"),
        (delete(1, True), "whole number"),
        (delete(1, 1.5), "whole number"),
        (delete(1, [1]), "whole number"),
        ({"time": 1, "kind": "delete", "subject": ["x"]}, '"subject"'),
        ({"time": 1, "kind": "delete", "subject": "x"}, "--run"),
        ("[" * 100_000, "not JSON"),
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
    ],
)
def test_a_bad_line_is_told_by_its_number(tmp_path: Path, row: object, says: str) -> None:
    with pytest.raises(UserError, match="line 3: ") as caught:
        read_trace(write(tmp_path, QUERY, QUERY, row), range(4))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [[], [delete(0, 0)]])
def test_a_trace_without_queries_is_refused(tmp_path: Path, rows: list[object]) -> None:
    with pytest.raises(UserError, match="no query"):
        read_trace(write(tmp_path, *rows), range(1))


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read"):
        read_trace(tmp_path / "trace", range(1))
    with pytest.raises(UserError, match="cannot read"):
        read_trace(tmp_path, range(1))


def test_too_many_lines_are_refused_before_memory_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation_trace, "MOST_ARRIVALS", 10)
    assert len(read_trace(write(tmp_path, *[QUERY] * 10), range(1)).queries) == 10
    with pytest.raises(UserError, match="more than 10 lines"):
        read_trace(write(tmp_path, *[QUERY] * 11), range(1))


def test_subjects_are_found_and_asked_for_once(tmp_path: Path) -> None:
    def homes(subjects: Iterable[str]) -> dict[str, list[int]]:
        held = {"Ada": [30, 10], "7": [20]}
        return {subject: held[subject] for subject in subjects if subject in held}

    def ask(time: float, subject: object) -> dict[str, object]:
        return {"time": time, "kind": "delete", "subject": subject}

    rows = [QUERY, ask(3, "Ada"), ask(2, "Ada"), ask(5, 7)]
    trace = read_trace(write(tmp_path, *rows), (10, 20, 30), homes)
    assert trace.deletions.tolist() == [2, 5]
    assert trace.hits == ((0, 2), (1,))
    with pytest.raises(UserError, match="line 2: the run holds no such subject") as caught:
        read_trace(write(tmp_path, QUERY, ask(1, "Grace")), (10, 20, 30), homes)
    assert "Grace" not in str(caught.value)


def test_invented_arrivals_have_the_rates_that_were_asked_for() -> None:
    trace = invent_trace(3.0, 120.0, 10.0, 5, seed=1)
    assert len(trace.queries) == pytest.approx(108_000, rel=0.02)
    assert len(trace.deletions) == pytest.approx(1200, rel=0.1)
    assert trace.seconds <= 36_000 and (np.diff(trace.queries) >= 0).all()
    assert {shard for (shard,) in trace.hits} == set(range(5))


def test_invented_arrivals_come_from_the_seed() -> None:
    def flat(trace: Trace) -> list[object]:
        return [trace.queries.tolist(), trace.deletions.tolist(), trace.hits]

    assert flat(invent_trace(1, 60, 1, 4, seed=3)) == flat(invent_trace(1, 60, 1, 4, seed=3))
    assert flat(invent_trace(1, 60, 1, 4, seed=3)) != flat(invent_trace(1, 60, 1, 4, seed=4))


def test_deletions_go_where_the_subjects_are() -> None:
    trace = invent_trace(1, 600, 5, 3, seed=0, subjects=np.array([0.0, 9.0, 1.0]))
    hits = np.bincount([shard for (shard,) in trace.hits], minlength=3)
    assert hits[0] == 0 and 5 < hits[1] / hits[2] < 15


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ((0, 60, 2, 20), "--rate"),
        ((float("inf"), 60, 2, 20), "--rate"),
        ((2, -1, 2, 20), "--deletions-per-hour"),
        ((2, 60, float("nan"), 20), "--hours"),
        ((2, 60, 2, 0), "--shards"),
        ((2, 60, 1e9, 20), "too many"),
        ((1e-9, 60, 0.001, 20), "no query arrives"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers: tuple[float, ...], says: str) -> None:
    rate, deletions, hours, shards = numbers
    with pytest.raises(UserError, match=says):
        invent_trace(rate, deletions, hours, int(shards), seed=0)
