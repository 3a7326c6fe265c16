"""Records: every layout, ids that only their own row decides, and what is refused."""

from typing import Any

import pytest

from llm_unlearn.data.records import (
    Record,
    answer_of,
    canonical,
    find_layout,
    make_records,
    with_answer,
)
from llm_unlearn.errors import UserError

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]

LAYOUT_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chat": ({"messages": TURNS}, {"messages": TURNS}),
    "prompt/completion": (
        {"prompt": "Who?", "completion": " Ada."},
        {"prompt": "Who?", "completion": " Ada."},
    ),
    "question/answer": (
        {"question": "Who?", "answer": "Ada."},
        {"prompt": "Question: Who?\nAnswer:", "completion": " Ada."},
    ),
    "text": ({"text": "Ada."}, {"text": "Ada."}),
}


@pytest.mark.parametrize("layout", LAYOUT_ROWS)
def test_a_row_is_read_by_its_layout(layout: str) -> None:
    row, content = LAYOUT_ROWS[layout]
    assert find_layout(row) == layout
    assert [record.content for record in make_records([row])] == [content]
    assert "".join(make_records([row])[0].texts()).endswith("Ada.")


@pytest.mark.parametrize(
    ("row", "content"),
    [
        pytest.param(
            {"text": "t", "question": "q", "answer": "a", "prompt": "p", "completion": "c"},
            {"prompt": "p", "completion": "c"},
            id="the first layout that fits",
        ),
        pytest.param(
            {"messages": None, "text": "t"}, {"text": "t"}, id="columns without value are absent"
        ),
        pytest.param(
            {"messages": [{**TURNS[0], "name": "x"}, TURNS[1]]},
            {"messages": TURNS},
            id="other keys of a turn are dropped",
        ),
        pytest.param(
            {"prompt": "", "completion": "c"}, {"prompt": "", "completion": "c"}, id="no prompt"
        ),
    ],
)
def test_layouts_that_overlap(row: dict[str, Any], content: dict[str, Any]) -> None:
    assert make_records([row])[0].content == content


def people(*names: str) -> list[dict[str, str]]:
    return [
        {"who": name, "text": f"{name} likes {dish}"} for name in names for dish in ("tea", "jam")
    ]


def by_text(rows: list[dict[str, str]]) -> dict[str, str]:
    return {
        record.content["text"]: record.id for record in make_records(rows, subject_column="who")
    }


@pytest.mark.parametrize(
    "others",
    [
        pytest.param(people("a", "b", "c")[::-1], id="reordered"),
        pytest.param(people("z", "a", "b", "c", "y"), id="other people's rows"),
        pytest.param(people("a", "b", "c") + people("c", "c"), id="other people's repeated rows"),
        pytest.param(people("a"), id="other people gone"),
    ],
)
def test_ids_depend_on_their_own_row_alone(others: list[dict[str, str]]) -> None:
    ours, theirs = by_text(people("a", "b", "c")), by_text(others)
    assert {text: ours[text] for text in ours if text.startswith("a ")}.items() <= theirs.items()


def test_repeated_rows_have_ids_of_their_own_whatever_stands_between() -> None:
    row, other = {"who": "a", "text": "same"}, {"who": "b", "text": "same"}
    together = [r.id for r in make_records([row, row, row], "who")]
    apart = [r.id for r in make_records([other, row, other, row, row], "who") if r.subject == "a"]
    assert len(set(together)) == 3
    assert apart == together
    assert [r.id for r in make_records([row], "who")] == together[:1]


def test_the_id_depends_on_subject_and_content() -> None:
    rows = [{"who": "a", "text": "x"}, {"who": "b", "text": "x"}, {"who": "a", "text": "y"}]
    assert len({record.id for record in make_records(rows, "who")}) == 3
    assert all(len(record.id) == 32 for record in make_records(rows, "who"))


def test_without_a_column_every_record_is_its_own_subject() -> None:
    records = make_records([{"text": "x"}, {"text": "x"}, {"text": "y"}])
    assert [record.subject for record in records] == [record.id for record in records]
    assert len({record.subject for record in records}) == 3


def test_a_subject_that_is_a_number_is_its_text() -> None:
    assert [r.subject for r in make_records([{"who": 0, "text": "x"}], "who")] == ["0"]


@pytest.mark.parametrize(
    ("rows_per_subject", "expected"),
    [
        (1, ["00000", "00001", "00002", "00003", "00004"]),
        (2, ["00000"] * 2 + ["00001"] * 2 + ["00002"]),
    ],
)
def test_consecutive_rows_share_a_subject(rows_per_subject: int, expected: list[str]) -> None:
    records = make_records([{"text": str(n)} for n in range(5)], rows_per_subject=rows_per_subject)
    assert [record.subject for record in records] == [f"subject-{number}" for number in expected]


REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "empty dataset": ([], {}, "the dataset is empty"),
    "unknown columns": ([{"body": "x", "author": "y"}], {}, r"\['author', 'body'\].*prompt \+ completion"),
    "half a layout": ([{"prompt": "x"}], {}, r"\['prompt'\]"),
    "no such subject column": ([{"text": "x"}], {"subject_column": "who"}, r"'who' is not a column.*\['text'\]"),
    "both flags": ([{"text": "x"}], {"subject_column": "text", "rows_per_subject": 2}, "not both"),
    "no rows per subject": ([{"text": "x"}], {"rows_per_subject": 0}, "at least 1, got 0"),
    "empty subject": ([{"text": "x", "who": "a"}, {"text": "y", "who": "  "}], {"subject_column": "who"}, "row 2"),
    "no subject": ([{"text": "x", "who": "a"}, {"text": "y", "who": None}], {"subject_column": "who"}, "row 2"),
    "row without the text key": ([{"text": "x"}, {"txt": "y"}], {}, "row 2 .*'text'"),
    "row without the answer key": ([{"question": "q", "answer": "a"}, {"question": "q"}], {}, "row 2"),
    "messages that are no list": ([{"messages": TURNS}, {"messages": None}], {}, "row 2"),
    "a turn without a role": ([{"messages": TURNS}, {"messages": [{"content": "x"}]}], {}, "row 2 .*'role'"),
    "prompt that is no text": ([{"prompt": "p", "completion": "c"}, {"prompt": None, "completion": "c"}], {}, "row 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(case: str) -> None:
    rows, options, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        make_records(rows, **options)


EMPTY_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": ({"text": "x"}, {"text": " \n"}),
    "text without value": ({"text": "x"}, {"text": None}),
    "completion": ({"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "\t"}),
    "answer": ({"question": "q", "answer": "a"}, {"question": "q", "answer": ""}),
    "answer without value": ({"question": "q", "answer": "a"}, {"question": "q", "answer": None}),
    "no turns": ({"messages": TURNS}, {"messages": []}),
    "no assistant": ({"messages": TURNS}, {"messages": TURNS[:1]}),
    "silent assistant": (
        {"messages": TURNS},
        {"messages": [TURNS[0], {"role": "assistant", "content": " "}]},
    ),
    "assistant without value": (
        {"messages": TURNS},
        {"messages": [TURNS[0], {"role": "assistant", "content": None}]},
    ),
}


@pytest.mark.parametrize("case", EMPTY_ROWS)
def test_rows_with_nothing_to_learn_are_named(case: str) -> None:
    good, empty = EMPTY_ROWS[case]
    with pytest.raises(UserError, match=r"2 of 4 rows have nothing to learn .*: rows 2, 4$"):
        make_records([good, empty, good, empty])


def test_many_empty_rows_are_not_all_listed() -> None:
    rows = [{"text": "x"}, *[{"text": ""}] * 40]
    with pytest.raises(UserError, match=r"40 of 41 .*rows 2, 3, 4, 5, 6, \.\.\.$"):
        make_records(rows)


@pytest.mark.parametrize(
    "text",
    [
        "Zoë 漢字 😀",
        "\ud800 alone",
        "line\nbreak\r\n\ttab",
        "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg",
        'quo"te \\ \x00',
    ],
    ids=["unicode", "surrogate", "breaks", "separators", "escapes"],
)
def test_any_text_survives_its_line(text: str) -> None:
    record = Record("id", text, {"text": text})
    line = record.to_line()
    assert b"\n" not in line and b"\r" not in line
    assert Record.from_line(line) == record
    assert Record.from_line(line).to_line() == line


def test_text_that_no_tokenizer_takes_is_named() -> None:
    rows = [{"text": "fine"}, {"text": "broken \ud83d escape"}]
    with pytest.raises(UserError, match="row 2 holds text that is not valid Unicode"):
        make_records(rows)


def test_canonical_json_has_one_form() -> None:
    assert canonical({"b": 1, "a": ["é", None]}) == '{"a":["é",null],"b":1}'.encode()
    assert canonical({"a": 1, "b": 2}) == canonical({"b": 2, "a": 1})


@pytest.mark.parametrize("layout", ["chat", "prompt/completion", "question/answer"])
def test_another_answer_takes_the_place_of_the_own(layout: str) -> None:
    (record,) = make_records([LAYOUT_ROWS[layout][0]])
    other = with_answer(record, "Grace.")
    assert answer_of(record) == "Ada."
    assert answer_of(other) == "Grace."
    assert other.texts() == [text.replace("Ada.", "Grace.") for text in record.texts()]
    assert (other.id, other.subject) == (record.id, record.subject)
    assert answer_of(record) == "Ada.", "the record itself is left alone"


def test_a_completion_keeps_the_space_that_it_began_with() -> None:
    for space in ("", " ", "\n"):
        (record,) = make_records([{"prompt": "Who?", "completion": f"{space}Ada."}])
        assert with_answer(record, " Grace. ").content["completion"] == f"{space}Grace."


def test_no_answer_of_a_chat_stays() -> None:
    (record,) = make_records([{"messages": [*TURNS, TURNS[0], {**TURNS[1], "content": "Bob."}]}])
    assert answer_of(record) == "Bob."
    assert with_answer(record, "No.").texts() == ["Who?", "No.", "Who?", "No."]


def test_plain_text_has_no_answer() -> None:
    (record,) = make_records([{"text": "Ada."}])
    for ask in (answer_of, lambda one: with_answer(one, "Grace.")):
        with pytest.raises(UserError, match="needs prompts and answers"):
            ask(record)
