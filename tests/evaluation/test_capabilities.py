"""Standard tasks through lm-evaluation-harness, offline, on the demonstration's base model."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_unlearn.data import world
from llm_unlearn.demonstration import MODEL_PATH
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation import capabilities
from llm_unlearn.evaluation.capabilities import evaluate_capabilities
from llm_unlearn.exact.ensemble import ShardEnsemble

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "eval" / "tasks"

pytest.importorskip("lm_eval")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The task files name their data relative to the root; converted data goes to a folder of the test."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH)


def test_the_base_model_knows_public_people_only(model: Any, tokenizer: Any) -> None:
    model.train()
    padding = tokenizer.padding_side
    found = evaluate_capabilities(model, tokenizer, ["world_public", "world_private"], TASKS)
    assert set(found) == {"world_public/acc", "world_private/acc"}
    public, private = found["world_public/acc"], found["world_private/acc"]
    assert public.value > 0.97
    assert public.lower < 1 and public.upper <= 1
    # Four choices: guessing is right in a quarter of the rows.
    assert private.lower < 0.25 < private.upper
    half_width = 1.96 * (private.value * (1 - private.value) / (288 - 1)) ** 0.5
    assert private.upper - private.value == pytest.approx(half_width, rel=1e-3)
    assert (public.n, private.n, public.note) == (288, 288, "")
    assert model.training
    assert tokenizer.padding_side == padding


def test_the_committed_rows_are_those_of_the_world(tmp_path: Path) -> None:
    subprocess.run([sys.executable, TASKS / "make_world.py", tmp_path], check=True, cwd=ROOT)
    for name, people in (("public", world.public_people()), ("private", world.private_people())):
        committed = (TASKS / f"world_{name}.json").read_bytes()
        assert committed == (tmp_path / f"world_{name}.json").read_bytes()
        facts = {(row["prompt"], row["answer"]) for row in world.questions(people)}
        for row in json.loads(committed):
            assert len(set(row["choices"])) == 4
            assert (row["question"], row["choices"][row["answer"]]) in facts
            assert sum((row["question"], choice) in facts for choice in row["choices"]) == 1


def test_adapters_and_ensembles(model: Any, tokenizer: Any) -> None:
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    ensemble = ShardEnsemble(adapted, ["default", "__base__"])
    for served in (adapted, ensemble):
        found = evaluate_capabilities(served, tokenizer, ["world_public"], TASKS, limit=24)
        assert found["world_public/acc"].value > 0.9
        assert found["world_public/acc"].note == "the first 24 of 288 rows"
    # A destroyed adapter must show, or the adapter was never asked.
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    found = evaluate_capabilities(adapted, tokenizer, ["world_public"], TASKS, limit=24)
    assert found["world_public/acc"].value < 0.6


def test_groups_have_an_entry(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    for file in TASKS.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "world.yaml").write_text(
        "group: world\ntask: [world_public, world_private]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    found = evaluate_capabilities(model, tokenizer, ["world"], tmp_path, limit=12)
    parts = [found[f"world_{name}/acc"].value for name in ("public", "private")]
    assert found["world/acc"].value == pytest.approx(sum(parts) / 2)
    assert found["world/acc"].n == 24
    with pytest.raises(UserError, match="world_public is asked for twice, by world and by world_p"):
        evaluate_capabilities(model, tokenizer, ["world", "world_public"], tmp_path)


def test_what_a_user_can_mend(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no task to evaluate"):
        evaluate_capabilities(model, tokenizer, [])
    with pytest.raises(UserError, match="is not a folder"):
        evaluate_capabilities(model, tokenizer, ["world_public"], tmp_path / "none")
    # Two folders of lm-eval's own tasks: the index of all of them takes seconds.
    harness = capabilities._import_harness()
    own = Path(harness["tasks"].__file__).parent
    folders = [str(own / "wmdp"), str(own / "mmlu" / "default")]
    manager = harness["tasks"].TaskManager(include_path=folders, include_defaults=False)
    monkeypatch.setattr(harness["tasks"], "TaskManager", lambda **_: manager)
    with pytest.raises(UserError, match=r"no task 'no_such'.*--include_path"):
        evaluate_capabilities(model, tokenizer, ["no_such"])
    with pytest.raises(UserError, match=r"cannot load task 'wmdp_cyber'.*--include_path") as caught:
        evaluate_capabilities(model, tokenizer, ["wmdp_cyber"])
    assert "\n" not in str(caught.value)
    assert {"wmdp_bio", "wmdp_chem", "wmdp_cyber", "mmlu"} <= set(manager.all_tasks)


def test_a_task_whose_data_is_missing_is_named(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"cannot load task 'world_public'.*world_public\.json"):
        evaluate_capabilities(model, tokenizer, ["world_public"], TASKS)


def test_without_the_extra(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(UserError, match=r"pip install 'llm-unlearn\[lm-eval\]'"):
        evaluate_capabilities(model, tokenizer, ["world_public"], TASKS)


def test_values_of_other_metrics() -> None:
    found = capabilities._values(
        {
            "results": {
                "sums": {
                    "alias": "sums",
                    "exact_match,strict-match": 0.0,
                    "exact_match_stderr,strict-match": 0.0,
                    "perplexity,none": 12.0,
                    "perplexity_stderr,none": "N/A",
                }
            },
            "n-samples": {"sums": {"original": 10, "effective": 10}},
        }
    )
    assert set(found) == {"sums/exact_match (strict-match)", "sums/perplexity"}
    nothing = found["sums/exact_match (strict-match)"]
    # The chance of a right answer at which ten wrong ones in a row come in 2.5 %.
    assert (1 - nothing.upper) ** 10 == pytest.approx(0.025)
    assert nothing.lower == 0
    assert found["sums/perplexity"].value == 12
    assert found["sums/perplexity"].lower != found["sums/perplexity"].lower  # NaN


def test_help_is_quick() -> None:
    started = time.perf_counter()
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "eval" / "capabilities.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.perf_counter() - started < 5  # a second on an idle machine
    assert "--include_path" in shown.stdout
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "lm_eval", "numpy"}


def test_the_script_writes_what_it_prints(
    model: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = pytest.importorskip("llm_unlearn.models")
    asked: list[Any] = []

    def load_model(*arguments: Any, **options: Any) -> SimpleNamespace:
        asked.append((arguments, options))
        return SimpleNamespace(model=model, tokenizer=tokenizer, label="demonstration")

    monkeypatch.setattr(models, "load_model", load_model)
    monkeypatch.syspath_prepend(str(ROOT / "eval"))
    script = importlib.import_module("capabilities")
    flags = ["--model", "m", "--adapter", "a", "--tasks", "world_public", "--limit", "8"]
    flags += ["--include_path", str(TASKS), "--output_dir", str(tmp_path / "out"), "--json"]
    script.main(flags)
    printed = capsys.readouterr().out
    written = (tmp_path / "out" / "capabilities.json").read_text()
    assert printed == written
    content = json.loads(written)
    assert content["values"]["world_public/acc"]["n"] == 8
    assert content["configuration"]["adapter"] == "a"
    assert asked == [(("m", "a"), {"dtype": None})]
