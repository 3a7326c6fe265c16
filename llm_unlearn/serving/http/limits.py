"""How much may be asked: bodies, and buckets of requests for each token and each subject."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_unlearn.serving.http.refusals import STOPS, Refusal

MOST_BUCKETS = 10_000


class Buckets:
    """Token buckets by key: `count` at once, refilled evenly over `seconds`.

    Args:
        count: 0 for no limit.
        clock: seconds; monotonic.
    """

    def __init__(
        self, count: float, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.count = count
        self.seconds = seconds
        self.clock = clock
        self.levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str, amount: float = 1, count: float | None = None) -> float:
        """Take from a bucket; returns 0, or the seconds after which there will be enough.

        More than a bucket holds is given when it is full, and leaves a debt.

        Args:
            count: another size than the others', for this key.
        """
        size = self.count if count is None else count
        if not size:
            return 0.0
        now, rate = self.clock(), size / self.seconds
        level, then = self.levels.pop(key, (size, now))
        level = min(size, level + (now - then) * rate)
        missing = min(amount, size) - level
        # A hair of rounding is no reason to wait.
        taken = level - amount if missing <= 1e-9 else level
        self.levels[key] = (taken, now)
        self._forget(now)
        return 0.0 if missing <= 1e-9 else missing / rate

    def _forget(self, now: float) -> None:
        """Keep the memory bounded: the oldest buckets have refilled longest."""
        while len(self.levels) > MOST_BUCKETS:
            self.levels.popitem(last=False)


class BoundedBodies:
    """Refuses bodies that are too long, or too slow to come, before anything reads them.

    Chunked bodies say no length; they are counted as they come.

    Args:
        most: bytes.
        stopping: set when the server stops, and waits for no body any more.
        seconds: in which all of a body must have come.
    """

    def __init__(self, app: ASGIApp, most: int, stopping: asyncio.Event, seconds: float = 30.0):
        self.app = app
        self.most = most
        self.stopping = stopping
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = Headers(scope=scope).get("content-length", "")
        is_too_long = told.isdigit() and int(told[:20]) > self.most
        end = asyncio.get_running_loop().time() + self.seconds
        seen, is_complete = 0, False

        async def receiving() -> Message:
            nonlocal seen, is_complete
            if is_complete:
                return await receive()
            if is_too_long:
                raise self._too_long()
            try:
                async with asyncio.timeout_at(end):
                    message = await self._coming(receive)
            except TimeoutError:
                raise Refusal(408, "slow_body", "the body took too long to come") from None
            seen += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if seen > self.most:
                raise self._too_long()
            return message

        await self.app(scope, receiving, send)

    async def _coming(self, receive: Receive) -> Message:
        coming = asyncio.ensure_future(receive())
        stopping = asyncio.ensure_future(self.stopping.wait())
        try:
            await asyncio.wait((coming, stopping), return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                return coming.result()
        finally:
            coming.cancel()
            stopping.cancel()
        raise Refusal(503, "draining", STOPS, retry_after=5.0)

    def _too_long(self) -> Refusal:
        words = f"the body is longer than {self.most:,} bytes, which is the most that is read"
        return Refusal(413, "body_too_long", words, headers={"Connection": "close"})
