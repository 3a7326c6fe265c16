"""HTTP in front of the real engine: what a client sees of a stream."""

import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from llm_unlearn.exact.run import S3TRun
from llm_unlearn.serving.http.running import Server, bind
from llm_unlearn.serving.http.starting import open_run
from llm_unlearn.serving.policy import make_policy
from tests.serving.engines import NAMES, PROMPTS, records_of_names
from tests.serving.servers import NAME, Served, address_of
from tests.tiny import make_run

LONG = 400  # tokens: seconds


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path) -> S3TRun:
    return make_run(
        tmp_path / "run", tiny_base, records_of_names(), exact_method="experts", num_shards=0, num_slices=1,
        num_sequences=1, aggregate="select", max_steps=6, learning_rate=3e-2,
    )  # fmt: skip


@pytest.fixture
def client(run: S3TRun) -> Iterator[openai.OpenAI]:
    served, ready, listening = Served(run.path), threading.Event(), bind("127.0.0.1", 0)
    policy = make_policy("deadline-clean")
    server = Server(
        served.service, lambda: open_run(run, policy, "here", 64, 16), ready.set
    )  # fmt: skip
    thread = threading.Thread(target=server.run_on, args=(listening,))
    thread.start()
    try:
        assert ready.wait(60)
        yield openai.OpenAI(base_url=f"{address_of(listening)}/v1", api_key="none", max_retries=0)
    finally:
        server.handle_exit(15, None)
        thread.join(60)
        assert not thread.is_alive()


def test_a_stream_comes_while_it_is_written(run: S3TRun, client: openai.OpenAI) -> None:
    """And ends, with what was sent, when what it reads is deleted: sent text cannot be taken back."""
    whole = client.completions.create(model=NAME, prompt=PROMPTS[3], max_tokens=LONG, temperature=0,
        extra_body={"ignore_eos": True})  # fmt: skip
    chunks = iter(client.completions.create(model=NAME, prompt=PROMPTS[3], max_tokens=LONG,
        temperature=0, stream=True, extra_body={"ignore_eos": True}))  # fmt: skip
    sent = [next(chunks).choices[0] for _ in range(3)]
    assert not any(choice.finish_reason for choice in sent)
    run.delete([NAMES[3]])
    sent += [chunk.choices[0] for chunk in chunks]
    text = "".join(choice.text for choice in sent)
    assert whole.choices[0].text.startswith(text) and 0 < len(text) < len(whole.choices[0].text)
    assert sent[-1].finish_reason == "content_filter"
    told = sent[-1].model_extra["unlearning"]  # pyright: ignore[reportOptionalSubscript]
    assert told["served"] == "refused" and told["finish"] == "withdrawn"
