"""Invented votes of shards, and which answers they certify, for many queries at once."""

from typing import NamedTuple

import numpy as np

from llm_unlearn.errors import UserError

MOST_VOTES = 100_000_000  # one byte each, three times over
_VOTES_AT_ONCE = 2_000_000  # so that what is made of them meanwhile stays within some 20 MB


class Votes(NamedTuple):
    """What every shard says to every query, in each of the states that it can be in.

    Attributes:
        truth: the right label, (queries,).
        whole: as trained, (queries, shards).
        shortened: without the nodes that a deletion took, (queries, shards).
        retrained: as the next rebuild will make it, (queries, shards).
    """

    truth: np.ndarray
    whole: np.ndarray
    shortened: np.ndarray
    retrained: np.ndarray


def draw_votes(
    queries: int, shards: int, labels: int, accuracy: float, kept: float, seed: int
) -> Votes:
    """Shards that are right as often as a draw from Beta(a, 1) with mean `accuracy` says.

    Given the truth, states and shards err independently, and every wrong label is equally likely:
    less alike than shards of one base model are, so more answers change by a rebuild than in life.

    Args:
        labels: at most 256.
        kept: what a shortened shard keeps of its lead over guessing.

    Raises:
        UserError: more votes than fit into memory.
    """
    if queries * shards > MOST_VOTES:
        raise UserError(
            f"{queries} queries to {shards} shards are more than {MOST_VOTES:.0e} votes: "
            "simulate a shorter time"
        )
    generator = np.random.default_rng(seed)
    accuracies = generator.beta(accuracy / (1.0 - accuracy), 1.0, shards)
    guess = 1.0 / labels
    shortened = guess + kept * (accuracies - guess)
    truth = generator.integers(0, labels, queries, dtype=np.uint8)
    return Votes(
        truth, *(_draw(truth, chance, labels, generator) for chance in (accuracies, shortened, accuracies))
    )  # fmt: skip


def _draw(
    truth: np.ndarray, chance: np.ndarray, labels: int, generator: np.random.Generator
) -> np.ndarray:
    """Votes of shards with some chance each, (shards,), of being right: (queries, shards)."""
    shape = (len(truth), len(chance))
    votes = np.empty(shape, dtype=np.uint8)
    for rows in _parts(*shape):
        size = votes[rows].shape
        is_right = generator.random(size, dtype=np.float32) < chance
        off = generator.integers(1, labels, size, dtype=np.uint16)
        votes[rows] = (truth[rows, None] + np.where(is_right, 0, off)) % labels
    return votes


def tally(votes: np.ndarray, labels: int) -> np.ndarray:
    """How many votes each label has, (queries, labels), of votes (queries, shards)."""
    counts = np.empty((len(votes), labels), dtype=np.int32)
    for rows in _parts(*votes.shape):
        part = votes[rows]
        cells = part + labels * np.arange(len(part))[:, None]
        counts[rows] = np.bincount(cells.ravel(), minlength=len(part) * labels).reshape(-1, labels)
    return counts


def certify(counts: np.ndarray, affected: int) -> tuple[np.ndarray, np.ndarray]:
    """The winners, (queries,), and whether they win whatever the affected shards will vote.

    Winner t is certified if, for every other label j, `c_t >= c_j + affected + [j < t]`: the
    affected shards can give all their votes to j, and among equals the lowest label wins.

    Args:
        counts: votes of the shards that are *not* affected, (queries, labels).
        affected: how many shards are.
    """
    winner = counts.argmax(axis=1)
    others = counts + (np.arange(counts.shape[1]) < winner[:, None]) + affected
    rows = np.arange(len(counts))
    others[rows, winner] = 0
    return winner, counts[rows, winner] >= others.max(axis=1)


def _parts(queries: int, shards: int) -> list[slice]:
    size = max(1, _VOTES_AT_ONCE // max(shards, 1))
    return [slice(start, start + size) for start in range(0, queries, size)]
