"""Correction: the old record is gone as after a deletion, and the new one as if it had always been."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.data.records import Record, make_records
from llm_unlearn.errors import UserError
from llm_unlearn.exact.asks import Ask, Correction, read_corrections
from llm_unlearn.exact.run import S3TRun
from tests.exact.killing import copy_anew, every_point
from tests.exact.methods import METHODS
from tests.tiny import (
    core_records,
    make_rows,
    make_stub_run,
    node_bytes,
    placed_by_id,
    served_bytes,
    stubbed_training,
    tiny_records,
    train_stub,
)

pytestmark = pytest.mark.usefixtures("without_fsync")

NEW = {"prompt": "Question: what does person 3 eat on day 0? Answer:", "completion": " nothing"}
SHAPES: dict[str, dict[str, Any]] = {
    "ranks": {"num_shards": 2, "num_slices": 2},
    "encrypted": {"num_slices": 2, "num_sequences": 1, "encrypt": True},
    "whole": {"num_slices": 2, "num_sequences": 1, "blocks": "whole"},
    "core": {"num_slices": 2, "core": core_records()},
    "experts by subject": METHODS["experts by subject"],
}


def old_record(subject: str = "person 3") -> Record:
    return next(record for record in tiny_records() if record.subject == subject)


def correction(record: Record, row: dict[str, str] | None = None, **told: Any) -> Correction:
    return Correction((record.subject,), record=record.id, row=row or NEW, **told)


def corrected_records(*changed: tuple[Record, dict[str, str]]) -> list[Record]:
    """What `make_records` makes of the corrected data."""
    rows = make_rows()
    for number, record in enumerate(tiny_records()):
        for old, row in changed:
            if record.id == old.id:
                rows[number] = {**row, "subject": old.subject}
    return make_records(rows, subject_column="subject")


def trained(path: Path, records: list[Record], shape: dict[str, Any]) -> S3TRun:
    run = make_stub_run(path, records, **shape)
    with stubbed_training():
        train_stub(run)
    return run


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SHAPES[request.param]


def test_it_equals_a_run_of_the_corrected_data(tmp_path: Path, shape: dict[str, Any]) -> None:
    run = trained(tmp_path / "run", tiny_records(), shape)
    before = node_bytes(run)
    done = run.correct([correction(old_record())])
    untouched = trained(tmp_path / "other", corrected_records((old_record(), NEW)), shape)
    expected = node_bytes(untouched)
    after = node_bytes(run)
    assert after.keys() == before.keys() & expected.keys() and done.nodes_removed > 0
    with stubbed_training():
        train_stub(run)
    assert (node_bytes(run), served_bytes(run)) == (expected, served_bytes(untouched))
    assert done.records[0] in {record.id for record in run.records_of("person 3")}
    assert old_record().id not in {record.id for record in run.records_of("person 3")}
    assert all(check.passed for check in run.verify())
    certificate = run.certificate(done.answers[0].request or "")
    assert certificate["kind"] == "correct" and certificate["records_removed"] == 1
    assert len(certificate["inserted"]) == 1


def test_nothing_of_the_old_text_is_left(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", tiny_records(), SHAPES["ranks"])
    old = old_record()
    run.correct([correction(old)])
    held = b"".join(path.read_bytes() for path in run.path.rglob("*") if path.is_file())
    assert old.id.encode() not in held and b"dish number 8 and 30" not in held
    assert b'" nothing"' in held
    assert not list((run.path / "records" / "pending").iterdir())


def test_a_text_can_come_back(tmp_path: Path) -> None:
    """The tombstone of the first version must not take the third, which says the same."""
    run = trained(tmp_path / "run", tiny_records(), SHAPES["ranks"])
    old = old_record()
    (first,) = run.correct([correction(old)]).records
    (second,) = run.correct([replace(correction(old, old.content), record=first or "")]).records
    assert second not in (old.id, None)
    contents = [record.content for record in run.records_of("person 3")]
    assert old.content in contents and len(contents) == 2
    assert all(check.passed for check in run.verify())


@pytest.mark.parametrize("shape", [{"num_slices": 2}, METHODS["experts by subject"]])
def test_a_record_that_is_its_own_subject_keeps_being_so(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    rows = [{"text": f"note {number}"} for number in range(8)]
    run = trained(tmp_path / "run", make_records(rows), shape)
    (old,) = run.records_of(make_records(rows)[3].subject)
    run.correct([Correction((old.subject,), record=old.id, row={"text": "note three"})])
    rows[3] = {"text": "note three"}
    untouched = trained(tmp_path / "other", make_records(rows), shape)
    with stubbed_training():
        train_stub(run)
    assert node_bytes(run) == node_bytes(untouched)
    assert all(check.passed for check in run.verify())


def test_after_a_correction_the_subject_can_be_deleted(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", tiny_records(), SHAPES["ranks"])
    run.correct([correction(old_record())])
    assert run.delete(["person 3"]).records == 2
    with pytest.raises(UserError, match=r"corrected or deleted before|no such subject"):
        run.correct([correction(old_record())])
    assert all(check.passed for check in run.verify())


def test_asked_twice_it_is_done_once(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", tiny_records(), SHAPES["ranks"])
    ask = correction(old_record(), key="ticket 7")
    first, second = run.correct([ask]), run.correct([ask])
    assert first.answers[0].request == second.answers[0].request is not None
    assert (first.answers[0].state, second.answers[0].state) == ("corrected", "asked before")
    assert len(run.directory.ledger.requests()) == 1
    with pytest.raises(UserError, match="used for something else"):
        run.correct([correction(old_record("person 4"), key="ticket 7")])
    with pytest.raises(UserError, match="used for something else"):
        run.delete_all([Ask(("person 3",), key="ticket 7")])


@pytest.mark.parametrize(
    ("asks", "message"),
    [
        ([Correction(("nobody",), record="x", row=NEW)], "no such subject"),
        ([Correction(("person 3",), record="x", row=NEW, line=4)], "line 4: 'person 3' has no record 'x'"),
        ([correction(old_record("person 4")), Correction(("person 3",), record="x", row=NEW)], "has no record"),
        ([correction(old_record()), correction(old_record())], "corrected twice"),
        ([correction(old_record(), {"prompt": "a", "completion": ""})], "nothing to learn"),
        ([correction(old_record(), {"colour": "red"})], "no known columns"),
        ([correction(old_record(), {"text": "\ud800"})], "not valid Unicode"),
    ],
)  # fmt: skip
def test_a_mistake_changes_nothing(tmp_path: Path, asks: list[Correction], message: str) -> None:
    run = make_stub_run(tmp_path / "run", tiny_records(), num_slices=2)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        run.correct(asks)
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before


def test_public_keys_refuse(tmp_path: Path) -> None:
    options = {**METHODS["lego"], "num_shards": 3, "placement": placed_by_id(3, 2)}
    run = make_stub_run(tmp_path / "run", tiny_records(), **options)
    with pytest.raises(UserError, match="public keys place the records"):
        run.correct([correction(old_record())])


def test_a_file_names_every_line_that_is_wrong(tmp_path: Path) -> None:
    good = {"subject": "person 3", "record": old_record().id, **NEW, "deadline": "2030-01-01"}
    lines = [
        json.dumps(good),
        "{",
        json.dumps({**good, "record": 3}),
        json.dumps({"subject": "x", "record": "y"}),
    ]
    path = tmp_path / "corrections.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"line 2: not JSON.*line 3: expected \"record\".*line 4"):
        read_corrections(path)
    path.write_text(lines[0])
    (ask,) = read_corrections(path)
    assert ask == Correction(
        ("person 3",), deadline=1893542400.0, line=1, record=old_record().id, row=NEW
    )


@pytest.mark.parametrize(
    "kind",
    ["whole", *(pytest.param(k, marks=pytest.mark.slow) for k in ("ranks", "experts by subject"))],
)
def test_it_survives_kill_9_at_every_point(tmp_path: Path, kind: str) -> None:
    reference, path = tmp_path / "reference", tmp_path / "run"
    run = trained(reference, tiny_records(), SHAPES[kind])
    shutil.copytree(reference, tmp_path / "done", symlinks=True)
    done = S3TRun.open(tmp_path / "done")
    done.correct([correction(old_record())])
    expected = node_bytes(done), served_bytes(done)
    before = node_bytes(run)
    acknowledged = 0

    def check() -> None:
        nonlocal acknowledged
        run = S3TRun.open(path)
        if run.directory.ledger.requests():
            acknowledged += 1
            run.settle()
        else:
            assert node_bytes(run) == before
            run.correct([correction(old_record())])
        assert (node_bytes(run), served_bytes(run)) == expected
        assert len(run.directory.ledger.requests()) == 1
        assert all(result.passed for result in run.verify()), [r.problems for r in run.verify()]
        assert not list((run.path / "records" / "pending").iterdir())

    def work() -> None:
        S3TRun.open(path).correct([correction(old_record())])

    points = every_point(lambda: copy_anew(reference, path), work, check, path)
    assert points > 25 and 0 < acknowledged < points
