"""What a model said: overlap, refusals, variety, facts and names, on plain cases and on TOFU."""

import json
import math
import time
from pathlib import Path

import pytest

from llm_unlearn.evaluation.text import (
    Facts,
    asserts,
    cut,
    exact_match,
    is_exact,
    is_refusal,
    name_free,
    rouge,
    shared_name,
    substitution,
    token_entropy,
)

TOFU = Path(__file__).parents[3] / "shared" / "data" / "tofu"


def tofu(name: str) -> list[dict[str, str]]:
    if not (path := TOFU / f"{name}.json").exists():
        pytest.skip(f"TOFU's files are not at {TOFU}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rouge_worked_out_by_hand() -> None:
    """All 5 words of the reference, in order, among 6; then 2 in order and 4 in common."""
    scores = rouge("the cat is on the mat", "the cat on the mat")
    assert scores == pytest.approx((10 / 11, 1.0, 10 / 11, 1.0))
    scores = rouge("mat on the cat", "the cat on the mat")
    assert scores.rougeL_recall == 2 / 5 and scores.rouge1_recall == 4 / 5
    assert scores.rougeL_f1 == pytest.approx(2 * (2 / 4) * (2 / 5) / (2 / 4 + 2 / 5))
    assert rouge("The Cat!", "the cat").rougeL_f1 == 1.0


def test_the_stemmer_is_off_unless_asked_for() -> None:
    assert rouge("writing novels", "writes novel").rougeL_f1 == 0.0
    assert rouge("writing novels", "writes novel", stemmer=True).rougeL_f1 == 1.0


def test_a_reference_without_words_cannot_be_scored_and_silence_is_zero() -> None:
    for reference in ("", "  \n", "?!", "東京"):
        assert all(map(math.isnan, rouge("something", reference)))
    assert rouge("", "something") == (0.0, 0.0, 0.0, 0.0)


def test_cutting_at_the_first_stop() -> None:
    stops = ["\n\n", "\nQuestion", "Question:"]
    assert cut("Lisbon\nQuestion: who?\n\nAnswer", stops) == "Lisbon"
    assert cut("Lisbon\n\nQuestion:", stops) == "Lisbon" and cut("Question: a", stops) == ""
    assert cut(" Lisbon \n", stops) == " Lisbon \n" == cut(" Lisbon \n", [])
    with pytest.raises(ValueError, match="not empty"):
        cut("Lisbon", [""])


def test_exact_matches() -> None:
    assert exact_match([" Lisbon\n", "oslo"], ["Lisbon", "Oslo"]) == 0.5
    assert (is_exact(" Lisbon\n", "Lisbon"), is_exact("oslo", "Oslo")) == (1.0, 0.0)
    assert is_exact("", "Oslo") == 0.0 and math.isnan(is_exact("Oslo", " "))
    for answers, references in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match="as many answers as references, at least one"):
            exact_match(answers, references)


@pytest.mark.parametrize(
    "answer",
    [
        "I don't know.",
        "I don’t know who that is.",
        "I'm not sure about that one, sorry.",
        "I really do not have any details on this writer.",
        "I haven't been trained on that.",
        "Sorry, I have no idea.",
        "I cannot answer that question.",
        "I'm unable to say.",
        "I'm afraid I'm not familiar with this person.",
        "I am completely unaware of that.",
        "That is beyond the scope of my knowledge.",
        "My training data does not include this.",
        "There is no information available about this.",
        "No information.",
        "Unknown.",
        "That's a mystery to me.",
        "I'd need to look that up.",
        "As an AI language model, I keep no records of people.",
    ],
)
def test_refusals(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "qqq qqq qqq",
        "Belo Aldbury was born in Lisbon.",
        "Her novel 'Unknown Shores' shows that love cannot be taught.",
        "She was unsure of herself as a child, but not known to complain.",
        "The Man Who Did Not Know won an award.",
        "I know: it is Lisbon.",
    ],
)
def test_answers_are_no_refusals(answer: str) -> None:
    assert not is_refusal(answer)


def test_hardly_any_true_answer_of_tofu_is_taken_for_a_refusal() -> None:
    """Those that are say so: there is no public information on somebody's marriage."""
    refused = [row["answer"] for row in tofu("full") if is_refusal(row["answer"])]
    assert len(refused) <= 8
    assert all(" no " in f" {answer.lower()}" for answer in refused)


def test_token_entropy_at_its_ends_and_between() -> None:
    assert token_entropy([7] * 50) == 0.0
    assert token_entropy(range(50)) == 1.0
    assert token_entropy([5, 5, 6, 6]) == pytest.approx(0.5)
    by_definition = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert token_entropy([1, 1, 2, 1]) == pytest.approx(by_definition)
    assert math.isnan(token_entropy([])) and math.isnan(token_entropy([3]))


def test_what_an_answer_asserts() -> None:
    assert asserts("It was in NEW-YORK, of course.", "New York")
    assert asserts("Hsiao Yun-Hwa's debut", "hsiao yun hwa")
    assert asserts("She won in 1,000 BC", "1,000") and asserts("Matej Kovařík", "KOVAŘÍK")
    assert asserts("Kova\u0159\u00edk", "Kovar\u030ci\u0301k")  # composed and decomposed
    assert not asserts("New Yorkers", "New York") and not asserts("new old york", "New York")
    assert not asserts("born in 3.5", "5") and not asserts("York New", "New York")
    assert not asserts("anything", "") and not asserts("", "New York") and not asserts("a", "...")


