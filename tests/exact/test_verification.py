"""Verification is attacked: every planted violation must be named by the check that guards it."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_unlearn import files
from llm_unlearn.data.partition import SliceName
from llm_unlearn.data.records import Record
from llm_unlearn.exact.adapters import WEIGHTS_NAME, file_digest, served_digest, to_bytes
from llm_unlearn.exact.asks import Ask
from llm_unlearn.exact.deletion import make_request
from llm_unlearn.exact.resolving import find_subjects
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.store import WORDS_NAME
from llm_unlearn.exact.verification import Check
from llm_unlearn.exact.words import index_records
from tests.tiny import make_run, make_stub_run, stubbed_training, tiny_records, train_stub

DELETED = "person 3"
NAMES = ["ledger", "records", "nodes", "served", "certificates", "residues"]


@pytest.fixture(scope="module", params=["ranks", "whole"])
def stages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of two shards, `before` and `after` a deletion."""
    root = tmp_path_factory.mktemp("verification")
    with stubbed_training():
        run = make_stub_run(root / "before", tiny_records(), num_shards=2, blocks=request.param)
        train_stub(run)
    shutil.copytree(root / "before", root / "after", symlinks=True)
    S3TRun.open(root / "after").delete([DELETED])
    return root


@pytest.fixture
def run(stages: Path, tmp_path: Path) -> S3TRun:
    shutil.copytree(stages / "after", tmp_path / "run", symlinks=True)
    return S3TRun.open(tmp_path / "run")


def failed(checks: list[Check]) -> dict[str, list[str]]:
    return {check.name: check.problems for check in checks if not check.passed}


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_bytes())
    edit(value)
    path.write_text(json.dumps(value))


