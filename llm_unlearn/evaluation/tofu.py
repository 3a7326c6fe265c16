"""TOFU's metrics, from losses or from the evaluation logs that its authors publish.

Maini et al., TOFU: A Task of Fictitious Unlearning for LLMs (arXiv 2401.06121), section 2.2, in the
convention of the authors' `aggregate_eval_stat.py`. A loss is the mean negative log-likelihood of
an answer's tokens. NaN marks what cannot be scored: left out of means and tests, and counted.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import hmean, ks_2samp

Floats = NDArray[np.float64]
Log = str | Path | Mapping[str, Any]
RETAIN, FORGET = "eval_log.json", "eval_log_forget.json"
REAL_AUTHORS, WORLD_FACTS = "eval_real_author_wo_options.json", "eval_real_world_wo_options.json"
FIELDS = ("avg_gt_loss", "average_perturb_loss", "avg_paraphrased_loss", "rougeL_recall")
ROUNDING = 1e-4  # how far below 0 the loss of a certain token may be rounded


class ForgetQuality(NamedTuple):
    """Kolmogorov-Smirnov test: p-value, largest gap of the distributions, and rows behind it."""

    p_value: float
    statistic: float
    n_unlearned: int
    n_retain: int
    n_unscorable: int


class SetScores(NamedTuple):
    """The three means of one question set; `n_unscorable` of its `n` rows lack at least one."""

    probability: float
    rouge_recall: float
    truth_ratio: float
    n: int
    n_unscorable: int


class ModelUtility(NamedTuple):
    """The harmonic mean of nine terms, and the three sets that they come from."""

    value: float
    retain: SetScores
    real_authors: SetScores
    world_facts: SetScores

    @property
    def terms(self) -> dict[str, float]:
        """The nine terms by name, such as `retain probability`."""
        names = ("retain", "real authors", "world facts")
        return {
            f"{name} {term}": value
            for name, scores in zip(names, self[1:], strict=True)
            for term, value in zip(("probability", "ROUGE-L", "truth ratio"), scores, strict=False)
        }


class TofuScores(NamedTuple):
    """An unlearned model beside the one retrained without the forget set (`reference_`)."""

    utility: ModelUtility
    reference_utility: ModelUtility
    forget: SetScores
    reference_forget: SetScores
    forget_quality: ForgetQuality


def truth_ratio(
    paraphrased_loss: ArrayLike,
    perturbed_losses: ArrayLike,
    mean: Literal["geometric", "arithmetic"] = "geometric",
    epsilon: float = 0.0,
) -> Floats:
    """How much likelier the wrong answers are than the paraphrased right one, per row.

    Formula: `R = exp(paraphrased_loss - mean_j perturbed_loss_j)`, the geometric mean of the
    wrong answers' length-normalised probabilities over that of the right one: the authors'
    released code and logs. Their paper (equation 1) takes the `arithmetic` mean of the
    probabilities. open-unlearning is geometric too, with an `epsilon` of 1e-10 in the denominator,
    which counts once a right answer's probability is near that. The authors aggregate 1/R; the
    test and both means below agree. Range: [0, inf]. Higher = the wrong answers are preferred; 1 =
    no preference. A row with a NaN is NaN.

    Raises:
        ValueError: negative losses, or not a row of wrong answers for each right one.
    """
    right, wrong = _right_and_wrong(paraphrased_loss, perturbed_losses)
    if mean not in ("geometric", "arithmetic"):
        raise ValueError(f"expected a geometric or an arithmetic mean, got {mean!r}")
    with np.errstate(invalid="ignore", over="ignore"):
        if mean == "geometric" and epsilon:
            return np.exp(-wrong.mean(axis=1)) / (np.exp(-right) + epsilon)
        if mean == "geometric":
            return np.exp(right - wrong.mean(axis=1))
        lowest = wrong.min(axis=1)
        return np.exp(right - lowest) * np.exp(lowest[:, None] - wrong).mean(axis=1)


def probability(
    loss: ArrayLike, perturbed_losses: ArrayLike | None = None, epsilon: float = 0.0
) -> Floats:
    """Length-normalised probability of the answer, per row.

    Formula: `exp(-loss)`; with wrong answers, as for real authors and world facts, its share
    `exp(-loss) / (exp(-loss) + sum_j exp(-perturbed_loss_j) + epsilon)` (section 2.2.1; epsilon
    is 1e-10 in open-unlearning). Range: [0, 1]. Higher = the answer is better known. A row with a
    NaN is NaN.

    Raises:
        ValueError: negative losses, or not a row of wrong answers for each right one.
    """
    if perturbed_losses is None:
        return np.minimum(np.exp(-_losses(loss, 1)), 1.0)
    losses = np.column_stack(_right_and_wrong(loss, perturbed_losses))
    if epsilon:
        given = np.exp(-losses)
        return given[:, 0] / (given.sum(axis=1) + epsilon)
    with np.errstate(invalid="ignore"):
        odds = np.exp(losses.min(axis=1, keepdims=True) - losses)  # the largest is 1: no 0 / 0
    return odds[:, 0] / odds.sum(axis=1)


def aggregate_truth_ratios(ratios: ArrayLike, forgotten: bool) -> float:
    """Mean over the scored rows of `min(R, 1/R)` on a forget set, `max(0, 1 - R)` on any other.

    As the authors aggregate. Range: [0, 1]. Higher = on a forget set, right and wrong answers are
    closer to equally likely (to reach: the retrained model's value, not 1); on others, the right
    ones are preferred more. NaN rows are left out; NaN without any other.
    """
    return _mean(bounded_truth_ratios(ratios, forgotten))


def bounded_truth_ratios(ratios: ArrayLike, forgotten: bool, epsilon: float = 0.0) -> Floats:
    """The terms of `aggregate_truth_ratios`, one per row; `epsilon` is added to R in 1/R."""
    values = np.asarray(ratios, dtype=np.float64)
    with np.errstate(divide="ignore"):
        if forgotten:
            return np.minimum(values, 1 / (values + epsilon))
        return np.maximum(0.0, 1 - values)


def forget_quality(
    unlearned_truth_ratios: ArrayLike, retain_truth_ratios: ArrayLike
) -> ForgetQuality:
    """Do truth ratios on the forget set tell the unlearned model from the retrained one?

    Formula: two-sided two-sample Kolmogorov-Smirnov test (section 2.2.2), p-value as
    `scipy.stats.ks_2samp` by default. It is the same for R and 1/R. Both models must be scored on
    the same rows. Range: p-value in [0, 1], higher = harder to tell apart; statistic in [0, 1],
    lower = closer. The p-value falls with the number of rows: read all three. NaN ratios are
    left out and counted; without any other, p-value and statistic are NaN.

    Raises:
        ValueError: ratios that are negative or not one per row.
    """
    given = unlearned_truth_ratios, retain_truth_ratios
    samples = [np.asarray(ratios, dtype=np.float64) for ratios in given]
    if any(sample.ndim != 1 or (sample < 0).any() for sample in samples):
        raise ValueError(f"expected one ratio >= 0 per row, got {samples[0]} and {samples[1]}")
    unlearned, retain = (sample[~np.isnan(sample)] for sample in samples)
    left_out = sum(map(len, samples)) - len(unlearned) - len(retain)
    p_value = statistic = float("nan")
    if len(unlearned) and len(retain):
        test: Any = ks_2samp(unlearned, retain)
        p_value, statistic = float(test.pvalue), float(test.statistic)
    return ForgetQuality(p_value, statistic, len(unlearned), len(retain), left_out)


def model_utility(log: Log) -> ModelUtility:
    """What a model can still do, from a log as `score_logs` takes it.

    Formula: harmonic mean of probability, ROUGE-L recall and truth ratio on the retain set, real
    authors and world facts (section 2.2.1); probability is among the options outside the retain
    set. Range: [0, 1]. Higher = more useful; one term at 0 makes it 0. Each term is a mean over
    the rows that it can score, the others are counted; a term without any makes it NaN.

    Raises:
        ValueError: a file that is not JSON, or a log without these sets or fields.
    """
    content = _read(log)
    sets = [_score_set(content, name)[0] for name in (RETAIN, REAL_AUTHORS, WORLD_FACTS)]
    return ModelUtility(float(hmean([term for scores in sets for term in scores[:3]])), *sets)


def score_logs(unlearned_log: Log, retain_log: Log) -> TofuScores:
    """Model utility and forget quality from two logs in the authors' format.

    A log is a JSON file, or its content: `eval_log.json` (retain set), `eval_log_forget.json`,
    `eval_real_author_wo_options.json` and `eval_real_world_wo_options.json`, each with
    `avg_gt_loss`, `average_perturb_loss`, `avg_paraphrased_loss` and `rougeL_recall` by row; null
    is NaN. `retain_log` is of the model trained without the forget set. Formulas, ranges and
    directions: `model_utility`, `aggregate_truth_ratios`, `forget_quality`.

    Raises:
        ValueError: a log that lacks one of these, or forget sets with different rows.
    """
    unlearned, retain = _read(unlearned_log), _read(retain_log)
    one, other = (_columns(log, FORGET)["avg_gt_loss"] for log in (unlearned, retain))
    if odd := one.keys() ^ other.keys():
        raise ValueError(f"{FORGET}: expected the same rows, {len(odd)} are in one log only")
    (forget, ratios), (reference, expected) = (_score_set(x, FORGET) for x in (unlearned, retain))
    quality = forget_quality(ratios, expected)
    return TofuScores(model_utility(unlearned), model_utility(retain), forget, reference, quality)


def _losses(values: ArrayLike, axes: int) -> Floats:
    losses = np.asarray(values, dtype=np.float64)
    if losses.ndim != axes or (losses < -ROUNDING).any():
        lowest = losses.min(initial=np.inf)
        raise ValueError(f"expected losses >= 0, {axes} axes, got {losses.shape}, lowest {lowest}")
    return losses


def _right_and_wrong(right: ArrayLike, wrong: ArrayLike) -> tuple[Floats, Floats]:
    one, many = _losses(right, 1), _losses(wrong, 2)
    if len(many) != len(one) or not many.shape[1]:
        raise ValueError(f"expected wrong answers for each of {len(one)} rows, got {many.shape}")
    return one, many


def _mean(values: Floats) -> float:
    scored = values[~np.isnan(values)]
    return float(scored.mean()) if scored.size else float("nan")


def _read(log: Log) -> Mapping[str, Any]:
    if isinstance(log, Mapping):
        return log
    try:
        content = json.loads(Path(log).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{log}: expected an evaluation log in JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{log}: expected an evaluation log, got a {type(content).__name__}")
    return content


def _columns(log: Mapping[str, Any], section: str) -> dict[str, dict[str, Any]]:
    """The four fields of one section, each by row in the same order."""
    given = log.get(section, {})
    missing = [name for name in FIELDS if not isinstance(given.get(name), Mapping)]
    if missing:
        raise ValueError(f"{section}: expected values by row for {', '.join(missing)}")
    rows = list(given["avg_gt_loss"])
    if not rows or any(given[name].keys() != set(rows) for name in FIELDS):
        sizes = {name: len(given[name]) for name in FIELDS}
        raise ValueError(f"{section}: expected the same rows in every field, got {sizes}")
    return {name: {row: given[name][row] for row in rows} for name in FIELDS}


def _score_set(log: Mapping[str, Any], section: str) -> tuple[SetScores, Floats]:
    """The means of one question set, and its truth ratios by row."""
    columns = {name: list(column.values()) for name, column in _columns(log, section).items()}
    answer, wrong = columns["avg_gt_loss"], columns["average_perturb_loss"]
    known = probability(answer, None if section in (RETAIN, FORGET) else wrong)
    ratios = truth_ratio(columns["avg_paraphrased_loss"], wrong)
    rouge = np.asarray(columns["rougeL_recall"], dtype=np.float64)
    truth = aggregate_truth_ratios(ratios, forgotten=section == FORGET)
    unscorable = int(np.isnan(np.array([known, rouge, ratios])).any(axis=0).sum())
    return SetScores(_mean(known), _mean(rouge), truth, len(ratios), unscorable), ratios
