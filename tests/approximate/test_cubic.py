"""The cubic sub-problem: the dense solution, the solvers that see products alone, the baseline."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from llm_unlearn.approximate.cubic import damped_newton, minimise_cubic, spectrum_of
from llm_unlearn.approximate.subproblem import (
    LARGEST_DENSE,
    Descent,
    Projected,
    dense,
    lanczos,
    start_vector,
)
from llm_unlearn.errors import UserError


def problem(seed: int, size: int = 12) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    half = generator.normal(size=(size, size))
    return (half + half.T) / 2, generator.normal(size=size)


def value(hessian: np.ndarray, gradient: np.ndarray, weight: float, point: np.ndarray) -> float:
    cubic = weight / 6 * np.linalg.norm(point) ** 3
    return float(gradient @ point + point @ hessian @ point / 2 + cubic)


def products(hessian: np.ndarray):
    matrix = torch.from_numpy(hessian)
    return lambda vector_D: matrix @ vector_D


def optimal(hessian: np.ndarray, gradient: np.ndarray, weight: float, point: np.ndarray) -> None:
    """The conditions that are necessary and sufficient for a global minimum (Nesterov and Polyak)."""
    damping = weight / 2 * np.linalg.norm(point)
    scale = np.linalg.norm(gradient) + np.linalg.norm(hessian) + 1e-9
    assert np.allclose(hessian @ point + damping * point, -gradient, atol=1e-7 * scale)
    assert np.linalg.eigvalsh(hessian)[0] + damping >= -1e-7 * scale


@given(seed=st.integers(0, 1000), weight=st.sampled_from([1e-3, 0.1, 1.0, 50.0, 1e4]))
@settings(max_examples=60, deadline=None)
def test_the_minimum_is_global(seed: int, weight: float) -> None:
    hessian, gradient = problem(seed, size=2 + seed % 9)
    found = minimise_cubic(spectrum_of(hessian), gradient, weight)
    optimal(hessian, gradient, weight, found.point)
    assert found.value == pytest.approx(value(hessian, gradient, weight, found.point), rel=1e-9)
    assert found.damping == pytest.approx(weight / 2 * np.linalg.norm(found.point), rel=1e-6)
    assert found.value < 0


def test_no_start_of_a_local_search_is_lower() -> None:
    hessian, gradient = problem(3, size=4)
    found = minimise_cubic(spectrum_of(hessian), gradient, 2.0)
    generator = np.random.default_rng(0)
    searched = min(
        minimize(lambda x: value(hessian, gradient, 2.0, x), generator.normal(size=4) * 3).fun
        for _ in range(20)
    )
    assert found.value == pytest.approx(searched, abs=1e-8) and found.value <= searched + 1e-9


def test_a_positive_definite_hessian_is_no_special_case() -> None:
    """Damping 0 is where the interval begins; other code divides by it."""
    hessian, gradient = np.diag([1.0, 4.0]), np.array([1e-9, 0.0])
    found = minimise_cubic(spectrum_of(hessian), gradient, 1.0)
    assert found.point == pytest.approx([-1e-9, 0.0], rel=1e-6) and 0 <= found.damping < 1e-9
    far = minimise_cubic(spectrum_of(hessian), np.array([3.0, 1.0]), 1.0)
    optimal(hessian, np.array([3.0, 1.0]), 1.0, far.point)


@pytest.mark.parametrize("along", [0.0, 1e-18, -1e-18, 1e-12])
def test_the_hard_case(along: float) -> None:
    """The gradient has no part along the lowest eigenvector: a part of that vector has to be added."""
    hessian, gradient = np.diag([-2.0, 1.0, 3.0]), np.array([along, 0.1, 0.2])
    found = minimise_cubic(spectrum_of(hessian), gradient, 1.0)
    assert np.linalg.norm(found.point) == pytest.approx(4.0, rel=1e-6)  # 2 * 2 / L
    assert found.point[1:] == pytest.approx([-0.1 / 3, -0.2 / 5], rel=1e-6)
    optimal(hessian, gradient, 1.0, found.point)
    assert found.point[0] * along <= 0, "away from the gradient"


def test_a_saddle_is_left_and_a_flat_point_is_not() -> None:
    found = minimise_cubic(spectrum_of(np.diag([-1.0, 2.0])), np.zeros(2), 1.0)
    assert np.abs(found.point) == pytest.approx([2.0, 0.0]) and found.value < 0
    for still in (np.zeros((2, 2)), np.eye(2)):
        assert not minimise_cubic(spectrum_of(still), np.zeros(2), 1.0).point.any()


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        minimise_cubic(spectrum_of(np.eye(2)), np.ones(2), 0.0)
    with pytest.raises(FloatingPointError, match="gradient"):
        minimise_cubic(spectrum_of(np.eye(2)), np.array([np.nan, 1.0]), 1.0)
    with pytest.raises(FloatingPointError, match="Hessian"):
        spectrum_of(np.diag([1.0, np.inf]))


def krylov(hessian: np.ndarray, gradient: np.ndarray, size: int, sigma: float = 0.0) -> Projected:
    gradient_D = torch.from_numpy(gradient)
    start_D = start_vector(gradient_D, sigma, seed=0)
    return lanczos(products(hessian), gradient_D, start_D, size)


@pytest.mark.parametrize("weight", [0.1, 1.0, 100.0])
def test_lanczos_is_the_dense_solution_in_the_end_and_falls_on_the_way(weight: float) -> None:
    hessian, gradient = problem(1)
    best = minimise_cubic(spectrum_of(hessian), gradient, weight)
    values = []
    for size in range(1, 13):
        move = krylov(hessian, gradient, size).move(weight)
        told = value(hessian, gradient, weight, move.delta_D.numpy())
        assert move.predicted == pytest.approx(told, rel=1e-8), (
            "what it promises is the model's value"
        )
        values.append(move.predicted)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values))
    assert values[-1] == pytest.approx(best.value, rel=1e-8)
    assert move.lowest == pytest.approx(best.lowest, abs=1e-8)
    assert move.delta_D.numpy() == pytest.approx(best.point, abs=1e-6)


def test_lanczos_stays_orthogonal_where_the_spectrum_is_spiked() -> None:
    """A few large eigenvalues and hundreds around 0, as trained networks have them; single precision."""
    generator = np.random.default_rng(0)
    turned, _ = np.linalg.qr(generator.normal(size=(400, 400)))
    spectrum = np.concatenate([[1000.0, 300.0, 100.0], generator.normal(size=397) * 1e-3])
    matrix = torch.from_numpy((turned * spectrum) @ turned.T).float()
    gradient_D = torch.from_numpy(generator.normal(size=400)).float()
    found = lanczos(lambda v: matrix @ v, gradient_D, gradient_D, 30)
    basis = torch.stack(found.basis)
    assert len(basis) > 10
    assert (basis @ basis.T - torch.eye(len(basis))).abs().max() < 1e-4


def test_an_invariant_space_ends_it() -> None:
    found = krylov(np.diag([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 1.0, 0.0, 0.0]), 4)
    assert len(found.basis) == 2
    assert found.move(1.0).predicted == pytest.approx(
        minimise_cubic(spectrum_of(np.diag([1.0, 2.0])), np.ones(2), 1.0).value
    )


def test_noise_finds_the_hard_case() -> None:
    """Without it the Krylov space of the gradient never holds the direction that leads down."""
    hessian, gradient = np.diag([-2.0, 1.0, 3.0]), np.array([0.0, 0.1, 0.2])
    blind = krylov(hessian, gradient, 3).move(1.0)
    seeing = krylov(hessian, gradient, 3, sigma=1e-3).move(1.0)
    best = minimise_cubic(spectrum_of(hessian), gradient, 1.0)
    assert blind.predicted > best.value / 100
    assert seeing.predicted == pytest.approx(best.value, rel=1e-6)


def test_dense_and_lanczos_agree_and_large_is_refused() -> None:
    hessian, gradient = problem(5)
    gradient_D = torch.from_numpy(gradient)
    whole = dense(products(hessian), gradient_D)
    assert np.allclose(whole.hessian, hessian)
    assert torch.allclose(whole.move(1.0).delta_D, krylov(hessian, gradient, 12).move(1.0).delta_D)
    with pytest.raises(UserError, match="does not fit"):
        dense(products(hessian), torch.zeros(LARGEST_DENSE + 1))


@pytest.mark.parametrize("rate", [1e-3, 1e-2, 0.1, 100.0])
def test_descent_is_never_worse_than_the_cauchy_point_nor_better_than_the_minimum(
    rate: float,
) -> None:
    hessian, gradient = problem(2)
    gradient_D = torch.from_numpy(gradient)
    cauchy = minimise_cubic(
        spectrum_of((gradient @ hessian @ gradient / (gradient @ gradient)).reshape(1, 1)),
        np.array([np.linalg.norm(gradient)]),
        1.0,
    )
    move = Descent(products(hessian), gradient_D, 20, rate).move(1.0)
    assert move.predicted == pytest.approx(
        value(hessian, gradient, 1.0, move.delta_D.numpy()), rel=1e-9
    )
    assert (
        minimise_cubic(spectrum_of(hessian), gradient, 1.0).value
        <= move.predicted
        <= cauchy.value + 1e-12
    )


@pytest.mark.parametrize("weight", [1e-6, 1e-3])
def test_the_cauchy_point_of_a_steep_bend_under_a_low_weight(weight: float) -> None:
    """R = -b / L + sqrt((b / L)^2 + 2 |g| / L) as it stands is a difference of equal numbers there."""
    gradient_D = torch.tensor([1e-3, 0.0], dtype=torch.float64)
    bend = np.diag([1e6, 1.0])
    move = Descent(products(bend), gradient_D, 1, 1e-9, sigma=0.0).move(weight)
    best = minimise_cubic(spectrum_of(bend), gradient_D.numpy(), weight)
    assert move.predicted == pytest.approx(best.value, rel=1e-6)


def test_another_weight_takes_the_hessian_apart_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian, gradient = problem(4)
    space = dense(products(hessian), torch.from_numpy(gradient))
    moves = [space.move(1.0)]
    monkeypatch.setattr(np.linalg, "eigh", None)  # the cube of the number of parameters
    moves.append(space.move(4.0))
    assert 0 > moves[1].predicted > moves[0].predicted


def test_descent_reaches_the_minimum_with_many_steps() -> None:
    """The cubic term's gradient is (L / 2) |x| x: with another factor it would end elsewhere."""
    hessian, gradient = problem(2, size=5)
    move = Descent(products(hessian), torch.from_numpy(gradient), 4000, 0.02, sigma=0.0).move(3.0)
    best = minimise_cubic(spectrum_of(hessian), gradient, 3.0)
    assert move.predicted == pytest.approx(best.value, rel=1e-6)
    assert move.delta_D.numpy() == pytest.approx(best.point, abs=1e-3)


