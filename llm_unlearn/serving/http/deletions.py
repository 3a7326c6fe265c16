"""Deletions at run time: filed in the run's ledger, followed until nothing of them is left."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact.asks import Ask
from llm_unlearn.exact.certificates import certificate_path
from llm_unlearn.exact.deletion import KeyUsedError, NearCopiesError, delete_all
from llm_unlearn.exact.ledger import Request
from llm_unlearn.exact.resolving import NoSuchSubjectError
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.serving.http.refusals import Refusal
from llm_unlearn.serving.queries import EngineState

if TYPE_CHECKING:
    from llm_unlearn.exact.deletion import Deletion

State = Literal["acknowledged", "not served", "erased"]
STATES: tuple[State, ...] = ("acknowledged", "not served", "erased")
BUSY_SECONDS = 5.0


def serves_none_of(state: EngineState | None, request: Request) -> bool:
    """Whether no adapter in this server's memory holds what a request deleted, nor any answer in work.

    While the model is being loaded nobody can say: then it does not count as gone.
    """
    if state is None:
        return False
    gone = set(request.nodes)
    return not any(
        gone.intersection(resident.nodes)
        and (resident.state != "withdrawn" or resident.in_flight > 0)
        for resident in state.residents
    )


@dataclass(frozen=True)
class Filed:
    """What a filing led to.

    Attributes:
        request: the one that carries it out, or carried it out before.
        is_new: whether this filing made it.
    """

    request: Request
    is_new: bool
    deletion: "Deletion"


class Deletions:
    """The deletions of one run, as its servers see them; from any thread.

    Args:
        is_withdrawn: whether no running server of the run answers with what a request deleted;
            by default what `serves_none_of` says of this one.
    """

    def __init__(
        self, run: RunDirectory, is_withdrawn: Callable[[Request], bool] | None = None
    ) -> None:
        self.run = run
        self.is_withdrawn = is_withdrawn
        self._lock = threading.Lock()
        self._known: tuple[int, list[Request]] = (-1, [])

    def pseudonyms(self, subjects: Sequence[str]) -> list[str]:
        return [self.run.key.pseudonym("subject", subject) for subject in subjects]

    def file(self, ask: Ask, near: str | None, with_duplicates: bool) -> Filed:
        """Delete; when this returns, the ledger has it on disk and the records are gone.

        Raises:
            Refusal: nothing was deleted, and why. It repeats no name, neither a given nor a held one.
        """
        try:
            done = delete_all(self.run, [ask], with_duplicates, near=near)
        except NoSuchSubjectError:
            words = (
                "one of the subjects is not known here, or is in the permanent core alone; a subject is "
                "spelled as in the run. Nothing was deleted"
            )
            raise Refusal(404, "no_such_subject", words, "subjects") from None
        except KeyUsedError:
            words = "the idempotency key was used for something else. Nothing was deleted"
            raise Refusal(409, "key_used", words, "idempotency_key") from None
        except NearCopiesError:
            words = (
                "others hold nearly the same text, and that was to be refused. Nothing was deleted"
            )
            raise Refusal(409, "near_duplicates", words, "near_duplicates") from None
        except (RunError, OSError):
            words = "the run cannot be changed now. Try again: under an idempotency key, nothing is done twice"
            raise Refusal(503, "run_busy", words, retry_after=BUSY_SECONDS) from None
        except UserError:
            raise Refusal(400, "invalid_request", "nothing was deleted") from None
        (answer,) = done.answers
        return Filed(self._request_of(ask, answer.request), bool(done.requests), done)

    def _request_of(self, ask: Ask, name: str | None) -> Request:
        """The request of an ask; of what was deleted before, the one that deleted the first subject."""
        first = self.run.key.pseudonym("subject", ask.subjects[0])
        for request in self.all():
            if request.id == name or (
                name is None and any(target.pseudonym == first for target in request.targets)
            ):
                return request
        raise Refusal(503, "run_busy", "the ledger is being changed", retry_after=BUSY_SECONDS)

    def all(self) -> list[Request]:
        """Every request, in the order of acknowledgement; read again when the ledger has grown."""
        with self._lock:
            epoch = self.run.ledger.epoch()
            if epoch != self._known[0]:
                self._known = (epoch, self.run.ledger.requests())
            return self._known[1]

    def epoch(self) -> int:
        """Entries of the ledger now."""
        return self.run.ledger.epoch()

    def state(self, request: Request, engine: EngineState | None) -> State:
        withdrawn = self.is_withdrawn or (lambda asked: serves_none_of(engine, asked))
        if not withdrawn(request):
            return "acknowledged"
        return "not served" if request.finished_at is None else "erased"

    def count(self, engine: EngineState | None) -> Counter[str]:
        """How many requests are in each state."""
        counts: Counter[str] = Counter(dict.fromkeys(STATES, 0))
        counts.update(self.state(request, engine) for request in self.all())
        return counts

    def certificate(self, request: Request) -> bytes | None:
        """The signed certificate, None before there is one."""
        try:
            return certificate_path(self.run, request.id).read_bytes()
        except FileNotFoundError:
            return None
