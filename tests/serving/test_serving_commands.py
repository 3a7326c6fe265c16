"""`llm-unlearn serve` and `llm-unlearn token`, as a person and a machine see them."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.cli import serving
from llm_unlearn.serving.http import starting
from llm_unlearn.serving.http.auth import Tokens, read_tokens, tokens_path
from llm_unlearn.serving.http.running import bind
from llm_unlearn.serving.http.starting import Place, Started, default_replica, find_tokens
from tests.saying import Say, one_line
from tests.serving.stand_in import StandIn


@pytest.fixture
def opened_with(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A server that stops as soon as it is ready, with the stand-in engine; what it was opened with."""
    calls: list[dict[str, Any]] = []

    def load(run: object, policy: object, replica: str, most: int, waiting: int) -> Any:
        calls.append({"policy": policy, "max_batch": most, "max_waiting": waiting})
        return starting.Opened(StandIn(), str)

    monkeypatch.setattr(starting, "open_run", load)

    class Stopping(starting.Server):
        def _is_open(self, opened: Any) -> None:
            super()._is_open(opened)
            self._leave()

    monkeypatch.setattr(starting, "Server", Stopping)
    return calls


def test_what_a_server_says_when_it_is_ready(
    say: Say, run_path: Path, opened_with: list[dict[str, Any]]
) -> None:
    said = say("serve", run_path, "--port", 0, "--max_batch", 3, "--max-waiting", 5, "--drain", 1)
    assert said.code == 0, said.err
    assert opened_with[0]["max_batch"] == 3 and opened_with[0]["max_waiting"] == 5
    assert "serving" in said.out and "http://127.0.0.1:" in said.out
    assert "policy threshold-clean" in said.out and "curl http" in said.out
    assert "no tokens" in said.err
    say("token", "add", run_path, "--name", "web", "--right", "ask")
    said = say("serve", run_path, "--port", 0, "--policy", "serve-anyway", "--name", "mine")
    assert "no tokens" not in said.err and "deleted data" in said.err
    assert "Bearer TOKEN" in said.out and '"model": "mine"' in said.out


def test_json(say: Say, run_path: Path, opened_with: list[dict[str, Any]]) -> None:
    told = json.loads(say("serve", run_path, "--port", 0, "--json", "--replica", "one").out)
    assert told["url"].startswith("http://127.0.0.1:") and told["policy"] == "threshold-clean"
    assert told["audit"].endswith("serving/audit-one.jsonl") and told["model"] == "run"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--host", "0.0.0.0"], 2, "there are no tokens"),
        (["--policy", "best"], 2, "--policy"),
        (["--constant-time", "1", "--handling", "execute"], 2, "wait for a rebuild"),
        (["--constant-time", "1", "--policy", "threshold-abstain"], 2, "--handling clean"),
        (["--constant-time", "0"], 2, "--constant-time"),
        (["--timeout", "0"], 2, "--timeout"),
        (["--tls-key", "key.pem"], 2, "go together"),
        (["--replica", "../x"], 2, "--replica"),
        (["--tokens", "missing.json"], 2, "missing.json"),
        (["--name", ""], 2, "--name"),
        (["--host", "no-such-host.invalid"], 2, "no tokens"),
    ],
)
def test_what_is_refused(
    say: Say,
    run_path: Path,
    opened_with: list[dict[str, Any]],
    options: list[str],
    code: int,
    words: str,
) -> None:
    assert words in one_line(say("serve", run_path, "--port", 0, *options), code)
    assert opened_with == []


def test_a_port_in_use_is_one_line(say: Say, run_path: Path, opened_with: list[Any]) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in one_line(say("serve", run_path, "--port", port), 1)
    assert "is not a run" in one_line(say("serve", run_path.parent / "none"), 2)


def test_without_the_packages(say: Say, run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    assert 'pip install "llm-unlearn[serve]"' in one_line(say("serve", run_path), 2)


def test_tokens_from_the_command_line(say: Say, run_path: Path) -> None:
    path = tokens_path(run_path)
    given = say("token", "add", run_path, "--name", "web", "--right", "ask", "--right", "delete",
                "--subject", "person 1").out.strip()  # fmt: skip
    holder = Tokens(path).holder(given)
    assert holder is not None and holder.rights == ("ask", "delete") and len(holder.subjects) == 1
    assert "person" not in path.read_text()
    told = json.loads(
        say("token", "add", run_path, "--name", "ops", "--right", "operate", "--json").out
    )
    assert Tokens(path).holder(told["token"]) is not None
    listed = say("token", "list", run_path).out
    assert "web: ask, delete, may delete 1 subject;" in listed and "ops: operate" in listed
    assert given not in listed and holder.sha256 not in say("token", "list", run_path, "--json").out
    assert say("token", "revoke", run_path, "--name", "web").code == 0
    assert [token.name for token in read_tokens(path)] == ["ops"]
    assert "no token 'web'" in one_line(say("token", "revoke", run_path, "--name", "web"), 2)
    assert "expected ask" in one_line(
        say("token", "add", run_path, "--name", "x", "--right", "all"), 2
    )


def test_who_may_listen_without_tokens(run_path: Path) -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert find_tokens(run_path, Place(host)).are_missing
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com", "localhost.example.com"):
        with pytest.raises(Exception, match="there are no tokens"):
            find_tokens(run_path, Place(host))


def test_a_replica_has_a_name_that_stays() -> None:
    assert default_replica(8000) == default_replica(8000) != default_replica(8001)
    assert Started("u", "m", "r", None, "a", False, True).to_dict()["replica"] == "r"
