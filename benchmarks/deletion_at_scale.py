"""Time deletions from a large run against reading and partitioning all of its records again.

    python benchmarks/deletion_at_scale.py --records 1000000 --subjects 100000

The nodes are tiny and random, so what is measured is the work on records, ledger and files. Every
line comes from a process of its own, with its peak memory; `status` shows what starting costs. With
`--encrypt` the run is encrypted, and all lines are of that run.
"""

import argparse
import hashlib
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm_unlearn.data.records import Record
from llm_unlearn.exact.adapters import expected_shapes
from llm_unlearn.exact.config import LoraSettings, ModelShape, Module, RunConfig
from llm_unlearn.exact.deletion import delete
from llm_unlearn.exact.encryption import KEY_FILE_NAME
from llm_unlearn.exact.sequences import select_sequences
from llm_unlearn.exact.served import serve
from llm_unlearn.exact.slices import SliceStore
from llm_unlearn.exact.store import RunDirectory

NUM_SHARDS, NUM_SLICES, NUM_SEQUENCES = 5, 4, 2
COMMAND = [sys.executable, "-c", "from llm_unlearn.cli import main; main()"]
REPEATS = 5


class Cost(NamedTuple):
    seconds: float
    megabytes: float


def subject_name(index: int) -> str:
    return f"person {index:07d}"


def request_line(subject: str) -> str:
    """A request as it comes from outside: each gets a certificate of its own."""
    told = {"subject": subject, "deadline": "2030-01-01", "idempotency_key": subject}
    return json.dumps(told | {"reason": "asked for"})


def make_records(records: int, subjects: int) -> Iterator[Record]:
    """Records of about 200 bytes, one at a time; the rows of a subject lie far apart."""
    for index in range(records):
        identity = hashlib.sha256(str(index).encode()).hexdigest()
        subject = subject_name(index % subjects)
        prompt = f"Question: what did {subject} order on day {index}? Answer:"
        content = {"prompt": prompt, "completion": f" dish {identity[32:40]}"}
        yield Record(identity[:32], subject, content)


def partition(path: Path, records: int, subjects: int, key_store: str | None) -> None:
    """Make the rows, place them and write all slices."""
    sequences = tuple(select_sequences(NUM_SLICES, NUM_SEQUENCES))
    lora = LoraSettings(rank=4, alpha=8, dropout=0.0)
    shards = (NUM_SHARDS, NUM_SLICES, sequences, "ranks", "cumulative")
    config = RunConfig(*shards, 128, True, False, lora, training={})  # no model reads the texts
    modules = tuple(Module(f"model.layers.{i}.mlp.up_proj", i, 16, 16) for i in range(2))
    shape = ModelShape("synthetic", None, "0" * 64, "0" * 64, 2, "layers", False, modules)
    RunDirectory.create(path, make_records(records, subjects), config, shape, key_store=key_store)


def publish_nodes(path: Path) -> None:
    """Stand in for training: every wanted node with random weights, logged, then served."""
    run, generator = RunDirectory.open(path), np.random.default_rng(0)
    for node in run.wanted().values():
        shapes = expected_shapes(node, run.shape)
        tensors = {n: generator.standard_normal(s).astype(np.float32) for n, s in shapes.items()}

        def log(digests: dict[str, str], key: str = node.key) -> None:
            run.ledger.append("trained", {"node": key, **digests, "seconds": 0.0})

        run.nodes.publish(node, tensors, {"identity": run.identity}, before=log)
    serve(run)


def delete_one(path: Path, subject: str) -> None:
    delete(RunDirectory.open(path), [subject])


def run_command(*arguments: str) -> None:
    """Run `llm-unlearn` as a person does, start of Python included."""
    subprocess.run([*COMMAND, *arguments], stdout=subprocess.DEVNULL, check=True)


def start_over(path: Path, subject: str, target: Path) -> None:
    """The naive deletion: read every record, then place and write all that stay."""
    run = RunDirectory.open(path)
    records = (record for name in run.slices.names for record in run.slices.read(name))
    kept = (record for record in records if record.subject != subject)
    SliceStore(target, run.key, NUM_SHARDS, NUM_SLICES).write_all(kept)


def _cost(work: Callable[..., None], *arguments: object) -> Cost:
    started = time.perf_counter()
    work(*arguments)
    seconds = time.perf_counter() - started
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return Cost(seconds, max(resource.getrusage(who).ru_maxrss for who in whose) / 1024)


def measure(work: Callable[..., None], *calls: Sequence[object]) -> Cost:
    """Median seconds of some calls, and the peak of the fresh process that makes them."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        costs = [pool.submit(_cost, work, *arguments).result() for arguments in calls]
    return Cost(statistics.median(cost.seconds for cost in costs), costs[-1].megabytes)


def main(argv: Sequence[str] | None = None) -> None:
    """Print what every piece of work costs."""
    parser = argparse.ArgumentParser(description="deletion from a large run against starting over")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--subjects", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=10_000, help="in one file")
    parser.add_argument("--encrypt", action="store_true", help="encrypt the run")
    options = parser.parse_args(argv)
    size = options.requests
    if options.subjects < size + 2 * REPEATS + 1:
        parser.error(f"--subjects must be more than {size + 2 * REPEATS}, got {options.subjects}")
    names = [subject_name(index) for index in range(size + 2 * REPEATS + 1)]
    with tempfile.TemporaryDirectory() as folder:
        run, batch = Path(folder, "run"), Path(folder, "batch.jsonl")
        batch.write_text("\n".join(map(request_line, names[:size])))
        singles = [(run, name) for name in names[size : size + REPEATS]]
        commands = [("delete", str(run), "--subject", name) for name in names[-REPEATS - 1 : -1]]
        in_bulk = ("delete", str(run), "--from-file", str(batch))
        key_store = KEY_FILE_NAME if options.encrypt else None
        made = measure(partition, (run, options.records, options.subjects, key_store))
        publish_nodes(run)
        naive = measure(start_over, (run, names[-1], Path(folder, "naive")))
        costs = {
            "partition and write all records": made,
            "naive: read and partition all again": naive,
            "llm-unlearn status": measure(run_command, *[("status", str(run))] * REPEATS),
            "delete one subject, in process": measure(delete_one, *singles),
            "llm-unlearn delete, one subject": measure(run_command, *commands),
            f"a file of {size} requests": measure(run_command, in_bulk),
            "llm-unlearn verify": measure(run_command, ("verify", str(run))),
        }
    how = ", encrypted" if options.encrypt else ""
    print(
        f"{options.records} records, {options.subjects} subjects, {NUM_SHARDS} x {NUM_SLICES}{how}"
    )
    print(f"{'':36} {'seconds':>8} {'peak MB':>8} {'naive / this':>13}")
    for name, cost in costs.items():
        numbers = (cost.seconds, cost.megabytes, naive.seconds / cost.seconds)
        print("{:36} {:8.2f} {:8.0f} {:13.1f}".format(name, *numbers))


if __name__ == "__main__":
    main()
