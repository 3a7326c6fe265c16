"""The numbers that training shows, against plain re-computation."""

import math

import numpy as np
import pytest
import torch

from llm_unlearn.memorization import learning_events
from llm_unlearn.memorization.learning_events import ROW_VALUES, row_values, token_values
from llm_unlearn.memorization.observations import Observations, merged


def test_three_tokens_by_hand() -> None:
    probabilities = [[0.5, 0.25, 0.25], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6]]
    labels = [0, 2, 2]
    logits = torch.tensor(probabilities).log() + 5.0  # a constant changes nothing
    values = token_values(logits, torch.tensor(labels))
    right = [0.5, 0.1, 0.6]
    assert values["log_probability"].tolist() == pytest.approx([math.log(p) for p in right])
    assert values["max_confidence"].tolist() == pytest.approx([0.5, 0.7, 0.6])
    entropies = [-sum(p * math.log(p) for p in row) for row in probabilities]
    assert values["entropy"].tolist() == pytest.approx(entropies)
    assert values["accuracy"].tolist() == [1.0, 0.0, 1.0]
    distances = [
        math.sqrt(sum((p - (v == label)) ** 2 for v, p in enumerate(row)))
        for row, label in zip(probabilities, labels, strict=True)
    ]
    assert values["el2n"].tolist() == pytest.approx(distances)
    rows = row_values(values, torch.tensor([0, 0, 1]), 3)
    assert rows["confidence"][:2].tolist() == pytest.approx([math.sqrt(0.5 * 0.1), 0.6])
    assert rows["entropy"][0].item() == pytest.approx(sum(entropies[:2]) / 2)
    assert rows["accuracy"][:2].tolist() == [0.5, 1.0]
    assert rows["strict_accuracy"][:2].tolist() == [0.0, 1.0]
    assert rows["tokens"].tolist() == [2, 1, 0]
    assert all(math.isnan(rows[name][2]) for name in ROW_VALUES)


def test_a_long_record_is_not_more_of_anything() -> None:
    logits = torch.randn(4, 7)
    labels = torch.tensor([1, 2, 3, 4])
    once = row_values(token_values(logits, labels), torch.zeros(4, dtype=torch.long), 1)
    thrice = row_values(
        token_values(logits.repeat(3, 1), labels.repeat(3)), torch.zeros(12, dtype=torch.long), 1
    )
    for name in ROW_VALUES:
        assert thrice[name].item() == pytest.approx(once[name].item(), abs=1e-6)


def test_certain_and_extreme_logits_stay_numbers() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]])
    values = token_values(logits, torch.tensor([0, 0]))
    assert values["entropy"].tolist() == [0.0, 0.0]
    assert values["el2n"].tolist() == pytest.approx([0.0, math.sqrt(2)])
    assert row_values(values, torch.tensor([0, 1]), 2)["confidence"].tolist() == [1.0, 0.0]


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(50, 11), torch.randint(11, (50,))
    whole = token_values(logits, labels)
    monkeypatch.setattr(learning_events, "NUMBERS_AT_ONCE", 40)
    for name, values in token_values(logits, labels).items():
        assert torch.equal(values, whole[name])


def test_a_fused_head_and_logits_tell_the_same() -> None:
    logits = torch.randn(2, 5, 9)
    labels = torch.tensor([[1, 2, -100, 3, 4], [-100, 5, 6, -100, 7]])
    plain, fused = Observations(), Observations()
    plain.observe_logits(torch.tensor([3, 1]), 2, logits, labels)
    distribution = logits.log_softmax(-1)
    mask = labels >= 0
    told = {
        "log_probability": distribution.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * mask,
        "entropy": -(distribution.exp() * distribution).sum(-1),
        "accuracy": logits.argmax(-1) == labels,
        "squares": distribution.exp().square().sum(-1),
    }
    fused.observe_tokens(torch.tensor([3, 1]), 2, told, mask)
    ours, theirs = plain.collect(), fused.collect()
    assert set(ours) - set(theirs) == {"max_confidence"}  # which a fused head does not tell
    assert ours["index"].tolist() == [1, 3] and ours["tokens"].tolist() == [3, 4]
    for name in theirs:
        assert theirs[name] == pytest.approx(ours[name], abs=1e-6)


def test_rows_that_fill_up_a_batch_count_once() -> None:
    """Two processes: one saw a record again to fill its batch, one a row without tokens."""
    first = {
        "index": np.array([0, 1]), "epoch": np.array([0, 0]), "tokens": np.array([2, 2]),
        "confidence": np.array([0.1, 0.2]),
    }  # fmt: skip
    second = {
        "index": np.array([2, 0, 1]), "epoch": np.array([0, 0, 1]), "tokens": np.array([2, 2, 0]),
        "confidence": np.array([0.3, 0.1, np.nan]),
    }  # fmt: skip
    found = merged([first, second, {}])
    assert found["index"].tolist() == [0, 1, 2] and found["confidence"].tolist() == [0.1, 0.2, 0.3]
    assert len(merged([])["index"]) == 0


def test_what_an_interrupted_training_saw_is_not_lost() -> None:
    def seen(epoch: int, observer: Observations) -> Observations:
        logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(epoch))
        observer.observe_logits(torch.tensor([0, 1]), epoch, logits, torch.tensor([[1, 2, 3]] * 2))
        return observer

    whole = seen(1, seen(0, Observations())).collect()
    before = {name: values.tolist() for name, values in seen(0, Observations()).collect().items()}
    again = Observations()
    again.restore(before)
    for name, values in seen(1, again).collect().items():
        assert values == pytest.approx(whole[name])
