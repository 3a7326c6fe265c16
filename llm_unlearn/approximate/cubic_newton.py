"""Cubic-regularised Newton steps with an adaptive weight: the outer loop, whatever is minimised.

`cure_newton` is the whole-Hessian form (CureNewton) for a function of a few thousand numbers; the method
`scurenewton` runs the same loop over a language model's trained tensors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from llm_unlearn.approximate.subproblem import (
    Descent,
    Move,
    Solver,
    dense,
    lanczos,
    start_vector,
)
from llm_unlearn.errors import UserError

SOLVERS = ("lanczos", "gd", "dense")
# Adaptive regularisation: below BAD a step is refused, below POOR the next is shorter, above GOOD longer.
BAD, POOR, GOOD = 0.1, 0.5, 0.9
MOST_REFUSALS = 10
SMALLEST_WEIGHT = 1e-6
# Of the loss: a change that single and double precision cannot see.
ROUNDING, ROUNDING_IN_DOUBLE = 1e-6, 1e-14
NO_NUMBER = "the loss, its gradient or a product with the Hessian was no number"


class Local(Protocol):
    """Loss, gradient and Hessian products at one point, and the same loss elsewhere."""

    loss: float
    gradient_D: Tensor
    products: int

    def product(self, vector_D: Tensor) -> Tensor: ...

    def present_loss(self) -> float: ...


class Problem(Protocol):
    """What is minimised; it knows where it is."""

    def local(self, number: int) -> Local: ...

    def weights(self) -> Tensor: ...

    def put(self, weights_D: Tensor) -> None: ...

    def objection(self) -> str:
        """The limit that the present weights are beyond; empty where nothing is wrong with them."""
        ...


@dataclass(frozen=True)
class Settings:
    """How steps are found.

    Attributes:
        solver: `lanczos`, `gd` (the paper's descent) or `dense` (the whole Hessian).
        weight: the cubic weight L: where it begins, or the whole time where it is not adaptive.
        inner: size of the Krylov space, or steps of descent.
        rate: of descent.
        sigma: noise against the hard case, in parts of the gradient.
        epsilon: gradient norm (nats for each unit of weight) at which a point counts as stationary.
        longest: no step is longer.
    """

    solver: str = "lanczos"
    weight: float = 10.0
    adaptive: bool = True
    inner: int = 8
    rate: float = 1e-2
    sigma: float = 1e-3
    epsilon: float = 1e-4
    longest: float = math.inf
    seed: int = 0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise UserError(f"--solver is one of {', '.join(SOLVERS)}, got {self.solver!r}")
        if not (self.weight > 0 and self.inner > 0 and self.rate > 0 and self.longest > 0):
            raise UserError(
                "the cubic weight, inner steps, their rate and the longest step are above 0"
            )
        if not (self.sigma >= 0 and self.epsilon >= 0):
            raise UserError("--sigma and --epsilon are 0 or more")


@dataclass
class CubicNewton:
    """The loop, a step at a time.

    Attributes:
        weight: the cubic weight for the next step.
        history: what each step did; a dictionary of plain numbers.
    """

    problem: Problem
    settings: Settings
    weight: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weight = self.weight or self.settings.weight

    def step(self) -> str:
        """Take one step, or find that none is to be taken.

        A step that the problem objects to is made shorter. Where that happens twice in a row the limit
        is near, and there is nothing more to gain.

        Returns:
            Why to stop; empty: go on.
        """
        local = self.problem.local(len(self.history))
        start_D = self.problem.weights()
        try:
            solver = self._solver(local)
            move = solver.move(self.weight)
        except FloatingPointError:
            return NO_NUMBER
        if self._is_stationary(move, local):
            return "stationary"
        refused, limit = 0, ""
        while True:
            change, why = self._try(local, start_D, move)
            objected = "" if why else self.problem.objection()
            limit = objected or limit
            if not (why or objected):
                was_limited = bool(self.history and self.history[-1]["limited"])
                self._note(local, refused, bool(limit), move, change)
                return limit if was_limited else ""
            self.problem.put(start_D)
            if not self.settings.adaptive or refused == MOST_REFUSALS:
                self._note(local, refused, bool(limit))
                return why or objected
            refused += 1
            self.weight *= 4
            move = solver.move(self.weight)

    def _solver(self, local: Local) -> Solver:
        if not (math.isfinite(local.loss) and bool(local.gradient_D.isfinite().all())):
            raise FloatingPointError(NO_NUMBER)
        given, seed = self.settings, self.settings.seed + len(self.history)
        if given.solver == "dense":
            return dense(local.product, local.gradient_D)
        if given.solver == "gd":
            return Descent(
                local.product, local.gradient_D, given.inner, given.rate, given.sigma, seed
            )
        start_D = start_vector(local.gradient_D, given.sigma, seed)
        return lanczos(local.product, local.gradient_D, start_D, given.inner)

    def _is_stationary(self, move: Move, local: Local) -> bool:
        """Tripuraneni's test (arXiv 1711.02838, algorithm 1). A small gradient is enough where the lowest
        eigenvalue is known, and then no direction may bend down.
        """
        epsilon = self.settings.epsilon
        gain = math.sqrt(epsilon**3 / self.weight) / 100
        is_double = local.gradient_D.dtype == torch.float64
        rounding = ROUNDING_IN_DOUBLE if is_double else ROUNDING
        is_done = -move.predicted < max(gain, rounding * abs(local.loss))
        if move.lowest is None:
            return is_done
        is_flat = float(local.gradient_D.norm()) <= epsilon
        return (is_flat or is_done) and move.lowest >= -math.sqrt(self.weight * epsilon)

    def _try(self, local: Local, start_D: Tensor, move: Move) -> tuple[float, str]:
        """Go there: by how much the loss changed, and what is wrong with it."""
        if not float(move.delta_D.norm()) <= self.settings.longest:
            return 0.0, "the step is too long: raise --cubic_weight"
        self.problem.put(start_D + move.delta_D)
        change = local.present_loss() - local.loss
        if not math.isfinite(change):
            return change, "the loss was no number: raise --cubic_weight"
        if self.settings.adaptive and not -change > -BAD * move.predicted:
            return change, "no step kept what the model of the loss promised"
        return change, ""

    def _note(
        self,
        local: Local,
        refused: int,
        limited: bool,
        move: Move | None = None,
        change: float = 0.0,
    ) -> None:
        """Remember what was done (None: nothing), and set the weight of the next step."""
        self.history.append(
            {
                "step": len(self.history) + 1,
                "loss": local.loss,
                "change": change,
                "predicted": move.predicted if move else 0.0,
                "cubic_weight": self.weight,
                "gradient_norm": float(local.gradient_D.norm()),
                "step_norm": float(move.delta_D.norm()) if move else 0.0,
                "lowest_eigenvalue": move.lowest if move else None,
                "refused": refused,
                "limited": limited,
                "products": local.products,
            }
        )
        if self.settings.adaptive and move is not None:
            self._adapt(change / move.predicted if move.predicted else 0.0)

    def _adapt(self, ratio: float) -> None:
        if ratio < POOR:
            self.weight *= 2
        elif ratio > GOOD:
            self.weight = max(self.weight / 2, SMALLEST_WEIGHT)


@dataclass(frozen=True)
class Found:
    """Where `cure_newton` ended.

    Attributes:
        point_D: the point.
        stopped: why; empty: after the last step that was allowed.
    """

    point_D: Tensor
    history: list[dict[str, Any]]
    stopped: str


def cure_newton(
    loss: Callable[[Tensor], Tensor],
    start_D: Tensor,
    steps: int = 10,
    settings: Settings | None = None,
) -> Found:
    """CureNewton: minimise a function of a few thousand numbers by cubic Newton steps with the whole
    Hessian (by default), which may be singular or indefinite.

    Args:
        loss: of a vector (D,), differentiable twice; double precision is best.
        settings: another sub-solver, a fixed weight, ... (default: `dense`, adaptive).

    Raises:
        UserError: too many numbers for a whole Hessian.
    """
    problem = _Function(loss, start_D.detach().clone())
    newton = CubicNewton(problem, settings or Settings(solver="dense"))
    for _ in range(steps):
        if stopped := newton.step():
            return Found(problem.weights(), newton.history, stopped)
    return Found(problem.weights(), newton.history, "")


@dataclass
class _Function:
    """A function of a vector as a `Problem`."""

    function: Callable[[Tensor], Tensor]
    point_D: Tensor

    def local(self, number: int) -> Local:
        return _AtPoint(self)

    def weights(self) -> Tensor:
        return self.point_D

    def put(self, weights_D: Tensor) -> None:
        self.point_D = weights_D

    def objection(self) -> str:
        return ""


class _AtPoint:
    def __init__(self, problem: _Function):
        self.problem = problem
        self.products = 0
        self._point_D = problem.point_D.clone().requires_grad_()
        value = problem.function(self._point_D)
        (self._graph_D,) = torch.autograd.grad(value, self._point_D, create_graph=True)
        self.loss, self.gradient_D = float(value.detach()), self._graph_D.detach()

    def product(self, vector_D: Tensor) -> Tensor:
        self.products += 1
        if not self._graph_D.requires_grad:
            return torch.zeros_like(vector_D)
        (found_D,) = torch.autograd.grad(
            self._graph_D, self._point_D, vector_D, retain_graph=True, materialize_grads=True
        )
        return found_D

    def present_loss(self) -> float:
        with torch.no_grad():
            return float(self.problem.function(self.problem.point_D))
