"""What a run costs: training, storage, deletions, and how often it saw its records."""

from dataclasses import dataclass

from llm_unlearn.data.partition import SliceName
from llm_unlearn.exact.adapters import WEIGHTS_NAME, expected_shapes
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.trie import Node, live


@dataclass(frozen=True)
class Costs:
    """Costs of one run at one moment.

    Attributes:
        training_seconds: of all its nodes.
        deletion_seconds: mean of a request for one subject; of a retrained model its training, of
            a rebuilt one all requests and the rebuild.
        served_bytes: weights of the served adapters.
        kept_bytes: weights of all nodes, which later deletions fall back on.
        parameters: of the served adapters, all shards together.
        rows_seen: how many times a record was trained on in a sequence of its shard, on average.
        steps: optimiser steps of all nodes.
    """

    training_seconds: float
    deletion_seconds: float
    served_bytes: int
    kept_bytes: int
    parameters: int
    rows_seen: float
    steps: int


def costs_of(run: S3TRun, deletion_seconds: float = 0.0) -> Costs:
    directory = run.directory
    weights = [p.stat().st_size for p in directory.served.resolve().rglob(WEIGHTS_NAME)]
    kept = [p.stat().st_size for p in directory.nodes.directory.rglob(WEIGHTS_NAME)]
    paths = [directory.paths(shard)[0] for shard in directory.shards]
    first = [node for path in paths for node in path]
    nodes = list(directory.wanted().values())
    batch = int(directory.config.training["per_device_train_batch_size"])
    epochs = float(directory.config.training["num_train_epochs"])
    records = sum(directory.slices.header(name).records for name in directory.slices.names)
    seen = sum(_rows(run, node) for node in first) * epochs
    return Costs(
        training_seconds=run.training_seconds(),
        deletion_seconds=deletion_seconds,
        served_bytes=sum(weights),
        kept_bytes=sum(kept),
        parameters=sum(_parameters(run, node) for path in paths for node in live(path)),
        rows_seen=seen / records if records else 0.0,
        steps=round(sum(-(-_rows(run, node) // batch) for node in nodes) * epochs),
    )


def _rows(run: S3TRun, node: Node) -> int:
    """Records that a node trains on."""
    directory = run.directory
    is_cumulative = directory.config.slice_data == "cumulative"
    parts = node.path if is_cumulative else node.path[-1:]
    return sum(directory.slices.header(SliceName(node.shard, part)).records for part in parts)


def _parameters(run: S3TRun, node: Node) -> int:
    shapes = expected_shapes(node, run.directory.shape).values()
    return sum(rows * columns for rows, columns in shapes)
