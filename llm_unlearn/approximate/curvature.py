"""Gradients and Hessian-vector products of a model's loss over the tensors that are trained.

The first-order graph is built once for a point and kept: every product with the Hessian is then one
backward pass through it (arXiv 2406.14507 rebuilds it each time). Fused attention kernels have no second
derivative, so the plain ones are used meanwhile. Vectors are flat, (D,), in single precision or better.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_unlearn.approximate.batches import collate
from llm_unlearn.approximate.losses import label_log_probabilities
from llm_unlearn.approximate.step import Batch, forward
from llm_unlearn.approximate.subproblem import unit_noise
from llm_unlearn.data.encoding import Example
from llm_unlearn.errors import UserError

TOLERANCE = {torch.float64: 1e-2, torch.float32: 1e-2}  # of a product's relative error
HALF_TOLERANCE = 3e-2
DISTANCES = (1e-1, 1e-2, 1e-3)  # along a unit vector; one of them suits every model
ADVICE = "give --attn_implementation eager, leave gradient checkpointing out, and load the model unquantised"


@contextmanager
def plain_attention() -> Iterator[None]:
    """Torch's own attention by its plain kernel, which can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@dataclass(frozen=True)
class Part:
    """One micro-batch and how much each of its tokens' losses weighs."""

    batch: Batch
    weight: float


def parts_of(
    examples: Sequence[Example], rows: int, pad_token_id: int, weight: float, device: Any
) -> list[Part]:
    """Micro-batches of `rows` rows whose sum is `weight` times the mean loss of a token."""
    tokens = sum(label >= 0 for example in examples for label in example.labels[1:])
    found = []
    for start in range(0, len(examples), rows):
        batch = collate([(e, 0, True) for e in examples[start : start + rows]], pad_token_id)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        found.append(Part(batch, weight / max(1, tokens)))
    return found


def loss_of(model: Any, part: Part) -> Tensor:
    """A micro-batch's share of the loss, in at least single precision."""
    with plain_attention():
        logits_BTV = forward(model, part.batch, hidden=False).logits[:, :-1]
    exact = torch.promote_types(logits_BTV.dtype, torch.float32)
    return (
        -part.weight
        * label_log_probabilities(logits_BTV.to(exact), part.batch["labels"][:, 1:]).sum()
    )


def total_loss(model: Any, parts: Sequence[Part]) -> float:
    """The loss over all parts, without gradients."""
    with torch.no_grad():
        return sum(float(loss_of(model, part)) for part in parts)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all tensors, (D,), in at least single precision."""
    exact = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.cat([tensor.detach().reshape(-1).to(exact) for tensor in tensors])


def pieces(vector_D: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The vector in the tensors' shapes."""
    sizes = [tensor.numel() for tensor in like]
    return [p.view(t.shape) for p, t in zip(vector_D.split(sizes), like, strict=True)]


def put(parameters: Sequence[nn.Parameter], vector_D: Tensor) -> None:
    """Overwrite parameters in place.

    Autograd does not hear of it: a graph that was kept is of the weights that were there when it was
    built, and is right again once they are put back.
    """
    for parameter, piece in zip(parameters, pieces(vector_D, parameters), strict=True):
        parameter.data.copy_(piece)


