"""Time the vectorised deletion simulator against a plain Python loop over requests, in one run.

    python benchmarks/simulation.py --num_shards 5 --num_slices 4 --num_sequences 4

Both answer the same three questions for every run; the means are printed side by side.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from statistics import fmean

from llm_unlearn.exact.sequences import select_sequences
from llm_unlearn.exact.simulation import SimulationResult, simulate_deletions


def simulate_plainly(
    num_shards: int, sequences: Sequence[Sequence[int]], generator: random.Random
) -> tuple[int, int, int]:
    """One run, request by request: until all shards, the first shard, half the depth are gone."""
    num_slices = len(sequences[0])
    alive = [[list(sequence) for sequence in sequences] for _ in range(num_shards)]
    depths = [num_slices] * num_shards
    requests = first_shard_dead = half_depth = 0
    while any(depths):
        requests += 1
        shard, hit_slice = divmod(generator.randrange(num_shards * num_slices), num_slices)
        alive[shard] = [
            prefix[: prefix.index(hit_slice)] if hit_slice in prefix else prefix
            for prefix in alive[shard]
        ]
        depths[shard] = max(len(prefix) for prefix in alive[shard])
        if first_shard_dead == 0 and 0 in depths:
            first_shard_dead = requests
        if half_depth == 0 and 2 * sum(depths) < num_shards * num_slices:
            half_depth = requests
    return requests, first_shard_dead, half_depth


def seconds_per_run(simulate: Callable[[], object], runs: int, repeats: int) -> float:
    """Best of ``repeats`` timings: the least disturbed by other work on the machine."""
    timings = []
    for _ in range(repeats):
        started = time.perf_counter()
        simulate()
        timings.append(time.perf_counter() - started)
    return min(timings) / runs


def main(argv: Sequence[str] | None = None) -> float:
    """Print seconds per run of both and their ratio; return the ratio."""
    parser = argparse.ArgumentParser(description="vectorised deletion simulator against a loop")
    parser.add_argument("--num_shards", type=int, default=5)
    parser.add_argument("--num_slices", type=int, default=4)
    parser.add_argument("--num_sequences", type=int, default=4)
    parser.add_argument("--runs", type=int, default=20_000, help="runs of the vectorised one")
    parser.add_argument("--plain_runs", type=int, default=1_000, help="runs of the plain loop")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)

    sequences = select_sequences(options.num_slices, options.num_sequences)
    generator = random.Random(0)
    plain_results: list[tuple[int, int, int]] = []
    fast_results: list[SimulationResult] = []
    plain_seconds = seconds_per_run(
        lambda: plain_results.extend(
            simulate_plainly(options.num_shards, sequences, generator)
            for _ in range(options.plain_runs)
        ),
        options.plain_runs,
        options.repeats,
    )
    fast_seconds = seconds_per_run(
        lambda: fast_results.append(
            simulate_deletions(options.num_shards, sequences, options.runs, seed=0)
        ),
        options.runs,
        options.repeats,
    )
    ratio = plain_seconds / fast_seconds
    print(f"plain loop   {plain_seconds * 1e6:10.2f} microseconds per run")
    print(f"vectorised   {fast_seconds * 1e6:10.2f} microseconds per run")
    print(f"ratio        {ratio:10.1f}")
    for column, name in enumerate(SimulationResult._fields):
        plain_mean = fmean(result[column] for result in plain_results)
        print(f"{name:<17} {plain_mean:8.2f} (plain) {fast_results[0][column].mean():8.2f}")
    return ratio


if __name__ == "__main__":
    main()
