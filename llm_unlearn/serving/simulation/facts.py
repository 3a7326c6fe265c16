"""What a simulation takes from a run: its shards, where subjects are, what a rebuild takes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm_unlearn.data.partition import SliceName
from llm_unlearn.errors import UserError
from llm_unlearn.exact.resolving import dependents
from llm_unlearn.exact.store import RunDirectory


@dataclass(frozen=True)
class RunFacts:
    """A run as the simulation sees it.

    Attributes:
        shards: their numbers.
        subjects: how many each holds, (shards,).
        seconds_per_shard: to train again what a subject's deletion takes, on average; None if the
            ledger does not know.
        rule: how the shards answer as one model.
    """

    directory: RunDirectory
    shards: tuple[int, ...]
    subjects: np.ndarray
    seconds_per_shard: float | None
    rule: str

    def homes(self, subjects: Iterable[str]) -> Mapping[str, Sequence[int]]:
        """By subject, the shards that hold records of it; who is not held is left out."""
        found: dict[str, list[int]] = {}
        with self.directory.changing("looking for subjects in it"):
            slices = self.directory.slices
            for name, here in slices.homes(subjects).items():
                for subject in here & slices.subjects(name):
                    found.setdefault(subject, []).append(name.shard)
        return found


def read_run(path: Path) -> RunFacts:
    """Read a run for a simulation.

    Raises:
        UserError: no run is there, or nothing in it would ever be rebuilt.
    """
    run = RunDirectory.open(path)
    if not run.config.num_shards:
        raise UserError(
            f"in {path} every subject has a shard of its own: a deletion is executed as soon as it is "
            "deactivated, there is nothing to simulate"
        )
    with run.changing("reading its shards"):
        shards = tuple(run.shards)
        headers = {
            (shard, part): run.slices.header(SliceName(shard, part))
            for shard in shards
            for part in range(run.config.num_slices)
        }
        nodes = dependents(run, shards)
    events = run.ledger.events("trained")
    seconds = {event.payload["node"]: float(event.payload["seconds"]) for event in events}
    held = np.array([headers[place].subjects for place in headers], dtype=float)
    costs = np.array([sum(seconds.get(key, 0.0) for key in nodes[place]) for place in headers])
    spent = float(held @ costs / held.sum()) if held.any() else 0.0
    return RunFacts(
        directory=run,
        shards=shards,
        subjects=held.reshape(len(shards), -1).sum(axis=1),
        seconds_per_shard=spent or None,
        rule=run.config.rule.aggregate,
    )
