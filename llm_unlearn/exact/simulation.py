"""How many deletion requests a set of training sequences survives, by simulation.

The model of arXiv 2406.16257, section 4: requests are uniform over the slices of all shards, with
replacement, and a request deactivates, in every sequence of its shard, the stages from the hit
slice on. A run never steps through its requests: what matters is only *when each slice is hit for
the first time*. Slices are exchangeable, so these times are the event times of a pure-birth chain
(how many different slices have been hit), dealt to the slices at random. All runs advance together.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llm_unlearn.exact.sequences import check_at_least_one, check_sequences

_TIMES_PER_CHUNK = 400_000
"""First-hit times held at once: arrays of a few MB, which also stay near the processor's cache."""


_COUNT = np.int32
"""Holds requests: n slices need about n (ln n + 40) at the very most, so 40 million fit."""


class SimulationResult(NamedTuple):
    """Requests that each run needed, the fatal one included; integer arrays of shape (runs,)."""

    all_shards_dead: np.ndarray
    """Until no shard has a surviving stage: the paper's deletion rate (definition 1)."""

    first_shard_dead: np.ndarray
    """Until some shard has no surviving stage."""

    half_depth: np.ndarray
    """Until the retained prefix of the best sequence, as a share of L and averaged over shards,
    is below one half."""


