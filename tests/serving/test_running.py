"""A server's life: loading, load, draining, the end; and what its numbers and times say."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import httpx
import openai
import pytest
from starlette.types import Receive, Scope, Send

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact.ledger import Ledger
from llm_unlearn.serving.http.api import make_app
from llm_unlearn.serving.http.refusals import LastResort
from llm_unlearn.serving.http.running import Server, bind
from tests.serving.servers import NAME, Served, address_of
from tests.serving.stand_in import RESIDENTS, Trouble

ROOT = Path(__file__).parents[2]
COMPLETE, BODY = "/v1/completions", {"model": NAME, "prompt": "Who?"}


def get(served: Served, url: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with served.client() as client:
            return await client.get(url)

    return asyncio.run(ask())


def test_while_the_model_is_loaded(run_path: Path) -> None:
    served, may_load, ready = Served(run_path), threading.Event(), threading.Event()
    listening = bind("127.0.0.1", 0)
    url = address_of(listening)

    def opening():
        assert may_load.wait(20)
        return served.opened()

    server = Server(served.service, opening, ready.set)
    thread = threading.Thread(target=server.run_on, args=(listening,))
    thread.start()
    try:
        with httpx.Client(base_url=url, timeout=10) as client:
            assert client.get("/healthz").status_code == 200
            assert client.get("/readyz").json() == {"status": "loading"}
            refused = client.post(COMPLETE, json=BODY)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "loading"
            # Nobody need wait for a model to be deleted; whether it is served, nobody can say yet.
            filed = client.post("/v1/deletions", json={"subjects": ["person 3"]})
            assert filed.status_code == 202 and filed.json()["state"] == "acknowledged"
            may_load.set()
            assert ready.wait(10)
            assert client.get("/readyz").status_code == 200
            assert client.post(COMPLETE, json=BODY).status_code == 200
            assert client.get(f"/v1/deletions/{filed.json()['id']}").json()["state"] == "erased"
    finally:
        server.handle_exit(15, None)
        thread.join(20)


def test_a_model_that_cannot_be_loaded_ends_the_server(run_path: Path) -> None:
    def opening():
        raise UserError("the base model is not there")

    server = Server(Served(run_path).service, opening, lambda: None)
    with pytest.raises(UserError, match="not there"):
        server.run_on(bind("127.0.0.1", 0))


def test_a_certificate_that_is_none(run_path: Path, tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("no certificate")
    for key in (tmp_path / "x.pem", tmp_path / "missing"):
        with pytest.raises(UserError, match="cannot be used: expected PEM"):
            Server(Served(run_path).service, Served, lambda: None, (tmp_path / "x.pem", key))


def test_a_port_that_is_taken() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(RunError, match="in use") as caught:
        bind("127.0.0.1", taken.getsockname()[1])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot listen"):
        bind("no-such-host.invalid", 8000)


def test_shutdown_finishes_what_runs(run_path: Path) -> None:
    served = Served(run_path, drain=10.0)
    served.engine.trouble = Trouble(step_seconds=0.1)
    answers: list[int] = []
    with served.listening() as url, httpx.Client(base_url=url, timeout=20) as client:
        stream = threading.Thread(
            target=lambda: answers.append(
                sum(chunk.choices[0].text.count(" ") for chunk in openai.OpenAI(
                    base_url=f"{url}/v1", api_key="x").completions.create(**BODY, stream=True))  # pyright: ignore
            )
        )  # fmt: skip
        plain = threading.Thread(
            target=lambda: answers.append(
                httpx.post(url + COMPLETE, json=BODY, timeout=20).status_code
            )
        )
        stream.start()
        plain.start()
        while served.engine.state().running < 2:
            time.sleep(0.01)
        assert client.get("/readyz").status_code == 200
        served.stop()
        assert client.get("/readyz").json() == {"status": "draining"}
        late = client.post(COMPLETE, json=BODY)
        assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
        stream.join(20)
        plain.join(20)
    assert sorted(answers) == [8, 200]


def test_shutdown_tells_those_it_cannot_finish(run_path: Path) -> None:
    served = Served(run_path, drain=0.3)
    served.engine.trouble = Trouble(never_answers=True)
    statuses: list[int] = []
    with served.listening() as url:
        asking = threading.Thread(
            target=lambda: statuses.append(
                httpx.post(url + COMPLETE, json=BODY, timeout=20).status_code
            )
        )
        asking.start()
        while not served.engine.state().running:
            time.sleep(0.01)
    asking.join(10)
    assert statuses == [503]


def test_shutdown_waits_for_no_body(
    run_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(run_path)
    head = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{"
    with (
        served.listening() as url,
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), 10) as slow,
    ):
        slow.sendall(head.encode())
        time.sleep(0.3)
        begin = time.monotonic()
        served.stop()
        assert b" 503 " in slow.recv(1000) and time.monotonic() - begin < 3
    assert time.monotonic() - begin < 3
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_a_client_that_is_given_up_at_the_end_leaves_no_traceback() -> None:
    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    async def end() -> None:
        task = asyncio.ensure_future(LastResort(never)({"type": "http"}, None, None))  # pyright: ignore
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    asyncio.run(end())


def test_a_hundred_clients_and_a_full_queue(run_path: Path) -> None:
    served = Served(run_path)
    served.engine.max_waiting = 10
    served.engine.trouble = Trouble(step_seconds=0.005)

    async def crowd(url: str) -> list[int]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client:
            answers = await asyncio.gather(*(client.post(COMPLETE, json=BODY) for _ in range(100)))
        for answer in answers:
            assert answer.status_code != 429 or int(answer.headers["Retry-After"]) >= 1
        return [answer.status_code for answer in answers]

    with served.listening() as url:
        counts = Counter(asyncio.run(crowd(url)))
        assert set(counts) == {200, 429} and counts[200] >= 14
        assert served.engine.is_idle() and len(served.engine.seen) == counts[200]
        # And with patience, everybody gets an answer.
        served.engine.max_waiting = 100
        assert asyncio.run(crowd(url)) == [200] * 100


def test_numbers(run_path: Path) -> None:
    served = Served(run_path)

    async def use() -> str:
        async with served.client() as client:
            await client.post(COMPLETE, json=BODY | {"n": 2, "max_tokens": 3})
            served.engine.trouble = Trouble(served="refused", finish="uncertified")
            await client.post(COMPLETE, json=BODY)
            served.engine.trouble = Trouble(is_full=True)
            await client.post(COMPLETE, json=BODY)
            await client.post("/v1/deletions", json={"subjects": ["person 1"]})
            return (await client.get("/metrics")).text

    lines = asyncio.run(use()).splitlines()
    expected = [
        'llm_unlearn_answers_total{finish="length",served="certified"} 2.0',
        'llm_unlearn_answers_total{finish="uncertified",served="refused"} 1.0',
        'llm_unlearn_rejected_total{reason="queue_full"} 1.0',
        'llm_unlearn_answer_seconds_count{served="certified"} 2.0',
        'llm_unlearn_tokens_total{kind="certified"} 6.0',
        'llm_unlearn_deletions{state="erased"} 1.0',
        f"llm_unlearn_epoch {served.run.ledger.count()}.0",
        "llm_unlearn_ready 1.0",
    ]
    assert [line for line in expected if line not in lines] == []


def test_a_run_that_cannot_be_read(
    run_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its ledger's server is down, say: 503, and the numbers that are known all the same."""
    served = Served(run_path)

    def away(*_: object, **__: object) -> NoReturn:
        raise RunError("the ledger cannot be reached")

    for name in ("epoch", "requests", "count"):
        monkeypatch.setattr(Ledger, name, away)
    served.engine.read_epoch = lambda: 1
    told = get(served, "/v1/deletions")
    assert told.status_code == 503 and int(told.headers["Retry-After"]) > 0
    assert told.json()["error"]["code"] == "run_busy" and "ledger" not in told.text
    assert "cannot be reached" in caplog.text and "Traceback" not in caplog.text
    numbers = get(served, "/metrics")
    assert numbers.status_code == 200
    assert "llm_unlearn_ledger_readable 0.0" in numbers.text and "_ready 1.0" in numbers.text


