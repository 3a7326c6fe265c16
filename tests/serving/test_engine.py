"""The engine answers as the ensemble does, whoever is in the batch, and forgets at once."""

import shutil
import threading
from pathlib import Path

import pytest
import torch

from llm_unlearn.errors import UserError
from llm_unlearn.exact import residues
from llm_unlearn.exact.adapters import WEIGHTS_NAME, file_digest
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.serving.engine import engine as engine_module
from llm_unlearn.serving.engine.engine import BatchEngine
from llm_unlearn.serving.queries import Failure, QueueFull
from tests.serving.engines import (
    PROMPTS,
    acknowledge_only,
    ask,
    ask_all,
    generated,
    records_of_names,
    serving,
)
from tests.tiny import FAMILIES, load_tiny, make_run, make_tiny_model, make_tiny_tokenizer

LENGTHS = ["Hello", *PROMPTS[:2], "Question: " * 12 + "what does Ysolde Marchetti eat?"]
SHAPES = {
    "select": {"exact_method": "experts", "num_shards": 0, "num_slices": 1, "num_sequences": 1},
    "average": {"num_shards": 3, "num_slices": 2, "num_sequences": 1},
    "vote": {"num_shards": 3, "num_slices": 2, "num_sequences": 1},
    "merge": {"num_shards": 3, "num_slices": 2, "num_sequences": 1},
}


