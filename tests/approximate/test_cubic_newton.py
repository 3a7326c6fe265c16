"""The outer loop on functions whose minimum, saddles and symmetries are known; CureNewton as a function."""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_unlearn.approximate.cubic import damped_newton, spectrum_of
from llm_unlearn.approximate.cubic_newton import (
    MOST_REFUSALS,
    CubicNewton,
    Settings,
    _AtPoint,
    _Function,
    cure_newton,
)
from llm_unlearn.approximate.subproblem import dense
from llm_unlearn.errors import UserError


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def saddle(x: Tensor) -> Tensor:
    """Minima at (0, 1) and (0, -1), a saddle at 0."""
    return x[0] ** 2 - x[1] ** 2 / 2 + x[1] ** 4 / 4


def valley(x: Tensor) -> Tensor:
    """Rosenbrock's; minimum at (1, 1)."""
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


@pytest.mark.parametrize(("solver", "inner"), [("dense", 8), ("lanczos", 2), ("gd", 60)])
def test_a_saddle_is_left(solver: str, inner: int) -> None:
    """Its gradient is exactly 0: Newton's method and gradient descent stay there for ever."""
    settings = Settings(solver=solver, weight=1.0, inner=inner, rate=0.2)
    found = cure_newton(saddle, double(0.0, 0.0), 40, settings)
    assert found.point_D.abs().tolist() == pytest.approx([0.0, 1.0], abs=1e-3)
    assert found.history[0]["loss"] == 0 and float(saddle(found.point_D)) < -0.2499


def test_a_saddle_is_left_from_a_line_that_leads_into_it() -> None:
    """The hard case: no part of the gradient is along the direction that bends down."""
    found = cure_newton(saddle, double(0.7, 0.0), 30, Settings(solver="dense", weight=1.0))
    assert found.point_D.abs().tolist() == pytest.approx([0.0, 1.0], abs=1e-3)


def test_a_curved_valley_is_followed_and_every_step_goes_down() -> None:
    found = cure_newton(valley, double(-1.2, 1.0), 60)
    assert found.stopped == "stationary"
    assert found.point_D.tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
    losses = [one["loss"] for one in found.history]
    assert all(later < earlier for earlier, later in pairwise(losses))
    for one in found.history:
        assert one["predicted"] < 0 and one["change"] <= 0.1 * one["predicted"]
    assert any(one["refused"] for one in found.history), "the ratio test had something to do"


def test_the_ratio_test_refuses_what_a_low_weight_would_do() -> None:
    """With L far too low the first step goes up where nothing tests it; with the test none does."""

    def bumpy(x: Tensor) -> Tensor:
        return torch.cos(3 * x).sum() + x.square().sum() / 20

    options = {"solver": "dense", "weight": 1e-2}
    careless = cure_newton(bumpy, double(0.5), 1, Settings(**options, adaptive=False))
    careful = cure_newton(bumpy, double(0.5), 1, Settings(**options))
    assert careless.history[0]["change"] > 0 and careless.history[0]["refused"] == 0
    assert careful.history[0]["change"] < 0 and careful.history[0]["refused"] > 0
    assert careful.history[0]["cubic_weight"] == 1e-2 * 4 ** careful.history[0]["refused"]


@dataclass
class Guarded(_Function):
    """A function with an objection to a region."""

    asked: int = field(default=0)

    def objection(self) -> str:
        self.asked += 1
        return "too far" if float(self.point_D.norm()) > 0.1 else ""


def test_an_objection_shortens_steps_and_ends_it_where_nothing_helps() -> None:
    problem = Guarded(lambda x: (x - 3).square().sum(), double(0.0))
    newton = CubicNewton(problem, Settings(solver="dense", weight=1.0))
    said = [newton.step(), newton.step()]
    assert said == ["", "too far"], "as far as it may go, and no further"
    assert newton.history[0]["refused"] > 0 and 0 < float(problem.point_D) <= 0.1
    never = Guarded(lambda x: (x - 3).square().sum(), double(0.2))
    newton = CubicNewton(never, Settings(solver="dense", weight=1.0))
    assert newton.step() == "too far"
    assert float(never.point_D) == 0.2, "as it was"
    assert newton.history[0]["change"] == 0 and never.asked == MOST_REFUSALS + 1


