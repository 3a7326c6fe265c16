"""The trie of a run as it stands: what became of every node that its sequences want."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llm_unlearn.data.partition import SliceName
from llm_unlearn.exact.adapters import WEIGHTS_NAME
from llm_unlearn.exact.ledger import Event, Request
from llm_unlearn.exact.outlook import Standing
from llm_unlearn.exact.served import read_lineage
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.exact.trie import Node
from llm_unlearn.run_report.damage import Damage

SERVED, LIVE, LOST, MISSING, BROKEN, EMPTY = (
    "served", "live", "lost", "missing", "broken", "empty",
)  # fmt: skip
MEANINGS = {
    SERVED: "served now",
    LIVE: "trained and usable, not served (another order keeps more)",
    LOST: "dropped by a deletion: wanted, not trained again yet",
    MISSING: "not there, and no deletion took it: not trained yet",
    BROKEN: "damaged, or what it stands on is not there: to be trained again",
    EMPTY: "the slice holds no records: nothing to train",
}
REBUILT = "trained again after a deletion, without the deleted data"


@dataclass(frozen=True)
class Cell:
    """One stage of one sequence.

    Attributes:
        node: key of the node that the run wants there; None where the slice is empty.
        is_rebuilt: trained after a request that hit a slice below it.
    """

    slice: int
    state: str
    node: str | None = None
    is_rebuilt: bool = False

    @property
    def is_usable(self) -> bool:
        return self.state in (SERVED, LIVE)


@dataclass(frozen=True)
class Row:
    """One sequence: its cells, stage by stage, and how many of its blocks survive from the first on."""

    cells: tuple[Cell, ...]
    depth: int


@dataclass(frozen=True)
class ShardTrie:
    """One shard.

    Attributes:
        served_row: the sequence that is served; None if nothing of the shard is.
        stale: served nodes that depend on deleted data, or are unknown.
    """

    shard: int
    served_depth: int
    full_depth: int
    records: int
    subjects: tuple[int, ...]
    rows: tuple[Row, ...] = ()
    served_row: int | None = None
    stale: tuple[str, ...] = ()

    @property
    def cells(self) -> list[Cell]:
        return [cell for row in self.rows for cell in row.cells]

    @property
    def nodes(self) -> dict[str, Cell]:
        """Every node that the shard wants, once."""
        return {cell.node: cell for cell in self.cells if cell.node is not None}

    @property
    def is_lacking(self) -> bool:
        """Is it served with less than it could have, or with what it should not have?"""
        depth = min(self.served_depth, self.surviving_depth)
        return depth < self.full_depth or bool(self.stale) or not self.rows

    @property
    def surviving_depth(self) -> int:
        return max((row.depth for row in self.rows), default=0)

    def standing(self, complete: bool = False) -> Standing:
        """What the outlook starts from; `complete`: as a rebuild would leave it."""
        prefixes = []
        for row in self.rows:
            wanted = [cell.slice for cell in row.cells if cell.node is not None]
            prefixes.append(tuple(wanted if complete else wanted[: row.depth]))
        return Standing(tuple(prefixes), self.full_depth, self.subjects)


@dataclass(frozen=True)
class Past:
    """What the ledger says of slices and nodes.

    Attributes:
        hits: sequence number of the first request that hit a slice and cost nodes.
        trained: sequence number of the last training of a node.
    """

    hits: Mapping[SliceName, int] = field(default_factory=dict)
    trained: Mapping[str | None, int] = field(default_factory=dict)

    @classmethod
    def of(cls, events: Sequence[Event], requests: Sequence[Request]) -> "Past":
        asked = {e.payload.get("request"): e.sequence for e in events if e.kind == "request"}
        hits: dict[SliceName, int] = {}
        for request in requests:
            if request.nodes and request.id in asked:
                for target in request.places:
                    hits.setdefault(SliceName(target.shard, target.slice), asked[request.id])
        # Without a node: an edited entry, of which the chain speaks.
        trained = {e.payload.get("node"): e.sequence for e in events if e.kind == "trained"}
        return cls(hits, trained)

    def is_hit(self, node: Node) -> bool:
        return any(SliceName(node.shard, part) in self.hits for part in node.path)

    def is_rebuilt(self, node: Node) -> bool:
        moment = self.trained.get(node.key)
        hits = [self.hits.get(SliceName(node.shard, part)) for part in node.path]
        return moment is not None and any(hit is not None and hit < moment for hit in hits)


def read_tries(run: RunDirectory, past: Past, damage: Damage) -> list[ShardTrie]:
    """Every shard; one that cannot be read has no rows, and says why in `damage`."""
    found, num_slices = [], run.config.num_slices
    for shard in run.shards:
        served = _served_keys(run, shard, damage)
        trie = ShardTrie(shard, len(served), num_slices, 0, (0,) * num_slices)
        with damage.noting(f"shard {shard}"):
            trie = _read_trie(run, shard, served, past, damage)
        found.append(trie)
    return found


def _read_trie(
    run: RunDirectory, shard: int, served: list[str], past: Past, damage: Damage
) -> ShardTrie:
    headers = [run.slices.header(name) for name in run.slices.names_in(shard)]
    paths = run.paths(shard)
    blocks = [[node for node in path if not node.is_core] for path in paths]
    wanted = {node.key for path in paths for node in path}
    present = {key: _is_usable(run, key, damage) for key in wanted if run.nodes.exists(key)}
    rows = tuple(
        _row(sequence, path, served, present, past)
        for sequence, path in zip(run.config.sequences, paths, strict=True)
    )
    keys = [[node.key for node in path[: len(served)]] for path in blocks]
    return ShardTrie(
        shard=shard,
        served_depth=len(served),
        full_depth=max(map(len, blocks)),
        records=sum(header.records for header in headers),
        subjects=tuple(header.subjects for header in headers),
        rows=rows,
        served_row=keys.index(served) if served and served in keys else None,
        stale=tuple(key for key in served if key not in wanted),
    )


def _served_keys(run: RunDirectory, shard: int, damage: Damage) -> list[str]:
    """Keys of the nodes in a served adapter, without the core's."""
    directory = run.served / run.member_name(shard)
    entry = read_lineage(directory)
    if entry is None:
        if run.served.exists():
            damage.add(f"shard {shard}", "what is served has no readable lineage.json")
        return []
    if not (directory / WEIGHTS_NAME).is_file():
        damage.add(f"shard {shard}", f"what is served has no {WEIGHTS_NAME}")
    core = run.core.key if run.core else None
    with damage.noting(f"lineage.json of shard {shard}"):
        return [node["key"] for node in entry["nodes"] if node["key"] != core]
    return []


