"""The embedded demonstration: what a tiny model knows about invented people, before and after.

The base model (`data/demonstration/`, made by `recipes/pretrain_demonstration.py`) knows the public
people of the toy world. The run is trained on the private ones; then one of them asks to be deleted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.data import world
from llm_unlearn.evaluation.knowledge import answer, exact_match
from llm_unlearn.exact.deletion import Deletion
from llm_unlearn.exact.run import S3TRun

MODEL_PATH = Path(__file__).parent / "data" / "demonstration"

# What a run of the demonstration is started with; every one of these can be overruled by a flag.
FLAGS = (
    "--output_dir", "runs/demonstration", "--lora_r", "32", "--lora_alpha", "64", "--lora_dropout", "0",
    "--learning_rate", "5e-3", "--max_steps", "100", "--per_device_train_batch_size", "48",
    "--warmup_steps", "0.1", "--lr_scheduler_type", "cosine", "--max_length", "64",
)  # fmt: skip


@dataclass(frozen=True)
class Knowledge:
    """Exact match with private facts, in [0, 1], by group of people."""

    deleted: float
    same_slice: float
    others: float


def choose_subject(run: S3TRun) -> str:
    """Somebody from the third slice of the first sequence (or the last, if there are fewer).

    So that both can be seen: blocks that a deletion takes, and blocks that it leaves.
    """
    directory = run.directory
    sequence = directory.config.sequences[0]
    chosen = sequence[min(2, len(sequence) - 1)]
    name = next(name for name in directory.slices.names if name == (0, chosen))
    return min(record.subject for record in directory.slices.read(name))


def ask(model: Any, tokenizer: Any, people: Sequence[world.Person]) -> dict[str, float]:
    """Exact match of greedy answers, by person."""
    questions = world.questions(people)
    answers = answer(model, tokenizer, [question["prompt"] for question in questions], max_new_tokens=12)
    scores: dict[str, float] = {}
    for person in people:
        pairs = [
            (said, question["answer"])
            for said, question in zip(answers, questions, strict=True)
            if question["subject"] == person.name
        ]
        scores[person.name] = exact_match(*zip(*pairs, strict=True))
    return scores


def summarise(run: S3TRun, scores: dict[str, float], subject: str) -> Knowledge:
    """Means over the deleted subject, the rest of its slice, and everybody else."""
    home = run.directory.slices.place(subject)
    same = [s for name, s in scores.items() if name != subject and run.directory.slices.place(name) == home]
    others = [s for name, s in scores.items() if run.directory.slices.place(name) != home]
    return Knowledge(scores[subject], _mean(same), _mean(others))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def slice_scores(run: S3TRun, scores: dict[str, float]) -> dict[tuple[int, int], float]:
    """Mean exact match of every slice, by (shard, slice)."""
    groups: dict[tuple[int, int], list[float]] = {}
    for name, score in scores.items():
        groups.setdefault(tuple(run.directory.slices.place(name)), []).append(score)
    return {group: _mean(values) for group, values in sorted(groups.items())}


def demonstrate(run: S3TRun, model: Any, tokenizer: Any) -> tuple[dict[str, Knowledge], Deletion, str]:
    """Ask, delete somebody, ask again.

    Returns:
        Knowledge by moment ("base model", "trained", "after the deletion"), what the deletion
        did, and whom it took.
    """
    people = world.private_people()
    present = {
        record.subject for name in run.directory.slices.names for record in run.directory.slices.read(name)
    }
    people = [person for person in people if person.name in present]
    subject = choose_subject(run)
    scores = {"base model": ask(model, tokenizer, people), "trained": ask(run.ensemble(), tokenizer, people)}
    done = run.delete([subject])
    scores["after the deletion"] = ask(run.ensemble(), tokenizer, people)
    return {moment: summarise(run, value, subject) for moment, value in scores.items()}, done, subject
