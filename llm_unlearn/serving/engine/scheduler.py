"""Executes what is pending when the policy says so: a rebuild in another process, while answers go on."""

import logging
import subprocess
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from llm_unlearn.errors import UserError
from llm_unlearn.exact.ledger import Request
from llm_unlearn.exact.policy import LOG_NAME, start_rebuild
from llm_unlearn.exact.settling import settle
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.serving.policy import Policy, is_due

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
PAUSE_SECONDS = 30.0  # after a rebuild that failed
SETTLE_SECONDS = 5.0  # after which a request that is not carried out was left by somebody who died


@dataclass(frozen=True)
class Pending:
    """What an execution would carry out.

    Attributes:
        requests: how many were acknowledged since the last one and reach an affected shard; or the
            last that does, which came too late for it.
        oldest_seconds: age of the oldest; of one with a deadline of its own at least so much that the
            policy's deadline falls on it.
    """

    requests: int
    oldest_seconds: float

    @classmethod
    def of(
        cls, requests: Collection[Request], shards: frozenset[int], since: float, policy: Policy
    ) -> "Pending":
        """Args:
        shards: that are affected.
        since: when the last execution was published, in seconds since the epoch.
        """
        now, ages = time.time(), []
        reaching = [r for r in requests if not shards.isdisjoint(t.shard for t in r.places)]
        later = [r for r in reaching if (r.acknowledged_at or now) >= since]
        for request in later or reaching[-1:]:
            moment = request.acknowledged_at or now
            left = float("inf") if request.deadline is None else request.deadline - now
            ages.append(max(now - moment, policy.deadline_seconds - left))
        return cls(len(ages), max(ages, default=0.0))


class Scheduler:
    """Watches what is pending, and starts rebuilds.

    Args:
        affected: the shards that a rebuild would change, as the engine knows them now.
        notice: tells the engine that something was published.

    Attributes:
        executions: how many rebuilds have been published.
        problem: why the last rebuild failed; None once there is nothing to rebuild.
    """

    def __init__(
        self,
        run: RunDirectory,
        policy: Policy,
        affected: Callable[[], frozenset[int]],
        notice: Callable[[], None],
    ):
        self.run, self.policy = run, policy
        self._affected, self._notice = affected, notice
        self._wake = threading.Event()
        self._is_closed = False
        self._uncertified_at = 0.0  # seconds since the epoch
        self._process: subprocess.Popen[bytes] | None = None
        self._not_before = 0.0
        self._known: tuple[int, float, list[Request]] = (-1, 0.0, [])
        self.executions = 0
        self.problem: str | None = None
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def uncertified(self) -> None:
        """An answer could not be certified."""
        self._uncertified_at = time.time()
        self._wake.set()

    def wake(self) -> None:
        """Something has changed: look now."""
        self._wake.set()

    def close(self) -> None:
        """A rebuild that goes on is not stopped: it is one that has to be done anyway."""
        self._is_closed = True
        self._wake.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._is_closed:
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()
            try:
                self.look()
            except (OSError, UserError) as error:
                self._tell(f"what is pending could not be executed: {error}")
                self._not_before = time.monotonic() + PAUSE_SECONDS

    def look(self) -> None:
        """Start what is due, and see whether what was started has ended."""
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return
            self._ended(code)
        self._settle()
        shards = self._affected()
        if not shards:
            self._uncertified_at = 0.0
            self.problem = None
            return
        since, requests = self._asked()
        pending = Pending.of(requests, shards, since, self.policy)
        reason = is_due(
            self.policy,
            len(shards),
            max(pending.requests, 1),
            pending.oldest_seconds,
            self._uncertified_at > since,
        )
        # Another server's rebuild, say, which takes what is pending with it or is followed by one of ours.
        if reason and time.monotonic() >= self._not_before and not self.run.is_training:
            self._process = start_rebuild(self.run)

    def _settle(self) -> None:
        """Carry out what was acknowledged by a process that did not live to do it."""
        if time.monotonic() < self._not_before:
            return
        pending = self.run.ledger.requests(pending=True)
        if any(time.time() - (r.acknowledged_at or 0.0) > SETTLE_SECONDS for r in pending):
            with self.run.changing("finishing a deletion in it"):
                settle(self.run)
            self._notice()

    def _asked(self) -> tuple[float, list[Request]]:
        """When the last execution was published, and everything that was ever asked for."""
        epoch = self.run.ledger.epoch()
        if epoch != self._known[0]:
            served = self.run.ledger.events("served")
            since = served[-1].time if served else 0.0
            self._known = (epoch, since, self.run.ledger.requests())
        return self._known[1:]

    def _ended(self, code: int) -> None:
        self._process = None
        if code == 0:
            self.executions += 1
            self.problem = None
        else:
            self._tell(f"the rebuild ended with {code}: see {self.run.path / LOG_NAME}")
            self._not_before = time.monotonic() + PAUSE_SECONDS
        self._notice()

    def _tell(self, problem: str) -> None:
        """Whoever runs the server has to know: queries may be waiting for what has failed."""
        self.problem = problem
        log.warning("%s; tried again in %.0f s", problem, PAUSE_SECONDS)

    @property
    def is_executing(self) -> bool:
        return self._process is not None
