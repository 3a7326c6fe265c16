"""An engine without a model: threads, deterministic texts, and whatever trouble it is told to make."""

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from llm_unlearn.errors import UserError
from llm_unlearn.serving.queries import (
    Answer,
    EngineState,
    Event,
    Failure,
    Listener,
    Piece,
    Query,
    QueueFull,
    Resident,
    Served,
)

RESIDENTS = tuple(
    Resident(f"shard-{shard}@{shard:012x}", shard, f"{shard:064x}", (f"{shard:x}" * 64,), 1, "whole", 0)
    for shard in range(3)
)  # fmt: skip


def expected_text(query: Query, words: int) -> str:
    """What the stand-in answers: words of a digest of everything that may decide an answer."""
    told = (query.prompt, query.temperature, query.top_p, query.seed, query.adapter)
    if query.temperature and query.seed is None:
        told = (*told, query.id)
    state = hashlib.sha256(repr(told).encode("utf-8", "surrogatepass")).hexdigest()
    return "".join(f" {state[n % 60 : n % 60 + 4]}" for n in range(words))


@dataclass
class Trouble:
    """What goes wrong, or how an answer is served."""

    is_full: bool = False
    failure: Failure | None = None
    step_seconds: float = 0.0
    served: Served = "certified"
    finish: str | None = None
    never_answers: bool = False
    explodes: bool = False


@dataclass(eq=False)
class Work:
    engine: "StandIn"
    query: Query
    listen: Listener
    is_cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        if not self.is_cancelled.is_set():
            self.is_cancelled.set()
            self.engine.wake()


class StandIn:
    """Answers up to `max_batch` queries at a time; `max_waiting` more may wait."""

    def __init__(
        self, max_batch: int = 4, max_waiting: int = 64, epoch: Callable[[], int] = lambda: 1
    ):
        self.max_batch, self.max_waiting, self.read_epoch = max_batch, max_waiting, epoch
        self.trouble = Trouble()
        self.residents = RESIDENTS
        self.seen: list[Query] = []
        self.cancelled: list[str] = []
        self.noticed = 0
        self.is_open = True
        self._changed = threading.Condition()
        self._waiting: list[Work] = []
        self._running: list[Work] = []
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(max_batch)]
        for thread in self.threads:
            thread.start()

    def submit(self, query: Query, listen: Listener) -> Work:
        if self.trouble.explodes:
            raise RuntimeError(f"a bug that repeats {query.prompt!r}")
        if query.prompt == "too long":
            raise UserError("the prompt is longer than the context")
        with self._changed:
            if not self.is_open:
                raise QueueFull(1.0)
            if self.trouble.is_full or len(self._waiting) >= self.max_waiting:
                raise QueueFull(2.0)
            work = Work(self, query, listen)
            self.seen.append(query)
            self._waiting.append(work)
            self._changed.notify_all()
        return work

    def wake(self) -> None:
        with self._changed:
            for work in [work for work in self._waiting if work.is_cancelled.is_set()]:
                self._waiting.remove(work)
                self.cancelled.append(work.query.id)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or not self.is_open)
                if not self._waiting:
                    return
                work = self._waiting.pop(0)
                self._running.append(work)
            event = self._answer(work)
            with self._changed:
                self._running.remove(work)
                if event is None:
                    self.cancelled.append(work.query.id)
                self._changed.notify_all()
            if event is not None:
                work.listen(event)

    def _answer(self, work: Work) -> Event | None:
        trouble, query = self.trouble, work.query
        if trouble.never_answers:
            work.is_cancelled.wait()
            return None
        if trouble.failure is not None:
            return trouble.failure
        epoch = self.read_epoch()
        if query.labels:
            work.is_cancelled.wait(trouble.step_seconds)
            finish = trouble.finish or "stop"
            tally = (len(self.residents), *[0] * (len(query.labels) - 1))
            return Answer(query.labels[0], finish, trouble.served, epoch, 0, 5, 0, 0, tally)  # pyright: ignore[reportArgumentType]
        count = min(query.max_tokens, 8)
        words = expected_text(query, count).split(" ")[1:]
        sent = ""
        for word in words:
            if work.is_cancelled.wait(trouble.step_seconds):
                return None
            sent += f" {word}"
            if query.is_streamed:
                work.listen(Piece(f" {word}", 1, trouble.served == "certified"))
        finish = trouble.finish or ("length" if query.max_tokens <= 8 else "stop")
        certified = count if trouble.served == "certified" else 0
        return Answer(sent, finish, trouble.served, epoch, 1, 5, count, certified)  # pyright: ignore[reportArgumentType]

    def state(self) -> EngineState:
        with self._changed:
            names = tuple(resident.name for resident in self.residents)
            affected = () if self.trouble.served == "certified" else (1,)
            return EngineState(
                self.read_epoch(), self.residents, names, affected,
                len(self._running), len(self._waiting), 0, self.is_open,
            )  # fmt: skip

    def digests_in_memory(self) -> dict[str, str]:
        return {resident.name: resident.digest for resident in self.residents}

    def notice(self) -> None:
        self.noticed += 1

    def drain(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        with self._changed:
            self.is_open = False
            self._changed.notify_all()
            return self._changed.wait_for(
                lambda: not self._waiting and not self._running, max(0.0, end - time.monotonic())
            )

    def close(self) -> None:
        with self._changed:
            self.is_open = False
            for work in [*self._waiting, *self._running]:
                work.is_cancelled.set()
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()

    def is_idle(self, seconds: float = 5.0) -> bool:
        """Wait until nothing runs and nothing waits."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._running, seconds)
