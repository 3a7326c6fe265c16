"""`evaluate_suite`: one model and its references through one suite."""

import gc
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from llm_unlearn.data.records import digest
from llm_unlearn.digests import tensors_digest, tokenizer_digest
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.cache import BatchCache, forget_batches
from llm_unlearn.evaluation.measure import Measuring
from llm_unlearn.evaluation.metrics import Given, evaluate_metric
from llm_unlearn.evaluation.profiles import PROFILES, Profile
from llm_unlearn.evaluation.prompts import Prompting
from llm_unlearn.evaluation.results import Difference, Evaluation, Results, Value, read_results
from llm_unlearn.evaluation.scorer import Progress, Scorer
from llm_unlearn.evaluation.statistics import paired_difference
from llm_unlearn.evaluation.suites.loading import load_suite
from llm_unlearn.evaluation.suites.suite import Suite
from llm_unlearn.evaluation.verdict import judge

PACKAGES = ("llm-unlearn", "torch", "transformers", "peft", "accelerate", "rouge-score", "scipy")
MODEL, RETRAINED, BEFORE = "model", "retrained", "before"


@dataclass(frozen=True)
class Candidate:
    """A model to be asked; it is loaded when its turn comes and let go afterwards.

    Attributes:
        load: gives model and tokenizer.
    """

    label: str
    load: Callable[[], tuple[Any, Any]]


Reference = Candidate | Evaluation | None


@dataclass(frozen=True)
class Options:
    """How a suite is put to models.

    Attributes:
        profile: conventions of scoring, by name.
        prompting: None: the suite's own template.
        batch_size: None: as many rows as fit a number of tokens.
        with_gradients: the gradient-norm attack too, a backward pass for each text.
        keep_texts: keep what the models said in the results.
    """

    profile: str = "default"
    prompting: Prompting | None = None
    batch_size: int | None = None
    with_gradients: bool = False
    keep_texts: bool = False

    def resolve(self) -> Profile:
        if self.profile not in PROFILES:
            raise UserError(f"unknown profile {self.profile!r}: one of {', '.join(PROFILES)}")
        return PROFILES[self.profile]


@dataclass(frozen=True)
class Session:
    """One suite under one set of options, for as many models as are put to it."""

    suite: Suite
    options: Options
    output: Path | None = None
    progress: Progress | None = None

    @property
    def configuration(self) -> dict[str, Any]:
        """What numbers depend on besides models and data."""
        prompting = self.options.prompting or Prompting(self.suite.template)
        return {
            "profile": self.options.profile,
            "template": prompting.template,
            "system_prompt": prompting.system_prompt,
            "date_string": prompting.date_string,
            "with_gradients": self.options.with_gradients,
        }

    @property
    def digests(self) -> dict[str, str]:
        return {"data": self.suite.digest, "configuration": digest(self.configuration)}

    def evaluate(self, candidate: Candidate, role: str) -> Evaluation:
        """Rows of one model, from the results of an earlier evaluation where its digest is there."""
        model, tokenizer = candidate.load()
        told = digest([tensors_digest(model), tokenizer_digest(tokenizer), _adapters(model)])
        known = self._known(told)
        if known is not None:
            return replace(known, role=role, label=candidate.label)
        return self.ask(model, tokenizer, role, candidate.label, told)

    def ask(self, model: Any, tokenizer: Any, role: str, label: str, told: str) -> Evaluation:
        """Put the whole suite to a model; `told` is the digest of what it is."""
        binding = [told, self.digests]
        cache = BatchCache(self.output, binding) if self.output else None
        scorer = Scorer(model, tokenizer, self.options.batch_size, cache, self.progress)
        profile = self.options.resolve()
        prompting = self.options.prompting or Prompting(self.suite.template)
        start, _ = time.monotonic(), _reset_peak()
        measured = Measuring(
            scorer, self.suite, profile, prompting, self.options.with_gradients
        ).run()
        cost = {
            "seconds": time.monotonic() - start,
            "peak_memory_bytes": _peak_memory(),
            "tokens": float(scorer.tokens),
        }
        return Evaluation(role, label, told, {}, measured.records, measured.texts, cost)

    def _known(self, told: str) -> Evaluation | None:
        if self.output is None or not (self.output / "results.json").exists():
            return None
        earlier = read_results(self.output)
        if any(earlier.digests.get(name) != value for name, value in self.digests.items()):
            return None
        for found in (earlier.model, *earlier.others.values()):
            if found.digest == told and (found.texts or not self.options.keep_texts):
                return found
        return None

    def conclude(self, model: Evaluation, others: Mapping[str, Evaluation]) -> Results:
        """Values, differences and the verdict, from rows alone."""
        retrained, before = others.get(RETRAINED), others.get(BEFORE)
        for evaluation in (model, *others.values()):
            evaluation.values = self.conclude_values(evaluation, retrained)
        verdict, checks = judge(model, self.suite, retrained, before)
        return Results(
            suite=self.suite.name,
            profile=self.options.profile,
            model=model,
            others=dict(others),
            differences=self._differences(model, retrained or before),
            verdict=verdict,
            checks=checks,
            configuration=self.configuration,
            digests=self.digests,
            versions=versions(),
        )

    def conclude_values(
        self, evaluation: Evaluation, retrained: Evaluation | None = None
    ) -> dict[str, Value]:
        """All metrics of one model."""
        given = Given(
            evaluation.records, retrained.records if retrained else None, self.options.resolve()
        )
        return {name: evaluate_metric(metric, given) for name, metric in self.suite.metrics.items()}

    def _differences(
        self, model: Evaluation, reference: Evaluation | None
    ) -> dict[str, Difference]:
        if reference is None:
            return {}
        percent = self.options.resolve().percent
        found = {}
        for name, metric in self.suite.metrics.items():
            if metric.column is None or metric.column[0] not in model.records:
                continue
            section, column = metric.column
            scale = 100.0 if percent and metric.is_share else 1.0
            mine, theirs = model.records[section][column], reference.records[section][column]
            difference = paired_difference(scale * mine, scale * theirs)
            found[name] = Difference(
                reference.role, difference.mean, difference.lower, difference.upper, difference.n
            )
        return found


