"""What a probe says: one line for each place that was looked at, and every adapter that was found."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["clean", "residue", "not seen"]
MOST_TOLD = 12  # problems of one place that are told one by one


@dataclass
class Look:
    """One place that was looked at.

    Attributes:
        examined: how many things were looked at there.
        problems: what should not be there.
        unseen: what could not be looked at. It never counts as clean.
        notes: what a reader should know besides.
    """

    place: str
    examined: int = 0
    problems: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        if self.problems:
            return "residue"
        return "not seen" if self.unseen else "clean"

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, **asdict(self)}


@dataclass(frozen=True)
class LiveAdapter:
    """An adapter that exists somewhere.

    Attributes:
        name: what it is called there.
        place: where: a path below the run, a path, or an address.
        digest: what identifies its content; None where it cannot be read.
        tensors: SHA-256 of its tensors as a file, likewise.
        nodes: keys of the nodes that it is made of, as it says itself.
    """

    name: str
    place: str
    digest: str | None
    tensors: str | None
    nodes: tuple[str, ...]
    problem: str | None = None


@dataclass(frozen=True)
class Probe:
    """What a probe found. `to_dict` is what `--json` prints, and what `--served` reads.

    Attributes:
        epoch: entries of the ledger when it looked; None where no run was at hand.
        served: what the run serves now.
        retired: names under which adapters were served before.
    """

    target: str
    epoch: int | None
    looks: tuple[Look, ...]
    adapters: tuple[LiveAdapter, ...] = ()
    served: tuple[LiveAdapter, ...] = ()
    retired: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Nothing was found. What was not seen is told beside it."""
        return not any(look.problems for look in self.looks)

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": 1,
            "target": self.target,
            "epoch": self.epoch,
            "clean": self.is_clean,
            "looks": [look.to_dict() for look in self.looks],
            "adapters": [asdict(adapter) for adapter in self.adapters],
            "served": [asdict(adapter) for adapter in self.served],
            "retired": list(self.retired),
        }