def test_a_weight_more_costs_lanczos_no_product() -> None:
    hessian, gradient = problem(4)
    asked = []

    def product(vector_D: torch.Tensor) -> torch.Tensor:
        asked.append(1)
        return products(hessian)(vector_D)

    gradient_D = torch.from_numpy(gradient)
    space = lanczos(product, gradient_D, gradient_D, 6)
    lengths = [float(space.move(weight).delta_D.norm()) for weight in (0.1, 1.0, 10.0, 100.0)]
    assert len(asked) == 6 and lengths == sorted(lengths, reverse=True)


def test_damped_newton_by_hand_and_what_it_does_near_a_pole() -> None:
    hessian, gradient = np.diag([2.0, 0.0, -0.1]), np.array([1.0, 1.0, 1.0])
    assert damped_newton(spectrum_of(hessian), gradient, 0.0) == pytest.approx([-0.5, 0.0, 10.0])
    assert damped_newton(spectrum_of(hessian), gradient, 1.0) == pytest.approx(
        [-1 / 3, -1.0, -1 / 0.9]
    )
    exploded = damped_newton(spectrum_of(hessian), gradient, 0.1001)
    assert np.linalg.norm(exploded) > 5000
    assert np.linalg.norm(minimise_cubic(spectrum_of(hessian), gradient, 1.0).point) < 4
    assert not damped_newton(spectrum_of(np.zeros((2, 2))), np.ones(2), 0.0).any()