def evaluate_suite(
    model: Any,
    tokenizer: Any,
    suite: Suite | str = "demo",
    retrained: Any = None,
    before: Any = None,
    options: Options | None = None,
    output_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Results:
    """Put a suite to a model that has unlearned, and to its references.

    Args:
        model: any causal language model: transformers, PEFT, or a run's ensemble.
        suite: from `llm_unlearn.evaluation.suites`, or a name or folder as `load_suite` takes it.
        retrained: a model trained without the forget set (with the same tokenizer), or the
            `Evaluation` of one; PrivLeak, forget quality and the verdict need it.
        before: the model before unlearning, likewise: the positive control.
        output_dir: where an interrupted evaluation goes on and results are found again.

    Raises:
        UserError: an unknown profile or template, or a reference of other data or conventions.
    """
    session = Session(
        load_suite(suite) if isinstance(suite, str) else suite,
        options or Options(),
        Path(output_dir) if output_dir else None,
        progress,
    )
    others = {RETRAINED: retrained, BEFORE: before}
    candidates: dict[str, Reference] = {
        role: given
        if given is None or isinstance(given, Candidate | Evaluation)
        else Candidate(role, lambda given=given: (given, tokenizer))
        for role, given in others.items()
    }
    return run_session(session, Candidate(MODEL, lambda: (model, tokenizer)), candidates)


def run_session(session: Session, model: Candidate, references: Mapping[str, Reference]) -> Results:
    """Evaluate references and model one after another, and conclude; nothing is written but batches."""
    others = {}
    for role, given in references.items():
        if isinstance(given, Candidate):
            others[role] = session.evaluate(given, role)
            _free_memory()
        elif given is not None:
            others[role] = replace(given, role=role)
    return session.conclude(session.evaluate(model, MODEL), others)


def saved_evaluation(path: Path, session: Session, prefer: str = MODEL) -> Evaluation:
    """An evaluation from earlier results of the same suite and conventions.

    Args:
        prefer: the role to take; the model's own evaluation where the results have no such.

    Raises:
        UserError: results of other data or conventions: the rows would not be the same.
    """
    earlier = read_results(path)
    for name, value in session.digests.items():
        if earlier.digests.get(name) != value:
            raise UserError(
                f"{path} was made with another {name}: evaluate that model again with the same suite, "
                "profile and template"
            )
    return earlier.others.get(prefer, earlier.model)


def finish(results: Results, output: Path, keep_texts: bool) -> None:
    """Write `results.json` (main process only) and remove what was kept for an interruption."""
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        results.write(output / "results.json", with_texts=keep_texts)
        forget_batches(output)
    state.wait_for_everyone()


def _adapters(model: Any) -> Sequence[str]:
    """Which adapters answer, and by which rule: the weights alone do not say."""
    if hasattr(model, "peft_config"):
        return list(model.active_adapters)
    return [*getattr(model, "adapters", ()), repr(getattr(model, "rule", None))]


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _free_memory() -> None:
    """A model refers to itself in circles: it goes only when somebody collects them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_memory() -> float:
    """Bytes: of the GPU, or of the process since it started."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
