"""What Prometheus is told: numbers only, under labels from short fixed lists."""

from collections import Counter as Counts
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from llm_unlearn.errors import RunError
from llm_unlearn.serving.queries import Answer, EngineState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """One server's numbers, in a registry of their own.

    Args:
        state: of the engine; None while there is none.
        deletions: how many deletions are in each state.
        is_well: whether what is pending can be executed, and the others be told how far this one is.
    """

    def __init__(
        self,
        state: Callable[[], EngineState | None],
        deletions: Callable[[], Counts[str]],
        is_well: Callable[[], bool],
    ) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"llm_unlearn_{name}", about, labels, registry=self.registry)

        self.answers = counter("answers", "Answers, by how they were served.", "served", "finish")
        self.failures = counter("failures", "Queries without an answer, by why.", "reason")
        self.rejected = counter("rejected", "HTTP requests that were refused, by why.", "reason")
        self.tokens = counter("tokens", "Tokens read, written, and certified.", "kind")
        self.seconds = Histogram(
            "llm_unlearn_answer_seconds",
            "From the arrival of a request to the end of an answer.",
            ("served",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Now(state, deletions, is_well))

    def answered(self, answer: Answer, seconds: float) -> None:
        self.answers.labels(answer.served, answer.finish_reason).inc()
        self.seconds.labels(answer.served).observe(seconds)
        for kind in ("prompt", "completion", "certified"):
            self.tokens.labels(kind).inc(getattr(answer, f"{kind}_tokens"))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Now:
    """What is asked for when somebody looks."""

    def __init__(
        self,
        state: Callable[[], EngineState | None],
        deletions: Callable[[], Counts[str]],
        is_well: Callable[[], bool],
    ) -> None:
        self.state = state
        self.deletions = deletions
        self.is_well = is_well

    def describe(self) -> Iterator[Any]:
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        state = self.state()
        if state is not None:
            yield from _gauges(state)
        yield _gauge("well", "0: what is pending cannot be executed; see the log.", self.is_well())
        try:
            counts = self.deletions()
        except RunError:  # the other numbers are wanted most while the ledger is away
            counts = None
        yield _gauge("ledger_readable", "Whether the ledger can be read.", counts is not None)
        family = GaugeMetricFamily(
            "llm_unlearn_deletions", "Deletions in the ledger, by state.", labels=["state"]
        )
        for name, count in (counts or {}).items():
            family.add_metric([name], count)
        yield family


def _gauge(name: str, about: str, value: int) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"llm_unlearn_{name}", about, value=int(value))


def _gauges(state: EngineState) -> Iterator[GaugeMetricFamily]:
    told = {
        "epoch": ("Entries of the ledger that every answer knows.", state.epoch),
        "affected_shards": ("Shards that pending requests affect.", len(state.affected)),
        "running": ("Queries in the batch.", state.running),
        "waiting": ("Queries in the queue.", state.waiting),
        "held": ("Uncertified queries that wait for an execution.", state.held),
        "adapters_loaded": ("Adapters in memory.", len(state.loaded)),
        "ready": ("Whether queries are answered.", int(state.is_ready)),
    }
    for name, (about, value) in told.items():
        yield _gauge(name, about, value)
