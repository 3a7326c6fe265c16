"""How many more deletion requests a run survives, from where its trie stands now; by simulation.

`plan` asks this before anything is trained: all depth is there, all slices hold equally much. Here
some of it is lost already, and slices hold what they hold. Two models of who asks next:

* by subject: every subject that is held asks once, in random order. A slice is hit the first time
  that one of its subjects asks; nobody can ask twice.
* by slice: every slice that holds records is equally likely, over and over. This is what `plan` and
  arXiv 2406.16257, section 4, assume.

Nothing is rebuilt in between, and the request that ends it counts.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llm_unlearn.exact.plan import Estimate, estimate
from llm_unlearn.exact.simulation import discovery_times, stage_lost

MOST_RUNS, FEWEST_RUNS = 4000, 50
_DRAWS = 4_000_000  # of all runs together
_DRAWS_AT_ONCE = 400_000


@dataclass(frozen=True)
class Standing:
    """What is left of one shard.

    Attributes:
        prefixes: for every sequence the slices of its surviving prefix, first stage first.
        full_depth: blocks that the shard has when it is complete.
        subjects: how many subjects each of its L slices holds.
    """

    prefixes: tuple[tuple[int, ...], ...]
    full_depth: int
    subjects: tuple[int, ...]


@dataclass(frozen=True)
class Outlook:
    """Expected requests from here.

    Attributes:
        all_gone: until no shard has a block left.
        half_gone: until the depth left, all shards together, is below half of the full depth.
        runs: simulated futures behind it.
    """

    all_gone: Estimate
    half_gone: Estimate
    runs: int


def by_subject(shards: Sequence[Standing], runs: int | None = None, seed: int = 0) -> Outlook:
    """Every subject that is held is equally likely to ask next, and asks once.

    Each subject gets a uniform moment in [0, 1), and a slice the first of its subjects' moments,
    `1 - (1 - u)^(1/n)` of n. How many asked up to a moment T is then binomial, slice by slice:
    of the n - 1 others of a slice that was first hit at t, each with chance (T - t) / (1 - t).
    """
    subjects = _held(shards)

    def draw(size: int, generator: np.random.Generator) -> np.ndarray:
        spread = np.maximum(subjects, 1)[:, None]
        first = -np.expm1(np.log1p(-generator.random((len(subjects), size))) / spread)
        return np.where(subjects[:, None] > 0, first, np.inf)

    def count(moments: np.ndarray, first: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        is_hit = first <= moments
        late = np.where(is_hit, first, 0.0)
        chance = np.where(is_hit, (moments - late) / (1.0 - late), 0.0)
        others = np.maximum(subjects - 1, 0)[:, None]
        return (is_hit + generator.binomial(others, np.clip(chance, 0.0, 1.0))).sum(axis=0)

    return _outlook(shards, runs, seed, draw, count)


def by_slice(
    shards: Sequence[Standing], runs: int | None = None, seed: int = 0, fan_out: int = 1
) -> Outlook:
    """Every slice that holds records is equally likely, with replacement.

    Args:
        fan_out: slices that one request hits, drawn at random (LegoNet's copies).
    """
    filled = np.flatnonzero(_held(shards))

    def draw(size: int, generator: np.random.Generator) -> np.ndarray:
        first = np.full((sum(len(shard.subjects) for shard in shards), size), np.inf)
        if len(filled):
            times = discovery_times(len(filled), size, min(fan_out, len(filled)), generator)
            first[filled] = generator.permuted(times, axis=0)
        return first

    def count(moments: np.ndarray, first: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return moments

    return _outlook(shards, runs, seed, draw, count)


def _held(shards: Sequence[Standing]) -> np.ndarray:
    return np.array([held for shard in shards for held in shard.subjects], dtype=np.int64)


def _outlook(
    shards: Sequence[Standing],
    runs: int | None,
    seed: int,
    draw: Callable[[int, np.random.Generator], np.ndarray],
    count: Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray],
) -> Outlook:
    """Simulate the futures.

    Args:
        draw: first hits of all slices, shape (slices, runs).
        count: requests up to a moment of each run, shape (runs,), given the first hits.
    """
    num_slices = sum(len(shard.subjects) for shard in shards)
    runs = runs or int(np.clip(_DRAWS // max(num_slices, 1), FEWEST_RUNS, MOST_RUNS))
    generator = np.random.default_rng(seed)
    all_gone, half_gone = [], []
    for size in _chunks(runs, max(1, _DRAWS_AT_ONCE // max(num_slices, 1))):
        first = draw(size, generator)
        stages = _losses(shards, first)
        if len(stages) == 0:  # nothing that could be lost
            stages = np.zeros((1, size))
        middle = len(stages) // 2  # below half: more than half of the stages are lost
        all_gone.append(count(stages.max(axis=0), first, generator))
        half_gone.append(count(np.partition(stages, middle, axis=0)[middle], first, generator))
    return Outlook(estimate(np.concatenate(all_gone)), estimate(np.concatenate(half_gone)), runs)


def _chunks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)


def _losses(shards: Sequence[Standing], first: np.ndarray) -> np.ndarray:
    """Moment at which each block of the full depth is lost, 0 for those that are; (stages, runs).

    Shards of the same standing are worked out together.
    """
    alike: dict[tuple[tuple[tuple[int, ...], ...], int, int], list[int]] = defaultdict(list)
    start = 0
    for shard in shards:
        alike[shard.prefixes, shard.full_depth, len(shard.subjects)].append(start)
        start += len(shard.subjects)
    found = [np.zeros((0, first.shape[1]))]
    for (prefixes, full_depth, num_slices), starts in alike.items():
        rows = np.array(starts) + np.arange(num_slices)[:, None]
        lost = stage_lost(first[rows], [prefix for prefix in prefixes if prefix])
        found.append(lost[:full_depth].reshape(-1, first.shape[1]))
    return np.concatenate(found)
