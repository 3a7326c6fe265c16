"""Records to token ids and labels, one record at a time: no packing, no neighbours.

Labels are the ids where the loss counts and -100 elsewhere. An end-of-sequence token is appended
and learnt, so that answers stop.
"""

from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError

IGNORED = -100


class Example(NamedTuple):
    """One encoded record: equally long ids and labels, and whether it was cut."""

    record_id: str
    input_ids: list[int]
    labels: list[int]
    was_cut: bool


def encode(
    record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int, completion_only: bool
) -> Example:
    """Encode one record; too long ones are cut at the end.

    Args:
        completion_only: learn the completion (or the assistant's turns) only, where there is one.
    """
    if "messages" in record.content:
        ids, labels = _encode_chat(record, tokenizer, completion_only)
    elif "text" in record.content:
        ids = _with_eos(_tokenize(tokenizer, record.content["text"]), tokenizer)
        labels = list(ids)
    else:
        prompt = _without_eos(_tokenize(tokenizer, record.content["prompt"]), tokenizer)
        completion = _tokenize(tokenizer, record.content["completion"], add_special_tokens=False)
        completion = _with_eos(completion, tokenizer)
        ids = prompt + completion
        labels = [IGNORED] * len(prompt) + completion if completion_only else list(ids)
    return Example(record.id, ids[:max_length], labels[:max_length], was_cut=len(ids) > max_length)


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    return list(cast(list[int], tokenizer(text, **options)["input_ids"]))


def _without_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Some tokenizers end every text; a prompt goes on."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.eos_token_id is None or (ids and ids[-1] == tokenizer.eos_token_id):
        return ids
    return [*ids, cast(int, tokenizer.eos_token_id)]


def _encode_chat(
    record: Record, tokenizer: PreTrainedTokenizerBase, completion_only: bool
) -> tuple[list[int], list[int]]:
    if tokenizer.chat_template is None:
        raise UserError(
            "the records are chats, but the tokenizer has no chat template: use an instruct model"
        )

    def apply(messages: list[dict[str, str]], **options: Any) -> dict[str, list[int]]:
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, **options
        )
        return cast(dict[str, list[int]], encoded)

    messages = record.content["messages"]
    if not completion_only:
        ids = apply(messages)["input_ids"]
        return ids, list(ids)
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        encoded = apply(messages, return_assistant_tokens_mask=True)
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        return ids, [token if learnt else IGNORED for token, learnt in zip(ids, mask, strict=True)]
    # The template does not mark the assistant's turns: learn the last one, after all before it.
    prompt = apply(messages[:-1], add_generation_prompt=True)["input_ids"]
    ids = apply(messages)["input_ids"]
    if ids[: len(prompt)] != prompt:
        raise UserError(
            "the tokenizer's chat template changes earlier turns, so the answer cannot be told "
            "from the prompt: use --completion_only_loss false, or a template with {% generation %}"
        )
    return ids, [IGNORED] * len(prompt) + ids[len(prompt) :]


def check_lengths(examples: list[Example], max_length: int) -> str | None:
    """A warning if records were cut, None if all fit.

    Raises:
        UserError: a record keeps nothing to learn after the cut.
    """
    lost = [example for example in examples if all(label == IGNORED for label in example.labels)]
    if lost:
        raise UserError(
            f"{len(lost)} records have no token left to learn within --max_length {max_length}: raise it, "
            "or shorten their prompts"
        )
    cut = sum(example.was_cut for example in examples)
    return (
        f"{cut} of {len(examples)} records are longer than --max_length {max_length} tokens and are cut"
        if cut
        else None
    )
