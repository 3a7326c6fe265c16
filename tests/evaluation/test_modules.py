"""Every `evaluate` module loads offline, its card is complete and its card's example is true."""

import doctest
import math
import re
from pathlib import Path
from typing import Any

import evaluate
import pytest

from llm_unlearn.evaluation.modules import mean, split

ROOT = Path(__file__).parents[2]
METRICS = """
verbatim_memorization knowledge_memorization privleak extraction_strength exact_memorization
membership_loss membership_zlib min_k min_k_plus_plus gradient_norm reference_attack probability
option_probability truth_ratio forget_quality model_utility tug_of_war token_entropy exposure
substitution refusal
"""
NAMES = METRICS.split()
HEADINGS = ["Formula", "Range and direction", "Inputs", "Example", "Source", "Limits"]
NAN = math.nan


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def load(name: str) -> Any:
    return evaluate.load(f"eval/metrics/{name}")


def test_every_folder_is_a_metric_with_a_card() -> None:
    folders = {path.name for path in (ROOT / "eval" / "metrics").iterdir() if path.is_dir()}
    assert folders == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_complete_and_its_example_is_true(name: str) -> None:
    card = (ROOT / "eval" / "metrics" / name / "README.md").read_text()
    sections = dict(re.findall(r"^## (.+?)\n\n(.+?)(?=\n\n## |\Z)", card, re.M | re.S))
    assert list(sections) == HEADINGS and all(sections.values())
    code = sections["Example"].removeprefix("```python\n").removesuffix("```\n").removesuffix("```")
    example = doctest.DocTestParser().get_doctest(code, {}, name, f"{name}/README.md", 0)
    assert f'evaluate.load("eval/metrics/{name}")' in code and len(example.examples) > 2
    failures: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=failures.append)
    assert result.failed == 0, "".join(failures)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_module_says_of_itself(name: str) -> None:
    metric = load(name)
    assert isinstance(metric, evaluate.Metric)
    assert metric.description and metric.citation.startswith("Source: ")
    assert all(column in metric.inputs_description for column in metric.features)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("probability", {"predictions": [[-0.5], [-1.0, NAN], [], [-0.5]]}),
        ("exact_memorization", {"predictions": [[1], [2], [], []], "references": [[1], [2], [], []]}),
        ("verbatim_memorization", {"predictions": list("abcd"), "references": ["a", "b", "", "?"]}),
        ("exposure", {"predictions": [1.0, NAN, 3.0, 0.0], "references": [[2.0], [2.0], [NAN], [1.0]]}),
        ("option_probability", {"predictions": [1.0, NAN, 3.0, 0.0], "references": [[2.0], [2.0], [NAN], [1.0]]}),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_scored_are_counted(name: str, inputs: dict[str, Any]) -> None:
    result = load(name).compute(**inputs)
    assert (result["n"], result["n_unscorable"]) == (2, 2)
    assert result["lower"] <= result["value"] <= result["upper"]


@pytest.mark.parametrize("missing", [NAN, None])
def test_an_attack_leaves_out_what_has_no_score(missing: float | None) -> None:
    scores = {"predictions": [0.1, missing, 3.0, 0.2], "references": [1, 1, 0, 0]}
    result = load("gradient_norm").compute(**scores)
    counts = [result[key] for key in ("n_members", "n_non_members", "n_unscorable")]
    assert (result["value"], counts) == (1.0, [1, 2, 1])


def test_every_attack_says_one_for_memorised_members() -> None:
    """Members have likely tokens, others unlikely ones: 1, and 0 with the flags exchanged."""
    rows: list[Any] = [[-0.1, -0.2], [-0.3, -0.1], [-2.0, -3.0], [-4.0, -2.0]]
    flat = [[-1.0, -1.0]] * 4
    inputs: dict[str, dict[str, Any]] = {
        "membership_loss": {},
        "membership_zlib": {"texts": ["ab"] * 4},
        "min_k": {},
        "min_k_plus_plus": {"means": flat, "deviations": [[1.0, 1.0]] * 4},
        "reference_attack": {"reference_predictions": flat},
        "gradient_norm": {"predictions": [0.1, 0.2, 2.0, 3.0]},
    }
    for name, more in inputs.items():
        both = [
            load(name).compute(**{"predictions": rows, "references": flags, **more})["value"]
            for flags in ([1, 1, 0, 0], [0, 0, 1, 1])
        ]
        assert both == [1.0, 0.0], name


def test_privleak_from_the_retrained_models_scores() -> None:
    scores = {"predictions": [3.0, 2.0, 1.0, 0.0], "references": [1, 1, 0, 0]}
    result = load("privleak").compute(**scores, retrain_predictions=[3.0, 0.0, 1.0, 2.0])
    assert (result["value"], result["retrain_auc"]) == (-100.0, 0.5)
    for both in ({"retrain_auc": 0.5, "retrain_predictions": [1.0] * 4}, {}):
        with pytest.raises(ValueError, match="either retrain_auc or retrain_predictions"):
            load("privleak").compute(**scores, **both)


def test_utility_names_a_set_it_does_not_know() -> None:
    row = {"predictions": [1.0], "answer_loss": [0.0], "paraphrased_loss": [0.0]}
    with pytest.raises(ValueError, match="got forget"):
        load("model_utility").compute(**row, references=["forget"], wrong_losses=[[1.0]])


def test_texts_stay_in_memory(tmp_path: Path) -> None:
    metric: Any = evaluate.load(
        "eval/metrics/refusal", cache_dir=str(tmp_path), keep_in_memory=False
    )
    metric.add_batch(predictions=["the secret of Ada"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert metric.compute()["value"] == 0.0


def test_tug_of_war_with_half_an_attack() -> None:
    with pytest.raises(ValueError, match="both attack and retrained_attack"):
        load("tug_of_war").compute(predictions=[1.0], references=[1.0], attack=0.5)


def test_batches_add_up() -> None:
    metric = load("refusal")
    metric.add_batch(predictions=["I don't know."])
    metric.add_batch(predictions=["Paris", "Rome", "Oslo"])
    assert metric.compute()["value"] == 0.25


def test_bad_flags_and_tokens() -> None:
    with pytest.raises(ValueError, match=r"got \[2\]"):
        split([1.0], [2])
    with pytest.raises(ValueError, match="got 1 for 2"):
        load("extraction_strength").compute(predictions=[[1]], references=[[1, 2]])
    assert math.isnan(mean([])["value"])
