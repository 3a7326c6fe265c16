"""One policy on one trace, event by event; the queries between two events are answered at once."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llm_unlearn.serving.policy import Policy, is_due
from llm_unlearn.serving.simulation.trace import Trace
from llm_unlearn.serving.simulation.votes import Votes, certify, tally


@dataclass(frozen=True)
class Setting:
    """What is assumed beside the trace.

    Attributes:
        seconds_per_shard: to rebuild one shard; one trainer, which does nothing else.
        seconds_per_answer: of a query that need not wait.
        seconds_per_deactivation: from an acknowledgement until the shard answers again, shortened.
        labels: that a vote can have.
        accuracy: mean over shards, of which each draws its own.
        kept: what a shortened shard keeps of its lead over guessing.
        by_shard: publish a shard as soon as it is rebuilt, not all of an execution at its end.
    """

    seconds_per_shard: float = 20.0
    seconds_per_answer: float = 0.05
    seconds_per_deactivation: float = 0.1
    labels: int = 10
    accuracy: float = 20 / 21
    kept: float = 0.5
    by_shard: bool = False
    seed: int = 0


class _Job(NamedTuple):
    """An execution that is going on.

    Attributes:
        ends: when each shard is published, in order.
        shards: likewise, those that are rebuilt.
        covered: how many deletions it executes in each shard, (shards of the ensemble,).
    """

    ends: tuple[float, ...]
    shards: tuple[int, ...]
    covered: np.ndarray


class Replay:
    """The state of a server, and what became of every query and deletion.

    Attributes:
        answered_at: moments, (queries,); NaN for those that got no answer.
        is_certified: when they were first looked at, (queries,).
        is_clean: answered by clean shards without a certificate.
        is_different: another answer than the target's ensemble gives, under everything pending.
        is_unsafe: a shard that still held deleted data had a vote.
        label: the answers, (queries,); -1 for none.
        executed_at: moments, (deletions,).
        rebuilt: by execution, how many shards.
    """

    def __init__(self, trace: Trace, votes: Votes, policy: Policy, setting: Setting):
        self.trace, self.votes, self.setting = trace, votes, setting
        self.policy = policy.for_shards(trace.shards, setting.seconds_per_shard)
        queries = len(trace.queries)
        self.answered_at = np.full(queries, np.nan)
        self.label = np.full(queries, -1)
        self.is_certified, self.is_clean, self.is_different, self.is_unsafe = np.zeros(
            (4, queries), dtype=bool
        )
        self.executed_at = np.full(len(trace.deletions), np.nan)
        self.rebuilt: list[int] = []
        self._seen = 0  # queries
        self._arrived = self._started = 0  # deletions
        self._pending = np.zeros(trace.shards, dtype=int)  # deletions not executed, by shard
        self._loaded_at = np.full(trace.shards, -np.inf)  # when a withdrawn shard answers again
        self._held = np.empty(0, dtype=int)
        self._job: _Job | None = None

    def run(self) -> "Replay":
        """Until every deletion is executed and nobody waits."""
        moment = self._next_event()
        while moment < math.inf:
            self._advance(self._serve_until(moment))
            moment = self._next_event()
        self._serve_until(math.inf)
        if self.policy.handling == "wait":
            self._wait_in_line()
        return self

    def _next_event(self) -> float:
        moments = [math.inf]
        if self._arrived < len(self.trace.deletions):
            moments.append(self.trace.deletions[self._arrived])
        if self._job is not None:
            moments.append(self._job.ends[0])
        elif self._arrived > self._started:
            moments.append(self._due_at())
        if (self._loaded_at > -np.inf).any():
            moments.append(self._loaded_at[self._loaded_at > -np.inf].min())
        return float(min(moments))

    def _due_at(self) -> float:
        return self.trace.deletions[self._started] + self.policy.latest_start_seconds

    def _advance(self, now: float) -> None:
        """Everything that happens at one moment but queries, which come after it."""
        before = self._affected()
        while self._job is not None and self._job.ends[0] <= now:
            self._publish(self._job)
        self._loaded_at[self._loaded_at <= now] = -np.inf
        while (
            self._arrived < len(self.trace.deletions) and self.trace.deletions[self._arrived] <= now
        ):
            hit = list(self.trace.hits[self._arrived])
            self._pending[hit] += 1
            if self.setting.seconds_per_deactivation > 0:
                self._loaded_at[hit] = now + self.setting.seconds_per_deactivation
            self._arrived += 1
        if (before & ~self._affected()).any():  # with more affected, nothing more is certified
            self._release(now)
        self._start_if_due(now, uncertified=len(self._held) > 0)

    def _start_if_due(self, now: float, uncertified: bool) -> None:
        waiting = self._arrived - self._started
        if self._job is not None or not waiting:
            return
        age = now - self.trace.deletions[self._started]
        if now >= self._due_at():  # which rounding must not deny
            age = max(age, self.policy.latest_start_seconds)
        shards = int((self._pending > 0).sum())
        if is_due(self.policy, shards, waiting, age, uncertified):
            self._job = self._begin(now)

    def _begin(self, now: float) -> _Job:
        """An execution of all that is pending, oldest first."""
        deletions = range(self._started, self._arrived)
        hits = [shard for deletion in deletions for shard in self.trace.hits[deletion]]
        shards = tuple(dict.fromkeys(hits))
        seconds = self.setting.seconds_per_shard
        ends = tuple(now + seconds * count for count in range(1, len(shards) + 1))
        if not self.setting.by_shard:
            ends = (ends[-1],) * len(ends)
        end_of = dict(zip(shards, ends, strict=True))
        for deletion in deletions:
            self.executed_at[deletion] = max(end_of[shard] for shard in self.trace.hits[deletion])
        self._started = self._arrived
        self.rebuilt.append(len(shards))
        return _Job(ends, shards, np.bincount(hits, minlength=self.trace.shards))

    def _publish(self, job: _Job) -> None:
        """The next shard of an execution, without what it covers; then the execution may be over."""
        shard = job.shards[0]
        self._pending[shard] -= job.covered[shard]
        if not self._pending[shard]:
            self._loaded_at[shard] = -np.inf
        rest = job._replace(ends=job.ends[1:], shards=job.shards[1:])
        self._job = rest if rest.shards else None

    def _serve_until(self, moment: float) -> float:
        """Answer, or hold, what arrives before a moment; an execution that this starts brings it forward."""
        end = int(np.searchsorted(self.trace.queries, moment, side="left"))
        rows = np.arange(self._seen, end)
        if not len(rows):
            return moment
        if not self.policy.certifies:
            self._seen = end
            self._answer_by_all(rows)
            return moment
        label, is_certified = self._certify(rows)
        if not is_certified.all():
            first = float(self.trace.queries[rows[int(is_certified.argmin())]])
            was_idle = self._job is None
            self._start_if_due(first, uncertified=True)
            if was_idle and self._job is not None and self._job.ends[0] < moment:
                moment = self._job.ends[0]
                end = int(np.searchsorted(self.trace.queries, moment, side="left"))
        self._seen, count = end, end - rows[0]
        self._serve(rows[:count], label[:count], is_certified[:count])
        return moment

    def _serve(self, rows: np.ndarray, label: np.ndarray, is_certified: np.ndarray) -> None:
        self.is_certified[rows] = is_certified
        self._answer(rows[is_certified], label[is_certified])
        rows = rows[~is_certified]
        if not len(rows):
            return
        if self.policy.handling in ("execute", "defer"):
            self._held = np.concatenate([self._held, rows])
        elif self.policy.handling == "clean" and self._is_loaded().any():
            self.is_clean[rows] = True
            self._answer(rows, self._winners(self._votes(rows)[:, self._is_loaded()]))

    def _release(self, now: float) -> None:
        """Answer those who wait and can be certified now."""
        if not len(self._held):
            return
        label, is_certified = self._certify(self._held)
        self._answer(self._held[is_certified], label[is_certified], now)
        self._held = self._held[~is_certified]

    def _answer(self, rows: np.ndarray, label: np.ndarray, now: float | None = None) -> None:
        self.answered_at[rows] = self.trace.queries[rows] if now is None else now
        self.label[rows] = label
        if self._affected().any():
            self.is_different[rows] = label != self._winners(self._votes_after(rows))

    def _answer_by_all(self, rows: np.ndarray) -> None:
        """The baselines. Who waits is answered after what was asked for before, see `_wait_in_line`."""
        self.answered_at[rows] = self.trace.queries[rows]
        self.label[rows] = self._winners(self.votes.whole[rows])
        if self.policy.handling == "serve" and self._pending.any():
            self.is_unsafe[rows] = True
            self.is_different[rows] = self.label[rows] != self._winners(self._votes_after(rows))

    def _wait_in_line(self) -> None:
        """A query waits for the deletions before it, not for those that come while it waits."""
        if not len(self.executed_at):
            return
        before = np.searchsorted(self.trace.deletions, self.trace.queries, side="right")
        done = np.maximum.accumulate(self.executed_at)[np.maximum(before - 1, 0)]
        self.answered_at = np.where(
            before > 0, np.maximum(self.trace.queries, done), self.trace.queries
        )

    def _is_loaded(self) -> np.ndarray:
        """Shards that answer now: all but those just withdrawn, (shards,)."""
        return self._loaded_at == -np.inf

    def _affected(self) -> np.ndarray:
        """Shards that what is pending affects, under the target, (shards,)."""
        return self._pending > 0 if self.policy.target == "retrained" else ~self._is_loaded()

    def _certify(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        affected = self._affected()
        counts = tally(self._votes(rows)[:, ~affected], self.setting.labels)
        return certify(counts, int(affected.sum()))

    def _votes(self, rows: np.ndarray) -> np.ndarray:
        """Of the shards as they are without deleted data, (rows, shards)."""
        votes, cut = self.votes.whole[rows], np.flatnonzero(self._pending)
        votes[:, cut] = self.votes.shortened[np.ix_(rows, cut)]
        return votes

    def _votes_after(self, rows: np.ndarray) -> np.ndarray:
        """Of the target's ensemble, when everything pending has been executed."""
        if self.policy.target == "deactivated":
            return self._votes(rows)
        votes, cut = self.votes.whole[rows], np.flatnonzero(self._pending)
        votes[:, cut] = self.votes.retrained[np.ix_(rows, cut)]
        return votes

    def _winners(self, votes: np.ndarray) -> np.ndarray:
        return tally(votes, self.setting.labels).argmax(axis=1)
