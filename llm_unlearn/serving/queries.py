"""What is asked of the engine and what it says, between the HTTP side and the model's side."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

Served = Literal["certified", "clean", "executed", "refused", "unsafe"]
"""How a query was served.

`certified`: as the system will answer when everything pending has been executed. `clean`: by what
never saw the deleted data, without that certificate. `executed`: it waited for the execution.
`refused`: not answered. `unsafe`: by what may have seen deleted data (a baseline, for comparison).
"""


@dataclass(frozen=True)
class Query:
    """One prompt, for a text or for a vote.

    Attributes:
        id: made by the server; seeds the noise of sampling where no seed is given.
        prompt: as the model reads it, chat template applied.
        asked: the part of a conversation that decides who answers; None: all of the prompt.
        temperature: 0 for the likeliest token.
        top_p: of each shard's own distribution, before the shards are put together.
        stop: texts that end the answer, and are not part of it.
        labels: the answers to choose from; none: a text is generated.
        adapter: name of one served adapter that answers alone; None: the ensemble.
        is_streamed: pieces are given out as they come. What was given out cannot be taken back: where
            a deletion reaches it the answer ends as `withdrawn`, where others begin again.
        ignores_end: go on after a token that ends a text, up to `max_tokens`.
    """

    id: str
    prompt: str
    asked: str | None = None
    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    adapter: str | None = None
    is_streamed: bool = False
    ignores_end: bool = False


@dataclass(frozen=True)
class Piece:
    """Some more text of an answer.

    Attributes:
        tokens: how many it is made of.
        is_certified: whether all text so far is what it will be after the execution.
    """

    text: str
    tokens: int
    is_certified: bool


@dataclass(frozen=True)
class Answer:
    """The end of an answer.

    Attributes:
        text: all of it (of a vote: the label).
        finish_reason: `stop`, `length`, or `withdrawn`: it was cut off because what it stood on was
            deleted meanwhile, or (`uncertified`) because the policy abstains.
        epoch: entries of the ledger when it began, or began again.
        affected: shards that a pending request affected then.
        certified_tokens: how many tokens from the first are certified.
        tally: votes for each label, in their order.
        counts: for each of the first tokens that several readers chose: what it has for certain, what
            the best other could reach, and the affected weight. No token can be told from them.
    """

    text: str
    finish_reason: Literal["stop", "length", "withdrawn", "uncertified"]
    served: Served
    epoch: int
    affected: int
    prompt_tokens: int
    completion_tokens: int
    certified_tokens: int
    tally: tuple[int, ...] = ()
    counts: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Failure:
    """No answer, and what to do.

    Attributes:
        kind: `invalid`: the query can never be answered (say, longer than the context);
            `unavailable`: try again.
        retry_after: seconds, where trying again helps.
    """

    kind: Literal["invalid", "unavailable"]
    message: str
    retry_after: float | None = None


Event = Piece | Answer | Failure
Listener = Callable[[Event], None]
"""Called from the engine's thread: pieces, then one answer or failure. Must not block."""


class QueueFull(Exception):
    """As many queries wait as may; `retry_after` seconds from now there may be room."""

    def __init__(self, retry_after: float):
        super().__init__(f"too many queries are waiting: try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Ticket(Protocol):
    def cancel(self) -> None:
        """Nobody waits for the answer any more; its rows leave the batch. Harmless afterwards."""
        ...


@dataclass(frozen=True)
class Resident:
    """An adapter in the server's memory.

    Attributes:
        name: `shard-3@` and the beginning of its digest, so that another content has another name.
        shard: None for the permanent core.
        digest: of the served adapter's files, as its lineage says.
        nodes: keys of the nodes it is made of.
        epoch: entries of the ledger when it was loaded.
        state: `whole`; `shortened`: clean, but a rebuild would change it; `withdrawn`: its weights
            are zeros until what is left of it is on disk.
        in_flight: how many running answers read it.
    """

    name: str
    shard: int | None
    digest: str
    nodes: tuple[str, ...]
    epoch: int
    state: Literal["whole", "shortened", "withdrawn"]
    in_flight: int


@dataclass(frozen=True)
class EngineState:
    """What the engine holds now.

    Attributes:
        epoch: entries of the ledger that every answer from now on knows.
        residents: adapters that are served (`residents[i].name`), in memory or ready to be loaded.
        loaded: names of those that are in memory.
        affected: shards that pending requests affect, under the policy's target.
        running: queries in the batch; `waiting`: in the queue; `held`: uncertified, waiting for an
            execution.
        is_ready: whether it answers queries.
    """

    epoch: int
    residents: tuple[Resident, ...]
    loaded: tuple[str, ...]
    affected: tuple[int, ...]
    running: int
    waiting: int
    held: int
    is_ready: bool


class Engine(Protocol):
    """What the HTTP side needs of the model's side; every method may be called from any thread."""

    def submit(self, query: Query, listen: Listener) -> Ticket:
        """Put a query into the queue.

        Raises:
            QueueFull: it is full.
            UserError: no such adapter, a prompt that does not fit, labels that cannot be told apart.
        """
        ...

    def state(self) -> EngineState: ...

    def digests_in_memory(self) -> dict[str, str]:
        """By name of a loaded adapter, the SHA-256 of its tensors as they are in memory now.

        Computed by `llm_unlearn.exact.adapters` as for files, so that both can be compared.
        """
        ...

    def notice(self) -> None:
        """The ledger may have changed: look before the next token."""
        ...

    def drain(self, seconds: float) -> bool:
        """Take no more queries and wait for the running ones; whether all were answered."""
        ...

    def close(self) -> None: ...
