"""MUSE's fifth and sixth question, asked of an exact run and of a method that counts."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from llm_unlearn.evaluation.folds import scalability, sustainability
from llm_unlearn.evaluation.harness import Options, evaluate_suite
from llm_unlearn.evaluation.suites.muse import load_muse
from llm_unlearn.exact.run import S3TRun
from tests.evaluation.folders import make_muse_folder
from tests.tiny import make_run, make_tiny_tokenizer


def delete(run: S3TRun, subjects: Sequence[str]) -> S3TRun:
    run.delete(list(subjects))
    return run


def test_requests_follow_one_another_on_an_exact_run(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path / "run", tiny_base, num_shards=2)
    suite = load_muse(str(make_muse_folder(tmp_path / "muse", n=2)))

    def ask(asked: S3TRun) -> tuple[int, str]:
        results = evaluate_suite(asked.ensemble(), make_tiny_tokenizer(), suite, options=Options())
        return asked.status().deleted_subjects, results.model.digest

    steps = list(sustainability(delete, run, [["person 1"], ["person 2", "person 4"]], ask))
    assert [step.forgotten for step in steps] == [1, 3]
    assert [step.score[0] for step in steps] == [1, 3]  # pyright: ignore[reportIndexIssue]
    assert steps[0].score[1] != steps[1].score[1]  # pyright: ignore[reportIndexIssue]


def test_larger_requests_each_start_from_the_same_model(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path / "run", tiny_base)
    copies = iter(range(9))

    def copy() -> S3TRun:
        path = tmp_path / f"copy-{next(copies)}"
        shutil.copytree(run.path, path, symlinks=True)
        return S3TRun.open(path)

    folds = [["person 1"], ["person 1", "person 2"], ["person 1", "person 2", "person 5"]]
    steps = list(scalability(delete, copy, folds, lambda asked: asked.status().requests))
    assert [step.forgotten for step in steps] == [1, 2, 3]
    assert [step.score for step in steps] == [1, 1, 1], "a request met the one before it"
    with pytest.raises(ValueError, match="nested"):
        list(scalability(delete, copy, [["person 1"], ["person 2"]], lambda asked: 0))
