"""TOFU (Maini et al., arXiv 2401.06121): 200 invented authors, of whom some are to be forgotten.

A folder holds the benchmark's own files (JSON lines): `forget10_perturbed.json`, `retain_perturbed.json`,
`real_authors_perturbed.json`, `world_facts_perturbed.json` (`question`, `answer`, `perturbed_answer`, and for
the invented authors `paraphrased_answer`), and for membership attacks `holdout10.json` (`question`,
`answer`; questions about authors that no model was trained on).
"""

from pathlib import Path

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.metrics import (
    Metric,
    attack_of,
    forget_quality_of,
    mean_of,
    model_utility_of,
    privleak_of,
    reference_attack_of,
    truth_ratio_of,
    tug_of_war_of,
)
from llm_unlearn.evaluation.suites.muse import name_subjects, without_names
from llm_unlearn.evaluation.suites.reading import Read, Row, read_folder, read_hub
from llm_unlearn.evaluation.suites.suite import Probes, Questions, Section, Suite, columns_of

HUB = {"tofu": "locuslab/TOFU"}
NEW_TOKENS = 200
ROWS_PER_AUTHOR = 20
FACT_WORDS = (2, 8)
SPLITS = ("forget01", "forget05", "forget10")
OPTIONS = {
    "retain": "probability",
    "real_authors": "option_probability",
    "world_facts": "option_probability",
}


def _means(name: str, probability: str, is_forgotten: bool = False) -> dict[str, Metric]:
    return {
        f"{name}_probability": mean_of(name, probability),
        f"{name}_rouge": mean_of(name, "rougeL_recall"),
        f"{name}_truth_ratio": truth_ratio_of(name, is_forgotten),
    }


METRICS: dict[str, Metric] = {
    "forget_quality": forget_quality_of("forget"),
    "model_utility": model_utility_of(OPTIONS),
    **_means("forget", "probability", is_forgotten=True),
    "forget_rouge_paraphrased": mean_of("forget_paraphrased", "rougeL_recall"),
    "forget_rouge_name_free": mean_of("forget_name_free", "rougeL_recall"),
    "privleak": privleak_of("forget", "holdout"),
    **_means("retain", "probability"),
    **_means("real_authors", "option_probability"),
    **_means("world_facts", "option_probability"),
    "tug_of_war": tug_of_war_of(
        {
            "forget": ("forget", "probability"),
            "retain": ("retain", "probability"),
            "test": ("world_facts", "option_probability"),
        }
    ),
    "extraction_strength": mean_of("forget", "extraction_strength"),
    "exact_memorization": mean_of("forget", "exact_memorization"),
    "mia_loss": attack_of("forget", "holdout", "loss"),
    "mia_zlib": attack_of("forget", "holdout", "zlib"),
    "mia_min_k": attack_of("forget", "holdout", "min_k"),
    "mia_min_k_plus_plus": attack_of("forget", "holdout", "min_k_plus_plus"),
    "mia_gradnorm": attack_of("forget", "holdout", "gradnorm"),
    "mia_reference": reference_attack_of("forget", "holdout"),
    "substitution": mean_of("forget", "substituted"),
    "refusal": mean_of("forget", "refused"),
    "token_entropy": mean_of("forget", "token_entropy", is_share=False),
}

PROBES = Probes(
    leaks=(
        ("forget", "rougeL_recall"),
        ("forget", "probability"),
        ("forget", "extraction_strength"),
        ("forget_paraphrased", "rougeL_recall"),
        ("forget_name_free", "rougeL_recall"),
    ),
    utility=(
        ("retain", "probability"),
        ("retain", "rougeL_recall"),
        ("real_authors", "rougeL_recall"),
        ("world_facts", "rougeL_recall"),
    ),
    intact="world_facts",
    answers="forget",
)


def load_tofu(name: str, forget_split: str = "forget10") -> Suite:
    """`tofu` (from the Hub), or a folder with the benchmark's own files.

    Raises:
        UserError: no such suite or split, or a file that is missing or lacks a column.
    """
    if forget_split not in SPLITS:
        raise UserError(f"unknown --forget_split {forget_split!r}: one of {', '.join(SPLITS)}")
    read = read_hub(HUB[name], is_split=False) if name in HUB else read_folder(Path(name))
    return make_tofu(f"{Path(name).name} {forget_split}", read, forget_split)


def make_tofu(name: str, read: Read, forget_split: str, template: str = "question") -> Suite:
    """The suite from a way to read its files."""
    forgotten = _rows(read, f"{forget_split}_perturbed", "paraphrased_answer")
    forgotten = name_subjects(forgotten, ROWS_PER_AUTHOR)
    retained = name_subjects(_rows(read, "retain_perturbed", "paraphrased_answer"), ROWS_PER_AUTHOR)
    sections: dict[str, Section] = {
        "forget": _questions(forgotten, is_forgotten=True),
        "retain": _questions(retained),
    }
    for public in ("real_authors", "world_facts"):
        rows = _rows(read, f"{public}_perturbed")
        sections[public] = _questions(rows, among_options=True)
    paraphrased = [
        {**row, "question": row["paraphrased_question"]}
        for row in forgotten
        if row.get("paraphrased_question")
    ]
    for variant, rows in (("paraphrased", paraphrased), ("name_free", without_names(forgotten))):
        if rows:
            asked = [{k: r[k] for k in ("question", "answer")} for r in rows]
            sections[f"forget_{variant}"] = Questions(
                asked, new_tokens=NEW_TOKENS, is_forgotten=True
            )
    if holdout := read(forget_split.replace("forget", "holdout")):
        columns_of(holdout, "holdout", "question", "answer")
        sections["holdout"] = Questions(holdout, new_tokens=0, is_scored=True)
    return Suite(
        name,
        sections,
        METRICS,
        PROBES,
        "model_utility",
        template,
        stemmer=True,
        subjects=sorted({str(row["subject"]) for row in forgotten if row.get("subject")}),
        others=sorted({str(row["subject"]) for row in retained if row.get("subject")}),
        others_facts=[str(row["answer"]) for row in retained if _is_fact(str(row["answer"]))],
    )


def _is_fact(answer: str) -> bool:
    """Short enough to be somebody's fact, and long enough not to be anybody's ("Yes")."""
    return FACT_WORDS[0] <= len(answer.split()) <= FACT_WORDS[1]


def _rows(read: Read, name: str, *more: str) -> list[Row]:
    needed = ("question", "answer", "perturbed_answer", *more)
    rows = read(name)
    if rows is None:
        raise UserError(f"the suite has no {name}.json (columns {', '.join(needed)})")
    return columns_of(rows, name, *needed)


def _questions(
    rows: list[Row], among_options: bool = False, is_forgotten: bool = False
) -> Questions:
    return Questions(
        rows,
        new_tokens=NEW_TOKENS,
        is_scored=True,
        among_options=among_options,
        is_forgotten=is_forgotten,
    )