def edit_tensors(path: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def first_node(run: S3TRun) -> Path:
    return run.path / "nodes" / run.directory.nodes.keys()[0]


def served(run: S3TRun, shard: int = 0) -> Path:
    return run.directory.served.resolve() / f"shard-{shard}"


def flip_bit(run: S3TRun, _before: Path) -> None:
    path = first_node(run) / WEIGHTS_NAME
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def other_words(run: S3TRun, _before: Path) -> None:
    """The index of a node that has learnt of somebody else."""
    index = index_records(tiny_records()[:1], run.directory.key)
    (first_node(run) / WORDS_NAME).write_bytes(to_bytes(index))


def old_words(run: S3TRun, before: Path) -> None:
    """What is served finds people by an index of before the deletion."""
    served = next(run.directory.served.glob("shard-*/words-0.safetensors"))
    data = served.read_bytes()
    served.unlink()
    served.write_bytes(data[:-4] + bytes([1, 2, 3, 0]))


def edit_manifest(**changes: Any) -> Callable[[S3TRun, Path], None]:
    return lambda run, _before: edit_json(
        first_node(run) / "manifest.json", lambda m: m.update(changes)
    )


def damage_manifest(run: S3TRun, _before: Path) -> None:
    (first_node(run) / "manifest.json").write_bytes(b'{"key": ')


def remove_weights(run: S3TRun, _before: Path) -> None:
    (first_node(run) / WEIGHTS_NAME).unlink()


def retrain_by_hand(run: S3TRun, _before: Path) -> None:
    """Other weights with a manifest that agrees: only the ledger knows better."""
    node = first_node(run)
    edit_tensors(node / WEIGHTS_NAME, lambda t: next(iter(t.values())).__iadd__(1))
    edit_json(node / "manifest.json", lambda m: m.update(weights=file_digest(node / WEIGHTS_NAME)))


def dropped(run: S3TRun, before: Path) -> list[str]:
    keys = {path.name for path in (before / "nodes").iterdir()} - set(run.directory.nodes.keys())
    assert keys
    return sorted(keys)


def put_node_back(run: S3TRun, before: Path) -> None:
    key = dropped(run, before)[0]
    shutil.copytree(before / "nodes" / key, run.path / "nodes" / key)


def copy_node(run: S3TRun, _before: Path) -> None:
    shutil.copytree(first_node(run), run.path / "nodes" / ("0" * 64))


def copy_node_and_forge(run: S3TRun, _before: Path) -> None:
    """The weights of one node under the key and manifest of another one."""
    one, other = [run.path / "nodes" / key for key in run.directory.nodes.keys()[:2]]
    shutil.copy(one / WEIGHTS_NAME, other / WEIGHTS_NAME)
    edit_json(other / "manifest.json", lambda m: m.update(weights=file_digest(one / WEIGHTS_NAME)))


def change_served_tensor(run: S3TRun, _before: Path) -> None:
    edit_tensors(served(run) / WEIGHTS_NAME, lambda t: next(iter(t.values())).__imul__(2))
    _forge_served_digest(run)


def _forge_served_digest(run: S3TRun, shard: int = 0) -> None:
    folder = served(run, shard)
    config = json.loads((folder / "adapter_config.json").read_bytes())
    made = served_digest((folder / WEIGHTS_NAME).read_bytes(), config)
    edit_json(folder / "lineage.json", lambda entry: entry.update(digest=made))


def change_served_zero(run: S3TRun, _before: Path) -> None:
    """Zero to minus zero: equal numbers, other bits."""

    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensor = next(iter(tensors.values()))
        tensor[0, 0] = -0.0 if tensor[0, 0] == 0 else -tensor[0, 0]

    edit_tensors(served(run) / WEIGHTS_NAME, edit)


def add_served_tensor(run: S3TRun, _before: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["base_model.model.lm_head.weight"] = np.zeros((2, 2), np.float32)

    edit_tensors(served(run) / WEIGHTS_NAME, add)


def drop_served_tensor(run: S3TRun, _before: Path) -> None:
    edit_tensors(served(run) / WEIGHTS_NAME, lambda t: t.pop(next(iter(t))))


def widen_served_tensor(run: S3TRun, _before: Path) -> None:
    """One more rank, appended after the bands of the nodes."""

    def widen(tensors: dict[str, np.ndarray]) -> None:
        for name, tensor in tensors.items():
            axis = 0 if name.endswith("lora_A.weight") else 1
            extra = np.ones_like(tensor.take([0], axis=axis))
            tensors[name] = np.ascontiguousarray(np.concatenate([tensor, extra], axis=axis))

    edit_tensors(served(run) / WEIGHTS_NAME, widen)


def serve_old_ranks_under_the_new_lineage(run: S3TRun, before: Path) -> None:
    """The adapter from before, its first bands those of the new one; digest and config agree."""
    new = json.loads((served(run, 1) / "lineage.json").read_bytes())
    old = next((before / "generations").iterdir()) / "shard-1"
    assert [n["key"] for n in new["nodes"]] == [
        n["key"] for n in json.loads((old / "lineage.json").read_bytes())["nodes"]
    ][: len(new["nodes"])]
    for name in (WEIGHTS_NAME, "adapter_config.json"):
        shutil.copy(old / name, served(run, 1) / name)
    _forge_served_digest(run, 1)


def damage_served_tensors(run: S3TRun, _before: Path) -> None:
    (served(run) / WEIGHTS_NAME).write_bytes(b"\x08" + b"\0" * 7 + b"notatall")


def edit_served_config(run: S3TRun, _before: Path) -> None:
    edit_json(
        served(run) / "adapter_config.json", lambda c: c.update(lora_alpha=c["lora_alpha"] * 2)
    )
    _forge_served_digest(run)


def edit_served_base(run: S3TRun, _before: Path) -> None:
    edit_json(
        served(run) / "adapter_config.json", lambda c: c.update(base_model_name_or_path="other")
    )


def name_dropped_node(run: S3TRun, before: Path) -> None:
    key = dropped(run, before)[0]
    edit_json(served(run) / "lineage.json", lambda entry: entry["nodes"][0].update(key=key))


def name_fewer_nodes(run: S3TRun, _before: Path) -> None:
    edit_json(served(run) / "lineage.json", lambda entry: entry["nodes"].pop())


def name_no_node(run: S3TRun, _before: Path) -> None:
    edit_json(served(run) / "lineage.json", lambda entry: entry.update(nodes=[]))


def name_nodes_in_another_order(run: S3TRun, _before: Path) -> None:
    edit_json(served(run) / "lineage.json", lambda entry: entry["nodes"].reverse())


def remove_lineage(run: S3TRun, _before: Path) -> None:
    (served(run) / "lineage.json").unlink()


def swap_shards(run: S3TRun, _before: Path) -> None:
    aside = served(run).with_name("aside")
    served(run, 0).rename(aside)
    served(run, 1).rename(served(run, 0))
    aside.rename(served(run, 1))


def serve_the_other_shard(run: S3TRun, _before: Path) -> None:
    shutil.copy(served(run, 1) / WEIGHTS_NAME, served(run, 0) / WEIGHTS_NAME)


def serve_what_was_before(run: S3TRun, before: Path) -> None:
    shutil.rmtree(run.path / "generations")
    shutil.copytree(before / "generations", run.path / "generations")
    files.publish_link(next((run.path / "generations").iterdir()), run.path / "served")


def any_slice(run: S3TRun) -> tuple[SliceName, Path, list[bytes]]:
    store = run.directory.slices
    name = next(name for name in store.names if store.header(name).records > 1)
    return name, store.path(name), store.path(name).read_bytes().splitlines()


def edit_record(run: S3TRun, _before: Path) -> None:
    _, path, lines = any_slice(run)
    path.write_bytes(path.read_bytes().replace(b"dish", b"fish", 1))
    assert path.read_bytes().splitlines() != lines


def add_record(run: S3TRun, _before: Path) -> None:
    _, path, lines = any_slice(run)
    path.write_bytes(
        b"\n".join([*lines, replace(Record.from_line(lines[1]), id="x").to_line(), b""])
    )


def drop_record(run: S3TRun, _before: Path) -> None:
    _, path, lines = any_slice(run)
    path.write_bytes(b"\n".join([*lines[:-1], b""]))


def repeat_record(run: S3TRun, _before: Path) -> None:
    _, path, lines = any_slice(run)
    path.write_bytes(b"\n".join([*lines, lines[-1], b""]))


def damage_record(run: S3TRun, _before: Path) -> None:
    _, path, lines = any_slice(run)
    path.write_bytes(b"\n".join([*lines[:-1], lines[-1][:20], b""]))


def edit_header(name: str, value: object) -> Callable[[S3TRun, Path], None]:
    def edit(run: S3TRun, _before: Path) -> None:
        _, path, lines = any_slice(run)
        header = json.dumps({**json.loads(lines[0]), name: value}).encode()
        path.write_bytes(b"\n".join([header, *lines[1:], b""]))

    return edit


def put_record_back(run: S3TRun, before: Path) -> None:
    """The slice of the deleted subject as it was, header and digests of texts included."""
    store = run.directory.slices
    relative = store.path(store.place(DELETED)).relative_to(run.path)
    shutil.rmtree(run.path / relative.parent)
    shutil.copytree(before / relative.parent, run.path / relative.parent)


def move_record(run: S3TRun, _before: Path) -> None:
    """From one slice to another one of the same shard, both consistent in themselves."""
    store = run.directory.slices
    name, _, _ = any_slice(run)
    other = next(n for n in store.names if n.shard == name.shard and n != name)
    moved, *left = store._entries(name)
    held = store._entries(other)
    store._write(name, left)
    store._write(other, [*held, moved])


def remove_slice(run: S3TRun, _before: Path) -> None:
    any_slice(run)[1].unlink()


def unknown_file(run: S3TRun, _before: Path) -> None:
    (run.path / "notes.txt").write_text("about person 3")


def temporary_file(run: S3TRun, _before: Path) -> None:
    (first_node(run).parent / ".tmp-0123").mkdir()


def open_key(run: S3TRun, _before: Path) -> None:
    (run.path / "secret.key").chmod(0o644)


def leave_pending(run: S3TRun, _before: Path) -> None:
    ask = Ask(("person 4",))
    targets = find_subjects(run.directory, [ask]).targets["person 4"]
    run.directory.ledger.acknowledge(make_request(run.directory, ask, targets, (), None))


def truncate_ledger(run: S3TRun, _before: Path) -> None:
    with run.directory.ledger.database.engine.begin() as connection:
        connection.exec_driver_sql(
            "DELETE FROM events WHERE sequence = (SELECT max(sequence) FROM events)"
        )


def forget_training(run: S3TRun, _before: Path) -> None:
    """No word of the node in the ledger: it came from elsewhere."""
    key = first_node(run).name
    with run.directory.ledger.database.engine.begin() as connection:
        connection.exec_driver_sql(f"DELETE FROM events WHERE payload LIKE '%{key}%'")


def stray_record_file(run: S3TRun, _before: Path) -> None:
    (run.path / "records" / "shard-0" / "old.jsonl").write_text("{}")


def stray_node_file(run: S3TRun, _before: Path) -> None:
    (first_node(run) / "optimizer.pt").touch()


def only_certificate(run: S3TRun) -> Path:
    return next((run.path / "certificates").iterdir())


def edit_certificate(run: S3TRun, _before: Path) -> None:
    edit_json(only_certificate(run), lambda c: c.update(records_removed=0))


def remove_certificate(run: S3TRun, _before: Path) -> None:
    only_certificate(run).unlink()


WRONG_WEIGHTS = "weights or words are not those of its manifest"
NO_KEY = "its key does not follow from its manifest"
NOT_HEADER = "they are not the ones their header names"

PLANTED: dict[str, tuple[Callable[[S3TRun, Path], None], str, str]] = {
    "a flipped bit in a node": (flip_bit, "nodes", WRONG_WEIGHTS),
    "a node without weights": (remove_weights, "nodes", WRONG_WEIGHTS),
    "a node with other words": (other_words, "nodes", WRONG_WEIGHTS),
    "other words served": (old_words, "served", "its words are not those of node"),
    "a manifest with other roots": (edit_manifest(roots=["0" * 64]), "nodes", NO_KEY),
    "a manifest with another parent": (edit_manifest(parent="0" * 64), "nodes", NO_KEY),
    "a manifest of another shard": (edit_manifest(shard=7), "nodes", NO_KEY),
    "a manifest with another path": (edit_manifest(path=[9]), "nodes", NO_KEY),
    "a manifest with other weights": (edit_manifest(weights="0" * 64), "nodes", WRONG_WEIGHTS),
    "a manifest with another environment": (
        edit_manifest(environment={}), "nodes", "manifest is not the one that the ledger logged",
    ),
    "a damaged manifest": (damage_manifest, "nodes", "manifest is damaged"),
    "a node retrained by hand": (retrain_by_hand, "nodes", "those that the ledger logged"),
    "a node of the deleted slice put back": (put_node_back, "nodes", "depends on data that the run"),
    "a node that nobody trained": (copy_node, "nodes", "depends on data that the run"),
    "a node's weights under another key": (copy_node_and_forge, "nodes", "that the ledger logged"),
    "a node that the ledger does not know": (forget_training, "nodes", "that the ledger logged"),
    "a served tensor changed": (change_served_tensor, "served", "a tensor differs from node"),
    "a served sign changed": (change_served_zero, "served", "a tensor differs from node"),
    "a served tensor added": (add_served_tensor, "served", "tensors that belong to no node"),
    "a served tensor dropped": (drop_served_tensor, "served", "or lacks some"),
    "a served rank added": (widen_served_tensor, "served", "ranks that belong to no node"),
    "deleted ranks under the new lineage": (
        serve_old_ranks_under_the_new_lineage, "served",
        "ranks that belong to no node|a tensor differs from node",
    ),
    "served tensors damaged": (damage_served_tensors, "served", "damaged or missing"),
    "the served alpha doubled": (edit_served_config, "served", "adapter_config.json is not the one"),
    "another base model named": (edit_served_base, "served", "adapter_config.json is not the one"),
    "a dropped node in the lineage": (name_dropped_node, "served", "depends on deleted or unknown"),
    "a shorter lineage": (
        name_fewer_nodes, "served", "ranks that belong to no node|a tensor differs from node",
    ),
    "an empty lineage": (name_no_node, "served", "belong to no node"),
    "a lineage in another order": (name_nodes_in_another_order, "served", "not the beginning"),
    "no lineage": (remove_lineage, "served", "lineage.json is missing"),
    "two shards swapped": (swap_shards, "served", "depends on deleted or unknown"),
    "the weights of another shard": (serve_the_other_shard, "served", "a tensor differs|ranks that"),
    "the adapter from before the deletion": (serve_what_was_before, "served", "depends on deleted"),
    "a record edited": (edit_record, "records", NOT_HEADER),
    "a record added": (add_record, "records", NOT_HEADER),
    "a record dropped": (drop_record, "records", NOT_HEADER),
    "a record repeated": (repeat_record, "records", NOT_HEADER),
    "a record damaged": (damage_record, "records", "cannot be checked"),
    "a header with another root": (edit_header("root", "0" * 64), "records", NOT_HEADER),
    "a header with another count": (edit_header("records", 99), "records", NOT_HEADER),
    "the deleted subject put back": (put_record_back, "records", "a deleted subject is still there"),
    "a record in another slice": (move_record, "records", "a subject is in the wrong slice"),
    "a slice missing": (remove_slice, "records", "cannot be checked"),
    "an unknown file": (unknown_file, "residues", "notes.txt is of no known kind"),
    "a stray file among the records": (stray_record_file, "residues", "old.jsonl is of no known"),
    "a stray file in a node": (stray_node_file, "residues", "optimizer.pt is of no known kind"),
    "a certificate edited": (edit_certificate, "certificates", "not the one that the ledger logged"),
    "a certificate removed": (remove_certificate, "certificates", "is missing"),
    "a temporary file": (temporary_file, "residues", r"\.tmp-0123 was left by a crash"),
    "a key that others can read": (open_key, "residues", r"secret.key is readable .*644"),
    "a pending request": (leave_pending, "ledger", "was acknowledged but not carried out"),
    "a ledger cut short": (truncate_ledger, "ledger", "truncated"),
}  # fmt: skip


def test_a_clean_run_passes_every_check(stages: Path) -> None:
    for stage in ("before", "after"):
        checks = S3TRun.open(stages / stage).verify()
        assert [check.name for check in checks] == NAMES
        assert failed(checks) == {}
        assert all(check.skipped is None for check in checks)
        idle = {check.name for check in checks if not check.examined}
        assert idle == ({"certificates"} if stage == "before" else set())


def test_a_run_that_was_never_trained_passes(tmp_path: Path) -> None:
    checks = make_stub_run(tmp_path / "run", tiny_records()).verify()
    assert failed(checks) == {}
    assert [check.name for check in checks if check.skipped] == ["served"]


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_violation_is_caught(run: S3TRun, stages: Path, case: str) -> None:
    plant, check, message = PLANTED[case]
    plant(run, stages / "before")
    found = failed(S3TRun.open(run.path).verify())
    assert check in found, found
    assert any(re.search(message, problem) for problem in found[check]), found


def test_violations_are_all_reported_at_once(run: S3TRun, stages: Path) -> None:
    for case in (
        "a flipped bit in a node",
        "the served alpha doubled",
        "a record edited",
        "an unknown file",
    ):
        PLANTED[case][0](run, stages / "before")
    assert set(failed(run.verify())) == {"nodes", "served", "records", "residues"}


def test_verification_changes_nothing(run: S3TRun) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    run.verify()
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def real(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A really trained run of two slices and two sequences."""
    path = tmp_path_factory.mktemp("replay") / "run"
    make_run(path, tiny_base, num_slices=2, num_sequences=2)
    return path


def unserved_node(run: S3TRun) -> Path:
    lineage = json.loads((served(run) / "lineage.json").read_bytes())
    kept = {entry["key"] for entry in lineage["nodes"]}
    return run.path / "nodes" / next(key for key in run.directory.nodes.keys() if key not in kept)


def test_replay_trains_every_node_to_the_same_bits(real: Path) -> None:
    checks = S3TRun.open(real).verify(replay=9)
    assert failed(checks) == {}
    assert [(c.name, c.examined, c.skipped) for c in checks][-1] == ("replay", 4, None)
    assert not (real / "cache").exists() and not (real / "trainer").exists()


def test_replay_sees_through_a_consistent_forgery(real: Path, tmp_path: Path) -> None:
    """Weights, manifest and ledger agree with each other: only training again tells."""
    shutil.copytree(real, tmp_path / "run", symlinks=True)
    run = S3TRun.open(tmp_path / "run")
    node = unserved_node(run)
    edit_tensors(node / WEIGHTS_NAME, lambda t: next(iter(t.values())).__iadd__(1e-6))
    weights = file_digest(node / WEIGHTS_NAME)
    edit_json(node / "manifest.json", lambda m: m.update(weights=weights))
    digests = {"weights": weights, "manifest": file_digest(node / "manifest.json")}
    run.directory.ledger.append("trained", {"node": node.name, **digests, "seconds": 0.0})
    assert failed(run.verify()) == {}
    found = failed(run.verify(replay=9))
    assert list(found) == ["replay"]
    assert found["replay"] == [f"node {node.name[:12]}: training it again gives other bits"]


def test_replay_does_not_compare_bits_of_another_environment(real: Path, tmp_path: Path) -> None:
    shutil.copytree(real, tmp_path / "run", symlinks=True)
    run = S3TRun.open(tmp_path / "run")
    manifest = unserved_node(run) / "manifest.json"
    edit_json(manifest, lambda m: m["environment"]["hardware"].update(instructions="Z80"))
    replay = run.verify(replay=9)[-1]
    assert replay.passed and replay.examined == 3
    assert replay.skipped is not None and replay.skipped.startswith(
        "1 nodes were trained in another environ"
    )
