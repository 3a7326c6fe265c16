"""The `openai` client, unchanged, against a real server on a real port."""

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from llm_unlearn.serving.http.answering import derive_seed
from llm_unlearn.serving.queries import Failure
from tests.serving.servers import NAME, Served
from tests.serving.stand_in import RESIDENTS, Trouble, expected_text


@pytest.fixture
def served(run_path: Path) -> Served:
    return Served(run_path, timeout=5.0)


@pytest.fixture
def url(served: Served) -> Iterator[str]:
    with served.listening() as address:
        yield f"{address}/v1"


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def test_completion(client: openai.OpenAI, served: Served) -> None:
    answer = client.completions.create(
        model=NAME,
        prompt="Who?",
        max_tokens=4,
        temperature=0,
        top_p=0.5,
        stop=["\n", "."],
        user="x",
    )
    query = served.engine.seen[-1]
    assert (query.max_tokens, query.temperature, query.top_p) == (4, 0.0, 0.5)
    assert query.stop == ("\n", ".") and query.adapter is None
    assert answer.choices[0].text == expected_text(query, 4)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.total_tokens == 5 + 4
    told = answer.model_extra["unlearning"]  # pyright: ignore[reportOptionalSubscript]
    assert told["served"] == "certified" and told["certified_tokens"] == 4
    assert told["epoch"] == served.run.ledger.count()


def test_headers_say_how_it_was_served(client: openai.OpenAI, served: Served) -> None:
    served.engine.trouble = Trouble(served="clean")
    raw = client.completions.with_raw_response.create(model=NAME, prompt="Who?")
    assert raw.headers["X-Unlearning-Served"] == "clean"
    assert raw.headers["X-Unlearning-Epoch"] == str(served.run.ledger.count())


def test_defaults_are_openais(client: openai.OpenAI, served: Served) -> None:
    client.completions.create(model=NAME, prompt="Who?")
    query = served.engine.seen[-1]
    assert (query.max_tokens, query.temperature, query.top_p, query.seed) == (16, 1.0, 1.0, None)


def test_several_prompts_and_answers(client: openai.OpenAI, served: Served) -> None:
    answer = client.completions.create(model=NAME, prompt=["One", "Two"], n=2, seed=7, max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 4
    assert {query.seed for query in served.engine.seen} == {7, derive_seed(7, 1)}
    alone = client.completions.create(model=NAME, prompt="Two", seed=7, max_tokens=3)
    assert alone.choices[0].text == answer.choices[2].text
    assert answer.usage is not None and answer.usage.prompt_tokens == 2 * 5


def test_the_seed_of_a_copy_is_a_fixed_function() -> None:
    made = hashlib.sha256(b"7:3").digest()
    assert derive_seed(7, 3) == int.from_bytes(made[:8], "big") % 2**63
    assert derive_seed(None, 3) is None


def test_conversation(client: openai.OpenAI, served: Served) -> None:
    answer = client.chat.completions.create(
        model=NAME,
        messages=[
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]},
        ],
        max_completion_tokens=3,
    )  # fmt: skip
    query = served.engine.seen[-1]
    assert query.prompt == "<s>system\nBe short.</s><s>user\nWho are you?</s><s>assistant\n"
    assert query.asked == "Who are you?" and query.max_tokens == 3
    assert answer.choices[0].message.content == expected_text(query, 3)
    assert answer.choices[0].message.refusal is None


def test_stream(client: openai.OpenAI, served: Served) -> None:
    served.engine.trouble = Trouble(step_seconds=0.02)
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "Who?"}],
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == expected_text(served.engine.seen[-1], 5)
    assert sum(bool(text) for text in texts) == 5
    last = chunks[-2]
    assert last.choices[0].finish_reason == "length"
    assert last.model_extra["unlearning"]["served"] == "certified"  # pyright: ignore[reportOptionalSubscript]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


