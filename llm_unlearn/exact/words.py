"""Whose words are in a prompt? An index of hashed words, subject by subject, of what each node learnt.

A node's index is a function of its own slice's records and the run's key: words and pairs of
neighbouring words as keyed hashes, so that it says nothing to others, row by row of subjects. A deletion
takes it away with its node, and nothing fitted on several subjects is left: how much a word tells
comes from the tokenizer, whose ids are ranks of frequency in public text.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.data.partition import PartitionKey
from llm_unlearn.data.records import Record

# Scripts without spaces go character by character, so that their pairs act as words.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]|[^\W_]+")

# By Zipf's law the k-th most frequent token costs about log k nats; what costs less tells nothing.
FREQUENT = 5.0
TELLING = 4.0  # beyond that, a word names something

# A part of anybody's prompt that the words of a stranger cover.
STRANGER = 0.2

HASHES, ROWS = "hashes", "rows"
Index = dict[str, NDArray[np.uint32]]


def features(text: str) -> dict[str, tuple[str, ...]]:
    """Words and pairs of neighbours, without case: each with the words it is made of."""
    words = WORD.findall(text.casefold())
    pairs = {f"{first} {second}": (first, second) for first, second in pairwise(words)}
    return {word: (word,) for word in words} | pairs


def index_records(records: Iterable[Record], key: PartitionKey) -> Index:
    """The index of a slice: `hashes` (N,) in order, and the subject's row of each, `rows` (N,).

    Rows are numbered in the order of the subjects' pseudonyms.
    """
    found: dict[str, set[int]] = {}
    hashed = lru_cache(maxsize=2**16)(key.word)
    for record in records:
        own = found.setdefault(key.pseudonym("subject", record.subject), set())
        for text in record.texts():
            own.update(map(hashed, features(text)))
    pairs = [(word, row) for row, name in enumerate(sorted(found)) for word in found[name]]
    hashes, rows = np.array(sorted(pairs), np.uint32).reshape(-1, 2).T
    return {HASHES: np.ascontiguousarray(hashes), ROWS: np.ascontiguousarray(rows)}


class Evidence(NamedTuple):
    """What the words of a prompt say.

    Attributes:
        coverage: for every shard, the part of the prompt's weight that its best subject's words
            cover, in [0, 1]; 0 where nothing is left.
        lead: of the best subject before the third best (or a stranger). Not the second, so that
            prompts about two subjects, and subjects that resemble another, have one too.
    """

    coverage: NDArray[np.float64]
    lead: float


class Words:
    """The indexes of all living nodes, asked together.

    Args:
        parts: for every shard the indexes of the nodes that it serves.
        key: the one they were made with.
        tokenizer: of the base model.

    Attributes:
        shards: of every subject's row, (R,).
    """

    def __init__(
        self, parts: Sequence[Sequence[Mapping[str, Any]]], key: PartitionKey, tokenizer: Any
    ):
        self.key = key
        self.tokenizer = tokenizer
        self.num_shards = len(parts)
        hashes, rows, shards, count = [], [], [], 0
        for shard, indexes in enumerate(parts):
            for index in indexes:
                held = int(index[ROWS].max()) + 1 if index[ROWS].size else 0
                hashes.append(index[HASHES])
                rows.append(index[ROWS].astype(np.int64) + count)
                shards.append(np.full(held, shard))
                count += held
        joined = np.concatenate(hashes) if hashes else np.zeros(0, np.uint32)
        order = np.argsort(joined, kind="stable")
        self._hashes = joined[order]
        self._rows = np.concatenate(rows)[order] if rows else np.zeros(0, np.int64)
        self.shards = np.concatenate(shards) if shards else np.zeros(0, np.int64)
        self.cost = lru_cache(maxsize=2**16)(self._cost)

    def _cost(self, word: str) -> float:
        ids = self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        return sum(math.log(token + 1) for token in ids)

    def weight(self, word: str) -> float:
        """How much a word tells, in nats."""
        return max(0.0, self.cost(word) - FREQUENT)

    def is_telling(self, text: str) -> bool:
        """Does a text name anything, or does it only refer to what was said before it?"""
        return any(
            min(self.cost(word), self.cost(word.casefold())) > FREQUENT + TELLING
            for word in WORD.findall(text)
        )

    def evidence(self, text: str) -> Evidence:
        """Whose words a prompt is made of."""
        parts = self._parts(text)
        if not parts or not self.shards.size:
            return Evidence(np.zeros(self.num_shards), 0.0)
        by_row = self._by_row(parts)
        return Evidence(coverage(by_row, self.shards, self.num_shards), lead(by_row))

    def by_row(self, text: str) -> NDArray[np.float64]:
        """For every subject's row the part of a prompt's weight that its words cover, (R,)."""
        return self._by_row(self._parts(text))

    def _parts(self, text: str) -> dict[str, float]:
        """The part of a prompt's weight that each of its features has; none where nothing tells."""
        weights = {f: min(map(self.weight, words)) for f, words in features(text).items()}
        total = sum(weights.values())
        return {feature: weight / total for feature, weight in weights.items()} if total else {}

    def _by_row(self, parts: dict[str, float]) -> NDArray[np.float64]:
        by_row = np.zeros(len(self.shards))
        hashed = np.array([self.key.word(feature) for feature in parts], np.uint32)
        starts = np.searchsorted(self._hashes, hashed, "left")
        ends = np.searchsorted(self._hashes, hashed, "right")
        for part, start, end in zip(parts.values(), starts, ends, strict=True):
            by_row[self._rows[start:end]] += part
        return by_row


def coverage(
    by_row: NDArray[np.float64], shards: NDArray[np.int64], num_shards: int
) -> NDArray[np.float64]:
    """Of every shard the best of its subjects' rows; 0 where nothing is left."""
    best = np.zeros(num_shards)
    np.maximum.at(best, shards, by_row)
    return best


def lead(by_row: NDArray[np.float64]) -> float:
    """Of the best of some rows before the third best, or a stranger."""
    third = np.partition(by_row, -3)[-3] if len(by_row) > 2 else 0.0
    return float(by_row.max() - max(third, STRANGER))


def asked_in(messages: Sequence[Mapping[str, str]], is_telling: Callable[[str], bool]) -> str:
    """What a conversation asks about now: the user's last turns, back to one that names something.

    So a question that only refers to what was said ("Where does she live?") stays with its subject, and a
    new topic leaves it.
    """
    turns: list[str] = []
    for message in reversed(messages):
        if message["role"] == "user":
            turns.insert(0, message["content"])
            if is_telling(message["content"]):
                break
    return "\n".join(turns)
