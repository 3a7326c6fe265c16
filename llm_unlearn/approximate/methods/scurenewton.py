"""SCureNewton and CureNewton: cubic-regularised Newton steps on what is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import Card, Method, flag, flags
from llm_unlearn.approximate.methods.damped_newton import CHECK_FLAG, check_flags
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.cubic_newton import CubicNewton, Settings
    from llm_unlearn.approximate.newton_problem import NewtonProblem, Rows, Standing
    from llm_unlearn.approximate.session import Session

GAIN = 1e-3  # nats a token: less forgetting than that is none


def what_was_gained(start: Standing, end: Standing, level: float | None) -> float:
    """How much closer the forget set's loss is to that of unseen rows, in nats a token; where that
    is not known, how much it has risen.
    """
    if level is None:
        return end.forget - start.forget
    return abs(start.forget - level) - abs(end.forget - level)


@dataclass
class SCureNewton(Method):
    """w <- w + argmin g.x + x.H x / 2 + (L / 6) |x|^3, of L = NLL(retain) - lambda NLL(forget)."""

    solver: str = flag("lanczos", "lanczos, gd (the paper's descent) or dense (the whole Hessian)")
    outer_steps: int = flag(10, "steps at most; each has one gradient")
    inner_steps: int = flag(
        8, "Hessian products of a step: size of the Krylov space, or of descent"
    )
    cubic_weight: float = flag(10.0, "the paper's L: where it begins, or all the time")
    adaptive: bool = flag(
        True, "change L by the ratio of true to promised change; false: the paper"
    )
    forget_weight: float = flag(0.0, "lambda: weight of the forget set's loss, which is to rise")
    unseen: str = flag("", "file of rows that the model never saw: forgetting ends at their loss")
    gradient_rows: int = flag(32, "rows of a gradient and of the ratio test; 0: all")
    curvature_rows: int = flag(0, "rows of the Hessian, drawn on their own; 0: the gradient's")
    held_out: int = flag(16, "retain rows that no step sees, a fifth at most; they must not suffer")
    most_rise: float = flag(0.01, "by how much their loss may rise, for each nat (1 at least)")
    longest_step: float = flag(0.02, "in parts of the norm of what is trained; 0: any length")
    epsilon: float = flag(1e-4, "gradient norm at which a point is stationary")
    sigma: float = flag(1e-3, "noise against the hard case, in parts of the gradient")
    keep_graphs: bool = flag(
        True, "keep first-order graphs; false: less memory, half again the time"
    )
    check: str = flag("double", CHECK_FLAG)
    return_noop: bool = flag(True, "give the model back as it was where nothing was forgotten")

    card = Card(
        title="SCureNewton, cubic-regularised Newton",
        source="Cubic-regularised Newton unlearning, arXiv 2406.14507",
        idea="Approaches the minimum of the retain loss by Newton steps whose damping the cubic term "
        "chooses, so that a degenerate Hessian (a LoRA's always is) cannot make them explode. The "
        "Hessian is seen through products alone; with --solver dense it is CureNewton, for up to "
        "10,000 parameters (--trainable).",
        use_when="A Newton step is wanted that needs no damping by hand; with --forget_weight as a "
        "second-order gradient difference.",
        fails_when="Without --forget_weight the forget set is in no formula: what the retain data does "
        "not contradict stays, and the model is given back as it was. A fixed L fails both ways: "
        "too high and nothing moves, too low and utility goes. Eager attention and kept graphs take "
        "more memory than training does.",
        differs="The paper's sub-solver is --solver gd --adaptive false; ours is a Krylov space, where "
        "the sub-problem is solved exactly, with L adapted by the ratio test on the same rows. The cubic "
        "term's gradient is (L / 2) |x| x; losses are means over tokens, so the paper's L does not carry "
        "over. --learning_rate is the descent's step size, and its best point is kept. The forget term, "
        "the held-out rows and the comparison with doing nothing are ours.",
    )
    preset = flags(learning_rate=1e-3)
    trains = False

    def __post_init__(self) -> None:
        check_flags(self.outer_steps, self.inner_steps, self.check)
        if self.solver not in ("lanczos", "gd", "dense"):
            raise UserError(f"--solver is lanczos, gd or dense, got {self.solver!r}")
        if not self.cubic_weight > 0:
            raise UserError("--cubic_weight is above 0")
        if self.longest_step < 0 or self.sigma < 0 or self.epsilon < 0:
            raise UserError("--longest_step, --sigma and --epsilon are 0 or more")

    def finish(self, session: Session) -> None:
        """Take the steps. Every process computes the same."""
        from llm_unlearn.approximate.cubic_newton import CubicNewton
        from llm_unlearn.approximate.newton_problem import NewtonProblem, unseen_level
        from llm_unlearn.approximate.newton_state import take_up_state

        problem = NewtonProblem(session, self._rows())
        problem.check(self.check)
        if self.unseen or self.forget_weight:
            problem.level = unseen_level(problem, self.unseen)
        start_D = problem.weights()
        newton = CubicNewton(problem, self._settings(session, start_D))
        stopped = take_up_state(problem, newton)
        stopped = self._take_steps(problem, newton, stopped)
        session.history = newton.history
        session.notes.append(f"ended after {len(newton.history)} steps: {stopped}")
        self._compare(problem, start_D)

    def _rows(self) -> Rows:
        from llm_unlearn.approximate.newton_problem import Rows

        return Rows(
            self.gradient_rows, self.curvature_rows, self.held_out, self.forget_weight,
            self.most_rise, self.keep_graphs,
        )  # fmt: skip

    def _settings(self, session: Session, start_D: Tensor) -> Settings:
        from llm_unlearn.approximate.cubic_newton import Settings

        return Settings(
            solver=self.solver, weight=self.cubic_weight, adaptive=self.adaptive, inner=self.inner_steps,
            rate=session.config.learning_rate, sigma=self.sigma, epsilon=self.epsilon,
            longest=self.longest_step * float(start_D.norm()) or math.inf, seed=session.config.seed,
        )  # fmt: skip

    def _take_steps(self, problem: NewtonProblem, newton: CubicNewton, stopped: str) -> str:
        """Until something says stop; what each step came to is kept beside what it did."""
        from llm_unlearn.approximate.newton_state import keep_state

        session = problem.session
        while not stopped and len(newton.history) < self.outer_steps:
            before = len(newton.history)
            stopped = newton.step()
            if len(newton.history) > before:
                now = problem.standing()
                newton.history[-1] |= {"forget_loss": now.forget, "held_out_loss": now.held_out}
            if not stopped and problem.is_forgotten():
                stopped = "forget rows are as likely as unseen ones"
            keep_state(problem, newton, stopped)
            if session.on_step is not None:
                session.on_step(len(newton.history), self.outer_steps)
        return stopped or "all steps were taken"

    def _compare(self, problem: NewtonProblem, start_D: Tensor) -> None:
        """Hold the result against doing nothing."""
        end = problem.standing()
        gained = what_was_gained(problem.start, end, problem.level)
        told = f"forget loss {problem.start.forget:.3f} to {end.forget:.3f} nats a token"
        if gained > GAIN:
            problem.session.notes.append(told)
        elif self.return_noop:
            problem.put(start_D)
            problem.session.notes.append(
                f"nothing was forgotten ({told}): the model is given back as it was; try --forget_weight"
            )
        else:
            problem.session.notes.append(f"nothing was forgotten ({told})")
