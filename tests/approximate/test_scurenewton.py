"""SCureNewton on a language model: what it forgets, what it refuses, where it stops, that it goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from llm_unlearn.approximate import newton_problem
from llm_unlearn.approximate.claim import STEPS_NAME
from llm_unlearn.approximate.cubic_newton import CubicNewton
from llm_unlearn.approximate.curvature import loss_of
from llm_unlearn.approximate.methods.scurenewton import SCureNewton, what_was_gained
from llm_unlearn.approximate.newton_problem import NewtonProblem, Rows, Standing
from llm_unlearn.approximate.session import Session
from llm_unlearn.approximate.subproblem import unit_noise
from llm_unlearn.approximate.tuning import tune
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.errors import RunError, UserError
from tests.approximate.known import LORA, arguments, forget_and_retain, knowing_model
from tests.tiny import make_tiny_tokenizer

UNSEEN = str(Path(__file__).with_name("unseen.jsonl"))
FORGETTING = {
    "forget_weight": 0.3, "unseen": UNSEEN, "most_rise": 0.5, "outer_steps": 6, "inner_steps": 4,
}  # fmt: skip
WEIGHTS = "adapter_model.safetensors"


def run(
    output: Path,
    name: str = "scurenewton",
    lora: LoraConfig = LORA,
    flags: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """The report of a request, as it was written."""
    forget, retain = forget_and_retain()
    options = {"per_device_train_batch_size": 16, **options}  # one graph a side: quick
    config = arguments(output, name, **options)
    method = make_method(name, flags)
    unlearn(knowing_model(), make_tiny_tokenizer(), forget, retain, config, method, lora)
    return json.loads((output / "unlearning.json").read_bytes())


def problem_of(tmp_path: Path, rows: Rows | None = None) -> NewtonProblem:
    forget, retain = forget_and_retain()
    tuned = tune(knowing_model(), LORA, False, None, 0)
    config = arguments(tmp_path, "scurenewton")
    session = Session(tuned, make_tiny_tokenizer(), forget, retain, config, tmp_path)
    session.sides = {"forget": session.encode(forget), "retain": session.encode(retain)}
    return NewtonProblem(session, rows or Rows())


def test_it_forgets_keeps_and_tells(tmp_path: Path) -> None:
    report = run(tmp_path, flags=FORGETTING)
    steps = report["history"]
    assert report["steps"] == len(steps) > 2
    assert steps[-1]["forget_loss"] > steps[0]["forget_loss"] + 0.3
    assert steps[-1]["held_out_loss"] < 0.7
    for one in steps:
        assert one["products"] == 4 and one["change"] <= 0.1 * one["predicted"] <= 0
    ended, told = report["notes"]
    assert ended.startswith(f"ended after {len(steps)} steps: ") and "forget loss" in told
    assert not (tmp_path / "checkpoints").exists()


def test_equal_seeds_equal_bits_and_other_seeds_other_rows(tmp_path: Path) -> None:
    flags = {**FORGETTING, "outer_steps": 2, "gradient_rows": 4, "curvature_rows": 2}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, flags=flags, seed=seed)
    a, b, c = ((tmp_path / name / WEIGHTS).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("broken_at", [0, 1, 3])
def test_an_interrupted_run_goes_on_with_the_same_bits(
    broken_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", flags=FORGETTING, save_strategy="epoch")
    original, taken = CubicNewton.step, []

    def break_off(self: CubicNewton) -> str:
        if len(taken) == broken_at:
            raise KeyboardInterrupt
        taken.append(1)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(CubicNewton, "step", break_off)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", flags=FORGETTING, save_strategy="epoch")
    state = tmp_path / "parts" / "checkpoints" / STEPS_NAME
    assert state.exists() is (broken_at > 0)
    if state.exists():
        with pytest.raises(UserError, match="another request that was interrupted"):
            run(tmp_path / "parts", flags={**FORGETTING, "inner_steps": 3}, save_strategy="epoch")
    monkeypatch.setattr(CubicNewton, "step", lambda self: (taken.append(1), original(self))[1])
    again = run(tmp_path / "parts", flags=FORGETTING, save_strategy="epoch")
    assert len(taken) == len(whole["history"]), "nothing was done twice"
    assert again["history"] == whole["history"]
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (
        tmp_path / "whole" / WEIGHTS
    ).read_bytes()


def test_the_model_comes_back_where_nothing_was_forgotten(tmp_path: Path) -> None:
    """A step along retain rows that are known by heart forgets nothing: the weights are the old ones."""
    flags = {"outer_steps": 1, "inner_steps": 1, "cubic_weight": 1e4, "epsilon": 0.0}
    report = run(tmp_path / "noop", flags=flags)
    assert "given back as it was" in report["notes"][-1]
    after = load_file(tmp_path / "noop" / WEIGHTS)
    assert all(not t.any() for name, t in after.items() if "lora_B" in name), (
        "a fresh LoRA is nothing"
    )
    kept = run(tmp_path / "kept", flags={**flags, "return_noop": False})
    assert "nothing was forgotten" in kept["notes"][-1] and kept["history"][0]["step_norm"] > 0
    moved = load_file(tmp_path / "kept" / WEIGHTS)
    assert any(t.any() for name, t in moved.items() if "lora_B" in name)


def test_what_counts_as_gained() -> None:
    start, risen, past = Standing(0.1, 0.0), Standing(0.6, 0.0), Standing(3.0, 0.0)
    assert what_was_gained(start, risen, None) == pytest.approx(0.5)
    assert what_was_gained(start, risen, 1.0) == pytest.approx(0.5)
    assert what_was_gained(start, past, 1.0) == pytest.approx(0.9 - 2.0), "too much is no gain"


def test_forgetting_ends_at_the_loss_of_unseen_rows(tmp_path: Path) -> None:
    """Neither before it nor far beyond it, with a weight that would go on for ever."""
    flags = {**FORGETTING, "forget_weight": 5.0, "most_rise": 1e9, "outer_steps": 60}
    report = run(tmp_path, flags=flags)
    problem = problem_of(tmp_path / "again")
    level = newton_problem.unseen_level(problem, UNSEEN)
    last = report["history"][-1]["forget_loss"]
    assert len(report["history"]) < 60
    assert 0.8 * level < last < 1.2 * level, (last, level)


def test_held_out_rows_stop_it(tmp_path: Path) -> None:
    """They take part in no step, and may not suffer more than was allowed."""
    flags = {**FORGETTING, "forget_weight": 5.0, "outer_steps": 30, "most_rise": 0.05}
    report = run(tmp_path, flags=flags)
    start = problem_of(tmp_path / "again").start.held_out
    assert all(one["held_out_loss"] <= start + 0.05 + 1e-6 for one in report["history"])
    assert "held-out retain rows would suffer" in report["notes"][0]


def test_held_out_rows_are_in_no_step(tmp_path: Path) -> None:
    problem = problem_of(tmp_path, Rows(gradient=0, held_out=3))
    held = {
        tuple(row[:5].tolist()) for part in problem._held_out for row in part.batch["input_ids"]
    }
    used = sum(len(part.batch["input_ids"]) for part in problem.local(0).gradient_parts)
    assert sum(len(part.batch["index"]) for part in problem._held_out) == 3 and held
    assert used == len(problem.session.sides["retain"]) - 3
    few = problem_of(tmp_path, Rows(gradient=5, held_out=100))
    assert sum(len(p.batch["index"]) for p in few._held_out) == 16 // 5, "a fifth at most"
    first, second = (
        torch.cat([p.batch["input_ids"].flatten() for p in few.local(n).gradient_parts])
        for n in (0, 1)
    )
    assert first.shape != second.shape or not torch.equal(first, second), "rows are drawn again"


@pytest.mark.parametrize("solver", ["lanczos", "gd"])
def test_products_after_a_refused_step_are_those_of_the_point(solver: str, tmp_path: Path) -> None:
    """A trial overwrites the weights under a graph that is kept; putting them back makes it right."""
    problem = problem_of(tmp_path)
    start_D = problem.weights()
    local = problem.local(0)
    v_D = unit_noise(start_D, 0)
    before_D = local.product(v_D)
    problem.put(start_D + 0.5 * v_D)
    local.present_loss()
    problem.put(start_D)
    assert torch.equal(problem.weights(), start_D) and torch.equal(local.product(v_D), before_D)
    report = run(
        tmp_path / "run",
        flags={**FORGETTING, "solver": solver, "cubic_weight": 1e-3, "outer_steps": 8},
    )
    assert any(one["refused"] for one in report["history"])


def test_the_papers_form(tmp_path: Path) -> None:
    """Descent, a fixed weight, rows of its own for the Hessian: L never changes, and every product is paid."""
    flags = {
        "solver": "gd", "adaptive": False, "inner_steps": 5, "outer_steps": 3, "gradient_rows": 8,
        "curvature_rows": 4, "cubic_weight": 10.0, "return_noop": False, "epsilon": 0.0,
    }  # fmt: skip
    report = run(tmp_path, flags=flags, learning_rate=1e-2)
    assert [one["cubic_weight"] for one in report["history"]] == [10.0] * 3
    assert [one["products"] for one in report["history"]] == [6] * 3, (
        "the Cauchy point and five more"
    )


def test_the_whole_hessian_of_a_few_parameters(tmp_path: Path) -> None:
    """CureNewton: it promises at least what the Krylov space does."""
    lora = LoraConfig(r=1, lora_alpha=2, target_modules="all-linear", task_type="CAUSAL_LM")
    flags = {**FORGETTING, "outer_steps": 2}
    few = {"trainable": r"layers\.1\.self_attn\.q_proj"}
    whole = run(tmp_path / "a", lora=lora, flags={**flags, "solver": "dense"}, **few)
    krylov = run(tmp_path / "b", lora=lora, flags={**flags, "inner_steps": 4}, **few)
    assert whole["trained_parameters"] == whole["history"][0]["products"] < 200
    assert whole["history"][0]["predicted"] <= krylov["history"][0]["predicted"] < 0
    with pytest.raises(UserError, match="does not fit"):
        big = LoraConfig(r=16, lora_alpha=2, target_modules="all-linear", task_type="CAUSAL_LM")
        run(tmp_path / "c", lora=big, flags={**flags, "solver": "dense"})


def test_an_adapter_that_is_given_says_itself_what_unseen_rows_are(tmp_path: Path) -> None:
    """Without it the model knows the forget set less: that is where forgetting ends."""
    problem = problem_of(tmp_path)
    model: Any = problem.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1.mlp" in name and "base_layer" in name:
                parameter.mul_(0.5)  # the base knows less
    worse = NewtonProblem(problem.session, Rows())
    with pytest.raises(UserError, match="give --unseen FILE"):
        newton_problem.unseen_level(worse, "")  # a fresh LoRA adds nothing to it
    optimizer = torch.optim.Adam(worse.parameters, lr=5e-3)
    for _ in range(10):
        optimizer.zero_grad()
        sum((loss_of(model, part) for part in worse._forget), torch.zeros(())).backward()
        optimizer.step()
    known = NewtonProblem(problem.session, Rows())
    assert known.start.forget < worse.start.forget - 0.05
    assert newton_problem.unseen_level(known, "") == pytest.approx(worse.start.forget, rel=1e-4)


def test_full_weights_are_given_back_too(tmp_path: Path) -> None:
    flags = {"outer_steps": 1, "inner_steps": 1, "cubic_weight": 1e4, "epsilon": 0.0}
    run(tmp_path, flags=flags, full=True, trainable="mlp")
    before = knowing_model().state_dict()
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_damped_newton_takes_its_step_wherever_it_leads(tmp_path: Path) -> None:
    report = run(tmp_path / "a", "damped_newton", flags={"damping": 100.0, "outer_steps": 2})
    assert [one["step"] for one in report["history"]] == [1, 2]
    tame = report["history"][0]["step_norm"]
    wild = run(tmp_path / "b", "damped_newton", flags={"damping": 1e-6})["history"][0]["step_norm"]
    assert wild > 100 * tame > 0


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("scurenewton", {"solver": "magic"}, "--solver is"),
    ("scurenewton", {"cubic_weight": 0.0}, "--cubic_weight is above 0"),
    ("scurenewton", {"outer_steps": 0}, "at least 1"),
    ("scurenewton", {"check": "twice"}, "--check is one of"),
    ("scurenewton", {"sigma": -1.0}, "0 or more"),
    ("damped_newton", {"solver": "gd"}, "--solver is"),
    ("damped_newton", {"damping": -1.0}, "--damping is 0 or more"),
    ("damped_newton", {"inner_steps": 0}, "at least 1"),
]


@pytest.mark.parametrize(("name", "flags", "told"), MISTAKES)
def test_mistakes_of_newton_are_told(name: str, flags: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        make_method(name, flags)


def test_mistakes_that_data_shows(tmp_path: Path) -> None:
    for flags, told in (
        ({"gradient_rows": -1}, "0 or more"),
        ({"most_rise": -1.0}, "0 or more"),
        ({"forget_weight": 0.1}, "give --unseen FILE"),
        ({"forget_weight": 0.1, "unseen": str(tmp_path / "none.jsonl")}, "none.jsonl"),
    ):
        with pytest.raises(UserError, match=told):
            run(tmp_path / "out", flags=flags)
    known = tmp_path / "known.jsonl"
    known.write_text("".join(json.dumps(r.content) + "\n" for r in forget_and_retain()[0]))
    with pytest.raises(UserError, match="no less known than the forget set"):
        run(tmp_path / "out", flags={"unseen": str(known)})


def test_a_step_that_is_no_number_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_unlearn.approximate.subproblem import Projected

    monkeypatch.setattr(Projected, "newton", lambda self, damping: self.like_D * float("nan"))
    with pytest.raises(RunError, match="raise --damping"):
        run(tmp_path, "damped_newton")
    assert not (tmp_path / WEIGHTS).exists()


def test_the_method_says_which_flags_it_has() -> None:
    from llm_unlearn.approximate.cards import describe

    said = describe(SCureNewton)
    assert "--forget_weight 0.0" in said and "2406.14507" in said