def test_a_loss_that_is_no_number_is_refused() -> None:
    def cliff(x: Tensor) -> Tensor:
        return (x.square() + torch.where(x < 0.05, torch.nan, 0.0)).sum()

    found = cure_newton(cliff, double(1.0), 1, Settings(solver="dense", weight=1e-2))
    assert found.history[0]["refused"] > 0 and 0.05 < float(found.point_D) < 0.9
    fixed = Settings(solver="dense", weight=1e-6, adaptive=False)
    stopped = cure_newton(
        lambda x: (x + torch.where(x < 0.5, torch.nan, 0.0)).sum(), double(1.0), 5, fixed
    )
    assert "no number" in stopped.stopped and stopped.point_D.tolist() == [1.0]


def test_the_longest_step_is_a_limit() -> None:
    settings = Settings(solver="dense", weight=1e-3, longest=0.25)
    found = cure_newton(lambda x: (x - 3).square().sum(), double(0.0), 3, settings)
    assert all(0 < one["step_norm"] <= 0.25 for one in found.history)


RANK, WIDTH = 2, 3
TARGET = torch.arange(WIDTH * WIDTH, dtype=torch.float64).view(WIDTH, WIDTH).sin()


def low_rank(x: Tensor) -> Tensor:
    """|B A - M|^2 / 2: (B G^-1, G A) is the same product for every invertible G."""
    b, a = x[: WIDTH * RANK].view(WIDTH, RANK), x[WIDTH * RANK :].view(RANK, WIDTH)
    return (b @ a - TARGET).square().sum() / 2


def test_a_singular_hessian_is_no_trouble() -> None:
    """At its minimum a LoRA's Hessian has rank^2 zero eigenvalues for each matrix, so that Newton's step
    is not defined; the cubic one is, gets there, and stays short.
    """
    generator = torch.Generator().manual_seed(0)
    start_D = torch.randn(2 * WIDTH * RANK, generator=generator, dtype=torch.float64)
    found = cure_newton(low_rank, start_D, 60, Settings(solver="dense", weight=1.0, epsilon=1e-9))
    best = float(torch.linalg.svdvals(TARGET)[RANK:].square().sum()) / 2
    assert float(low_rank(found.point_D)) == pytest.approx(best, abs=1e-8)
    local = _AtPoint(_Function(low_rank, found.point_D))
    space = dense(local.product, local.gradient_D)
    values = np.linalg.eigvalsh(space.hessian)
    assert (np.abs(values) < 1e-4).sum() == RANK**2 and values[0] > -1e-4
    noise = np.random.default_rng(0).normal(size=len(values)) * 1e-3  # a mini-batch's gradient
    newton = damped_newton(spectrum_of(space.hessian), noise, 1e-12)
    space.gradient = noise
    assert np.linalg.norm(newton) > 100 * float(space.move(1.0).delta_D.norm())
    assert float(space.move(1.0).delta_D.norm()) < 0.1


def test_a_function_without_curvature() -> None:
    found = cure_newton(lambda x: (x * double(1.0, 2.0)).sum(), double(0.0, 0.0), 2)
    assert found.history[0]["change"] < 0 and bool(found.point_D.isfinite().all())


@pytest.mark.parametrize(
    "wrong",
    [{"solver": "magic"}, {"weight": 0.0}, {"inner": 0}, {"rate": -1.0}, {"sigma": -1.0}, {"epsilon": -1.0}],
)  # fmt: skip
def test_mistakes_are_told(wrong: dict) -> None:
    with pytest.raises(UserError):
        Settings(**wrong)
