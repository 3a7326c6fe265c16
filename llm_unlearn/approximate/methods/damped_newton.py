"""Damped Newton: the step that cubic regularisation is to improve on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import Card, Method, flag
from llm_unlearn.errors import RunError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.curvature import Curvature
    from llm_unlearn.approximate.newton_problem import DrawnLoss
    from llm_unlearn.approximate.session import Session

CHECKS = ("double", "same", "none")
CHECK_FLAG = (
    "hold a Hessian product against differences of gradients: double (precision), same, none"
)


def check_flags(outer_steps: int, inner_steps: int, check: str) -> None:
    """Refuse what no Newton method can work with."""
    if min(outer_steps, inner_steps) < 1:
        raise UserError("--outer_steps and --inner_steps are at least 1")
    if check not in CHECKS:
        raise UserError(f"--check is one of {', '.join(CHECKS)}, got {check!r}")


@dataclass
class DampedNewton(Method):
    """w <- w - (H + damping I)^-1 g, gradient and Hessian of the retain loss."""

    damping: float = flag(0.1, "what is added to every eigenvalue; 0: the pseudo-inverse")
    solver: str = flag("lanczos", "lanczos, or dense (the whole Hessian, to 10,000 parameters)")
    outer_steps: int = flag(1, "steps")
    inner_steps: int = flag(8, "size of the Krylov space")
    gradient_rows: int = flag(32, "rows of gradient and Hessian; 0: all")
    keep_graphs: bool = flag(
        True, "keep first-order graphs; false: less memory, half again the time"
    )
    check: str = flag("double", CHECK_FLAG)

    card = Card(
        title="Damped Newton",
        source="the baseline of arXiv 2406.14507; Guo et al., Certified Data Removal, arXiv 1911.03030",
        idea="Newton steps on the retain loss with a fixed damping, wherever they lead.",
        use_when="As the baseline of scurenewton.",
        fails_when="The right damping is not known, and with a wrong one the step explodes: Hessians of "
        "trained networks have eigenvalues around 0 on both sides, those of a LoRA as many zeros as "
        "the square of its rank for each matrix.",
        differs="In the Krylov space of the gradient, unless --solver dense: that leaves out most small "
        "eigenvalues, so the step is tamer than the paper's baseline.",
    )
    trains = False

    def __post_init__(self) -> None:
        check_flags(self.outer_steps, self.inner_steps, self.check)
        if self.solver not in ("lanczos", "dense"):
            raise UserError(f"--solver is lanczos or dense, got {self.solver!r}")
        if self.damping < 0:
            raise UserError("--damping is 0 or more")

    def finish(self, session: Session) -> None:
        """Take the steps. Every process computes the same."""
        from llm_unlearn.approximate.newton_problem import DrawnLoss, Rows

        rows = Rows(gradient=self.gradient_rows, held_out=0, keep_graphs=self.keep_graphs)
        problem = DrawnLoss(session, rows)
        problem.check(self.check)
        for number in range(self.outer_steps):
            session.history.append({"step": number + 1, **self._step(problem, number)})
            if session.on_step is not None:
                session.on_step(number + 1, self.outer_steps)

    def _step(self, problem: DrawnLoss, number: int) -> dict[str, float]:
        local, start_D = problem.local(number), problem.weights()
        delta_D = self._delta(local)
        problem.put(start_D + delta_D)
        after = local.present_loss()
        if not (math.isfinite(after) and bool(delta_D.isfinite().all())):
            raise RunError(
                f"after step {number + 1} the loss was no number: nothing was written; raise --damping"
            )
        return {
            "loss": local.loss,
            "change": after - local.loss,
            "step_norm": float(delta_D.norm()),
            "products": local.products,
        }

    def _delta(self, local: Curvature) -> Tensor:
        from llm_unlearn.approximate.subproblem import dense, lanczos, start_vector

        try:
            if self.solver == "dense":
                space = dense(local.product, local.gradient_D)
            else:
                start_D = start_vector(local.gradient_D, 0.0, 0)
                space = lanczos(local.product, local.gradient_D, start_D, self.inner_steps)
            return space.newton(self.damping)
        except FloatingPointError:
            raise RunError(
                "the loss's gradient or curvature is no number: nothing was written"
            ) from None
