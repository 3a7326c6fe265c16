"""The requests of a run and what became of each; by pseudonyms only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_unlearn.errors import UserError
from llm_unlearn.exact.certificates import certificate_path, read_certificate
from llm_unlearn.exact.ledger import Request
from llm_unlearn.exact.store import RunDirectory

CARRIED_OUT, PENDING, OVERDUE = "carried out", "pending", "overdue"
DAY = 24 * 60 * 60
PSEUDONYM_DIGITS = 8


@dataclass(frozen=True)
class RequestRow:
    """One request.

    Attributes:
        seconds: from the acknowledgement to the end; None while it is pending.
        targets: first digits of the pseudonyms of what was asked for.
        deadline: seconds since the epoch.
        days_left: until the deadline while it is pending; how long before it (or, below zero,
            after it) the request was carried out.
        certificate: name of its file; None while there is none.
        exactness: the class that the certificate names, or what is wrong with the file.
    """

    id: str
    kind: str
    state: str
    acknowledged_at: float
    finished_at: float | None
    seconds: float | None
    targets: tuple[str, ...]
    records: int
    inserted: int
    nodes: int
    reason: str | None
    deadline: float | None
    days_left: float | None
    certificate: str | None
    exactness: str | None


@dataclass(frozen=True)
class Counts:
    """How many requests there are: in all, and by what became of them."""

    acknowledged: int
    carried_out: int
    pending: int
    overdue: int
    late: int

    @classmethod
    def of(cls, rows: Sequence[RequestRow]) -> "Counts":
        done = [row for row in rows if row.state == CARRIED_OUT]
        return cls(
            acknowledged=len(rows),
            carried_out=len(done),
            pending=len(rows) - len(done),
            overdue=sum(row.state == OVERDUE for row in rows),
            late=sum(row.days_left is not None and row.days_left < 0 for row in done),
        )


def request_rows(
    run: RunDirectory, requests: Sequence[Request], now: float
) -> tuple[RequestRow, ...]:
    """All requests: those that are open first, the next deadline before all; then the newest first."""
    rows = [_row(run, request, now) for request in requests]
    return tuple(sorted(rows, key=_order))


def _order(row: RequestRow) -> tuple[bool, float, float, str]:
    is_done = row.state == CARRIED_OUT
    deadline = math.inf if is_done or row.deadline is None else row.deadline
    return is_done, deadline, -row.acknowledged_at, row.id


def _row(run: RunDirectory, request: Request, now: float) -> RequestRow:
    acknowledged, finished = request.acknowledged_at or 0.0, request.finished_at
    deadline, path = request.deadline, certificate_path(run, request.id)
    state = CARRIED_OUT
    if finished is None:
        state = OVERDUE if deadline is not None and deadline < now else PENDING
    targets = dict.fromkeys(target.pseudonym[:PSEUDONYM_DIGITS] for target in request.targets)
    return RequestRow(
        id=request.id,
        kind=request.kind,
        state=state,
        acknowledged_at=acknowledged,
        finished_at=finished,
        seconds=None if finished is None else finished - acknowledged,
        targets=tuple(targets),
        records=sum(target.records for target in request.targets),
        inserted=len(request.inserted),
        nodes=len(request.nodes),
        reason=request.reason,
        deadline=deadline,
        days_left=None if deadline is None else (deadline - (finished or now)) / DAY,
        certificate=path.name if finished is not None else None,
        exactness=exactness_of(path) if finished is not None else None,
    )


def exactness_of(path: Path) -> str:
    """The class of exactness that a certificate names; `missing` or `damaged` where it names none.

    Whether the signature fits is for `check_certificates` to say.
    """
    if not path.is_file():
        return "missing"
    try:
        return str(read_certificate(path)["predicate"]["exactness"]["class"])
    except (UserError, KeyError, TypeError):
        return "damaged"
