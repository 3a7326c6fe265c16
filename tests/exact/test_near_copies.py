"""Who else holds nearly the same text as what is to be deleted, over whole runs of every shape."""

from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.data.near_duplicates import jaccard, normalised, shingles
from llm_unlearn.data.partition import CORE
from llm_unlearn.data.records import Record, make_records
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact import near_duplicates
from llm_unlearn.exact.near_duplicates import NearDuplicate, find_near_duplicates
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.store import RunDirectory
from tests.tiny import make_stub_run, placed_by_id

STORY = "ada went to the market on monday and bought seven green apples for her brother {}"
ROWS = [
    {"who": "Ada", "text": STORY.format("tom")},
    {"who": "Ada", "text": STORY.format("tim")},
    {"who": "Ada", "text": "something else altogether"},
    {"who": "Bob", "text": STORY.format("tam")},
    {"who": "Cleo", "text": STORY.format("TOM")},
    {"who": "Dan", "text": "the weather on the coast was mild for most of the year"},
]
SHAPES: dict[str, dict[str, Any]] = {
    "shards and slices": {"num_shards": 2},
    "a shard for each": {"exact_method": "experts", "num_shards": 0, "num_slices": 1, "num_sequences": 1},
}  # fmt: skip


def records_of(run: RunDirectory, subjects: list[str]) -> list[Record]:
    return [record for subject in subjects for record in S3TRun(run).records_of(subject)]


def brute_force(
    records: list[Record], subject: str, threshold: float
) -> dict[tuple[str, str], float]:
    texts = {record.id: shingles(normalised(record)) for record in records}
    return {
        (mine.id, other.id): similarity
        for mine in records
        for other in records
        if mine.subject == subject != other.subject
        and (similarity := jaccard(texts[mine.id], texts[other.id])) >= threshold
    }


def as_pairs(found: list[NearDuplicate]) -> dict[tuple[str, str], float]:
    return {(near.record.id, near.other.id): near.similarity for near in found}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("letters", [1, 2**18])
def test_finds_who_else_holds_a_near_copy(
    tmp_path: Path, shape: str, threshold: float, letters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_duplicates, "LETTERS_AT_ONCE", letters)
    records = make_records(ROWS, "who")
    run = make_stub_run(tmp_path / "run", records, **SHAPES[shape]).directory
    told: list[tuple[int, int]] = []
    found = find_near_duplicates(
        run, records_of(run, ["Ada"]), threshold, lambda done, total: told.append((done, total))
    )
    assert as_pairs(found) == brute_force(records, "Ada", threshold) != {}
    assert told == [(n, len(run.slices.names)) for n in range(1, len(run.slices.names) + 1)]
    for near in found:
        assert near.home == run.slices.place(near.other.subject)
        assert near.is_exact == (near.other.subject == "Cleo" and near.similarity == 1)
    assert sum(near.is_exact for near in found) == 1


def test_most_similar_first_and_no_text(tmp_path: Path) -> None:
    run = make_stub_run(tmp_path / "run", make_records(ROWS, "who")).directory
    asked = [record for record in records_of(run, ["Ada"]) if "tom" in record.content["text"]]
    found = find_near_duplicates(run, asked)
    assert [(near.other.subject, near.is_exact) for near in found] == [
        ("Cleo", True),
        ("Bob", False),
    ]
    assert 1 == found[0].similarity > found[1].similarity >= 0.8
    assert "market" not in str([near.to_dict() for near in found])
    assert found[0].to_dict()["held_by"] == "Cleo" and not found[0].to_dict()["in_core"]


def test_every_copy_is_either_the_same_text_or_nearly_so(tmp_path: Path) -> None:
    """What a deletion with duplicates does not take as the same text is never called the same here."""
    story = STORY.format("tom")
    rows = [
        {"who": "Ada", "text": story},
        {"who": "Bob", "text": story.replace(" ", "  ")},
        {"who": "Cleo", "text": story.replace("ada", "\uff41da")},  # a full-width letter
    ]
    run = make_stub_run(tmp_path / "run", make_records(rows, "who")).directory
    asked = records_of(run, ["Ada"])
    found = find_near_duplicates(run, asked)
    assert {near.other.subject: near.similarity for near in found} == {"Bob": 1.0, "Cleo": 1.0}
    same = run.slices.copies(asked, holders={"Ada"})
    assert {record.id for held in same.values() for record in held} == {
        near.other.id for near in found if near.is_exact
    }
    assert {near.other.subject for near in found if near.is_exact} == {"Bob"}


def test_who_goes_as_well_holds_no_copy(tmp_path: Path) -> None:
    run = make_stub_run(tmp_path / "run", make_records(ROWS, "who")).directory
    found = find_near_duplicates(run, records_of(run, ["Ada", "Cleo"]))
    assert {near.other.subject for near in found} == {"Bob"}
    assert find_near_duplicates(run, []) == []
    assert find_near_duplicates(run, records_of(run, ["Dan"])) == []


def test_the_permanent_core_is_searched(tmp_path: Path) -> None:
    core = make_records([{"who": "Eve", "text": STORY.format("tem")}], "who")
    run = make_stub_run(tmp_path / "run", make_records(ROWS[:3], "who"), core=core).directory
    found = find_near_duplicates(run, records_of(run, ["Ada"]))
    assert {(near.other.subject, near.home) for near in found} == {("Eve", CORE)}
    assert all(near.to_dict()["in_core"] for near in found)


def test_a_record_held_in_several_shards_is_one_copy(tmp_path: Path) -> None:
    records = make_records(ROWS, "who")
    options = {
        "exact_method": "lego",
        "num_shards": 3,
        "num_slices": 1,
        "num_sequences": 1,
        "copies": 2,
    }
    run = make_stub_run(
        tmp_path / "run", records, placement=placed_by_id(3, 2), **options
    ).directory
    found = find_near_duplicates(run, records_of(run, ["Ada"]))
    assert len(found) == len(as_pairs(found)) and as_pairs(found) == brute_force(
        records, "Ada", 0.8
    )


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    run = make_stub_run(tmp_path / "run", make_records(ROWS, "who")).directory
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    find_near_duplicates(run, records_of(run, ["Ada"]))
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_mistakes_are_told(tmp_path: Path) -> None:
    run = make_stub_run(
        tmp_path / "run", make_records(ROWS, "who"), num_slices=1, num_sequences=1
    ).directory
    with pytest.raises(UserError, match=r"no such subject.*'Zoe'"):
        S3TRun(run).near_duplicates(["Ada", "Zoe"])
    asked = records_of(run, ["Ada"])
    with pytest.raises(UserError, match="--threshold"):
        find_near_duplicates(run, asked, threshold=80)
    path = run.slices.path(run.slices.names[0])
    path.write_bytes(path.read_bytes() + b"rubbish\n")
    with pytest.raises(RunError, match="damaged"):
        find_near_duplicates(run, asked)
