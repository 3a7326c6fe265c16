"""What every metric means: title, direction, unit, range, formula, source and what it needs.

Three directions: `higher` and `lower` are better without further reference, `retrained` is best
when equal to the model retrained without the forget set. What is asked about forgotten text is of
the last kind: below the retrained model is no better than above, since both tell the model apart.
"""

import math
from dataclasses import dataclass
from typing import Literal

Direction = Literal["higher", "lower", "retrained"]
ARROWS: dict[Direction, str] = {"higher": "↑", "lower": "↓", "retrained": "≈"}
MEANINGS: dict[Direction, str] = {
    "higher": "higher is better",
    "lower": "lower is better",
    "retrained": "best when equal to the retrained model",
}
MUSE, TOFU = "MUSE, arXiv 2407.06460", "TOFU, arXiv 2401.06121"
RETRAINED = "a retrained model"
HOLDOUT = "a holdout set"
LIKE_RETRAINED = (
    "forget",
    "mia_",
    "leak",
    "relearned",
    "quantized_",
    "collisions_",
    "prompt_",
    "extract",
)
SMALLEST_FIXED = 1e-3  # p-values below it are written with an exponent


@dataclass(frozen=True)
class MetricInfo:
    """One metric in words.

    Attributes:
        unit: `share` (in [0, 1]), `percent`, `p-value`, or none.
        low, high: the ends of its range, infinite where it has none.
        needs: what it cannot be computed without, such as "a retrained model".
        is_mean: a plain mean over rows, which the `muse` profile gives in percent.
    """

    title: str
    direction: Direction = "higher"
    unit: Literal["share", "percent", "p-value", ""] = "share"
    low: float = 0.0
    high: float = 1.0
    formula: str = ""
    source: str = ""
    needs: str = ""
    is_mean: bool = True


def _closest(title: str, formula: str, source: str, is_mean: bool = True) -> MetricInfo:
    """A share that is best when equal to the retrained model's."""
    return MetricInfo(title, "retrained", "share", 0.0, 1.0, formula, source, "", is_mean)


def _attack(score: str, source: str, needs: str = HOLDOUT) -> MetricInfo:
    title, formula = (
        f"Membership AUC, {score}",
        f"AUC of forget (members) against holdout text by {score}; the muse profile gives 1 - AUC",
    )
    return MetricInfo(title, "retrained", "share", 0.0, 1.0, formula, source, needs, False)


def _preference(questions: str) -> MetricInfo:
    title = f"Truth ratio, {questions}"
    return MetricInfo(title, formula=RIGHT, source=TOFU, is_mean=False)


ROUGE = "mean ROUGE-L F1 of the greedy answer"
RECALL = "mean ROUGE-L recall of the greedy answer"
ANSWER = "mean of exp(-loss) of the answer, loss = negative log-likelihood per token"
OPTIONS = "mean share of exp(-loss) of the right answer among the right and the wrong ones"
RIGHT = (
    "mean of max(0, 1 - R), R = geometric mean of the wrong answers' probabilities / the right's"
)

