"""MUSE (Shi et al., arXiv 2407.06460): verbatim and knowledge memorization, privacy, utility.

A folder holds the benchmark's own files: `verbmem/forget.json` (`prompt`, `gt`), `knowmem/forget_qa.json`
and `retain_qa.json` (`question`, `answer`) with their examples in `..._icl.json`, and
`privleak/forget.json` and `holdout.json` (`text`). Ours may be added: `knowmem/forget_qa_paraphrased.json`
and `forget_qa_name_free.json`, and `canaries.json` (`prompt`, `canary`, `candidates`).
"""

from collections.abc import Sequence
from pathlib import Path

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.metrics import (
    Metric,
    attack_of,
    mean_of,
    privleak_of,
    reference_attack_of,
    tug_of_war_of,
)
from llm_unlearn.evaluation.prompts import Shot
from llm_unlearn.evaluation.suites.reading import Read, Row, read_folder, read_hub
from llm_unlearn.evaluation.suites.suite import (
    Canaries,
    Continuations,
    Passages,
    Probes,
    Questions,
    Section,
    Suite,
    columns_of,
    shots_of,
)
from llm_unlearn.evaluation.text import name_free, shared_name

HUB = {"muse-news": "muse-bench/MUSE-News", "muse-books": "muse-bench/MUSE-Books"}
STOPS = ("\n\n", "\nQuestion", "Question:")
FORGET, RETAIN = "knowmem/forget_qa", "knowmem/retain_qa"
MEMBERS, HOLDOUT = "privleak/forget", "privleak/holdout"

METRICS: dict[str, Metric] = {
    "forget_verbmem": mean_of("verbmem/forget", "rougeL_f1"),
    "forget_knowmem": mean_of(FORGET, "rougeL_f1"),
    "forget_knowmem_paraphrased": mean_of(f"{FORGET}_paraphrased", "rougeL_f1"),
    "forget_knowmem_name_free": mean_of(f"{FORGET}_name_free", "rougeL_f1"),
    "privleak": privleak_of(MEMBERS, HOLDOUT),
    "retain_knowmem": mean_of(RETAIN, "rougeL_f1"),
    "tug_of_war": tug_of_war_of({"forget": (FORGET, "rougeL_f1"), "retain": (RETAIN, "rougeL_f1")}),
    "extraction_strength": mean_of("verbmem/forget", "extraction_strength"),
    "exact_memorization": mean_of("verbmem/forget", "exact_memorization"),
    "mia_loss": attack_of(MEMBERS, HOLDOUT, "loss"),
    "mia_zlib": attack_of(MEMBERS, HOLDOUT, "zlib"),
    "mia_min_k": attack_of(MEMBERS, HOLDOUT, "min_k"),
    "mia_min_k_plus_plus": attack_of(MEMBERS, HOLDOUT, "min_k_plus_plus"),
    "mia_gradnorm": attack_of(MEMBERS, HOLDOUT, "gradnorm"),
    "mia_reference": reference_attack_of(MEMBERS, HOLDOUT),
    "exposure": mean_of("canaries", "exposure", is_share=False),
    "substitution": mean_of(FORGET, "substituted"),
    "refusal": mean_of(FORGET, "refused"),
    "token_entropy": mean_of(FORGET, "token_entropy", is_share=False),
}

PROBES = Probes(
    leaks=(
        ("verbmem/forget", "rougeL_f1"),
        ("verbmem/forget", "extraction_strength"),
        ("verbmem/forget", "probability"),
        (FORGET, "rougeL_f1"),
        (f"{FORGET}_paraphrased", "rougeL_f1"),
        (f"{FORGET}_name_free", "rougeL_f1"),
    ),
    utility=((RETAIN, "rougeL_f1"),),
    intact=HOLDOUT,
    answers=FORGET,
)


def load_muse(name: str) -> Suite:
    """`muse-news`, `muse-books` (from the Hub), or a folder in the benchmark's layout.

    Raises:
        UserError: no such suite, or a section that is missing or lacks a column.
    """
    read = read_hub(HUB[name], is_split=True) if name in HUB else read_folder(Path(name))
    return make_muse(name if name in HUB else Path(name).name, read)


def make_muse(name: str, read: Read, template: str = "question") -> Suite:
    """The suite from a way to read its sections."""
    sections: dict[str, Section] = {
        "verbmem/forget": Continuations(_read(read, "verbmem/forget", "prompt", "gt")),
        FORGET: _questions(read, "forget_qa", is_forgotten=True),
        RETAIN: _questions(read, "retain_qa"),
        MEMBERS: Passages(_read(read, MEMBERS, "text")),
        HOLDOUT: Passages(_read(read, HOLDOUT, "text")),
    }
    if name not in HUB:  # sections of ours, which the published data does not have
        sections |= _variants(read, sections[FORGET].rows)
    facts = [str(row["answer"]) for row in sections[RETAIN].rows]
    subjects = sorted({str(r["subject"]) for r in sections[FORGET].rows if r.get("subject")})
    others = sorted({str(r["subject"]) for r in sections[RETAIN].rows if r.get("subject")})
    return Suite(
        name,
        sections,
        METRICS,
        PROBES,
        "retain_knowmem",
        template,
        subjects=subjects,
        others=others,
        others_facts=facts,
    )


def _read(read: Read, name: str, *columns: str) -> list[Row]:
    rows = read(name)
    if rows is None:
        raise UserError(f"the suite has no {name}.json (columns {', '.join(columns)})")
    return columns_of(rows, name, *columns)


def _questions(read: Read, name: str, is_forgotten: bool = False) -> Questions:
    shots: tuple[Shot, ...] = ()
    if examples := read(f"knowmem/{name}_icl"):
        shots = shots_of(columns_of(examples, f"knowmem/{name}_icl", "question", "answer"))
    rows = _read(read, f"knowmem/{name}", "question", "answer")
    return Questions(rows, shots, stops=STOPS, is_forgotten=is_forgotten)


def _variants(read: Read, forgotten: Sequence[Row]) -> dict[str, Section]:
    """The same questions in other words and without the name, and canaries, as far as given."""
    found: dict[str, Section] = {}
    for variant in ("paraphrased", "name_free"):
        rows = read(f"{FORGET}_{variant}")
        if rows is None and variant == "name_free":
            rows = without_names(forgotten)
        if rows:
            rows = columns_of(rows, f"{FORGET}_{variant}", "question", "answer")
            found[f"{FORGET}_{variant}"] = Questions(rows, stops=STOPS, is_forgotten=True)
    if canaries := read("canaries"):
        found["canaries"] = Canaries(
            columns_of(canaries, "canaries", "prompt", "canary", "candidates")
        )
    return found


def without_names(rows: Sequence[Row]) -> list[Row]:
    """Rows whose subject is named in the question, asked about "this person" instead."""
    found: list[Row] = []
    for row in rows:
        asked = str(row["question"])
        nameless = name_free(asked, str(row["subject"])) if row.get("subject") else asked
        if nameless != asked:
            found.append({**row, "question": nameless})
    return found


def name_subjects(rows: Sequence[Row], rows_per_subject: int) -> list[Row]:
    """Add the `subject` that consecutive rows share (TOFU: 20), where a name can be told."""
    named: list[Row] = []
    for start in range(0, len(rows), rows_per_subject):
        group = rows[start : start + rows_per_subject]
        name = shared_name([f"{row['question']} {row['answer']}" for row in group])
        named += [
            {**row, "subject": name} if name and not row.get("subject") else row for row in group
        ]
    return named