def test_stream_of_several(client: openai.OpenAI, served: Served) -> None:
    texts: dict[int, str] = {}
    finished = []
    for chunk in client.completions.create(model=NAME, prompt=["One", "Two"], n=2, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        if choice.finish_reason:
            finished.append(choice.index)
            assert chunk.model_extra["unlearning"]["epoch"] > 0  # pyright: ignore[reportOptionalSubscript]
    assert sorted(finished) == [0, 1, 2, 3]
    by_prompt = {query.id[-1]: query for query in served.engine.seen}
    assert texts == {n: expected_text(by_prompt[str(n)], 8) for n in range(4)}


def test_models(client: openai.OpenAI, served: Served) -> None:
    names = [model.id for model in client.models.list()]
    assert names == [NAME, *[resident.name for resident in RESIDENTS]]
    assert client.models.retrieve(RESIDENTS[1].name).id == RESIDENTS[1].name
    client.completions.create(model=RESIDENTS[1].name, prompt="Who?")
    assert served.engine.seen[-1].adapter == RESIDENTS[1].name
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("shard-1@old")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="Who?")


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_is_no_end(client: openai.OpenAI, served: Served, stream: bool) -> None:
    served.engine.trouble = Trouble(served="refused", finish="uncertified")
    messages = [{"role": "user", "content": "Who?"}]
    answer = client.chat.completions.create(model=NAME, messages=messages, stream=stream)  # pyright: ignore
    if stream:
        chunks = list(answer)
        last, refusal = chunks[-1], chunks[-1].choices[0].delta.refusal
    else:
        last, refusal = answer, answer.choices[0].message.refusal
    assert last.choices[0].finish_reason == "content_filter"
    assert last.model_extra["unlearning"]["finish"] == "uncertified"
    assert refusal and "pending" in refusal


def test_a_withdrawn_answer_gives_no_text(client: openai.OpenAI, served: Served) -> None:
    served.engine.trouble = Trouble(served="refused", finish="withdrawn")
    answer = client.completions.create(model=NAME, prompt="Who?")
    assert answer.choices[0].text == ""
    assert answer.choices[0].finish_reason == "content_filter"


def test_errors_are_the_clients(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="longer than the context"):
        client.completions.create(model=NAME, prompt="too long")
    with pytest.raises(
        openai.BadRequestError, match="echo: this server supports only False"
    ) as bad:
        client.completions.create(model=NAME, prompt="Who?", echo=True)
    assert bad.value.param == "echo" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="top_k: this server does not know"):
        client.completions.create(model=NAME, prompt="Who?", extra_body={"top_k": 3})
    served.engine.trouble = Trouble(is_full=True)
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(model=NAME, prompt="Who?")
    assert int(full.value.response.headers["Retry-After"]) >= 2 and full.value.code == "queue_full"
    served.engine.trouble = Trouble(failure=Failure("unavailable", "rebuilding", 3.0))
    with pytest.raises(openai.InternalServerError, match="rebuilding"):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x"}])


def test_a_bug_tells_nothing(
    client: openai.OpenAI, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.engine.trouble = Trouble(explodes=True)
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model=NAME, prompt="Ada Lovelace")
    assert caught.value.response.status_code == 500
    assert "Traceback" not in caught.value.response.text and "Ada" not in caught.value.response.text
    assert "RuntimeError in" in caplog.text and "Ada" not in caplog.text
    served.engine.trouble = Trouble()
    assert client.completions.create(model=NAME, prompt="Who?").choices[0].text


def test_timeout(run_path: Path) -> None:
    served = Served(run_path, timeout=0.2)
    served.engine.trouble = Trouble(never_answers=True)
    with served.listening() as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model=NAME, prompt="Who?")
        assert caught.value.status_code == 504
        assert served.engine.is_idle() and len(served.engine.cancelled) == 1


def test_timeout_within_a_stream(run_path: Path) -> None:
    served = Served(run_path, timeout=0.3)
    served.engine.trouble = Trouble(step_seconds=0.12)
    with served.listening() as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="no answer within"):
            list(client.completions.create(model=NAME, prompt="Who?", stream=True))
        assert served.engine.is_idle() and len(served.engine.cancelled) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_goes_away_is_not_answered(served: Served, url: str, stream: bool) -> None:
    served.engine.trouble = Trouble(step_seconds=0.3)

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            asked = client.completions.create(model=NAME, prompt="Who?", stream=stream)
            if not stream:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(asked, 0.4)
                return
            async for _ in await asked:
                break

    asyncio.run(leave())
    assert served.engine.is_idle(3.0)
    assert served.engine.cancelled == [query.id for query in served.engine.seen]


def test_queries_of_one_request_are_taken_all_or_none(
    served: Served, client: openai.OpenAI
) -> None:
    served.engine.max_waiting = 2
    served.engine.trouble = Trouble(step_seconds=0.05)
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model=NAME, prompt=["x"] * 30)
    assert served.engine.is_idle()
    assert set(served.engine.cancelled) == {query.id for query in served.engine.seen}
