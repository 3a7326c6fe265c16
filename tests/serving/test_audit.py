"""The audit log: every answer is in it before it leaves, and nothing in it is anybody's."""

import asyncio
import json
import os
import threading
from pathlib import Path

import httpx
import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.exact.residues import unrecognised
from llm_unlearn.serving.http.audit import AuditLog, read_audit
from llm_unlearn.serving.queries import Failure
from tests.serving.servers import NAME, Served
from tests.serving.stand_in import Trouble

SECRET = "Ada Lovelace's telephone number"


def ask(served: Served, url: str = "/v1/completions", **body: object) -> httpx.Response:
    async def send() -> httpx.Response:
        async with served.client() as client:
            return await client.post(url, json={"model": NAME} | body)

    return asyncio.run(send())


def test_what_a_line_holds(run_path: Path) -> None:
    served = Served(run_path, handling="abstain")
    served.engine.trouble = Trouble(served="clean")
    answer = ask(served, prompt=SECRET, n=2, stop=[SECRET], user=SECRET)
    vote = ask(served, "/v1/classify", prompt=SECRET, labels=[SECRET, "b"])
    served.engine.trouble = Trouble(failure=Failure("unavailable", SECRET))
    assert ask(served, prompt=SECRET).status_code == 503
    path = served.service.audit.path
    lines = read_audit(path)
    assert [line["kind"] for line in lines] == ["answer", "answer", "answer", "no answer"]
    assert {line["id"] for line in lines[:2]} == {f"{answer.json()['id']}-{n}" for n in (0, 1)}
    assert lines[2]["id"] == vote.json()["id"] and lines[2]["tally"] == [3, 0]
    first = lines[0]
    assert (first["served"], first["handling"], first["affected"]) == ("clean", "abstain", 1)
    assert first["epoch"] == served.run.ledger.count() and first["certified_tokens"] == 0
    assert first["counts"] == []
    assert lines[3]["reason"] == "unavailable"
    assert SECRET not in path.read_text() and "Ada" not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600 and unrecognised(served.run) == []


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_leaves_that_cannot_be_logged(
    run_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    served = Served(run_path)
    served.engine.trouble = Trouble(step_seconds=0.01)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        answer = ask(served, prompt="Who?", stream=stream)
        assert served.engine.is_idle()
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_audit"
    assert ask(served, prompt="Who?", stream=stream).status_code == 200


def test_a_stream_whose_end_cannot_be_logged_has_no_end(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(run_path)
    served.engine.trouble = Trouble(step_seconds=0.01)
    write = served.service.audit.write

    def fills_up(kind: str, **told: object) -> None:
        if kind == "answer":
            raise OSError(28, "No space left on device")
        write(kind, **told)

    monkeypatch.setattr(served.service.audit, "write", fills_up)
    text = ask(served, prompt="Who?", stream=True).text
    assert "no_audit" in text and "[DONE]" not in text and 'finish_reason":"' not in text
    assert read_audit(served.service.audit.path)[0]["kind"] == "stream"


def test_a_torn_line_does_not_spoil_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path, "one")
    log.write("answer", id="a")
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:10]))
    with pytest.raises(OSError, match="only 10 of"):
        log.write("answer", id="b")
    monkeypatch.undo()
    log.write("answer", id="c")
    assert [line["id"] for line in read_audit(log.path)] == ["a", "c"]
    with log.path.open("ab") as stream:
        stream.write(b'{"kind": "ans')  # killed there
    AuditLog(tmp_path, "one").write("answer", id="d")
    assert [line["id"] for line in read_audit(log.path)] == ["a", "c", "d"]


def test_lines_of_many_writers_stay_whole(tmp_path: Path) -> None:
    logs = [AuditLog(tmp_path, "one") for _ in range(2)]

    def write(number: int) -> None:
        for _ in range(100):
            logs[number % 2].write("answer", id=str(number) * 500)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in logs[0].path.read_bytes().splitlines()]
    assert len(lines) == 600 and all(len(set(line["id"])) == 1 for line in lines)


@pytest.mark.parametrize("name", ["", "..", "a/b", "../x", "a\n", "-x", "x" * 101])
def test_names_that_are_no_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="--replica"):
        AuditLog(tmp_path, name)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "serving").mkdir()
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "serving" / "audit-one.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot write the audit log"):
        AuditLog(tmp_path, "one")
