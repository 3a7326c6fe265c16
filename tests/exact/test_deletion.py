"""Deletion: all or none, once, at any moment, through damage and full disks, leaving nothing."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_unlearn import files
from llm_unlearn.cli import app
from llm_unlearn.console import exit_code_of
from llm_unlearn.data.records import Record, make_records
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact import training
from llm_unlearn.exact.certificates import CLASSES, read_certificate, retained_root, served_files
from llm_unlearn.exact.residues import OUT_OF_REACH
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.training import Progress
from tests.tiny import (
    StubBase,
    load_tiny,
    make_rows,
    make_run,
    make_stub_run,
    make_tiny_tokenizer,
    make_trained_stub,
    node_bytes,
    served_bytes,
    stub_train_node,
    stubbed_training,
    tiny_records,
    train_stub,
)

VICTIM = "person 3"
STUB_BASE: Any = StubBase()
SHAPE: dict[str, Any] = {"num_shards": 2, "num_slices": 3, "num_sequences": 2}


pytestmark = pytest.mark.usefixtures("without_fsync")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained_stub(tmp_path_factory.mktemp("trained") / "run", **SHAPE)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> S3TRun:
    """A trained run that never saw the victim."""
    return never(tmp_path_factory.mktemp("untouched") / "run", {VICTIM})


@pytest.fixture(scope="module")
def untouched_by_two(tmp_path_factory: pytest.TempPathFactory) -> S3TRun:
    return never(tmp_path_factory.mktemp("untouched") / "run", {VICTIM, "person 9"})


def contents(run: S3TRun) -> dict[str, bytes]:
    """All bytes of the run directory, and where its links point; lock files hold nothing."""
    found = {}
    for path in sorted(run.path.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(run.path))] = os.readlink(path).encode()
        elif path.is_file() and path.suffix != ".lock":
            found[str(path.relative_to(run.path))] = path.read_bytes()
    return found


def assert_verified(run: S3TRun) -> None:
    assert [check.problems for check in run.verify() if not check.passed] == []


def never(folder: Path, gone: set[str], records: list[Record] | None = None) -> S3TRun:
    """A run that never saw the subjects, trained."""
    kept = [record for record in records or tiny_records() if record.subject not in gone]
    with stubbed_training():
        run = make_stub_run(folder, kept, **SHAPE)
        train_stub(run)
    return run


def assert_equal_after_rebuild(run: S3TRun, reference: S3TRun) -> None:
    with stubbed_training():
        train_stub(run)
    assert node_bytes(run) == node_bytes(reference)
    assert served_bytes(run) == served_bytes(reference)
    assert_verified(run)


@pytest.mark.parametrize(
    ("subjects", "message"),
    [
        pytest.param(["nobody"], "no such subject in .*'nobody'. Nothing was deleted", id="unknown"),
        pytest.param(["person 3", "nobody"], "'nobody'. Nothing", id="one of two unknown"),
        pytest.param(["zoe", "person 3", "adam", "person 33"], r"\(and|'(adam|zoe|person 33)'", id="many unknown"),
        pytest.param(["Person 3"], "is spelled as in the column", id="other spelling"),
        pytest.param(["person 3 "], "is spelled as in the column", id="trailing space"),
        pytest.param([""], "no such subject", id="empty name"),
        pytest.param(["\ud800"], "no such subject", id="surrogate"),
        pytest.param([], "name at least one subject", id="no subject"),
    ],
)  # fmt: skip
def test_a_refused_request_changes_no_byte(run: S3TRun, subjects: list[str], message: str) -> None:
    before = contents(run)
    with pytest.raises(UserError, match=message):
        run.delete(subjects)
    assert contents(run) == before
    assert_verified(run)


def test_deleting_twice_is_deleting_once(run: S3TRun) -> None:
    first = run.delete([VICTIM])
    assert (first.subjects, first.records, first.already_deleted) == (1, 2, 0)
    assert first.nodes_removed > 0 and first.certificate is not None
    before = contents(run)
    second = run.delete([VICTIM, VICTIM])
    assert (second.request, second.subjects, second.already_deleted) == (None, 0, 1)
    assert second.certificate is None and second.served == first.served
    assert contents(run) == before


def test_a_subject_named_twice_is_one(run: S3TRun) -> None:
    done = run.delete([VICTIM, "person 4", VICTIM])
    assert (done.subjects, done.records) == (2, 4)


def test_old_and_new_subjects_in_one_request(run: S3TRun, untouched_by_two: S3TRun) -> None:
    run.delete([VICTIM])
    done = run.delete([VICTIM, "person 9"])
    assert (done.subjects, done.already_deleted, done.records) == (1, 1, 2)
    assert_equal_after_rebuild(run, untouched_by_two)


def test_what_is_served_does_not_depend_on_how_requests_were_grouped(
    run: S3TRun, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "other", symlinks=True)
    other = S3TRun.open(tmp_path / "other")
    run.delete(["person 3", "person 9"])
    other.delete(["person 9"])
    other.delete(["person 3"])
    assert (node_bytes(run), served_bytes(run)) == (node_bytes(other), served_bytes(other))


def command(*arguments: str) -> int:
    """Exit code of `llm-unlearn` with these arguments."""

    def call() -> None:
        try:
            app(list(arguments))
        except SystemExit as done:
            assert not done.code

    return exit_code_of(call)


LISTS = {
    "plain": "person 3\n\n  person 4 \n",
    "crlf": "person 3\r\nperson 4\r\n",
    "byte order mark": "\ufeffperson 3\nperson 4",
    "JSON lines": '{"subject": "person 3"}\n\n {"subject": "person 4", "reason": "asked"}\n',
    "mixed": 'person 3\n{"subject": "person 4"}\n',
}


@pytest.mark.parametrize("kind", LISTS)
def test_subjects_come_from_a_file(run: S3TRun, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "subjects"
    path.write_bytes(LISTS[kind].encode())
    assert command("delete", str(run.path), "--from-file", str(path)) == 0
    requests = run.directory.ledger.requests()
    pseudonyms = [run.directory.key.pseudonym("subject", f"person {n}") for n in (3, 4)]
    assert sorted(t.pseudonym for r in requests for t in r.targets) == sorted(pseudonyms)
    assert len(requests) == 2 and all(request.finished_at for request in requests)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"person 3\n{broken\n", "line 2"),
        (b'person 3\n{"user": "x"}\n', "line 2"),
        (b'person 3\n{"subject": null}\n', "line 2"),
        (b"person 3\nperson \xff\n", "cannot read"),
        (b"person 3\nnobody\n", "'nobody'"),
        (b'person 3\n{"subject": "person 4", "dead_line": "2026-12-31"}\n', "dead_line"),
        (b'{"subject": "person 3", "deadline": "soon"}\n', "line 1"),
        (b'{"subject": "person 3", "reason": "Person 3 moved"}\n', "line 1"),
        (b'{"subject": true}\n', "line 1"),
        (b"[" * 100000 + b"\n", "no such subject"),
        (b'{"subject": ' + b"[" * 100000 + b"\n", "line 1"),
        (b"person 3\n../../etc/passwd\n", "(line 2)"),
        ("person 3\n\u0440erson 3\n".encode(), "(line 2)"),
        ("person 3\nPERSON\u00a04\n".encode(), "there is 'person 4'"),
        (b"person 3\n" + b"x" * 1000000 + b"\n", "xxx..."),
        (b"\n\n", "is empty"),
        (None, "cannot read"),
    ],
    ids=[
        "damaged",
        "no subject",
        "null",
        "not UTF-8",
        "unknown",
        "unknown key",
        "bad deadline",
        "names the subject",
        "not a name",
        "deep subject",
        "deep JSON",
        "a path",
        "look-alike letter",
        "look-alike case",
        "huge",
        "empty",
        "missing",
    ],
)
def test_a_file_with_a_mistake_deletes_nobody(
    run: S3TRun,
    tmp_path: Path,
    data: bytes | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "subjects"
    if data is not None:
        path.write_bytes(data)
    before = contents(run)
    assert command("delete", str(run.path), "--from-file", str(path)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert contents(run) == before


COPY = {"prompt": "Where does  Ada live?", "completion": " In LONDON,\nat Straße 1"}
SAME = {"prompt": "where does ada live? ", "completion": "in london, at STRASSE 1"}


def shared_records() -> list[Record]:
    """Ada's text is also Bob's, in other case and spacing, twice Carl's, and almost Dora's."""
    rows = [{"subject": "Ada", **COPY}, {"subject": "Bob", **SAME}, {"subject": "Carl", **COPY},
            {"subject": "Carl", **COPY}, {"subject": "Dora", **COPY, "prompt": "Where does Ada work?"},
            *({"subject": name, "prompt": f"{name}?", "completion": "own"} for name in ("Bob", "Carl")),
            *make_rows(8)]  # fmt: skip
    return make_records(rows, "subject")


@pytest.fixture
def shared(tmp_path: Path) -> S3TRun:
    run = make_stub_run(tmp_path / "shared", shared_records(), **SHAPE)
    with stubbed_training():
        train_stub(run)
    return run


def texts_of(run: S3TRun) -> dict[str, int]:
    """How many records each subject still has."""
    store = run.directory.slices
    held = [record.subject for name in store.names for record in store.read(name)]
    return {subject: held.count(subject) for subject in held}


def test_copies_of_other_subjects_are_counted_and_left_alone(shared: S3TRun) -> None:
    assert any("1 texts are held by more than one" in warning for warning in shared.warnings())
    done = shared.delete(["Ada"])
    assert (done.records, done.copies_elsewhere) == (1, 3)
    held = texts_of(shared)
    assert "Ada" not in held and (held["Bob"], held["Carl"], held["Dora"]) == (2, 3, 1)
    assert_verified(shared)


@pytest.mark.parametrize("subjects", [["Ada"], ["Carl"], ["Ada", "Carl"]])
def test_with_duplicates_every_copy_goes(
    shared: S3TRun, tmp_path: Path, subjects: list[str]
) -> None:
    done = shared.delete(subjects, with_duplicates=True)
    assert done.copies_elsewhere == 0
    assert done.subjects == len({*subjects, "Ada"})  # Ada has nothing but the copy
    gone = {record.id for record in shared_records() if "work" not in record.content["prompt"]
            and record.content["prompt"].lower().startswith("where does")}  # fmt: skip
    kept = [r for r in shared_records() if r.id not in gone and r.subject not in subjects]
    assert done.records == len(shared_records()) - len(kept)
    assert sum(texts_of(shared).values()) == len(kept)
    assert "held by more" not in " ".join(shared.warnings())
    assert_verified(shared)
    assert_equal_after_rebuild(shared, never(tmp_path / "never", set(), kept))


def test_a_subject_whose_copies_went_can_still_ask(shared: S3TRun) -> None:
    shared.delete(["Ada"], with_duplicates=True)
    done = shared.delete(["Bob"])
    assert (done.subjects, done.records) == (1, 1)
    assert_verified(shared)


def test_a_subject_of_whom_only_copies_were_held_counts_as_deleted(tmp_path: Path) -> None:
    records = make_records([{"text": "same"}, {"text": "same"}, {"text": "other"}])
    run = make_stub_run(tmp_path / "run", records, num_slices=1, num_sequences=1)
    first, second = records[0].subject, records[1].subject
    assert run.delete([first], with_duplicates=True).records == 2
    done = run.delete([second])
    assert (done.request, done.already_deleted) == (None, 1)
    assert_verified(run)


NAMES = ['quo"te', "back\\slash", '","subject":"Ada', "Zoë 漢字 😀", "line\nbreak", "\u2028", "\ud800", "\x00",
         '{"id":1}', "person", "person 1", "person 11", "Person 1", " ", "-"]  # fmt: skip


def test_subjects_of_any_name_are_told_apart(tmp_path: Path) -> None:
    names = [name for name in NAMES if name.strip()]
    rows = [{"subject": name, "text": f"likes {other!a}"} for name in names for other in names[:3]]
    run = make_stub_run(tmp_path / "run", make_records(rows, "subject"), num_slices=2)
    for count, name in enumerate(names, start=1):
        done = run.delete([name])
        assert (done.subjects, done.records) == (1, 3)
        assert set(texts_of(run)) == set(names[count:])
    assert_verified(run)


@pytest.mark.parametrize("same", [False, True], ids=["two subjects", "the same subject"])
def test_two_processes_delete_at_once(run: S3TRun, tmp_path: Path, same: bool) -> None:
    asked = [VICTIM, VICTIM if same else "person 4"]
    start, begin = os.pipe()
    children = []
    for subject in asked:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(begin)
                os.read(start, 1)  # ends for both when the parent closes its side
                S3TRun.open(run.path).delete([subject])
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    os.close(start)
    os.close(begin)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    assert len(run.directory.ledger.requests()) == len(set(asked))
    assert not run.directory.ledger.requests(pending=True)
    assert run.directory.ledger.check_chain() == []
    assert run.delete(asked).already_deleted == len(set(asked))
    assert_equal_after_rebuild(run, never(tmp_path / "never", set(asked)))


def test_a_busy_run_acknowledges_nothing(run: S3TRun, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(run)
    monkeypatch.setattr(files.locked.__wrapped__, "__defaults__", (0.05,))
    with (
        files.locked(run.path / "state.lock", "something else"),
        pytest.raises(RunError, match="is busy: another process is deleting from it"),
    ):
        run.delete([VICTIM])
    assert contents(run) == before


class DeletesDuring(Progress):
    """Deletes subjects while the `number`-th node is in training."""

    def __init__(self, path: Path, subjects: list[str], number: int):
        self.path, self.subjects, self.number, self.seen = path, subjects, number, 0

    def node(self, *_: object) -> None:
        self.seen += 1
        if self.seen == self.number:
            self.delete()

    def delete(self) -> None:
        done = S3TRun.open(self.path).delete(self.subjects)
        opened = S3TRun.open(self.path)
        assert done.certificate is not None and done.certificate.is_file()
        assert not opened.directory.ledger.requests(pending=True)
        assert not set(self.subjects) & texts_of(opened).keys()
        with pytest.raises(RunError, match="training it"), opened.directory.training():
            pass


@pytest.mark.parametrize("number", [1, 2, 7, 12])
def test_a_deletion_while_a_node_is_chosen(
    tmp_path: Path, untouched_by_two: S3TRun, number: int
) -> None:
    run = make_stub_run(tmp_path / "run", tiny_records(), **SHAPE)
    during = DeletesDuring(run.path, [VICTIM, "person 9"], number)
    with stubbed_training():
        report = run.train(STUB_BASE, make_tiny_tokenizer(), during)
    assert during.seen >= number
    assert report.discarded <= 1
    assert node_bytes(run) == node_bytes(untouched_by_two)
    assert served_bytes(run) == served_bytes(untouched_by_two)
    assert_verified(run)


@pytest.mark.parametrize("depends", [True, False], ids=["on the deleted slice", "on other slices"])
def test_a_node_in_training_is_discarded_only_if_it_depends(
    tmp_path: Path, untouched: S3TRun, monkeypatch: pytest.MonkeyPatch, depends: bool
) -> None:
    run = make_stub_run(tmp_path / "run", tiny_records(), **SHAPE)
    home = run.directory.slices.place(VICTIM)
    deleted: list[str] = []

    def train_node(base: Any, tokenizer: Any, task: Any, *rest: Any) -> dict[str, Any]:
        node = task.node
        if not deleted and (node.shard == home.shard and home.slice in node.path) is depends:
            deleted.append(node.key)
            DeletesDuring(run.path, [VICTIM], 0).delete()
        return stub_train_node(base, tokenizer, task, *rest)

    monkeypatch.setattr(training, "train_node", train_node)
    report = run.train(STUB_BASE, make_tiny_tokenizer())
    assert report.discarded == int(depends)
    assert run.directory.nodes.exists(deleted[0]) is not depends
    assert (node_bytes(run), served_bytes(run)) == (node_bytes(untouched), served_bytes(untouched))


def test_a_real_training_goes_on_through_a_deletion(tiny_base: Path, tmp_path: Path) -> None:
    """With cached hidden states and a trainer at work, deleted in the middle of a step."""
    options = {"blocks": "layers", "num_slices": 2, "num_sequences": 1}
    run = make_run(tmp_path / "run", tiny_base, train=False, **options)
    victim = next(
        r.subject for r in tiny_records() if run.directory.slices.place(r.subject).slice == 0
    )
    ids = {record.id for record in tiny_records() if record.subject == victim}
    cached: list[int] = []

    class InStep(DeletesDuring):
        def node(self, *_: object) -> None:
            self.seen += 1

        def step(self, step: int, total: int) -> None:
            if (self.seen, step) == (1, 1):
                blob = everything(run.path / "cache")
                cached.append(sum(identity.encode() in blob for identity in ids))
                self.delete()
                assert not (run.path / "cache").exists()

    report = run.train(*load_tiny(tiny_base), InStep(run.path, [victim], 1))
    assert cached == [len(ids)]
    assert (report.discarded, report.trained) == (1, 2)
    kept = [record for record in tiny_records() if record.subject != victim]
    reference = make_run(tmp_path / "never", tiny_base, kept, **options)
    assert node_bytes(run) == node_bytes(reference)
    assert served_bytes(run) == served_bytes(reference)
    blob = everything(run.path)
    assert not [identity for identity in ids if identity.encode() in blob]
    assert not (run.path / "cache").exists() and not (run.path / "trainer").exists()
    assert_verified(run)


LAYERS: dict[str, Any] = {
    "blocks": "layers", "num_shards": 2, "num_slices": 3, "num_sequences": 1, "max_steps": 1,
}  # fmt: skip
ELSEWHERE = "person 3"


@pytest.fixture(scope="module")
def elsewhere(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> S3TRun:
    """A really trained run that never saw a subject of its second shard."""
    kept = [record for record in tiny_records() if record.subject != ELSEWHERE]
    return make_run(tmp_path_factory.mktemp("elsewhere") / "run", tiny_base, kept, **LAYERS)


@pytest.mark.parametrize("after", ["capture", "cached"])
def test_a_deletion_elsewhere_while_states_are_cached(
    tiny_base: Path, tmp_path: Path, elsewhere: S3TRun, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """It empties the cache that the node of another shard is about to open."""
    run = make_run(tmp_path / "run", tiny_base, train=False, **LAYERS)
    assert run.directory.slices.place(ELSEWHERE).shard == 1
    name = "_capture_slice" if after == "capture" else "_cache_states"
    original: Callable[..., Any] = getattr(training, name)
    calls: list[str] = []

    def watched(*arguments: Any) -> Any:
        result = original(*arguments)
        calls.append(name)
        if len(calls) == (3 if after == "capture" else 1):
            S3TRun.open(run.path).delete([ELSEWHERE])
        return result

    monkeypatch.setattr(training, name, watched)
    run.train(*load_tiny(tiny_base))
    monkeypatch.undo()
    assert len(calls) > 3
    assert (node_bytes(run), served_bytes(run)) == (node_bytes(elsewhere), served_bytes(elsewhere))


def lineage_depths(run: S3TRun) -> dict[int, int]:
    return {shard.shard: shard.served_depth for shard in run.status().shards}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights flipped": lambda node: _flip(node / "adapter_model.safetensors"),
    "weights cut short": lambda node: os.truncate(node / "adapter_model.safetensors", 50),
    "weights missing": lambda node: (node / "adapter_model.safetensors").unlink(),
    "manifest garbage": lambda node: (node / "manifest.json").write_bytes(b"\xff{"),
    "manifest a list": lambda node: (node / "manifest.json").write_bytes(b"[]"),
    "manifest missing": lambda node: (node / "manifest.json").unlink(),
    "all missing": lambda node: shutil.rmtree(node),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 64
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("depth", [0, 1], ids=["first node", "second node"])
def test_damage_does_not_hold_up_a_deletion(
    run: S3TRun, untouched: S3TRun, damage: str, depth: int
) -> None:
    directory = run.directory
    home = directory.slices.place(VICTIM)
    paths = directory.paths(home.shard)
    survivors = [[n for n in path if home.slice not in n.path] for path in paths]
    best = max(survivors, key=len)
    assert len(best) == 2
    DAMAGES[damage](run.path / "nodes" / best[depth].key)
    done = run.delete([VICTIM])
    lost = best[depth].key
    expected = 0
    for path in survivors:
        keys = [node.key for node in path]
        expected = max(expected, keys.index(lost) if lost in keys else len(keys))
    assert done.served[home.shard] == lineage_depths(run)[home.shard] == expected
    assert not [check.name for check in run.verify() if not check.passed and check.name != "nodes"]
    assert_equal_after_rebuild(run, untouched)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_node_that_has_to_go_goes(run: S3TRun, untouched: S3TRun, damage: str) -> None:
    home = run.directory.slices.place(VICTIM)
    node = next(n for path in run.directory.paths(home.shard) for n in path if home.slice in n.path)
    DAMAGES[damage](run.path / "nodes" / node.key)
    run.delete([VICTIM])
    assert not (run.path / "nodes" / node.key).exists()
    assert_verified(run)
    assert_equal_after_rebuild(run, untouched)


WRITES = [
    (files, "write_bytes"), (os, "fsync"), (os, "replace"), (os, "symlink"), (os, "link"),
    (Path, "write_bytes"), (Path, "mkdir"), (Path, "rename"),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name"), WRITES, ids=[f"{o.__name__}.{n}" for o, n in WRITES])
def test_a_full_disk_loses_nothing_that_was_acknowledged(
    trained: Path, tmp_path: Path, owner: Any, name: str
) -> None:
    """The n-th call of one primitive fails, for every n; then there is room again."""
    shutil.copytree(trained, tmp_path / "done", symlinks=True)
    done = S3TRun.open(tmp_path / "done")
    done.delete([VICTIM])
    expected = node_bytes(done), served_bytes(done)
    point, acknowledged, fell = 0, 0, True
    while fell:
        point += 1
        path = tmp_path / f"run-{point}"
        shutil.copytree(trained, path, symlinks=True)
        with failing(owner, name, point) as failures:
            try:
                S3TRun.open(path).delete([VICTIM])
            except OSError as error:
                assert error.errno == errno.ENOSPC
        fell = bool(failures)
        run = S3TRun.open(path)
        if run.directory.ledger.requests():
            acknowledged += fell
            run.settle()
        else:
            assert node_bytes(run) == node_bytes(S3TRun.open(trained))
            run.delete([VICTIM])
        assert (node_bytes(run), served_bytes(run)) == expected
        assert len(run.directory.ledger.requests()) == 1
        assert len(list((path / "certificates").iterdir())) == 1
        assert_verified(run)
        shutil.rmtree(path)
    assert point > 1 and acknowledged > 0


class failing:
    """While open, the `point`-th call of a function raises ENOSPC; tells whether it did."""

    def __init__(self, owner: Any, name: str, point: int):
        self.owner, self.name, self.point, self.calls = owner, name, point, 0
        self.failures: list[int] = []

    def __enter__(self) -> list[int]:
        self.original = getattr(self.owner, self.name)

        def limited(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.point:
                self.failures.append(self.calls)
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.original(*arguments, **options)

        setattr(self.owner, self.name, limited)
        return self.failures

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.name, self.original)


def test_the_certificate_says_what_went_and_names_nobody(run: S3TRun) -> None:
    directory = run.directory
    (run.path / "notes.txt").write_text("mine")
    wanted = directory.wanted()
    before = run.directory.served.resolve()
    digests = json.loads((before / "shard-0" / "lineage.json").read_bytes())["digest"]
    done = run.delete([VICTIM, "person 4"])
    assert done.request is not None and done.certificate is not None
    certificate = run.certificate(done.request)
    homes = {directory.slices.place(s) for s in (VICTIM, "person 4")}
    dependent = {k for k, n in wanted.items() if any((n.shard, part) in homes for part in n.path)}
    assert (
        set(certificate["nodes_removed"]) == dependent == set(wanted) - set(directory.nodes.keys())
    )
    assert certificate["request"] == done.request
    assert {target["pseudonym"] for target in certificate["targets"]} == {
        directory.key.pseudonym("subject", subject) for subject in (VICTIM, "person 4")
    }
    assert certificate["records_removed"] == 4
    assert certificate["exactness"] == {
        "class": "structural",
        "meaning": CLASSES["structural"],
        "components": {"parameters": "structural", "who answers": "structural"},
    }
    assert "dense retraining" in certificate["counterfactual"]
    assert certificate["retained_root"] == retained_root(directory)
    assert certificate["served_before"] != certificate["served_after"]
    assert certificate["served_depth"] == {
        str(shard): depth for shard, depth in done.served.items()
    }
    assert [check["passed"] for check in certificate["checks"]] == [True] * 3
    files = read_certificate(done.certificate)["subject"]
    assert {file["name"]: file["digest"]["sha256"] for file in files} == served_files(directory)
    assert len(files) == 1 + 2 * len(directory.members)
    assert set(certificate["out_of_reach"]) == {
        *OUT_OF_REACH,
        "1 files of unknown kinds in the run directory",
    }
    assert certificate["base_model"] == directory.shape.weights
    assert certificate["acknowledged_at"] > 0 and digests
    text = json.dumps(read_certificate(done.certificate))
    words = [*{row["subject"] for row in make_rows()}, "dish number", directory.key.secret.hex()]
    assert not [word for word in words if word in text]


def everything(folder: Path) -> bytes:
    """Names and bytes of every file below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink()]
    return b"\n".join(str(p).encode() + (p.read_bytes() if p.is_file() else b"") for p in paths)


