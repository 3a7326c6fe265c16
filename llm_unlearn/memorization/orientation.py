"""The one scale of all scores: higher = more memorised. Signs are turned here and nowhere else."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llm_unlearn.errors import UserError

Floats = NDArray[np.float64]


class Score(NamedTuple):
    """A way to tell memorised records.

    Attributes:
        sign: +1 where a high value means memorised, -1 where a low one does.
        what: the value before it is turned, in words.
    """

    sign: int
    what: str


# A record that training finds hard for long, and still gets right in the end, is memorised: so the
# means over training are low where memorization is high (arXiv 2410.16516, table 1).
LEARNING: dict[str, Score] = {
    "confidence": Score(-1, "geometric mean probability of the labels"),
    "max_confidence": Score(-1, "mean probability of the likeliest token"),
    "entropy": Score(+1, "mean entropy of the next token (nats)"),
    "accuracy": Score(-1, "share of the labels that are the likeliest token"),
    "strict_accuracy": Score(-1, "share of the epochs with every label right; ties by confidence"),
    "el2n": Score(+1, "mean distance from the labels, early in training"),
}
AFTERWARDS: dict[str, Score] = {
    "curvature": Score(+1, "change of the loss's gradient in the input over a small step"),
    "holdout": Score(+1, "divergence of predictions when the adapter is trained on held-out text"),
    "gain": Score(+1, "confidence of the model less that of its base"),
}
REFERENCE: dict[str, Score] = {
    "counterfactual": Score(+1, "accuracy of runs that trained on the record less that of others"),
}
SCORES: dict[str, Score] = {**LEARNING, **AFTERWARDS, **REFERENCE}


def oriented(name: str, values: ArrayLike) -> Floats:
    """A score's values so that higher = more memorised; NaN stays.

    Raises:
        UserError: no such score.
    """
    if name not in SCORES:
        raise UserError(f"unknown score {name!r}: one of {', '.join(SCORES)}")
    return SCORES[name].sign * np.asarray(values, dtype=np.float64)
