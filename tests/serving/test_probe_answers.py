"""Answers are compared with what is served, computed afresh, and with a run that never saw the subject."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from llm_unlearn.errors import RunError
from llm_unlearn.exact.adapters import WEIGHTS_NAME
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.serving.outside.http_client import Server
from llm_unlearn.serving.probe.answers import Asking, compare_answers
from tests.serving.loopback import Question, Said, running
from tests.tiny import make_run, tiny_records

PROMPTS = tuple(f"Question: what does person {n} eat on day 0? Answer:" for n in (3, 4, 5))
SMALL: dict[str, Any] = {"num_shards": 2, "num_slices": 2, "num_sequences": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[S3TRun, S3TRun]:
    """A run from which somebody was deleted, rebuilt, and one that never held them."""
    folder = tmp_path_factory.mktemp("answers")
    run = make_run(folder / "run", tiny_base, **SMALL)
    run.delete(["person 3"])
    run.rebuild()
    never = [record for record in tiny_records() if record.subject != "person 3"]
    return run, make_run(folder / "never", tiny_base, never, **SMALL)


def answerer(run: S3TRun, base: Path) -> Callable[[str, int], str]:
    """A server's engine, as plain as can be."""
    ensemble, tokenizer = run.ensemble(), AutoTokenizer.from_pretrained(base)

    def answer(prompt: str, tokens: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            for _ in range(tokens):
                following = ensemble(ids).logits[:, -1].argmax(-1, keepdim=True)
                ids = torch.cat([ids, following], dim=1)
                if following.item() == 2:
                    break
        given = len(tokenizer(prompt)["input_ids"])
        return tokenizer.decode(ids[0, given:], skip_special_tokens=True)

    return answer


class Ensemble:
    def __init__(self, answer: Callable[[str, int], str]):
        self.answer = answer
        self.instead: dict[str, str] = {}

    def __call__(self, question: Question) -> Said:
        if question.path == "/v1/models":
            return Said(200, {"data": [{"id": "run"}]})
        body = question.body
        assert body["temperature"] == 0 and body["model"] == "run"
        text = self.answer(body["prompt"], body["max_tokens"])
        return Said(200, {"choices": [{"text": self.instead.get(body["prompt"], text)}]})


@pytest.fixture
def engine(runs: tuple[S3TRun, S3TRun], tiny_base: Path) -> Ensemble:
    return Ensemble(answerer(runs[0], tiny_base))


@pytest.fixture
def server(engine: Ensemble) -> Iterator[Server]:
    with running(engine) as address:
        yield Server(address)


def test_equal_and_different(runs: tuple[S3TRun, S3TRun], server: Server, engine: Ensemble) -> None:
    run, never = runs
    asking = Asking(PROMPTS, 8)
    look = compare_answers(server, run.path, asking)
    assert look.problems == [] and look.notes[0] == "3 of 3 answers are equal"
    beside = compare_answers(server, None, Asking(PROMPTS, 8, reference=str(never.path)))
    assert beside.problems == [], "as a run that never saw the subject"
    engine.instead[PROMPTS[1]] = " dish number 9"
    look = compare_answers(server, run.path, asking)
    assert look.problems == ["1 answers differ, the first in row 2"]
    shown = compare_answers(server, run.path, Asking(PROMPTS, 8, show_text=True))
    assert "' dish number 9' instead of " in shown.problems[0]


def test_a_reference_that_fails_its_verification_is_none(
    runs: tuple[S3TRun, S3TRun], server: Server, tmp_path: Path
) -> None:
    shutil.copytree(runs[0].path, tmp_path / "run", symlinks=True)
    key = runs[0].directory.nodes.keys()[0]
    (tmp_path / "run" / "nodes" / key / WEIGHTS_NAME).write_bytes(b"x")
    with pytest.raises(RunError, match=r"fails its verification \(nodes, served\)|\(nodes"):
        compare_answers(server, tmp_path / "run", Asking(PROMPTS))
