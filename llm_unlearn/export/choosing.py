"""Which served adapters an export is made of, so that it answers as the run does, or says why it cannot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.data.partition import CORE
from llm_unlearn.errors import UserError
from llm_unlearn.exact.served import depth_of, read_lineage
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.export.adapters import Adapter, combine

MERGED = "merged"


@dataclass(frozen=True)
class Part:
    """One adapter of an export: served ones, each with its weight.

    Attributes:
        name: of the shard, `core`, or `merged` for the weighted sum of several.
        sources: their directories in `served/`.
        lineages: of each source.
    """

    name: str
    sources: tuple[tuple[Path, float], ...]
    lineages: tuple[dict[str, Any], ...]

    @property
    def nodes(self) -> list[str]:
        return [node["key"] for lineage in self.lineages for node in lineage["nodes"]]

    def read(self) -> Adapter:
        """The adapter, with one rank and one scale."""
        adapters = [Adapter.read(directory) for directory, _ in self.sources]
        return combine(adapters, [weight for _, weight in self.sources])


def choose(run: RunDirectory, shard: int | None, as_one: bool) -> list[Part]:
    """The adapters of an export.

    Args:
        shard: only this one; all by default.
        as_one: one model is wanted, and not an adapter for each shard.

    Raises:
        UserError: nothing is served, nothing is left, no such shard, or several that answer as no one
            model does.
    """
    served = Served(run)
    if shard is not None:
        return [served.part_of(shard)]
    if len(run.shards) > 1 and run.config.rule.aggregate == "merge":
        return [served.sum()]
    if not as_one:
        return served.all_parts()
    if len(run.shards) <= 1:
        return served.all_parts()[:1]
    raise UserError(
        f"{run.path} answers by {run.config.rule.aggregate!r} with {len(run.shards)} shards, which no one merged "
        "model does: give --shard N for one of them, or export all with --vllm"
    )


def is_empty(run: RunDirectory) -> bool:
    """Is nothing left of anybody, so that the base model answers alone?

    Raises:
        UserError: nothing is served yet.
    """
    served = Served(run)
    return all(served.part(member) is None for member in run.members)


class Served:
    """What is served at one moment: `served` may point elsewhere a moment later."""

    def __init__(self, run: RunDirectory):
        self.run = run
        self.directory = run.served.resolve()
        if not run.served.exists():
            raise UserError(
                f"{run.path} serves nothing yet: train it first (`llm-unlearn rebuild`)"
            )

    def part(self, member: int) -> Part | None:
        """The adapter of a member; None if nothing is left of it."""
        name = self.run.member_name(member)
        lineage = read_lineage(self.directory / name)
        if lineage is None:
            raise UserError(f"{name} of {self.run.path} is not served: run `llm-unlearn rebuild`")
        if not lineage["nodes"]:
            return None
        return Part(name, ((self.directory / name, 1.0),), (lineage,))

    def part_of(self, shard: int) -> Part:
        """What answers for a shard.

        Raises:
            UserError: there is no such shard, or the base model answers for it.
        """
        if shard not in self.run.shards:
            raise UserError(
                f"{self.run.path} has no shard {shard}: it has {_some(self.run.shards)}"
            )
        part = self.part(shard)
        if part is None:
            raise UserError(
                f"nothing is left of shard {shard}: the base model answers for it, and needs no export"
            )
        return part

    def all_parts(self) -> list[Part]:
        """The adapters of all shards of which something is left, and of the core."""
        parts = [self.part(member) for member in self.run.members]
        found = [part for part in parts if part and (_depth(part) or part.name == self._core_name)]
        if not found:
            raise UserError(
                "nothing is left of any shard: the base model answers, and needs no export"
            )
        return found

    def sum(self) -> Part:
        """All shards with equal weights, as the rule `merge` has it; what is lost counts as the base
        model, or as the core."""
        core = self.part(CORE.shard) if self.run.core else None
        alive = [self.part(shard) for shard in self.run.shards]
        members = [part if part and _depth(part) else core for part in alive]
        distinct = {part.name: part for part in members if part}
        if not distinct:
            raise UserError(
                "nothing is left of any shard: the base model answers, and needs no export"
            )
        weights = [
            sum(part is not None and part.name == name for part in members) / len(members)
            for name in distinct
        ]
        held = [part.sources[0][0] for part in distinct.values()]
        lineages = tuple(part.lineages[0] for part in distinct.values())
        return Part(MERGED, tuple(zip(held, weights, strict=True)), lineages)

    @property
    def _core_name(self) -> str | None:
        return self.run.member_name(CORE.shard) if self.run.core else None


def _depth(part: Part) -> int:
    return depth_of(part.lineages[0])


def _some(shards: Sequence[int]) -> str:
    shown = ", ".join(map(str, shards[:8]))
    return shown if len(shards) <= 8 else f"{shown} and {len(shards) - 8} more"
