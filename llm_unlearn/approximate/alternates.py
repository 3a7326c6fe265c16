"""Alternate answers to forget prompts: read from a file, or made up by the model itself."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from llm_unlearn.approximate.session import Session
from llm_unlearn.data.records import QUESTION_TEMPLATE, Record, answer_of
from llm_unlearn.data.sources import read_rows
from llm_unlearn.errors import UserError

INSTRUCTION = (
    "Now make up another answer to the same question. It is to be as plausible as the one above and "
    "to state different facts. Say nothing else."
)
CUE = "Another answer:"
ATTEMPTS = 4  # at ever higher temperatures, where the model only repeats what it knows
AT_ONCE = 8  # prompts


def read_alternates(path: str, forget: Sequence[Record]) -> list[list[str]]:
    """The alternates of each forget record, from a file with a column `alternate`.

    Rows with a `prompt` or `question` belong to the records with that prompt, several rows to one
    record; without, rows are in the order of the forget set. An alternate is a text or a list.

    Raises:
        UserError: a column or a record's alternate is missing.
    """
    rows = read_rows(path)
    if not rows or any("alternate" not in row for row in rows):
        raise UserError(f"--alternates {path}: every row needs a column 'alternate'")
    key = next((name for name in ("prompt", "question") if name in rows[0]), None)
    if key is None:
        if len(rows) != len(forget):
            raise UserError(
                f"--alternates {path} has {len(rows)} rows for {len(forget)} forget records: give one "
                "each in their order, or a column 'prompt'"
            )
        return [_texts(row["alternate"]) for row in rows]
    known: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        known[_key(str(row.get(key, "")))] += _texts(row["alternate"])
    found = [_known(known, prompt_of(record)) for record in forget]
    if missing := sum(not texts for texts in found):
        raise UserError(
            f"--alternates {path} has none for {missing} of {len(forget)} forget records"
        )
    return found


def prompt_of(record: Record) -> str:
    """What is asked: the prompt, or the last user turn."""
    if "messages" in record.content:
        asked = [m["content"] for m in record.content["messages"] if m["role"] == "user"]
        return asked[-1] if asked else ""
    return str(record.content.get("prompt", ""))


def _known(known: dict[str, list[str]], prompt: str) -> list[str]:
    """By the prompt, or by the question that our own template made a prompt of."""
    by_question = {_key(QUESTION_TEMPLATE.format(question=one)): one for one in known}
    return known.get(_key(prompt)) or known.get(by_question.get(_key(prompt), ""), [])


def _key(prompt: str) -> str:
    return " ".join(prompt.split())


def _texts(value: Any) -> list[str]:
    texts = [str(one).strip() for one in (value if isinstance(value, list) else [value])]
    if not texts or not all(texts):
        raise UserError("--alternates: an alternate is empty")
    return texts


@torch.no_grad()
def make_up(session: Session, count: int, temperature: float) -> list[list[str]]:
    """`count` alternates for each forget record, sampled from the model as it is now.

    The model is shown the prompt with its answer and told to answer otherwise. What is empty or says
    the same as the answer is drawn again at a higher temperature.

    Raises:
        UserError: the model says nothing else.
    """
    prompts = [_asking(session, record) for record in session.forget]
    own = [_plain(answer_of(record)) for record in session.forget]
    found: list[list[str]] = [[] for _ in prompts]
    model, was_training = session.model, session.model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(session.config.seed)
        for attempt in range(ATTEMPTS):
            wanted = [number for number, texts in enumerate(found) if len(texts) < count]
            for start in range(0, len(wanted), AT_ONCE):
                part = wanted[start : start + AT_ONCE]
                heat = temperature * (1 + attempt / 2)
                drawn = _sample(session, [prompts[number] for number in part], count, heat)
                for number, texts in zip(part, drawn, strict=True):
                    new = [text for text in texts if text and _plain(text) != own[number]]
                    found[number] = (found[number] + new)[:count]
    model.train(was_training)
    if missing := sum(len(texts) < count for texts in found):
        raise UserError(
            f"the model makes up no other answer to {missing} of {len(found)} forget prompts: give "
            "--alternates FILE"
        )
    return found


def _asking(session: Session, record: Record) -> list[int]:
    """Ids of the prompt that asks for another answer; its end is kept where it is too long."""
    tokenizer, limit = session.tokenizer, session.config.max_length
    if "messages" in record.content:
        turns = [*record.content["messages"], {"role": "user", "content": INSTRUCTION}]
        encoded = tokenizer.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])[-limit:]
    prompt, answer = prompt_of(record), record.content["completion"]
    text = f"{prompt}{answer}\n\n{INSTRUCTION}\n{CUE}"
    ids = list(tokenizer(text)["input_ids"])
    return (ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids)[-limit:]


def _sample(
    session: Session, prompts: Sequence[list[int]], count: int, temperature: float
) -> list[list[str]]:
    from transformers import GenerationConfig

    tokenizer, pad = session.tokenizer, session.pad_token_id
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    longest = max(sum(label >= 0 for label in one.labels) for one in session.sides["forget"])
    output = session.model.generate(
        input_ids=torch.tensor(ids, device=session.model.device),
        attention_mask=torch.tensor(mask, device=session.model.device),
        generation_config=GenerationConfig(
            max_new_tokens=2 * longest,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=count,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        ),
    )
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    first = [text.strip().split("\n")[0].strip() for text in texts]
    return [first[start : start + count] for start in range(0, len(first), count)]


def _plain(answer: str) -> str:
    return " ".join(answer.casefold().split())
