"""What a suite is made of: sections of rows, and the metrics that read them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llm_unlearn.data.records import digest
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.metrics import Metric
from llm_unlearn.evaluation.prompts import Shot

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Questions:
    """Questions with short answers: generated, and scored where `is_scored`.

    Attributes:
        rows: `question`, `answer`, and where there are any `paraphrased_answer`,
            `perturbed_answer` (a list of wrong ones) and `subject`.
        shots: shown before each question.
        new_tokens: most tokens of an answer; 0 = none is generated.
        stops: texts that end an answer.
        is_scored: whether the right answer's likelihood is wanted.
        among_options: whether its probability is its share among the wrong answers.
        is_forgotten: whether an answer may betray a substitution or a refusal.
    """

    rows: Sequence[Row]
    shots: Sequence[Shot] = ()
    new_tokens: int = 32
    stops: Sequence[str] = ()
    is_scored: bool = False
    among_options: bool = False
    is_forgotten: bool = False


@dataclass(frozen=True)
class Continuations:
    """Passages cut in two: `prompt`, and `gt`, which a model that has memorised them goes on with."""

    rows: Sequence[Row]
    new_tokens: int = 128


@dataclass(frozen=True)
class Passages:
    """Texts (`text`) of which only the likelihood is wanted."""

    rows: Sequence[Row]


@dataclass(frozen=True)
class Canaries:
    """A secret among its possible values: `prompt`, `canary`, `candidates` (the canary not among them)."""

    rows: Sequence[Row]


Section = Questions | Continuations | Passages | Canaries


Column = tuple[str, str]  # a section and one of its columns


@dataclass(frozen=True)
class Probes:
    """Which columns the verdict rests on; all are in [0, 1] but the loss.

    Attributes:
        leaks: what a model that has forgotten knows no better than a retrained one.
        utility: what it must still know.
        intact: a section of texts whose likelihood says whether the model is still one.
        answers: the section of questions about the forgotten whose answers may betray a trick.
    """

    leaks: Sequence[Column]
    utility: Sequence[Column]
    intact: str
    answers: str


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    Attributes:
        sections: by the benchmark's own name.
        metrics: by name, in the order of the table.
        probes: what the verdict rests on.
        utility: the metric that says what the model can still do.
        template: how questions are put unless the user says otherwise.
        stemmer: whether the benchmark's authors stem words for ROUGE.
        subjects: names of those who are to be forgotten, where they are known.
        others: names of those who stay.
        others_facts: what would be a substitution in an answer about a forgotten subject.
    """

    name: str
    sections: Mapping[str, Section]
    metrics: Mapping[str, Metric]
    probes: Probes
    utility: str
    template: str = "question"
    stemmer: bool = False
    subjects: Sequence[str] = ()
    others: Sequence[str] = ()
    others_facts: Sequence[str] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of everything that is asked."""
        content = {name: asdict(section) for name, section in self.sections.items()}
        told = [content, list(self.subjects), list(self.others_facts), self.template]
        return digest(told)


def only_probes(suite: Suite) -> Suite:
    """The questions about the forgotten and what says what is kept: a quick look during training."""
    needed = {suite.probes.answers, *(section for section, _ in suite.probes.utility)}
    sections = {name: section for name, section in suite.sections.items() if name in needed}
    return replace(suite, sections=sections, metrics={})


def only_utility(suite: Suite) -> Suite:
    """The part of a suite that says what a model can still do, for curves over many models."""
    needed = {section for section, _ in suite.probes.utility}
    sections = {name: section for name, section in suite.sections.items() if name in needed}
    return replace(suite, sections=sections, metrics={suite.utility: suite.metrics[suite.utility]})


def columns_of(rows: Sequence[Row], where: str, *names: str) -> list[Row]:
    """The rows, once it is sure that each has these columns.

    Raises:
        UserError: no row at all, or one without a column (by number).
    """
    if not rows:
        raise UserError(f"{where} has no rows")
    for number, row in enumerate(rows, start=1):
        for name in names:
            if row.get(name) is None:
                raise UserError(f"{where}, row {number}: expected a {name!r}")
    return list(rows)


def shots_of(rows: Sequence[Row]) -> tuple[Shot, ...]:
    return tuple(Shot(str(row["question"]), str(row["answer"])) for row in rows)
