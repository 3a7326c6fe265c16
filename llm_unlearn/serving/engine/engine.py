"""The engine: one thread that owns the model, answers what waits, and does what the ledger says.

A round of its loop: look at the ledger if anything begins or time has passed; do to the memory and to
the answers under way what a deletion asks for; let those that wait begin; one token for every row.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from llm_unlearn.errors import UserError
from llm_unlearn.exact.library import ServedChangedError
from llm_unlearn.serving.engine.answering import Answering
from llm_unlearn.serving.engine.answers import Running
from llm_unlearn.serving.engine.memory import Memory
from llm_unlearn.serving.engine.reading import Reading
from llm_unlearn.serving.policy import Policy
from llm_unlearn.serving.queries import (
    EngineState,
    Failure,
    Listener,
    Query,
    QueueFull,
    Resident,
    Ticket,
)

LOOK_SECONDS = 0.05  # between two looks at the ledger while nothing begins
RETRY_SECONDS = 1.0

log = logging.getLogger(__name__)


class BatchEngine:
    """Answers queries in one continuous batch; see `queries.Engine`.

    Args:
        reading: makes texts of tokens and tokens of texts.
        policy: what becomes of a query that cannot be certified.
        max_batch: rows in one forward pass.
        max_waiting: queries that wait or are held; one more is refused.
        on_change: called from the engine's thread when the memory has followed the ledger.
        on_uncertified: called when a query could not be certified.

    Attributes:
        followed: entries of the ledger that the memory and all answers follow; under `serve-anyway` behind
            those that are known.
    """

    def __init__(
        self,
        memory: Memory,
        reading: Reading,
        policy: Policy,
        max_batch: int = 64,
        max_waiting: int = 256,
        on_change: Callable[[], None] = lambda: None,
        on_uncertified: Callable[[], None] = lambda: None,
    ):
        self.policy, self.reading, self.memory = policy, reading, memory
        self.max_waiting = max_waiting
        self.answering = Answering(memory, reading, policy, max_batch, on_uncertified)
        self._on_change = on_change
        self._waiting: deque[Running] = deque()
        self._beginning: list[Running] = []  # taken from those, and not in the batch yet
        self._tasks: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._is_noticed = True
        self._is_changed = False
        self._is_draining = self._is_closed = False
        self._looked = 0.0
        self._seconds = 1.0  # that an answer takes, lately
        self._residents: tuple[Resident, ...] = ()
        self._names: frozenset[str] = frozenset()
        self._list_residents()
        self._state = self._describe(is_ready=True)
        self.followed = memory.epoch
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, query: Query, listen: Listener) -> Ticket:
        running = self.reading.begin(query, listen, self._names)
        with self._wake:
            if self._is_draining or self._is_closed:
                raise QueueFull(RETRY_SECONDS)
            waiting = [r for r in (*self._waiting, *self.answering.held) if not r.is_cancelled]
            if len(waiting) >= self.max_waiting:
                raise QueueFull(max(RETRY_SECONDS, self._seconds))
            self._waiting.append(running)
            self._wake.notify()
        return running

    def state(self) -> EngineState:
        state, counts = self._state, self._counts
        residents = tuple(replace(r, in_flight=counts[r.name]) for r in state.residents)
        return replace(state, residents=residents)

    def digests_in_memory(self) -> dict[str, str]:
        return self._ask(self.memory.digests)

    def notice(self) -> None:
        with self._wake:
            self._is_noticed = True
            self._wake.notify()

    def drain(self, seconds: float) -> bool:
        with self._wake:
            self._is_draining = True
            self._wake.notify()
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._is_busy():
            time.sleep(LOOK_SECONDS)
        return not (self._is_busy() or self.answering.held)

    def _is_busy(self) -> bool:
        with self._wake:
            return bool(self._waiting or self._beginning or self.answering.running)

    def close(self) -> None:
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    def _ask(self, task: Callable[[], Any]) -> Any:
        """Let the engine's thread do something between two tokens."""
        future: Future[Any] = Future()
        with self._wake:
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            self._tasks.append((task, future))
            self._wake.notify()
        return future.result()

    def _loop(self) -> None:
        while not self._is_closed:
            try:
                self._round()
            except ServedChangedError:
                self.memory.is_stale = True
                self._is_noticed = True
                not_begun = self._not_begun()
                self._put_back([*self.answering.take_back(), *not_begun])
            except (UserError, OSError) as error:
                log.warning("answers were given up: %s", error)
                self._fail("the run cannot be read now")  # paths are nobody's business
            except Exception as error:  # one bad batch does not end the service
                log.exception("the engine failed")
                self._fail(type(error).__name__)
        for running in [*self._not_begun(), *self.answering.abandon(), *self._waiting]:
            running.listen(Failure("unavailable", "the server stops", RETRY_SECONDS))
        self._run_tasks()

    def _fail(self, reason: str) -> None:
        """Nothing of what is under way can be trusted to go on, also where it waits for its turn again."""
        with self._wake:
            begun = [running for running in self._waiting if running.stretches]
            self._waiting = deque(running for running in self._waiting if not running.stretches)
        for running in [*begun, *self._not_begun(), *self.answering.abandon()]:
            running.listen(Failure("unavailable", f"try again: {reason}", RETRY_SECONDS))
        self.memory.is_stale = True
        self._state = self._describe(is_ready=False)
        time.sleep(LOOK_SECONDS)

    def _round(self) -> None:
        self._sleep()
        self._run_tasks()
        self.answering.sweep()
        self._take()
        # After they were taken: what was acknowledged before they came is seen now.
        if self._beginning or self._is_noticed or time.monotonic() - self._looked > LOOK_SECONDS:
            self._look()
        if self._beginning:
            self.answering.begin([r for r in self._beginning if not r.is_cancelled])
            self._beginning = []
        self.answering.step()
        self._note()

    def _sleep(self) -> None:
        """Wait while there is nothing to do, but look at the ledger now and then."""
        with self._wake:
            is_idle = not (self._waiting or self.answering.running or self._tasks)
            if is_idle and not self._is_noticed and not self._is_closed:
                self._wake.wait(LOOK_SECONDS)

    def _run_tasks(self) -> None:
        while self._tasks:
            task, future = self._tasks.popleft()
            try:
                future.set_result(task())
            except Exception as error:
                future.set_exception(error)

    def _take(self) -> None:
        """Those that have waited longest and for which there is room."""
        with self._wake:
            while self._waiting and self.answering.has_room(len(self._beginning)):
                running = self._waiting.popleft()
                if not running.is_cancelled:
                    self._beginning.append(running)

    def _not_begun(self) -> list[Running]:
        """What was taken when something went wrong, and is nobody's yet."""
        known = set(map(id, [*self.answering.running, *self.answering.held]))
        lost = [r for r in self._beginning if id(r) not in known and not r.is_cancelled]
        self._beginning = []
        return lost

    def _put_back(self, again: Sequence[Running]) -> None:
        """First in the queue once more, in their order."""
        with self._wake:
            self._waiting.extendleft(reversed(again))

    def _look(self) -> None:
        self._is_noticed = False
        self._looked = time.monotonic()
        change = self.memory.refresh()
        if change is not None:
            with self._wake:
                queued = [*self._beginning, *self._waiting]
            self.answering.follow(change, queued)
            self._list_residents()
            self._is_changed = True
        self._put_back(self.answering.released())

    def _note(self) -> None:
        finished = self.answering.seconds
        if finished:
            self._seconds = 0.8 * self._seconds + 0.2 * finished[-1]
            finished.clear()
        self._state = self._describe(is_ready=not self._is_draining)
        if not self.memory.is_lagging:
            self.followed = self.memory.epoch
        if self._is_changed:  # after the state says so
            self._is_changed = False
            self._on_change()

    def _list_residents(self) -> None:
        """There can be a thousand: listed when they change, not for every token."""
        self._residents = self.memory.residents()
        self._names = frozenset(r.name for r in self._residents if r.state != "withdrawn")

    def _describe(self, is_ready: bool) -> EngineState:
        answering = self.answering
        self._counts = Counter(answering.names_read())
        return EngineState(
            epoch=self.memory.epoch,
            residents=self._residents,
            loaded=tuple(self.memory.loaded()),
            affected=tuple(sorted(self.memory.affected(self.policy.target))),
            running=len(answering.running),
            waiting=len(self._waiting),
            held=len(answering.held),
            is_ready=is_ready,
        )
