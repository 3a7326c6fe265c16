"""The cubic sub-problem where the Hessian's eigenvectors are known: the secular equation, solved surely.

m(x) = c.x + x.H x / 2 + (L / 6) |x|^3 is least where (H + g I) x = -c with g = (L / 2) |x| and H + g I has no
negative eigenvalue (arXiv 2406.14507; g is the damping that Newton's method would have to be given).
Everything here is small and in double precision.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

HALVINGS = 200

Floats = NDArray[np.float64]


class Minimum(NamedTuple):
    """Where the cubic model is least.

    Attributes:
        point: (N,), in the basis that was given.
        value: of the model there; 0 or less.
        damping: what was added to every eigenvalue.
        lowest: the least eigenvalue.
    """

    point: Floats
    value: float
    damping: float
    lowest: float


class Spectrum(NamedTuple):
    """A symmetric matrix by its eigenvalues, (N,), and eigenvectors, the columns of (N, N)."""

    values: Floats
    vectors: Floats


def spectrum_of(hessian: Floats) -> Spectrum:
    """What every question about a Hessian is answered from; the one step that takes N^3.

    Raises:
        FloatingPointError: it holds something that is no number.
    """
    if not np.isfinite(hessian).all():
        raise FloatingPointError("the Hessian holds something that is no number")
    return Spectrum(*np.linalg.eigh((hessian + hessian.T) / 2))


def minimise_cubic(spectrum: Spectrum, gradient: Floats, weight: float) -> Minimum:
    """The global minimum of the cubic model.

    The damping is found by halving an interval: there is always one sign change, and neither a
    positive definite Hessian (damping 0 is no bound to divide by) nor the hard case (the gradient
    has no part along the lowest eigenvector, so that some of that vector has to be added) is
    special to it.

    Args:
        spectrum: of the Hessian, which may have any signature.
        gradient: (N,).
        weight: the cubic weight L, above 0.

    Raises:
        ValueError: the weight is not above 0.
        FloatingPointError: the gradient holds something that is no number.
    """
    if not weight > 0:
        raise ValueError(f"the cubic weight must be above 0, got {weight}")
    if not np.isfinite(gradient).all():
        raise FloatingPointError("the gradient holds something that is no number")
    values, vectors = spectrum
    along = vectors.T @ gradient
    floor = max(-values[0], 0.0)
    lifted = values + floor  # none is negative, and the lowest is exactly 0 where floor is above 0
    extra = _root(lifted, along, floor, weight)
    solved = _divided(along, lifted + extra)
    damping = floor + extra
    missing = (2 * damping / weight) ** 2 - solved @ solved
    if floor > 0 and missing > 1e-12 * max(solved @ solved, (2 * damping / weight) ** 2):
        # Hard case. Both signs are as good; the gradient says which one, if it says anything.
        solved[0] = -np.copysign(np.sqrt(missing + solved[0] ** 2), along[0])
    value = along @ solved + solved @ (values * solved) / 2
    value += weight / 6 * np.linalg.norm(solved) ** 3
    return Minimum(vectors @ solved, float(value), float(damping), float(values[0]))


def _root(lifted: Floats, along: Floats, floor: float, weight: float) -> float:
    """How far above `floor` the damping is where |x| = 2 damping / weight."""

    def is_long(extra: float) -> bool:
        length = float(np.linalg.norm(_divided(along, lifted + extra)))
        return length > 2 * (floor + extra) / weight

    # Beyond this |x| <= |c| / extra is short enough.
    low, high = 0.0, float(np.sqrt(weight * np.linalg.norm(along) / 2))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_long(middle) else (low, middle)
    return high


def _divided(along: Floats, shifted: Floats) -> Floats:
    """-along / shifted; 0 where there is nothing to divide."""
    with np.errstate(over="ignore"):
        return -np.divide(along, shifted, out=np.zeros_like(along), where=shifted > 0)


def damped_newton(spectrum: Spectrum, gradient: Floats, damping: float) -> Floats:
    """-(H + damping I)^+ gradient, with eigenvalues that rounding cannot tell from 0 left out.

    The baseline: how long it is, and whether it leads down at all, depends on the damping alone.
    """
    values, vectors = spectrum
    shifted = values + damping
    is_there = np.abs(shifted) > np.abs(values).max(initial=0.0) * len(values) * np.finfo(float).eps
    along = vectors.T @ gradient
    return -(vectors @ np.divide(along, shifted, out=np.zeros_like(along), where=is_there))
