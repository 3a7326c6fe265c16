"""Token buckets by a clock that we turn, and what they refuse over HTTP."""

import asyncio
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_unlearn.exact.run import S3TRun
from llm_unlearn.serving.http import limits
from llm_unlearn.serving.http.auth import Tokens, add_token
from llm_unlearn.serving.http.limits import Buckets
from tests.serving.servers import NAME, Served


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_empties_and_refills() -> None:
    clock = Clock()
    buckets = Buckets(3, 60.0, clock)
    assert [buckets.take("a") for _ in range(3)] == [0, 0, 0]
    assert buckets.take("a") == pytest.approx(20.0)
    assert buckets.take("b") == 0  # another's
    clock.now += 19.9
    assert buckets.take("a") == pytest.approx(0.1)
    clock.now += 0.1
    assert buckets.take("a") == 0 and buckets.take("a") > 0
    clock.now += 1e9
    assert [buckets.take("a") == 0 for _ in range(4)] == [True, True, True, False]


def test_what_is_more_than_a_bucket_waits_for_a_full_one_and_leaves_a_debt() -> None:
    clock = Clock()
    buckets = Buckets(10, 10.0, clock)
    assert buckets.take("a", 25) == 0
    assert buckets.take("a", 1) == pytest.approx(16.0)
    clock.now += 16.0
    assert buckets.take("a", 1) == 0


def test_no_limit_and_a_limit_of_ones_own() -> None:
    buckets = Buckets(0, 60.0, Clock())
    assert all(buckets.take("a") == 0 for _ in range(1000))
    assert buckets.take("b", count=1) == 0 and buckets.take("b", count=1) > 0


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5)), max_size=60))
def test_never_more_than_what_was_refilled(steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    buckets, taken, start = Buckets(5, 50.0, clock), 0, clock.now
    for wait, amount in steps:
        clock.now += wait
        taken += amount * (buckets.take("a", amount) == 0)
    assert taken <= 5 + (clock.now - start) * 5 / 50.0 + 1e-6


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_BUCKETS", 10)
    buckets = Buckets(3, 60.0, Clock())
    for n in range(100):
        buckets.take(str(n))
    assert len(buckets.levels) == 10


def test_limits_over_http(run_path: Path, tmp_path: Path) -> None:
    path, key = tmp_path / "tokens.json", S3TRun.open(run_path).directory.key
    rights = ["ask", "delete"]
    web = add_token(path, "web", rights, ["*"], key.pseudonym)
    slow = add_token(path, "slow", rights, ["*"], key.pseudonym, 2, 1)
    clock = Clock()
    served = Served(
        run_path, Tokens(path), clock=clock,
        asks_per_minute=6, deletions_per_hour=4, requests_per_subject=2,
    )  # fmt: skip

    async def ask(token: str, url: str, body: dict[str, object]) -> httpx.Response:
        async with served.client(token) as client:
            return await client.post(url, json=body)

    def complete(token: str, n: int = 1) -> int:
        body = {"model": NAME, "prompt": "Who?", "n": n}
        return asyncio.run(ask(token, "/v1/completions", body)).status_code

    def delete(token: str, *subjects: str) -> httpx.Response:
        return asyncio.run(ask(token, "/v1/deletions", {"subjects": subjects}))

    assert [complete(web, n) for n in (4, 2, 1)] == [200, 200, 429]
    assert [complete(slow) for _ in range(3)] == [200, 200, 429]
    clock.now += 10.0
    assert [complete(web), complete(web)] == [200, 429]
    asked = len(served.engine.seen)
    assert asked == 4 + 2 + 2 + 1  # nothing of what was refused reached the engine
    # One subject, again and again; then many of them.
    assert [delete(web, "person 1").status_code for _ in range(3)] == [202, 202, 429]
    assert delete(web, "person 2").status_code == 202
    flood = delete(web, "person 3")
    assert flood.status_code == 429 and 800 < int(flood.headers["Retry-After"]) < 1000
    assert flood.json()["error"]["code"] == "too_many_deletions"
    assert delete(slow, "person 4").status_code == 202
    assert delete(slow, "person 5").status_code == 429
    assert len(served.run.ledger.requests()) == 3
