"""Training what a run misses: node after node, resumable at any moment, on one or more processes.

The main process decides and writes; the others receive their task and help to compute. A request
that arrives meanwhile is carried out at once: a node that it makes obsolete is thrown away when
it is finished instead of being published.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_unlearn.data.encoding import Example, check_lengths, encode
from llm_unlearn.data.partition import SliceName
from llm_unlearn.data.records import Record, digest
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact import record_scores, residues
from llm_unlearn.exact.adapters import Tensors
from llm_unlearn.exact.environment import describe_environment
from llm_unlearn.exact.node_training import NodeTask, train_node
from llm_unlearn.exact.replay import StateCache, capture
from llm_unlearn.exact.served import serve
from llm_unlearn.exact.settling import depths_served, settle
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.exact.trie import NUMERICS_VERSION, Node, ground_of, missing_nodes
from llm_unlearn.exact.words import index_records
from llm_unlearn.memorization.observations import Observations
from llm_unlearn.observing import Observer


@dataclass(frozen=True)
class TrainingReport:
    """What a call of `train` did: nodes trained and found, seconds, and the served depths."""

    trained: int
    reused: int
    discarded: int
    seconds: float
    served: dict[int, int]


class Progress:
    """What training tells about itself; the default says nothing."""

    def node(self, node: Node, number: int, total: int) -> None: ...

    def step(self, step: int, total: int) -> None: ...

    def warn(self, message: str) -> None: ...


class Task(NamedTuple):
    """A node to train, as it travels from the main process to the others.

    Attributes:
        parents: nodes frozen under it; `parts` are their tensors.
        start: the tensors that it continues from, if any.
        examples: with the slice that each belongs to.
    """

    node: Node
    parents: list[Node]
    parts: list[Tensors]
    start: Tensors | None
    examples: list[tuple[int, Example]]


def train(
    run: RunDirectory,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress | None = None,
    track: Callable[[], Observer] | None = None,
) -> TrainingReport:
    """Train every missing node of a run and serve the result.

    Call it on every process of an `accelerate launch`. Killed anywhere, the next call goes on
    with the node that was in training and reaches the same bits.

    Args:
        track: makes what watches a node; what it saw of the slice that the node adds is kept with the run.
            A run that was tracked once always is, by `Observations`.

    Raises:
        RunError: another process trains this run, or the disk is full.
        UserError: a record has nothing to learn within the maximum length.
    """
    progress = progress or Progress()
    state = PartialState()
    started = time.monotonic()
    counts = {"trained": 0, "discarded": 0}
    lock: AbstractContextManager[None] = run.training() if state.is_main_process else nullcontext()
    with lock:
        reused = _from_main(lambda: _prepare(run, tokenizer, progress))
        if _from_main(lambda: record_scores.is_tracked(run, begin=track is not None)):
            track = track or Observations
        while (
            task := _from_main(lambda: _next_task(run, tokenizer, progress, counts["trained"]))
        ) is not None:
            if not _from_main(lambda task=task: _cache_states(run, base, task)):
                continue
            began = time.monotonic()
            observer = track() if track else None
            say = progress.step if state.is_main_process else None
            new = _compute(run, base, tokenizer, task, say, observer)
            if new is None:
                continue
            details = {
                "device": base.device.type,
                "seconds": round(time.monotonic() - began, 3),
                "seen": _named(observer, task) if observer else None,
            }
            kept = _from_main(
                lambda task=task, new=new, said=details: _publish(run, task.node, new, **said)
            )
            counts["trained" if kept else "discarded"] += 1
        served = _from_main(lambda: _finish(run))
    return TrainingReport(
        counts["trained"], reused, counts["discarded"], time.monotonic() - started, served
    )


def train_again(
    run: RunDirectory, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, node: Node
) -> Tensors:
    """Train a node that the run holds from its parents, and keep nothing: for comparison of bits."""
    with run.changing("reading a node's records"):
        task = _load_task(run, tokenizer, node)
    _cache_states(run, base, task)
    try:
        again = _compute(run, base, tokenizer, task, None)
    finally:
        with run.changing("clearing caches"):
            residues.purge_emptied(run)
            residues.destroy_keys(run)
    if again is None:
        raise RunError(f"{run.path} was changed by a deletion meanwhile: run the command again")
    return again


def _compute(
    run: RunDirectory,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    on_step: Callable[[int, int], None] | None,
    observer: Observer | None = None,
) -> Tensors | None:
    """Train the node of a task; None if a deletion has purged the states that it replays."""
    states = None
    if _is_replayed(run, task.node) and (states := _open_states(run, task)) is None:
        return None
    node_task = NodeTask(
        node=task.node,
        parents=task.parents,
        parts=task.parts,
        examples=[example for _, example in task.examples],
        states=states,
        start=task.start,
    )
    place = str(run.path / "trainer")
    return train_node(base, tokenizer, node_task, run.config, run.shape, place, on_step, observer)


def _named(observer: Observer, task: Task) -> dict[str, NDArray[Any]]:
    """What was seen, by the records' ids; every process takes part."""
    seen = observer.collect()
    ids = np.array([example.record_id for _, example in task.examples])
    return {"record_id": ids[seen.pop("index")], **seen}


