"""Every method trains for real, and moves what is known the way it says, against a no-op control."""

from pathlib import Path

import pytest

from llm_unlearn.approximate.methods import METHODS, load_method
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.models import wrapped
from tests.approximate.known import (
    LORA,
    arguments,
    forget_and_retain,
    knowing_model,
    knowledge,
    read_result,
)
from tests.approximate.methods import EXPECTED, Expected
from tests.tiny import make_tiny_tokenizer

MOVED = 0.3  # nats a token: far more than the control moves


def run(name: str, one: Expected, output: Path, **training: object) -> tuple[float, float]:
    """Knowledge of forget and retain records after the method, as written."""
    forget, retain = forget_and_retain()
    method = make_method(name, one.flags)
    config = arguments(output, name, full=one.full, **{**one.training, **training})
    retain_given = retain if method.uses_retain else []
    unlearn(knowing_model(), make_tiny_tokenizer(), forget, retain_given, config, method, lora=LORA)
    model = wrapped(read_result(output, one.full), make_tiny_tokenizer(), output)
    return knowledge(model, forget), knowledge(model, retain)


def test_every_method_has_an_expectation() -> None:
    assert EXPECTED.keys() == METHODS.keys()


def test_the_model_knows_and_the_control_does_nothing(tmp_path: Path) -> None:
    forget, retain = forget_and_retain()
    before = knowledge(knowing_model(), forget), knowledge(knowing_model(), retain)
    assert min(before) > -0.3, "the model must know what it is to forget"
    control = run("npo", EXPECTED["npo"], tmp_path, learning_rate=1e-12)
    assert control == pytest.approx(before, abs=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_moves_knowledge_as_it_says(name: str, tmp_path: Path) -> None:
    one = EXPECTED[name]
    forget, retain = forget_and_retain()
    before = knowledge(knowing_model(), forget), knowledge(knowing_model(), retain)
    after = run(name, one, tmp_path)
    for which, direction, was, now in zip(
        ("forget", "retain"), (one.forget, one.retain), before, after, strict=True
    ):
        told = f"{name}: {which} went from {was:.3f} to {now:.3f} nats a token"
        if direction == 0:
            assert abs(now - was) < one.slack, told
        elif direction is not None:
            assert direction * (now - was) > MOVED, told


@pytest.mark.parametrize("name", METHODS)
def test_a_card_is_complete(name: str) -> None:
    card = load_method(name).card
    for part in (card.title, card.source, card.idea, card.use_when, card.fails_when):
        assert len(part) > 2
    assert "arXiv" in card.source or "doi" in card.source.lower()
