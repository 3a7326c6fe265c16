"""Server-sent events: pieces of an answer as they come, then how it was served."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llm_unlearn.serving.http.answering import Asked, finish_of, refusal_of, unlearning_of, usage_of
from llm_unlearn.serving.http.asking import Asking, Came, ask
from llm_unlearn.serving.http.refusals import Refusal
from llm_unlearn.serving.http.service import Service
from llm_unlearn.serving.queries import Answer, Piece

DONE = b"data: [DONE]\n\n"
SLOW_SECONDS = 30.0


class Stream:
    """One streamed answer, or several side by side.

    Args:
        kind: `object` of every chunk.
        first: what every choice begins with; None for nothing.
        piece: how a choice holds text.
        last: how it ends; given what is said instead of the rest, if anything is.
        has_usage: whether a chunk with the number of tokens comes at the end.
    """

    def __init__(
        self,
        service: Service,
        asked: Asked,
        kind: str,
        first: dict[str, Any] | None,
        piece: Callable[[str], dict[str, Any]],
        last: Callable[[str | None], dict[str, Any]],
        has_usage: bool,
    ) -> None:
        self.service = service
        self.asked = asked
        self.kind = kind
        self.first = first
        self.piece = piece
        self.last = last
        self.has_usage = has_usage

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        asked = self.asked
        told = {"id": asked.id, "object": self.kind, "created": asked.created, "model": asked.model}
        told |= {"choices": choices} | more
        if self.has_usage:
            told.setdefault("usage", None)
        return event(told)

    def _choice(self, index: int, held: dict[str, Any], finish: str | None = None) -> Any:
        return {"index": index, "finish_reason": finish, "logprobs": None} | held

    def begin(self) -> list[bytes]:
        if self.first is None:
            return []
        return [self.chunk([self._choice(i, self.first)]) for i in range(len(self.asked.queries))]

    def text(self, index: int, text: str) -> bytes:
        return self.chunk([self._choice(index, self.piece(text))])

    def end(self, index: int, answer: Answer) -> bytes:
        choice = self._choice(index, self.last(refusal_of(answer)), finish_of(answer))
        unlearning = unlearning_of(self.service, answer)
        if unlearning is None:
            return self.chunk([choice])
        told = unlearning.model_dump()
        return self.chunk([choice | {"unlearning": told}], unlearning=told)

    def close(self, answers: list[Answer]) -> list[bytes]:
        if not self.has_usage:
            return [DONE]
        usage = usage_of(answers, self.asked.copies).model_dump()
        return [self.chunk([], usage=usage), DONE]

    def whole(self, answers: list[Answer]) -> list[bytes]:
        """Everything at once, for answers that were waited for."""
        parts = self.begin()
        for index, answer in enumerate(answers):
            if answer.text:
                parts.append(self.text(index, answer.text))
            parts.append(self.end(index, answer))
        return [*parts, *self.close(answers)]


def event(told: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(told, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A response that sends events as they come, and ends what makes them however it ends itself.

    Args:
        seconds: after which a client that does not read is given up.
    """

    def __init__(
        self, parts: AsyncGenerator[bytes], stack: contextlib.AsyncExitStack, seconds: float
    ) -> None:
        self.parts = parts
        self.stack = stack
        self.seconds = seconds
        super().__init__(
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        body = "http.response.body"
        async with self.stack, contextlib.aclosing(self.parts):
            async with asyncio.timeout(self.seconds):
                await send(begin)
                async for part in self.parts:
                    await send({"type": body, "body": part, "more_body": True})
                await send({"type": body, "body": b"", "more_body": False})


async def stream(service: Service, request: Request, made: Stream, arrived: float) -> Response:
    """The response; it begins with the first text, so that what is refused before has its status.

    Raises:
        Refusal: nothing was answered yet, and will not be.
    """
    queries, seconds = made.asked.queries, service.settings.timeout + SLOW_SECONDS
    if service.settings.constant_time is not None:
        answers = await ask(service, request, queries, arrived)
        return EventStream(_all(made.whole(answers)), contextlib.AsyncExitStack(), seconds)
    async with contextlib.AsyncExitStack() as stack:
        asking = await stack.enter_async_context(Asking(service, request, queries, arrived))
        came = asking.come()
        first = await anext(came)
        # Text leaves before the line that tells how it was served: this one says that it did.
        service.record("stream", id=made.asked.id, queries=len(queries))
        return EventStream(_events(made, first, came), stack.pop_all(), seconds)


async def _all(parts: list[bytes]) -> AsyncGenerator[bytes]:
    yield b"".join(parts)


async def _events(made: Stream, first: Came, rest: AsyncGenerator[Came]) -> AsyncGenerator[bytes]:
    answers: dict[int, Answer] = {}
    sent = [0] * len(made.asked.queries)

    def parts_of(came: Came) -> list[bytes]:
        if isinstance(came.event, Piece):
            sent[came.index] += len(came.event.text)
            return [made.text(came.index, came.event.text)] if came.event.text else []
        answers[came.index] = came.event
        # What the engine kept back until the end was known.
        left = came.event.text[sent[came.index] :]
        return [made.text(came.index, left)] * bool(left) + [made.end(came.index, came.event)]

    try:
        yield b"".join([*made.begin(), *parts_of(first)])
        async for came in rest:
            if parts := parts_of(came):
                yield b"".join(parts)
        yield b"".join(made.close([answers[index] for index in range(len(answers))]))
    except Refusal as refusal:
        made.service.metrics.rejected.labels(refusal.code).inc()
        yield event(refusal.body())
