"""What a model knows: greedy answers to questions, and exact match with the facts."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int = 32,
    batch_size: int = 64,
) -> list[str]:
    """Greedy answers of a model, a PEFT adapter or an ensemble to some prompts, in order."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(
            prompts[start : start + batch_size], return_tensors="pt", padding=True
        ).to(model.device)
        with torch.no_grad():
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers += tokenizer.batch_decode(
            output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return answers


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers equal to their reference, up to surrounding white space; in [0, 1].

    Raises:
        ValueError: nothing to score, or not as many answers as references.
    """
    if not references or len(answers) != len(references):
        raise ValueError(
            f"expected as many answers as references, at least one: {len(answers)}, {len(references)}"
        )
    return sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True)) / len(
        references
    )
