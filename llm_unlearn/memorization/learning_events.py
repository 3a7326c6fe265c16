"""Learning events: what training's own forward pass says of each record, before each step.

Confidence, maximum confidence, entropy and binary accuracy are those of arXiv 2410.16516 carried over to
tokens; EL2N (arXiv 2107.07075) is ours to add. Shapes: N supervised tokens, B rows, V vocabulary.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

TOKEN_VALUES = ("log_probability", "max_confidence", "entropy", "accuracy", "el2n")
ROW_VALUES = ("confidence", "max_confidence", "entropy", "accuracy", "strict_accuracy", "el2n")
NUMBERS_AT_ONCE = 2**24  # of logits in single precision: bounds the memory


def token_values(logits_NV: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
    """What the logits of supervised tokens say about their labels, (N,) each, single precision.

    `log_probability` of the label (nats), the largest probability, the entropy (nats), whether the label
    is the likeliest token (1 or 0), and `el2n = |p - onehot(label)|_2`, without making the vector.
    """
    step = max(1, NUMBERS_AT_ONCE // max(1, logits_NV.shape[-1]))
    parts = [
        _token_values(logits_NV[start : start + step].float(), labels_N[start : start + step])
        for start in range(0, max(1, len(labels_N)), step)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in TOKEN_VALUES}


def _token_values(logits_NV: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
    highest_N, first_N = logits_NV.max(-1)
    shifted_NV = logits_NV - highest_N[:, None]
    weights_NV = shifted_NV.exp()
    total_N = weights_NV.sum(-1)
    log_probability_N = shifted_NV.gather(-1, labels_N[:, None])[:, 0] - total_N.log()
    squares_N = (weights_NV * weights_NV).sum(-1) / (total_N * total_N)
    return {
        "log_probability": log_probability_N,
        "max_confidence": 1 / total_N,
        "entropy": total_N.log() - (weights_NV * shifted_NV).sum(-1) / total_N,
        "accuracy": (first_N == labels_N).float(),
        "el2n": el2n(log_probability_N, squares_N),
    }


def el2n(log_probability: Tensor, squared_probabilities: Tensor) -> Tensor:
    """`sqrt(sum_v p_v^2 - 2 p_label + 1)`: the distance of a distribution from its label's."""
    distance = squared_probabilities - 2 * log_probability.exp() + 1
    return distance.clamp_min(0).sqrt()


def row_values(values: Mapping[str, Tensor], rows_N: Tensor, count: int) -> dict[str, Tensor]:
    """Means over each row's tokens, so that long records are not more of anything, (B,) each.

    Args:
        values: by token; names that are missing are left out.
        rows_N: the row of each token.
        count: how many rows there are.

    Returns:
        `confidence = exp(mean log p)`, a geometric mean; means of the others; `strict_accuracy`, whether
        every token is right; `tokens`. A row without tokens is NaN.
    """
    tokens_B = torch.bincount(rows_N, minlength=count).float()

    def mean(values_N: Tensor) -> Tensor:
        total_B = torch.zeros(count, dtype=torch.float32, device=values_N.device)
        return total_B.index_add_(0, rows_N, values_N.float()) / tokens_B

    found = {name: mean(values[name]) for name in TOKEN_VALUES if name in values}
    if "squares" in values:  # a fused head gives the sum of the squared probabilities
        found["el2n"] = mean(el2n(values["log_probability"], values["squares"]))
    found["confidence"] = found.pop("log_probability").exp()
    # Divided by itself a count is 1 exactly, so nothing is lost in comparing.
    found["strict_accuracy"] = torch.where(
        tokens_B > 0, (found["accuracy"] >= 1).float(), torch.nan
    )
    return {**found, "tokens": tokens_B}
