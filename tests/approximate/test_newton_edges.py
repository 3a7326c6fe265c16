"""Newton's methods where there is next to nothing: no number, no gradient, no rows, no memory."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from llm_unlearn.approximate import curvature
from llm_unlearn.approximate.cubic_newton import NO_NUMBER, CubicNewton, Settings, cure_newton
from llm_unlearn.approximate.curvature import Curvature
from llm_unlearn.approximate.newton_problem import DrawnLoss, NewtonProblem, Rows
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.data.encoding import Example
from llm_unlearn.data.records import make_records
from llm_unlearn.errors import RunError, UserError
from tests.approximate.known import LORA, arguments, forget_and_retain, knowing_model
from tests.approximate.test_scurenewton import WEIGHTS, problem_of
from tests.tiny import make_tiny_tokenizer

METHODS = ("scurenewton", "damped_newton")


def run(output: Path, name: str, model: Any, flags: Any = None, sets: Any = None, **options: Any):
    forget, retain = sets or forget_and_retain()
    config = arguments(output, name, per_device_train_batch_size=16, **options)
    method = make_method(name, flags)
    return unlearn(model, make_tiny_tokenizer(), forget, retain, config, method, LORA)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_whose_loss_is_no_number_is_told_in_a_line(name: str, tmp_path: Path) -> None:
    model = knowing_model()
    model.lm_head.weight.data[0] = math.nan
    with pytest.raises(RunError, match=r"no number.*nothing was written"):
        run(tmp_path, name, model, {"check": "none"})
    assert not (tmp_path / WEIGHTS).exists()


@pytest.mark.parametrize("solver", ["lanczos", "gd", "dense"])
@pytest.mark.parametrize("what", ["gradient_D", "product"])
def test_what_is_no_number_on_the_way_ends_it_where_it_was(
    what: str, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_unlearn.approximate import cubic_newton

    class Overflowing(cubic_newton._AtPoint):
        def __init__(self, problem: Any):
            super().__init__(problem)
            if what == "gradient_D" and float(problem.point_D[0]) != 1.0:
                self.gradient_D = self.gradient_D * math.inf

        def product(self, vector_D: torch.Tensor) -> torch.Tensor:
            is_start = what != "product" or float(self.problem.point_D[0]) == 1.0
            return super().product(vector_D) * (1.0 if is_start else math.nan)

    monkeypatch.setattr(cubic_newton, "_AtPoint", Overflowing)
    start_D = torch.tensor([1.0, 2.0], dtype=torch.float64)
    settings = Settings(solver=solver, rate=0.01)
    found = cure_newton(lambda x: x.square().sum(), start_D, 5, settings)
    assert found.stopped == NO_NUMBER and len(found.history) == 1
    assert bool(found.point_D.isfinite().all()) and found.history[0]["change"] < 0


def test_forget_or_held_out_rows_whose_loss_is_no_number_refuse_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is greater than what is no number, so no limit would be passed."""
    problem = problem_of(tmp_path)
    problem.level = problem.start.forget + 1.0
    assert problem.objection() == ""
    monkeypatch.setattr("llm_unlearn.approximate.newton_problem.total_loss", lambda *_: math.nan)
    problem.put(problem.weights())
    assert "no number" in problem.objection() and not problem.is_forgotten()
    start_D = problem.weights()
    newton = CubicNewton(problem, Settings(inner=2))
    assert "no number" in newton.step()
    assert torch.equal(problem.weights(), start_D)


@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_that_is_zero_moves_nothing(name: str, tmp_path: Path) -> None:
    """A LoRA whose B is 0 does not depend on A: no gradient, no curvature, and no error of a product."""
    model = get_peft_model(knowing_model(), copy.deepcopy(LORA))
    report = run(tmp_path, name, model, trainable="lora_A")
    if name == "scurenewton":
        assert report.notes[0] == "ended after 0 steps: stationary" and not report.history
    else:
        assert report.history[0]["step_norm"] == 0.0 == report.history[0]["change"]


@pytest.mark.parametrize("name", METHODS)
def test_one_row_of_each(name: str, tmp_path: Path) -> None:
    """Fewer rows than a gradient takes, and none to hold out."""
    forget, retain = forget_and_retain()
    report = run(tmp_path, name, knowing_model(), {"outer_steps": 1}, (forget[:1], retain[:1]))
    assert (report.forget_records, report.retain_records) == (1, 1)
    assert (tmp_path / WEIGHTS).exists()


def test_rows_that_are_all_cut(tmp_path: Path) -> None:
    forget, retain = (
        make_records([{"text": r.content["prompt"] + r.content["completion"]} for r in records])
        for records in forget_and_retain()
    )
    flags = {"outer_steps": 1}
    report = run(tmp_path, "scurenewton", knowing_model(), flags, (forget, retain), max_length=3)
    assert "16 of 16 records are longer" in " ".join(report.notes)
    with pytest.raises(UserError, match="no token left to learn"):  # nothing but prompts is left
        run(tmp_path / "b", "scurenewton", knowing_model(), flags, max_length=3)


def test_a_row_of_one_token_is_not_what_products_are_checked_on(tmp_path: Path) -> None:
    problem = problem_of(tmp_path)
    short = Example("short", [5], [5], False)
    sides = problem.session.sides
    sides["retain"] = [short, *sides["retain"]]
    assert 0 < problem.check("same") < 1e-2
    sides["retain"] = [short]
    assert NewtonProblem(problem.session, Rows()).check("same") == 0.0


def test_memory_that_runs_out_is_not_called_another_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(tmp_path)

    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Curvature, "product", full)
    with pytest.raises(torch.OutOfMemoryError):
        problem.check("same")


def test_damped_newton_looks_at_no_row_that_it_does_not_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(tmp_path)
    seen = []
    original = curvature.loss_of
    monkeypatch.setattr(curvature, "loss_of", lambda m, p: (seen.append(p), original(m, p))[1])
    loss = DrawnLoss(problem.session, Rows(gradient=4, held_out=0))
    loss.local(0)
    assert sum(len(part.batch["input_ids"]) for part in seen) == 4


def test_a_damped_step_that_ruins_the_model_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Curvature, "present_loss", lambda self: math.nan)
    with pytest.raises(RunError, match="after step 1 the loss was no number"):
        run(tmp_path, "damped_newton", knowing_model())
    assert not (tmp_path / WEIGHTS).exists()


def test_the_standing_of_weights_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(tmp_path)
    first = problem.standing()
    monkeypatch.setattr("llm_unlearn.approximate.newton_problem.total_loss", lambda *_: 9.0)
    assert problem.standing() == first
    problem.put(problem.weights())
    assert problem.standing().forget == 9.0
