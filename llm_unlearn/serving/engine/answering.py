"""What becomes of the answers under way: who reads them, which token is next, and whether they may go on."""

import time
from collections.abc import Callable, Iterable, Sequence

import torch

from llm_unlearn.serving.certificate import NO_VOTE, certify_votes, is_close
from llm_unlearn.serving.engine.answers import Finish, Running
from llm_unlearn.serving.engine.batch import Batch, Row
from llm_unlearn.serving.engine.choosing import Chooser
from llm_unlearn.serving.engine.decoding import Readers, next_token
from llm_unlearn.serving.engine.memory import Change, Memory
from llm_unlearn.serving.engine.reading import Reading
from llm_unlearn.serving.policy import Policy
from llm_unlearn.serving.queries import Failure


class Answering:
    """The answers in the batch, and those that are held until an execution. Used by one thread.

    Attributes:
        running: in the batch.
        held: could not be certified, and wait.
        seconds: that finished answers took.
    """

    def __init__(
        self,
        memory: Memory,
        reading: Reading,
        policy: Policy,
        max_batch: int,
        on_uncertified: Callable[[], None],
    ):
        self.memory, self.reading, self.policy = memory, reading, policy
        self.max_batch = max_batch
        self.batch = Batch(memory.ensemble)
        self.chooser = Chooser(memory, policy.target)
        self.running: list[Running] = []
        self.held: list[Running] = []
        self.seconds: list[float] = []
        self._on_uncertified = on_uncertified
        self._is_changed = False

    def names_read(self) -> Iterable[str]:
        """Names of adapters, as often as an answer in the batch reads them."""
        for running in self.running:
            yield from running.stretches[-1].readers.names

    def has_room(self, beginning: int) -> bool:
        """Whether one more may begin, besides some others. One always may, however many rows it has."""
        rows = self.chooser.rows_each
        taken = len(self.batch.rows) + beginning * rows
        return taken == 0 or taken + rows <= self.max_batch

    def begin(self, begins: Sequence[Running]) -> None:
        """Let answers begin, or go on after they were held: their texts are read."""
        if self._must_wait():
            self.held += self._marked(begins)
            return
        ready = []
        begins = [running for running in begins if not running.is_cancelled]
        for running, readers in zip(begins, self.chooser.choose(begins), strict=True):
            if readers is None:
                self._refuse(running)
                continue
            self._is_read_as_before(running, readers)
            if running.is_cancelled:
                continue
            affected = len(self.memory.affected(self.policy.target))
            running.begin(readers, self.memory.epoch, affected, self.memory.is_lagging)
            if readers.is_certain or self._may_go_on(running):
                ready.append(running)
        self.running += ready  # before they are read: whatever happens, they are known
        texts = [[*r.prompt, *r.tokens] for r in ready for _ in r.stretches[-1].readers.members]
        members = [member for r in ready for member in r.stretches[-1].readers.members]
        if not texts:
            return
        rows = iter(self.batch.read(texts, members))
        for running in ready:
            running.rows = [next(rows) for _ in running.stretches[-1].readers.members]
        for running in ready:
            self._decide(running)
        self._remove_finished()

    def _refuse(self, running: Running) -> None:
        running.is_cancelled = True
        running.listen(
            Failure("invalid", f"no adapter {running.query.adapter!r} is served any more")
        )

    def _must_wait(self) -> bool:
        return self.policy.handling == "wait" and bool(self.memory.affected("retrained"))

    def _marked(self, begins: Sequence[Running]) -> list[Running]:
        for running in begins:
            running.was_held = True
        return list(begins)

    def step(self) -> None:
        """One token more for every row."""
        if not self.running:
            return
        last = {id(row): r.tokens[-1] for r in self.running for row in r.rows}
        self.batch.step([last[id(row)] for row in self.batch.rows])
        for running in list(self.running):
            self._decide(running)
        self._remove_finished()

    def _decide(self, running: Running) -> None:
        """The next token, and whether there is another one."""
        stretch = running.stretches[-1]
        readers = stretch.readers
        if running.labels:
            log_probs = torch.stack([row.log_probs for row in running.rows])
            self._vote(running, log_probs[:, list(running.labels)])
            return
        token = next_token(
            running.rows, readers, running.decoding, len(running.tokens), stretch.tally
        )
        is_certain = token.is_certified and readers.is_certain
        if not is_certain and not running.is_clean and not self._may_go_on(running):
            return
        running.add(token.id, token.is_certified)
        self._say(running, token.id)

    def _say(self, running: Running, token: int) -> None:
        stream = running.stream
        assert stream is not None
        if token in self.reading.ends and not running.query.ignores_end:
            running.give(stream.finish())
            self._finish(running, "stop")
            return
        running.give(stream.push(token))
        if stream.is_stopped:
            self._finish(running, "stop")
        elif len(running.tokens) >= running.query.max_tokens:
            running.give(stream.finish())
            self._finish(running, "stop" if stream.is_stopped else "length")

    def _vote(self, running: Running, scores_mC: torch.Tensor) -> None:
        """The readers vote for a label; of equal ones the first wins."""
        readers = running.stretches[-1].readers
        votes = scores_mC.argmax(-1).cpu()
        tally = torch.bincount(votes, minlength=len(running.labels))
        is_out = torch.tensor(readers.affected)
        if len(running.labels) > 1:
            is_out = is_out | is_close(scores_mC.cpu())
        clean = votes.masked_fill(is_out, NO_VOTE)
        winner = int(tally.argmax())
        verdict = certify_votes(clean)
        is_certified = not any(readers.affected)
        is_certified |= bool(verdict.is_certified) and int(verdict.winner) == winner
        if not (is_certified and readers.is_certain) and not self._may_go_on(running):
            return
        running.add(running.labels[winner], is_certified)
        self._finish(running, "stop", tally.tolist(), running.query.labels[winner])

    def _may_go_on(self, running: Running) -> bool:
        """What the policy says of an answer that is not certain any more."""
        if running.is_clean or self.policy.handling in ("clean", "serve", "wait"):
            running.is_clean = True
            self._on_uncertified()
            return True
        self._on_uncertified()
        if self.policy.handling == "abstain":
            self._finish(running, "uncertified")
        else:
            running.was_held = True
            self.held.append(running)
        return False

    def _finish(
        self,
        running: Running,
        reason: Finish,
        tally: Sequence[int] = (),
        text: str | None = None,
    ) -> None:
        self.seconds.append(time.monotonic() - running.asked_at)
        running.is_cancelled = True  # nothing is to be done for it any more
        running.listen(running.answer(reason, tally, text))

    def _remove_finished(self) -> None:
        """Rows of answers that are finished, held or not wanted leave the batch."""
        held = {id(running) for running in self.held}
        out = [r for r in self.running if r.is_cancelled or id(r) in held]
        self._leave(out)

    def _leave(self, out: Sequence[Running]) -> None:
        if not out:
            return
        gone: list[Row] = [row for running in out for row in running.rows]
        self.batch.leave(gone)
        for running in out:
            running.rows = []
        ids = {id(running) for running in out}
        self.running = [running for running in self.running if id(running) not in ids]

    def sweep(self) -> None:
        """Forget answers that nobody waits for."""
        self._remove_finished()
        self.held = [running for running in self.held if not running.is_cancelled]

    def follow(self, change: Change, waiting: Sequence[Running] = ()) -> None:
        """Do to the answers what was done to the memory.

        What was read by an adapter that held deleted data is forgotten, down to what is certain without it;
        such an answer begins again there. If later text was given out, it ends.

        Args:
            waiting: answers that are not here; some have been here before.
        """
        self._is_changed = True
        # First what cannot fail, for all: whatever happens next, nothing that is gone has a part in it.
        for running in [*self.running, *self.held, *waiting]:
            for stretch in running.stretches:
                stretch.withdraw(change.tainted)
            running.is_doubtful |= bool(change.tainted)
        tainted = [
            running
            for running in [*self.running, *self.held, *waiting]
            if running.names_read & change.tainted
        ]
        for running in tainted:
            self._go_back(running, running.certified)
        under_way = set(map(id, self.running))
        self._again([running for running in tainted if id(running) in under_way])
        self._remove_finished()
        choices = self.chooser.choose(self.running)
        for running, readers in zip(list(self.running), choices, strict=True):
            is_same = self._is_read_as_before(running, readers)
            if is_same and readers is not None:
                running.renew(readers, not self.memory.affected(self.policy.target))
            if not is_same or running.stretches[-1].is_by(change.replaced):
                self._again([running])
        self._remove_finished()

    def _is_read_as_before(self, running: Running, readers: Readers | None) -> bool:
        """Since a deletion the prompt may be for others: then what they did not say is forgotten."""
        is_doubtful, running.is_doubtful = running.is_doubtful, False
        if not is_doubtful or not running.tokens or running.is_read_by(readers):
            return True
        if self.memory.ensemble.routes_prompts:
            self._go_back(running, 0)
        return not self.memory.ensemble.routes_prompts

    def _go_back(self, running: Running, keep: int) -> None:
        """Forget all but the first tokens, or end where later ones were given out."""
        if running.given > keep:
            self._finish(running, "withdrawn")
            return
        running.cut(keep, self.reading.tokenizer)
        running.is_clean = False

    def _again(self, again: Sequence[Running]) -> None:
        """They wait for their turn to be read once more, with what is certain."""
        if not again:
            return
        self._leave(again)
        held = {id(running) for running in self.held}
        self.held += [r for r in again if id(r) not in held and not r.is_cancelled]

    def released(self) -> list[Running]:
        """Held answers that may be tried again: something has changed."""
        if not self._is_changed or self._must_wait():
            return []
        self._is_changed = False
        released, self.held = self.held, []
        return released

    def take_back(self) -> list[Running]:
        """What was being read has changed: all begin again with what they have said."""
        back = list(self.running)
        self._leave(back)
        for running in back:
            running.is_doubtful = True
        self.batch = Batch(self.memory.ensemble)
        return [running for running in back if not running.is_cancelled]

    def abandon(self) -> list[Running]:
        """Give all answers up; returns them."""
        lost = [r for r in [*self.running, *self.held] if not r.is_cancelled]
        self.running, self.held = [], []
        self.batch = Batch(self.memory.ensemble)
        return lost
