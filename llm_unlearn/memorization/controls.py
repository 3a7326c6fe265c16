"""What is not memorization and looks like it: the length of a record, and what the base model knew."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from llm_unlearn.memorization.orientation import Floats

BUCKETS = 5


def within_length(scores: ArrayLike, tokens: ArrayLike, buckets: int = BUCKETS) -> Floats:
    """Rank of each record among records of about its length, in (0, 1); ties share it, NaN stays.

    Args:
        tokens: supervised tokens of each record.
        buckets: groups of about equal size by length; equal lengths are never parted.
    """
    values, lengths = np.asarray(scores, np.float64), np.asarray(tokens, np.float64)
    known = np.flatnonzero(~np.isnan(values))
    found = np.full(len(values), np.nan)
    if not len(known):
        return found
    edges = np.unique(np.quantile(lengths[known], np.arange(1, buckets) / buckets))
    bucket = np.searchsorted(edges, lengths[known], side="left")
    for one in np.unique(bucket):
        here = known[bucket == one]
        found[here] = (rankdata(values[here]) - 0.5) / len(here)
    return found


def gain(confidence: ArrayLike, base_confidence: ArrayLike) -> Floats:
    """`conf_ft - conf_base`: what fine-tuning added to the confidence in each record."""
    return np.asarray(confidence, np.float64) - np.asarray(base_confidence, np.float64)


def residual_ranks(values: Floats, controls: Sequence[Floats]) -> Floats:
    """Ranks of `values` less what a linear fit on the controls' ranks explains, (n,)."""
    ranks = rankdata(values)
    design = np.stack([np.ones(len(values)), *(rankdata(one) for one in controls)], axis=1)
    fit, *_ = np.linalg.lstsq(design, ranks, rcond=None)
    return ranks - design @ fit
