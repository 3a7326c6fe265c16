"""What completions and conversations share: from what is asked to queries, and answers to bodies."""

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.responses import JSONResponse, Response

from llm_unlearn.serving.http.auth import Token
from llm_unlearn.serving.http.refusals import Refusal
from llm_unlearn.serving.http.schemas import (
    ChatCompletion,
    Completion,
    Generation,
    Unlearning,
    Usage,
)
from llm_unlearn.serving.http.service import Service
from llm_unlearn.serving.queries import Answer, Query

SEED_END = 2**63
DEFAULT_TOKENS = 16  # as OpenAI's completions
DEFAULT_CHAT_TOKENS = 512
WORST_FIRST = ("unsafe", "refused", "clean", "executed", "certified")

REFUSALS = {
    "uncertified": "Not answered: while a deletion is pending, the rest of this answer could not be "
    "certified, and the server abstains from what is not.",
    "withdrawn": "Not answered: what this answer stood on was deleted while it was written.",
}


@dataclass(frozen=True)
class Prompt:
    """What one answer is asked for.

    Attributes:
        asked: the part that decides who answers; None: all of it.
    """

    text: str
    asked: str | None = None


@dataclass(frozen=True)
class Asked:
    """A request that was understood, on its way to the engine.

    Attributes:
        id: of the answer.
        copies: how many answers there are to each prompt.
    """

    id: str
    model: str
    queries: tuple[Query, ...]
    copies: int = 1
    created: int = field(default_factory=lambda: int(time.time()))


def choose_adapter(service: Service, model: str | None) -> str | None:
    """The adapter that answers alone; None for the ensemble.

    Raises:
        Refusal: there is no such model. Where times must say nothing, adapters do not answer alone:
            which of them there are changes with every deletion.
    """
    if model is None or model == service.settings.name:
        return None
    if model in adapters(service):
        return model
    words = "there is no such model here: GET /v1/models lists them"
    raise Refusal(404, "model_not_found", words, "model")


def adapters(service: Service) -> list[str]:
    """Names of the adapters that can be asked alone."""
    if service.settings.constant_time is not None:
        return []
    residents = service.engine.state().residents
    return [resident.name for resident in residents if resident.state != "withdrawn"]


def make_asked(
    service: Service,
    token: Token,
    body: Generation,
    prompts: Sequence[Prompt],
    prefix: str,
    max_tokens: int,
) -> Asked:
    """Queries for every prompt, `n` for each; each with a seed of its own where one is given.

    Raises:
        Refusal: no such model, or over the token's limit.
    """
    adapter = choose_adapter(service, body.model)
    copies = body.n or 1
    service.limit_asks(token, len(prompts) * copies)
    name = prefix + secrets.token_hex(12)
    # In constant time all of it leaves at once, so nothing was given out that could not be taken back.
    is_streamed = bool(body.stream) and service.settings.constant_time is None
    queries = tuple(
        Query(
            id=f"{name}-{number * copies + copy}",
            prompt=prompt.text,
            asked=prompt.asked,
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            ignores_end=bool(body.ignore_eos),
            seed=derive_seed(body.seed, copy),
            stop=body.stops(),
            adapter=adapter,
            is_streamed=is_streamed,
        )
        for number, prompt in enumerate(prompts)
        for copy in range(copies)
    )
    return Asked(name, body.model, queries, copies)


def derive_seed(seed: int | None, copy: int) -> int | None:
    """A seed of 64 bits for one of several answers to a prompt; the first has the one that was given."""
    if seed is None or (copy == 0 and -SEED_END <= seed < SEED_END):
        return seed
    made = hashlib.sha256(f"{seed}:{copy}".encode()).digest()
    return int.from_bytes(made[:8], "big") % SEED_END


def finish_of(answer: Answer) -> Literal["stop", "length", "content_filter"]:
    """As OpenAI's clients know it. `content_filter` is its word for a text that was held back, and
    no client takes it for the end of an answer."""
    if answer.finish_reason in ("stop", "length"):
        return answer.finish_reason
    return "content_filter"


def refusal_of(answer: Answer) -> str | None:
    """What is said instead of the rest of an answer."""
    return REFUSALS.get(answer.finish_reason)


def unlearning_of(service: Service, *answers: Answer) -> Unlearning | None:
    """How some answers were served, as the worst of them was; None where nothing is to be told."""
    if service.settings.constant_time is not None:
        return None
    worst = min(answers, key=lambda answer: WORST_FIRST.index(answer.served))
    return Unlearning(
        served=worst.served,
        epoch=min(answer.epoch for answer in answers),
        affected=max(answer.affected for answer in answers),
        certified_tokens=sum(answer.certified_tokens for answer in answers),
        finish=worst.finish_reason,
    )


def respond(
    service: Service,
    asked: Asked,
    answers: Sequence[Answer],
    kind: type[Completion] | type[ChatCompletion],
    hold: Callable[[Answer], dict[str, Any]],
) -> Response:
    """The whole answer to a request that wants no stream.

    Args:
        hold: how a choice of this kind holds an answer.
    """
    choices = [
        {
            "index": index,
            "finish_reason": finish_of(answer),
            "unlearning": unlearning_of(service, answer),
            **hold(answer),
        }
        for index, answer in enumerate(answers)
    ]
    told = kind.model_validate(
        {
            "id": asked.id,
            "created": asked.created,
            "model": asked.model,
            "choices": choices,
            "usage": usage_of(answers, asked.copies),
            "unlearning": unlearning_of(service, *answers),
        }
    )
    return JSONResponse(told.model_dump(), headers=headers_of(service, *answers))


def headers_of(service: Service, *answers: Answer) -> dict[str, str]:
    """The same for who reads no bodies."""
    told = unlearning_of(service, *answers)
    if told is None:
        return {}
    return {"X-Unlearning-Served": told.served, "X-Unlearning-Epoch": str(told.epoch)}


def usage_of(answers: Sequence[Answer], copies: int = 1) -> Usage:
    """Tokens of all answers; a prompt counts once, however many answers it has."""
    read = sum(answer.prompt_tokens for answer in answers[::copies])
    written = sum(answer.completion_tokens for answer in answers)
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)
