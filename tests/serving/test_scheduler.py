"""Rebuilds start when the policy says so, and not before."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.exact import deletion
from llm_unlearn.exact.base_model import load_base_of
from llm_unlearn.exact.ledger import Request, Target
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.serving.engine import scheduler as module
from llm_unlearn.serving.engine.backend import Backend
from llm_unlearn.serving.engine.scheduler import PAUSE_SECONDS, SETTLE_SECONDS, Pending, Scheduler
from llm_unlearn.serving.policy import make_policy
from tests.serving.engines import NAMES, PROMPTS, ask, generated, records_of_names
from tests.tiny import make_run

HOUR = 3600.0


class Clock:
    """Time as the scheduler knows it."""

    def __init__(self) -> None:
        self.now = 1e9

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


class Process:
    def __init__(self) -> None:
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.code


class Ledger:
    """What the scheduler asks of one."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.published: list[Any] = []

    def epoch(self) -> int:
        return len(self.asked) + len(self.published)

    def requests(self, pending: bool = False) -> list[Request]:
        return [r for r in self.asked if not (pending and r.finished_at)]

    def events(self, kind: str) -> list[Any]:
        assert kind == "served"
        return self.published


class Scene:
    """A scheduler whose run, processes and clock are made up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, policy: Any) -> None:
        self.clock, self.ledger = Clock(), Ledger()
        self.started: list[Process] = []
        self.shards: set[int] = set()
        self.noticed = 0
        monkeypatch.setattr(module, "time", self.clock)
        monkeypatch.setattr(module, "start_rebuild", self._start)
        run: Any = type(
            "Run", (), {"ledger": self.ledger, "path": tmp_path, "is_training": False}
        )()
        self.scheduler = Scheduler(
            run, policy.for_shards(8), lambda: frozenset(self.shards), self._notice
        )

    def _start(self, _run: object) -> Process:
        self.started.append(Process())
        return self.started[-1]

    def _notice(self) -> None:
        self.noticed += 1

    def delete(self, shard: int, deadline: float | None = None) -> None:
        target = Target("subject", f"{len(self.ledger.asked):064x}", shard, 0, 1)
        made = Request(f"r{len(self.ledger.asked)}", (target,), (), None, deadline=deadline)
        now = self.clock.now
        self.ledger.asked.append(replace(made, acknowledged_at=now, finished_at=now))
        self.shards.add(shard)

    def look(self, seconds: float = 0.0) -> int:
        """How many rebuilds have been started, some seconds later."""
        self.clock.now += seconds
        self.scheduler.look()
        return len(self.started)

    def end(self, code: int = 0) -> None:
        self.started[-1].code = code
        self.clock.now += 1
        if code == 0:
            self.shards.clear()
            self.ledger.published.append(type("Event", (), {"time": self.clock.now})())


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    return lambda name, **options: Scene(monkeypatch, tmp_path, make_policy(name, **options))


def test_immediate(scene: Any) -> None:
    it = scene("immediate-execute")
    assert it.look() == 0
    it.delete(1)
    assert it.look() == 1 and it.scheduler.is_executing
    it.delete(2)
    assert it.look(HOUR) == 1, "one at a time"
    it.end()
    assert it.look() == 1 and it.noticed == 1 and it.scheduler.executions == 1
    assert not it.scheduler.is_executing
    it.delete(3)
    assert it.look() == 2


@pytest.mark.parametrize("name, starts", [
    ("uncertified-execute", True), ("threshold-execute", True), ("threshold-clean", False), ("threshold-defer", False),
    ("deadline-clean", False),
])  # fmt: skip
def test_an_uncertified_answer(scene: Any, name: str, starts: bool) -> None:
    it = scene(name)
    it.scheduler.uncertified()
    assert it.look() == 0, "nothing is pending"
    it.delete(1)
    assert it.look() == 0, "what was uncertified before has nothing to do with this"
    it.scheduler.uncertified()
    assert it.look() == starts
    if starts:
        it.end()
        it.look()
        it.delete(1)
        assert it.look() == 1, "each execution needs a reason of its own"


def test_an_answer_that_the_execution_came_too_late_for(scene: Any) -> None:
    """It is published, a deletion comes, and an answer finds that out before the process has ended."""
    it = scene("uncertified-execute")
    it.delete(1)
    it.scheduler.uncertified()
    assert it.look() == 1
    it.end()
    it.delete(2)
    it.clock.now += 1
    it.scheduler.uncertified()
    assert it.look() == 2, "nobody else tells of it, and it waits"


def test_a_correction_is_rebuilt_where_its_record_went(scene: Any) -> None:
    """A record that is its own subject moves to another shard: that shard too has its deadline."""
    it = scene("deadline-clean", deadline_hours=10.0)
    it.delete(1)
    (request,) = it.ledger.asked
    moved = replace(request.targets[0], shard=5)
    it.ledger.asked = [replace(request, kind="correct", inserted=(moved,))]
    it.shards = {5}
    assert it.look(9 * HOUR - 1) == 0 and it.look(2) == 1


def test_threshold_of_shards_and_of_requests(scene: Any) -> None:
    it = scene("threshold-clean", threshold=3)
    for shard in (1, 2):
        it.delete(shard)
        assert it.look(60) == 0
    it.delete(3)
    assert it.look() == 1
    it.end()
    it.look()
    for count in range(3):
        it.clock.now += 1
        it.delete(1)
        assert it.look() == 1 + (count == 2), "three requests of one shard"


def test_deadlines(scene: Any) -> None:
    """The policy's, less a tenth; and that of one request, if it is earlier."""
    it = scene("deadline-clean", deadline_hours=10.0)
    it.delete(1)
    assert it.look(9 * HOUR - 1) == 0
    assert it.look(2) == 1
    it.end()
    it.look()
    it.delete(1, deadline=it.clock.now + 3 * HOUR)
    assert it.look(2 * HOUR - 1) == 1, "an hour is left for the execution"
    assert it.look(2) == 2
    it.end()
    it.look()
    it.delete(1, deadline=it.clock.now + 300 * HOUR)
    assert it.look(9 * HOUR - 1) == 2 and it.look(2) == 3, "a late deadline gains no time"


