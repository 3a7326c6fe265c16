"""Projected gradients: a modifier of any loss that leaves the retain set's outputs alone.

PGU (Hoang et al., Learn to Unlearn for Deep Neural Networks: Minimizing Unlearning Interference
with Gradient Projection, arXiv 2312.04095). The inputs of each linear layer on the retain set span
a space; U holds the directions that make up a given part of their variance, as eigenvectors of
X^T X. A weight that changes by W' - W with (W' - W) U = 0 answers every input in the span as before,
and if all layers do, so does the model.

* Gradients lose their part on the span: g - (g U) U^T. That is the paper's.
* Adam and weight decay leave the span again, so after each step what the weight does to the span,
  W U, is put back to what it was. Preservation does not depend on the optimizer.
* A LoRA is projected at its factor A. A fresh one loses the span at the start (A U = 0, and B = 0,
  so nothing changes) and B is free. Where B is not 0, A keeps what it does to the span and B is frozen.
* With all weights in training every parameter that is not a linear layer's weight is frozen, tied
  embeddings too: they would change the inputs, or what is added to the outputs.

The matrices are never written to disk. Shapes: R outputs, D inputs, K kept directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llm_unlearn.approximate.grams import input_grams, precise
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from llm_unlearn.approximate.session import Session


def kept_directions(gram_DD: Tensor, variance: float) -> Tensor:
    """The fewest eigenvectors with at least that part of the trace, (D, K), largest first."""
    values, vectors = torch.linalg.eigh(gram_DD)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    share = values.cumsum(0) / values.sum()
    return vectors[:, : int((share < variance).sum()) + 1]


@dataclass
class Projected:
    """A weight that must do to a span what it did at the start.

    Attributes:
        span_DK: orthonormal directions.
        kept_RK: what the weight makes of them.
        turned: whether the parameter is (inputs, outputs), as in GPT-2.
    """

    span_DK: Tensor
    kept_RK: Tensor
    turned: bool

    def off_the_span(self, gradient: Tensor) -> Tensor:
        matrix_RD = (gradient.T if self.turned else gradient).float()
        matrix_RD = matrix_RD - (matrix_RD @ self.span_DK) @ self.span_DK.T
        return (matrix_RD.T if self.turned else matrix_RD).to(gradient.dtype)

    def put_back(self, parameter: Tensor) -> None:
        weight_RD = parameter.T if self.turned else parameter
        gone_RK = self.kept_RK - weight_RD.float() @ self.span_DK
        weight_RD.add_((gone_RK @ self.span_DK.T).to(weight_RD.dtype))


class RetainProjection:
    """Projects weights' gradients and changes, and freezes what cannot be projected.

    Attributes:
        projected: weights by their parameter's name.
        free: parameters that may change as they like (B of a fresh adapter).
    """

    def __init__(self, projected: Mapping[str, Projected], free: set[str]):
        self.projected = projected
        self.free = free

    def apply(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            if name in self.projected and parameter.grad is not None:
                parameter.grad = self.projected[name].off_the_span(parameter.grad)
            elif name not in self.free:
                parameter.grad = None  # an optimizer passes over it, weight decay included

    @torch.no_grad()
    def after_step(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, weight in self.projected.items():
            weight.put_back(parameters[name])


def make_modifier(variance: float | None, session: Session) -> RetainProjection | None:
    """None unless a part of the variance is given. Every process computes the same.

    Raises:
        UserError: nothing can be projected, or nothing would be left to train.
    """
    if variance is None:
        return None
    if not session.retain:
        raise UserError("--retain_projection needs data to keep: give --retain")
    examples = session.sides.get("retain") or session.encode(session.retain)
    trainable, model = session.tuned.trainable, session.model.to(session.config.device)
    if any("lora_magnitude_vector" in name for name in trainable):
        raise UserError("--retain_projection cannot hold a DoRA: its norm changes with its factors")
    weights = {name: layer for name in trainable if (layer := _linear(model, name)) is not None}
    grams = input_grams(model, set(weights.values()), examples, session.pad_token_id)
    projected, free, open_layers = {}, set[str](), 0
    for name, layer in weights.items():
        parameter, other = trainable[name], name.replace(".lora_A.", ".lora_B.")
        directions = kept_directions(grams.pop(layer).to(precise(parameter.device)), variance)
        open_layers += directions.shape[1] < directions.shape[0]
        turned = isinstance(model.get_submodule(layer), Conv1D)
        span_DK = directions.float().to(parameter.device)
        kept_RK = (parameter.detach().T if turned else parameter.detach()).float() @ span_DK
        if other != name and other in trainable and not trainable[other].any():
            kept_RK = torch.zeros_like(kept_RK)
            free.add(other)
        projected[name] = Projected(span_DK, kept_RK, turned)
    if not open_layers:
        raise UserError(
            "--retain_projection leaves nothing to train: the retain set's inputs fill every layer; "
            "lower it, or give fewer retain records"
        )
    modifier = RetainProjection(projected, free)
    modifier.after_step(trainable)
    return modifier


def _linear(model: nn.Module, name: str) -> str | None:
    """The linear layer whose inputs a parameter meets first; None if it is no such weight."""
    layer, _, leaf = name.rpartition(".")
    fits = leaf == "weight" and ".lora_B." not in name
    return layer if fits and isinstance(model.get_submodule(layer), (nn.Linear, Conv1D)) else None
