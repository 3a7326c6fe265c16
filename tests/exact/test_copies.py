"""Copies outside the run: what is known of them, when they are stale, and what is ever deleted."""

import json
import os
import shutil
from pathlib import Path

import pytest

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact import copies, copy_actions
from llm_unlearn.exact.copies import Copy, find, known, mark_gone, outstanding, register, statuses
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.served import LINEAGE_NAME
from llm_unlearn.exact.store import RunDirectory
from tests.tiny import make_trained_stub


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained_stub(tmp_path_factory.mktemp("copies") / "run", num_shards=2)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunDirectory:
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return RunDirectory.open(tmp_path / "run")


def state_of(run: RunDirectory, copy: Copy) -> tuple[str, str | None]:
    (found,) = [status for status in statuses(run) if status.copy.id == copy.id]
    return found.state, found.note


def make_export(run: RunDirectory, place: Path, **lineage: object) -> Copy:
    """A directory like those that an export writes, registered like one."""
    copy = register(run, "vllm", str(place), is_local=True)
    (place / "adapter").mkdir(parents=True)
    (place / "adapter" / "weights").write_bytes(b"weights")
    told = {"copy": copy.id, "files": {"adapter/weights": "0" * 64}} | lineage
    (place / LINEAGE_NAME).write_text(json.dumps(told))
    return copy


def delete(run: RunDirectory, subject: str = "person 3") -> None:
    assert S3TRun(run).delete([subject]).nodes_removed > 0


def test_a_copy_is_current_then_stale_then_gone(run: RunDirectory, tmp_path: Path) -> None:
    copy = make_export(run, tmp_path / "out")
    assert state_of(run, copy) == ("current", None) and outstanding(run) == []
    delete(run)
    assert state_of(run, copy) == ("stale", None)
    assert [left.id for left in outstanding(run)] == [copy.id]
    assert copy_actions.delete_export(run, copy.id) == tmp_path / "out"
    assert not (tmp_path / "out").exists() and outstanding(run) == []
    assert state_of(run, copy) == ("gone", copy_actions.DELETED)
    again = register(run, "vllm", str(tmp_path / "again"))
    assert state_of(run, again) == ("gone", copies.NOT_FOUND), "it was registered and never made"
    (tmp_path / "again").mkdir()
    assert state_of(run, again)[0] == "current", "what is served now holds nothing deleted"
    assert all(check.passed for check in S3TRun(run).verify())


def test_what_is_in_a_part_of_what_is_served(run: RunDirectory, tmp_path: Path) -> None:
    """A copy of one shard is not stale when something goes from another."""
    made = {}
    for shard in run.shards:
        lineage = json.loads((run.served / f"shard-{shard}" / LINEAGE_NAME).read_text())
        (tmp_path / str(shard)).mkdir()
        nodes = [node["key"] for node in lineage["nodes"]]
        made[shard] = register(run, "merged", str(tmp_path / str(shard)), nodes=nodes)
    delete(run)
    hit = run.slices.place("person 3").shard
    assert {shard: state_of(run, copy)[0] for shard, copy in made.items()} == {
        hit: "stale",
        1 - hit: "current",
    }


def test_copies_of_copies_hold_what_their_parents_do(run: RunDirectory, tmp_path: Path) -> None:
    parent = make_export(run, tmp_path / "out")
    delete(run)
    (tmp_path / "q4.gguf").touch()
    child = copy_actions.add(run, str(tmp_path / "q4.gguf"), "quantised", parent.id)
    grandchild = copy_actions.add(run, "s3://bucket/q4.gguf", "upload", child.id)
    new = copy_actions.add(run, "backup tape 7", "backup")
    assert child.nodes == grandchild.nodes == parent.nodes != new.nodes
    assert (child.parent, grandchild.parent, new.parent) == (parent.id, child.id, None)
    assert child.served == parent.served != new.served
    stale = [copy.id for copy in outstanding(run)]
    assert stale == [parent.id, child.id, grandchild.id]
    (tmp_path / "q4.gguf").unlink()
    assert [copy.id for copy in outstanding(run)] == [parent.id, grandchild.id]
    copy_actions.declare_gone(run, grandchild.id)
    assert state_of(run, grandchild) == ("gone", copy_actions.DECLARED)
    assert [copy.id for copy in outstanding(run)] == [parent.id]


