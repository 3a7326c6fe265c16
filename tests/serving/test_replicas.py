"""Several servers of one run: each says how far it has followed the ledger, and none answers with less."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.exact.postgresql import Address
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.serving.engine import replicas as module
from llm_unlearn.serving.engine.replicas import Replicas
from tests.serving.engines import NAMES, PROMPTS, Answer, ask, records_of_names, serving
from tests.tiny import make_run


def write(folder: Path, name: str, **changes: Any) -> None:
    """What another server says."""
    said = {"id": name, "host": "elsewhere", "pid": 7, "beat": 0.0, "epoch": 0}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(said | changes))


def test_servers_come_and_go(run_path: Path) -> None:
    run = S3TRun.open(run_path).directory
    first, second = Replicas(run, "first"), Replicas(run)
    assert first.epoch() is None and first.beats() == []
    first.beat(3)
    second.beat(5)
    assert first.epoch() == second.epoch() == 3
    assert {beat.id for beat in first.beats()} == {"first", second.id}
    assert {beat.pid for beat in first.beats()} == {os.getpid()}
    assert (first.folder / "first.json").stat().st_mode & 0o777 == 0o600
    first.beat(9)
    assert first.epoch() == 5
    second.leave()
    second.leave()
    assert first.epoch() == 9


def test_a_dead_server_is_forgotten_and_a_silent_one_is_not(run_path: Path) -> None:
    replicas = Replicas(S3TRun.open(run_path).directory, "me")
    replicas.beat(9)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    write(replicas.folder, "dead", host=socket.gethostname(), pid=child.pid, epoch=1)
    assert replicas.epoch() == 9 and not (replicas.folder / "dead.json").exists()
    write(replicas.folder, "silent", pid=child.pid, epoch=4)  # on another host: nobody can say
    assert replicas.epoch() == 4 and (replicas.folder / "silent.json").exists()


@pytest.mark.parametrize("garbage", [
    b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"{}", b'{"id": "x"}', b"[" * 100_000,
    json.dumps({"id": "x", "host": socket.gethostname(), "pid": "1", "beat": 0, "epoch": 0}).encode(),
    json.dumps({"id": "x", "host": socket.gethostname(), "pid": 1 << 80, "beat": 0, "epoch": 0}).encode(),
    json.dumps({"id": "x", "host": "a", "pid": 1, "beat": 0, "epoch": "0"}).encode(),
    json.dumps({"id": "x", "host": "a", "pid": 1, "beat": 0, "epoch": None}).encode(),
    json.dumps({"id": "x", "host": "a", "pid": 1, "beat": 0, "epoch": 0, "more": 1}).encode(),
])  # fmt: skip
def test_what_is_no_heartbeat_is_nobody(run_path: Path, garbage: bytes) -> None:
    replicas = Replicas(S3TRun.open(run_path).directory, "me")
    replicas.beat(2)
    (replicas.folder / "x.json").write_bytes(garbage)
    assert replicas.epoch() == 2


def test_a_request_has_left_when_the_last_server_follows(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", -1.0)
    run = S3TRun.open(run_path)
    run.delete(["person 3"])
    (request,) = run.directory.ledger.requests()
    (event,) = run.directory.ledger.events("request")
    replicas = Replicas(run.directory, "me")
    assert replicas.have_left(request), "nobody serves"
    replicas.beat(run.directory.ledger.epoch())
    assert replicas.have_left(request)
    write(replicas.folder, "other", epoch=event.sequence)
    assert not replicas.have_left(request), "it knows what was before the request"
    write(replicas.folder, "other", epoch=event.sequence + 1)
    assert replicas.have_left(request)
    run.delete(["person 5"])
    later = run.directory.ledger.requests()[-1]
    assert not replicas.have_left(later) and replicas.have_left(request)


@pytest.fixture(params=["sqlite", "postgresql"])
def people(request: pytest.FixtureRequest, tiny_base: Path, tmp_path: Path, monkeypatch) -> S3TRun:
    """An expert for each, so that who is there shows in the text."""
    if request.param == "postgresql":
        from llm_unlearn.exact.store import RunDirectory

        address = Address.new(request.getfixturevalue("postgresql").url())
        create = RunDirectory.create
        monkeypatch.setattr(
            RunDirectory, "create", lambda *a, **o: create(*a, **o | {"ledger": address})
        )
    return make_run(
        tmp_path / "people", tiny_base, records_of_names(), exact_method="experts", num_shards=0,
        num_slices=1, num_sequences=1, aggregate="select", max_steps=10, learning_rate=3e-2,
    )  # fmt: skip


def test_two_servers_of_one_run(people: S3TRun) -> None:
    """Deletions are filed while both answer: no answer that begins afterwards, at either, knows who it was."""
    deleted, stop = 0, threading.Event()
    seen: list[tuple[int, int, Answer]] = []
    with serving(people) as one, serving(S3TRun.open(people.path)) as other:
        known = [ask(one, prompt, max_tokens=8).wait().text for prompt in PROMPTS]
        assert [ask(other, prompt, max_tokens=8).wait().text for prompt in PROMPTS] == known

        def client(engine: Any) -> None:
            while not stop.is_set():
                for place, prompt in enumerate(PROMPTS):
                    before = deleted
                    answer = ask(engine, prompt, max_tokens=8).wait()
                    seen.append((place, before, answer))

        threads = [threading.Thread(target=client, args=(engine,)) for engine in (one, other)]
        for thread in threads:
            thread.start()
        for name in NAMES[:4]:
            people.delete([name])
            deleted += 1
            time.sleep(0.4)
        stop.set()
        for thread in threads:
            thread.join()
        answers = [
            [ask(e, prompt, max_tokens=8).wait() for prompt in PROMPTS] for e in (one, other)
        ]
        states = [e.state() for e in (one, other)]
    assert len(seen) > 20
    for place, before, answer in seen:
        if place < before:
            assert answer.text != known[place], f"{NAMES[place]} was deleted before it was asked"
    assert [a.text for a in answers[0]] == [a.text for a in answers[1]]
    assert [a.text for a in answers[0]][4:] == known[4:]
    assert states[0].epoch == states[1].epoch == people.directory.ledger.epoch()
    names = [{resident.name for resident in state.residents} for state in states]
    assert names[0] == names[1] and len(names[0]) == len(NAMES) - 4
