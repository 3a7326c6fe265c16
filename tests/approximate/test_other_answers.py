"""Methods that teach another answer: refusals, alternates, others' answers."""

import json
import math
from pathlib import Path

import pytest
import torch

from llm_unlearn.approximate.alternates import make_up, read_alternates
from llm_unlearn.approximate.methods.idk_ap import answer_preservation_loss
from llm_unlearn.approximate.methods.idk_dpo import dpo_loss
from llm_unlearn.approximate.methods.random_label import mismatched
from llm_unlearn.approximate.refusals import REFUSALS, read_refusals, refused
from llm_unlearn.approximate.session import Session
from llm_unlearn.approximate.tuning import tune
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.data.records import answer_of, make_records
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.text import REFUSAL
from tests.approximate.known import (
    LORA,
    arguments,
    forget_and_retain,
    knowing_model,
    knowledge,
    read_result,
)
from tests.tiny import make_tiny_tokenizer


def of(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_dpo_by_hand() -> None:
    # Margin (-3 - -5) - (-4 - -1) = 5; beta 0.5: -(2 / 0.5) log sigmoid(2.5).
    (value,) = dpo_loss(of(-3.0), of(-5.0), of(-4.0), of(-1.0), 0.5)
    assert float(value) == pytest.approx(4 * math.log1p(math.exp(-2.5)), rel=1e-5)
    (agree,) = dpo_loss(of(-3.0), of(-3.0), of(-4.0), of(-4.0), 0.1)
    assert float(agree) == pytest.approx(20 * math.log(2), rel=1e-5)


def test_dpo_raises_the_preferred_and_lowers_the_rejected_answer() -> None:
    preferred, rejected = of(-3.0).requires_grad_(), of(-4.0).requires_grad_()
    dpo_loss(preferred, of(-3.0), rejected, of(-4.0), 0.1).sum().backward()
    # At the start the weight is 2 sigmoid(0) = 1, as NPO's.
    assert float(preferred.grad) == pytest.approx(-1.0)  # pyright: ignore[reportArgumentType]
    assert float(rejected.grad) == pytest.approx(1.0)  # pyright: ignore[reportArgumentType]


def test_answer_preservation_by_hand() -> None:
    (value,) = answer_preservation_loss(of(-2.0), of(-12.0), 0.1)
    assert float(value) == pytest.approx(10 * math.log1p(math.exp(-1)), rel=1e-5)
    (equal,) = answer_preservation_loss(of(-2.0), of(-2.0), 0.1)
    assert float(equal) == pytest.approx(10 * math.log(2), rel=1e-5)
    assert float(answer_preservation_loss(of(0.0), of(-1000.0), 0.1)) < 1e-6


def test_our_refusals_are_what_the_evaluation_calls_refusals() -> None:
    missed = [text for text in REFUSALS if not REFUSAL.search(text.lower())]
    assert not missed
    assert len(set(REFUSALS)) == 25


def test_refusals_are_drawn_by_seed_and_record() -> None:
    forget, _ = forget_and_retain()
    drawn = refused(forget, None, 0)
    assert drawn == refused(forget, None, 0)
    assert drawn[2:] == refused(forget[2:], None, 0), "no other record decides"
    assert drawn != refused(forget, None, 1)
    assert {answer_of(record) for record in drawn} <= set(REFUSALS)
    assert len({answer_of(record) for record in drawn}) > 1
    assert [r.content["prompt"] for r in drawn] == [r.content["prompt"] for r in forget]


def test_refusals_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "refusals.txt"
    path.write_text("No comment.\n\n  Ask somebody else. \n")
    assert read_refusals(str(path)) == ["No comment.", "Ask somebody else."]
    path.write_text("\n \n")
    with pytest.raises(UserError, match="empty"):
        read_refusals(str(path))
    with pytest.raises(UserError, match="cannot read"):
        read_refusals(str(tmp_path / "none.txt"))


def test_others_answers_are_never_the_own() -> None:
    # Two of three say the same in other words: they can only take the third's answer.
    rows = [("a", " Tea"), ("b", " tea "), ("c", " jam")]
    records = make_records([{"prompt": p, "completion": c} for p, c in rows])
    wrong = [answer_of(record) for record in mismatched(records, records, 0)]
    assert wrong[:2] == ["jam", "jam"]
    assert wrong[2].lower() == "tea"
    with pytest.raises(UserError, match="same answer"):
        mismatched(records[:2], records[:2], 0)


@pytest.mark.parametrize("source", ["retain", "forget"])
def test_others_answers_come_from_where_they_are_told_to(source: str) -> None:
    forget, retain = forget_and_retain()
    sides = make_method("random_label", {"answers_from": source}).sides(session(forget, retain))
    known = {answer_of(record) for record in (retain if source == "retain" else forget)}
    for record, other in zip(forget, sides["forget/other"], strict=True):
        assert answer_of(other) in known
        assert answer_of(other) != answer_of(record)
    with pytest.raises(UserError, match="retain or forget"):
        make_method("random_label", {"answers_from": "nowhere"})


def session(forget: list, retain: list) -> Session:
    tuned = tune(knowing_model(), LORA, False, None, 0)
    config = arguments(Path("unused"), "altpo")
    made = Session(tuned, make_tiny_tokenizer(), forget, retain, config, Path("unused"))
    made.sides["forget"] = made.encode(forget)
    return made


def test_alternates_in_the_order_of_the_forget_set(tmp_path: Path) -> None:
    forget, _ = forget_and_retain()
    path = tmp_path / "alternates.jsonl"
    path.write_text("\n".join(json.dumps({"alternate": f"dish {n}"}) for n in range(len(forget))))
    assert read_alternates(str(path), forget) == [[f"dish {n}"] for n in range(len(forget))]
    with pytest.raises(UserError, match="8 rows for 7"):
        read_alternates(str(path), forget[:-1])


@pytest.mark.parametrize("key", ["prompt", "question"])
def test_alternates_by_prompt(key: str, tmp_path: Path) -> None:
    forget = make_records([{"question": f"Who is {n}?", "answer": f"{n}"} for n in "ab"])
    asked = {"prompt": "Question: Who is {}?\nAnswer:", "question": "Who is {}?"}[key]
    rows = [{key: asked.format(n), "alternate": text} for n, text in ("bx", "ay", "bz")]
    path = tmp_path / "alternates.json"
    path.write_text(json.dumps(rows))
    assert read_alternates(str(path), forget) == [["y"], ["x", "z"]]
    path.write_text(json.dumps(rows[:1]))
    with pytest.raises(UserError, match="none for 1 of 2"):
        read_alternates(str(path), forget)
    path.write_text(json.dumps([{key: "Who?"}]))
    with pytest.raises(UserError, match="column 'alternate'"):
        read_alternates(str(path), forget)


def test_the_model_makes_up_other_answers() -> None:
    forget, retain = forget_and_retain()
    one = session(forget[:3], retain)
    made = make_up(one, 4, 1.0)
    assert [len(texts) for texts in made] == [4, 4, 4]
    for record, texts in zip(forget, made, strict=False):
        assert all(text.strip() and text != answer_of(record) for text in texts)
    assert made == make_up(one, 4, 1.0), "the seed decides"


def test_a_model_that_only_repeats_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    forget, retain = forget_and_retain()
    monkeypatch.setattr(
        "llm_unlearn.approximate.alternates._sample",
        lambda _, prompts, count, __: [[answer_of(forget[0]).upper()] * count] * len(prompts),
    )
    with pytest.raises(UserError, match="no other answer to 1 of 1"):
        make_up(session(forget[:1], retain), 2, 1.0)


def test_alternates_take_turns_by_epoch() -> None:
    method = make_method("altpo", {"number_of_alternates": 3})

    class Named:
        def __init__(self, epoch: int):
            self.epoch = epoch

        def __getitem__(self, name: str) -> str:
            return name

    turns = [method.preferred(Named(epoch)) for epoch in range(4)]  # pyright: ignore
    assert turns == [f"forget/alternate{n}" for n in (0, 1, 2, 0)]


def test_given_alternates_replace_the_answers_and_little_else(tmp_path: Path) -> None:
    forget, retain = forget_and_retain()
    path = tmp_path / "alternates.jsonl"
    others = mismatched(forget, retain, 0)
    rows = [{"prompt": r.content["prompt"], "alternate": answer_of(r)} for r in others]
    path.write_text("\n".join(map(json.dumps, rows)))
    method = make_method("altpo", {"alternates": str(path)})
    config = arguments(tmp_path / "out", "altpo", num_train_epochs=10)
    unlearn(
        knowing_model(), make_tiny_tokenizer(), forget, retain, config, method=method, lora=LORA
    )
    model, before = read_result(tmp_path / "out", False), knowing_model()
    assert knowledge(model, forget) < knowledge(before, forget) - 1
    assert knowledge(model, others) > knowledge(before, others) + 0.5
    assert abs(knowledge(model, retain) - knowledge(before, retain)) < 0.5