def _is_usable(run: RunDirectory, key: str, damage: Damage) -> bool:
    """Is a node there, as far as its manifest tells? Its weights are for `verify` to read."""
    with damage.noting(f"node {key[:12]}"):
        run.nodes.manifest(key)
        if (run.nodes.directory / key / WEIGHTS_NAME).is_file():
            return True
        damage.add(f"node {key[:12]}", f"{WEIGHTS_NAME} is missing")
    return False


def _row(
    sequence: Sequence[int],
    path: list[Node],
    served: list[str],
    present: Mapping[str, bool],
    past: Past,
) -> Row:
    """One sequence.

    Args:
        present: the nodes that are there, and whether each can be used.
    """
    nodes = {node.path[-1]: node for node in path if not node.is_core}
    alive = next((d for d, node in enumerate(path) if not present.get(node.key)), len(path))
    reachable = {node.key for node in path[:alive]}

    def cell(part: int) -> Cell:
        node = nodes.get(part)
        if node is None:
            return Cell(part, EMPTY)
        if node.key in reachable:
            state = SERVED if node.key in served else LIVE
        elif node.key in present or node.key in served:
            state = BROKEN
        else:
            state = LOST if past.is_hit(node) else MISSING
        return Cell(part, state, node.key, node.key in present and past.is_rebuilt(node))

    depth = sum(not node.is_core for node in path[:alive])
    return Row(tuple(map(cell, sequence)), depth)