def test_what_keeps_a_server_from_executing_is_a_number(run_path: Path) -> None:
    served, problems = Served(run_path), ["the rebuild ended with 1"]
    served.service.open(replace(served.opened(), problem=lambda: problems[0] if problems else None))
    app = make_app(served.service)

    async def look() -> str:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            return (await client.get("/metrics")).text

    assert "llm_unlearn_well 0.0" in asyncio.run(look())
    problems.clear()
    assert "llm_unlearn_well 1.0" in asyncio.run(look())


def test_residue(run_path: Path) -> None:
    told = get(Served(run_path), "/v1/residue").json()
    assert [resident["name"] for resident in told["residents"]] == [r.name for r in RESIDENTS]
    assert set(told["residents"][0]) == {
        "name",
        "shard",
        "digest",
        "nodes",
        "state",
        "epoch",
        "in_flight",
    }
    assert told["memory"] == {r.name: r.digest for r in RESIDENTS}
    assert {"epoch", "loaded", "prefix_caches", "running", "waiting", "held"} <= set(told)


def test_classify(run_path: Path) -> None:
    served = Served(run_path)

    async def ask(**body: object) -> dict[str, object]:
        async with served.client() as client:
            answer = await client.post("/v1/classify", json={"labels": ["yes", "no"]} | body)
            return answer.json() | {"header": answer.headers.get("X-Unlearning-Served")}

    told = asyncio.run(ask(prompt="Is it?"))
    assert told["label"] == "yes" and told["tally"] == {"yes": 3, "no": 0}
    assert told["is_certified"] and told["header"] == "certified"
    asyncio.run(ask(messages=[{"role": "user", "content": "Is it?"}]))
    assert served.engine.seen[-1].asked == "Is it?" and served.engine.seen[-1].labels == (
        "yes",
        "no",
    )
    served.engine.trouble = Trouble(served="refused", finish="uncertified")
    withheld = asyncio.run(ask(prompt="Is it?"))
    assert withheld["label"] is None and not withheld["is_certified"]


