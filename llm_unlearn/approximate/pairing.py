"""Analogous pairs: for each text to forget, one to learn instead that is like it."""

import functools
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from llm_unlearn.errors import UserError

WORD = re.compile(r"\w+")


@functools.lru_cache(maxsize=4096)
def word_ngrams(text: str, length: int) -> frozenset[tuple[str, ...]]:
    """Those of the lower-case text; a text of fewer words is one n-gram."""
    words = WORD.findall(text.lower())
    length = min(length, len(words))
    return frozenset(tuple(words[i : i + length]) for i in range(len(words) - length + 1) if length)


def overlap(left: str, right: str, length: int) -> float:
    """Share of the n-grams of the text with fewer of them that the other has too, in [0, 1]."""
    sets = word_ngrams(left, length), word_ngrams(right, length)
    return len(sets[0] & sets[1]) / max(1, min(map(len, sets)))


def analogous_pairs(
    forget: Sequence[str],
    candidates: Sequence[str],
    forget_ND: Tensor,
    candidates_MD: Tensor,
    length: int,
    too_close: float,
) -> list[int]:
    """The number of the nearest candidate of each forget text, by the cosine of their vectors.

    A candidate that shares more than `too_close` of its word n-grams with any forget text is passed
    over: learning it would teach what is to be forgotten.

    Raises:
        UserError: no candidate is left.
    """

    @functools.cache
    def is_allowed(number: int) -> bool:
        return all(overlap(candidates[number], text, length) <= too_close for text in forget)

    nearest_NM = torch.argsort(forget_ND @ candidates_MD.T, dim=1, descending=True, stable=True)
    found = [next(filter(is_allowed, order), None) for order in nearest_NM.tolist()]
    chosen = [number for number in found if number is not None]
    if len(chosen) < len(forget):
        raise UserError(
            f"each of the {len(candidates)} retain records shares more than {too_close:g} of its "
            f"{length}-word sequences with a forget record: give other --retain data, or raise "
            "--too_close"
        )
    return chosen
