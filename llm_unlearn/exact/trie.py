"""The trie of content-addressed nodes: which nodes a run wants, by what it holds now.

Deletion is cache invalidation. The key of a node is a digest of everything that determines its
bits, so after a record is gone the nodes that depended on it are no longer wanted, and the nodes
that are wanted in their place are exactly those of a run that never held the record.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llm_unlearn.data.partition import CORE
from llm_unlearn.data.records import digest
from llm_unlearn.exact.blocks import Block

# Raised by hand when what training computes changes; an upgrade that changes no bits keeps it.
NUMERICS_VERSION = 1


CORE_STAGE = -1


def seed_from(key: str, purpose: str) -> int:
    """A 31-bit seed that depends on the node and the purpose, and on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{key}:{purpose}".encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class Node:
    """One trained block: its address, its parent and the data below it.

    Attributes:
        path: the slices of the sequence up to and with this node's own, empty ones left out.
        roots: the Merkle roots of those slices, in the same order.
        parent: key of the node on which it was trained; at depth one the core's, or None.
    """

    key: str
    shard: int
    block: Block
    path: tuple[int, ...]
    roots: tuple[str, ...]
    parent: str | None

    @property
    def is_core(self) -> bool:
        """Is it the permanent core, which stands under every other node and never goes?"""
        return self.shard == CORE.shard

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "block": self.block.to_dict(),
            "path": list(self.path),
            "roots": list(self.roots),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Node":
        block = Block(**{**value["block"], "layers": tuple(value["block"]["layers"])})
        return cls(
            **{
                **value,
                "block": block,
                "path": tuple(value["path"]),
                "roots": tuple(value["roots"]),
            }
        )


def node_key(identity: str, block: Block, parent: str | None, root: str) -> str:
    """Key of a node.

    Args:
        identity: digest of base model, tokenizer, numerics version and training configuration.
        root: Merkle root of the slice that the node adds; the earlier ones are in the parent's key.
    """
    return digest({"identity": identity, "block": block.to_dict(), "parent": parent, "root": root})


def core_node(identity: str, layers: tuple[int, ...], rank: int, root: str) -> Node:
    """The permanent core: a whole adapter at a stage of its own, so that it shares no key."""
    block = Block(CORE_STAGE, layers, rank)
    key = node_key(identity, block, None, root)
    return Node(key, CORE.shard, block, path=(CORE.slice,), roots=(root,), parent=None)


def wanted_paths(
    identity: str,
    shard: int,
    sequences: list[tuple[int, ...]],
    blocks: list[Block],
    roots: Mapping[int, str | None],
    core: Node | None = None,
) -> list[list[Node]]:
    """For every sequence of a shard, the nodes that a complete run holds, first stage first.

    The core, if there is one, comes before them all and is the parent of those of depth one.
    Sequences with an equal prefix share its nodes (equal keys). The stage of an empty slice is
    passed over: its block stays absent, and the next stage is trained on what came before.
    """
    paths = []
    for sequence in sequences:
        nodes: list[Node] = []
        for block, slice_index in zip(blocks, sequence, strict=True):
            root = roots[slice_index]
            if root is None:
                continue
            before = nodes[-1] if nodes else None
            parent = before or core
            nodes.append(
                Node(
                    key=node_key(identity, block, parent.key if parent else None, root),
                    shard=shard,
                    block=block,
                    path=(*(before.path if before else ()), slice_index),
                    roots=(*(before.roots if before else ()), root),
                    parent=parent.key if parent else None,
                )
            )
        paths.append([core, *nodes] if core else nodes)
    return paths


def live(path: Sequence[Node]) -> list[Node]:
    """The nodes whose tensors, side by side, are the adapter of a path: first stage first.

    All of them, save that a block which continues the one before it has taken its place; the core
    is nobody's to continue.
    """
    if not path or not path[-1].block.continues:
        return list(path)
    return [*(node for node in path[:-1] if node.is_core), path[-1]]


def ground_of(node: Node, parents: Sequence[Node]) -> tuple[list[Node], Node | None]:
    """What a node is trained on: the nodes frozen under it, and the one whose tensors it starts from.

    Args:
        parents: the nodes of the path before it.
    """
    frozen = live([*parents, node])[:-1]
    replaced = [parent for parent in live(parents) if parent not in frozen]
    return frozen, replaced[-1] if replaced else None


def longest_surviving_prefix(paths: list[list[Node]], exists: Callable[[str], bool]) -> list[Node]:
    """The deepest path that can be served; among equally deep ones the first sequence's."""
    best: list[Node] = []
    for path in paths:
        alive = next((depth for depth, node in enumerate(path) if not exists(node.key)), len(path))
        if alive > len(best):
            best = path[:alive]
    return best


def missing_nodes(paths: list[list[Node]], exists: Callable[[str], bool]) -> list[Node]:
    """What remains to be trained, each node once: sequence by sequence, parents before children."""
    return list(
        {node.key: node for path in paths for node in path if not exists(node.key)}.values()
    )
