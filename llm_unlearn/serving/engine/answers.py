"""Answers under way: what was asked, who reads it, and what is said so far."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from llm_unlearn.serving.certificate import ScoreTally
from llm_unlearn.serving.engine.batch import Row
from llm_unlearn.serving.engine.decoding import Decoding, Readers
from llm_unlearn.serving.engine.text import TextStream
from llm_unlearn.serving.queries import Answer, Listener, Piece, Query, Served

COUNTED = 512  # tokens whose tallies an answer tells
DIGITS = 4

Finish = Literal["stop", "length", "withdrawn", "uncertified"]


@dataclass
class Stretch:
    """Tokens that were chosen by the same readers."""

    readers: Readers
    tally: ScoreTally | None
    tokens: int = 0
    certified: int = 0

    def is_by(self, names: frozenset[str]) -> bool:
        return not names.isdisjoint(self.readers.names)

    def withdraw(self, names: frozenset[str]) -> None:
        """Some adapters held what was deleted."""
        gone = [i for i, name in enumerate(self.readers.names) if name in names]
        if gone:
            left = 0 if self.tally is None else self.tally.withdraw(gone)
            self.certified = min(self.certified, left)


@dataclass(eq=False)
class Running:
    """One answer under way.

    Attributes:
        prompt: token ids.
        labels: for a vote, the token that stands for each label.
        rows: one for each reader, while it is in the batch.
        tokens: the answer so far.
        was_held: it waited for an execution.
        is_clean: it goes on without certificates.
        is_cancelled: nobody waits for it.
        is_doubtful: since it was read last, a deletion may have changed for whom its prompt is.
    """

    query: Query
    listen: Listener
    prompt: list[int]
    decoding: Decoding
    labels: tuple[int, ...] = ()
    rows: list[Row] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)
    epoch: int = 0
    affected: int = 0
    was_held: bool = False
    is_clean: bool = False
    is_unsafe: bool = False
    is_cancelled: bool = False
    is_doubtful: bool = False
    stream: TextStream | None = None
    given: int = 0  # tokens whose text was given out
    asked_at: float = field(default_factory=time.monotonic)

    def cancel(self) -> None:
        self.is_cancelled = True

    @property
    def certified(self) -> int:
        """How many tokens from the first are certified."""
        count = 0
        for stretch in self.stretches:
            count += stretch.certified
            if stretch.certified < stretch.tokens:
                break
        return count

    @property
    def names_read(self) -> frozenset[str]:
        """Adapters that had a part in it."""
        return frozenset(name for stretch in self.stretches for name in stretch.readers.names)

    def is_read_by(self, readers: Readers | None) -> bool:
        if readers is None or not self.stretches:
            return False
        return readers.members == self.stretches[-1].readers.members

    def renew(self, readers: Readers, is_settled: bool) -> None:
        """The same adapters read it, of which something else is known now.

        Args:
            is_settled: nothing is affected any more: if these readers chose all of it, it is certain.
        """
        stretch = self.stretches[-1]
        if stretch.readers.names != readers.names:
            return
        stretch.readers = readers
        if is_settled and self.names_read == frozenset(readers.names):
            for part in self.stretches:
                part.certified = part.tokens
            self.is_clean = False

    def begin(self, readers: Readers, epoch: int, affected: int, is_unsafe: bool) -> None:
        """From here on these read it."""
        several = len(readers.members) > 1
        weights = self.decoding.weights(readers.shares)
        if self.stretches and not self.stretches[-1].tokens:
            self.stretches.pop()  # they said nothing
        self.stretches.append(Stretch(readers, ScoreTally(weights) if several else None))
        self.epoch, self.affected, self.is_unsafe = epoch, affected, self.is_unsafe or is_unsafe

    def add(self, token: int, is_certified: bool) -> None:
        """One more token; certified if it is, its readers are, and all before it were."""
        stretch = self.stretches[-1]
        is_certified = is_certified and self.certified == len(self.tokens)
        stretch.tokens += 1
        stretch.certified += is_certified and stretch.readers.is_certain
        self.tokens.append(token)

    def cut(self, count: int, tokenizer: Any) -> None:
        """Forget the tokens after the first `count`, which are certified."""
        self.tokens = self.tokens[:count]
        left = count
        kept: list[Stretch] = []
        for stretch in self.stretches:
            if left == 0:
                break
            stretch.tokens = stretch.certified = min(left, stretch.certified)
            left -= stretch.tokens
            kept.append(stretch)
        self.stretches = kept
        self.stream = TextStream(tokenizer, self.query.stop)
        for token in self.tokens:
            self.stream.push(token)

    def give(self, text: str) -> None:
        """Hand out text that is final."""
        if self.query.is_streamed and text:
            is_certified = self.certified == len(self.tokens)
            self.listen(Piece(text, len(self.tokens) - self.given, is_certified))
            self.given = len(self.tokens)

    def answer(self, reason: Finish, tally: Sequence[int] = (), text: str | None = None) -> Answer:
        return Answer(
            text=text if text is not None else (self.stream.text if self.stream else ""),
            finish_reason=reason,
            served=self._served(reason),
            epoch=self.epoch,
            affected=self.affected,
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.tokens),
            certified_tokens=0 if self.is_unsafe else self.certified,
            tally=tuple(tally),
            counts=self._counts(),
        )

    def _counts(self) -> tuple[tuple[float, float, float], ...]:
        told = (
            count
            for stretch in self.stretches
            if stretch.tally is not None
            for count in stretch.tally.counts()[: stretch.tokens]
        )
        first = islice(told, COUNTED)
        return tuple((round(w, DIGITS), round(r, DIGITS), round(a, DIGITS)) for w, r, a in first)

    def _served(self, reason: Finish) -> Served:
        if reason in ("withdrawn", "uncertified"):
            return "refused"
        if self.is_unsafe:
            return "unsafe"
        if self.certified < len(self.tokens):
            return "clean"
        return "executed" if self.was_held else "certified"
