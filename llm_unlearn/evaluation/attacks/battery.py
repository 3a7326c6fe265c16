"""All attacks on one suite's forgotten questions, each beside the retrained model.

Every attack puts the same questions to every model that is given, as the suite and the profile put
them, and scores answers with the suite's own overlap. It fails a model only where it surely gets
more out of it than out of the retrained one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation import text
from llm_unlearn.evaluation.attacks.extraction import Decoding, compare_extraction
from llm_unlearn.evaluation.attacks.over_unlearning import Pair, collateral, neighbourhood
from llm_unlearn.evaluation.attacks.prompting import compare_variants, draw_shots
from llm_unlearn.evaluation.attacks.quantization import collision_rate, quantize
from llm_unlearn.evaluation.attacks.relearning import RelearningAttack, compare_curves, relearn
from llm_unlearn.evaluation.attacks.sampling import compare_leakage, leakage, sampled_scores
from llm_unlearn.evaluation.harness import BEFORE, MODEL, RETRAINED, Session
from llm_unlearn.evaluation.metrics import value_of
from llm_unlearn.evaluation.prompts import Encoded, Prompting
from llm_unlearn.evaluation.results import Check, Difference, Value
from llm_unlearn.evaluation.scorer import Scorer
from llm_unlearn.evaluation.statistics import (
    Interval,
    across_seeds,
    mean_interval,
    paired_difference,
)
from llm_unlearn.evaluation.suites.suite import Questions, Row
from llm_unlearn.evaluation.verdict import NO_BASELINE, compare

Floats = NDArray[np.float64]
NEEDS_RETRAINED = "a retrained model is not given: --retrain"
SHOTS = 4


@dataclass
class Outcome:
    """What one attack found.

    Attributes:
        values: role -> name -> value.
        differences: the model less the retrained one.
        curves: one line per model.
    """

    values: dict[str, dict[str, Value]] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)
    curves: dict[str, list[Value]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    def add(self, role: str, name: str, interval: Interval, note: str = "") -> None:
        self.values.setdefault(role, {})[name] = value_of(interval, note)

    def judge(self, name: str, difference: Interval | None, what: str) -> None:
        """Against the retrained model, where there is one."""
        if difference is None:
            self.checks.append(Check(f"attack: {name}", NO_BASELINE, NEEDS_RETRAINED))
            return
        self.differences[name] = Difference(
            RETRAINED, difference.mean, difference.lower, difference.upper, difference.n
        )
        self.checks.append(compare(f"attack: {name}", difference, what))


@dataclass(frozen=True)
class Settings:
    """How hard the attacks try.

    Attributes:
        seeds: of relearning, at least two for an interval.
        relearning: steps and learning rate.
        samples: answers drawn for each question, at temperature 1.
        bits: of round-to-nearest quantisation.
    """

    seeds: int = 3
    relearning: RelearningAttack = field(default_factory=RelearningAttack)
    samples: int = 16
    bits: Sequence[int] = (8, 4)


class Battery:
    """Models under attack.

    Args:
        models: role -> model; `model` is attacked, `retrained` the control, `before` the
            model before unlearning. All are in memory at once.
    """

    def __init__(
        self,
        session: Session,
        models: Mapping[str, Any],
        tokenizer: Any,
        settings: Settings | None = None,
    ):
        self.session = session
        self.models = dict(models)
        self.tokenizer = tokenizer
        self.settings = settings or Settings()
        self.profile = session.options.resolve()
        self.prompting = session.options.prompting or Prompting(session.suite.template)
        section = session.suite.sections[session.suite.probes.answers]
        assert isinstance(section, Questions)
        self.section = section
        self.column = next(
            column
            for name, column in session.suite.probes.leaks
            if name == session.suite.probes.answers and column.startswith("rouge")
        )
        self.encoded = [self.encode(row) for row in section.rows]

    def encode(self, row: Row, shots: Any = None) -> Encoded:
        return self.profile.question(
            self.tokenizer,
            str(row["question"]),
            str(row["answer"]),
            self.section.shots if shots is None else shots,
            self.prompting,
        )

    def score(self, said: str, reference: str) -> float:
        """Overlap of an answer with its reference, in [0, 1]."""
        stemmer = (
            self.session.suite.stemmer if self.profile.stemmer is None else self.profile.stemmer
        )
        return float(getattr(text.rouge(said, reference, stemmer), self.column))

    def knowledge(self, model: Any, encoded: Sequence[Encoded] | None = None) -> Floats:
        """Overlap of the greedy answers, one per question."""
        asked = self.encoded if encoded is None else encoded
        scorer = Scorer(model, self.tokenizer, self.session.options.batch_size)
        answers = scorer.generate([e.prompt for e in asked], self.section.new_tokens)
        return np.array(
            [
                self.score(
                    self.profile.clean(self.tokenizer, said[0], self.section.stops), e.reference
                )
                if said
                else np.nan
                for said, e in zip(answers, asked, strict=True)
            ]
        )

    @property
    def others(self) -> list[str]:
        return [role for role in self.models if role != BEFORE]


def relearning(battery: Battery) -> Outcome:
    """Teach every third forgotten question again, and ask the others."""
    outcome, settings = Outcome(), battery.settings
    taught = [e.item for e in battery.encoded[::3]]
    asked = [e for number, e in enumerate(battery.encoded) if number % 3]
    if not taught or not asked:
        raise UserError("relearning needs at least two forgotten questions")
    curves = {
        role: [
            relearn(
                battery.models[role],
                battery.tokenizer,
                taught,
                lambda model: float(np.nanmean(battery.knowledge(model, asked))),
                settings.relearning,
                seed,
            )
            for seed in range(settings.seeds)
        ]
        for role in battery.others
    }
    steps = settings.relearning.steps
    for role, of_seeds in curves.items():
        points = [across_seeds([c.values[i] for c in of_seeds]) for i in range(len(steps))]
        outcome.curves[f"relearning: {role}"] = [
            value_of(point, f"step {step}") for step, point in zip(steps, points, strict=True)
        ]
        outcome.add(role, "relearned", points[-1])
    area = None
    if RETRAINED in curves:
        area = compare_curves(curves[MODEL], curves[RETRAINED]).area
    outcome.judge("relearned", area, f"{settings.seeds} seeds (area between the curves)")
    return outcome


def sampling(battery: Battery) -> Outcome:
    """Ask again and again at temperature 1; the best of k answers counts."""
    outcome, settings = Outcome(), battery.settings
    tables = {
        role: sampled_scores(
            Scorer(model, battery.tokenizer, battery.session.options.batch_size),
            [e.prompt for e in battery.encoded],
            [e.reference for e in battery.encoded],
            battery.score,
            settings.samples,
            max_new_tokens=battery.section.new_tokens,
        )
        for role, model in battery.models.items()
    }
    for role, table in tables.items():
        found = leakage(table)
        outcome.curves[f"leak@k: {role}"] = [
            value_of(interval, f"k = {k}") for k, interval in found.items()
        ]
        most = max(found)
        outcome.add(role, f"leak_at_{most}", found[most])
    most = max(leakage(tables[MODEL]))
    difference = None
    if RETRAINED in tables:
        difference = compare_leakage(tables[MODEL], tables[RETRAINED], [most])[most]
    outcome.judge(f"leak_at_{most}", difference, "all questions")
    return outcome


def quantization(battery: Battery) -> Outcome:
    """Round the weights to few bits: a change below half a step is undone."""
    outcome = Outcome()
    for bits in battery.settings.bits:
        rows = {}
        for role, model in battery.models.items():
            with quantize(model, bits, adapters=_adapters(model)):
                rows[role] = battery.knowledge(model)
            outcome.add(role, f"quantized_{bits}_bit", mean_interval(rows[role]))
        outcome.judge(f"quantized_{bits}_bit", _against(rows), "all questions")
        if BEFORE in battery.models and _adapters(battery.models[MODEL]) == "merge":
            found = collision_rate(battery.models[MODEL], battery.models[BEFORE], bits)
            outcome.values[MODEL][f"collisions_{bits}_bit"] = Value(found.share, n=found.n)
    return outcome


def prompting(battery: Battery) -> Outcome:
    """The same questions after examples, in other words and without the name: the worst counts."""
    outcome = Outcome()
    variants = _variants(battery)
    scores = {
        role: {name: battery.knowledge(model, asked) for name, asked in variants.items()}
        for role, model in battery.models.items()
    }
    for role, by_variant in scores.items():
        for name, interval in compare_variants(by_variant).variants.items():
            outcome.add(role, f"prompt_{name}", interval)
    difference = None
    if RETRAINED in scores:
        difference = compare_variants(scores[MODEL], scores[RETRAINED]).differences["worst"]
    outcome.judge("prompt_worst", difference, "the best of all prompts for each question")
    return outcome


def extraction(battery: Battery) -> Outcome:
    """Guide the old model by its difference to the new one: what an insider who kept it can do."""
    outcome = Outcome()
    if BEFORE not in battery.models:
        outcome.checks.append(
            Check("attack: extraction", NO_BASELINE, "needs the model before unlearning: --before")
        )
        return outcome
    models = {"before": battery.models[BEFORE], "after": battery.models[MODEL]}
    if RETRAINED in battery.models:
        models["retrained"] = battery.models[RETRAINED]
    found = compare_extraction(
        models,
        battery.tokenizer,
        [e.prompt for e in battery.encoded],
        [e.reference for e in battery.encoded],
        Decoding(max_new_tokens=battery.section.new_tokens),
    )
    roles = {"before": BEFORE, "pair": MODEL, "retrained_pair": RETRAINED}
    for name, role in roles.items():
        if name in found.success:
            outcome.add(role, "extracted_with_before", found.success[name])
    outcome.add(MODEL, "extracted_alone", found.success["after"])
    outcome.add(MODEL, "extraction_gain", found.gain)
    recalls, control = found.recalls, None
    if "retrained_pair" in recalls:
        control = paired_difference(recalls["pair"], recalls["retrained_pair"])
    outcome.judge("extracted_with_before", control, "recall by the same attack")
    return outcome


def over_unlearning(battery: Battery) -> Outcome:
    """Do retained rows that look like the forgotten ones lose more than the others?"""
    outcome, suite = Outcome(), battery.session.suite
    section = suite.sections[suite.probes.utility[0][0]]
    assert isinstance(section, Questions)
    asked = [str(row["question"]) for row in section.rows]
    parts = neighbourhood(asked, [str(row["question"]) for row in battery.section.rows])
    encoded = [battery.encode(row, section.shots) for row in section.rows]
    rows = {role: battery.knowledge(model, encoded) for role, model in battery.models.items()}
    for role, scores in rows.items():
        outcome.add(role, "near_knowmem", mean_interval(scores[parts.near]))
        outcome.add(role, "far_knowmem", mean_interval(scores[parts.far]))
    if RETRAINED not in rows:
        outcome.judge("near_knowmem", None, "")
        return outcome
    near, far = (Pair(rows[MODEL][part], rows[RETRAINED][part]) for part in parts)
    loss = collateral(near, far).difference
    # A loss is what is looked for: turned, so that above 0 is worse as in every other attack.
    turned = loss._replace(mean=-loss.mean, lower=-loss.upper, upper=-loss.lower)
    outcome.checks.append(
        compare("attack: over-unlearning", turned, "how much more neighbours lose than others")
    )
    return outcome


ATTACKS: dict[str, Callable[[Battery], Outcome]] = {
    "relearning": relearning,
    "sampling": sampling,
    "quantization": quantization,
    "prompting": prompting,
    "extraction": extraction,
    "over-unlearning": over_unlearning,
}


def _against(rows: Mapping[str, Floats]) -> Interval | None:
    return paired_difference(rows[MODEL], rows[RETRAINED]) if RETRAINED in rows else None


def _adapters(model: Any) -> Literal["merge", "keep"]:
    """No single weight holds the adapters of an ensemble: there the base alone is rounded."""
    return "keep" if hasattr(model, "num_shards") else "merge"


def _variants(battery: Battery) -> dict[str, list[Encoded]]:
    suite = battery.session.suite
    found = {"as_asked": battery.encoded}
    if not battery.section.shots and battery.prompting.template != "chat":
        retained = suite.sections[suite.probes.utility[0][0]]
        assert isinstance(retained, Questions)
        known = [(str(row["question"]), str(row["answer"])) for row in retained.rows]
        drawn = draw_shots([str(r["question"]) for r in battery.section.rows], known, SHOTS)
        found["few_shot"] = [
            battery.encode(row, shots)
            for row, shots in zip(battery.section.rows, drawn, strict=True)
        ]
    for variant in ("paraphrased", "name_free"):
        section = suite.sections.get(f"{suite.probes.answers}_{variant}")
        if isinstance(section, Questions) and len(section.rows) == len(battery.encoded):
            found[variant] = [battery.encode(row, section.shots) for row in section.rows]
    return found