@pytest.mark.parametrize("stream", [False, True])
def test_in_constant_time_nothing_says_how(run_path: Path, stream: bool) -> None:
    served = Served(run_path, constant_time=0.5)

    async def ask(trouble: Trouble) -> tuple[float, httpx.Response]:
        served.engine.trouble = trouble
        async with served.client() as client:
            begin = time.monotonic()
            body = BODY | {"stream": stream, "temperature": 0}
            return -begin, await client.post(COMPLETE, json=body)

    def measured(trouble: Trouble) -> tuple[float, httpx.Response]:
        begin, answer = asyncio.run(ask(trouble))
        return time.monotonic() + begin, answer

    quick, clean = measured(Trouble()), measured(Trouble(served="clean"))
    slow = measured(Trouble(served="clean", step_seconds=0.07))
    assert 0.5 <= quick[0] < 0.8 and 0.5 <= clean[0] < 0.8 and 1.0 <= slow[0] < 1.3
    for _, answer in (quick, clean, slow):
        assert "clean" not in answer.text and "certified" not in answer.text
        assert not any(name.startswith("x-unlearning") for name in answer.headers)
        assert "epoch" not in answer.text
    assert quick[1].headers.keys() == clean[1].headers.keys()
    served.engine.trouble = Trouble()
    assert [model["id"] for model in get(served, "/v1/models").json()["data"]] == [NAME]


SCRIPT = """
import sys
from pathlib import Path
from llm_unlearn.serving.http.service import Opened, Settings
from llm_unlearn.serving.http.starting import Place, serve_run
from llm_unlearn.exact.run import S3TRun
from tests.serving.stand_in import StandIn, Trouble

engine = StandIn()
engine.trouble = Trouble(step_seconds=0.1)
run = S3TRun.open(sys.argv[1])
opened = Opened(engine, str)
serve_run(run, Settings("people"), Place(port=0), lambda _: opened, lambda s: print(s.url, flush=True))
print("ended well")
"""


@pytest.mark.parametrize(
    "sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_process_well(run_path: Path, sent: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(run_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        answers: list[int] = []
        asking = threading.Thread(
            target=lambda: answers.append(
                httpx.post(url + COMPLETE, json=BODY, timeout=20).status_code
            )
        )
        asking.start()
        while not httpx.get(f"{url}/v1/residue", timeout=20).json()["running"]:
            time.sleep(0.01)
        process.send_signal(sent)
        asking.join(20)
        out, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert answers == [200] and process.returncode == 0 and "ended well" in out
    assert "Traceback" not in errors and "Who?" not in errors