def simulate_deletions(
    num_shards: int,
    sequences: Sequence[Sequence[int]],
    runs: int,
    seed: int,
    fan_out: int = 1,
) -> SimulationResult:
    """Simulate ``runs`` independent systems, each until its last shard is dead.

    Args:
        num_shards: m; every shard uses the same sequences.
        sequences: B permutations of ``range(L)``.
        runs: number of independent runs.
        seed: same arguments and seed give the same result.
        fan_out: one request touches this many different slices, drawn at random: what happens if
            the records of one subject are spread instead of placed in one slice.

    Raises:
        ValueError: a number out of range, or sequences that are no permutations.
    """
    parts = []
    for first_hit in _first_hit_chunks(num_shards, sequences, runs, seed, fan_out):
        lost = stage_lost(first_hit, sequences)
        shard_dead = lost[0]
        # The mean depth falls below one half when more than half of all m L stages are lost.
        every_stage = lost.reshape(-1, lost.shape[-1])
        middle = len(every_stage) // 2
        parts.append(
            SimulationResult(
                all_shards_dead=shard_dead.max(axis=0),
                first_shard_dead=shard_dead.min(axis=0),
                half_depth=np.partition(every_stage, middle, axis=0)[middle],
            )
        )
    return SimulationResult(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def simulate_depth(
    num_shards: int,
    sequences: Sequence[Sequence[int]],
    num_requests: int,
    runs: int,
    seed: int,
) -> np.ndarray:
    """Mean retained depth, as a share of L, after 0, 1, ..., ``num_requests`` requests.

    Shape (num_requests + 1,), from 1 downwards. `theory.expected_depth` is the exact value for few
    slices. Arguments and errors as in `simulate_deletions`.
    """
    if num_requests < 0:
        raise ValueError(f"num_requests is {num_requests}, expected at least 0")
    lost_at = np.zeros(num_requests + 2)
    num_stages = num_shards * check_sequences(sequences) * runs
    for first_hit in _first_hit_chunks(num_shards, sequences, runs, seed, fan_out=1):
        times = np.minimum(stage_lost(first_hit, sequences), num_requests + 1)
        lost_at += np.bincount(times.ravel(), minlength=num_requests + 2)
    return 1.0 - np.cumsum(lost_at)[: num_requests + 1] / num_stages


def _first_hit_chunks(
    num_shards: int, sequences: Sequence[Sequence[int]], runs: int, seed: int, fan_out: int
) -> Iterator[np.ndarray]:
    """Yield first-hit times of shape (L, m, runs of the chunk) until all runs are done."""
    num_slices = check_sequences(sequences)
    check_at_least_one(num_shards=num_shards, runs=runs, fan_out=fan_out)
    num_all_slices = num_shards * num_slices
    if fan_out > num_all_slices:
        raise ValueError(f"fan_out is {fan_out}, expected at most {num_all_slices} slices")
    generator = np.random.default_rng(seed)
    chunk = max(1, _TIMES_PER_CHUNK // num_all_slices)
    for start in range(0, runs, chunk):
        chunk_runs = min(chunk, runs - start)
        times = discovery_times(num_all_slices, chunk_runs, fan_out, generator)
        first_hit = generator.permuted(times, axis=0)
        yield first_hit.reshape(num_slices, num_shards, chunk_runs)


def discovery_times(
    num_all_slices: int, runs: int, fan_out: int, generator: np.random.Generator
) -> np.ndarray:
    """Number of requests until 1, 2, ..., all different slices are hit; shape (slices, runs).

    With ``fan_out = 1`` the waits between new slices are independent and geometric (coupon
    collector).
    """
    if fan_out > 1:
        return _discovery_times_fan_out(num_all_slices, runs, fan_out, generator)
    stay = np.arange(num_all_slices) / num_all_slices
    exponential = generator.standard_exponential((num_all_slices, runs))
    return np.cumsum(_geometric(exponential, stay[:, None]), axis=0, dtype=_COUNT)


def _discovery_times_fan_out(
    num_all_slices: int, runs: int, fan_out: int, generator: np.random.Generator
) -> np.ndarray:
    """As `discovery_times`, several slices per request.

    The wait for a request that hits anything new is still geometric; how many new slices it hits
    is hypergeometric, given that there is at least one.
    """
    stay, new_slices_cdf = _fan_out_tables(num_all_slices, fan_out)
    waits = np.zeros((num_all_slices, runs), dtype=_COUNT)
    hit = np.zeros(runs, dtype=np.int64)
    active = np.arange(runs)
    while len(active) > 0:
        before = hit[active]
        # A wait is written once, where its batch of new slices begins; summing up the column then
        # gives the whole batch the same time.
        exponential = generator.standard_exponential(len(active))
        waits[before, active] = _geometric(exponential, stay[before])
        uniform = generator.random(len(active))
        hit[active] = before + 1 + (new_slices_cdf[before] < uniform[:, None]).sum(axis=1)
        active = active[hit[active] < num_all_slices]
    return np.cumsum(waits, axis=0, dtype=_COUNT)


def _fan_out_tables(num_all_slices: int, fan_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Chances of one request when 0, 1, ..., n-1 of n slices are hit already.

    Returns the probability of no new slice, shape (n,), and the distribution function of the number
    of new slices given at least one, shape (n, fan_out): column i is P(at most i+1).
    """
    num_draws = math.comb(num_all_slices, fan_out)
    # Integers of any size divided exactly: no overflow, no cancellation.
    probabilities = np.array(
        [
            [
                math.comb(num_all_slices - hit, new) * math.comb(hit, fan_out - new) / num_draws
                for new in range(fan_out + 1)
            ]
            for hit in range(num_all_slices)
        ]
    )
    cdf = np.cumsum(probabilities[:, 1:], axis=1)
    return probabilities[:, 0], cdf / cdf[:, -1:]


def _geometric(exponential: np.ndarray, failure: np.ndarray) -> np.ndarray:
    """Turn standard exponentials into geometric waits (1, 2, ...) with this failure probability.

    ``ceil(E / -log(failure))`` is exactly geometric and much cheaper than the generator's own.
    """
    with np.errstate(divide="ignore"):  # failure 0: log is -inf, scale 0, wait 1
        scale = -1.0 / np.log(failure)
    waits = exponential * scale
    np.ceil(waits, out=waits)
    return np.maximum(waits, 1.0, out=waits).astype(_COUNT)


def stage_lost(first_hit: np.ndarray, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Request after which fewer than k+1 stages survive in the best sequence; entry k, shard, run.

    Shapes (L, m, runs) to (L, m, runs). A stage is lost with the first hit of any slice up to its
    own; depth k+1 is lost when it is lost in all sequences. Where all sequences are shorter than L,
    what is deeper is lost at 0.
    """
    lost = np.zeros_like(first_hit)
    for sequence in sequences:
        prefix_lost = first_hit[sequence[0]]
        np.maximum(lost[0], prefix_lost, out=lost[0])
        for depth, stage_slice in enumerate(sequence[1:], start=1):
            prefix_lost = np.minimum(prefix_lost, first_hit[stage_slice])
            np.maximum(lost[depth], prefix_lost, out=lost[depth])
    return lost
