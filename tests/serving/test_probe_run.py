"""`probe RUN`: whatever is planted is found where it is, and what cannot be seen never counts as clean."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_unlearn.exact.adapters import WEIGHTS_NAME, file_digest
from llm_unlearn.exact.copies import mark_gone, register
from llm_unlearn.exact.copy_actions import delete_export
from llm_unlearn.exact.ledger import Ledger
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.served import read_lineage
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.export.making import export
from llm_unlearn.serving.probe import probe
from llm_unlearn.serving.probe.clean import Clean
from llm_unlearn.serving.probe.looks import Look, Probe
from llm_unlearn.serving.probe.probe import probe_run
from llm_unlearn.serving.probe.processes import look_at_open_files
from tests.exact.killing import in_child, kill_at
from tests.saying import Say, in_json, one_line
from tests.tiny import (
    core_records,
    make_stub_run,
    make_trained_stub,
    stubbed_training,
    tiny_records,
    train_stub,
)

OPTIONS = {"num_shards": 2, "num_slices": 2, "num_sequences": 2}

pytestmark = pytest.mark.usefixtures("without_fsync")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained_stub(tmp_path_factory.mktemp("probe") / "run", **OPTIONS)


@pytest.fixture
def before(trained: Path, tmp_path: Path) -> Path:
    """The run as it was, where no probe looks."""
    shutil.copytree(trained, tmp_path / "elsewhere" / "before", symlinks=True)
    return tmp_path / "elsewhere" / "before"


@pytest.fixture
def run(before: Path, tmp_path: Path) -> S3TRun:
    """After a deletion that left no trace."""
    (tmp_path / "here").mkdir()
    shutil.copytree(before, tmp_path / "here" / "run", symlinks=True)
    run = S3TRun.open(tmp_path / "here" / "run")
    run.delete(["person 3"])
    return run


def found(seen: Probe) -> dict[str, list[str]]:
    return {look.place: look.problems for look in seen.looks if look.problems}


def look_of(seen: Probe, place: str) -> Look:
    return next(look for look in seen.looks if look.place == place)


def deleted_nodes(run: S3TRun) -> list[str]:
    return list(run.directory.ledger.requests()[0].nodes)


def shard_of(run: S3TRun) -> int:
    return run.directory.slices.place("person 3").shard


def test_a_clean_run(run: S3TRun) -> None:
    seen = probe_run(run.path)
    assert seen.is_clean and found(seen) == {}
    examined = {look.place: look.examined for look in seen.looks}
    assert examined["records"] == 4 and examined["served"] == 2
    assert examined["nodes"] == len(run.directory.nodes.keys()) > 0
    assert examined["open files"] >= 1 and examined["hard links"] > 10
    assert [a.place for a in seen.adapters] == ["served/shard-0", "served/shard-1"]
    for adapter in seen.adapters:
        lineage = read_lineage(run.path / adapter.place)
        assert lineage is not None and adapter.digest == lineage["digest"]
        assert adapter.tensors == file_digest(run.path / adapter.place / WEIGHTS_NAME)
    assert seen.epoch == run.directory.ledger.count()


def test_a_run_without_deletions_and_one_with_a_core(tmp_path: Path) -> None:
    with stubbed_training():
        train_stub(
            run := make_stub_run(tmp_path / "run", tiny_records(4), core_records(), **OPTIONS)
        )
    assert probe_run(run.path).is_clean
    run.delete(["person 3"])
    assert found(probe_run(run.path)) == {}


def test_a_stale_generation(run: S3TRun, before: Path) -> None:
    old = (before / "served").resolve()
    shutil.copytree(old, run.path / "generations" / "0123456789abcdef")
    seen = probe_run(run.path)
    (problem,) = found(seen)["earlier generations"]
    request = run.directory.ledger.requests()[0].id
    assert f"generations/0123456789abcdef/shard-{shard_of(run)} is made of node" in problem
    assert problem.endswith(f"deleted by request {request}")
    planted = [a for a in seen.adapters if a.place.startswith("generations/")]
    assert len(planted) == 2 and sum(a.problem is not None for a in planted) == 1


def test_an_orphan_node(run: S3TRun, before: Path) -> None:
    key = deleted_nodes(run)[0]
    shutil.copytree(before / "nodes" / key, run.path / "nodes" / key)
    (problem,) = found(probe_run(run.path))["nodes"]
    assert f"nodes/{key[:12]} is made of node {key[:12]}, deleted by request" in problem


def test_deleted_weights_under_another_name(run: S3TRun, before: Path) -> None:
    """Content counts: the weights of a deleted node in a living one, a cache, a log, or anywhere."""
    old = before / "nodes" / deleted_nodes(run)[0] / WEIGHTS_NAME
    alive = run.directory.nodes.keys()[0]
    shutil.copyfile(old, run.path / "nodes" / alive / WEIGHTS_NAME)
    for name in ("cache/states.safetensors", "serving/audit-1.jsonl", "notes.bin"):
        (run.path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(old, run.path / name)
    problems = found(probe_run(run.path))
    assert set(problems) == {
        "nodes",
        "caches and trainer folders",
        "files of servers",
        "files of no known kind",
    }
    assert f"nodes/{alive[:12]} holds other weights" in problems["nodes"][0]
    assert "notes.bin is made of node" in problems["files of no known kind"][0]


def test_served_adapters_that_are_not_what_they_say(run: S3TRun, before: Path) -> None:
    shard = f"shard-{shard_of(run)}"
    path = (run.path / "served").resolve() / shard / WEIGHTS_NAME
    path.unlink()
    shutil.copyfile(before / "served" / shard / WEIGHTS_NAME, path)
    assert "is not what its lineage says" in found(probe_run(run.path))["served"][0]
    (path.parent / "lineage.json").write_text("{}")
    assert "does not say what it is made of" in found(probe_run(run.path))["served"][0]
    path.write_bytes(b"\xff" * 9)
    assert "cannot be read" in found(probe_run(run.path))["served"][0]


def test_exports(run: S3TRun, before: Path, tmp_path: Path) -> None:
    shutil.rmtree(run.path)
    shutil.copytree(before, run.path, symlinks=True)
    run = S3TRun.open(run.path)
    made = export(run.directory, "vllm", tmp_path / "old")
    assert probe_run(run.path).is_clean
    run.delete(["person 3"])
    problems = found(probe_run(run.path))
    assert (
        list(problems) == ["exports and copies"]
        and f"copy {made.id} (vllm) at" in problems["exports and copies"][0]
    )
    mark_gone(run.directory, made.id, "declared by the operator")
    assert "is noted as gone and still there" in found(probe_run(run.path))["exports and copies"][0]
    shutil.rmtree(tmp_path / "old")
    assert probe_run(run.path).is_clean


def test_an_export_that_was_changed(run: S3TRun, before: Path, tmp_path: Path) -> None:
    made = export(run.directory, "vllm", tmp_path / "new")
    name = next(n for n in made.adapters if n.startswith(f"shard-{shard_of(run)}@"))
    old = before / "served" / name.split("@")[0] / WEIGHTS_NAME
    shutil.copyfile(old, made.place / name / WEIGHTS_NAME)
    seen = probe_run(run.path)
    assert "is not what its lineage says" in found(seen)["exports and copies"][0]
    assert str(made.place / name) in [adapter.place for adapter in seen.adapters]


def test_copies_elsewhere_are_not_seen(run: S3TRun) -> None:
    register(run.directory, "quantised", "a shelf in the cellar", is_local=False)
    look = look_of(probe_run(run.path), "exports and copies")
    assert (
        look.verdict == "not seen"
        and "a shelf in the cellar is not on this machine" in look.unseen[0]
    )


def test_a_backup_beside_the_run(run: S3TRun, before: Path) -> None:
    backup = run.path.with_name("backup")
    shutil.copytree(before, backup, symlinks=True)
    (problem,) = found(probe_run(run.path))["directories beside the run"]
    assert str(backup) in problem and f"holds {len(deleted_nodes(run))} deleted nodes" in problem
    for key in deleted_nodes(run):
        shutil.rmtree(backup / "nodes" / key)
    look = look_of(probe_run(run.path), "directories beside the run")
    assert look.verdict == "not seen" and "were not looked at" in look.unseen[0]
    (run.path.parent / "broken").mkdir()
    (run.path.parent / "broken" / "run.json").write_text("[")
    assert probe_run(run.path).is_clean


def test_records_that_came_back(run: S3TRun, before: Path) -> None:
    place = run.directory.slices.place("person 3")
    name = f"records/shard-{place.shard}/slice-{place.slice}.jsonl"
    shutil.copyfile(before / name, run.path / name)
    problems = found(probe_run(run.path))
    assert (
        f"shard {place.shard}, slice {place.slice} holds 2 deleted records"
        in problems["records"][0]
    )


def test_leftovers_of_a_deletion(run: S3TRun, before: Path) -> None:
    place = run.directory.slices.place("person 3")
    folder = f"records/shard-{place.shard}"
    (old,) = (before / folder).glob(f"slice-{place.slice}.*.texts")
    shutil.copyfile(old, run.path / folder / old.name)
    (run.path / "records" / "pending").mkdir(exist_ok=True)
    (run.path / "records" / "pending" / f"{'a' * 16}.jsonl").write_text("{}")
    (run.path / "nodes" / ".tmp-0123").mkdir()
    problems = found(probe_run(run.path))
    assert len(problems["records"]) == 2 and "half written" in problems["temporary files"][0]


def test_caches_are_judged_by_their_age(run: S3TRun) -> None:
    for name in ("cache", "trainer"):
        (run.path / name).mkdir()
        (run.path / name / "new").write_text("made after the deletion")
    look = look_of(probe_run(run.path), "caches and trainer folders")
    assert (look.verdict, look.examined) == ("clean", 2)
    finished = run.directory.ledger.requests()[0].finished_at
    assert finished is not None
    os.utime(run.path / "cache" / "new", (finished - 5, finished - 5))
    (problem,) = found(probe_run(run.path))["caches and trainer folders"]
    assert problem == "cache/new is older than the last deletion"


def test_a_live_server_that_names_what_is_not_served(run: S3TRun) -> None:
    folder = run.path / "serving" / "replicas"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text(json.dumps({"loaded": ["shard-0@0123456789ab"]}))
    (problem,) = found(probe_run(run.path))["files of servers"]
    assert "serving/replicas/a.json: a live server names shard-0@0123456789ab" in problem
    os.utime(folder / "a.json", (1, 1))
    assert probe_run(run.path).is_clean


def test_unknown_files_are_not_seen(run: S3TRun) -> None:
    (run.path / "core.12345").write_bytes(b"\x00" * 100)
    look = look_of(probe_run(run.path), "files of no known kind")
    assert look.verdict == "not seen" and "core.12345 is of no known kind" in look.unseen[0]


def test_names_outside_of_the_run(run: S3TRun, tmp_path: Path) -> None:
    key = run.directory.nodes.keys()[0]
    os.link(run.path / "nodes" / key / WEIGHTS_NAME, tmp_path / "linked")
    look = look_of(probe_run(run.path), "hard links")
    assert look.verdict == "not seen" and "1 files have names outside" in look.unseen[0]


def test_a_deletion_that_is_acknowledged_and_no_more(before: Path, tmp_path: Path) -> None:
    """Everything that it takes is residue from that moment on."""
    code = in_child(
        lambda: (kill_at(2, ((Ledger, "acknowledge"),)), S3TRun.open(before).delete(["person 3"]))
    )
    assert code is None
    problems = found(probe_run(before))
    assert {"records", "nodes", "served"} <= set(problems)
    assert all("deleted by request" in line for line in problems["nodes"])
    S3TRun.open(before).settle()
    assert probe_run(before).is_clean


OPENED = "import sys; held = open(sys.argv[1], 'rb'); print('held', flush=True); sys.stdin.read()"
MAPPED = """
import ctypes, os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
library = ctypes.CDLL(None)
library.mmap.restype = ctypes.c_void_p
library.mmap(None, ctypes.c_size_t(os.fstat(file).st_size), 1, 2, file, ctypes.c_long(0))
os.close(file)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["open", "mapped"])
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_a_deleted_file_that_a_process_holds(before: Path, tmp_path: Path, how: str) -> None:
    run = S3TRun.open(before)
    held = before / "nodes" / next(iter(_to_be_deleted(run))) / WEIGHTS_NAME
    script = OPENED if how == "open" else MAPPED
    command = [sys.executable, "-c", script, str(held)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert probe_run(before).is_clean
        run.delete(["person 3"])
        assert not held.exists()
        (problem,) = found(probe_run(before))["open files"]
        assert f"process {holder.pid} (python" in problem and "which is deleted" in problem
        if how == "open":
            assert "deleted by request" in problem
    assert probe_run(before).is_clean


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_a_deleted_export_that_a_server_holds(before: Path, tmp_path: Path) -> None:
    run = S3TRun.open(before)
    made = export(run.directory, "vllm", tmp_path / "out")
    name = next(n for n in made.adapters if n.startswith(f"shard-{shard_of(run)}@"))
    with (made.place / name / WEIGHTS_NAME).open("rb"):
        run.delete(["person 3"])
        delete_export(run.directory, made.id)
        (problem,) = found(probe_run(before))["open files"]
        assert WEIGHTS_NAME in problem and "cannot be told" in problem
    assert probe_run(before).is_clean


def _to_be_deleted(run: S3TRun) -> set[str]:
    place = run.directory.slices.place("person 3")
    return {
        key
        for key, node in run.directory.wanted().items()
        if node.shard == place.shard
        and place.slice in node.path
        and run.directory.nodes.exists(key)
    }


def test_a_deleted_file_of_what_is_still_served_is_nothing(run: S3TRun) -> None:
    """A generation goes when another comes, with adapters that did not change."""
    other = f"shard-{1 - shard_of(run)}"
    (run.path / "cache").mkdir()
    path = run.path / "cache" / "copy"
    shutil.copyfile(run.path / "served" / other / WEIGHTS_NAME, path)
    with path.open("rb"):
        path.unlink()
        assert found(probe_run(run.path)) == {}


def test_processes_that_cannot_be_looked_at(run: S3TRun, tmp_path: Path) -> None:
    clean = Clean.of(run.directory)
    look = look_at_open_files(run.directory, clean, tmp_path / "no proc")
    assert look.verdict == "not seen" and look.examined == 0
    for pid in ("self", "12"):
        (tmp_path / "proc" / pid / "fd").mkdir(parents=True)
    (tmp_path / "proc" / "12" / "fd").rmdir()
    (tmp_path / "proc" / "13" / "fd").mkdir(parents=True)
    (tmp_path / "proc" / "13" / "maps").write_text("")
    look = look_at_open_files(run.directory, clean, tmp_path / "proc")
    assert (look.examined, look.verdict) == (1, "clean")


def test_processes_of_others(run: S3TRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pid in ("self", "13"):
        (tmp_path / "proc" / pid / "fd").mkdir(parents=True)
    listed = Path.iterdir

    def refuse(path: Path):
        if path == tmp_path / "proc" / "13" / "fd":
            raise PermissionError
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    look = look_at_open_files(run.directory, Clean.of(run.directory), tmp_path / "proc")
    assert (
        look.unseen == ["1 processes of other users: ask again as root"]
        and look.verdict == "not seen"
    )


def test_damage_is_told_and_does_not_hide_the_rest(run: S3TRun, before: Path) -> None:
    key = deleted_nodes(run)[0]
    shutil.copytree(before / "nodes" / key, run.path / "nodes" / key)
    alive = next(k for k in run.directory.nodes.keys() if k != key)
    (run.path / "nodes" / alive / WEIGHTS_NAME).unlink()
    seen = probe_run(run.path)
    look = look_of(seen, "nodes")
    assert f"nodes/{alive[:12]} cannot be read" in look.unseen[0] and len(look.problems) == 1


def test_a_run_that_changes_meanwhile_is_looked_at_again(
    before: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between an acknowledgement and its execution there is residue, which is about to go."""
    run = S3TRun.open(before)
    in_child(
        lambda: (kill_at(2, ((Ledger, "acknowledge"),)), S3TRun.open(before).delete(["person 3"]))
    )
    calls = 0

    def look(directory: RunDirectory, clean: Clean) -> Look:
        nonlocal calls
        calls += 1
        if calls == 1:
            run.settle()
        return look_at_open_files(directory, clean)

    monkeypatch.setattr(probe, "look_at_open_files", look)
    assert probe_run(before).is_clean and calls == 2


def test_the_command(say: Say, run: S3TRun, before: Path) -> None:
    code, text, _ = say("probe", run.path)
    assert code == 0 and "Nothing deleted was found." in text
    assert "live adapters: 2 clean (--all lists them by digest)" in text and "shard-" not in text
    code, text, _ = say("probe", run.path, "--all")
    assert code == 0 and text.count(" shard-") == 2 and "(--all" not in text
    for place in ("records", "nodes", "served", "earlier generations", "open files", "hard links"):
        assert f" {place} " in text
    told = in_json(say("probe", run.path, "--json"))
    assert told["clean"] and len(told["served"]) == 2 and told["retired"]
    shutil.copytree((before / "served").resolve(), run.path / "generations" / "0123456789abcdef")
    code, text, _ = say("probe", run.path)
    assert code == 1 and "RESIDUE: earlier generations: generations/0123456789abcdef/shard-" in text
    assert not in_json(say("probe", run.path, "--json"), 1)["clean"]
    assert "is not a run" in one_line(say("probe", run.path / "x"), 2)
    for words in (["--run", run.path], ["--prompts", run.path]):
        assert "error" in one_line(say("probe", run.path, *words), 2)


def test_nothing_personal_is_told(run: S3TRun, before: Path, say: Say) -> None:
    place = run.directory.slices.place("person 3")
    name = f"records/shard-{place.shard}/slice-{place.slice}.jsonl"
    shutil.copyfile(before / name, run.path / name)
    code, text, error = say("probe", run.path, "--json")
    assert code == 1 and "person 3" not in text + error and "dish" not in text + error


def test_an_encrypted_run(tmp_path: Path) -> None:
    with stubbed_training():
        train_stub(run := make_stub_run(tmp_path / "run", tiny_records(4), encrypt=True, **OPTIONS))
    run.delete(["person 3"])
    assert found(probe_run(run.path)) == {}