class Curvature:
    """Loss, gradient and Hessian products at the model's present weights.

    Args:
        gradient_parts: what loss and gradient are of.
        curvature_parts: what the Hessian is of (None: the same, whose graphs then serve both).
        keep_graphs: keep the first-order graphs of all micro-batches; otherwise each product builds
            them again, for half again the time and the memory of one micro-batch.
    """

    def __init__(
        self,
        model: Any,
        parameters: Sequence[nn.Parameter],
        gradient_parts: Sequence[Part],
        curvature_parts: Sequence[Part] | None = None,
        keep_graphs: bool = True,
    ):
        self.model = model
        self.parameters = list(parameters)
        self.gradient_parts = gradient_parts
        self.curvature_parts = gradient_parts if curvature_parts is None else curvature_parts
        self.keep_graphs = keep_graphs
        self.products = 0
        self._graphs: list[list[Tensor]] = []
        self.loss, self.gradient_D = self._first_order(keep_graphs and curvature_parts is None)
        if keep_graphs and curvature_parts is not None:
            self._graphs = [self._graph(part)[1] for part in curvature_parts]

    def _first_order(self, keeps: bool) -> tuple[float, Tensor]:
        total, gradient_D = 0.0, torch.zeros_like(flat(self.parameters))
        for part in self.gradient_parts:
            loss, found = self._graph(part, keeps)
            total += float(loss)
            gradient_D += flat(found)
            if keeps:
                self._graphs.append(found)
        return total, gradient_D

    def _graph(self, part: Part, creates: bool = True) -> tuple[Tensor, list[Tensor]]:
        """A micro-batch's loss and its gradients, which can be differentiated again."""
        loss = loss_of(self.model, part)
        found = torch.autograd.grad(
            loss, self.parameters, create_graph=creates, materialize_grads=True
        )
        return loss.detach(), list(found)

    def product(self, vector_D: Tensor) -> Tensor:
        """The Hessian times a vector, (D,)."""
        self.products += 1
        along = pieces(vector_D, self.parameters)
        total_D = torch.zeros_like(self.gradient_D)
        for number, part in enumerate(self.curvature_parts):
            graph = self._graphs[number] if self.keep_graphs else self._graph(part)[1]
            total_D += self._through(graph, along)
        return total_D

    def _through(self, graph: list[Tensor], along: list[Tensor]) -> Tensor:
        pairs = [(g, a.to(g.dtype)) for g, a in zip(graph, along, strict=True) if g.requires_grad]
        if not pairs:  # the loss is linear in every parameter
            return torch.zeros_like(self.gradient_D)
        found = torch.autograd.grad(
            [g for g, _ in pairs],
            self.parameters,
            grad_outputs=[a for _, a in pairs],
            retain_graph=self.keep_graphs,
            materialize_grads=True,
        )
        return flat(found)

    def present_loss(self) -> float:
        """Of the gradient's rows, at whatever weights the model has by now."""
        return total_loss(self.model, self.gradient_parts)


def check_products(
    model: Any, parameters: Sequence[nn.Parameter], part: Part, how: str = "double", seed: int = 0
) -> float:
    """Hold one Hessian product, as it will be used, against differences of gradients.

    The loss is of every token of the rows, prompts too, so that it bends even where the answers are
    known by heart.

    Args:
        part: a short micro-batch.
        how: `double`: gradients are taken with the model in double precision, which takes that
            much memory for a moment; `same`: with the model as it is; `none`: nothing is checked.

    Returns:
        The relative error.

    Raises:
        UserError: no second derivative, or one that is wrong.
    """
    if how == "none":
        return float("nan")
    part = _every_token(part)
    vector_D = unit_noise(flat(parameters), seed)
    try:
        product_D = Curvature(model, parameters, [part]).product(vector_D).double()
    except torch.OutOfMemoryError:
        raise  # says itself what is missing; another attention would not help
    except RuntimeError as error:
        raise UserError(
            f"the model's loss cannot be differentiated twice ({' '.join(str(error).split())[:120]}): {ADVICE}"
        ) from None
    with _in_double(model) if how == "double" else _as_it_is():
        found = [_difference(model, parameters, part, vector_D, far) for far in DISTANCES]
    error = min(_apart(product_D, one_D) for one_D in found)
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    allowed = max(TOLERANCE.get(kind, HALF_TOLERANCE) for kind in kinds)
    if not error <= allowed:
        raise UserError(
            f"Hessian products are wrong: {error:.1%} away from differences of gradients, where "
            f"{allowed:.0%} is allowed: {ADVICE}"
        )
    return error


def _apart(one_D: Tensor, other_D: Tensor) -> float:
    """How far apart in parts of the other's length; two that are 0 are equal."""
    smallest = torch.finfo(other_D.dtype).tiny
    return float((one_D - other_D).norm() / other_D.norm().clamp_min(smallest))


def _every_token(part: Part) -> Part:
    batch: Mapping[str, Tensor] = part.batch
    present = batch["attention_mask"].bool()
    labels = batch["input_ids"].where(present, -100)
    return Part({**batch, "labels": labels}, 1.0 / max(1, int(present[:, 1:].sum())))


def _difference(
    model: Any, parameters: Sequence[nn.Parameter], part: Part, vector_D: Tensor, far: float
) -> Tensor:
    """(gradient(w + far v) - gradient(w - far v)) / (2 far), in double precision, (D,)."""
    start_D, found = flat(parameters), []
    try:
        for sign in (1, -1):
            put(parameters, start_D + sign * far * vector_D.to(start_D))
            grads = torch.autograd.grad(loss_of(model, part), parameters, materialize_grads=True)
            found.append(flat(grads).double())
    finally:
        put(parameters, start_D)
    return (found[0] - found[1]) / (2 * far)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _in_double(model: nn.Module) -> Iterator[None]:
    """The model's weights in double precision; afterwards they are the very tensors they were."""
    tensors = [*model.parameters(), *model.buffers()]
    aside = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.data = tensor.data.double()
        yield
    finally:
        for tensor, data in zip(tensors, aside, strict=True):
            tensor.data = data
