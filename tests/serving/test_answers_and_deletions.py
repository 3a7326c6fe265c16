"""Certified answers come true, and no answer after an acknowledgement knows what was deleted."""

import threading
import time
from pathlib import Path

import pytest

from llm_unlearn.exact.ledger import Ledger
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.serving.policy import make_policy
from llm_unlearn.serving.queries import Answer
from tests.exact.killing import CHANGES, in_child, kill_at
from tests.serving.engines import NAMES, PROMPTS, ask, ask_all, generated, records_of_names, serving
from tests.tiny import load_tiny, make_run

QUESTIONS = [
    *PROMPTS,
    *(f"Question: what does {name} eat on day 0? Answer:" for name in NAMES),
    *(f"{name} said" for name in NAMES),
    "Question: what is it? Answer:",
    "Question: what does Quentin Broadbent eat on day 1? Answer:",
]
LABELS = (" dish", " a", " number", " Answer")
SHAPES = {
    "select": {"exact_method": "experts", "num_shards": 3, "num_slices": 1, "num_sequences": 1},
    "mixture": {"exact_method": "experts", "num_shards": 3, "num_slices": 1, "num_sequences": 1},
    "average": {"num_shards": 5, "num_slices": 2, "num_sequences": 1},
    "vote": {"num_shards": 5, "num_slices": 2, "num_sequences": 1},
    "merge": {"num_shards": 3, "num_slices": 1, "num_sequences": 1},
}


