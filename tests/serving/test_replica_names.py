"""The names under which the servers of one run say how far they have followed the ledger."""

import json
import os
import time
from pathlib import Path

import pytest

from llm_unlearn.errors import RunError
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.serving.engine.replicas import FRESH_SECONDS, Replicas


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
