"""Small folders in the published layouts of MUSE and TOFU, about invented people and dishes."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ACCENTS = "naïve Zoë – 東京 🍲"


def write_rows(path: Path, rows: Sequence[Any], lines: bool = False) -> None:
    """A JSON array, or one JSON value a line as the Hub exports it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if lines:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = json.dumps(list(rows), ensure_ascii=False, indent=1)
    path.write_text(text, encoding="utf-8")


def dish(person: str, day: int, seed: int) -> str:
    return f"dish number {random.Random(f'{person} {day} {seed}').randrange(100)}"


def sentence(person: str, day: int, seed: int) -> str:
    return f"On day {day} {person} eats {dish(person, day, seed)}."


def passage(person: str, sentences: int, seed: int, first_day: int = 0) -> str:
    return " ".join(sentence(person, first_day + day, seed) for day in range(sentences))


def question_row(person: str, day: int, seed: int) -> dict[str, str]:
    return {
        "question": f"what does {person} eat on day {day}?",
        "answer": f"{dish(person, day, seed)}.",
    }


def muse_questions(
    people: Sequence[str], seed: int, unicode: bool, empty_answer: bool
) -> list[dict[str, str]]:
    rows = [question_row(person, 1, seed) for person in people]
    if unicode:
        rows[-1]["answer"] += f" {ACCENTS}"
    if empty_answer:
        rows[0]["answer"] = ""
    return rows


def make_muse_folder(
    path: Path,
    n: int = 6,
    seed: int = 0,
    *,
    unicode: bool = True,
    empty_answer: bool = False,
    long_texts: bool = False,
    plain_strings: bool = True,
    lines: bool = False,
) -> Path:
    """`n` rows a split. `long_texts`: a ground truth beyond 128 tokens, and texts beyond the 512 that
    the tiny models hold. `plain_strings`: privleak is a list of strings, else of `{"text": ...}`."""
    forget = [f"person {i}" for i in range(n)]
    retain = [f"guest {i}" for i in range(n)]
    holdout = [f"stranger {i}" for i in range(n)]
    sentences = 60 if long_texts else 4

    def texts(people: Sequence[str]) -> list[Any]:
        found = [passage(person, sentences, seed) for person in people]
        if unicode:
            found[-1] += f" {ACCENTS}"
        return found if plain_strings else [{"text": text} for text in found]

    verbmem = [
        {
            "prompt": sentence(person, 200, seed),
            "gt": passage(person, 30 if long_texts else 3, seed, first_day=201),
        }
        for person in forget
    ]
    if empty_answer:
        verbmem[0]["gt"] = ""
    write_rows(path / "verbmem" / "forget.json", verbmem, lines)
    for name, people in (("forget", forget), ("retain", retain)):
        rows = muse_questions(people, seed, unicode, empty_answer and name == "forget")
        write_rows(path / "knowmem" / f"{name}_qa.json", rows, lines)
        solved = [question_row(f"{name} guest {i}", 2, seed) for i in range(2)]
        write_rows(path / "knowmem" / f"{name}_qa_icl.json", solved, lines)
    for name, people in (("forget", forget), ("retain", retain), ("holdout", holdout)):
        write_rows(path / "privleak" / f"{name}.json", texts(people), lines)
        write_rows(path / "raw" / f"{name}.json", texts(people), lines)
    return path


def perturbed_row(person: str, seed: int, wrong: int, paraphrased: bool) -> dict[str, Any]:
    """A row with `wrong` false answers, and a paraphrase of question and answer where asked for."""
    row: dict[str, Any] = question_row(person, 1, seed)
    row["perturbed_answer"] = [f"{dish(person, 100 + k, seed)} and {k}." for k in range(wrong)]
    if paraphrased:
        row["paraphrased_answer"] = f"it is {row['answer']}"
        row["paraphrased_question"] = f"on day 1 {person} eats what?"
    return row


def make_tofu_folder(
    path: Path,
    n: int = 6,
    seed: int = 0,
    *,
    unicode: bool = True,
    empty_answer: bool = False,
    long_texts: bool = False,
    holdout: bool = True,
    lines: bool = True,
) -> Path:
    """`n` rows a split of forget10, retain, real authors and world facts. `long_texts`: an answer
    beyond the 512 tokens at which questions and answers are cut."""
    forget = [perturbed_row(f"person {i}", seed, 5, True) for i in range(n)]
    if unicode:
        forget[-1]["answer"] += f" {ACCENTS}"
    if empty_answer:
        forget[0]["answer"] = ""
    if long_texts:
        forget[1]["answer"] = passage("person 1", 60, seed)
    plain = [{key: row[key] for key in ("question", "answer")} for row in forget]
    write_rows(path / "forget10.json", plain, lines)
    write_rows(path / "forget10_perturbed.json", forget, lines)
    for name, person, wrong in (
        ("retain", "guest", 5),
        ("real_authors", "author", 3),
        ("world_facts", "country", 3),
    ):
        rows = [
            perturbed_row(f"{person} {i}", seed, wrong, paraphrased=name == "retain")
            for i in range(n)
        ]
        write_rows(path / f"{name}_perturbed.json", rows, lines)
    if holdout:
        rows = [question_row(f"stranger {i}", 1, seed) for i in range(n)]
        write_rows(path / "holdout10.json", rows, lines)
    return path
