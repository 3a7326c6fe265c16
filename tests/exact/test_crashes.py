"""kill -9 at every point where something reaches the disk, then run the same command again.

A forked child does the work with every primitive that changes the disk wrapped in a counter, and
kills itself at the n-th; n runs until the child gets through.
"""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.exact.run import S3TRun
from tests.exact.killing import copy_anew, every_point, in_child
from tests.exact.methods import METHODS
from tests.tiny import (
    core_records,
    load_tiny,
    make_run,
    make_stub_run,
    node_bytes,
    placed_by_id,
    served_bytes,
    stubbed_training,
    tiny_records,
    train_stub,
)

SHAPES: dict[str, dict[str, Any]] = {
    "ranks": {"num_slices": 2, "num_sequences": 2},
    "whole": {"num_slices": 2, "blocks": "whole"},
    "encrypted": {"num_slices": 2, "num_sequences": 1, "encrypt": True},
    "core": {"num_slices": 1, "num_sequences": 1, "core": core_records()},
}
# Deletions also where shards vanish, and where a subject is in several.
MORE = {
    "experts by subject": METHODS["experts by subject"],
    "lego": {**METHODS["lego"], "num_shards": 3, "placement": placed_by_id(3, 2)},
}
VICTIM = "person 4"


def names_below(path: Path) -> list[str]:
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*"))


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> dict[str, Any]:
    return (SHAPES | MORE)[request.param]


@pytest.fixture
def reference(tmp_path: Path, shape: dict[str, Any]) -> Path:
    """A trained run to copy, so that every point starts from the same state."""
    with stubbed_training():
        train_stub(make_stub_run(tmp_path / "reference", tiny_records(), **shape))
    return tmp_path / "reference"


def test_training_survives_kill_9_at_every_point(
    reference: Path, tmp_path: Path, shape: dict[str, Any]
) -> None:
    expected = node_bytes(S3TRun.open(reference)), served_bytes(S3TRun.open(reference))
    path = tmp_path / "run"

    def prepare() -> None:
        shutil.rmtree(path, ignore_errors=True)
        make_stub_run(path, tiny_records(), **shape)

    def check() -> None:
        run = S3TRun.open(path)
        train_stub(run)
        assert (node_bytes(run), served_bytes(run)) == expected
        assert all(result.passed for result in run.verify())

    with stubbed_training():
        assert every_point(prepare, lambda: train_stub(S3TRun.open(path)), check, path) > 30


def test_creation_survives_kill_9_at_every_point(tmp_path: Path, shape: dict[str, Any]) -> None:
    path = tmp_path / "run"

    def check() -> None:
        if not (path / "run.json").exists():
            make_stub_run(path, tiny_records(), **shape)
        assert len([r for name in S3TRun.open(path).directory.slices.names
                    for r in S3TRun.open(path).directory.slices.read(name)]) == 24  # fmt: skip
        assert S3TRun.open(path).directory.ledger.check_chain() == []

    every_point(
        lambda: shutil.rmtree(path, ignore_errors=True),
        lambda: make_stub_run(path, tiny_records(), **shape) and None,
        check,
        tmp_path,
    )


@pytest.mark.parametrize("shape", [*SHAPES, *MORE], indirect=True)
def test_deletion_survives_kill_9_at_every_point(
    reference: Path, tmp_path: Path, shape: dict[str, Any]
) -> None:
    path = tmp_path / "run"
    done = tmp_path / "done"
    shutil.copytree(reference, done, symlinks=True)
    S3TRun.open(done).delete([VICTIM])
    expected = node_bytes(S3TRun.open(done)), served_bytes(S3TRun.open(done))
    records = names_below(done / "records")
    acknowledged = 0

    def check() -> None:
        nonlocal acknowledged
        run = S3TRun.open(path)
        requests = run.directory.ledger.requests()
        if requests:
            acknowledged += 1
            run.settle()  # an acknowledged request is carried out without being asked for again
        else:
            assert node_bytes(run).keys() > expected[0].keys()
            run.delete([VICTIM])
        assert (node_bytes(run), served_bytes(run)) == expected
        assert names_below(path / "records") == records
        assert len(run.directory.ledger.requests()) == 1
        assert len(list((path / "certificates").iterdir())) == 1
        assert run.delete([VICTIM]).request is None
        assert all(result.passed for result in run.verify()), [r.problems for r in run.verify()]

    prepare = lambda: copy_anew(reference, path)  # noqa: E731
    points = every_point(prepare, lambda: S3TRun.open(path).delete([VICTIM]), check, path)
    assert points > 25
    assert 0 < acknowledged < points


def test_rebuild_survives_kill_9_at_every_point(
    reference: Path, tmp_path: Path, shape: dict[str, Any]
) -> None:
    path, deleted = tmp_path / "run", tmp_path / "deleted"
    shutil.copytree(reference, deleted, symlinks=True)
    S3TRun.open(deleted).delete([VICTIM])
    with stubbed_training():
        rest = [record for record in tiny_records() if record.subject != VICTIM]
        never = make_stub_run(tmp_path / "never", rest, **shape)
        train_stub(never)

        def check() -> None:
            train_stub(S3TRun.open(path))
            assert node_bytes(S3TRun.open(path)) == node_bytes(never)
            assert served_bytes(S3TRun.open(path)) == served_bytes(never)

        prepare = lambda: copy_anew(deleted, path)  # noqa: E731
        assert every_point(prepare, lambda: train_stub(S3TRun.open(path)), check, path) > 20


@pytest.mark.parametrize("step", [1, 2])
def test_real_training_killed_in_a_step_reaches_the_same_bits(
    tiny_base: Path, tmp_path: Path, step: int, shape: dict[str, Any]
) -> None:
    class Killer:
        def __init__(self) -> None:
            self.nodes = 0

        def node(self, *_: object) -> None:
            self.nodes += 1

        def warn(self, message: str) -> None: ...

        def step(self, number: int, _total: int) -> None:
            if self.nodes == 2 and number == step:
                os.kill(os.getpid(), signal.SIGKILL)

    whole = make_run(tmp_path / "whole", tiny_base, **shape)
    make_run(tmp_path / "cut", tiny_base, train=False, **shape)
    model, tokenizer = load_tiny(tiny_base)
    work = lambda: S3TRun.open(tmp_path / "cut").train(model, tokenizer, Killer()) and None  # noqa: E731  # pyright: ignore
    assert in_child(work) is None
    cut = S3TRun.open(tmp_path / "cut")
    assert len(cut.directory.nodes.keys()) == 1
    cut.train(model, tokenizer)
    assert node_bytes(cut) == node_bytes(whole)
    assert served_bytes(cut) == served_bytes(whole)