@pytest.fixture(scope="module", params=SHAPES)
def trained(request, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> S3TRun:
    path = tmp_path_factory.mktemp("served") / request.param
    return make_run(
        path,
        tiny_base,
        records_of_names(),
        aggregate=request.param,
        max_steps=8,
        **SHAPES[request.param],
    )


@pytest.fixture
def run(trained: S3TRun, tmp_path: Path) -> S3TRun:
    shutil.copytree(trained.path, tmp_path / "run", symlinks=True)
    return S3TRun.open(tmp_path / "run")


def test_answers_are_the_ensembles_in_any_company(run: S3TRun, tiny_base: Path) -> None:
    tokenizer = load_tiny(tiny_base)[1]
    expected = generated(run.ensemble(), tokenizer, LENGTHS, 12)
    with serving(run) as engine:
        assert [a.text for a in ask_all(engine, LENGTHS, max_tokens=12)] == expected
        # Others come and go meanwhile: longer, shorter, cancelled.
        long = [
            ask(engine, PROMPTS[i], f"long {i}", max_tokens=60, is_streamed=True) for i in (0, 4)
        ]
        assert long[0].began.wait(60)
        gone = ask(engine, "Question: " * 20, max_tokens=60)
        answers = ask_all(engine, LENGTHS, max_tokens=12)
        gone.ticket.cancel()
        assert [a.text for a in answers] == expected
        assert {a.served for a in answers} == {"certified"}
        texts = [one.wait().text for one in long]
        assert texts == generated(run.ensemble(), tokenizer, [PROMPTS[0], PROMPTS[4]], 60)
        assert ["".join(p.text for p in one.pieces) for one in long] == texts
        state = engine.state()
    assert (state.running, state.waiting, state.held) == (0, 0, 0)


def in_memory_is_what_is_served(engine, run: S3TRun) -> None:
    digests = engine.digests_in_memory()
    if run.directory.config.rule.aggregate == "merge":
        assert len(digests) == 1
        return
    for name, digest in digests.items():
        member, start = name.split("@")
        assert file_digest(run.directory.served / member / WEIGHTS_NAME) == digest
        (resident,) = [r for r in engine.state().residents if r.name == name]
        assert resident.digest.startswith(start)


def test_a_deletion_reaches_every_later_answer(run: S3TRun, tiny_base: Path) -> None:
    tokenizer = load_tiny(tiny_base)[1]
    with serving(run) as engine:
        before = ask_all(engine, PROMPTS, max_tokens=12)
        names = {resident.name for resident in engine.state().residents}
        run.delete(["Ysolde Marchetti"])
        after = ask_all(engine, PROMPTS, max_tokens=12)
        assert [a.text for a in after] == generated(run.ensemble(), tokenizer, PROMPTS, 12)
        assert before[3].text != after[3].text, "the subject's presence is visible in the output"
        assert all(a.epoch == run.directory.ledger.epoch() for a in after)
        in_memory_is_what_is_served(engine, run)
        gone = names - {resident.name for resident in engine.state().residents}
        assert gone
        for name in gone:
            with pytest.raises(UserError, match="no adapter"):
                ask(engine, PROMPTS[0], adapter=name)


def test_acknowledged_is_enough(run: S3TRun, tiny_base: Path, monkeypatch) -> None:
    """Whoever acknowledged dies before a file is changed: the answers are without the subject all the same."""
    asked_before = {}
    with serving(run) as engine:
        asked_before = ask_all(engine, PROMPTS, max_tokens=12)
        slots = dict(engine.memory.library.slots)
        acknowledge_only(run, "Ysolde Marchetti", monkeypatch)
        answers = ask_all(engine, PROMPTS, max_tokens=12)
        assert answers[3].text != asked_before[3].text
        (withdrawn,) = engine.memory.withdrawn
        member = f"shard-{withdrawn}"
        if run.directory.config.rule.aggregate != "merge":
            for layer in engine.memory.library._layers(slots[member]):
                assert not layer.lora_A[slots[member]].weight.any()
                assert not layer.lora_B[slots[member]].weight.any()
        state = engine.state()
        assert [r.state for r in state.residents].count("withdrawn") == 1
        assert state.affected == (withdrawn,)
        # Garbage in its place changes nothing: nobody reads the file any more.
        weights = run.directory.served / member / WEIGHTS_NAME
        weights.write_bytes(b"garbage")
        assert [a.text for a in ask_all(engine, PROMPTS, max_tokens=12)] == [
            a.text for a in answers
        ]
        run.settle()
        after = ask_all(engine, PROMPTS, max_tokens=12)
        tokenizer = load_tiny(tiny_base)[1]
        assert [a.text for a in after] == generated(run.ensemble(), tokenizer, PROMPTS, 12)
        assert engine.state().affected == ()
        in_memory_is_what_is_served(engine, run)


class Pause:
    """Answers say some tokens, and no more until it ends."""

    def __init__(self, engine: BatchEngine, answers: int):
        self._step, self._engine = engine.answering.step, engine
        self._answers, self._steps = answers, 0
        self._is_there, self._go_on = threading.Event(), threading.Event()
        engine.answering.step = self._pausing  # pyright: ignore[reportAttributeAccessIssue]

    def _pausing(self) -> None:
        self._step()
        self._steps += len(self._engine.answering.running) == self._answers
        if self._steps >= 4:
            self._is_there.set()
            assert self._go_on.wait(60)

    def wait(self) -> None:
        assert self._is_there.wait(60)

    def end(self) -> None:
        self._engine.answering.step = self._step  # pyright: ignore[reportAttributeAccessIssue]
        self._go_on.set()


def test_answers_under_way_begin_again_or_end(run: S3TRun, tiny_base: Path) -> None:
    """Each ends as the run without the subject says."""
    tokenizer = load_tiny(tiny_base)[1]
    with serving(run, "immediate-execute") as engine:
        options = {"max_tokens": 100}
        pause = Pause(engine, answers=3)
        whole = ask(engine, PROMPTS[3], "whole", **options)
        streamed = ask(engine, PROMPTS[3], "streamed", is_streamed=True, **options)
        other = ask(engine, PROMPTS[1], "other", is_streamed=True, **options)
        pause.wait()
        run.delete(["Ysolde Marchetti"])
        pause.end()
        expected = generated(run.ensemble(), tokenizer, [PROMPTS[3], PROMPTS[1]], 100)
        assert whole.wait().text == expected[0], whole.wait()
        assert whole.wait().served in ("certified", "executed")
        cut, went_on = streamed.wait(), other.wait()
        if cut.finish_reason != "withdrawn":  # what was given out was certain without the subject
            assert cut.text == expected[0]
        else:
            assert cut.served == "refused"
        if run.directory.config.rule.aggregate == "select":
            assert cut.finish_reason == "withdrawn"
            assert went_on.text == expected[1] and went_on.served in ("certified", "executed")


def test_answers_under_way_forget_what_is_only_acknowledged(run: S3TRun, monkeypatch) -> None:
    """As one that begins now, though no file is changed yet; and again when they are."""
    with serving(run) as engine:
        pause = Pause(engine, answers=2)
        whole = ask(engine, PROMPTS[3], "whole", max_tokens=60)
        streamed = ask(engine, PROMPTS[3], "streamed", max_tokens=60, is_streamed=True)
        pause.wait()
        acknowledge_only(run, "Ysolde Marchetti", monkeypatch)
        pause.end()
        text = whole.wait().text
        assert text == ask(engine, PROMPTS[3], max_tokens=60).wait().text
        cut = streamed.wait()
        assert cut.finish_reason == "withdrawn" or cut.text == text
        pause = Pause(engine, answers=1)
        late = ask(engine, PROMPTS[3], max_tokens=60)
        pause.wait()
        run.settle()
        pause.end()
        late.wait()
        tokenizer = engine.reading.tokenizer
        now = ask(engine, PROMPTS[3], max_tokens=60).wait()
        assert now.served == "certified"
        assert now.text == generated(run.ensemble(), tokenizer, [PROMPTS[3]], 60)[0]


def test_what_is_served_may_change_before_the_nodes_go(run: S3TRun, monkeypatch) -> None:
    """Between the two the nodes of what was deleted are still there: its answers are not called clean."""
    with serving(run) as engine:
        pause = Pause(engine, answers=2)
        whole = ask(engine, PROMPTS[3], "whole", max_tokens=60)
        streamed = ask(engine, PROMPTS[3], "streamed", max_tokens=60, is_streamed=True)
        pause.wait()
        with monkeypatch.context() as patched:

            def die(*_: object) -> None:
                raise KeyboardInterrupt

            patched.setattr(residues, "purge_nodes", die)
            with pytest.raises(KeyboardInterrupt):
                run.delete(["Ysolde Marchetti"])
        pause.end()
        text = ask(engine, PROMPTS[3], max_tokens=60).wait().text
        assert whole.wait().text == text
        cut = streamed.wait()
        assert cut.finish_reason == "withdrawn" or cut.text == text


def test_one_adapter_alone(run: S3TRun, tiny_base: Path) -> None:
    tokenizer = load_tiny(tiny_base)[1]
    with serving(run) as engine:
        resident = engine.state().residents[1]
        answer = ask(engine, PROMPTS[2], adapter=resident.name, max_tokens=8).wait()
    if run.directory.config.rule.aggregate == "merge":
        return
    from peft import PeftModel

    path = run.directory.served / resident.name.split("@")[0]
    model = PeftModel.from_pretrained(load_tiny(tiny_base)[0], str(path)).eval()
    ids = tokenizer(PROMPTS[2], return_tensors="pt")
    with torch.no_grad():
        said = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.text == text


def test_sampling_is_the_same_in_any_company(run: S3TRun) -> None:
    options = {"max_tokens": 10, "temperature": 0.8, "top_p": 0.9, "seed": 7}
    with serving(run) as engine:
        alone = [ask_all(engine, [prompt], **options)[0].text for prompt in PROMPTS]
        assert [a.text for a in ask_all(engine, PROMPTS, **options)] == alone
        assert [a.text for a in ask_all(engine, PROMPTS, **{**options, "seed": 8})] != alone


def test_queue_cancellation_and_the_end(run: S3TRun) -> None:
    with serving(run, max_batch=1, max_waiting=2) as engine:
        first = ask(engine, PROMPTS[0], max_tokens=400, is_streamed=True)
        assert first.began.wait(60)
        others = [ask(engine, PROMPTS[1], max_tokens=400) for _ in range(2)]
        with pytest.raises(QueueFull) as full:
            ask(engine, PROMPTS[2])
        assert full.value.retry_after > 0
        for one in (first, *others):
            one.ticket.cancel()
        assert ask(engine, PROMPTS[2], max_tokens=3).wait().completion_tokens <= 3
        assert not first.done.is_set()
        last = ask(engine, PROMPTS[0], max_tokens=5)
        assert engine.drain(60)
        assert last.wait().text
        with pytest.raises(QueueFull):
            ask(engine, PROMPTS[0])
        assert not engine.state().is_ready


def test_what_cannot_be_answered_is_said_at_once(run: S3TRun) -> None:
    with serving(run) as engine:
        for options, message in (
            ({"max_tokens": 600}, "shorten the prompt"),
            ({"adapter": "shard-0@000000000000"}, "no adapter"),
            ({"labels": ("dish", "dish number")}, "begin with the same"),
        ):
            with pytest.raises(UserError, match=message):
                ask(engine, PROMPTS[0], **options)
        with pytest.raises(UserError, match="empty"):
            ask(engine, "")


def test_a_failure_ends_its_answers_and_nothing_else(run: S3TRun, monkeypatch) -> None:
    with serving(run) as engine:
        broken = threading.Event()

        def fail(*_):
            broken.set()
            raise RuntimeError("out of memory, says the secret prompt")

        monkeypatch.setattr(engine.answering.batch, "read", fail)
        asked = ask(engine, PROMPTS[0])
        assert asked.done.wait(60) and broken.is_set()
        assert isinstance(asked.end, Failure) and "secret" not in asked.end.message
        assert ask(engine, PROMPTS[0], max_tokens=3).wait().text  # with a new batch


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_model_families(family: str, tmp_path: Path) -> None:
    """Positions, masks and windows are the model's own in a batch that rows join and leave."""
    make_tiny_model(family).save_pretrained(tmp_path / "base")
    make_tiny_tokenizer().save_pretrained(tmp_path / "base")
    run = make_run(
        tmp_path / "run", tmp_path / "base", records_of_names(), num_shards=2, num_slices=1, num_sequences=1,
        aggregate="average",
    )  # fmt: skip
    expected = generated(run.ensemble(), make_tiny_tokenizer(), LENGTHS, 8)
    with serving(run) as engine:
        first = ask(engine, PROMPTS[5], max_tokens=40, is_streamed=True)
        assert first.began.wait(60)
        assert [a.text for a in ask_all(engine, LENGTHS, max_tokens=8)] == expected


def test_the_engine_looks_at_the_ledger_by_itself(run: S3TRun) -> None:
    """Another process deletes: nobody notifies, and an idle server forgets all the same."""
    with serving(run) as engine:
        before = engine.state().epoch
        run.delete(["Ophir Brandywick"])
        waited = threading.Event()
        for _ in range(200):
            if engine.state().epoch > before + 1:
                break
            waited.wait(engine_module.LOOK_SECONDS)
        assert engine.state().epoch == run.directory.ledger.epoch()
