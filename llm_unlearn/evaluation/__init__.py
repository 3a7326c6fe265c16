"""Evaluation: what a model knows, and scores with intervals. Imports no unlearning method."""

from typing import TYPE_CHECKING

from llm_unlearn.lazy import importer

if TYPE_CHECKING:
    from llm_unlearn.evaluation.folds import scalability, sustainability
    from llm_unlearn.evaluation.harness import (
        Candidate,
        Options,
        Session,
        evaluate_suite,
        run_session,
    )
    from llm_unlearn.evaluation.membership import (
        auc,
        loss_score,
        min_k_plus_plus_score,
        min_k_score,
        privleak,
        reference_score,
        true_positive_rate,
        zlib_score,
    )
    from llm_unlearn.evaluation.profiles import PROFILES
    from llm_unlearn.evaluation.prompts import Prompting
    from llm_unlearn.evaluation.report import write_report
    from llm_unlearn.evaluation.results import Evaluation, Results, Value, read_results
    from llm_unlearn.evaluation.scorer import Item, Scorer, TokenScores, answer
    from llm_unlearn.evaluation.statistics import across_seeds, mean_interval, paired_difference
    from llm_unlearn.evaluation.suites.demonstration import demonstration_muse, demonstration_tofu
    from llm_unlearn.evaluation.suites.loading import load_suite
    from llm_unlearn.evaluation.suites.muse import load_muse
    from llm_unlearn.evaluation.suites.tofu import load_tofu
    from llm_unlearn.evaluation.text import (
        asserts,
        exact_match,
        is_exact,
        is_refusal,
        name_free,
        rouge,
        shared_name,
        substitution,
        token_entropy,
    )
    from llm_unlearn.evaluation.tofu import (
        aggregate_truth_ratios,
        forget_quality,
        model_utility,
        probability,
        score_logs,
        truth_ratio,
    )
    from llm_unlearn.evaluation.tokens import (
        answer_probability,
        exact_memorization,
        exposure,
        extraction_strength,
    )
    from llm_unlearn.evaluation.utility import tug_of_war, tug_of_war_attack

_HOMES = {
    "Candidate": "llm_unlearn.evaluation.harness",
    "Evaluation": "llm_unlearn.evaluation.results",
    "Item": "llm_unlearn.evaluation.scorer",
    "Options": "llm_unlearn.evaluation.harness",
    "PROFILES": "llm_unlearn.evaluation.profiles",
    "Prompting": "llm_unlearn.evaluation.prompts",
    "Results": "llm_unlearn.evaluation.results",
    "Scorer": "llm_unlearn.evaluation.scorer",
    "Session": "llm_unlearn.evaluation.harness",
    "TokenScores": "llm_unlearn.evaluation.scorer",
    "Value": "llm_unlearn.evaluation.results",
    "across_seeds": "llm_unlearn.evaluation.statistics",
    "aggregate_truth_ratios": "llm_unlearn.evaluation.tofu",
    "answer": "llm_unlearn.evaluation.scorer",
    "answer_probability": "llm_unlearn.evaluation.tokens",
    "asserts": "llm_unlearn.evaluation.text",
    "auc": "llm_unlearn.evaluation.membership",
    "demonstration_muse": "llm_unlearn.evaluation.suites.demonstration",
    "demonstration_tofu": "llm_unlearn.evaluation.suites.demonstration",
    "evaluate_suite": "llm_unlearn.evaluation.harness",
    "exact_match": "llm_unlearn.evaluation.text",
    "exact_memorization": "llm_unlearn.evaluation.tokens",
    "exposure": "llm_unlearn.evaluation.tokens",
    "extraction_strength": "llm_unlearn.evaluation.tokens",
    "forget_quality": "llm_unlearn.evaluation.tofu",
    "is_exact": "llm_unlearn.evaluation.text",
    "is_refusal": "llm_unlearn.evaluation.text",
    "load_suite": "llm_unlearn.evaluation.suites.loading",
    "load_muse": "llm_unlearn.evaluation.suites.muse",
    "load_tofu": "llm_unlearn.evaluation.suites.tofu",
    "loss_score": "llm_unlearn.evaluation.membership",
    "mean_interval": "llm_unlearn.evaluation.statistics",
    "min_k_plus_plus_score": "llm_unlearn.evaluation.membership",
    "min_k_score": "llm_unlearn.evaluation.membership",
    "model_utility": "llm_unlearn.evaluation.tofu",
    "name_free": "llm_unlearn.evaluation.text",
    "paired_difference": "llm_unlearn.evaluation.statistics",
    "privleak": "llm_unlearn.evaluation.membership",
    "probability": "llm_unlearn.evaluation.tofu",
    "read_results": "llm_unlearn.evaluation.results",
    "reference_score": "llm_unlearn.evaluation.membership",
    "rouge": "llm_unlearn.evaluation.text",
    "run_session": "llm_unlearn.evaluation.harness",
    "scalability": "llm_unlearn.evaluation.folds",
    "score_logs": "llm_unlearn.evaluation.tofu",
    "shared_name": "llm_unlearn.evaluation.text",
    "substitution": "llm_unlearn.evaluation.text",
    "sustainability": "llm_unlearn.evaluation.folds",
    "token_entropy": "llm_unlearn.evaluation.text",
    "true_positive_rate": "llm_unlearn.evaluation.membership",
    "truth_ratio": "llm_unlearn.evaluation.tofu",
    "tug_of_war": "llm_unlearn.evaluation.utility",
    "tug_of_war_attack": "llm_unlearn.evaluation.utility",
    "write_report": "llm_unlearn.evaluation.report",
    "zlib_score": "llm_unlearn.evaluation.membership",
}

__all__ = [
    "PROFILES",
    "Candidate",
    "Evaluation",
    "Item",
    "Options",
    "Prompting",
    "Results",
    "Scorer",
    "Session",
    "TokenScores",
    "Value",
    "across_seeds",
    "aggregate_truth_ratios",
    "answer",
    "answer_probability",
    "asserts",
    "auc",
    "demonstration_muse",
    "demonstration_tofu",
    "evaluate_suite",
    "exact_match",
    "exact_memorization",
    "exposure",
    "extraction_strength",
    "forget_quality",
    "is_exact",
    "is_refusal",
    "load_muse",
    "load_suite",
    "load_tofu",
    "loss_score",
    "mean_interval",
    "min_k_plus_plus_score",
    "min_k_score",
    "model_utility",
    "name_free",
    "paired_difference",
    "privleak",
    "probability",
    "read_results",
    "reference_score",
    "rouge",
    "run_session",
    "scalability",
    "score_logs",
    "shared_name",
    "substitution",
    "sustainability",
    "token_entropy",
    "true_positive_rate",
    "truth_ratio",
    "tug_of_war",
    "tug_of_war_attack",
    "write_report",
    "zlib_score",
]

__getattr__ = importer(__name__, _HOMES)
