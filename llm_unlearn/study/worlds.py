"""Whom the study is about: the invented people of the demonstration, or TOFU's authors.

Of TOFU the first authors are private, the next ten are never trained on (holdout), and a small base
model can be pre-trained on the rest (`benchmarks/tofu_base.py`). The benchmark asks in other words,
and knows wrong answers, about the first 20 and the last 20 of its 200 authors only: what
needs those is measured on whoever is among them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_unlearn.data import world as toy
from llm_unlearn.data.records import Record, make_records
from llm_unlearn.data.sources import read_rows
from llm_unlearn.demonstration import MODEL_PATH
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.suites import demonstration
from llm_unlearn.evaluation.suites.suite import Row
from llm_unlearn.evaluation.text import name_free, shared_name

ROWS_PER_AUTHOR = 20
TOFU_ASKED = 10  # of an author's 20 rows, where many authors are asked about
HOLDOUT_AUTHORS = 10
OTHER_AUTHORS = 5
FACT_WORDS = (2, 8)
PUBLIC = 48


@dataclass(frozen=True)
class World:
    """Records to learn and questions to ask.

    Attributes:
        rows: every question about the private subjects: `subject`, `name`, `question`, `answer`, and
            where there are any `paraphrased_question`, `paraphrased_answer`, `perturbed_answer`.
        public: questions out of domain, by set.
        holdout: questions about subjects whom no model was trained on.
        score: the column that is called knowledge: `exact` where answers are short, else `probability`.
        asked: how many rows of a subject are asked where all subjects are; 0 = all.
    """

    name: str
    records: list[Record]
    rows: list[Row]
    public: Mapping[str, list[Row]]
    holdout: list[Row]
    template: str
    new_tokens: int
    stemmer: bool
    score: str
    asked: int = 0

    @cached_property
    def subjects(self) -> list[str]:
        return sorted({record.subject for record in self.records})

    def about(self, subjects: set[str], some: bool = False) -> list[Row]:
        """Rows about these subjects; of each only `asked`, evenly spread, where `some` will do."""
        rows = [row for row in self.rows if row["subject"] in subjects]
        if not some or not self.asked:
            return rows
        groups: dict[str, list[Row]] = {}
        for row in rows:
            groups.setdefault(row["subject"], []).append(row)
        return [row for group in groups.values() for row in spread(group, self.asked)]

    def facts(self, subjects: set[str]) -> list[str]:
        """Answers that would be a substitution in an answer about somebody else."""
        answers = [str(row["answer"]) for row in self.rows if row["subject"] in subjects]
        return [a for a in answers if FACT_WORDS[0] <= len(a.split()) <= FACT_WORDS[1]]

    def names(self, subjects: set[str]) -> list[str]:
        return sorted({row["name"] for row in self.rows if row["subject"] in subjects} - {""})


def paraphrased(rows: Sequence[Row]) -> list[Row]:
    """The same questions in other words, where the world has them."""
    return [
        {**row, "question": row["paraphrased_question"]}
        for row in rows
        if row.get("paraphrased_question")
    ]


def nameless(rows: Sequence[Row]) -> list[Row]:
    """The same questions without the name, where it is in them."""
    asked = [(row, name_free(row["question"], row["name"])) for row in rows if row["name"]]
    return [{**row, "question": text} for row, text in asked if text != row["question"]]


WORDINGS: dict[str, Callable[[Sequence[Row]], list[Row]]] = {
    "named": list,
    "paraphrased": paraphrased,
    "name_free": nameless,
}


def demonstration_world(subjects: int) -> World:
    """Invented people; as many others are held out."""
    everybody = toy.private_people(subjects + toy.PRIVATE_COUNT)
    people, holdout = everybody[:subjects], everybody[subjects:]
    rows = demonstration.perturbed_questions(people)
    public = demonstration.option_questions(toy.public_people()[:PUBLIC])
    return World(
        name="demonstration",
        records=make_records(toy.records(people), subject_column="subject"),
        rows=[{**row, "name": row["subject"]} for row in rows],
        public={"public people": public},
        holdout=demonstration.plain_questions(holdout),
        template="plain",
        new_tokens=8,
        stemmer=False,
        score="exact",
    )


def tofu_world(folder: Path, subjects: int) -> World:
    """TOFU's authors, from the benchmark's own files in a folder.

    Raises:
        UserError: no full.json there, or not so many authors.
    """
    rows = read_rows(folder / "full.json")
    authors = [rows[i : i + ROWS_PER_AUTHOR] for i in range(0, len(rows), ROWS_PER_AUTHOR)]
    if not 1 <= subjects <= len(authors):
        raise UserError(f"TOFU has {len(authors)} authors: --subjects {subjects} cannot be private")
    private = authors[:subjects]
    others = authors[subjects + HOLDOUT_AUTHORS :][:OTHER_AUTHORS]
    known = _perturbed_rows(folder)
    records = make_records([row for a in private for row in a], rows_per_subject=ROWS_PER_AUTHOR)
    questions: list[Row] = []
    for number, author in enumerate(private):
        subject = records[number * ROWS_PER_AUTHOR].subject
        name = shared_name([f"{row['question']} {row['answer']}" for row in author]) or ""
        questions += [
            {**known.get(_identity(row), row), "subject": subject, "name": name} for row in author
        ]
    public = {
        name.replace("_", " "): [_plain(row) for row in read_rows(folder / f"{name}.json")]
        for name in ("real_authors", "world_facts")
    }
    if others:
        public["other authors"] = [_plain(row) for author in others for row in author]
    holdout = [_plain(row) for a in authors[subjects:][:HOLDOUT_AUTHORS] for row in a]
    return World(
        name="tofu", records=records, rows=questions, public=public, holdout=holdout, template="question",
        new_tokens=96, stemmer=True, score="probability", asked=TOFU_ASKED,
    )  # fmt: skip


def _perturbed_rows(folder: Path) -> dict[tuple[str, str], Row]:
    """Rows with paraphrases and wrong answers, by question and answer, as far as the files are there."""
    paths = [folder / f"{name}_perturbed.json" for name in ("retain", "forget10", "forget05")]
    rows = [row for path in paths if path.is_file() for row in read_rows(path)]
    return {_identity(row): row for row in rows}


def _identity(row: Row) -> tuple[str, str]:
    return str(row["question"]), str(row["answer"])


def _plain(row: Row) -> Row:
    return {"question": row["question"], "answer": row["answer"]}


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """`count` of the rows, evenly spaced; all where there are not so many."""
    step = max(1.0, len(rows) / count)
    return [rows[int(number * step)] for number in range(min(count, len(rows)))]


def load_world(name: str, subjects: int, tofu: Path) -> World:
    """The world of that name with so many private subjects."""
    return tofu_world(tofu, subjects) if name == "tofu" else demonstration_world(subjects)


def model_for(world: str, model: str | None) -> str:
    """The base model of a study.

    Raises:
        UserError: TOFU has none of its own.
    """
    if model is None and world == "tofu":
        raise UserError(
            "--world tofu needs a base model: make a small one with `python benchmarks/tofu_base.py "
            "--tofu FOLDER/full.json --skip_authors 60 --output_dir tofu-base` and say --model tofu-base"
        )
    return model or str(MODEL_PATH)
