"""Records to ids and labels: where the loss counts, how answers stop, what is cut."""

import copy
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llm_unlearn.data.encoding import IGNORED, Example, check_lengths, encode
from llm_unlearn.data.records import make_records
from llm_unlearn.errors import UserError
from tests.tiny import make_tiny_tokenizer

PAIR = {"prompt": "what does person 1 eat?", "completion": " dish number 7."}
TEXT = {"text": "person 1 eats dish number 7."}
CHAT = {
    "messages": [
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "dish 1"},
        {"role": "user", "content": "and person 2?"},
        {"role": "assistant", "content": "dish 2"},
    ]
}
UNMARKED = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
FORGETFUL = "{% for m in messages %}{{ '<s>' + m['role'] + loop.revindex|string + m['content'] }}{% endfor %}"


def tokenizer_like(kind: str = "plain") -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(make_tiny_tokenizer())
    if kind == "adds both ends":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # pyright: ignore
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    elif kind == "without bos":
        tokenizer.bos_token = None
    elif kind == "pad is eos":
        tokenizer.pad_token = tokenizer.eos_token
    elif kind == "without eos":
        tokenizer.eos_token = None
    else:
        assert kind == "plain"
    return tokenizer


def encoded(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, length: int = 999, only: bool = True
) -> Example:
    return encode(make_records([row])[0], tokenizer, length, completion_only=only)


def learnt(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    assert len(example.input_ids) == len(example.labels)
    pairs = list(zip(example.input_ids, example.labels, strict=True))
    assert all(label in (IGNORED, token) for token, label in pairs)
    return tokenizer.decode([label for _, label in pairs if label != IGNORED])


@pytest.mark.parametrize("kind", ["plain", "without bos", "pad is eos"])
def test_the_completion_alone_is_learnt_with_its_end(kind: str) -> None:
    tokenizer = tokenizer_like(kind)
    example = encoded(PAIR, tokenizer)
    assert learnt(example, tokenizer) == PAIR["completion"] + "</s>"
    assert tokenizer.decode(example.input_ids) == PAIR["prompt"] + PAIR["completion"] + "</s>"
    assert not example.was_cut


@pytest.mark.parametrize("row", [PAIR, TEXT, CHAT], ids=["pair", "text", "chat"])
def test_full_labels_are_the_ids(row: dict[str, Any]) -> None:
    example = encoded(row, tokenizer_like(), only=False)
    assert example.labels == example.input_ids


def test_a_text_is_learnt_whole_whatever_the_flag() -> None:
    tokenizer = tokenizer_like()
    assert learnt(encoded(TEXT, tokenizer), tokenizer) == TEXT["text"] + "</s>"
    assert encoded(TEXT, tokenizer, only=True) == encoded(TEXT, tokenizer, only=False)


@pytest.mark.parametrize("row", [PAIR, TEXT], ids=["pair", "text"])
@pytest.mark.parametrize(
    ("kind", "ending"),
    [("plain", ""), ("plain", "</s>"), ("adds both ends", ""), ("pad is eos", "")],
    ids=["plain", "ended by the data", "adds both ends", "pad is eos"],
)
def test_the_end_token_comes_once_and_last(row: dict[str, str], kind: str, ending: str) -> None:
    last = list(row)[-1]
    tokenizer = tokenizer_like(kind)
    example = encoded({**row, last: row[last] + ending}, tokenizer)
    assert [i for i, token in enumerate(example.input_ids) if token == 2] == [
        len(example.input_ids) - 1
    ]
    assert example.labels[-1] == 2
    assert example.input_ids.count(1) == (kind == "adds both ends")


def test_a_tokenizer_without_an_end_token_appends_nothing() -> None:
    tokenizer = tokenizer_like("without eos")
    assert learnt(encoded(PAIR, tokenizer), tokenizer) == PAIR["completion"]


def test_a_chat_with_generation_marks_learns_every_answer() -> None:
    tokenizer = tokenizer_like()
    assert learnt(encoded(CHAT, tokenizer), tokenizer) == "dish 1</s>dish 2</s>"


def test_a_chat_without_marks_learns_the_last_answer() -> None:
    tokenizer = tokenizer_like()
    tokenizer.chat_template = UNMARKED
    assert learnt(encoded(CHAT, tokenizer), tokenizer) == "dish 2</s>"


@pytest.mark.parametrize(
    ("template", "message"), [(None, "no chat template"), (FORGETFUL, "changes earlier turns")]
)
def test_chats_that_cannot_be_encoded(template: str | None, message: str) -> None:
    tokenizer = tokenizer_like()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        encoded(CHAT, tokenizer)


def test_pairs_need_no_chat_template() -> None:
    tokenizer = tokenizer_like()
    tokenizer.chat_template = None
    assert learnt(encoded(PAIR, tokenizer), tokenizer) == PAIR["completion"] + "</s>"


def test_too_long_records_are_cut_at_the_end_and_counted() -> None:
    tokenizer = tokenizer_like()
    whole = encoded(PAIR, tokenizer)
    length = len(whole.input_ids)
    assert check_lengths([whole], length) is None
    assert encoded(PAIR, tokenizer, length) == whole
    cut = encoded(PAIR, tokenizer, length - 1)
    assert cut.was_cut
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:-1], whole.labels[:-1])
    warning = check_lengths([cut, whole, whole], length - 1)
    assert warning is not None and warning.startswith("1 of 3 records are longer than --max_length")


@pytest.mark.parametrize("spare", [0, -1])
def test_a_prompt_that_leaves_nothing_to_learn_is_an_error(spare: int) -> None:
    tokenizer = tokenizer_like()
    room = len(tokenizer(PAIR["prompt"])["input_ids"]) + spare
    lost, fine = encoded(PAIR, tokenizer, room), encoded(PAIR, tokenizer)
    with pytest.raises(UserError, match=f"^1 records have no token left .* --max_length {room}"):
        check_lengths([fine, lost], room)
    assert check_lengths([encoded(PAIR, tokenizer, room, only=False)], room) is not None


def test_one_learnt_token_is_enough() -> None:
    tokenizer = tokenizer_like()
    room = len(tokenizer(PAIR["prompt"])["input_ids"]) + 1
    example = encoded(PAIR, tokenizer, room)
    assert sum(label != IGNORED for label in example.labels) == 1
    assert check_lengths([example], room) is not None


def test_a_record_is_encoded_alone() -> None:
    tokenizer = tokenizer_like()
    alone = encoded(PAIR, tokenizer)
    tokenizer(["x" * 500, "y"], padding=True)
    assert encoded(PAIR, tokenizer) == alone
    assert alone.record_id == make_records([PAIR])[0].id
