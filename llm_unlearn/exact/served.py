"""What is served: per shard the longest surviving prefix, as an ordinary PEFT adapter; and the core."""

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_unlearn import files
from llm_unlearn.data.partition import CORE
from llm_unlearn.data.records import canonical, digest
from llm_unlearn.exact.adapters import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    adapter_config,
    assemble,
    empty_adapter,
    served_digest,
    to_bytes,
)
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.exact.trie import CORE_STAGE, Node, live, longest_surviving_prefix

LINEAGE_NAME = "lineage.json"

CARD = """---
library_name: peft
base_model: {base}
tags: [unlearning, s3t, lora]
---
# {title}

{sentence}

Load it with `PeftModel.from_pretrained(base_model, "this directory")`. `lineage.json` names the nodes it is made of.
What is served is a deterministic function of data that contains no deleted record; the base model's own
pre-training data is outside the guarantee.
"""
CARD_CORE = (
    "So is the permanent core that it stands on: what was trained into it cannot be deleted.\n"
)


def read_lineage(directory: Path) -> dict[str, Any] | None:
    """The lineage of a served shard, or None if there is none to read."""
    try:
        return json.loads((directory / LINEAGE_NAME).read_bytes())
    except (OSError, ValueError):
        return None


def depth_of(lineage: dict[str, Any] | None) -> int:
    """How many blocks a served shard has, on the core or on the base model."""
    return sum(node["stage"] != CORE_STAGE for node in lineage["nodes"]) if lineage else 0


def prefix_to_serve(run: RunDirectory, shard: int) -> list[Node]:
    """The longest surviving prefix. Damaged nodes count as lost, so they cannot hold up a deletion.

    The files of the nodes are read only where something new has to be assembled.
    """
    paths = run.paths(shard)
    present = longest_surviving_prefix(paths, run.nodes.exists)
    if is_current(run, shard, present):
        return present
    alive: dict[str, bool] = {}

    def is_alive(key: str) -> bool:
        if key not in alive:
            alive[key] = run.nodes.exists(key) and run.nodes.is_intact(key)
        return alive[key]

    return longest_surviving_prefix(paths, is_alive)


def lineage(run: RunDirectory, shard: int, nodes: list[Node]) -> dict[str, Any]:
    manifests = [run.nodes.manifest(node.key) for node in nodes]
    return {
        "shard": shard,
        "base_model": run.shape.weights,
        "identity": run.identity,
        "nodes": [
            {
                "key": node.key,
                "weights": manifest["weights"],
                "words": manifest.get("words"),
                "stage": node.block.stage,
                "slice": node.path[-1],
                "root": node.roots[-1],
            }
            for node, manifest in zip(nodes, manifests, strict=True)
        ],
    }


def words_path(directory: Path, stage: int) -> Path:
    """Where a served shard keeps the index of the node of a stage."""
    return directory / f"words-{stage}.safetensors"


def write_shard(
    run: RunDirectory, shard: int, nodes: list[Node], directory: Path
) -> dict[str, Any]:
    """Assemble a path of nodes into a new PEFT adapter directory; returns its lineage."""
    tensors = (
        assemble([run.nodes.load(node.key) for node in live(nodes)])
        if nodes
        else empty_adapter(run.shape)
    )
    data = to_bytes(tensors)
    config = adapter_config(tensors, run.config.lora, run.shape)
    depth = sum(not node.is_core for node in nodes)
    parts = {
        WEIGHTS_NAME: data,
        CONFIG_NAME: json.dumps(config, indent=2, sort_keys=True).encode(),
    }
    described = lineage(run, shard, nodes) | {
        "digest": served_digest(data, config),
        # Certificates name files by these, and hash nothing again that did not change.
        "files": {name: hashlib.sha256(held).hexdigest() for name, held in parts.items()},
    }
    directory.mkdir()
    for name, held in parts.items():
        (directory / name).write_bytes(held)
    for node in nodes:  # the core has none: nobody is looked for in it
        if (words := run.nodes.words(node.key)) is not None:
            words_path(directory, node.block.stage).write_bytes(words)
    title = f"Shard {shard}: {depth} of {run.config.num_slices} slices"
    card = CARD.format(
        base=run.shape.name_or_path,
        title="The permanent core" if shard == CORE.shard else title,
        sentence=_sentence(nodes),
    )
    (directory / "README.md").write_text(card + (CARD_CORE if run.core else ""))
    (directory / LINEAGE_NAME).write_text(json.dumps(described, indent=2, sort_keys=True))
    return described


