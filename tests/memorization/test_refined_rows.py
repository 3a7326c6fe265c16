"""RUM on the leaderboard: rows, budget, and what they need of the model before."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.approximate.arguments import UnlearningConfig
from llm_unlearn.approximate.fine_tuning import fine_tune
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.suites.demonstration import demonstration_tofu
from llm_unlearn.exact.base_model import load_base
from llm_unlearn.leaderboard.plan import REFINED, World
from llm_unlearn.leaderboard.refined import unlearn_row
from llm_unlearn.memorization.observations import Observations
from llm_unlearn.memorizing.scoring import keep_observations
from tests.test_recipes import ROOT, load_recipe
from tests.tiny import tiny_records

assert (ROOT / "recipes" / "benchmark.py").exists()
RECORDS = tiny_records()
FLAGS: dict[str, Any] = {
    "learning_rate": 5e-3, "num_train_epochs": 6, "per_device_train_batch_size": 8, "max_length": 64,
    "gradient_accumulation_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def before(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows all records, whose training was tracked."""
    from peft import LoraConfig

    path, observer = tmp_path_factory.mktemp("before") / "model", Observations()
    config = UnlearningConfig(output_dir=str(path), method="ga", **FLAGS)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model, tokenizer = load_base(str(tiny_base))
    fine_tune(model, tokenizer, RECORDS, config, lora, observer=observer)
    keep_observations(path, RECORDS, observer, model, config)
    return path


def world_of(base: Path, **more: Any) -> World:
    return World(
        "tiny", str(base), RECORDS[:9], RECORDS[9:], demonstration_tofu(), FLAGS, unlearning=FLAGS,
        **more,
    )  # fmt: skip


@pytest.mark.parametrize("row", REFINED)
def test_every_row_takes_as_many_steps(
    row: str, tiny_base: Path, before: Path, tmp_path: Path
) -> None:
    world = world_of(tiny_base, refine="confidence")
    unlearn_row(world, row, 0, before, tmp_path / "out", load_base)
    plan = json.loads((tmp_path / "out" / "refinement.json").read_bytes())
    methods, control = REFINED[row]
    assert [s["method"] for s in plan["subsets"]] == list(methods * (3 // len(methods)))
    assert plan["control"] == control and plan["score"] == "confidence"
    assert sum(s["steps"] for s in plan["subsets"]) == 6 * 2  # nine records in batches of eight
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_scores_that_are_not_there_are_said(tiny_base: Path, before: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no counterfactual runs"):
        unlearn_row(
            world_of(tiny_base, refine="counterfactual"), "RUM", 0, before, tmp_path, load_base
        )


def test_the_recipe_knows_the_rows() -> None:
    scope = load_recipe("benchmark").__globals__
    arguments = scope["read_arguments"](["--refine", "--methods", "npo", "--exact"])
    assert arguments.refine == "confidence"
    assert scope["wanted_rows"](arguments) == ["npo", *REFINED]
    with pytest.raises(UserError, match="unknown --refine 'loss'"):
        scope["wanted_rows"](scope["read_arguments"](["--refine", "loss"]))
    assert scope["wanted_rows"](scope["read_arguments"](["--methods", "npo", "--exact"])) == ["npo"]