def _from_main(decide: Callable[[], Any]) -> Any:
    """Run `decide` on the main process and give its result, or its `UserError`, to all."""
    state = PartialState()
    box: list[Any] = [None, None]
    if state.is_main_process:
        try:
            box[0] = decide()
        except UserError as error:
            box[1] = error
    if state.num_processes > 1:
        broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _prepare(run: RunDirectory, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> int:
    """Finish pending requests, clear what a crash left, drop damaged nodes; count what is there.

    Records that are too long are found now, and not after hours of training.
    """
    with run.changing("preparing to train it"):
        settle(run)
        wanted = run.wanted()
        residues.purge_nodes(run, set(wanted))
        for key in run.nodes.keys():
            if not run.nodes.exists(key) or not run.nodes.is_intact(key):
                progress.warn(f"node {key[:12]} is damaged and will be trained again")
                run.nodes.remove(key)
        parts = {(node.shard, part) for node in _missing(run) for part in node.path}
        records = [record for name in sorted(parts) for record in run.slices.read(SliceName(*name))]
    examples = [_encode(run, tokenizer, record) for record in records]
    if warning := check_lengths(examples, run.config.max_length):
        progress.warn(warning)
    return len(run.nodes.keys())


def _encode(run: RunDirectory, tokenizer: PreTrainedTokenizerBase, record: Record) -> Example:
    return encode(record, tokenizer, run.config.max_length, run.config.completion_only)


def _missing(run: RunDirectory) -> list[Node]:
    paths = [path for member in run.members for path in run.paths(member)]
    return missing_nodes(paths, run.nodes.exists)


def _next_task(
    run: RunDirectory, tokenizer: PreTrainedTokenizerBase, progress: Progress, done: int
) -> Task | None:
    with run.changing("choosing the next node"):
        missing = _missing(run)
        if not missing:
            return None
        task = _load_task(run, tokenizer, missing[0])
    progress.node(task.node, done + 1, done + len(missing))
    return task


def _load_task(run: RunDirectory, tokenizer: PreTrainedTokenizerBase, node: Node) -> Task:
    frozen, replaced = ground_of(node, _parents(run, node))
    seen = node.path if run.config.slice_data == "cumulative" else node.path[-1:]
    examples = [
        (part, _encode(run, tokenizer, record))
        for part in seen
        for record in run.slices.read(SliceName(node.shard, part))
    ]
    parts = [run.nodes.load(parent.key) for parent in frozen]
    start = run.nodes.load(replaced.key) if replaced else None
    return Task(node, frozen, parts, start, examples)


def _parents(run: RunDirectory, node: Node) -> list[Node]:
    path = next(path for path in run.paths(node.shard) if node in path)
    return path[: path.index(node)]


def cache_path(run: RunDirectory, node: Node, part: int) -> Path:
    """Where the states of a slice at the node's boundary live: named by everything they depend on."""
    root = node.roots[node.path.index(part)]
    return (
        run.path
        / "cache"
        / f"{digest([run.identity, min(node.block.layers), root])[:32]}.safetensors"
    )


def _is_replayed(run: RunDirectory, node: Node) -> bool:
    """States are cached of the bare base model, so not where a core changes them."""
    return run.config.prefix_cache and run.core is None and min(node.block.layers) > 0


def _cache_states(run: RunDirectory, base: PreTrainedModel, task: Task) -> bool:
    """Write the states that the node replays and that are not there yet.

    Returns:
        False if a deletion has made the node obsolete meanwhile: then nothing was written.
    """
    if not _is_replayed(run, task.node):
        return True
    base.to(PartialState().device)  # pyright: ignore[reportArgumentType]
    for part in dict.fromkeys(part for part, _ in task.examples):
        path = cache_path(run, task.node, part)
        if path.exists():
            continue
        held = [example for owner, example in task.examples if owner == part]
        states = _capture_slice(base, min(task.node.block.layers), held)
        with run.changing("caching hidden states"):
            if not run.wants(task.node):
                return False
            StateCache.write(path, states, run.at_rest)
    return True


def _open_states(run: RunDirectory, task: Task) -> dict[str, StateCache] | None:
    """The caches of the task's slices, mapped into memory: purging them does not disturb the task.

    They are opened by all processes under the lock; None if a deletion came before.
    """
    state = PartialState()
    paths = {part: cache_path(run, task.node, part) for part, _ in task.examples}
    with run.changing("opening hidden states") if state.is_main_process else nullcontext():
        if not _from_main(lambda: all(path.exists() for path in paths.values())):
            return None
        caches = {part: StateCache(path, run.at_rest) for part, path in paths.items()}
        state.wait_for_everyone()
    return {example.record_id: caches[part] for part, example in task.examples}


def _capture_slice(
    base: PreTrainedModel, boundary: int, examples: list[Example]
) -> dict[str, torch.Tensor]:
    return {
        example.record_id: capture(
            base, boundary, torch.tensor([example.input_ids], device=base.device)
        )
        for example in examples
    }


def index_of(run: RunDirectory, node: Node) -> Tensors | None:
    """The words of the slice that a node adds; None for the core, in which nobody is looked for."""
    if node.is_core:
        return None
    return index_records(run.slices.read(SliceName(node.shard, node.path[-1])), run.key)


def _publish(
    run: RunDirectory,
    node: Node,
    tensors: Tensors,
    device: str,
    seconds: float,
    seen: Mapping[str, NDArray[Any]] | None = None,
) -> bool:
    """Keep a trained node, unless a deletion has made it obsolete meanwhile.

    The time it took goes to the ledger and not to the manifest, which says nothing of the moment. What was
    seen goes to disk before the node: where the node is, it is whole.
    """
    with run.changing("publishing a node"):
        settle(run)
        if not run.wants(node):
            return False
        details = {
            "identity": run.identity,
            "numerics": NUMERICS_VERSION,
            "environment": describe_environment(
                device, PartialState().num_processes, run.config.num_threads
            ),
        }

        def log(digests: dict[str, str]) -> None:
            run.ledger.append("trained", {"node": node.key, **digests, "seconds": seconds})

        if seen is not None:
            own = run.slices.read(SliceName(node.shard, node.path[-1]))
            record_scores.write_of_node(run, node, own, seen)
        run.nodes.publish(node, tensors, details, index_of(run, node), before=log)
    return True


def _finish(run: RunDirectory) -> dict[int, int]:
    with run.changing("serving what was trained"):
        settle(run)
        lineages = serve(run)
        residues.purge_emptied(run)
        residues.destroy_keys(run)
        digests = {
            run.member_name(member).removeprefix("shard-"): entry["digest"]
            for member, entry in lineages.items()
        }
        run.ledger.append("served", {"digests": digests})
    return depths_served(run)
