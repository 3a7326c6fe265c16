"""When what is pending is executed, and what becomes of a query that cannot be certified meanwhile.

Deactivation is not decided here: a deletion takes its nodes out of every later answer at once, under
every policy but `serve-anyway`. What a policy decides is when the affected shards are *rebuilt*.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from llm_unlearn.errors import UserError

Timing = Literal["immediate", "uncertified", "threshold", "deadline"]
"""When pending deletions are executed: at once; as soon as an answer cannot be certified; when enough
shards are affected; only before the deadline. The deadline bounds all four."""

Handling = Literal["execute", "defer", "clean", "abstain", "wait", "serve"]
"""What a query gets that cannot be certified: it starts the execution and waits for it; it waits for
the execution that is due anyway; the answer of the clean shards, flagged; none. The baselines ask
for no certificate: every query waits for what is pending (`wait`), or none does (`serve`)."""

Target = Literal["deactivated", "retrained"]
"""Which ensemble certified answers agree with: the one without the deleted nodes, as it is served from
the deletion on; or the one that a rebuild will publish."""

DEADLINE_SECONDS = 24 * 3600.0
MOST_HOURS = 24 * 366
HEAD_START = 0.1  # share of the deadline that is left for the execution itself
SHARE_OF_SHARDS = 0.25

_CHOOSABLE: tuple[Handling, ...] = ("execute", "defer", "clean", "abstain")
_POINTLESS = {
    ("immediate", "defer"): "the execution has begun already when a query waits for it; "
    "choose --handling execute",
    ("uncertified", "defer"): "the query that would wait is what starts the execution; "
    "choose --handling execute",
    ("deadline", "execute"): "the first query that cannot be certified starts the execution, long "
    "before the deadline; choose --timing uncertified, which says so",
}


@dataclass(frozen=True)
class Policy:
    """One way to serve while deletions are pending; made by `make_policy`.

    Attributes:
        threshold: affected shards, or pending requests, that start an execution; None: a quarter
            of the shards, once `for_shards` has said how many there are.
        deadline_seconds: age at which a request must have been executed, whatever the timing.
        head_start_seconds: how long before the deadline its execution starts; None: a tenth of it.
        is_unsafe: answers may depend on deleted data until the execution is done.
    """

    name: str
    description: str
    timing: Timing
    handling: Handling
    target: Target = "deactivated"
    threshold: int | None = None
    deadline_seconds: float = DEADLINE_SECONDS
    head_start_seconds: float | None = None
    is_unsafe: bool = False

    @property
    def certifies(self) -> bool:
        """Whether a query is asked for its certificate at all; the two baselines do not."""
        return self.handling in _CHOOSABLE

    @property
    def latest_start_seconds(self) -> float:
        """Age of the oldest pending request at which an execution starts in any case."""
        head_start = self.head_start_seconds
        if head_start is None:
            head_start = HEAD_START * self.deadline_seconds
        return max(0.0, self.deadline_seconds - head_start)

    def for_shards(self, shards: int, seconds_per_shard: float | None = None) -> "Policy":
        """The policy with its threshold and its head start, for an ensemble of this size.

        What the margins of the votes can bear, half their median, is known only after many queries.
        With a quarter of the shards affected, an answer is still certified when the other shards
        agree on it by two votes to one.

        Args:
            seconds_per_shard: what rebuilding one takes, if it is known: two executions of all shards
                then fit before the deadline, the one that runs when a request is due, and its own.

        Raises:
            UserError: the threshold is more than there are shards.
        """
        found = self
        if seconds_per_shard is not None and found.head_start_seconds is None:
            found = replace(found, head_start_seconds=2 * shards * seconds_per_shard)
        if found.timing != "threshold":
            return found
        if found.threshold is None:
            return replace(found, threshold=max(1, int(SHARE_OF_SHARDS * shards)))
        if found.threshold > shards:
            raise UserError(
                f"--threshold {found.threshold} is more than the {shards} shards there are: "
                f"choose 1 to {shards}, or --timing deadline"
            )
        return found


def is_due(
    policy: Policy,
    affected_shards: int,
    pending_requests: int,
    oldest_age_seconds: float,
    uncertified_waiting: bool,
) -> str | None:
    """Why to execute now all that is pending; None: not yet. Ask when the trainer is idle.

    Args:
        policy: after `for_shards`.
        affected_shards: that an execution would rebuild, whichever the target.
        pending_requests: not executed yet.
        oldest_age_seconds: of the oldest of them, since its acknowledgement. For one with a deadline
            of its own: `policy.deadline_seconds` less the time that is left, if that is more.
        uncertified_waiting: some query could not be certified, and waits, or was answered otherwise
            since the last execution ended.

    Raises:
        ValueError: the threshold is not known yet.
    """
    if pending_requests == 0:
        return None
    if policy.timing == "immediate":
        return "a deletion is pending"
    if oldest_age_seconds >= policy.latest_start_seconds:
        return "the deadline is near"
    if uncertified_waiting and (policy.timing == "uncertified" or policy.handling == "execute"):
        return "an answer could not be certified"
    if policy.timing != "threshold":
        return None
    if policy.threshold is None:
        raise ValueError("the policy has no threshold yet: call for_shards")
    if affected_shards >= policy.threshold:
        return f"{affected_shards} shards are affected"
    if pending_requests >= policy.threshold:
        return f"{pending_requests} requests are pending"
    return None


DEFAULT_POLICY = "threshold-clean"

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(
            "immediate-execute",
            "rebuild at once; only a query that cannot be certified waits",
            "immediate",
            "execute",
        ),
        Policy(
            "uncertified-execute",
            "rebuild when a query cannot be certified, which waits for it",
            "uncertified",
            "execute",
        ),
        Policy(
            "threshold-execute",
            "rebuild when enough shards are affected, or when a query cannot be certified",
            "threshold",
            "execute",
        ),
        Policy(
            "threshold-defer",
            "rebuild when enough shards are affected; what cannot be certified waits until then",
            "threshold",
            "defer",
        ),
        Policy(
            "threshold-clean",
            "rebuild when enough shards are affected; the clean shards answer what cannot be "
            "certified, flagged",
            "threshold",
            "clean",
        ),
        Policy(
            "threshold-abstain",
            "rebuild when enough shards are affected; what cannot be certified is not answered",
            "threshold",
            "abstain",
        ),
        Policy(
            "deadline-clean",
            "rebuild before the deadline only; the clean shards answer what cannot be certified, "
            "flagged",
            "deadline",
            "clean",
        ),
        Policy(
            "oblivious",
            "for comparison: rebuild at once, and every query waits for what is pending",
            "immediate",
            "wait",
        ),
        Policy(
            "serve-anyway",
            "UNSAFE, for comparison: rebuild as threshold-clean, and answer with deleted data "
            "until then",
            "threshold",
            "serve",
            is_unsafe=True,
        ),
    )
}
"""The seven combinations worth a name, and two baselines."""


def make_policy(
    name: str | None = None,
    timing: str | None = None,
    handling: str | None = None,
    target: str | None = None,
    threshold: int | None = None,
    deadline_hours: float | None = None,
) -> Policy:
    """A policy by name, or put together from a timing and a handling; `threshold-clean` by default.

    Args:
        timing: `immediate`, `uncertified`, `threshold` or `deadline`.
        handling: `execute`, `defer`, `clean` or `abstain`; the baselines only have names.
        deadline_hours: from the acknowledgement of a request; 24 by default.

    Raises:
        UserError: no such policy, a combination without a meaning, or a number out of range.
    """
    if name is not None and (timing is not None or handling is not None):
        raise UserError("--policy says timing and handling: leave out --timing and --handling")
    if name is None and timing is None and handling is None:
        name = DEFAULT_POLICY
    if name is not None:
        _check_choice("--policy", name, tuple(POLICIES))
        policy = POLICIES[name]
    else:
        policy = _combine(timing or "threshold", handling or "clean")
    if target is not None:
        _check_choice("--target", target, get_args(Target))
        policy = replace(policy, target=target)
    if threshold is not None:
        if policy.timing != "threshold":
            raise UserError(
                f"--threshold has no effect on {policy.name}: leave it out, or choose "
                "--timing threshold"
            )
        if threshold < 1:
            raise UserError(f"--threshold is {threshold}, expected at least 1")
        policy = replace(policy, threshold=threshold)
    if deadline_hours is not None:
        if not 0 < deadline_hours <= MOST_HOURS:
            raise UserError(
                f"--deadline-hours is {deadline_hours}, expected more than 0, at most {MOST_HOURS}"
            )
        policy = replace(policy, deadline_seconds=3600.0 * deadline_hours)
    return policy


def _combine(timing: str, handling: str) -> Policy:
    _check_choice("--timing", timing, get_args(Timing))
    _check_choice("--handling", handling, _CHOOSABLE)
    if why := _POINTLESS.get((timing, handling)):
        raise UserError(f"--timing {timing} with --handling {handling} has no use: {why}")
    name = f"{timing}-{handling}"
    return POLICIES.get(name) or Policy(name, "as chosen", timing, handling)  # pyright: ignore[reportArgumentType]


def _check_choice(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{flag} is {value!r}, expected one of {', '.join(allowed)}")
