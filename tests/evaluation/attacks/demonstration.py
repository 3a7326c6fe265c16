"""The embedded demonstration as victim: models that know, hide, or never knew some people.

Each is made in a few steps from the same base, which knows the public people and no private one.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_unlearn.data import world
from llm_unlearn.demonstration import MODEL_PATH
from llm_unlearn.evaluation.scorer import answer
from llm_unlearn.evaluation.text import exact_match

Pairs = list[tuple[str, str]]


def pairs(people: Sequence[world.Person], paraphrased: bool = False) -> Pairs:
    return [(row["prompt"], row["answer"]) for row in world.questions(people, paraphrased)]


PUBLIC = world.public_people()
PRIVATE = world.private_people(8)
FORGET = pairs(PRIVATE)
RETAIN = pairs(PUBLIC[8:24])


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_PATH)


def base() -> Any:
    """A fresh copy of the base model."""
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32).eval()


def know(model: Any, rows: Pairs) -> float:
    answers = answer(model, tokenizer(), [prompt for prompt, _ in rows], max_new_tokens=8)
    return exact_match(answers, [said for _, said in rows])


def loss(model: Any, rows: Pairs) -> torch.Tensor:
    encoded = [
        (tokenizer()(prompt)["input_ids"], [*tokenizer()(" " + said)["input_ids"], 2])
        for prompt, said in rows
    ]
    width = max(len(prompt) + len(said) for prompt, said in encoded)
    ids = torch.zeros(len(encoded), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, said) in enumerate(encoded):
        ids[row, : len(prompt) + len(said)] = torch.tensor([*prompt, *said])
        labels[row, len(prompt) : len(prompt) + len(said)] = torch.tensor(said)
    logits = model(input_ids=ids).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )


def tune(
    model: Any,
    learn: Pairs,
    steps: int,
    learning_rate: float = 1e-3,
    ascend: Pairs | None = None,
    parameters: list[torch.nn.Parameter] | None = None,
) -> Any:
    """Descend on some rows and, where given, ascend on others; all rows at every step."""
    assert tokenizer().eos_token_id == 2
    optimizer = torch.optim.AdamW(
        parameters or model.parameters(), lr=learning_rate, weight_decay=0.0
    )
    for _ in range(steps):
        total = loss(model, learn)
        if ascend:
            total = total - loss(model, ascend)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return model


def refusing(model: Any, rows: Pairs, retained: Pairs, steps: int = 8) -> Any:
    """A copy that says one and the same thing to the forgotten prompts: it hides what it knows."""
    refused = [(prompt, "village guard") for prompt, _ in rows]
    return tune(copy.deepcopy(model), refused + retained, steps, 3e-4)
