"""When a server starts rebuilds, and what it does about one that fails."""

import logging
import threading
from pathlib import Path

import pytest

from llm_unlearn.errors import RunError
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.serving.engine import scheduler
from llm_unlearn.serving.engine.backend import Backend
from llm_unlearn.serving.engine.scheduler import Scheduler
from llm_unlearn.serving.policy import make_policy


class Rebuild:
    code: int | None = None

    def poll(self) -> int | None:
        return self.code


def test_a_rebuild_that_fails_is_told_and_begun_again(
    run_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The query that asked for it still waits, though no other query comes."""
    started: list[Rebuild] = []

    def start(run: RunDirectory) -> Rebuild:
        started.append(Rebuild())
        return started[-1]

    monkeypatch.setattr(scheduler, "start_rebuild", start)
    affected, noticed = {7}, []
    policy = make_policy("uncertified-execute", target="retrained")
    watching = Scheduler(
        RunDirectory.open(run_path), policy, lambda: frozenset(affected), lambda: noticed.append(1)
    )
    watching.look()
    assert not started  # nobody waits
    watching.uncertified()
    watching.look()
    watching.look()
    assert len(started) == 1 and watching.is_executing
    started[0].code = 1
    with caplog.at_level(logging.WARNING):
        watching.look()
    assert "the rebuild ended with 1" in caplog.text and len(noticed) == 1
    assert len(started) == 1  # not at once
    monkeypatch.setattr(watching, "_not_before", 0.0)
    watching.look()
    assert len(started) == 2
    started[1].code = 0
    affected.clear()
    watching.look()
    assert watching.executions == 1 and watching.problem is None
    affected.add(7)
    watching.look()
    assert len(started) == 2  # nobody waits any more


def test_the_rebuild_of_another_server_is_waited_for(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more would end at once, take that one's log away and count as failed."""
    started: list[Rebuild] = []
    monkeypatch.setattr(
        scheduler, "start_rebuild", lambda run: started.append(Rebuild()) or started[-1]
    )
    run = RunDirectory.open(run_path)
    watching = Scheduler(
        run, make_policy("immediate-execute"), lambda: frozenset({7}), lambda: None
    )
    begun, ended = threading.Event(), threading.Event()

    def train() -> None:
        with RunDirectory.open(run_path).training():
            begun.set()
            ended.wait(10)

    other = threading.Thread(target=train)
    other.start()
    assert begun.wait(10)
    watching.look()
    assert not started and watching.problem is None and not watching.is_executing
    ended.set()
    other.join()
    watching.look()
    assert len(started) == 1


class Disk:
    """Heartbeats that fail while it is full."""

    is_full = True

    def beat(self, epoch: int) -> None:
        if self.is_full:
            raise RunError("no space left")


def test_a_heartbeat_that_fails_is_told_once_and_forgotten_when_it_works(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend, disk = object.__new__(Backend), Disk()
    backend.replicas = disk  # pyright: ignore[reportAttributeAccessIssue]
    backend.engine = type("Engine", (), {"followed": 3})()  # pyright: ignore[reportAttributeAccessIssue]
    backend.scheduler = type("Scheduler", (), {"problem": None})()  # pyright: ignore[reportAttributeAccessIssue]
    backend._unheard = None
    for _ in range(3):
        backend._beat_once()
    assert backend.problem == "no space left" and caplog.text.count("heartbeat") == 1
    disk.is_full = False
    backend._beat_once()
    assert backend.problem is None
