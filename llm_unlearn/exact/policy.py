"""What follows a deletion, as somebody chose beforehand in RUN/policy.toml.

    after_deletion = "deactivate"       # or "rebuild", or "background": rebuild in another process

    [floor]                             # whatever else is chosen, rebuild when too much is lost:
    action = "background"               # or "rebuild"
    depth = 0.5                         # mean share of the full depth that is still served
    utility = 0.6                       # value of a metric of the last evaluation
    metric = "model_utility"
    results = "evaluation/results.json" # relative to the policy file

A deletion deactivates in any case, at once; the policy says what is trained afterwards, and when.
"""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.errors import UserError
from llm_unlearn.exact.served import depth_of, read_lineage
from llm_unlearn.exact.store import RunDirectory

POLICY_NAME, LOG_NAME = "policy.toml", "rebuild.log"
DEACTIVATE, REBUILD, BACKGROUND = "deactivate", "rebuild", "background"
LOW_PRIORITY = 10  # niceness


@dataclass(frozen=True)
class Policy:
    """Floors are off where they are None."""

    after_deletion: str = DEACTIVATE
    floor_action: str = BACKGROUND
    depth: float | None = None
    utility: float | None = None
    metric: str | None = None
    results: Path | None = None


@dataclass(frozen=True)
class Decision:
    """What is to be done now, and why."""

    action: str
    reason: str


def read_policy(run: RunDirectory, path: Path | None = None) -> Policy:
    """The policy of a run: from a file, or RUN/policy.toml, or the default.

    Raises:
        UserError: the file cannot be read or says something that is not understood.
    """
    source = path or run.path / POLICY_NAME
    if path is None and not source.is_file():
        return Policy()
    try:
        told = tomllib.loads(source.read_text(encoding="utf-8"))
        return _parse(told, source.parent)
    except (OSError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise UserError(f"cannot use the policy {source}: {error}") from None


def _parse(told: Mapping[str, Any], folder: Path) -> Policy:
    floor = dict(told.get("floor", {}))
    _refuse_unknown(told, {"after_deletion", "floor"})
    _refuse_unknown(floor, {"action", "depth", "utility", "metric", "results"})
    after = _one_of(told.get("after_deletion", DEACTIVATE), (DEACTIVATE, REBUILD, BACKGROUND))
    action = _one_of(floor.get("action", BACKGROUND), (REBUILD, BACKGROUND))
    depth, utility = floor.get("depth"), floor.get("utility")
    for name, value in (("depth", depth), ("utility", utility)):
        if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
            raise ValueError(f"{name} is {value!r}, expected a number between 0 and 1")
    if utility is not None and not (floor.get("metric") and floor.get("results")):
        raise ValueError("a floor of utility needs metric and results")
    results = folder / floor["results"] if floor.get("results") else None
    return Policy(after, action, depth, utility, floor.get("metric"), results)


def _refuse_unknown(told: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(told.keys() - known):
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(sorted(known))}")


def _one_of(value: object, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{value!r} is not one of {', '.join(known)}")
    return str(value)


def decide(run: RunDirectory, policy: Policy) -> Decision:
    """What the policy says about the run as it is served now."""
    if (depth := share_served(run)) < (policy.depth or 0.0):
        reason = f"{depth:.0%} of the depth is served, the floor is {policy.depth:.0%}"
        return Decision(policy.floor_action, reason)
    if policy.utility is not None:
        utility = _utility(policy)
        if utility is None:
            return Decision(
                policy.after_deletion, f"the policy; {policy.results} has no {policy.metric} yet"
            )
        if utility < policy.utility:
            reason = f"{policy.metric} was {utility:.3f}, the floor is {policy.utility}"
            return Decision(policy.floor_action, reason)
    return Decision(policy.after_deletion, "the policy")


def share_served(run: RunDirectory) -> float:
    """Mean share of the full depth with which the shards are served; 1 where nothing is to serve."""
    shares = []
    for shard in run.shards:
        full = max(sum(not node.is_core for node in path) for path in run.paths(shard))
        depth = depth_of(read_lineage(run.served / run.member_name(shard)))
        shares.append(depth / full if full else 1.0)
    return sum(shares) / len(shares) if shares else 1.0


def _utility(policy: Policy) -> float | None:
    """The metric's value in the last evaluation; None if there is none."""
    try:
        value = json.loads((policy.results or Path()).read_bytes())["values"][policy.metric][
            "value"
        ]
        return None if value is None else float(value)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def rebuild_in_background(run: RunDirectory) -> Path:
    """As `start_rebuild`; returns the log."""
    start_rebuild(run)
    return run.path / LOG_NAME


def start_rebuild(run: RunDirectory) -> subprocess.Popen[bytes]:
    """Start `llm-unlearn rebuild` in a process of its own, at low priority, with a log in the run.

    If a training is going on, the new process ends at once and says so in the log; the one that is
    there goes on with what the deletion took.
    """
    descriptor = os.open(run.path / LOG_NAME, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "llm_unlearn", "rebuild", str(run.path.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
            preexec_fn=_lower_priority,
        )
    finally:
        os.close(descriptor)


def _lower_priority() -> None:
    os.nice(LOW_PRIORITY)