@pytest.fixture(scope="module", params=SHAPES)
def trained(request, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pending") / request.param
    return make_run(
        path, tiny_base, records_of_names(), aggregate=request.param, max_steps=6, **SHAPES[request.param]
    ).path  # fmt: skip


def everything(engine) -> list[Answer]:
    answers = ask_all(engine, QUESTIONS, max_tokens=6)
    answers += ask_all(engine, QUESTIONS, labels=LABELS)
    return answers + ask_all(engine, QUESTIONS, max_tokens=3, temperature=0.7, seed=5)


def test_certified_answers_come_true(run: S3TRun) -> None:
    """Execute all deletions and ask again: what was certified is what is said now, to the last letter."""
    aggregate = run.directory.config.rule.aggregate
    with serving(run, make_policy("deadline-clean", target="retrained")) as engine:
        run.delete([NAMES[3]])
        pending = everything(engine)
        assert engine.state().affected
        assert {a.served for a in pending} <= {"certified", "clean"}
        run.rebuild()
        engine.notice()
        executed = everything(engine)
        assert engine.state().affected == ()
    assert {a.served for a in executed} == {"certified"}
    certified = 0
    for now, later in zip(pending, executed, strict=True):
        count = now.certified_tokens
        certified += now.served == "certified"
        if now.served == "certified":
            assert (now.text, now.finish_reason) == (later.text, later.finish_reason)
        else:
            assert count < now.completion_tokens
    if aggregate == "merge":
        assert certified == 0
    else:
        assert 0 < certified < len(pending)
    assert any(now.text != later.text for now, later in zip(pending, executed, strict=True))


def test_uncertified_answers_wait_or_are_refused(run: S3TRun, tiny_base: Path) -> None:
    tokenizer = load_tiny(tiny_base)[1]
    question = f"Question: what does {NAMES[3]} eat on day 0? Answer:"
    with serving(run, make_policy("threshold-abstain", target="retrained")) as engine:
        run.delete([NAMES[3]])
        answers = ask_all(engine, QUESTIONS, max_tokens=6)
        refused = [a for a in answers if a.served == "refused"]
        assert refused and {a.finish_reason for a in refused} == {"uncertified"}
        assert all(a.certified_tokens == a.completion_tokens for a in answers)
    with serving(run, make_policy("immediate-execute", target="retrained")) as engine:
        asked = [ask(engine, q, max_tokens=6) for q in (question, *QUESTIONS[:3])]
        uncertain = [one for one in asked if not one.done.wait(3)]
        assert uncertain
        run.delete([NAMES[5]])  # reaches what the held answers were certain of
        engine.notice()
        run.rebuild()
        engine.notice()
        texts = [one.wait().text for one in asked]
        assert {one.wait().served for one in uncertain} == {"executed"}
    assert texts == generated(run.ensemble(), tokenizer, (question, *QUESTIONS[:3]), 6)


def test_oblivious_waits_for_everything(run: S3TRun) -> None:
    with serving(run, "oblivious") as engine:
        run.delete([NAMES[3]])
        asked = ask(engine, QUESTIONS[0], max_tokens=3)
        assert not asked.done.wait(2)
        run.rebuild()
        engine.notice()
        assert asked.wait().served in ("executed", "clean")


def test_serving_anyway_is_said_to_be_unsafe(run: S3TRun) -> None:
    with serving(run, make_policy("serve-anyway")) as engine:
        before = [a.text for a in ask_all(engine, QUESTIONS[:6], max_tokens=4)]
        followed = engine.followed
        run.delete([NAMES[3]])
        after = ask_all(engine, QUESTIONS[:6], max_tokens=4)
        assert (
            engine.followed == followed < after[0].epoch
        )  # or the deletion would count as not served
        assert [a.text for a in after] == before
        assert {a.served for a in after} == {"unsafe"} and not any(
            a.certified_tokens for a in after
        )
        run.rebuild()
        engine.notice()
        assert {a.served for a in ask_all(engine, QUESTIONS[:6], max_tokens=4)} == {"certified"}
    assert engine.followed == engine.state().epoch > followed


@pytest.fixture
def people(tiny_base: Path, tmp_path: Path) -> S3TRun:
    """An expert for each: who is there shows in the text."""
    return make_run(
        tmp_path / "people", tiny_base, records_of_names(), exact_method="experts", num_shards=0, num_slices=1,
        num_sequences=1, aggregate="select", max_steps=10, learning_rate=3e-2,
    )  # fmt: skip


def test_every_answer_is_that_of_its_epoch(people: S3TRun, tiny_base: Path) -> None:
    """Clients ask without pause while nearly everybody is deleted, one after the other.

    Each answer has to be, to the letter, what a system says that never saw those who had been deleted at the
    epoch it names; and that epoch has to be no older than what was acknowledged before it was asked.
    """
    tokenizer = load_tiny(tiny_base)[1]
    ledger = people.directory.ledger
    expected = [generated(people.ensemble(), tokenizer, PROMPTS, 10)]
    seen: list[tuple[int, int, Answer]] = []
    acknowledged, stop = 0, threading.Event()
    with serving(people, max_batch=16, max_waiting=64) as engine:

        def client(number: int) -> None:
            while not stop.is_set():
                for place, question in enumerate(PROMPTS):
                    before = acknowledged
                    answer = ask(engine, question, f"{number}", max_tokens=10).wait()
                    seen.append((place, before, answer))

        threads = [threading.Thread(target=client, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        while len(seen) < len(PROMPTS):
            time.sleep(0.01)
        for name in NAMES[:6]:
            people.delete([name])
            acknowledged += 1
            expected.append(generated(people.ensemble(), tokenizer, PROMPTS, 10))
        time.sleep(0.3)
        stop.set()
        for thread in threads:
            thread.join()
    requests = [event.sequence for event in ledger.events("request")]
    for place in range(6):
        assert expected[place][place] != expected[place + 1][place], "presence shows in the output"
    deleted_then = set()
    for place, before, answer in seen:
        deleted = sum(sequence < answer.epoch for sequence in requests)
        assert deleted >= before and answer.text == expected[deleted][place]
        assert answer.served == "certified"
        deleted_then.add(deleted)
    assert len(seen) > 50 and {0, 6} <= deleted_then


def test_kill_9_anywhere_in_a_deletion(people: S3TRun) -> None:
    """What is acknowledged is not served, whatever the dead process left undone; the rest is as it was."""
    path, made = people.path, 0
    questions = {name: f"Question: what does {name} eat on day 1? Answer:" for name in NAMES}
    with serving(people) as engine:
        known = {name: ask(engine, q, max_tokens=8).wait().text for name, q in questions.items()}
        for name, point in zip(NAMES, (1, 6, 9, 12, 16, 22, 30), strict=False):

            def work(name: str = name, point: int = point) -> None:
                kill_at(point, CHANGES)
                S3TRun.open(path).delete([name])

            assert in_child(work) is None, "the process was killed"
            is_known = ask(engine, questions[name], max_tokens=8).wait().text == known[name]
            pending = Ledger.of(path).requests(pending=True)
            pseudonym = people.directory.key.pseudonym("subject", name)
            stones = Ledger.of(path).deleted([pseudonym])
            assert is_known == (not stones), f"killed at {point}"
            made += bool(stones)
            S3TRun.open(path).settle()
            is_known = ask(engine, questions[name], max_tokens=8).wait().text == known[name]
            assert is_known == (not stones)
            if pending:
                assert not Ledger.of(path).requests(pending=True)
        assert 2 <= made < 7
