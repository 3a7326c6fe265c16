"""Near-duplicates: texts that share most of their runs of five characters, found without missing any.

Every text is the set of its character 5-grams, up to case, white space and Unicode's compatibility forms,
and two texts are as similar as their sets (Jaccard: what is in both, over what is in either). A set is
summed up in a bit signature: each gram sets one bit. Where two signatures differ in k bits, the sets
differ in k grams at least, so that

    Jaccard >= t   implies   k <= (|A| + |B|) (1 - t) / (1 + t)

and what fails that cannot be similar. What passes is compared set by set. So nothing is reported that
is not similar, and nothing similar is missed; MinHash with LSH, which misses some, is slower here, since
no sketch of anybody's record is kept (`benchmarks/near_duplicates.py` runs both).
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError

GRAM = 5
THRESHOLD = 0.8
FEWEST_BITS, MOST_BITS = 128, 4096
AT_ONCE = 2**12  # texts that are signed in one step
PAIRS_AT_ONCE = 2**16  # compared in one step: what stays in a processor's cache

# Odd numbers that spread the characters of a gram over 64 bits. Any would do: they decide the speed alone.
MULTIPLIERS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F],
    np.uint64,
)  # fmt: skip


class Match(NamedTuple):
    """Two similar texts: the row of the one that was asked about, and of the one that is known.

    Attributes:
        similarity: Jaccard of their shingles, in [threshold, 1].
        is_exact: the texts are the same, up to case, white space and compatibility forms.
    """

    row: int
    known: int
    similarity: float
    is_exact: bool


def normalised(record: Record) -> str:
    """The record's text in one line, without what near-duplicates may differ in freely."""
    text = " ".join(record.texts())
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def shingles(text: str) -> set[str]:
    """The character 5-grams of a text; of a shorter one itself, filled up with spaces."""
    text = text.ljust(GRAM)
    return {text[start : start + GRAM] for start in range(len(text) - GRAM + 1)}


def jaccard(first: set[str], second: set[str]) -> float:
    """What is in both, over what is in either, in [0, 1]; both have something in them."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


class NearDuplicates:
    """Finds the texts that are similar to one of some known ones.

    Args:
        texts: the known ones, normalised.
        threshold: the least similarity, in (0, 1].

    Raises:
        UserError: no such threshold.
    """

    def __init__(self, texts: Sequence[str], threshold: float = THRESHOLD):
        if not 0 < threshold <= 1:
            raise UserError(f"--threshold must be above 0 and at most 1, got {threshold}")
        self.texts = list(texts)
        self.threshold = threshold
        # Two bits a gram tell most: with fewer they collide, with more there is more to compare.
        letters = sum(map(len, self.texts)) // max(len(self.texts), 1)
        wanted = 1 << (2 * letters).bit_length()
        self.bits = min(max(wanted, FEWEST_BITS), MOST_BITS)
        self.signatures, self.sizes = self._sign(self.texts)
        self._shingles = lru_cache(maxsize=2**12)(lambda known: shingles(self.texts[known]))

    def find(self, texts: Sequence[str]) -> Iterator[Match]:
        """Every known text that each of these, normalised too, is similar to."""
        if not self.texts or not texts:
            return
        last, own = -1, set[str]()
        for row, known in self._candidates(texts):
            if row != last:
                last, own = row, shingles(texts[row])
            similarity = jaccard(own, self._shingles(known))
            if similarity >= self.threshold:
                yield Match(row, known, similarity, texts[row] == self.texts[known])

    def _candidates(self, texts: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Pairs that the signatures leave in doubt, row by row."""
        signatures, sizes = self._sign(texts)
        part = (1 - self.threshold) / (1 + self.threshold)
        rows_at_once = max(1, PAIRS_AT_ONCE // len(self.texts))
        for start in range(0, len(texts), rows_at_once):
            rows = slice(start, start + rows_at_once)
            most = (
                part * np.add.outer(sizes[rows], self.sizes) + 0.01
            )  # rounding may not lose a pair
            differing = np.zeros(most.shape, np.uint16)
            for own, known in zip(signatures[:, rows], self.signatures, strict=True):
                differing += np.bitwise_count(own[:, None] ^ known[None, :])
            for row, known in np.argwhere(differing <= most).tolist():
                yield start + row, known

    def _sign(self, texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
        """Signatures (words of 64 bits, texts), and how many grams each has, repeated ones too.

        A gram that is repeated sets the same bit again; counting it twice only weakens the bound.
        """
        parts = [self._sign_some(texts[i : i + AT_ONCE]) for i in range(0, len(texts), AT_ONCE)]
        words = np.concatenate([np.zeros((0, self.bits // 64), np.uint64), *(w for w, _ in parts)])
        sizes = np.concatenate([np.zeros(0), *(counts for _, counts in parts)])
        return np.ascontiguousarray(words.T), sizes

    def _sign_some(self, texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
        hashes, rows = _hashed_grams(texts)
        shift = np.uint64(64 - (self.bits - 1).bit_length())
        bits = np.zeros((len(texts), self.bits), bool)
        bits[rows, (hashes >> shift).astype(np.intp)] = True
        sizes = np.bincount(rows, minlength=len(texts)).astype(np.float64)
        return np.packbits(bits, axis=1).view(np.uint64), sizes


def _hashed_grams(texts: Iterable[str]) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
    """All grams of all texts as 64-bit hashes, and the row of each. Equal grams have equal hashes."""
    filled = [text.ljust(GRAM) for text in texts]
    joined = "".join(filled).encode("utf-32-le", errors="surrogatepass")
    letters = np.frombuffer(joined, "<u4").astype(np.uint64)
    lengths = np.array([len(text) for text in filled], np.intp)
    count = max(len(letters) - GRAM + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for offset, multiplier in enumerate(MULTIPLIERS):
        hashes += letters[offset : offset + count] * multiplier
    rows = np.repeat(np.arange(len(filled)), lengths)[:count]
    within = np.ones(count, bool)
    for back in range(1, GRAM):  # these begin in one text and end in the next
        within[np.cumsum(lengths)[:-1] - back] = False
    return hashes[within], rows[within]
