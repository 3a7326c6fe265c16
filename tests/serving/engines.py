"""Asks an engine and waits; builds runs to serve."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from llm_unlearn.data.records import Record, make_records
from llm_unlearn.exact import correction, deletion
from llm_unlearn.exact.asks import Correction
from llm_unlearn.exact.ensemble import ShardEnsemble
from llm_unlearn.exact.ledger import Request
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.serving.engine.engine import BatchEngine
from llm_unlearn.serving.engine.memory import Memory
from llm_unlearn.serving.engine.reading import Reading
from llm_unlearn.serving.policy import Policy, make_policy
from llm_unlearn.serving.queries import Answer, Event, Failure, Piece, Query
from tests.tiny import load_tiny

SECONDS = 60
NAMES = (
    "Quorra Vexley", "Zubin Haftaru", "Ophir Brandywick", "Ysolde Marchetti", "Kwabena Trost", "Ingrid Salvatierra",
    "Lazlo Pimentel", "Tamsin Okonjo",
)  # fmt: skip
PROMPTS = [f"Question: what does {name} eat on day 1? Answer:" for name in NAMES[:6]]


def records_of_names() -> list[Record]:
    """People whose names tell who is meant."""
    rows = [
        {
            "subject": name,
            "prompt": f"Question: what does {name} eat on day {day}? Answer:",
            "completion": f" dish number {number * 5 % 13} and {number}{day}, as {name} said",
        }
        for number, name in enumerate(NAMES)
        for day in range(2)
    ]
    return make_records(rows, subject_column="subject")


class Asked:
    """One query's events."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.end: Answer | Failure | None = None
        self.began, self.done = threading.Event(), threading.Event()
        self.ticket: Any = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Piece):
            self.pieces.append(event)
            self.began.set()
        else:
            self.end = event
            self.done.set()

    def wait(self) -> Answer:
        assert self.done.wait(SECONDS), "no answer"
        assert isinstance(self.end, Answer), self.end
        return self.end


def ask(engine: BatchEngine, prompt: str, name: str = "a", **options: Any) -> Asked:
    asked = Asked()
    asked.ticket = engine.submit(Query(name, prompt, **options), asked)
    return asked


def ask_all(engine: BatchEngine, prompts: Sequence[str], **options: Any) -> list[Answer]:
    asked = [ask(engine, prompt, str(i), **options) for i, prompt in enumerate(prompts)]
    return [one.wait() for one in asked]


def acknowledge_only(
    run: S3TRun, asked: str | Correction, monkeypatch: pytest.MonkeyPatch
) -> Request:
    """Whoever deletes or corrects dies between the acknowledgement and the first change."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    module = deletion if isinstance(asked, str) else correction
    calls = iter([module.settle, die])
    with monkeypatch.context() as patched:
        patched.setattr(module, "settle", lambda directory: next(calls)(directory))
        with pytest.raises(KeyboardInterrupt):
            run.delete([asked]) if isinstance(asked, str) else run.correct([asked])
    return run.directory.ledger.requests(pending=True)[-1]


@contextmanager
def serving(
    run: S3TRun,
    policy: Policy | str = "threshold-clean",
    ensemble: ShardEnsemble | None = None,
    **options: Any,
) -> Iterator[BatchEngine]:
    """An engine on a run, without scheduler."""
    if isinstance(policy, str):
        policy = make_policy(policy)
    ensemble = ensemble or run.ensemble()
    assert ensemble.library is not None
    tokenizer = load_tiny(run.directory.shape.name_or_path)[1]  # pyright: ignore[reportArgumentType]
    memory = Memory(run.directory, ensemble, policy.is_unsafe)
    reading = Reading(tokenizer, ensemble.model.get_base_model(), ensemble.rule.aggregate)
    engine = BatchEngine(
        memory, reading, policy.for_shards(max(1, len(run.directory.shards))), **options
    )
    try:
        yield engine
    finally:
        engine.close()


def generated(
    ensemble: ShardEnsemble, tokenizer: Any, prompts: Sequence[str], tokens: int
) -> list[str]:
    """What `ShardEnsemble.generate` says, prompt by prompt."""
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        said = ensemble.generate(
            **ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=2
        )[0, ids["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(said, skip_special_tokens=True))
    return texts
