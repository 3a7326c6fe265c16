"""Deletions over HTTP: on disk before they are acknowledged, named, owned, followed to the end."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from llm_unlearn import files
from llm_unlearn.exact.ledger import Ledger
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.serving.http.auth import Tokens, add_token
from llm_unlearn.serving.http.deletions import Deletions, serves_none_of
from llm_unlearn.serving.queries import EngineState, Resident
from tests.serving.servers import Served

SUBJECTS = [f"person {n}" for n in range(12)]


@pytest.fixture
def served(run_path: Path) -> Served:
    return Served(run_path)


def call(
    served: Served, method: str, url: str, token: str | None = None, **more: Any
) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with served.client(token) as client:
            return await client.request(method, url, **more)

    return asyncio.run(ask())


def file(served: Served, token: str | None = None, **body: Any) -> httpx.Response:
    headers = body.pop("headers", {})
    return call(served, "POST", "/v1/deletions", token, json=body, headers=headers)


def test_a_deletion_is_in_the_ledger_when_it_is_answered(served: Served) -> None:
    before = served.run.ledger.count()
    answer = file(served, subjects=["person 3"], reason="withdrew", deadline="2030-01-31")
    assert answer.status_code == 202
    told = answer.json()
    (request,) = Ledger.of(served.run.path).requests()
    assert request.id == told["id"] and request.reason == "withdrew"
    assert request.deadline == 1896134400.0  # the end of that day, in UTC
    assert told["is_new"] and told["records"] == 2 and told["epoch"] > before
    assert served.engine.noticed == 1
    with pytest.raises(Exception, match="no such subject"):
        S3TRun.open(served.run.path).records_of("person 3")


def test_its_state_and_its_certificate(served: Served) -> None:
    name = file(served, subjects=["person 3"]).json()["id"]
    shown = call(served, "GET", f"/v1/deletions/{name}").json()
    assert shown["state"] == "erased" and shown["finished_at"] >= shown["acknowledged_at"]
    certificate = call(served, "GET", shown["certificate"])
    assert certificate.content == (served.run.path / "certificates" / f"{name}.json").read_bytes()
    assert call(served, "GET", "/v1/deletions/0123456789abcdef").status_code == 404
    assert call(served, "GET", "/v1/deletions/..%2F..%2Fsecret.key").status_code in (400, 404)


def test_states_follow_what_servers_hold(served: Served) -> None:
    file(served, subjects=["person 3"])
    (request,) = served.run.ledger.requests()

    def holding(
        state: Any, in_flight: int = 0, nodes: tuple[str, ...] = request.nodes
    ) -> EngineState:
        resident = Resident("shard-0@x", 0, "x", nodes, 1, state, in_flight)
        return EngineState(1, (resident,), (), (), 0, 0, 0, True)

    deletions = served.service.deletions
    assert request.nodes
    assert deletions.state(request, holding("whole")) == "acknowledged"
    assert deletions.state(request, holding("shortened")) == "acknowledged"
    assert deletions.state(request, holding("withdrawn", in_flight=1)) == "acknowledged"
    assert deletions.state(request, holding("withdrawn")) == "erased"
    assert deletions.state(request, holding("whole", nodes=("f" * 64,))) == "erased"
    assert deletions.state(request, None) == "acknowledged"  # nobody can say
    assert not serves_none_of(None, request)
    asked: list[str] = []
    several = Deletions(served.run, lambda r: bool(asked.append(r.id)))
    assert several.state(request, holding("withdrawn")) == "acknowledged" and asked == [request.id]


def test_what_the_ledger_has_not_finished_is_not_erased(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_unlearn.exact import deletion

    calls = iter([None, RuntimeError("killed")])

    def settle(run: Any) -> None:
        if error := next(calls):
            raise error

    monkeypatch.setattr(deletion, "settle", settle)
    with pytest.raises(RuntimeError):
        S3TRun(served.run).delete(["person 3"])
    (request,) = served.run.ledger.requests()
    engine = served.engine.state()
    assert served.service.deletions.state(request, engine) == "not served"
    assert served.service.deletions.count(engine) == {
        "acknowledged": 0,
        "not served": 1,
        "erased": 0,
    }


def test_asked_again_under_a_key_nothing_is_done_twice(served: Served) -> None:
    key = {"Idempotency-Key": "case 7"}
    first = file(served, subjects=["person 3"], headers=key).json()
    again = file(served, subjects=["person 3"], idempotency_key="case 7")
    assert again.status_code == 202 and again.json()["id"] == first["id"]
    assert not again.json()["is_new"] and len(served.run.ledger.requests()) == 1
    other = file(served, subjects=["person 4"], headers=key)
    assert other.status_code == 409 and other.json()["error"]["code"] == "key_used"
    two = file(served, subjects=["person 4"], headers=key, idempotency_key="case 8")
    assert two.status_code == 409 and len(served.run.ledger.requests()) == 1


def test_asked_again_without_a_key(served: Served) -> None:
    first = file(served, subjects=["person 3", "person 4"]).json()
    again = file(served, subjects=["person 4", "person 4"]).json()
    assert again["id"] == first["id"] and again["already_deleted"] == 1 and not again["is_new"]


def test_all_or_nothing_and_no_names_in_answers(served: Served) -> None:
    answer = file(served, subjects=["person 3", "PERSON 4"])
    assert answer.status_code == 404 and served.run.ledger.requests() == []
    assert "person" not in answer.text.lower().replace("permanent", "")
    assert str(served.run.path) not in answer.text


@pytest.mark.parametrize("field", ["text", "texts", "records", "data", "subject"])
def test_uploaded_text_is_never_unlearned(served: Served, field: str) -> None:
    body = {"subjects": ["person 3"], field: "Question: what does person 3 eat?"}
    answer = file(served, **body)
    assert answer.status_code == 400 and field in answer.json()["error"]["message"]
    assert served.run.ledger.requests() == []


def test_a_reason_may_not_name_the_subject(served: Served) -> None:
    answer = file(served, subjects=["person 3"], reason="for person 3")
    assert answer.status_code == 409 and served.run.ledger.requests() == []
    file(served, subjects=["person 3"], reason="two\nlines\u202e")
    assert served.run.ledger.requests()[0].reason == "two lines "


def test_near_copies_can_be_refused(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(run_path)
    from llm_unlearn.data.near_duplicates import THRESHOLD
    from llm_unlearn.exact import deletion
    from llm_unlearn.exact.near_duplicates import find_near_duplicates

    assert THRESHOLD > 0.1
    monkeypatch.setattr(
        deletion,
        "find_near_duplicates",
        lambda run, records: find_near_duplicates(run, records, 0.1),
    )
    answer = file(served, subjects=["person 3"], near_duplicates="refuse")
    assert answer.status_code == 409 and served.run.ledger.requests() == []
    warned = file(served, subjects=["person 3"], near_duplicates="warn")
    assert warned.status_code == 202 and warned.json()["near_duplicates"] > 0


def test_a_busy_run_says_when_to_try_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = files.locked
    monkeypatch.setattr(files, "locked", lambda path, holder: locked(path, holder, timeout=0.1))
    with locked(served.run.path / "state.lock", "a test"):
        answer = file(served, subjects=["person 3"])
    assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0
    assert served.run.ledger.requests() == []


def test_a_deletion_that_fails_after_its_acknowledgement_is_noticed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_unlearn.exact import deletion

    settle = deletion.settle
    troubles = iter([None, OSError(28, "No space left on device")])

    def filling(run: Any) -> None:
        if error := next(troubles):
            raise error
        settle(run)

    monkeypatch.setattr(deletion, "settle", filling)
    key = {"Idempotency-Key": "case 7"}
    assert file(served, subjects=["person 3"], headers=key).status_code == 503
    (request,) = served.run.ledger.requests(pending=True)
    assert served.engine.noticed == 1
    monkeypatch.undo()
    again = file(served, subjects=["person 3"], headers=key).json()
    assert again["id"] == request.id and again["state"] == "erased" and not again["is_new"]


def test_filings_that_wait_do_not_hold_up_queries(served: Served) -> None:
    async def both() -> list[int]:
        async with served.client() as client:
            waiting = [
                asyncio.create_task(client.post("/v1/deletions", json={"subjects": [subject]}))
                for subject in SUBJECTS * 5
            ]
            await asyncio.sleep(0.3)
            lists = await asyncio.wait_for(client.get("/v1/models"), 5)
            body = {"model": "people", "prompt": "Who?"}
            answer = await asyncio.wait_for(client.post("/v1/completions", json=body), 5)
            are_waiting = not any(task.done() for task in waiting)
            for task in waiting:
                task.cancel()
            release.set()
            return [lists.status_code, answer.status_code, int(are_waiting)]

    release = threading.Event()
    served.service.deletions.file = lambda *_: release.wait(10)  # pyright: ignore
    assert asyncio.run(both()) == [200, 200, 1]


def test_list_is_newest_first_and_in_pages(served: Served) -> None:
    names = [file(served, subjects=[subject]).json()["id"] for subject in SUBJECTS[:5]]
    first = call(served, "GET", "/v1/deletions?limit=2").json()
    assert [entry["id"] for entry in first["data"]] == names[:-3:-1] and first["has_more"]
    rest = call(served, "GET", f"/v1/deletions?limit=3&after={names[3]}").json()
    assert [entry["id"] for entry in rest["data"]] == names[2::-1] and not rest["has_more"]


def test_deletions_of_many_clients_at_once(run_path: Path) -> None:
    served = Served(run_path)

    async def flood() -> list[int]:
        async with served.client() as client:
            asked = [client.post("/v1/deletions", json={"subjects": [s]}) for s in SUBJECTS[:6] * 2]
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    assert set(asyncio.run(flood())) == {202}
    assert len(served.run.ledger.requests()) == 6


# Who may.


@pytest.fixture
def owned(run_path: Path, tmp_path: Path) -> tuple[Served, dict[str, str]]:
    path, key = tmp_path / "tokens.json", S3TRun.open(run_path).directory.key
    rights: dict[str, tuple[list[str], list[str]]] = {
        "asker": (["ask"], []),
        "ada": (["delete"], ["person 1", "person 2", "nobody"]),
        "ben": (["ask", "delete"], ["person 5"]),
        "officer": (["delete"], ["*"]),
        "operator": (["operate"], []),
    }
    tokens = {
        name: add_token(path, name, may, subjects, key.pseudonym)
        for name, (may, subjects) in rights.items()
    }
    return Served(run_path, Tokens(path)), tokens


MATRIX = {
    ("POST", "/v1/completions"): {"asker", "ben"},
    ("POST", "/v1/chat/completions"): {"asker", "ben"},
    ("POST", "/v1/classify"): {"asker", "ben"},
    ("GET", "/v1/models"): {"asker", "ben"},
    ("GET", "/v1/models/people"): {"asker", "ben"},
    ("POST", "/v1/deletions"): {"ada", "ben", "officer"},
    ("GET", "/v1/deletions"): {"ada", "ben", "officer", "operator"},
    ("GET", "/metrics"): {"operator"},
    ("GET", "/v1/residue"): {"operator"},
}
ALWAYS = ("/healthz", "/readyz", "/openapi.json")


def test_rights(owned: tuple[Served, dict[str, str]]) -> None:
    served, tokens = owned
    for (method, url), allowed in MATRIX.items():
        body = {"json": {}} if method == "POST" else {}
        for name, token in tokens.items():
            status = call(served, method, url, token, **body).status_code
            # With the right, it is the empty body that is refused.
            expected = (400 if method == "POST" else 200) if name in allowed else 403
            assert status == expected, (url, name, status)
        for wrong in (None, "", "lu-wrong", next(iter(tokens.values()))[:-1], "~" * 5000):
            answer = call(served, method, url, wrong, **body)
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"


def test_health_needs_no_token(owned: tuple[Served, dict[str, str]]) -> None:
    assert all(call(owned[0], "GET", url).status_code == 200 for url in ALWAYS)


def test_nobody_learns_of_others(owned: tuple[Served, dict[str, str]]) -> None:
    served, tokens = owned
    held = file(served, tokens["ada"], subjects=["person 5"])
    unheld = file(served, tokens["ada"], subjects=["person 99"])
    mixed = file(served, tokens["ada"], subjects=["person 1", "person 5"])
    assert held.status_code == unheld.status_code == mixed.status_code == 403
    assert held.content == unheld.content == mixed.content
    assert served.run.ledger.requests() == []
    assert (
        file(served, tokens["ada"], subjects=["nobody"]).status_code == 404
    )  # it is Ada's to know


def test_requests_of_others_are_as_unknown_as_none(owned: tuple[Served, dict[str, str]]) -> None:
    served, tokens = owned
    name = file(served, tokens["ben"], subjects=["person 5"]).json()["id"]
    for url in (f"/v1/deletions/{name}", f"/v1/deletions/{name}/certificate"):
        unknown = url.replace(name, "0" * 16)
        theirs, none = (call(served, "GET", path, tokens["ada"]) for path in (url, unknown))
        assert theirs.status_code == none.status_code == 404 and theirs.content == none.content
        assert call(served, "GET", url, tokens["ben"]).status_code == 200
        assert call(served, "GET", url, tokens["operator"]).status_code == 200
    assert call(served, "GET", "/v1/deletions", tokens["ada"]).json()["data"] == []
    assert len(call(served, "GET", "/v1/deletions", tokens["officer"]).json()["data"]) == 1
    # A request on two people is neither's of them alone.
    both = file(served, tokens["officer"], subjects=["person 1", "person 6"]).json()["id"]
    assert call(served, "GET", f"/v1/deletions/{both}", tokens["ada"]).status_code == 404


def test_copies_of_others_are_not_counted_for_strangers(
    owned: tuple[Served, dict[str, str]],
) -> None:
    served, tokens = owned
    refused = file(served, tokens["ada"], subjects=["person 1"], with_duplicates=True)
    assert refused.status_code == 403 and served.run.ledger.requests() == []
    told = file(served, tokens["ada"], subjects=["person 1"]).json()
    assert told["copies_elsewhere"] is None and told["near_duplicates"] is None
    told = file(served, tokens["officer"], subjects=["person 6"]).json()
    assert told["copies_elsewhere"] == 0


def test_what_is_kept_and_said_names_nobody(owned: tuple[Served, dict[str, str]]) -> None:
    served, tokens = owned
    file(served, tokens["ada"], subjects=["person 1"], idempotency_key="person 1 key")
    listed = call(served, "GET", "/v1/deletions", tokens["ada"])
    lines = served.service.audit.path.read_text()
    kept = (served.run.path.parent / "tokens.json").read_text()
    for text in (
        listed.text,
        lines,
        kept,
        json.dumps(call(served, "GET", "/metrics", tokens["operator"]).text),
    ):
        assert "person" not in text
    assert all(token not in kept for token in tokens.values())
