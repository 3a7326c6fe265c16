"""What nobody in good faith sends: no 5xx, no traceback, nothing repeated, nothing done."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.servers import NAME, Served

COMPLETE, CHAT, CLASSIFY, DELETE = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/classify",
    "/v1/deletions",
)
GOOD: dict[str, dict[str, Any]] = {
    COMPLETE: {"model": NAME, "prompt": "Who?"},
    CHAT: {"model": NAME, "messages": [{"role": "user", "content": "Who?"}]},
    CLASSIFY: {"prompt": "Who?", "labels": ["yes", "no"]},
    DELETE: {"subjects": ["person 99"]},
}
BAD: list[tuple[str, dict[str, Any]]] = [
    *[(COMPLETE, {"temperature": value}) for value in (float("nan"), float("inf"), -1, 3, "1", True, 10**400)],
    *[(COMPLETE, {"top_p": value}) for value in (0, -0.5, 1.5, float("nan"), None.__class__.__name__)],
    *[(COMPLETE, {"max_tokens": value}) for value in (-5, 0, 1.5, "9", 10**30, True)],
    *[(COMPLETE, {"seed": value}) for value in (0.5, "1", True)],
    *[(COMPLETE, {"n": value}) for value in (0, 17, -1)],
    *[(COMPLETE, {"prompt": value}) for value in ("", [], [[1, 2]], [1], None, "\ud800", ["x"] * 65, {"a": 1})],
    *[(COMPLETE, {"stop": value}) for value in (["x"] * 100_000, [""], "", "y" * 201, 7)],
    *[(COMPLETE, {"logprobs": 1}), (COMPLETE, {"echo": True}), (COMPLETE, {"best_of": 2})],
    *[(COMPLETE, {"suffix": "x"}), (COMPLETE, {"logit_bias": {"1": 5}}), (COMPLETE, {"model": ["x"]})],
    *[(COMPLETE, {"presence_penalty": 0.5}), (COMPLETE, {"stream": "yes"}), (COMPLETE, {"\x00": 1})],
    *[(CHAT, {"messages": value}) for value in ([], "hello", [{}], [{"role": "tool", "content": "x"}])],
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]}),
    (CHAT, {"tools": [{"type": "function"}]}),
    (CHAT, {"response_format": {"type": "json_object"}}),
    *[(CLASSIFY, {"labels": value}) for value in ([], ["a"], ["a", "a"], ["a"] * 10_000, ["", "b"], [1, 2])],
    (CLASSIFY, {"messages": [{"role": "user", "content": "x"}]}),
    (CLASSIFY, {"labels": [f"label {n}" for n in range(10_000)]}),
    *[(DELETE, {"subjects": value}) for value in ([], "person 1", [""], [1], ["\udfff"], ["x"] * 1001, [None])],
    *[(DELETE, {"deadline": value}) for value in ("soon", 12345, "2026-13-01", "9" * 5000, True)],
    *[(DELETE, {"reason": value}) for value in ("x" * 201, 5, ["x"])],
    *[(DELETE, {"idempotency_key": value}) for value in ("", "k" * 256, 5)],
    *[(DELETE, {"near_duplicates": "all"}), (DELETE, {"with_duplicates": "yes"})],
]  # fmt: skip


@pytest.fixture(scope="module")
def served(trained_run: Path) -> Served:
    """Nothing in here may change the run, so all may share it."""
    return Served(trained_run, most_body=4_000_000)


def send(served: Served, url: str, **more: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with served.client() as client:
            return await client.post(url, **more)

    return asyncio.run(ask())


def check_refused(answer: httpx.Response, *statuses: int) -> str:
    assert answer.status_code in statuses, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"} and "Traceback" not in answer.text
    assert 0 < len(error["message"]) < 1000
    return error["message"]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_wrong_values_are_refused(served: Served, case: int) -> None:
    url, wrong = BAD[case]
    seen = len(served.engine.seen)
    content = json.dumps(GOOD[url] | wrong)
    answer = send(served, url, content=content, headers={"Content-Type": "application/json"})
    check_refused(answer, 400)
    assert len(served.engine.seen) == seen and served.run.ledger.requests() == []


def test_the_good_ones_are_answered(served: Served) -> None:
    """So that what is refused above is refused for what was changed."""
    statuses = {url: send(served, url, json=body).status_code for url, body in GOOD.items()}
    assert statuses == {COMPLETE: 200, CHAT: 200, CLASSIFY: 200, DELETE: 404}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b'"text"', b"1" * 5000, b"[" * 200_000, b'{"a":' * 100_000,
     b'{"model": 1e999}', b'{"prompt": "x", "prompt": 3}'],
)  # fmt: skip
def test_what_is_no_such_json(served: Served, content: bytes) -> None:
    answer = send(served, COMPLETE, content=content, headers={"Content-Type": "application/json"})
    check_refused(answer, 400)


def test_other_types_of_content(served: Served) -> None:
    """A page elsewhere can send text/plain without asking first; it is not read as JSON."""
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
    ):
        content = json.dumps(GOOD[DELETE])
        check_refused(send(served, DELETE, content=content, headers={"Content-Type": kind}), 400)


def test_huge_bodies_with_and_without_a_length(served: Served) -> None:
    huge = json.dumps(GOOD[COMPLETE] | {"prompt": "x" * 5_000_000}).encode()
    headers = {"Content-Type": "application/json"}
    check_refused(send(served, COMPLETE, content=huge, headers=headers), 413)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(huge), 100_000):
            yield huge[start : start + 100_000]

    check_refused(send(served, COMPLETE, content=chunks(), headers=headers), 413)


def test_a_million_stops(served: Served) -> None:
    body = GOOD[COMPLETE] | {"stop": ["x"] * 1_000_000}
    check_refused(send(served, COMPLETE, json=body), 400, 413)


@pytest.mark.parametrize(
    "key", ["x\r\nSet-Cookie: a=b", "k" * 300, "", "\x00", "a\nb", "'; DROP TABLE requests; --"]
)
def test_header_injection(served: Served, key: str) -> None:
    answer = send(served, DELETE, json=GOOD[DELETE], headers={"Idempotency-Key": key})
    check_refused(answer, 400, 404)
    assert "set-cookie" not in answer.headers and served.run.ledger.requests() == []


@pytest.mark.parametrize("url", ["/", "/v1", "/v1/unknown", "/docs", "/v1/deletions/x", "/v1/models/%00",
    "/v1/deletions?limit=-1", "/v1/deletions?limit=x", "/v1/deletions?after=..%2F", "/metrics/../etc"])  # fmt: skip
def test_addresses(served: Served, url: str) -> None:
    async def ask() -> httpx.Response:
        async with served.client() as client:
            return await client.get(url)

    check_refused(asyncio.run(ask()), 400, 404)


def test_methods(served: Served) -> None:
    async def ask() -> list[httpx.Response]:
        async with served.client() as client:
            return [
                await client.request(method, COMPLETE)
                for method in ("GET", "PUT", "DELETE", "TRACE")
            ]

    for answer in asyncio.run(ask()):
        check_refused(answer, 405)
        assert "POST" in answer.headers["Allow"]


def test_odd_text_that_is_text(served: Served) -> None:
    for text in (
        "\x00",
        "\u202e\u0000",
        "👩‍👩‍👧",
        "\uffff",
        " ",
        "\N{COMBINING ACUTE ACCENT}" * 1000,
    ):
        assert send(served, COMPLETE, json=GOOD[COMPLETE] | {"prompt": text}).status_code == 200


def test_other_names_and_other_pages(trained_run: Path) -> None:
    served = Served(trained_run, allowed_hosts=("127.0.0.1", "localhost", "::1"))

    def ask(host: str, origin: str | None = None) -> int:
        headers = {"Host": host} | ({"Origin": origin} if origin else {})
        return send(served, COMPLETE, json=GOOD[COMPLETE], headers=headers).status_code

    assert [ask(host) for host in ("localhost:8000", "127.0.0.1", "[::1]:8000")] == [200] * 3
    assert [
        ask(host)
        for host in ("evil.example", "localhost.evil.example", "", "[::1", "127.0.0.1@evil")
    ] == [403] * 5
    assert ask("localhost:8000", "http://localhost:8000") == 200
    assert ask("localhost:8000", "http://localhost:8888") == 403
    assert ask("localhost:8000", "https://evil.example") == ask("localhost:8000", "null") == 403


def test_what_is_wrong_is_said_in_words(served: Served) -> None:
    """And not in pydantic's names for the types of a field."""
    for wrong, words in [
        ({"prompt": ""}, "prompt: String should have at least 1 character"),
        ({"suffix": "x"}, "suffix: this server supports only null"),
        ({"stop": ["x"] * 5}, "stop: List should have at most 4 items"),
    ]:
        message = check_refused(send(served, COMPLETE, json=GOOD[COMPLETE] | wrong), 400)
        assert words in message and "constrained" not in message
    late = check_refused(send(served, DELETE, json=GOOD[DELETE] | {"deadline": "soon"}), 400)
    assert late == "deadline: expected text in ISO 8601, such as 2026-12-31"
    kind = {"Content-Type": "application/json"}
    assert (
        check_refused(send(served, COMPLETE, content=b"{", headers=kind), 400) == "body: not JSON"
    )
    assert "Content-Type" in check_refused(send(served, COMPLETE, content=b"{}"), 400)