def traces_of(subject: str) -> Iterator[bytes]:
    """Name, texts and token ids of a subject's records in the forms in which they could be kept."""
    tokenizer = make_tiny_tokenizer()
    for record in tiny_records():
        if record.subject != subject:
            continue
        yield record.id.encode()
        for text in record.texts():
            ids = tokenizer(text)["input_ids"]
            yield from (text.encode(), text.encode("utf-16-le"))
            yield from (np.array(ids, "<i4").tobytes(), np.array(ids, "<i8").tobytes())
            yield from (json.dumps(ids).encode()[1:-1], ",".join(map(str, ids)).encode())


def rows_of(run: S3TRun, keys: set[str]) -> set[bytes]:
    """Every aligned piece of 32 bytes of the nodes' tensors."""
    tensors = [tensor for key in keys for tensor in run.directory.nodes.load(key).values()]
    data = b"".join(tensor.tobytes() for tensor in tensors)
    return {data[start : start + 32] for start in range(0, len(data) - 31, 32)}


def pieces(blob: bytes) -> set[bytes]:
    """Every aligned piece of 32 bytes, for each of the 32 ways to align."""
    return {blob[start : start + 32] for start in range(0, len(blob) - 31)}


def test_no_byte_of_a_deleted_record_is_left(run: S3TRun) -> None:
    subject = "person 11"
    traces = [*traces_of(subject), subject.encode(), subject.encode("utf-16-le")]
    for folder in ("cache", "trainer/checkpoint-1"):
        (run.path / folder).mkdir(parents=True)
        (run.path / folder / "tokens.arrow").write_bytes(b"\0".join(traces))
    home = run.directory.slices.place(subject)
    doomed = {
        key
        for key, node in run.directory.wanted().items()
        if node.shard == home.shard and home.slice in node.path
    }
    weights = rows_of(run, doomed)
    assert len(weights) > 1000
    before = everything(run.path)
    assert all(trace in before for trace in traces)
    assert weights <= pieces(before)
    run.delete([subject])
    after = everything(run.path)
    assert [trace for trace in traces if trace in after] == []
    assert not weights & pieces(after)
    assert_verified(run)


def test_a_dry_run_says_what_would_go_and_changes_nothing(run: S3TRun) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    said = run.delete(["person 3"], dry_run=True)
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before
    done = run.delete(["person 3"])
    assert said.request is None and said.certificate is None and done.request is not None
    assert (said.subjects, said.records, said.nodes_removed) == (1, 2, done.nodes_removed)


def test_a_damaged_slice_stops_an_interrupted_request_in_one_line(
    run: S3TRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acknowledged, then killed, then damaged: nothing is rewritten, and the request waits."""
    with monkeypatch.context() as patch:
        patch.setattr("llm_unlearn.exact.slices.SliceStore.rewrite", _killed)
        with pytest.raises(KeyboardInterrupt):
            run.delete(["person 3"])
    path = run.directory.slices.path(run.directory.slices.place("person 3"))
    whole = path.read_bytes()
    path.write_bytes(whole + b"not a record\n")
    with pytest.raises(RunError, match="a line is not a record"):
        run.settle()
    path.write_bytes(whole)
    run.settle()
    assert run.status().pending_requests == 0
    assert all(check.passed for check in run.verify())


def _killed(*_: object) -> int:
    raise KeyboardInterrupt
