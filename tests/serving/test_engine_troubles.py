"""Trouble at the worst moments: no query is lost, and nothing that was deleted comes back with one."""

import threading
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.errors import RunError
from llm_unlearn.exact.library import ServedChangedError
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.serving.engine.batch import Batch
from llm_unlearn.serving.engine.choosing import Chooser
from llm_unlearn.serving.queries import Failure
from tests.serving.engines import NAMES, PROMPTS, ask, ask_all, generated, records_of_names, serving
from tests.tiny import load_tiny, make_run

SUBJECT, QUESTION = NAMES[3], PROMPTS[3]
SHAPES = {
    "select": {"exact_method": "experts", "num_shards": 0, "num_slices": 1, "num_sequences": 1},
    "average": {"num_shards": 3, "num_slices": 1, "num_sequences": 1},
}


@pytest.fixture(scope="module", params=SHAPES)
def trained(request, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(
        tmp_path_factory.mktemp("troubles") / request.param, tiny_base, records_of_names(),
        aggregate=request.param, max_steps=10, learning_rate=3e-2, **SHAPES[request.param],
    ).path  # fmt: skip


class Once:
    """Stands in for a method: does something else at one call of it, and is the method otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, at: int = 1):
        self.calls, self.at, self.act = 0, at, lambda: None
        original = getattr(owner, name)

        def called(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                self.act()
            return original(*arguments)

        monkeypatch.setattr(owner, name, called)


def raising(error: Exception) -> None:
    raise error


def test_what_was_put_back_forgets_what_is_deleted_meanwhile(
    run: S3TRun, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer is in the queue again with what it has said, and its subject is deleted before it goes on."""
    tokenizer = load_tiny(tiny_base)[1]
    step = Once(monkeypatch, Batch, "step", at=6)

    def delete_and_fail() -> None:
        run.delete([SUBJECT])
        raise ServedChangedError("another process deletes")

    with serving(run) as engine:
        known = ask(engine, QUESTION, max_tokens=20).wait().text
        step.calls, step.act = 0, delete_and_fail
        answer = ask(engine, QUESTION, max_tokens=20).wait()
        assert step.calls > 6
    (expected,) = generated(run.ensemble(), tokenizer, [QUESTION], 20)
    assert answer.text == expected
    assert answer.epoch == run.directory.ledger.epoch()
    if run.directory.config.rule.aggregate == "select":
        assert known != expected, "the subject's presence is visible in the output"


def test_what_is_streamed_ends_where_it_cannot_be_taken_back(
    run: S3TRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Once(monkeypatch, Batch, "step", at=6)

    def delete_and_fail() -> None:
        run.delete([SUBJECT])
        raise ServedChangedError("another process deletes")

    with serving(run) as engine:
        step.act = delete_and_fail
        answer = ask(engine, QUESTION, max_tokens=20, is_streamed=True).wait()
    assert (answer.finish_reason, answer.served) == ("withdrawn", "refused")


def test_the_readers_change_while_they_are_asked_for(
    run: S3TRun, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is deleted leaves the answers also where nobody can say who reads them now."""
    tokenizer = load_tiny(tiny_base)[1]
    step = Once(monkeypatch, Batch, "step", at=6)

    def delete() -> None:
        run.delete([SUBJECT])
        choose = Once(monkeypatch, Chooser, "choose")
        choose.act = lambda: raising(ServedChangedError("and another one"))
        engine.notice()

    with serving(run) as engine:
        known = ask(engine, QUESTION, max_tokens=20).wait().text
        step.calls, step.act = 0, delete
        answer = ask(engine, QUESTION, max_tokens=20).wait()
    (expected,) = generated(run.ensemble(), tokenizer, [QUESTION], 20)
    assert answer.text == expected
    if run.directory.config.rule.aggregate == "select":
        assert known != expected, "the subject's presence is visible in the output"


@pytest.mark.parametrize("owner, name", [(Chooser, "choose"), (Batch, "read")])
def test_what_is_served_changes_while_answers_begin(
    run: S3TRun, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    """None is lost, none is answered twice."""
    tokenizer = load_tiny(tiny_base)[1]
    once = Once(monkeypatch, owner, name)
    once.act = lambda: raising(ServedChangedError("changed"))
    with serving(run) as engine:
        texts = [answer.text for answer in ask_all(engine, PROMPTS[:4], max_tokens=8)]
        assert engine.drain(10)
    assert texts == generated(run.ensemble(), tokenizer, PROMPTS[:4], 8)


def test_a_ledger_that_is_away(run: S3TRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is answered that the ledger was not asked about, and who asked is told."""
    with serving(run) as engine:
        assert ask(engine, QUESTION, max_tokens=3).wait().text
        with monkeypatch.context() as patched:
            away = threading.Event()

            def fail() -> int:
                away.set()
                raise RunError("the ledger cannot be reached")

            patched.setattr(run.directory.ledger, "epoch", fail)
            assert away.wait(10)
            asked = ask(engine, QUESTION, max_tokens=3)
            assert asked.done.wait(10) and not asked.pieces
            assert isinstance(asked.end, Failure) and asked.end.kind == "unavailable"
            assert not engine.state().is_ready
        assert ask(engine, QUESTION, max_tokens=3).wait().text
        assert engine.state().is_ready


def test_a_failure_ends_what_waits_with_words_of_others_too(
    run: S3TRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has to forget may be lost with the failure; who has said nothing has nothing to forget."""
    step = Once(monkeypatch, Batch, "step", at=6)
    with serving(run) as engine:

        def put_back_and_fail() -> None:
            engine._put_back(engine.answering.take_back())
            raise RuntimeError("in the middle of something")

        step.act = put_back_and_fail
        begun = ask(engine, QUESTION, max_tokens=20)
        assert begun.done.wait(10)
        assert isinstance(begun.end, Failure) and begun.end.kind == "unavailable"
        assert ask(engine, QUESTION, max_tokens=3).wait().text


def test_the_end_waits_for_what_has_just_been_taken(
    run: S3TRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the queue nor in the batch, but under way."""
    begins, go_on = threading.Event(), threading.Event()
    once = Once(monkeypatch, Chooser, "choose")

    def pause() -> None:
        begins.set()
        go_on.wait(10)

    once.act = pause
    with serving(run) as engine:
        asked = ask(engine, QUESTION, max_tokens=3)
        assert begins.wait(10)
        assert not engine.drain(0.2), "it is under way"
        go_on.set()
        assert engine.drain(10) and asked.wait().text