def _sentence(nodes: list[Node]) -> str:
    blocks = [node for node in nodes if not node.is_core]
    if not nodes:
        return "No block of this shard is left: **this is the base model**, behind an adapter of zeros."
    if not blocks:
        return "No deletable block is in it: **this is the permanent core** alone."
    on_core = " on the permanent core" if len(blocks) < len(nodes) else ""
    if len(live(blocks)) < len(blocks):
        return f"A LoRA adapter{on_core}: the checkpoint after slice {len(blocks)} of its shard."
    return f"A LoRA adapter of {len(blocks)} trained blocks{on_core}."


def _link_shard(source: Path, target: Path) -> None:
    """An unchanged shard goes to the next generation as hard links: no copy, same bytes."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        os.link(file, target / file.name)


def is_current(run: RunDirectory, shard: int, nodes: list[Node]) -> bool:
    """Is the shard served from exactly these nodes, files included?"""
    directory = run.served / run.member_name(shard)
    described = read_lineage(directory)
    if described is None or [node["key"] for node in described.get("nodes", [])] != [
        node.key for node in nodes
    ]:
        return False
    return (directory / WEIGHTS_NAME).is_file() and (directory / CONFIG_NAME).is_file()


def members_served(run: RunDirectory) -> set[str]:
    """Directories of what is served now."""
    return {path.name for path in run.served.iterdir()} if run.served.exists() else set()


def _take_out(run: RunDirectory, gone: set[str]) -> None:
    """Where each subject has a shard, shards go: one rename each, whatever the number of the others."""
    for name in gone:
        doomed = files.temporary_name(run.served / name)
        (run.served / name).rename(doomed)
        files.remove(doomed)
    if gone:
        files.fsync(run.served.resolve())


def serve(run: RunDirectory) -> dict[int, dict[str, Any]]:
    """Bring `served/` up to date with the surviving nodes, by one rename; returns the lineages.

    The caller holds the run's lock. Generations that are not served any more are removed.
    """
    chosen = {shard: prefix_to_serve(run, shard) for shard in run.members}
    gone = members_served(run) - {run.member_name(member) for member in chosen}
    if all(is_current(run, shard, nodes) for shard, nodes in chosen.items()):
        _take_out(run, gone)
    else:
        generation = run.path / "generations" / secrets.token_hex(8)
        generation.mkdir(parents=True)
        for shard, nodes in chosen.items():
            target = generation / run.member_name(shard)
            if is_current(run, shard, nodes):
                _link_shard(run.served / target.name, target)
            else:
                write_shard(run, shard, nodes, target)
        files.fsync_tree(generation)
        files.fsync(generation.parent)
        files.publish_link(generation, run.served)
    remove_old_generations(run)
    return {
        member: read_lineage(run.served / run.member_name(member)) or {} for member in run.members
    }


def remove_old_generations(run: RunDirectory) -> int:
    """Remove what was served before, and what a crash left half written; returns how many."""
    generations = run.path / "generations"
    if not generations.is_dir():
        return 0
    current = run.served.resolve() if run.served.is_symlink() else None
    stale = [path for path in generations.iterdir() if path.resolve() != current]
    for path in stale:
        files.remove(path)
    return len(stale)


def lineages_served(run: RunDirectory) -> list[dict[str, Any] | None]:
    """The lineage of everything that is to be served, in order; None for what is not yet."""
    return [read_lineage(run.served / run.member_name(member)) for member in run.members]


def digest_of_served(run: RunDirectory) -> str | None:
    """One digest of everything that is served now, None before anything is."""
    return digest_of_lineages(lineages_served(run)) if run.served.exists() else None


def digest_of_lineages(lineages: Sequence[dict[str, Any] | None]) -> str | None:
    """One digest of what has these lineages; None if one is missing."""
    if any(entry is None for entry in lineages):
        return None
    return digest([canonical(entry).decode() for entry in lineages])