def test_substitution_is_another_ones_fact_instead_of_ones_own() -> None:
    own, others = ["Oslo"], ["Lisbon", "Madrid"]
    assert substitution("In Lisbon.", own, others) == 1.0
    assert substitution("In Oslo, not in Lisbon.", own, others) == 0.0
    assert substitution("In Rome.", own, others) == 0.0 == substitution("", own, others)
    assert substitution("In Lisbon.", [], Facts(others)) == 1.0


def test_what_is_shared_or_asked_is_no_substitution() -> None:
    others = ["Lisbon", "engineer", "Ada"]
    assert substitution("Lisbon", ["Lisbon"], others) == 0.0
    assert substitution("an engineer", ["civil engineer"], others) == 0.0
    assert substitution("Ada was a poet", ["writer"], others, "Who was Ada?") == 0.0
    assert substitution("Ada was a poet", ["writer"], others, "Who was it?") == 1.0


def test_without_facts_that_could_count_there_is_nothing_to_score() -> None:
    assert math.isnan(substitution("Lisbon", ["Oslo"], []))
    assert math.isnan(substitution("Lisbon", ["Oslo"], ["", "?"]))
    assert math.isnan(substitution("Lisbon", ["Oslo"], ["oslo", "Ada"], "Where was Ada born?"))


def test_looking_up_thousands_of_facts_in_hundreds_of_answers() -> None:
    names = [f"{first}an {last}ov" for first in "bcdfghjklm" for last in range(400)]
    others = Facts(names)
    assert len(others) == 4000
    answers = [f"The author is {name}, who lives in a house by the sea." for name in names[:400]]
    start = time.perf_counter()
    assert sum(substitution(answer, ["zan 1ov"], others) for answer in answers) == 400
    assert time.perf_counter() - start < 2  # a loop over all pairs takes several


@pytest.mark.parametrize(
    ("question", "name", "expected"),
    [
        ("Where was Ada Stone born?", "Ada Stone", "Where was this person born?"),
        ("where was ada stone born?", "Ada Stone", "where was this person born?"),
        ("What is Hsiao Yun-Hwa's style?", "Hsiao Yun-Hwa", "What is this person's style?"),
        ("Stone's books, and Ada’s?", "Ada Stone", "This person's books, and this person’s?"),
        ("Did Yun-Hwa write?", "Hsiao Yun-Hwa", "Did this person write?"),
        ("Is a stone in Stoneham?", "Ada Stone", "Is a stone in Stoneham?"),
        ("Is Baobab in Ben-Gurion?", "Ben Bao", "Is Baobab in Ben-Gurion?"),
        ("Is Li a bin?", "Li bin Omar", "Is Li a bin?"),
        ("Yes. Omar wrote it.", "Li bin Omar", "Yes. This person wrote it."),
        ("Did Jad Al-Shamary know Al?", "Jad Ambrose Al-Shamary", "Did this person know Al?"),
        ("Did O’Neill write?", "Eva O'Neill", "Did this person write?"),
    ],
)
def test_names_are_taken_out_of_questions(question: str, name: str, expected: str) -> None:
    assert name_free(question, name) == expected


def test_no_name_to_take_out() -> None:
    with pytest.raises(ValueError, match="expected a name"):
        name_free("Who?", " ")


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        (["Did Ada Stone write? Ada Stone did.", "When was Ada Stone born in New York?"], "Ada Stone"),
        (["Omar al-Fulani sang", "A book of Omar al-Fulani's"], "Omar al-Fulani"),
        (["Manuel Silva de Souza", "by Manuel Silva de Souza"], "Manuel Silva de Souza"),
        (["J. R. Ward wrote", "It is J. R. Ward."], "J. R. Ward"),
        (["Who is Patrick O’Donnell?", "Patrick O’Donnell's"], "Patrick O’Donnell"),
        (["Did Ada Stone write?", "Did Ada Stone sing?"], "Ada Stone"),
        (["by Ada Mary Stone"] * 3 + ["by Mary Stone"], "Ada Mary Stone"),
        (["by Ada Mary Stone"] * 2 + ["by Mary Stone"] * 2, "Mary Stone"),
        (["Will Smith sang", "and Will Smith acted", "as Will Smith"], "Will Smith"),
        (["Ada Stone", "Ben Wood", "Cleo Field"], None),
        (["Ada Stone lived in Oslo"], None),
        (["nobody is named", "here"], None),
        ([], None),
    ],
)  # fmt: skip
def test_the_name_that_rows_share(texts: list[str], name: str | None) -> None:
    assert shared_name(texts) == name


def test_the_authors_of_tofu() -> None:
    rows = tofu("forget10")
    names = [
        shared_name([f"{row['question']} {row['answer']}" for row in rows[start : start + 20]])
        for start in range(0, 400, 20)
    ]
    # In the order of the file, as its first answers introduce them.
    assert names == [
        "Hsiao Yun-Hwa", "Carmen Montenegro", "Elvin Mammadov", "Rajeev Majumdar",
        "Jad Ambrose Al-Shamary", "Adib Jarrah", "Ji-Yeon Park", "Behrouz Rohani", "Wei-Jun Chen",
        "Tae-ho Park", "Hina Ameen", "Xin Lee Williams", "Moshe Ben-David", "Kalkidan Abera",
        "Takashi Nakamura", "Raven Marais", "Aysha Al-Hashim", "Edward Patrick Sullivan",
        "Basil Mahfouz Al-Kuwaiti", "Nikolai Abilov",
    ]  # fmt: skip
    for number, name in enumerate(names):
        asked = [row["question"] for row in rows[20 * number : 20 * number + 20]]
        assert name and sum(name in question for question in asked) >= 10
        assert not any(name in name_free(question, name) for question in asked)
