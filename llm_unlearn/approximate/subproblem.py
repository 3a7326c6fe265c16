"""Solvers of the cubic sub-problem that see the Hessian only through its products with vectors.

Each is made once for a point and then asked for a step under any cubic weight, so a step that is refused
costs nothing but another question (descent starts again). Vectors are flat, (D,).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llm_unlearn.approximate.cubic import Spectrum, damped_newton, minimise_cubic, spectrum_of
from llm_unlearn.errors import UserError

Product = Callable[[Tensor], Tensor]
LARGEST_DENSE = 10_000  # parameters: the Hessian takes 800 MB in double precision, and a minute
SMALLEST = 1e-6  # of a vector's length: what single precision leaves of a vector that is not there


@dataclass(frozen=True)
class Move:
    """A step, with what the model says about it.

    Attributes:
        delta_D: the step.
        predicted: m(delta), of which the true change must not fall too short.
        lowest: the lowest eigenvalue that was seen (None: none was looked for).
    """

    delta_D: Tensor
    predicted: float
    lowest: float | None = None


class Solver(Protocol):
    def move(self, weight: float) -> Move:
        """The step under a cubic weight.

        Raises:
            FloatingPointError: the gradient or a product is no number.
        """
        ...


def unit_noise(like_D: Tensor, seed: int) -> Tensor:
    """A direction that depends on the seed alone, whatever the device, (D,)."""
    generator = torch.Generator().manual_seed(seed)
    noise_D = torch.randn(like_D.shape, generator=generator).to(like_D)
    return noise_D / noise_D.norm()


def start_vector(gradient_D: Tensor, sigma: float, seed: int) -> Tensor:
    """The gradient with a little noise, in parts of its own length, (D,); noise alone where it is 0.

    Without it a gradient that has no part along the lowest eigenvector (the hard case) would never
    find that vector.
    """
    length = float(gradient_D.norm())
    if length == 0.0:
        return (sigma or 1.0) * unit_noise(gradient_D, seed)
    return gradient_D + sigma * length * unit_noise(gradient_D, seed)


@dataclass
class Projected:
    """The sub-problem on an orthonormal basis: exact there.

    Attributes:
        basis: K vectors (D,); none: the basis of the parameters themselves.
        hessian: (K, K), Q^T H Q.
        gradient: (K,), Q^T g.
    """

    basis: list[Tensor]
    hessian: np.ndarray
    gradient: np.ndarray
    like_D: Tensor

    @cached_property
    def spectrum(self) -> Spectrum:
        """Taken apart once: a step that is refused asks again under another weight."""
        return spectrum_of(self.hessian)

    def move(self, weight: float) -> Move:
        found = minimise_cubic(self.spectrum, self.gradient, weight)
        return Move(self._back(found.point), found.value, found.lowest)

    def newton(self, damping: float) -> Tensor:
        """Damped Newton's step, (D,): the baseline."""
        return self._back(damped_newton(self.spectrum, self.gradient, damping))

    def _back(self, point: np.ndarray) -> Tensor:
        if not self.basis:
            return torch.from_numpy(point).to(self.like_D)
        total_D = torch.zeros_like(self.like_D)
        for vector_D, share in zip(self.basis, point, strict=True):
            total_D.add_(vector_D, alpha=float(share))
        return total_D


def lanczos(product: Product, gradient_D: Tensor, start_D: Tensor, size: int) -> Projected:
    """The Krylov space of `size` products from a start, with full reorthogonalisation.

    It holds `size` vectors of the parameters' number. An invariant space ends it early. Source:
    Cartis, Gould and Toint (2011), sections 6.1 and 6.2.
    """
    basis: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []
    vector_D = start_D / start_D.norm()
    for _ in range(min(size, len(gradient_D))):
        basis.append(vector_D)
        image_D = product(vector_D)
        diagonal.append(float(image_D @ vector_D))
        scale = float(image_D.norm())
        for _ in range(2):  # once loses orthogonality to rounding
            for other_D in basis:
                image_D = image_D - (image_D @ other_D) * other_D
        rest = float(image_D.norm())
        if not rest > SMALLEST * scale:
            break
        beside.append(rest)
        vector_D = image_D / rest
    off = beside[: len(basis) - 1]
    hessian = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    along = np.array([float(gradient_D @ vector_D) for vector_D in basis])
    return Projected(basis, hessian, along, gradient_D)


def dense(product: Product, gradient_D: Tensor) -> Projected:
    """The whole Hessian, a product for each parameter: CureNewton as the paper has it.

    Raises:
        UserError: more than `LARGEST_DENSE` parameters.
    """
    count = len(gradient_D)
    if count > LARGEST_DENSE:
        raise UserError(
            f"the whole Hessian of {count:,} parameters does not fit: use --solver lanczos, or choose at "
            f"most {LARGEST_DENSE:,} with --trainable and --lora_r"
        )
    hessian = np.empty((count, count))
    for number in range(count):
        unit_D = torch.zeros_like(gradient_D)
        unit_D[number] = 1.0
        hessian[number] = product(unit_D).cpu().numpy()
    return Projected([], hessian, gradient_D.double().cpu().numpy(), gradient_D)


@dataclass
class Descent:
    """The paper's sub-solver: the Cauchy point, then gradient descent on the model.

    The gradient is perturbed as in `start_vector`. Every point's model value is known one product
    later, and the best of them is the step, so that a rate which is too high cannot do worse than
    the Cauchy point.

    Args:
        steps, rate: T_inner and eta.
    """

    product: Product
    gradient_D: Tensor
    steps: int
    rate: float
    sigma: float = 1e-3
    seed: int = 0
    _curved_D: Tensor | None = field(default=None, init=False)  # H g, the same for every weight

    def move(self, weight: float) -> Move:
        tilted_D = start_vector(self.gradient_D, self.sigma, self.seed)
        delta_D, image_D = self._cauchy(weight)
        best = Move(delta_D, self._value(delta_D, image_D, weight))
        if not np.isfinite(best.predicted):
            raise FloatingPointError("the gradient or its product is no number")
        for _ in range(self.steps):
            slope_D = tilted_D + image_D + weight / 2 * delta_D.norm() * delta_D
            delta_D = delta_D - self.rate * slope_D
            image_D = self.product(delta_D)
            value = self._value(delta_D, image_D, weight)
            if value < best.predicted:
                best = Move(delta_D, value)
        return best

    def _cauchy(self, weight: float) -> tuple[Tensor, Tensor]:
        """The model's least point along -gradient, and the Hessian's product with it."""
        length = float(self.gradient_D.norm())
        if length == 0.0:
            return torch.zeros_like(self.gradient_D), torch.zeros_like(self.gradient_D)
        if self._curved_D is None:
            self._curved_D = self.product(self.gradient_D)
        bend = float(self.gradient_D @ self._curved_D) / length**2 / weight
        root = np.sqrt(bend**2 + 2 * length / weight)
        # Two forms of the same: a difference of nearly equal numbers would leave rounding alone.
        far = 2 / weight / (root + bend) if bend > 0 else (root - bend) / length
        return -far * self.gradient_D, -far * self._curved_D

    def _value(self, delta_D: Tensor, image_D: Tensor, weight: float) -> float:
        linear, curved = self.gradient_D @ delta_D, delta_D @ image_D / 2
        value = float(linear + curved + weight / 6 * delta_D.norm() ** 3)
        return value if np.isfinite(value) else np.inf
