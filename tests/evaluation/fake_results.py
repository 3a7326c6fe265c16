"""Results that look like those of an evaluation, made up from a seed."""

import math

import numpy as np

from llm_unlearn.evaluation.results import (
    Check,
    Difference,
    Evaluation,
    Results,
    Text,
    Value,
)

HOSTILE = "<script>alert('x')</script> & $\\frac{1}{2}$ {{ 7*7 }}"
SECRET = "Zebulon Quackenbush lives at 4 Fern Lane"
LONG_LABEL = "/data/runs/2024/a-very-long-directory-name/llama-7b/npo_beta_0.1/checkpoint-1200"

MUSE = {  # metric: (model, retrained, before)
    "forget_verbmem": (0.11, 0.14, 0.99),
    "forget_knowmem": (0.22, 0.28, 0.59),
    "privleak": (-38.0, 0.0, -96.0),
    "retain_knowmem": (0.46, 0.68, 0.67),
    "extraction_strength": (0.06, 0.05, 0.71),
    "exact_memorization": (0.41, 0.44, 0.93),
    "mia_min_k": (0.63, 0.46, 0.97),
    "forget_knowmem_name_free": (0.17, 0.16, 0.34),
    "substitution": (0.21, 0.02, 0.01),
    "token_entropy": (1.8, 1.2, 0.6),
    "a_new_metric": (0.5, 0.5, 0.5),
}
TOFU = {
    "forget_quality": (3e-7, math.nan, 1.8e-21),
    "model_utility": (0.57, 0.61, 0.62),
    "forget_probability": (0.22, 0.15, 0.99),
    "forget_rouge": (0.44, 0.39, 0.98),
    "forget_truth_ratio": (0.61, 0.67, 0.52),
    "retain_probability": (0.91, 0.99, 0.99),
    "retain_rouge": (0.84, 0.98, 0.98),
    "mia_min_k": (0.41, 0.46, 0.95),
}
SHIFTS = {"model": 0.6, "retrained": 0.0, "before": 2.6}  # of the members' scores
ROLES = ("model", "retrained", "before")


def fake_muse(label: str = LONG_LABEL, seed: int = 0, **changes) -> Results:
    return _results("muse_small", "default", MUSE, label, seed, **changes)


def fake_tofu(label: str = "runs/npo", seed: int = 0, **changes) -> Results:
    return _results("tofu_forget10", "default", TOFU, label, seed, **changes)


def alone(results: Results) -> Results:
    """The same without any reference."""
    results.others, results.differences = {}, {}
    return results


def all_nan(results: Results) -> Results:
    """The same with nothing that could be scored."""
    results.curves = {name: [Value(math.nan)] * 3 for name in results.curves}
    for one in (results.model, *results.others.values()):
        one.values = {name: Value(math.nan, n_unscorable=9, note="too long") for name in one.values}
        one.records = {
            section: {name: np.full_like(column, math.nan) for name, column in columns.items()}
            for section, columns in one.records.items()
        }
    nan = math.nan
    results.differences = {name: Difference("retrained", nan, nan, nan, 0) for name in MUSE}
    return results


def _results(suite, profile, table, label, seed, method=None, texts=True) -> Results:
    made = {
        role: _evaluation(role, column, table, label if role == "model" else f"models/{role}", seed)
        for column, role in enumerate(ROLES)
    }
    if suite.startswith("tofu"):
        made["redirect"] = _evaluation("redirect", 0, table, "redirect", seed + 50)
        made["refuse"] = _evaluation("refuse", 0, table, "refuse", seed + 60)
    if not texts:
        for one in made.values():
            one.texts = []
    model = made.pop("model")
    return Results(
        suite=suite,
        profile=profile,
        model=model,
        others=made,
        differences={
            name: Difference("retrained", now - then, now - then - 0.05, now - then + 0.05, 100)
            for name, (now, then, _) in table.items()
        },
        verdict="failed: forgotten text can be told from holdout text",
        checks=[
            Check("decoys are caught", "passed", "redirect was flagged by substitution"),
            Check("like retraining", "failed", "PrivLeak -38.0 % [-48.0, -28.0]"),
            Check("no refusal", "undecided", "+0.050 [-0.010, +0.110] on all rows"),
            Check("capacity", "no baseline", "the model before unlearning was not given"),
        ],
        curves={
            name: [Value(0.46 - 0.05 * k, 0.40 - 0.05 * k, 0.52 - 0.05 * k, 100) for k in range(4)]
            for name in ("scalability", "sustainability")
            if suite.startswith("muse")
        },
        configuration={"seed": seed, "min_k": 0.4} | ({"method": method} if method else {}),
        digests={"data": f"data-of-{suite}", "configuration": "c0ffee"},
        versions={"llm-unlearn": "0.1.0", "torch": "2.9"},
    )


def _evaluation(role: str, column: int, table: dict, label: str, seed: int) -> Evaluation:
    random = np.random.default_rng([seed, column])
    values = {}
    for name, row in table.items():
        scale = 10.0 if name == "privleak" else 0.04
        noise = 0.0 if name == "forget_quality" else scale / 4 * random.standard_normal()
        value = row[column] + (noise if seed else 0.0)
        bounds = (math.nan,) * 2 if name == "forget_quality" else (value - scale, value + scale)
        values[name] = Value(value, *bounds, n=100, n_unscorable=2, detail={"D": 0.25})
    pair = ("privleak/forget", "privleak/holdout") if "privleak" in table else ("forget", "holdout")
    records = {
        section: {
            name: random.normal(shift, 1.0, 100) - 6
            for name in ("loss", "zlib", "min_k", "min_k_plus_plus")
        }
        for section, shift in zip(pair, (SHIFTS.get(role, 0.3), 0.0), strict=True)
    }
    records["knowmem/forget_qa"] = {
        "rougeL_f1": random.random(20),
        "refused": np.array([math.nan] + [0.0] * 19),
    }
    texts = [
        Text("knowmem/forget_qa", row, f"Where? {HOSTILE}", SECRET, f"{role}: {SECRET} {HOSTILE}")
        for row in range(20)
    ]
    cost = {"seconds": 81.5, "peak_memory_bytes": 2.5e9, "tokens": 120_000.0}
    return Evaluation(role, label, f"digest-{label}-{seed}", values, records, texts, cost)
