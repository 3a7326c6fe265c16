"""Loss functions that more than one method is made of. Pure: tensors in, a tensor for each unit out.

Shapes: B rows, T predicted tokens, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional


def label_log_probabilities(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Log-probability of each label, (B, T); 0 where there is none (below 0)."""
    counted = labels_BT >= 0
    picked = functional.cross_entropy(
        logits_BTV.transpose(1, 2), labels_BT.clamp_min(0), reduction="none"
    )
    return -picked * counted


def divergence(target_log_BTV: Tensor, log_BTV: Tensor) -> Tensor:
    """KL(target || model) at each position, (B, T), of two log-distributions; 0 where they agree."""
    return (target_log_BTV.exp() * (target_log_BTV - log_BTV)).sum(-1)


def preference(margin_B: Tensor, beta: float) -> Tensor:
    """-(2 / beta) log sigmoid(beta * margin), (B,): the form that NPO, DPO and SimNPO share."""
    return -2.0 / beta * functional.logsigmoid(beta * margin_B)


def entropy(log_BTV: Tensor) -> Tensor:
    """Shannon entropy in nats, (B, T)."""
    return -(log_BTV.exp() * log_BTV).sum(-1)


def orthogonality(left_RI: Tensor, right_SI: Tensor) -> Tensor:
    """Squared Frobenius norm of the products of two factors' rows; 0 where they are orthogonal."""
    return torch.linalg.matrix_norm(left_RI @ right_SI.T).square()
