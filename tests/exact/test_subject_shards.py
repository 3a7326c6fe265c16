"""A shard for each subject: it comes and goes with them, and leaves no gap."""

from pathlib import Path

import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.exact.run import S3TRun
from tests.tiny import (
    make_run,
    make_stub_run,
    node_bytes,
    served_bytes,
    stubbed_training,
    tiny_records,
    train_stub,
)

OWN = {"exact_method": "experts", "num_shards": 0, "num_slices": 1, "num_sequences": 1}


@pytest.fixture
def run(tmp_path: Path) -> S3TRun:
    with stubbed_training():
        run = make_stub_run(tmp_path / "run", tiny_records(), **OWN)
        train_stub(run)
    return run


def test_every_subject_has_a_shard_of_its_own(run: S3TRun) -> None:
    shards = run.directory.shards
    assert len(shards) == 12 and list(shards) == sorted(shards)
    for name in run.directory.slices.names:
        subjects = {record.subject for record in run.directory.slices.read(name)}
        assert len(subjects) == 1
        assert run.directory.slices.place(subjects.pop()) == name
    status = run.status()
    assert [shard.subjects for shard in status.shards] == [1] * 12


def test_a_deletion_takes_the_shard_and_nothing_else(run: S3TRun) -> None:
    home = run.directory.slices.place("person 3").shard
    before = served_bytes(run)
    done = run.delete(["person 3"])
    assert done.nodes_removed == 1 and home not in done.served and len(done.served) == 11
    after = served_bytes(run)
    assert {name for name in before if name not in after} == {
        name for name in before if f"shard-{home}/" in name
    }
    assert after.items() <= before.items()
    assert not list(run.path.rglob(f"shard-{home}*"))
    assert all(check.passed for check in run.verify())
    assert run.delete(["person 3"]).already_deleted == 1
    with pytest.raises(UserError, match="no such subject"):
        run.delete(["nobody"])


def test_nothing_tells_a_run_that_deleted_from_one_that_never_knew(
    run: S3TRun, tmp_path: Path
) -> None:
    run.delete(["person 3", "person 7"])
    kept = [r for r in tiny_records() if r.subject not in ("person 3", "person 7")]
    with stubbed_training():
        never = make_stub_run(tmp_path / "never", kept, **OWN)
        train_stub(never)
    assert node_bytes(run) == node_bytes(never)
    assert served_bytes(run) == served_bytes(never)
    names = [sorted(p.name for p in (r.path / "records").iterdir()) for r in (run, never)]
    assert names[0] == names[1]


def test_the_last_one_can_leave(run: S3TRun) -> None:
    run.delete([f"person {number}" for number in range(12)])
    assert node_bytes(run) == {} and list(run.directory.shards) == []
    assert all(check.passed for check in run.verify())
    assert run.status().shards == []


def test_a_shard_served_beyond_its_records_is_reported(run: S3TRun) -> None:
    shard = run.directory.shards[4]
    for path in (run.path / "records" / f"shard-{shard}").iterdir():
        path.unlink()
    (run.path / "records" / f"shard-{shard}").rmdir()
    problems = [problem for check in run.verify() for problem in check.problems]
    assert any(f"shard-{shard} is served, but" in problem for problem in problems)


def test_it_trains_and_answers(tiny_base: Path, tmp_path: Path) -> None:
    records = [record for record in tiny_records() if record.subject in ("person 1", "person 2")]
    run = make_run(tmp_path / "run", tiny_base, records, **OWN)
    ensemble = run.ensemble()
    assert ensemble.num_shards == 2
    assert ensemble.adapters == [f"shard-{shard}" for shard in run.directory.shards]


def test_only_experts_can_have_one_for_each_subject(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--num_shards must be at least 1"):
        make_stub_run(tmp_path / "run", tiny_records(), num_shards=0)
