"""Tug of War: forgetting, retaining and generalising like a retrained model, in one number."""

import math
from collections.abc import Mapping

FORGET = "forget"


def tug_of_war(model: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """How close a model is to the retrained one on all sets at once.

    Formula: `prod_S (1 - |a_S - a_S(retrained)|)` over accuracies a of the sets `forget`, `retain`
    and `test`; any score in [0, 1] can serve as accuracy. Source: Zhao et al., What Makes Unlearning
    Hard and What to Do About It (arXiv 2406.01257). Range: [0, 1]. Higher = closer; 1 = as
    retrained on every set. It falls as much for forgetting too much as for too little, and equal
    accuracies are no equal answers. A NaN makes it NaN.

    Raises:
        ValueError: no sets, different ones for both models, or a score outside [0, 1].
    """
    if not model or model.keys() != retrained.keys():
        raise ValueError(
            f"expected the same sets for both models, got {sorted(model)}, {sorted(retrained)}"
        )
    for name, score in [*model.items(), *retrained.items()]:
        if not (math.isnan(score) or 0 <= score <= 1):
            raise ValueError(f"expected a score in [0, 1] for {name}, got {score}")
    return math.prod(1 - abs(model[name] - retrained[name]) for name in model)


def tug_of_war_attack(
    model: Mapping[str, float],
    retrained: Mapping[str, float],
    model_attack: float,
    retrained_attack: float,
) -> float:
    """Tug of War with an attack in place of the forget set's accuracy (ToW-MIA).

    Formula: `(1 - |MIA - MIA(retrained)|) (1 - |a_retain - ...|) (1 - |a_test - ...|)`, the MIA
    being an AUC or success rate on the forget set. Source, range, direction: as `tug_of_war`,
    whose mappings it takes (an accuracy of the forget set is not read).

    Raises:
        ValueError: as `tug_of_war`.
    """
    return tug_of_war({**model, FORGET: model_attack}, {**retrained, FORGET: retrained_attack})
