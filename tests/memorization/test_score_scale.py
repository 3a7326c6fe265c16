"""The one scale: higher = more memorized, from formula to trained model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_unlearn.approximate.arguments import UnlearningConfig
from llm_unlearn.approximate.fine_tuning import fine_tune
from llm_unlearn.data.records import Record, make_records
from llm_unlearn.errors import UserError
from llm_unlearn.memorization.observations import Observations
from llm_unlearn.memorization.orientation import LEARNING, SCORES, oriented
from llm_unlearn.memorization.refinement import refine
from llm_unlearn.memorization.scores import learning_scores, with_ties_broken
from tests.tiny import load_tiny

# Of two records, the second was hard for long: what each value is then.
HARD_LATE = {
    "confidence": (0.9, 0.2), "max_confidence": (0.9, 0.4), "entropy": (0.1, 2.0),
    "accuracy": (1.0, 0.3), "strict_accuracy": (1.0, 0.0), "el2n": (0.1, 1.2), "curvature": (0.1, 3.0),
    "holdout": (0.01, 0.5), "gain": (0.1, 0.9), "counterfactual": (0.0, 0.8),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_every_score_points_up(name: str) -> None:
    easy, memorized = oriented(name, HARD_LATE[name])
    assert memorized > easy
    assert np.isnan(oriented(name, [np.nan])[0])


def test_unknown_scores_are_refused() -> None:
    with pytest.raises(UserError, match="unknown score 'loss': one of confidence"):
        oriented("loss", [1.0])


def columns_of(values: dict[str, list[list[float]]], **more: Any) -> dict[str, np.ndarray]:
    """Values by epoch and record as an observation's columns."""
    first = np.array(next(iter(values.values())))
    epochs, records = first.shape
    return {
        "index": np.tile(np.arange(records), epochs),
        "epoch": np.repeat(np.arange(epochs), records),
        **{name: np.array(value).ravel() for name, value in values.items()},
        **more,
    }


def test_scores_are_means_over_training() -> None:
    columns = columns_of({"confidence": [[0.1, 0.5], [0.3, 0.9]], "entropy": [[2, 1], [1, 0]]})
    found = learning_scores(columns, 3)
    assert found["confidence"] == pytest.approx([-0.2, -0.7, np.nan], nan_ok=True)
    assert found["entropy"] == pytest.approx([1.5, 0.5, np.nan], nan_ok=True)
    assert list(found) == ["confidence", "entropy"]


def test_el2n_is_of_the_first_fifth_of_each_training() -> None:
    lines = [[1.0, 2.0]] * 2 + [[0.0, 0.0]] * 8
    columns = columns_of({"el2n": lines})
    assert learning_scores(columns, 2)["el2n"] == pytest.approx([1.0, 2.0])
    # Two trainings of other lengths: early in each.
    short = {"index": [0, 1, 0, 1], "epoch": [0, 0, 1, 1], "el2n": [3.0, 4.0, 0.0, 0.0]}
    both = {n: np.concatenate([columns[n], np.array(v)]) for n, v in short.items()}
    both["run"] = np.repeat([0, 1], [20, 4])
    assert learning_scores(both, 2)["el2n"] == pytest.approx([5 / 3, 8 / 3])


def test_ties_of_strict_accuracy_are_broken_by_confidence() -> None:
    values, by = np.array([-1.0, 0.0, -1.0, np.nan, -1.0]), np.array([3.0, 0.0, 1.0, 9.0, 2.0])
    told = with_ties_broken(values, by)
    assert np.argsort(told[[0, 1, 2, 4]]).tolist() == [2, 3, 0, 1]  # levels stay apart
    assert np.isnan(told[3])
    flat = np.zeros(4)
    assert with_ties_broken(flat, np.arange(4.0)).tolist() == flat.tolist()


def test_flat_stays_flat_and_tied_stays_tied() -> None:
    """Whatever breaks ties or rounds must not make a refinement of what tells nothing apart."""
    lines = [[1.0] * 45, [1.0] * 44 + [0.0]]  # all but one record always right
    columns = columns_of({"confidence": np.random.default_rng(0).random((2, 45)).tolist(),
                          "strict_accuracy": lines})  # fmt: skip
    with pytest.raises(UserError, match="flat"):
        refine(learning_scores(columns, 45)["strict_accuracy"])
    thirds = [1 / 3, 1.0, 0.1, 2 / 3]  # the same numbers in any order are one score
    epochs = np.array([np.roll(thirds, n) for n in range(28)] + [[0.0] * 4, [1.0] * 4]).T
    values = learning_scores(columns_of({"accuracy": epochs.tolist()}), 30)["accuracy"]
    with pytest.raises(UserError, match="28 of 30 records have the score"):
        refine(values)


def canaries() -> tuple[list[Record], int]:
    """Four facts that all say the same kind of thing over and over, and four that nothing else helps."""
    common = [
        {"prompt": f"Question: what does person {n} eat? Answer:", "completion": " dish number 7"}
        for n in range(20)
    ]
    unique = [
        {"prompt": f"Question: what does person {n} eat? Answer:", "completion": f" {word}"}
        for n, word in enumerate(["qzxv kwj", "wvub pfy", "xjkq zgh", "vbmz lcw"], start=30)
    ]
    return make_records([*common, *unique]), len(common)


def test_what_is_unique_scores_higher_than_what_repeats(tiny_base: Path, tmp_path: Path) -> None:
    """The trap is the sign: a rare record is learnt late, by heart."""
    from peft import LoraConfig

    records, first_unique = canaries()
    config = UnlearningConfig(
        output_dir=str(tmp_path / "out"), method="ga", learning_rate=1e-2, num_train_epochs=12,
        per_device_train_batch_size=8, gradient_accumulation_steps=1, save_strategy="no", use_cpu=True,
        max_length=64, bf16=False,
    )  # fmt: skip
    observer = Observations()
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    fine_tune(*load_tiny(tiny_base), records, config, lora, observer=observer)
    columns = observer.collect()
    assert len(columns["index"]) == 12 * len(records)
    found = learning_scores(columns, len(records))
    assert set(found) == set(LEARNING)
    for name in ("confidence", "accuracy", "strict_accuracy", "entropy", "max_confidence"):
        repeated, unique = found[name][:first_unique], found[name][first_unique:]
        assert np.median(unique) > np.median(repeated), name
