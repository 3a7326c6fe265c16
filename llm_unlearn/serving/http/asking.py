"""From an HTTP request to the engine and back: waiting, timeouts, and clients that went away."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from anyio.to_thread import run_sync
from starlette.requests import Request

from llm_unlearn.errors import UserError
from llm_unlearn.serving.http.refusals import STOPS, ClientGone, Refusal
from llm_unlearn.serving.http.service import Service
from llm_unlearn.serving.queries import (
    Answer,
    Engine,
    Event,
    Failure,
    Listener,
    Piece,
    Query,
    QueueFull,
    Ticket,
)

STOPPED = Failure("unavailable", STOPS, 5.0)


@dataclass(frozen=True)
class Came:
    """Something came for one of the queries."""

    index: int
    event: Piece | Answer


class Asking:
    """The queries of one HTTP request, from their submission to their last event.

    A context: whatever ends it early (a timeout, a client that went away, an error), the queries
    that are not answered are cancelled.

    Args:
        request: watched for the client's going away.
        queries: all of them are put into the engine's queue, or none.
        arrived: `time.monotonic()` when the request did.
    """

    def __init__(
        self, service: Service, request: Request, queries: Sequence[Query], arrived: float
    ) -> None:
        self.service = service
        self.request = request
        self.queries = queries
        self.arrived = arrived
        self.waiting = set(range(len(queries)))
        self.tickets: list[Ticket] = []
        self.events: asyncio.Queue[tuple[int, Event] | Refusal] = asyncio.Queue()
        self.watchers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        engine = self.service.engine
        loop = asyncio.get_running_loop()
        # Shielded from cancellation, so that no ticket is lost between the engine and here.
        try:
            await run_sync(self._submit, engine, loop)
        except QueueFull as full:
            await self._cancel()
            raise Refusal(429, "queue_full", str(full), retry_after=full.retry_after) from None
        except UserError as error:
            await self._cancel()
            raise Refusal(400, "invalid_request", str(error)) from None
        except BaseException:
            await self._cancel()
            raise
        self.watchers = [
            asyncio.create_task(self._watch_client()),
            asyncio.create_task(self._watch_server()),
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for watcher in self.watchers:
            watcher.cancel()
        if self.waiting:
            reason = error.code if isinstance(error, Refusal) else "cancelled"
            self._count_failures(reason)
            await self._cancel()

    def _submit(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        for index, query in enumerate(self.queries):
            self.tickets.append(engine.submit(query, self._listener(index, loop)))

    def _listener(self, index: int, loop: asyncio.AbstractEventLoop) -> Listener:
        def listen(event: Event) -> None:
            # The loop is closed where the server stopped meanwhile: then nobody listens.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

        return listen

    async def _cancel(self) -> None:
        """Takes the engine's lock, so not in the loop's thread; done even if we are cancelled."""
        tickets = list(self.tickets)

        def cancel() -> None:
            for ticket in tickets:
                ticket.cancel()

        await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(cancel)))

    async def _watch_client(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            continue
        self.events.put_nowait(ClientGone())

    async def _watch_server(self) -> None:
        await self.service.stopping.wait()
        for index in sorted(self.waiting):
            self.events.put_nowait((index, STOPPED))

    async def come(self) -> AsyncGenerator[Came]:
        """Pieces and answers of all queries as they come, until each has its answer.

        Raises:
            Refusal: one cannot be answered, time is up, or nobody waits any more.
        """
        end = self.arrived + self.service.settings.timeout
        while self.waiting:
            try:
                async with asyncio.timeout(max(0.0, end - time.monotonic())):
                    event = await self.events.get()
            except TimeoutError:
                words = f"no answer within {self.service.settings.timeout:g} s"
                raise Refusal(504, "timeout", words) from None
            if isinstance(event, Refusal):
                raise event
            yield self._take(*event)

    def _take(self, index: int, event: Event) -> Came:
        if isinstance(event, Failure):
            if event.kind == "invalid":
                raise Refusal(400, "invalid_request", event.message)
            raise Refusal(503, "unavailable", event.message, retry_after=event.retry_after or 1.0)
        if isinstance(event, Answer):
            event = _without_withdrawn(event)
            self._record(index, event)
            self.waiting.discard(index)
        return Came(index, event)

    def _record(self, index: int, answer: Answer) -> None:
        """Before anything of it leaves: what the log does not know is not answered."""
        seconds = time.monotonic() - self.arrived
        self.service.record(
            "answer",
            id=self.queries[index].id,
            epoch=answer.epoch,
            affected=answer.affected,
            served=answer.served,
            finish=answer.finish_reason,
            handling=self.service.settings.handling,
            tally=list(answer.tally),
            counts=answer.counts,
            tokens=answer.completion_tokens,
            certified_tokens=answer.certified_tokens,
            seconds=round(seconds, 6),
        )
        self.service.metrics.answered(answer, seconds)

    def _count_failures(self, reason: str) -> None:
        self.service.metrics.failures.labels(reason).inc(len(self.waiting))
        # The log says so where it can; no answer left, so nothing depends on it.
        with contextlib.suppress(Refusal):
            for index in sorted(self.waiting):
                self.service.record("no answer", id=self.queries[index].id, reason=reason)

    async def answers(self) -> list[Answer]:
        """All answers, in the order of the queries."""
        found: dict[int, Answer] = {}
        async for came in self.come():
            if isinstance(came.event, Answer):
                found[came.index] = came.event
        return [found[index] for index in range(len(self.queries))]


def _without_withdrawn(answer: Answer) -> Answer:
    """What an answer stood on was deleted meanwhile: its text is not given out."""
    return replace(answer, text="") if answer.finish_reason == "withdrawn" else answer


@contextlib.asynccontextmanager
async def in_constant_time(service: Service, arrived: float) -> AsyncIterator[None]:
    """What happens in here ends, well or not, at a multiple of `constant_time` after the arrival.

    So the time says nothing of how a query was served.
    """
    step = service.settings.constant_time
    try:
        yield
    finally:
        if step is not None:
            passed = time.monotonic() - arrived
            await asyncio.sleep(step - passed % step)


async def ask(
    service: Service, request: Request, queries: Sequence[Query], arrived: float
) -> list[Answer]:
    """Answers to queries, in their order.

    Raises:
        Refusal: one of them cannot be answered; none is then.
    """
    async with (
        in_constant_time(service, arrived),
        Asking(service, request, queries, arrived) as asking,
    ):
        return await asking.answers()
