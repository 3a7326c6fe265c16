"""From what a person asks for to a simulation: the one function behind `llm-unlearn simulate-serving`."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from llm_unlearn.errors import UserError
from llm_unlearn.serving.policy import POLICIES, Policy, Target, make_policy
from llm_unlearn.serving.simulation.numbers import BASELINE, Outcome, Setting, headline, simulate
from llm_unlearn.serving.simulation.trace import Trace, invent_trace, read_trace

if TYPE_CHECKING:
    from llm_unlearn.serving.simulation.facts import RunFacts

RATE, DELETIONS_PER_HOUR, HOURS, SHARDS = 2.0, 60.0, 2.0, 20
BOTH = "both"


@dataclass(frozen=True)
class Arrivals:
    """Where queries and deletions come from: a trace, or numbers; None for what is not said.

    Attributes:
        run: run directory whose shards and subjects are meant.
        trace: file to replay.
        rate: queries per second.
    """

    run: Path | None = None
    trace: Path | None = None
    rate: float | None = None
    deletions_per_hour: float | None = None
    hours: float | None = None
    shards: int | None = None


@dataclass(frozen=True)
class Simulated:
    """What was simulated, and what came of it.

    Attributes:
        notes: where the simulation is not like the run.
    """

    setting: Setting
    queries: int
    deletions: int
    shards: int
    hours: float
    outcomes: list[Outcome]
    notes: list[str]

    @property
    def sentence(self) -> str:
        """What was simulated."""
        return (
            f"{self.queries} queries and {self.deletions} deletions in {self.hours:.2f} h, "
            f"{self.shards} shards of {self.setting.seconds_per_shard:.3g} s, "
            f"seed {self.setting.seed}"
        )

    def by_target(self) -> dict[str, list[Outcome]]:
        targets = dict.fromkeys(outcome.target for outcome in self.outcomes)
        return {t: [o for o in self.outcomes if o.target == t] for t in targets}

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return asdict(self) | {
            "headlines": {target: headline(rows) for target, rows in self.by_target().items()}
        }


def simulate_serving(
    arrivals: Arrivals,
    setting: Setting,
    seconds_per_shard: float | None = None,
    policy: str | None = None,
    target: str = BOTH,
    threshold: int | None = None,
    deadline_hours: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Simulated:
    """Simulate every policy, or one beside the baseline, on a trace or on invented arrivals.

    Args:
        seconds_per_shard: instead of the setting's; by default the run's own, if there is a run.
        target: `deactivated`, `retrained`, or `both`.
        threshold: of the policies that have one.
        progress: called with how many policies are done, and of how many.

    Raises:
        UserError: options that contradict each other, a bad line of the trace, a number out of range.
    """
    policies = _policies(policy, target, threshold, deadline_hours)
    facts = _facts(arrivals)
    trace = _trace(arrivals, facts, setting.seed)
    notes = []
    if facts is not None:
        seconds_per_shard = seconds_per_shard or facts.seconds_per_shard
        if seconds_per_shard is None:
            raise UserError(
                f"the ledger of {arrivals.run} knows no training times: give --seconds-per-shard"
            )
        if facts.rule != "vote":
            notes.append(
                f"the run answers by {facts.rule!r}; here all shards vote, which asks every shard "
                "and certifies less than answers for which few are asked"
            )
    if seconds_per_shard is not None:
        setting = replace(setting, seconds_per_shard=seconds_per_shard)
    outcomes = simulate(trace, setting, policies, progress)
    hours = trace.seconds / 3600.0
    return Simulated(
        setting, len(trace.queries), len(trace.deletions), trace.shards, hours, outcomes, notes
    )


def _policies(
    name: str | None, target: str, threshold: int | None, deadline_hours: float | None
) -> list[Policy]:
    names: Sequence[str] = (
        tuple(POLICIES) if name is None else tuple(dict.fromkeys((name, BASELINE)))
    )
    if name is not None:
        make_policy(name, threshold=threshold)  # says so if it has none
    targets = get_args(Target) if target == BOTH else (target,)
    return [
        make_policy(
            each,
            target=chosen,
            threshold=threshold
            if each in POLICIES and POLICIES[each].timing == "threshold"
            else None,
            deadline_hours=deadline_hours,
        )
        for chosen in targets
        for each in names
    ]


def _facts(arrivals: Arrivals) -> "RunFacts | None":
    if arrivals.run is None:
        return None
    if arrivals.shards is not None:
        raise UserError("--run says how many shards there are: leave out --shards")
    from llm_unlearn.serving.simulation.facts import read_run  # needs a run, and what reads it

    return read_run(arrivals.run)


def _trace(arrivals: Arrivals, facts: "RunFacts | None", seed: int) -> Trace:
    shards = SHARDS if arrivals.shards is None else arrivals.shards
    if arrivals.trace is None:
        return invent_trace(
            RATE if arrivals.rate is None else arrivals.rate,
            DELETIONS_PER_HOUR
            if arrivals.deletions_per_hour is None
            else arrivals.deletions_per_hour,
            HOURS if arrivals.hours is None else arrivals.hours,
            shards if facts is None else len(facts.shards),
            seed,
            None if facts is None else facts.subjects,
        )
    for flag, value in (
        ("--rate", arrivals.rate),
        ("--deletions-per-hour", arrivals.deletions_per_hour),
        ("--hours", arrivals.hours),
    ):
        if value is not None:
            raise UserError(f"--trace says when what arrives: leave out {flag}")
    if facts is None:
        return read_trace(arrivals.trace, range(shards))
    return read_trace(arrivals.trace, facts.shards, facts.homes)
