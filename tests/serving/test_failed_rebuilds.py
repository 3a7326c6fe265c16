"""When a server starts rebuilds, and what it does about one that fails."""

import logging
from pathlib import Path

import pytest

from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.serving.engine import scheduler
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