def test_a_place_holds_one_copy_at_a_time(run: RunDirectory, tmp_path: Path) -> None:
    old = make_export(run, tmp_path / "out")
    delete(run)
    shutil.rmtree(tmp_path / "out")
    new = make_export(run, tmp_path / "out")
    assert state_of(run, old) == ("gone", f"{copies.REPLACED} {new.id}")
    assert state_of(run, new)[0] == "current" and outstanding(run) == []
    hub = [copy_actions.add(run, "somebody/model@main", "hub") for _ in range(2)]
    assert [state_of(run, copy)[0] for copy in hub] == ["current", "current"]


def test_the_ledger_holds_equal_lists_of_nodes_once(run: RunDirectory) -> None:
    made = [register(run, "backup", f"tape {number}") for number in range(3)]
    delete(run)
    made.append(register(run, "backup", "tape 3"))
    events = [event.payload for event in run.ledger.events("copied")]
    assert ["nodes" in payload for payload in events] == [True, False, False, True]
    assert [copy.nodes for copy in known(run)] == [copy.nodes for copy in made]
    assert made[0].nodes == made[2].nodes != made[3].nodes
    held = known(run)
    assert held[0].nodes is held[1].nodes
    assert "person" not in json.dumps(events)


def test_a_path_is_looked_at_only_where_it_was_seen(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is called gone for not being on this machine, or on a disk that is away."""
    elsewhere = copy_actions.add(run, "/srv/models/q4.gguf", "quantised")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "q4.gguf").touch()
    monkeypatch.chdir(tmp_path)
    here = copy_actions.add(run, "disk/q4.gguf", "quantised")
    assert here.place == str(tmp_path / "disk" / "q4.gguf") and here.is_local
    assert not elsewhere.is_local
    shutil.move(tmp_path / "disk", tmp_path / "unmounted")
    delete(run)
    assert {copy.id for copy in outstanding(run)} == {elsewhere.id, here.id}
    (tmp_path / "disk").mkdir()
    assert state_of(run, here) == ("gone", copies.NOT_FOUND)
    assert [copy.id for copy in outstanding(run)] == [elsewhere.id]


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("tape", ""), ("tape", "Two Words"), ("tape", "-x"), ("tape", "k" * 41), ("tape", "[red]"), ("tape", "é"),
        ("", "gguf"), ("  ", "gguf"), ("a\nb", "gguf"), ("a\x1b[31mb", "gguf"), ("x" * 5000, "gguf"),
        ("\ud800", "gguf"),
    ],
)  # fmt: skip
def test_what_is_no_place_or_no_kind_is_refused(run: RunDirectory, place: str, kind: str) -> None:
    with pytest.raises(UserError, match=r"^--(kind|add) "):
        copy_actions.add(run, place, kind)
    assert known(run) == []


def test_unknown_ids_are_refused(run: RunDirectory) -> None:
    for act in (mark_gone, find):
        with pytest.raises(UserError, match=r"no copy 'nobody' is known: `llm-unlearn copies "):
            act(run, "nobody", *(["x"] if act is mark_gone else []))
    for act in (copy_actions.declare_gone, copy_actions.delete_export):
        with pytest.raises(UserError, match=r"no copy '\.\./run' is known"):
            act(run, "../run")
    with pytest.raises(UserError, match="no copy 'nobody' is known"):
        copy_actions.add(run, "tape", "backup", "nobody")


def test_gone_is_noted_once_and_never_of_what_is_there(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "q4.gguf").touch()
    copy = copy_actions.add(run, str(tmp_path / "q4.gguf"), "quantised")
    with pytest.raises(UserError, match="is still there: delete it first"):
        copy_actions.declare_gone(run, copy.id)
    assert run.ledger.events("copy gone") == []
    (tmp_path / "q4.gguf").unlink()
    copy_actions.declare_gone(run, copy.id)
    copy_actions.declare_gone(run, copy.id)
    assert len(run.ledger.events("copy gone")) == 1


def spoil_by_foreign_file(place: Path) -> None:
    (place / "model.gguf").touch()


def spoil_by_another_id(place: Path) -> None:
    (place / LINEAGE_NAME).write_text(json.dumps({"copy": "0" * 16, "files": {}}))


def spoil_by_no_lineage(place: Path) -> None:
    (place / LINEAGE_NAME).unlink()


def spoil_by_garbage(place: Path) -> None:
    (place / LINEAGE_NAME).write_text("[1]")


def spoil_by_strange_files(place: Path) -> None:
    told = json.loads((place / LINEAGE_NAME).read_text())
    (place / LINEAGE_NAME).write_text(json.dumps(told | {"files": 7}))


def spoil_by_link(place: Path) -> None:
    """The place now leads to a directory that somebody else holds dear."""
    place.rename(place.with_name("precious"))
    place.symlink_to(place.with_name("precious"))


def spoil_by_file(place: Path) -> None:
    shutil.rmtree(place)
    place.write_text("mine")


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_by_foreign_file,
        spoil_by_another_id,
        spoil_by_no_lineage,
        spoil_by_garbage,
        spoil_by_strange_files,
        spoil_by_link,
        spoil_by_file,
    ],
)
def test_only_our_own_exports_are_deleted(run: RunDirectory, tmp_path: Path, spoil) -> None:
    copy = make_export(run, tmp_path / "out")
    delete(run)
    spoil(tmp_path / "out")
    before = sorted(path for path in tmp_path.rglob("*") if run.path not in path.parents)
    with pytest.raises(UserError, match="out"):
        copy_actions.delete_export(run, copy.id)
    assert sorted(p for p in tmp_path.rglob("*") if run.path not in p.parents) == before
    assert [left.id for left in outstanding(run)] == [copy.id]


def test_a_current_export_is_not_deleted(run: RunDirectory, tmp_path: Path) -> None:
    copy = make_export(run, tmp_path / "out")
    with pytest.raises(UserError, match="is current, nothing deleted is in it"):
        copy_actions.delete_export(run, copy.id)
    assert (tmp_path / "out" / LINEAGE_NAME).exists()
    away = copy_actions.add(run, "hub/of/somebody", "upload")
    with pytest.raises(UserError, match="is not on this machine: delete it there"):
        copy_actions.delete_export(run, away.id)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match="is not there any more"):
        copy_actions.delete_export(run, copy.id)


def test_a_deletion_that_was_cut_off_is_seen_and_finished(
    run: RunDirectory, tmp_path: Path
) -> None:
    copy = make_export(run, tmp_path / "out")
    delete(run)
    os.rename(tmp_path / "out", copy.half_written)  # as far as it came
    assert state_of(run, copy) == ("stale", "half written: the next export removes it")
    assert [left.id for left in outstanding(run)] == [copy.id]
    copy_actions.delete_export(run, copy.id)
    assert not copy.half_written.exists() and state_of(run, copy)[0] == "gone"


def test_an_export_in_progress_is_left_alone(run: RunDirectory, tmp_path: Path) -> None:
    copy = make_export(run, tmp_path / "out")
    delete(run)
    with copy_actions.exporting(run), pytest.raises(RunError, match="another process is exporting"):
        copy_actions.delete_export(run, copy.id)
    assert (tmp_path / "out" / LINEAGE_NAME).exists()
