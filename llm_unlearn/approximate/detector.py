"""Whether a prompt is about what was to be forgotten: O3's out-of-distribution score (arXiv 2407.10223).

Shapes: N texts of the forget set, B prompts, L layers, K = N - 1 directions, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Calibration:
    """How a score becomes a weight.

    Attributes:
        gamma: weight of the cosine to the nearest forget text beside the Mahalanobis distance.
        held_out: part of the forget records that the scores are calibrated with.
        quantile, margin: the weight is 1/2 at that quantile of the held-out scores, less so many of
            their standard deviations.
        steepness: of the sigmoid, by standard deviation.
    """

    gamma: float = 1000.0
    held_out: float = 0.3
    quantile: float = 0.05
    margin: float = 0.5
    steepness: float = 4.0


@dataclass(frozen=True)
class Detector:
    """Statistics of the forget texts of one request, layer by layer.

    The covariance of each layer is `(1 - shrinkage) S + shrinkage * tr(S) / D * I` (Ledoit & Wolf):
    the directions and variances of S and one floor for all others are all that it takes.

    Attributes:
        features_LND: of the texts, less their mean, of length 1.
        center_L, spread_L: mean and standard deviation of the held-out texts' scores.
        settings: gamma, threshold, steepness.
    """

    mean_LD: Tensor
    directions_LKD: Tensor
    variances_LK: Tensor
    floor_L: Tensor
    features_LND: Tensor
    center_L: Tensor
    spread_L: Tensor
    settings: Tensor

    @classmethod
    def fit(
        cls, used_NLD: Tensor, held_out_MLD: Tensor, calibration: Calibration | None = None
    ) -> Self:
        """Describe the used texts, and calibrate with the held-out ones.

        The score of a text is the mean over layers of `s_l`, each less the mean of the held-out
        texts and in units of their standard deviation: a one-class support vector machine with a
        linear kernel, as in the paper, would weigh the layers instead.
        """
        numbers = calibration or Calibration()
        layers = [_describe(used_NLD[:, layer].float()) for layer in range(used_NLD.shape[1])]
        described = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        zeros_L = torch.zeros(len(layers), device=used_NLD.device)
        settings = torch.tensor([numbers.gamma, 0.0, numbers.steepness], device=used_NLD.device)
        plain = cls(**described, center_L=zeros_L, spread_L=zeros_L + 1, settings=settings)
        scores_ML = plain.layer_scores(held_out_MLD)
        center_L = scores_ML.mean(0)
        spread_L = scores_ML.std(0, correction=0)
        # A few texts that happen to be alike must not make a threshold of no width.
        spread_L = spread_L.maximum(0.05 * center_L.abs()).clamp_min(1e-6)
        standard_M = ((scores_ML - center_L) / spread_L).mean(1)
        threshold = standard_M.quantile(numbers.quantile) - numbers.margin
        settings = torch.stack([settings[0], threshold.float(), settings[2]])
        return cls(**described, center_L=center_L, spread_L=spread_L, settings=settings)

    def layer_scores(self, features_BLD: Tensor) -> Tensor:
        """-1/2 Mahalanobis distance squared + gamma * the highest cosine, (B, L): higher = forget."""
        gamma = self.settings[0]
        away_LBD = features_BLD.float().transpose(0, 1) - self.mean_LD[:, None]
        along_LBK = away_LBD @ self.directions_LKD.transpose(1, 2)
        rest_LB = (away_LBD.square().sum(-1) - along_LBK.square().sum(-1)).clamp_min(0)
        distance_LB = (along_LBK.square() / self.variances_LK[:, None]).sum(-1)
        distance_LB = distance_LB + rest_LB / self.floor_L[:, None]
        cosines_LBN = normalize(away_LBD, dim=-1) @ self.features_LND.transpose(1, 2)
        return (-0.5 * distance_LB + gamma * cosines_LBN.amax(-1)).T

    def scores(self, features_BLD: Tensor) -> Tensor:
        """Mean over layers of the standardised scores, (B,)."""
        return ((self.layer_scores(features_BLD) - self.center_L) / self.spread_L).mean(1)

    def weights(self, features_BLD: Tensor) -> Tensor:
        """sigmoid(steepness * (score - threshold)), (B,): near 1 on what is to be forgotten."""
        _, threshold, steepness = self.settings
        return torch.sigmoid(steepness * (self.scores(features_BLD) - threshold))

    def tensors(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device | str) -> Self:
        return cls(**{field.name: tensors[field.name].to(device) for field in fields(cls)})


def _describe(features_ND: Tensor) -> dict[str, Tensor]:
    """Statistics of one layer."""
    from sklearn.covariance import ledoit_wolf_shrinkage

    mean_D = features_ND.mean(0)
    away_ND = features_ND - mean_D
    shrinkage = float(ledoit_wolf_shrinkage(away_ND.double().cpu().numpy(), assume_centered=True))
    # Where all texts are one there is no variance at all.
    floor = (shrinkage * away_ND.square().mean()).clamp_min(1e-6)
    _, sizes_K, directions_KD = torch.linalg.svd(away_ND, full_matrices=False)
    variances_K = (1 - shrinkage) * sizes_K.square() / len(features_ND) + floor
    return {
        "mean_LD": mean_D,
        "directions_LKD": directions_KD,
        "variances_LK": variances_K,
        "floor_L": floor,
        "features_LND": normalize(away_ND, dim=-1),
    }


def split_rows(count: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the used and of the held-out records, at least one of each."""
    from llm_unlearn.approximate.batches import seeded_order

    order = seeded_order(count, f"{seed} detector")
    size = min(max(1, round(held_out * count)), count - 1)
    return sorted(order[size:]), sorted(order[:size])


def highest(weights: Sequence[Tensor]) -> Tensor:
    """The weight of each prompt: the highest of all requests', (B,)."""
    return torch.stack(list(weights)).amax(0)
