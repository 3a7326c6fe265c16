"""RUM from end to end: order, chain, equal steps, controls, crashes, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_unlearn.approximate import unlearn as unlearning
from llm_unlearn.approximate.arguments import UnlearningConfig
from llm_unlearn.approximate.unlearn import make_method
from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError
from llm_unlearn.memorizing.refine_arguments import RefineArguments
from llm_unlearn.memorizing.refining import Stage, make_plan, steps_of, unlearn_refined
from llm_unlearn.models import load_model
from tests.test_unlearning_recipe import adapter, refused, write
from tests.test_unlearning_recipe import unlearn as run_recipe
from tests.tiny import make_rows, tiny_records

__all__ = ["adapter"]  # a fixture
RECORDS = tiny_records()
FORGET, RETAIN = RECORDS[:9], RECORDS[9:15]
SCORES = np.array([0.5, 0.1, 0.9, 0.4, 0.2, 0.8, 0.6, 0.3, 0.7])
LOW, MIDDLE, HIGH = [1, 4, 7], [0, 3, 6], [2, 5, 8]


def stage(name: str, path: Path, **more: Any) -> Stage:
    config = UnlearningConfig(
        output_dir=str(path), method=name, learning_rate=1e-3, num_train_epochs=4, max_length=64,
        per_device_train_batch_size=4, gradient_accumulation_steps=1, use_cpu=True, bf16=False, **more,
    )  # fmt: skip
    return Stage(config, make_method(name))


class Told:
    """Stands in for `unlearn`, and remembers what it was asked."""

    def __init__(self, fail_at: int = 0):
        self.calls: list[tuple[str, list[Record], list[Record], int, Any]] = []
        self.fail_at = fail_at

    def __call__(self, model: Any, _t: Any, forget: Any, retain: Any, config: Any, *_: Any) -> Any:
        if len(self.calls) + 1 == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((config.method, list(forget), list(retain), config.max_steps, model))
        report = unlearning.Report(
            config.method, {}, {}, "base", True, False, len(forget), len(retain), 1.0,
            config.max_steps, 1,
        )  # fmt: skip
        place = Path(config.output_dir)
        place.mkdir(parents=True, exist_ok=True)
        (place / "README.md").write_text("# A model\n")
        (place / "unlearning.json").write_text(json.dumps(report.to_dict()))
        return report


def run(
    output: Path, told: Told, monkeypatch: pytest.MonkeyPatch, names: list[str], **flags: Any
) -> Told:
    monkeypatch.setattr(unlearning, "unlearn", told)
    arguments = RefineArguments(refine="confidence", **flags)
    stages = [Stage() if name == "none" else stage(name, output) for name in names]
    config = stage("npo", output).config
    assert config is not None
    plan = make_plan(arguments, SCORES, stages, config)
    unlearn_refined(plan, stages, FORGET, RETAIN, lambda place: (place, None), output)
    return told


def numbers(records: list[Record]) -> list[int]:
    return [FORGET.index(record) for record in records]


def test_from_low_to_high_each_from_what_the_last_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = run(tmp_path / "out", Told(), monkeypatch, ["retain_ft", "neggrad_plus", "npo"])
    methods, forgotten, kept, steps, models = zip(*told.calls, strict=True)
    assert methods == ("retain_ft", "neggrad_plus", "npo")
    assert [numbers(one) for one in forgotten] == [LOW, MIDDLE, HIGH]
    assert all(one == RETAIN for one in kept)  # nothing that is to go is trained on again
    assert sum(steps) == 12 == steps_of(stage("npo", tmp_path).config, 9)  # pyright: ignore
    assert models[0] is None
    assert [Path(one).name for one in models[1:]] == ["subset-1", "subset-2"]
    assert not (tmp_path / "out" / "stages").exists()
    plan = json.loads((tmp_path / "out" / "refinement.json").read_bytes())
    assert [s["method"] for s in plan["subsets"]] == list(methods)
    assert "neggrad_plus, 4 steps" in (tmp_path / "out" / "README.md").read_text()


def test_a_subset_without_a_method_is_neither_unlearned_nor_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = run(
        tmp_path / "out", Told(), monkeypatch, ["none", "npo", "npo"], pending_in_retain=True
    )
    assert [numbers(one[1]) for one in told.calls] == [MIDDLE, HIGH]
    assert told.calls[0][2] == [*RETAIN, *(FORGET[n] for n in HIGH)]  # the paper's way, asked for
    assert told.calls[1][2] == RETAIN
    assert [one[3] for one in told.calls] == [6, 6]  # the budget is the same


def test_controls_have_the_same_methods_flags_and_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["retain_ft", "neggrad_plus", "npo"]
    plain = run(tmp_path / "plain", Told(), monkeypatch, names)
    mixed = run(tmp_path / "mixed", Told(), monkeypatch, names, refine_control="shuffle")
    whole = run(tmp_path / "whole", Told(), monkeypatch, ["npo"], refine_control="vanilla")
    assert [(c[0], len(c[1]), c[3]) for c in plain.calls] == [
        (c[0], len(c[1]), c[3]) for c in mixed.calls
    ]
    assert [numbers(c[1]) for c in mixed.calls] != [LOW, MIDDLE, HIGH]
    assert sorted(n for c in mixed.calls for n in numbers(c[1])) == list(range(9))
    ((method, forgotten, _, steps, _),) = whole.calls
    assert (method, sorted(numbers(forgotten)), steps) == ("npo", list(range(9)), 12)


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_killed_in_any_subset_it_goes_on_there(
    fail_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, names = tmp_path / "out", ["npo"] * 3
    with pytest.raises(KeyboardInterrupt):
        run(output, Told(fail_at), monkeypatch, names)
    again = run(output, Told(), monkeypatch, names)
    assert [numbers(c[1]) for c in again.calls] == [LOW, MIDDLE, HIGH][fail_at - 1 :]
    # What another plan left is not gone on with.
    with pytest.raises(KeyboardInterrupt):
        run(output, Told(3), monkeypatch, names)
    other = run(output, Told(), monkeypatch, ["simnpo", "npo", "npo"])
    assert len(other.calls) == 3


def test_methods_that_hide_are_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="whp hides and leaves no model to go on from"):
        run(tmp_path / "out", Told(), monkeypatch, ["whp", "npo", "npo"])


def test_flags_that_make_no_sense() -> None:
    for flags, reason in (
        ({"refine_with": ["npo"]}, "need --refine SCORE"),
        ({"refine": "loss"}, "--refine 'loss': one of confidence"),
        ({"refine": "confidence", "refine_with": ["npo", "npo"]}, "each of 3 subsets"),
        ({"refine": "confidence", "refine_control": "sorted"}, "none, shuffle, vanilla"),
    ):
        with pytest.raises(UserError, match=reason):
            RefineArguments(**flags)


def test_the_recipe_refines(
    tiny_base: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows()
    forget, retain = write(tmp_path / "f.jsonl", rows[:9]), write(tmp_path / "r.jsonl", rows[9:15])
    given = ("--adapter", adapter, "--forget", forget, "--retain", retain, "--max_steps", 5)
    more = ("--refine", "confidence", "--refine_with", "none", "--refine_with", "neggrad_plus",
            "--refine_with", "npo")  # fmt: skip
    output = tmp_path / "out"
    assert run_recipe(tiny_base, output, *given, "--method", "npo", "--beta", 0.2, *more) == 0
    plan = json.loads((output / "refinement.json").read_bytes())
    assert [(s["method"], s["steps"]) for s in plan["subsets"]] == [
        ("none", 0), ("neggrad_plus", 3), ("npo", 2)
    ]  # fmt: skip
    means = [s["mean"] for s in plan["subsets"]]
    assert means == sorted(means) and plan["pending_in_retain"] is False
    assert json.loads((output / "unlearning.json").read_bytes())["flags"]["beta"] == 0.2
    assert load_model(str(output)).model is not None
    assert "3 records unlearned with neggrad_plus" in capfd.readouterr().out
    # Held-out data is asked for, and several requests are no one set.
    assert run_recipe(tiny_base, output, *given, "--method", "npo", "--refine", "holdout") == 2
    assert "give --holdout" in refused(capfd)
    assert run_recipe(tiny_base, output, *given, "--method", "npo", "--refine", "confidence",
                      "--forget", retain, "--sequential") == 2  # fmt: skip


def test_what_a_refinement_does_not_do_is_said(
    tiny_base: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    forget = write(tmp_path / "f.jsonl", make_rows()[:9])
    given = ("--adapter", adapter, "--forget", forget, "--method", "ga", "--refine", "confidence")
    for more, reason in (
        (["--track_memorization"], "goes without --track_memorization"),
        (["--eval_suite", "demo"], "goes without --eval_suite"),
        (["--scores_of", tmp_path / "typo"], "typo knows no confidence of these records"),
    ):
        assert run_recipe(tiny_base, tmp_path / "out", *given, *more) == 2
        assert reason in refused(capfd)
    assert not (tmp_path / "out").exists()


def test_flat_scores_are_refused_before_anything_is_written(
    tiny_base: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    row = make_rows()[0]
    rows = [{**row, "subject": str(n)} for n in range(6)]  # one text six times
    forget = write(tmp_path / "f.jsonl", rows)
    retain = write(tmp_path / "r.jsonl", make_rows()[9:12])
    code = run_recipe(tiny_base, tmp_path / "out", "--adapter", adapter, "--forget", forget, "--retain", retain,
                      "--method", "npo", "--refine", "confidence")  # fmt: skip
    assert code == 2 and "all records have the same score" in refused(capfd)
    assert not (tmp_path / "out").exists()
