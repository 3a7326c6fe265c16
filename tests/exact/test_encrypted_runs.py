"""An encrypted run: the same bits, nothing in clear, and nothing opens what was deleted."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load

from llm_unlearn import files
from llm_unlearn.console import exit_code_of
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact import replay, residues, store
from llm_unlearn.exact.adapters import WEIGHTS_NAME
from llm_unlearn.exact.encryption import ENCRYPTED, KEY_FILE_NAME, SETTINGS_NAME, Encrypted
from llm_unlearn.exact.key_stores import KeyFile, KeysUnavailable, open_key_store
from llm_unlearn.exact.run import S3TRun
from tests.exact.killing import every_point
from tests.exact.methods import METHODS
from tests.tiny import (
    load_tiny,
    make_rows,
    make_run,
    make_stub_run,
    node_bytes,
    served_bytes,
    stubbed_training,
    tiny_arguments,
    tiny_model_arguments,
    tiny_records,
    train_stub,
)

pytestmark = pytest.mark.usefixtures("without_fsync")

VICTIM = "person 3"


def stub_run(path: Path, **options: Any) -> S3TRun:
    """A trained run, encrypted with its keys beside it unless told otherwise."""
    with stubbed_training():
        run = make_stub_run(path, tiny_records(), **{"encrypt": True, **options})
        train_stub(run)
    return run


def encrypted_files(run: Path) -> list[Path]:
    return sorted(p for kind in ENCRYPTED for p in (run / kind).rglob("*") if p.is_file())


def contents(run: S3TRun) -> dict[str, bytes]:
    """What is in every record file, by its path."""
    return {
        str(path.relative_to(run.path)): run.directory.at_rest.read(path)
        for path in encrypted_files(run.path)
    }


def backup_of(run: S3TRun, path: Path) -> Path:
    """A byte copy of a run as a backup holds it: without the key file."""
    shutil.copytree(run.path, path, symlinks=True)
    (path / KEY_FILE_NAME).unlink(missing_ok=True)
    return path


def opened_in(backup: Path, run: S3TRun) -> set[str]:
    """Files of a backup that can be opened, whichever of the keys that live now is tried."""
    identity, place = (
        json.loads((run.path / SETTINGS_NAME).read_bytes())[k] for k in ("id", "key_store")
    )
    held = open_key_store(place, run.path, identity)
    keys = [held.key(key_id) for key_id in held.ids()]
    opened = set()
    for path in encrypted_files(backup):
        at_rest = Encrypted(backup, identity)
        for key in keys:
            at_rest.store = type("Trial", (), {"key": lambda _self, _id, key=key: key})()  # pyright: ignore
            try:
                at_rest.read(path)
            except RunError:
                continue
            opened.add(str(path.relative_to(backup)))
            break
    return opened


def touched_by(run: S3TRun, *subjects: str) -> set[str]:
    """Files of a run that hold something of the subjects, or depend on it."""
    directory = run.directory
    places = {tuple(name) for name in directory.slices.homes(subjects)}
    found = set()
    for shard, part in places:
        path = directory.slices.path(
            next(n for n in directory.slices.names if tuple(n) == (shard, part))
        )
        found |= {str(p.relative_to(run.path)) for p in path.parent.glob(f"{path.stem}.*")}
    for node in directory.wanted().values():
        if any((node.shard, part) in places for part in node.path):
            folder = directory.nodes.directory / node.key
            found |= {str(p.relative_to(run.path)) for p in folder.rglob("*")}
    return found


@pytest.mark.parametrize("method", METHODS)
def test_an_encrypted_run_has_the_same_bits(tmp_path: Path, method: str) -> None:
    plain = stub_run(tmp_path / "plain", encrypt=False, **METHODS[method])
    run = stub_run(tmp_path / "run", **METHODS[method])
    assert contents(run) == contents(plain)
    for step in range(2):
        assert node_bytes(run) == node_bytes(plain)
        assert served_bytes(run) == served_bytes(plain)
        assert all(check.passed for check in run.verify()), [c.problems for c in run.verify()]
        if step == 0:
            assert run.delete([VICTIM]).served == plain.delete([VICTIM]).served
            assert contents(run) == contents(plain)
            with stubbed_training():
                train_stub(run)
                train_stub(plain)
    assert not (plain.path / KEY_FILE_NAME).exists() and not (plain.path / SETTINGS_NAME).exists()
    described = json.loads((run.path / "run.json").read_bytes())
    assert described.pop("encryption") == run.directory.at_rest.identity  # pyright: ignore
    assert described == json.loads((plain.path / "run.json").read_bytes())


@pytest.mark.parametrize("method", METHODS)
def test_a_backup_does_not_open_what_was_deleted(tmp_path: Path, method: str) -> None:
    """With every key that is left after the deletion; everything that stays is still open."""
    keys = tmp_path / "elsewhere.keys"
    run = stub_run(tmp_path / "run", key_store=str(keys), **METHODS[method])
    backup = backup_of(run, tmp_path / "backup")
    doomed, everything = touched_by(run, VICTIM), set(contents(run))
    assert doomed and opened_in(backup, run) == everything
    run.delete([VICTIM])
    assert opened_in(backup, run) == everything - doomed
    assert set(contents(run)) >= everything - doomed
    assert all(check.passed for check in run.verify())


def test_a_key_file_in_the_backup_opens_it(tmp_path: Path) -> None:
    """The control of the tests above, and what the warning is about."""
    run = stub_run(tmp_path / "run")
    everything = set(contents(run))
    shutil.copytree(run.path, tmp_path / "backup", symlinks=True)
    assert any(KEY_FILE_NAME in line and "generations/" in line for line in run.warnings())
    run.delete([VICTIM])
    assert set(contents(S3TRun.open(tmp_path / "backup"))) == everything
    elsewhere = stub_run(tmp_path / "other", key_store=str(tmp_path / "keys"))
    assert not any(KEY_FILE_NAME in line for line in elsewhere.warnings())


steps = st.lists(
    st.one_of(
        st.lists(st.sampled_from([f"person {n}" for n in range(12)]), min_size=1, max_size=3, unique=True),
        st.just("rebuild"),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(method=st.sampled_from(sorted(METHODS)), history=steps)
def test_no_backup_of_any_moment_opens_what_was_deleted_since(
    method: str, history: list[Any]
) -> None:
    root = Path(tempfile.mkdtemp(prefix="llm-unlearn-test-"))
    try:
        run = stub_run(root / "run", **METHODS[method])
        backups: list[tuple[Path, set[str]]] = []
        held = {record.subject for record in tiny_records()}
        for number, step in enumerate(history):
            backups.append((backup_of(run, root / f"backup-{number}"), set()))
            if step == "rebuild":
                with stubbed_training():
                    train_stub(run)
            else:
                touched = touched_by(run, *held.intersection(step))
                held.difference_update(step)
                for backup, gone in backups:
                    gone |= touched & {str(p.relative_to(backup)) for p in encrypted_files(backup)}
                run.delete(step)
            for backup, gone in backups:
                assert not opened_in(backup, run) & gone
            assert all(check.passed for check in run.verify()), [c.problems for c in run.verify()]
    finally:
        shutil.rmtree(root)


class Watch:
    """Everything that lay in a run, outside of what is served, whenever something reached the disk."""

    def __init__(self, root: Path):
        self.root = root
        self.seen: dict[bytes, str] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}

    def look(self) -> None:
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if name not in ("served", "generations")]
            for name in names:
                path = Path(folder, name)
                about = path.stat()
                if self._stamps.get(path) != (about.st_ino, about.st_mtime_ns):
                    self._stamps[path] = about.st_ino, about.st_mtime_ns
                    self.seen.setdefault(path.read_bytes(), str(path.relative_to(self.root)))

    def holders_of(self, pieces: set[bytes]) -> set[str]:
        return {name for data, name in self.seen.items() if any(piece in data for piece in pieces)}


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    watching = Watch(tmp_path / "run")

    def wrap(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            watching.look()
            result = original(*arguments, **options)
            watching.look()
            return result

        monkeypatch.setattr(owner, name, wrapped)

    for owner, name in [
        (os, "replace"), (os, "rename"), (os, "unlink"), (os, "fsync"), (os, "rmdir"), (os, "mkdir"),
        (Path, "write_bytes"), (Path, "write_text"), (files, "write_bytes"), (files, "remove"),
    ]:  # fmt: skip
        wrap(owner, name)
    yield watching


def rows_of(data: bytes) -> set[bytes]:
    """Rows of the tensors in a safetensors file that are not all zeros."""
    try:
        tensors = load(data)
    except SafetensorError:
        return set()
    rows = [row for tensor in tensors.values() for row in np.atleast_2d(tensor)]
    return {row.tobytes() for row in rows if row.any() and row.nbytes >= 16}


def noting(original: Callable[[Any], bytes], rows: set[bytes]) -> Callable[[Any], bytes]:
    """A function that makes safetensors files, with every row that goes through it noted."""

    def noted(tensors: Any) -> bytes:
        data = original(tensors)
        rows.update(rows_of(data))
        return data

    return noted


@pytest.mark.parametrize("encrypt", [True, False])
@pytest.mark.parametrize("blocks", ["ranks", "layers"])
def test_nothing_is_ever_in_clear(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    watch: Watch,
    blocks: str,
    encrypt: bool,
) -> None:
    """Real training, with hidden states cached; the control is a plain run."""
    rows: set[bytes] = set()
    for module, name in ((store, "to_bytes"), (replay, "save")):  # what goes to nodes and caches
        monkeypatch.setattr(module, name, noting(getattr(module, name), rows))
    options = {"num_slices": 2, "num_sequences": 1, "blocks": blocks}
    run = make_run(tmp_path / "run", tiny_base, encrypt=encrypt, train=False, **options)
    run.train(*load_tiny(tiny_base))
    run.delete([VICTIM])
    run.train(*load_tiny(tiny_base))
    run.verify(replay=1)
    watch.look()
    words = {row["subject"].encode() for row in make_rows()} | {b"dish number", b"Question: what"}
    digests = {run.directory.key.text_digest(record) for record in tiny_records()}
    assert len(rows) > 100 and len(watch.seen) > 30
    kinds = {name.split("/")[0] for name in watch.seen.values()}
    assert {"records", "nodes", *(["cache"] if blocks == "layers" else [])} <= kinds
    found = watch.holders_of(words), watch.holders_of(digests), watch.holders_of(rows)
    assert all(found) is not encrypt
    if encrypt:
        assert not any(found), found


@pytest.mark.slow
def test_training_writes_nothing_of_its_own(tiny_base: Path, tmp_path: Path) -> None:
    """Neither the trainer nor the data library leaves a file, in the run or in its caches."""
    script = (
        "import sys; from pathlib import Path\n"
        "written = []\n"
        "def hook(event, arguments):\n"
        "    if event == 'open' and isinstance(arguments[0], str) and (arguments[2] & 0o3):\n"
        "        written.append(arguments[0])\n"
        "from tests.tiny import make_run, load_tiny\n"
        f"base, path = Path({str(tiny_base)!r}), Path({str(tmp_path / 'run')!r})\n"
        "run = make_run(path, base, encrypt=True, train=False, blocks='layers')\n"
        "loaded = load_tiny(base)\n"
        "sys.addaudithook(hook)\n"
        "run.train(*loaded)\n"
        "allowed = ('/dev/null', str(path))\n"
        "print([p for p in written if not p.startswith(allowed) and not p.endswith('.pyc')])\n"
        "print(sum(str(path / 'trainer') in p for p in written))\n"
    )
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hub"),
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": ".",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.splitlines()[-2:] == ["[]", "0"]
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "hub"}
    left = [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]
    assert left == []


def test_creation_killed_at_every_point_with_the_keys_elsewhere(tmp_path: Path) -> None:
    path, keys = tmp_path / "run", tmp_path / "keys"

    def prepare() -> None:
        shutil.rmtree(path, ignore_errors=True)
        keys.unlink(missing_ok=True)

    def make() -> None:
        shape = {"num_slices": 1, "num_sequences": 1}
        make_stub_run(path, tiny_records(), encrypt=True, key_store=str(keys), **shape)

    def check() -> None:
        if not (path / "run.json").exists():
            make()
        run = S3TRun.open(path)
        assert (
            sum(len(run.directory.slices.read(name)) for name in run.directory.slices.names) == 24
        )
        (encryption,) = [check for check in run.verify() if check.name == "encryption"]
        assert encryption.passed, encryption.problems

    assert every_point(prepare, make, check, tmp_path) > 15


def test_what_a_correction_will_insert_is_encrypted_and_its_key_goes(tmp_path: Path) -> None:
    run = stub_run(tmp_path / "run")
    slices, keys = run.directory.slices, len(run.directory.at_rest.store.ids())  # pyright: ignore
    slices.write_pending("0" * 16, tiny_records()[:2])
    path = run.path / "records" / "pending" / f"{'0' * 16}.jsonl"
    assert b"person" not in path.read_bytes()
    assert slices.read_pending("0" * 16) == tiny_records()[:2]
    assert len(run.directory.at_rest.store.ids()) == keys + 1  # pyright: ignore
    slices.drop_pending()
    assert not path.exists()
    assert len(run.directory.at_rest.store.ids()) == keys  # pyright: ignore


def move_a_file(run: S3TRun) -> None:
    one, other = sorted((run.path / "nodes").glob(f"*/{WEIGHTS_NAME}"))[:2]
    shutil.copy(one, other)


def write_in_clear(run: S3TRun) -> None:
    path = next((run.path / "records").rglob("*.jsonl"))
    path.write_bytes(run.directory.at_rest.read(path))


def share_a_key(run: S3TRun) -> None:
    (seal,) = run.directory.at_rest.seals()
    for path in sorted((run.path / "records").rglob("slice-*.jsonl"))[:2]:
        data, shown = run.directory.at_rest.read(path), run.directory.at_rest.first_line(path)
        path.write_bytes(seal(path, data, shown.rstrip()))


def flip(pattern: str, position: int) -> Callable[[S3TRun], None]:
    def change(run: S3TRun) -> None:
        path = sorted(run.path.glob(pattern))[0]
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)

    return change


PLANTED: dict[str, tuple[Callable[[S3TRun], None], str]] = {
    "a byte of the records": (flip("records/*/slice-0.jsonl", -1), "slice-0.jsonl is damaged"),
    "a byte of a shown header": (flip("records/*/slice-0.jsonl", 60), "slice-0.jsonl is damaged"),
    "a byte of the digests": (flip("records/*/slice-0.*.texts", 50), ".texts is damaged"),
    "a byte of a node": (flip(f"nodes/*/{WEIGHTS_NAME}", 1000), "is damaged"),
    "a byte of a manifest": (flip("nodes/*/manifest.json", 45), "manifest.json is damaged"),
    "a byte of a key id": (flip("nodes/*/manifest.json", 20), "its key is not in"),
    "a byte of the magic": (flip("nodes/*/manifest.json", 0), "is not encrypted"),
    "a byte of a key": (flip(KEY_FILE_NAME, 64 + 20), "slice.keys is damaged"),
    "a file moved": (move_a_file, "is another file's"),
    "a file in clear": (write_in_clear, "is not encrypted"),
    "two objects under one key": (share_a_key, "are under the same key"),
    "a key without an object": (lambda run: run.directory.at_rest.seals(3) and None, "3 keys in .* open nothing"),
    "a key file that others can read": (lambda run: (run.path / KEY_FILE_NAME).chmod(0o644), "chmod 600"),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_verify_names_what_is_wrong(tmp_path: Path, planted: str) -> None:
    run = stub_run(tmp_path / "run")
    assert all(check.passed for check in run.verify())
    plant, message = PLANTED[planted]
    plant(run)
    (check,) = [check for check in S3TRun.open(run.path).verify() if check.name == "encryption"]
    assert check.examined == len(encrypted_files(run.path))
    assert not any("Errno" in problem for problem in check.problems)
    assert any(re.search(message, problem) for problem in check.problems), check.problems


def remove_keys(run: S3TRun) -> None:
    (run.path / KEY_FILE_NAME).unlink()


def take_keys_of_another(run: S3TRun) -> None:
    other = stub_run(run.path.with_name("another"))
    shutil.copy(other.path / KEY_FILE_NAME, run.path / KEY_FILE_NAME)


def take_old_keys(run: S3TRun) -> None:
    """The key file as it was when the run was created: none of its nodes can be opened."""
    held = KeyFile(run.path / KEY_FILE_NAME, bytes.fromhex(run.directory.at_rest.identity))  # pyright: ignore
    manifests = sorted((run.path / "nodes").glob("*/manifest.json"))
    held.destroy({path.read_bytes()[8:24] for path in manifests})


def take_an_old_copy(run: S3TRun) -> None:
    """The run as it was before a deletion, and the keys as they are after it."""
    backup = backup_of(run, run.path.with_name("old"))
    run.delete([VICTIM])
    shutil.copy(run.path / KEY_FILE_NAME, backup / KEY_FILE_NAME)
    shutil.rmtree(run.path)
    backup.rename(run.path)


LOST = {
    "no key file": (remove_keys, "cannot be used"),
    "another run's": (take_keys_of_another, "holds the keys of another run"),
    "old keys": (take_old_keys, "its key is not in"),
    "an old copy of the run": (take_an_old_copy, "old copy"),
}


@pytest.mark.parametrize("lost", LOST)
def test_without_the_right_keys_nothing_is_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    from llm_unlearn import cli

    run = stub_run(tmp_path / "run")
    lose, message = LOST[lost]
    lose(run)

    def state() -> dict[Path, bytes]:
        return {
            path: path.read_bytes()
            for path in run.path.rglob("*")
            if path.is_file() and path.suffix != ".lock"
        }

    before = state()
    with stubbed_training():
        if lost != "old keys":  # where only nodes are lost, a deletion that takes them may go on
            with pytest.raises(KeysUnavailable, match=message):
                S3TRun.open(run.path).delete(["person 5"])
        with pytest.raises(KeysUnavailable, match=message):
            train_stub(S3TRun.open(run.path))
    assert state() == before
    for command in (["verify", str(run.path)], ["delete", str(run.path), "--subject", "person 5"]):
        if lost == "old keys" and command[0] == "delete":
            continue
        capsys.readouterr()
        assert exit_code_of(lambda c=command: cli.app(c, standalone_mode=False)) == 1  # pyright: ignore
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        assert len(said.err.strip().splitlines()) <= 6  # one line, wrapped by the terminal
    assert state() == before


def test_a_moved_key_file_is_named_in_the_settings(tmp_path: Path) -> None:
    run = stub_run(tmp_path / "run", key_store=str(tmp_path / "keys"))
    (tmp_path / "keys").rename(tmp_path / "moved")
    with pytest.raises(KeysUnavailable, match=r"encryption\.json"):
        S3TRun.open(run.path).delete([VICTIM])
    settings_path = run.path / SETTINGS_NAME
    held = json.loads(settings_path.read_bytes())
    settings_path.write_text(json.dumps(held | {"key_store": str(tmp_path / "moved")}))
    assert S3TRun.open(run.path).delete([VICTIM]).records == 2


def test_flags_of_a_run_that_is_there(tiny_base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tiny_base)
    keys = str(tmp_path / "keys")

    def make(name: str, **options: Any) -> S3TRun:
        arguments = tiny_arguments(output_dir=str(tmp_path / name), **options)
        return S3TRun.create(
            tmp_path / name,
            tiny_records(),
            arguments,
            model,
            tokenizer,
            tiny_model_arguments(tiny_base),
        )

    make("plain")
    with pytest.raises(UserError, match="made without --encrypt"):
        make("plain", encrypt=True)
    assert make("run", encrypt=True, key_store=keys).status().key_store == keys
    assert make("run").status().key_store == keys
    assert make("run", encrypt=True, key_store=keys).directory.at_rest.is_encrypted
    with pytest.raises(UserError, match="leave --key_store out"):
        make("run", encrypt=True, key_store=str(tmp_path / "other"))
    with pytest.raises(UserError, match="say --encrypt too"):
        make("new", key_store=keys)
    with pytest.raises(UserError, match="exists already"):
        make("new", encrypt=True, key_store=keys)
    assert make("new", encrypt=True).status().key_store == str(tmp_path / "new" / KEY_FILE_NAME)


def test_the_certificate_says_which_keys_went_and_what_old_copies_hold(tmp_path: Path) -> None:
    run = stub_run(tmp_path / "run")
    done = run.delete([VICTIM])
    assert done.request is not None
    certificate = run.certificate(done.request)
    assert certificate["purged"]["keys"] == done.nodes_removed + 1  # and the slice's own
    assert residues.COPIES not in certificate["out_of_reach"]
    assert residues.ENCRYPTED_COPIES in certificate["out_of_reach"]