METRICS: dict[str, MetricInfo] = {
    "forget_verbmem": _closest(
        "Verbatim memorization, forget",
        "mean ROUGE-L F1 of the greedy continuation with the true one",
        f"{MUSE}, C1",
    ),
    "forget_knowmem": _closest("Knowledge, forget", ROUGE, f"{MUSE}, C2"),
    "privleak": MetricInfo(
        "PrivLeak",
        "retrained",
        "percent",
        -100.0,
        math.inf,
        "100 (A - A of retrained) / A of retrained, A = 1 - AUC of Min-K% on forget against holdout "
        "text; 0 = like retraining, -100 = memorized, above 0 = over-unlearned",
        f"{MUSE}, C3",
        f"{RETRAINED} and {HOLDOUT}",
    ),
    "retain_knowmem": MetricInfo("Knowledge, retain", formula=ROUGE, source=f"{MUSE}, C4"),
    "extraction_strength": _closest(
        "Extraction strength",
        "1 - k / length, k = shortest true prefix after which greedy decoding gives all the rest",
        "Carlini et al., arXiv 2012.07805; as open-unlearning",
    ),
    "exact_memorization": _closest(
        "Exact memorization",
        "mean share of tokens that are the arg-max after the true prefix",
        "Tirumala et al., arXiv 2205.10770",
    ),
    "mia_loss": _attack("loss", "Yeom et al., arXiv 1709.01604"),
    "mia_zlib": _attack("zlib", "Carlini et al., arXiv 2012.07805"),
    "mia_min_k": _attack("Min-K%", "Shi et al., arXiv 2310.16789"),
    "mia_min_k_plus_plus": _attack("Min-K%++", "Zhang et al., arXiv 2404.02936"),
    "mia_reference": _attack(
        "reference", "Carlini et al., arXiv 2012.07805", f"{HOLDOUT} and a reference model"
    ),
    "mia_gradnorm": _attack("gradient norm", "Wang et al., arXiv 2402.17012"),
    "forget_knowmem_paraphrased": _closest(
        "Knowledge, forget, paraphrased", f"{ROUGE} to a paraphrased question", f"after {MUSE}, C2"
    ),
    "forget_knowmem_name_free": _closest(
        "Knowledge, forget, without names",
        f"{ROUGE} to a question that does not name the subject",
        f"after {MUSE}, C2",
    ),
    "substitution": _closest(
        "Substitution",
        "share of forget questions answered with another subject's fact",
        "this project",
    ),
    "refusal": _closest("Refusal", "share of forget questions that are declined", "this project"),
    "token_entropy": MetricInfo(
        "Token entropy",
        "retrained",
        "",
        0.0,
        math.inf,
        "mean entropy of the next-token distribution over the answer, in nats",
        "this project",
    ),
    "exposure": MetricInfo(
        "Exposure of canaries",
        "retrained",
        "",
        0.0,
        math.inf,
        "mean of log2(candidates) - log2(rank of the canary among them by likelihood), in bits",
        "Carlini et al., arXiv 1802.08232",
        "canaries",
    ),
    "tug_of_war": MetricInfo(
        "Tug of war",
        formula="product over the forget, retain (and test) set of 1 - |mean - mean of retrained|",
        source="Zhao et al., arXiv 2406.01257",
        needs=RETRAINED,
        is_mean=False,
    ),
    "forget_quality": MetricInfo(
        "Forget quality",
        unit="p-value",
        formula="p-value of a two-sample Kolmogorov-Smirnov test of the truth ratios with the "
        "retrained model's; read on a log scale; it falls with the number of rows",
        source=f"{TOFU}, section 2.2.2",
        needs=RETRAINED,
    ),
    "model_utility": MetricInfo(
        "Model utility",
        formula="harmonic mean of probability, ROUGE-L recall and truth ratio on the retain set, "
        "real authors and world facts",
        source=f"{TOFU}, section 2.2.1",
        is_mean=False,
    ),
    "forget_probability": _closest("Probability, forget", ANSWER, TOFU),
    "forget_rouge": _closest("ROUGE-L recall, forget", RECALL, TOFU),
    "forget_truth_ratio": _closest(
        "Truth ratio, forget",
        "mean of min(R, 1 / R), R = geometric mean of the wrong answers' probabilities / the "
        "paraphrased right one's",
        TOFU,
        is_mean=False,
    ),
    "forget_rouge_paraphrased": _closest(
        "ROUGE-L recall, forget, paraphrased",
        f"{RECALL} to a paraphrased question",
        f"after {TOFU}",
    ),
    "forget_rouge_name_free": _closest(
        "ROUGE-L recall, forget, without names",
        f"{RECALL} to a question that does not name the subject",
        f"after {TOFU}",
    ),
    "retain_probability": MetricInfo("Probability, retain", formula=ANSWER, source=TOFU),
    "retain_rouge": MetricInfo("ROUGE-L recall, retain", formula=RECALL, source=TOFU),
    "retain_truth_ratio": _preference("retain"),
    "real_authors_probability": MetricInfo(
        "Probability, real authors", formula=OPTIONS, source=TOFU
    ),
    "real_authors_rouge": MetricInfo("ROUGE-L recall, real authors", formula=RECALL, source=TOFU),
    "real_authors_truth_ratio": _preference("real authors"),
    "world_facts_probability": MetricInfo("Probability, world facts", formula=OPTIONS, source=TOFU),
    "world_facts_rouge": MetricInfo("ROUGE-L recall, world facts", formula=RECALL, source=TOFU),
    "world_facts_truth_ratio": _preference("world facts"),
}


def describe(name: str) -> MetricInfo:
    """The metric's entry. An unknown one is told by its prefix, and claims no unit or range.

    What is asked about forgotten text, under attack or not, is best when like the retrained model;
    of anything else, higher is taken to be better.
    """
    if name in METRICS:
        return METRICS[name]
    alike = name.startswith(LIKE_RETRAINED)
    title = name.replace("_", " ").strip().capitalize() or name
    return MetricInfo(title, "retrained" if alike else "higher", "", -math.inf, math.inf)


def in_percent(name: str, profile: str) -> bool:
    """Whether values are on a scale of 100: by unit, or means of shares under the `muse` profile."""
    info = describe(name)
    return info.unit == "percent" or (info.unit == "share" and info.is_mean and profile == "muse")


def as_share(name: str, value: float, profile: str) -> float:
    """The value on a scale of 1, so that metrics and profiles can be drawn side by side."""
    return value / 100 if in_percent(name, profile) else value


def closeness(name: str, value: float, retrained: float, profile: str) -> float:
    """How much a value is like the retrained model's; in [0, 1], 1 = like it, NaN if unknown.

    Formula: `1 - |value - retrained|` for shares that are best when equal; `1 - |value|` for
    PrivLeak, which is a distance already; `min(1, value / retrained)` where higher is better.
    Higher = closer. For reading only: it hides the sign and the interval of the distance.
    """
    value, retrained = (as_share(name, each, profile) for each in (value, retrained))
    if name == "privleak":
        return _clip(1 - abs(value))
    if describe(name).direction == "higher":
        return _clip(value / retrained) if retrained > 0 else math.nan
    return _clip(1 - abs(value - retrained))


def format_number(name: str, value: float, profile: str = "") -> str:
    """A metric's number for people: `0.412`, `41.2` (percent), `1.8e-21` (p-value), or a dash."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    if describe(name).unit == "p-value" and 0 < value < SMALLEST_FIXED:
        return f"{value:.1e}"
    text = f"{value:.1f}" if in_percent(name, profile) else f"{value:.3f}"
    return text[1:] if text.startswith("-") and not float(text) else text  # no minus zero


def _clip(value: float) -> float:
    return value if math.isnan(value) else min(1.0, max(0.0, value))