def test_what_came_too_late_for_an_execution_keeps_its_deadline(scene: Any) -> None:
    """Acknowledged while a rebuild was being published, which did not know of it."""
    it = scene("deadline-clean", deadline_hours=10.0)
    it.delete(1)
    assert it.look(9 * HOUR) == 1
    it.delete(2)
    it.clock.now += 1
    it.end()
    it.shards.add(2)
    assert it.look() == 1
    assert it.look(8 * HOUR) == 1 and it.look(HOUR) == 2


def test_a_rebuild_that_fails_is_not_repeated_without_end(scene: Any) -> None:
    it = scene("immediate-execute")
    it.delete(1)
    assert it.look() == 1
    it.end(code=1)
    assert it.look() == 1 and "ended with 1" in it.scheduler.problem
    assert it.look(PAUSE_SECONDS - 1) == 1
    assert it.look(2) == 2
    it.end()
    it.look()
    assert it.scheduler.problem is None and it.scheduler.executions == 1


def test_pending_counts_what_reaches_affected_shards() -> None:
    policy, at = make_policy("deadline-clean"), 1e9
    asked = [
        Request(f"{shard}", (Target("subject", "0", shard, 0, 1),), (), None, acknowledged_at=at + shard)
        for shard in range(4)
    ]  # fmt: skip
    assert Pending.of(asked, frozenset(), 0.0, policy) == Pending(0, 0.0)
    assert Pending.of(asked, frozenset({1, 3}), 0.0, policy).requests == 2
    assert Pending.of(asked, frozenset({1, 3}), at + 2, policy).requests == 1
    assert Pending.of(asked, frozenset({1}), at + 2, policy).requests == 1


def test_what_a_dead_process_acknowledged_is_carried_out(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, noticed = S3TRun.open(run_path), []

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    calls = iter([deletion.settle, die])
    with monkeypatch.context() as patched:
        patched.setattr(deletion, "settle", lambda directory: next(calls)(directory))
        with pytest.raises(KeyboardInterrupt):
            run.delete(["person 3"])
    (request,) = run.directory.ledger.requests(pending=True)
    clock = Clock()
    clock.now = (request.acknowledged_at or 0.0) + SETTLE_SECONDS - 1
    monkeypatch.setattr(module, "time", clock)
    policy = make_policy("deadline-clean").for_shards(3)
    it = Scheduler(run.directory, policy, lambda: frozenset(), lambda: noticed.append(1))
    it.look()
    assert run.directory.ledger.requests(pending=True) and not noticed, "who asked may live"
    clock.now += 2
    it.look()
    assert not run.directory.ledger.requests(pending=True) and noticed == [1]


def test_an_error_does_not_end_the_watch(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    it = scene("immediate-execute")
    calls = []

    def fail() -> None:
        calls.append(1)
        if len(calls) == 2:
            it.scheduler._is_closed = True
        raise UserError("a certificate cannot be written")

    monkeypatch.setattr(it.scheduler, "look", fail)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
    it.scheduler._loop()
    assert len(calls) == 2 and "certificate" in it.scheduler.problem


@pytest.mark.slow
def test_the_answer_comes_after_the_rebuild(tiny_base: Path, tmp_path: Path) -> None:
    """With the real process: what cannot be certified starts it, waits for it, and is what it says."""
    run = make_run(
        tmp_path / "run", tiny_base, records_of_names(), exact_method="experts", num_shards=3, num_slices=1,
        num_sequences=1, aggregate="select", max_steps=6, learning_rate=3e-2,
    )  # fmt: skip
    backend = Backend(run, make_policy("uncertified-execute", target="retrained"))
    try:
        run.delete([NAMES[3]])
        backend.engine.notice()
        answers = [ask(backend.engine, p, str(i), max_tokens=8) for i, p in enumerate(PROMPTS)]
        for one in answers:
            assert one.done.wait(200), backend.scheduler.problem
        said = [one.wait() for one in answers]
        end = time.monotonic() + 60  # what is served is there before its process has ended
        while backend.scheduler.is_executing and time.monotonic() < end:
            time.sleep(0.05)
        assert backend.scheduler.executions == 1 and not backend.engine.state().affected
    finally:
        backend.close()
    assert "executed" in {answer.served for answer in said}
    assert {answer.served for answer in said} <= {"executed", "certified"}
    tokenizer = load_base_of(run.directory)[1]
    assert [answer.text for answer in said] == generated(run.ensemble(), tokenizer, PROMPTS, 8)
