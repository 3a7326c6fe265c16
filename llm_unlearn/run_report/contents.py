"""Everything that the page about a run says, as plain data: `--json` prints it."""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from llm_unlearn.exact.outlook import Outlook
from llm_unlearn.run_report import outside
from llm_unlearn.run_report.costs import Storage, Training
from llm_unlearn.run_report.evaluations import Comparison
from llm_unlearn.run_report.outside import CopyRow, Happened
from llm_unlearn.run_report.requests import Counts, RequestRow
from llm_unlearn.run_report.tries import MEANINGS, ShardTrie


@dataclass(frozen=True)
class About:
    """What kind of run it is."""

    name: str
    base_model: str
    blocks: str
    slice_data: str
    shards: int
    slices: int
    sequences: int
    a_shard_each: bool
    copies: int
    aggregate: str
    core_records: int | None


@dataclass(frozen=True)
class Chain:
    """The ledger's chain: how long it is, where it ends, and whether it holds."""

    entries: int
    head: str | None
    holds: bool


@dataclass(frozen=True)
class Expectation:
    """Expected requests from one state, under one model of who asks next."""

    state: str
    asks: str
    outlook: Outlook


@dataclass(frozen=True)
class Moment:
    """Something that happened, for the timeline."""

    kind: str
    time: float


@dataclass(frozen=True)
class Contents:
    """The page as data.

    Attributes:
        made_at: the clock of the report, seconds since the epoch.
        chain: None if the ledger cannot be read; nothing is known of requests then.
        problems: what is wrong: a broken chain, damage, deleted data that is still served.
        software: what is installed where the report was made.
    """

    made_at: float
    about: About
    chain: Chain | None
    problems: tuple[str, ...]
    is_served: bool
    counts: Counts
    requests: tuple[RequestRow, ...]
    shards: tuple[ShardTrie, ...]
    core_state: str | None
    expectations: tuple[Expectation, ...]
    storage: tuple[Storage, ...]
    training: Training
    copies: tuple[CopyRow, ...]
    other_events: tuple[Happened, ...]
    out_of_reach: tuple[str, ...]
    evaluation: Comparison | None
    moments: tuple[Moment, ...]
    software: dict[str, str]

    @property
    def served_depth(self) -> int:
        return sum(trie.served_depth for trie in self.shards)

    @property
    def full_depth(self) -> int:
        return sum(trie.full_depth for trie in self.shards)

    @property
    def nodes_by_state(self) -> dict[str, int]:
        """How many nodes are in each state; a node that several sequences share counts once."""
        counts = Counter(cell.state for trie in self.shards for cell in trie.nodes.values())
        return {state: counts[state] for state in MEANINGS if counts[state]}

    @property
    def outstanding(self) -> list[CopyRow]:
        return [copy for copy in self.copies if copy.state == outside.HOLDS]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; what is not a finite number is null."""
        more = {
            "served_depth": self.served_depth,
            "full_depth": self.full_depth,
            "nodes_by_state": self.nodes_by_state,
        }
        return _without_infinities(asdict(self) | more)


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
