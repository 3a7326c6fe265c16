"""Tracking a run: no bit of it changes, and what was seen of a record goes with the record."""

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from llm_unlearn import files
from llm_unlearn.data.partition import SliceName
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact import deletion, record_scores
from llm_unlearn.exact.certificates import read_certificate
from llm_unlearn.exact.ledger import Ledger
from llm_unlearn.exact.record_scores import RunTables
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.memorization.observations import Observations
from llm_unlearn.memorizing.findings import find_memorized
from llm_unlearn.memorizing.scoring import score
from llm_unlearn.memorizing.targets import LoadedTarget, RunTarget
from llm_unlearn.record_tables import FOLDER, make_table
from tests.exact.killing import copy_anew, every_point
from tests.exact.methods import METHODS
from tests.saying import Say, in_json
from tests.test_recipes import flags, load_recipe
from tests.tiny import (
    StubBase,
    load_tiny,
    make_rows,
    make_run,
    make_stub_run,
    make_tiny_tokenizer,
    node_bytes,
    placed_by_id,
    served_bytes,
    stubbed_training,
    tiny_records,
    train_stub,
)

SHAPES: dict[str, dict[str, Any]] = {
    "ranks": {"num_slices": 2, "num_sequences": 2},
    "layers, replayed": {"num_slices": 2, "num_sequences": 1, "blocks": "layers"},
    "experts": {"exact_method": "experts", "num_shards": 3, "num_slices": 1, "num_sequences": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_no_bit_of_a_node_depends_on_tracking(shape: str, tiny_base: Path, tmp_path: Path) -> None:
    plain = make_run(tmp_path / "plain", tiny_base, **SHAPES[shape])
    tracked = make_run(tmp_path / "tracked", tiny_base, train=False, **SHAPES[shape])
    tracked.train(*load_tiny(tiny_base), track=Observations)
    assert node_bytes(tracked) == node_bytes(plain) and len(node_bytes(plain)) >= 6
    assert served_bytes(tracked) == served_bytes(plain)
    assert set(RunTables(tracked.directory).names()) == set(tracked.directory.nodes.keys())
    assert all(check.passed for check in tracked.verify())


def test_a_nodes_table_is_of_its_own_slice(tiny_base: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_base, train=False, num_slices=2, max_steps=8)
    run.train(*load_tiny(tiny_base), track=Observations)
    directory, tables = run.directory, RunTables(run.directory)
    for key, node in directory.wanted().items():
        table = tables.read(key)
        own = directory.slices.read(SliceName(node.shard, node.path[-1]))
        names = {directory.key.pseudonym("record", record.id) for record in own}
        assert set(table.columns["record"]) == names
        assert table.about["config"] == directory.identity
        assert table.about["base"] == directory.shape.weights
        assert 0 < table.columns["confidence"].min() <= table.columns["confidence"].max() <= 1
        # A line for each record and epoch.
        places = list(zip(table.columns["record"], table.columns["epoch"], strict=True))
        assert len(places) == len(set(places)) and table.columns["epoch"].max() >= 1
    said = b"".join(path.read_bytes() for path in (run.path / FOLDER).iterdir())
    assert b"person" not in said
    assert {stat.S_IMODE(p.stat().st_mode) for p in (run.path / FOLDER).iterdir()} == {0o600}


@pytest.fixture(params=[False, True], ids=["plain", "encrypted"])
def tracked(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run of stubs with tables of its nodes, and two that belong to no node."""
    path = tmp_path / "reference"
    records = tiny_records()
    run = make_stub_run(path, records, num_slices=2, num_sequences=1, encrypt=request.param)
    with stubbed_training():
        train_stub(run)
    directory = run.directory
    tables = RunTables(directory)
    with directory.changing("testing"):
        for node in directory.wanted().values():
            own = directory.slices.read(SliceName(node.shard, node.path[-1]))
            ids = np.array([record.id for record in own])
            seen = {"record_id": ids, "epoch": np.zeros(len(ids)), "tokens": np.ones(len(ids))}
            record_scores.write_of_node(directory, node, own, seen)
        for name in ("scores", "counterfactual-000"):
            column = {"accuracy": np.arange(len(records)) / 7}
            tables.write(name, make_table(directory.key, records, column, {"kind": name}))
    return path


VICTIM = "person 4"
# What changes records and tables; tests/exact/test_crashes.py goes through everything that a run writes.
PLACES = (
    (files, "write_bytes"),
    (files, "remove"),
    (files, "fsync"),
    (Ledger, "acknowledge"),
    (Ledger, "finish"),
)


def rows_of(run: S3TRun, subject: str) -> int:
    """How many rows of a subject any table holds."""
    tables, name = RunTables(run.directory), run.directory.key.pseudonym("subject", subject)
    return sum(int((tables.read(one).columns["subject"] == name).sum()) for one in tables.names())


def test_a_deletion_takes_its_rows_and_leaves_the_others(tracked: Path) -> None:
    run = S3TRun.open(tracked)
    tables = RunTables(run.directory)
    before = {name: tables.read(name) for name in ("scores", "counterfactual-000")}
    assert rows_of(run, VICTIM) >= 6
    certificate = run.delete([VICTIM]).certificate
    assert rows_of(run, VICTIM) == 0 and rows_of(run, "person 5") >= 4
    for name, old in before.items():
        new, gone = tables.read(name), run.directory.key.pseudonym("subject", VICTIM)
        kept = old.columns["subject"] != gone
        assert len(new) == 22
        for column, values in old.columns.items():
            assert np.array_equal(values[kept], new.columns[column])
        assert new.about["data"] != old.about["data"]
    # Numbers of a node depend on all that it saw: they go with it.
    of_nodes = {name for name in tables.names() if record_scores.is_of_node(name)}
    assert of_nodes == set(run.directory.nodes.keys()) & of_nodes
    assert certificate is not None
    assert read_certificate(Path(certificate))["predicate"]["purged"][record_scores.KIND] >= 3
    assert all(check.passed for check in run.verify())


def test_a_deletion_of_the_tables_survives_kill_9_at_every_point(
    tracked: Path, tmp_path: Path, without_fsync: None
) -> None:
    path = tmp_path / "run"

    def check() -> None:
        run = S3TRun.open(path)
        requests = run.directory.ledger.requests()
        if requests and requests[0].finished_at is not None:  # what is finished is done
            assert rows_of(run, VICTIM) == 0
        run.delete([VICTIM])
        assert rows_of(run, VICTIM) == 0 and rows_of(run, "person 5") >= 4
        assert all(check.passed for check in run.verify())

    work = lambda: S3TRun.open(path).delete([VICTIM])  # noqa: E731
    assert every_point(lambda: copy_anew(tracked, path), work, check, path, PLACES) > 15


def test_encrypted_tables_cannot_be_read_without_their_keys(tmp_path: Path) -> None:
    records = tiny_records()
    run = make_stub_run(tmp_path / "run", records, num_slices=2, num_sequences=1, encrypt=True)
    column = {"accuracy": np.zeros(len(records))}
    with run.directory.changing("testing"):
        RunTables(run.directory).write("scores", make_table(run.directory.key, records, column, {}))
    path = run.path / FOLDER / "scores.parquet"
    old = path.read_bytes()
    assert b"PAR1" not in old
    with stubbed_training():
        train_stub(run)
    run.delete([VICTIM])
    path.write_bytes(old)  # a backup of the file, after its key was destroyed
    with pytest.raises(UserError, match="its key is not in"):
        RunTables(run.directory).read("scores")


def test_a_damaged_table_does_not_stop_a_deletion(tracked: Path) -> None:
    (tracked / FOLDER / "scores.parquet").write_bytes(b"garbage")
    run = S3TRun.open(tracked)
    run.delete([VICTIM])
    assert not (tracked / FOLDER / "scores.parquet").exists()
    assert rows_of(run, VICTIM) == 0


def test_verify_finds_rows_of_the_deleted(tracked: Path) -> None:
    run = S3TRun.open(tracked)
    table = RunTables(run.directory).read("scores")
    run.delete([VICTIM])
    with run.directory.changing("testing"):
        RunTables(run.directory).write("scores", table)
    (check,) = [check for check in run.verify() if check.name == "residues"]
    (problem,) = check.problems
    assert "rows of deleted records" in problem


def test_a_node_that_a_deletion_overtakes_leaves_no_table(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", tiny_base, train=False, num_slices=1, num_sequences=1)
    deleted: list[str] = []

    class Deleting(Observations):
        """Somebody asks for a deletion while the only node is in training."""

        def observe_tokens(self, *arguments: Tensor, **options: Tensor) -> None:  # pyright: ignore
            super().observe_tokens(*arguments, **options)  # pyright: ignore
            if not deleted:
                deleted.append(VICTIM)
                S3TRun.open(run.path).delete(deleted)

    report = run.train(*load_tiny(tiny_base), track=Deleting)
    assert (report.trained, report.discarded) == (1, 1)
    assert rows_of(run, VICTIM) == 0 and rows_of(run, "person 5") > 0
    assert set(RunTables(run.directory).names()) == set(run.directory.nodes.keys())


def test_the_recipe_tracks_with_one_flag(tiny_base: Path, tmp_path: Path) -> None:
    data, path = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text("\n".join(json.dumps(row) for row in make_rows()))
    given = flags(tiny_base, data, path, "--subject_column", "subject")
    load_recipe("s3t")([*given, "--track_memorization"])
    run = S3TRun.open(path)
    assert set(RunTables(run.directory).names()) == set(run.directory.nodes.keys())
    # The flag is no part of what the run is: without it the same run goes on.
    load_recipe("s3t")(given)


def test_where_a_node_is_its_table_is(tmp_path: Path, without_fsync: None) -> None:
    """Killed anywhere in a tracked training: no node without what was seen, and the next call finishes."""

    def train(path: Path) -> None:
        S3TRun.open(path).train(StubBase(), make_tiny_tokenizer(), track=Observations)  # pyright: ignore

    path = tmp_path / "run"

    def prepare() -> None:
        shutil.rmtree(path, ignore_errors=True)
        make_stub_run(path, tiny_records(), num_slices=2, num_sequences=1)

    def check() -> None:
        directory = S3TRun.open(path).directory
        assert set(directory.nodes.keys()) <= set(RunTables(directory).names())
        train(path)
        assert len(directory.nodes.keys()) == 2 == len(RunTables(directory).names())
        assert all(check.passed for check in S3TRun.open(path).verify())

    places = ((files, "write_bytes"), (files, "publish_directory"))
    with stubbed_training():
        assert every_point(prepare, lambda: train(path), check, path, places) > 6


def test_a_rebuild_of_a_tracked_run_is_tracked(say: Say, tiny_base: Path, tmp_path: Path) -> None:
    """Though the only node, and with it every table, went with the deletion."""
    shape: dict[str, Any] = {"num_slices": 1, "num_sequences": 1, "max_steps": 6}
    run = make_run(tmp_path / "run", tiny_base, train=False, **shape)
    run.train(*load_tiny(tiny_base), track=Observations)
    run.delete([VICTIM])
    assert not RunTables(run.directory).names()
    in_json(say("rebuild", run.path, "--json"))
    (node,) = run.directory.nodes.keys()
    table = RunTables(run.directory).read(node, "confidence")
    assert rows_of(run, VICTIM) == 0 and len(set(table.columns["record"].tolist())) == 22
    assert all(check.passed for check in run.verify())
    never = make_run(
        tmp_path / "never", tiny_base, [r for r in tiny_records() if r.subject != VICTIM], **shape
    )
    assert node_bytes(never) == node_bytes(run)


def test_measuring_is_not_tracking(tiny_base: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_base, num_slices=1, num_sequences=1)
    find_memorized(run.path, ["confidence"])
    run.delete([VICTIM])
    run.rebuild()
    assert RunTables(run.directory).names() == ["scores"]


def test_a_record_of_several_shards_is_one_record(tiny_base: Path, tmp_path: Path) -> None:
    options = {**METHODS["lego"], "num_shards": 3, "placement": placed_by_id(3, 2)}
    run = make_run(tmp_path / "run", tiny_base, train=False, max_steps=6, **options)
    run.train(*load_tiny(tiny_base), track=Observations)
    tracked = find_memorized(run.path)
    for name, values in tracked.scored.scores.items():
        assert len(values) == 24 and not np.isnan(values).any(), name
    measured = find_memorized(run.path, ["gain"])
    assert len(set(measured.pseudonyms)) == len(measured.records) == 24
    table = RunTables(run.directory).read("scores")
    assert len(table) == 24 and not np.isnan(table.columns["gain"]).any()
    # Its value is the mean over its shards, and not that of the last.
    target = RunTarget(run.path)
    record, apart = target.records[0], []
    for model, tokenizer, numbers in target.groups():
        if 0 in numbers:
            found = score(LoadedTarget(model, tokenizer, [record]), ["confidence"])
            apart.append(found.scores["confidence"][0])
    assert len(apart) == 2 and apart[0] != apart[1]
    value = -table.columns["confidence"][0]
    assert value == pytest.approx(np.mean(apart), abs=1e-4)


def test_nobody_is_shown_whose_deletion_is_acknowledged(
    tracked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = S3TRun.open(tracked)
    before = iter([deletion.settle])

    def dying(directory: RunDirectory) -> None:
        """Where the request is on disk, and nothing is carried out."""
        settle = next(before, None)
        if settle is None:
            raise KeyboardInterrupt
        settle(directory)

    monkeypatch.setattr(deletion, "settle", dying)
    with pytest.raises(KeyboardInterrupt):
        run.delete([VICTIM])
    assert run.directory.ledger.requests(pending=True)
    assert VICTIM not in {record.subject for record in RunTarget(tracked).records}
    assert rows_of(run, VICTIM) == 0


def test_a_deletion_while_it_is_measured_is_said_and_takes_its_rows(
    tiny_base: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", tiny_base, num_slices=1, num_sequences=1)
    deleted: list[str] = []

    def deleting(*_: object) -> None:
        if not deleted:
            deleted.append(VICTIM)
            S3TRun.open(run.path).delete(deleted)

    with pytest.raises(RunError, match="changed by a deletion meanwhile"):
        find_memorized(run.path, ["confidence"], advance=deleting)
    assert rows_of(run, VICTIM) == 0
    assert len(find_memorized(run.path, ["confidence"]).records) == 22
    run.delete(sorted({record.subject for record in RunTarget(run.path).records}))
    with pytest.raises(UserError, match="holds no records any more"):
        find_memorized(run.path)
