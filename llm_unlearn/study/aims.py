"""The lines that a method has to reach, and how far it is from them."""

from collections.abc import Callable
from dataclasses import dataclass

from llm_unlearn.study.configurations import ALWAYS_ON, CONFIGURATIONS, PLAIN
from llm_unlearn.study.results import NAN, Results

Row = tuple[str, str]


@dataclass(frozen=True)
class Aim:
    """One line to reach.

    Attributes:
        value: of a row of the study; NaN where something is not measured.
        is_least: whether the line is a lower bound; else it is an upper one, not reached itself.
    """

    title: str
    line: float
    value: Callable[[Results, Row], float]
    is_least: bool = True

    def verdict(self, results: Results, row: Row) -> bool | None:
        """Whether a row is on the right side of the line; None where nobody can say."""
        value = self.value(results, row)
        if value != value:
            return None
        return value >= self.line if self.is_least else value < self.line


def knowledge(results: Results) -> str:
    """The score that is called knowledge in this world."""
    return str(results.about["score"])


def best_gated(results: Results, name: str) -> float:
    """A number of the plain LoRA before any deletion, behind the gate that suits it best."""
    ways = [served for served in PLAIN.served if served != ALWAYS_ON]
    values = [results.get((PLAIN.name, served), 0, name).mean for served in ways]
    return max((value for value in values if value == value), default=NAN)


def before(results: Results, row: Row) -> float:
    """Knowledge before any deletion as a share of the best gated plain LoRA's."""
    name = f"retained named {knowledge(results)}"
    best = best_gated(results, name)
    return results.get(row, 0, name).mean / best if best else NAN


def kept(results: Results, row: Row) -> float:
    """Knowledge of those who stay, after all deletions, as a share of the same people's before."""
    if not any(results.deletions):
        return NAN
    name = f"stayed {knowledge(results)}"
    first, last = (results.get(row, count, name).mean for count in (0, max(results.deletions)))
    return last / first if first else NAN


def deletion_seconds(results: Results, row: Row) -> float:
    """The slowest of the means by number of deletions."""
    spent = [results.get(row, n, "deletion_seconds").mean for n in results.deletions if n]
    return max((value for value in spent if value == value), default=NAN)


def inference(results: Results, row: Row) -> float:
    return results.get(row, 0, "inference_ratio").mean


AIMS = {
    "before": Aim("at least a gated plain LoRA's knowledge before any deletion", 1.0, before),
    "kept": Aim("at least 99 % of its own knowledge after the last deletion", 0.99, kept),
    "deletion": Aim("a deletion in less than a second", 1.0, deletion_seconds, is_least=False),
    "inference": Aim("less than 1.5 times one adapter's seconds a prompt", 1.5, inference, False),
}


def is_judged(row: Row) -> bool:
    """Aims are for methods that are exact without retraining, not for what they are compared with."""
    known = {one.name: one.is_exact_method for one in CONFIGURATIONS}
    return known.get(row[0], False)
