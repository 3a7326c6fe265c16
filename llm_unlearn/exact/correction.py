"""Correction: a record goes and another comes in its place, in one transaction.

It works like a deletion: what depended on the old record is dropped. What comes is kept on disk
before the request is acknowledged, so that a crash leaves either the old record or the new one.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from llm_unlearn.data.partition import SliceName
from llm_unlearn.data.records import Record, make_record
from llm_unlearn.errors import UserError
from llm_unlearn.exact.asks import Correction
from llm_unlearn.exact.deletion import Answer, answers_to, asked_before, make_request
from llm_unlearn.exact.ledger import Request, Target
from llm_unlearn.exact.resolving import dependents, nodes_of
from llm_unlearn.exact.served import digest_of_served
from llm_unlearn.exact.settling import settle
from llm_unlearn.exact.store import RunDirectory

CORRECTED = "corrected"


@dataclass(frozen=True)
class Corrected:
    """What a call of `correct` did.

    Attributes:
        records: ids of the records that came, in the order of what was asked for; None for what had
            been asked for before.
        seconds: from the call to the certificates.
    """

    answers: tuple[Answer, ...]
    records: tuple[str | None, ...]
    nodes_removed: int
    seconds: float


@dataclass(frozen=True)
class _Replacement:
    """An old record with its place, and the new one with its own."""

    old: Record
    place: SliceName
    new: Record
    new_place: SliceName


def correct(run: RunDirectory, corrections: Sequence[Correction]) -> Corrected:
    """Replace records, all of them, or none if one cannot be.

    The new record has the id that a run made from the corrected data would give it, so what a
    rebuild trains is byte for byte that run.

    Raises:
        UserError: an unknown record, a text that cannot be read, or a run whose public keys place
            the records; nothing was changed.
    """
    started = time.monotonic()
    if not run.slices.is_keyed:
        raise UserError(
            "in this run public keys place the records by their text: delete the record, and put "
            "the corrected one into a new run. Nothing was changed"
        )
    with run.changing("correcting records of it"):
        settle(run)
        before = asked_before(run, corrections)
        new = [ask for ask in corrections if ask.key not in before]
        replacements = _replacements(run, new)
        requests = _requests(run, new, replacements)
        for request, replacement in zip(requests, replacements, strict=True):
            run.slices.write_pending(request.id, [replacement.new])
        if requests:
            run.at_rest.ensure_usable()
            run.ledger.acknowledge(*requests)
            settle(run)
    made = iter(replacements)
    return Corrected(
        answers=answers_to(corrections, before, requests, CORRECTED),
        records=tuple(None if ask.key in before else next(made).new.id for ask in corrections),
        nodes_removed=len({key for request in requests for key in request.nodes}),
        seconds=time.monotonic() - started,
    )


def _replacements(run: RunDirectory, asks: Sequence[Correction]) -> list[_Replacement]:
    """Look up every record that goes and make the one that comes; each slice is read once."""
    subjects = {subject for ask in asks for subject in ask.subjects}
    held: dict[tuple[str, str], tuple[SliceName, Record]] = {}
    for name, here in run.slices.homes(subjects).items():
        for record in run.slices.read(name, here):
            held[record.subject, record.id] = (name, record)
    found: list[_Replacement] = []
    taken = {name for _, name in held}
    for ask in asks:
        (subject,) = ask.subjects
        where = f"line {ask.line}: " if ask.line else ""
        if (subject, ask.record) not in held:
            raise UserError(f"{where}{_unknown(run, ask, held)}. Nothing was changed")
        place, old = held[subject, ask.record]
        if any(old is other.old for other in found):
            raise UserError(f"{where}record {ask.record} is corrected twice. Nothing was changed")
        new = _make(run, ask, old, taken, where)
        taken.add(new.id)
        found.append(_Replacement(old, place, new, run.slices.place(new.subject)))
    return found


def _unknown(
    run: RunDirectory, ask: Correction, held: dict[tuple[str, str], tuple[SliceName, Record]]
) -> str:
    (subject,) = ask.subjects
    if run.ledger.deleted([run.key.pseudonym("record", ask.record)]):
        return f"record {ask.record!r} of {subject!r} was corrected or deleted before"
    if any(holder == subject for holder, _ in held):
        return f"{subject!r} has no record {ask.record!r}"
    return f"no such subject in {run.path}: {subject!r}"


def _make(run: RunDirectory, ask: Correction, old: Record, taken: set[str], where: str) -> Record:
    """The new record; one that is its own subject keeps being so, under its new name."""
    subject, gone = None if old.subject == old.id else old.subject, set[str]()
    while True:
        try:
            new = make_record(ask.row, subject, taken | gone)
        except UserError as error:
            raise UserError(f"{where}{error}. Nothing was changed") from None
        # A text that comes back after it was corrected away must not meet its own tombstone.
        names = [run.key.pseudonym(kind, new.id) for kind in ("record", "subject")]
        if not run.ledger.deleted(names):
            return new
        gone.add(new.id)


def _requests(
    run: RunDirectory, asks: Sequence[Correction], replacements: Sequence[_Replacement]
) -> list[Request]:
    shards = {place.shard for r in replacements for place in (r.place, r.new_place)}
    dependent = dependents(
        run, shards.intersection(run.shards)
    )  # a subject's own may come only now
    served = digest_of_served(run)
    requests = []
    for ask, replacement in zip(asks, replacements, strict=True):
        old, new = (
            Target("record", run.key.pseudonym("record", record.id), *place, records=1)
            for record, place in (
                (replacement.old, replacement.place),
                (replacement.new, replacement.new_place),
            )
        )
        nodes = nodes_of([old, new], dependent)
        requests.append(make_request(run, ask, [old], nodes, served, inserted=(new,)))
    return requests
