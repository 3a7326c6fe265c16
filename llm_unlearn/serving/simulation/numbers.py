"""What every policy would have done with the same queries and deletions, before anything is deployed.

A discrete-event simulation of one server and one trainer. The trainer runs one execution at a time,
which rebuilds the shards of all deletions that were pending when it began; answers never wait for it
unless the policy says so. What a shard says is invented (`votes.py`), so that the answers
after an execution are known, and every answer can be held against them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llm_unlearn.errors import UserError
from llm_unlearn.serving.policy import POLICIES, Policy
from llm_unlearn.serving.simulation.replay import Replay, Setting
from llm_unlearn.serving.simulation.trace import Trace
from llm_unlearn.serving.simulation.votes import draw_votes

BASELINE = "oblivious"
MOST_LABELS = 256
ENOUGH_WAITING_SAVED = 95.0  # %, of a policy that is called the best
MOST_UNCERTIFIED = 1.0  # % of queries that get an answer without a certificate, or none, likewise


@dataclass(frozen=True)
class Latency:
    """Seconds from a query's arrival to its answer."""

    mean: float
    p50: float
    p99: float


@dataclass(frozen=True)
class Outcome:
    """One policy on the trace; percentages of queries unless said otherwise.

    Attributes:
        latency: of all answers; None without any. `certified`, `uncertified`: of those that could, or
            could not, be certified when they arrived (baselines ask for no certificate).
        waiting_saved: percent of the time that queries wait beyond `seconds_per_answer` under the baseline.
        latency_saved: likewise of the mean latency.
        retrains: shards rebuilt, in so many `executions`; `retrains_saved`: percent of the baseline's.
        certified: at once. waited: for an execution or a deactivation. clean: by clean shards, without
            a certificate. refused: not answered.
        different: answers that the target's ensemble would not have given (a number).
        unsafe: answers in which shards that held deleted data had a vote (a number).
        missed: deletions executed after the deadline.
        right: percent of the answers; `right_clean`: of those by clean shards without a certificate.
    """

    policy: str
    target: str
    is_unsafe: bool
    queries: int
    latency: Latency | None
    latency_certified: Latency | None
    latency_uncertified: Latency | None
    waiting_saved: float | None
    latency_saved: float | None
    retrains: int
    retrains_saved: float | None
    executions: int
    certified: float | None
    waited: float
    clean: float
    refused: float
    different: int
    unsafe: int
    missed: int
    right: float | None
    right_clean: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def simulate(
    trace: Trace,
    setting: Setting,
    policies: Sequence[Policy],
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Replay a trace under some policies, all with the same votes, and beside the baseline.

    Args:
        progress: called with how many policies are done, and of how many.

    Returns:
        An outcome for each policy, in their order. The baseline, which is no other under another
        target, is simulated in any case; it is among the outcomes only if it is asked for.

    Raises:
        UserError: a number of the setting is out of range, or a policy does not fit the trace.
    """
    _check(setting)
    votes = draw_votes(
        len(trace.queries),
        trace.shards,
        setting.labels,
        setting.accuracy,
        setting.kept,
        setting.seed,
    )
    baseline = Replay(trace, votes, POLICIES[BASELINE], setting).run()
    outcomes = []
    for number, policy in enumerate(policies, start=1):
        is_baseline = policy.name == BASELINE
        replay = baseline if is_baseline else Replay(trace, votes, policy, setting).run()
        outcomes.append(_outcome(replay, policy, baseline))
        if progress is not None:
            progress(number, len(policies))
    return outcomes


def headline(outcomes: Sequence[Outcome]) -> str:
    """What the best policy saves, in one line.

    The best is the one that saves most retrains among those that save nearly all waiting and leave
    hardly any query without a certified answer; if there is none, the one that saves most waiting.
    """
    safe = [o for o in outcomes if not o.is_unsafe and o.policy != BASELINE]
    safe = [o for o in safe if o.waiting_saved is not None and o.retrains_saved is not None]
    if not safe:
        return "against inference-oblivious serving: nothing to save, as no query waits there"
    good = [
        o
        for o in safe
        if (o.waiting_saved or 0.0) >= ENOUGH_WAITING_SAVED
        and o.clean + o.refused <= MOST_UNCERTIFIED
    ]
    best = max(
        good or safe,
        key=lambda o: (o.retrains_saved if good else o.waiting_saved, o.certified or 0.0),
    )
    right = next((o.right for o in outcomes if o.policy == BASELINE), None)
    compared = "" if right is None else f" ({right:.1f} % there)"
    return (
        f"against inference-oblivious serving: {best.policy} saves {best.waiting_saved:.1f} % of the "
        f"waiting and {best.retrains_saved:.1f} % of the retrains, with {best.certified:.1f} % of the "
        f"queries certified at once and {best.right:.1f} % of the answers right{compared}; "
        "the paper reports up to 99 % and 31 %"
    )


def _check(setting: Setting) -> None:
    for name in ("seconds_per_shard", "seconds_per_answer"):
        value = getattr(setting, name)
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} is {value}, expected more than 0")
    if not 0 <= setting.seconds_per_deactivation < math.inf:
        raise UserError(
            f"seconds_per_deactivation is {setting.seconds_per_deactivation}, expected 0 or more"
        )
    if not 2 <= setting.labels <= MOST_LABELS:
        raise UserError(f"labels is {setting.labels}, expected 2 to {MOST_LABELS}")
    if not 1 / setting.labels <= setting.accuracy < 1:
        raise UserError(
            f"accuracy is {setting.accuracy}, expected 1/{setting.labels} (guessing) to below 1"
        )
    if not 0 <= setting.kept <= 1:
        raise UserError(f"kept is {setting.kept}, expected 0 to 1")


def _outcome(replay: Replay, policy: Policy, baseline: Replay) -> Outcome:
    waited, answered = _waited(replay), ~np.isnan(replay.answered_at)
    before = _waited(baseline)
    service = replay.setting.seconds_per_answer
    is_certified = replay.is_certified if policy.certifies else np.zeros_like(answered)
    mean = float(np.mean(waited[answered])) if answered.any() else None
    ages = replay.executed_at - replay.trace.deletions
    is_right = replay.label == replay.votes.truth
    retrains, retrains_before = sum(replay.rebuilt), sum(baseline.rebuilt)
    return Outcome(
        policy=policy.name,
        target=policy.target,
        is_unsafe=policy.is_unsafe,
        queries=len(waited),
        latency=_latency(waited[answered] + service),
        latency_certified=_latency(waited[answered & is_certified] + service),
        latency_uncertified=_latency(waited[answered & ~is_certified] + service)
        if policy.certifies
        else None,
        waiting_saved=None if mean is None else _saved(mean, float(before.mean())),
        latency_saved=None if mean is None else _saved(mean + service, before.mean() + service),
        retrains=retrains,
        retrains_saved=_saved(retrains, retrains_before),
        executions=len(replay.rebuilt),
        certified=_percent(is_certified) if policy.certifies else None,
        waited=_percent(waited > 0),
        clean=_percent(replay.is_clean),
        refused=_percent(~answered),
        different=int(replay.is_different.sum()),
        unsafe=int(replay.is_unsafe.sum()),
        missed=int((ages > replay.policy.deadline_seconds).sum()),
        right=_percent(is_right[answered]) if answered.any() else None,
        right_clean=_percent(is_right[replay.is_clean]) if replay.is_clean.any() else None,
    )


def _waited(replay: Replay) -> np.ndarray:
    return replay.answered_at - replay.trace.queries


def _latency(seconds: np.ndarray) -> Latency | None:
    if not len(seconds):
        return None
    p50, p99 = np.percentile(seconds, (50, 99))
    return Latency(float(seconds.mean()), float(p50), float(p99))


def _saved(now: float, before: float) -> float | None:
    """Percent; None if there was nothing to save."""
    return float(100.0 * (1.0 - now / before)) if before > 0 else None


def _percent(chosen: np.ndarray) -> float:
    return float(100.0 * chosen.mean())
