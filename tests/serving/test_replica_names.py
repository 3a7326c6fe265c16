"""The names under which the servers of one run say how far they have followed the ledger."""

import json
import os
import time
from pathlib import Path

import pytest

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.serving.engine import backend
from llm_unlearn.serving.engine.replicas import FRESH_SECONDS, Replicas
from llm_unlearn.serving.policy import make_policy


@pytest.fixture
def run(run_path: Path) -> RunDirectory:
    return RunDirectory.open(run_path)


def change(replicas: Replicas, **fields: object) -> None:
    path = replicas.folder / f"{replicas.id}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_two_live_servers_may_not_share_a_name(run: RunDirectory) -> None:
    """The one that ends would take the other's heartbeat along, and nobody would wait for its memory."""
    first, second = Replicas(run, "one"), Replicas(run, "one")
    first.claim()
    first.beat(3)
    change(first, pid=os.getppid())
    with pytest.raises(RunError, match="--replica one is a server that runs"):
        second.claim()
    Replicas(run, "two").claim()
    change(first, host="elsewhere", pid=1)
    with pytest.raises(RunError, match="on elsewhere"):
        second.claim()


@pytest.mark.parametrize(
    "left",
    [
        {"pid": 2**22 + 1},
        {"pid": os.getpid()},
        {"host": "elsewhere", "beat": time.time() - FRESH_SECONDS - 1},
    ],
    ids=["killed", "this one", "ended elsewhere"],
)
def test_a_name_is_free_after_its_server(run: RunDirectory, left: dict[str, object]) -> None:
    replicas = Replicas(run, "one")
    replicas.beat(3)
    change(replicas, **left)
    replicas.claim()


def test_a_server_that_starts_counts_before_it_has_loaded_anything(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deletion that comes meanwhile is not served out before its memory follows; one that fails leaves nothing."""
    run, seen = S3TRun.open(run_path), []
    others = Replicas(run.directory, "other")

    def load(_: RunDirectory) -> None:
        run.delete(["person 3"])
        seen.extend(others.have_left(request) for request in run.directory.ledger.requests())
        raise UserError("the base model is away")

    monkeypatch.setattr(backend, "load_base_of", load)
    with pytest.raises(UserError, match="away"):
        backend.Backend(run, make_policy(), name="one")
    assert seen == [False]
    assert not others.beats()
