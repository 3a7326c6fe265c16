"""Replacement: the step is the paper's sum, and private spans go while the rest stays."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_unlearn.approximate.methods.replacement import read_private, redacted
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError
from tests.approximate.known import (
    LORA,
    arguments,
    forget_and_retain,
    knowing_model,
    knowledge,
    read_result,
)
from tests.tiny import make_tiny_tokenizer

PRIVATE, PLACEHOLDER = Path(__file__).with_name("private.txt"), " and none"
WHOLE = {"gradient_accumulation_steps": 1_000_000, "lr_scheduler_type": "constant", "optim": "sgd"}
FLAGS = {"redact": str(PRIVATE), "placeholder": PLACEHOLDER}


def test_texts_and_patterns_are_redacted_and_longer_ones_first(tmp_path: Path) -> None:
    path = tmp_path / "private.txt"
    path.write_text("Ann\n\nAnn B. (x)\n/\\d{3}-\\d+/\n")
    private = read_private(path)
    assert redacted("Ann B. (x), Ann, 555-1, AnnB", private, "_") == "_, _, _, _B"
    chat = {"messages": [{"role": "Ann", "content": "I am Ann"}]}
    assert redacted(chat, private, r"\1") == {"messages": [{"role": "Ann", "content": r"I am \1"}]}


def sum_of_losses(model: Any, records: list[Record]) -> torch.Tensor:
    """Of the completions' tokens, one row at a time, by Transformers' own loss."""
    from llm_unlearn.data.encoding import encode

    total = torch.zeros(())
    for record in records:
        example = encode(record, make_tiny_tokenizer(), 64, True)
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        count = sum(label >= 0 for label in example.labels)
        total = total + model(input_ids=ids, labels=labels).loss * count
    return total


def replaced(forget: list[Record]) -> list[Record]:
    made = []
    for record in forget:
        head = record.content["completion"].split(" and ")[0]
        content = {**record.content, "completion": head + PLACEHOLDER}
        made.append(Record(record.id, record.subject, content))
    return made


@pytest.mark.parametrize("rows", [8, 3])
def test_one_step_is_tau_times_the_difference_of_sums(rows: int, tmp_path: Path) -> None:
    """Whatever the batches: 3 do not divide the 8 records."""
    forget, _ = forget_and_retain()
    model, tau = knowing_model(), 1e-5
    model.requires_grad_(True)
    (sum_of_losses(model, replaced(forget)) - sum_of_losses(model, forget)).backward()
    wanted = {n: (p - tau * p.grad).detach() for n, p in model.named_parameters()}
    config = arguments(
        tmp_path, "replacement", full=True, learning_rate=tau, num_train_epochs=1,
        per_device_train_batch_size=rows, **WHOLE,
    )  # fmt: skip
    given, method = knowing_model(), make_method("replacement", FLAGS)
    report = unlearn(given, make_tiny_tokenizer(), forget, [], config, method)
    assert report.steps == 1
    start = dict(knowing_model().named_parameters())
    for name, parameter in given.named_parameters():
        change = wanted[name] - start[name]
        assert torch.allclose(parameter - start[name], change, rtol=1e-2, atol=1e-7), name
        assert change.abs().max() > 1e-6


def said(model: Any, prompt: str, text: str) -> float:
    """Mean log-probability of a text's tokens after a prompt."""
    tokenizer = make_tiny_tokenizer()
    start, ids = tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([start + ids])).logits[0]
    log_TV = logits[len(start) - 1 : -1].log_softmax(-1)
    return float(log_TV.gather(1, torch.tensor(ids)[:, None]).mean())


@pytest.mark.parametrize(("full", "tau"), [(False, 1e-4), (True, 1e-5)])
def test_the_private_span_goes_the_placeholder_comes_and_the_rest_stays(
    full: bool, tau: float, tmp_path: Path
) -> None:
    """With the default five steps at the default rate."""
    forget, retain = forget_and_retain()
    config = arguments(tmp_path, "replacement", full=full, learning_rate=tau, **WHOLE)
    method = make_method("replacement", FLAGS)
    unlearn(knowing_model(), make_tiny_tokenizer(), forget, [], config, method, lora=LORA)
    moved = {"private": 0.0, "placeholder": 0.0, "rest": 0.0}
    for sign, model in ((-1, knowing_model()), (1, read_result(tmp_path, full))):
        for record in forget:
            head, tail = record.content["completion"].split(" and ")
            prompt = record.content["prompt"]
            moved["private"] += sign * said(model, prompt + head, f" and {tail}") / len(forget)
            moved["placeholder"] += sign * said(model, prompt + head, PLACEHOLDER) / len(forget)
            moved["rest"] += sign * said(model, prompt, head) / len(forget)
    kept = knowledge(read_result(tmp_path, full), retain) - knowledge(knowing_model(), retain)
    assert moved["private"] < -0.2, moved
    assert moved["placeholder"] > 0.4, moved
    assert abs(moved["rest"]) < 0.5 * abs(moved["private"]), moved
    assert abs(kept) < 0.1, kept


def test_replacements_come_from_a_file_in_order(tmp_path: Path) -> None:
    forget, _ = forget_and_retain()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r.content) + "\n" for r in replaced(forget)))
    found = {}
    for name, flags in (("file", {"replacements": str(path)}), ("redact", FLAGS)):
        config = arguments(tmp_path / name, "replacement", full=True, learning_rate=1e-5, **WHOLE)
        model = knowing_model()
        method = make_method("replacement", flags)
        unlearn(model, make_tiny_tokenizer(), forget, [], config, method)
        found[name] = model.lm_head.weight.detach().clone()
    assert torch.equal(found["file"], found["redact"])


def test_mistakes_are_told(tmp_path: Path) -> None:
    forget, _ = forget_and_retain()
    with pytest.raises(UserError, match="either"):
        make_method("replacement")
    private = tmp_path / "private.txt"
    for text, message in (("\n", "names nothing"), ("/(/\n", "regular expression")):
        private.write_text(text)
        with pytest.raises(UserError, match=message):
            read_private(private)
    private.write_text("nobody at all\n")
    config = arguments(tmp_path / "out", "replacement", full=True)
    method = make_method("replacement", {"redact": str(private)})
    with pytest.raises(UserError, match="nothing to replace"):
        unlearn(knowing_model(), make_tiny_tokenizer(), forget, [], config, method)
