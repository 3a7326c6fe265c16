"""Deletion: from what is asked for to acknowledged requests, which `settling.py` carries out.

The order makes a crash harmless at every point. The requests are on disk before anything is
changed; each later step can be repeated; `settle` carries out whatever a crash left undone.
"""

import secrets
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llm_unlearn.data.partition import CORE, SliceName
from llm_unlearn.data.records import Record
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact import copies as outside
from llm_unlearn.exact.asks import Ask
from llm_unlearn.exact.certificates import certificate_path
from llm_unlearn.exact.ledger import Request, Target
from llm_unlearn.exact.near_duplicates import NearDuplicate, find_near_duplicates
from llm_unlearn.exact.resolving import Found, copy_targets, dependents, find_subjects, nodes_of
from llm_unlearn.exact.served import digest_of_served
from llm_unlearn.exact.settling import depths_served, settle
from llm_unlearn.exact.store import RunDirectory

MOST_SEARCHED = 20_000  # records; above, near copies are looked for when somebody asks
WARN, REFUSE, TAKE, IGNORE = "warn", "refuse", "take", "ignore"
NEAR = (WARN, REFUSE, TAKE, IGNORE)
"""What is done about near copies that others hold."""


class KeyUsedError(UserError):
    """An idempotency key stood for something else."""


class NearCopiesError(RunError):
    """Others hold nearly the same text, and that was to be refused."""


DELETED, DELETED_BEFORE, ASKED_BEFORE = "deleted", "deleted before", "asked before"


@dataclass(frozen=True)
class Answer:
    """What became of one ask.

    Attributes:
        state: `deleted`, `corrected`, `deleted before`, or `asked before` under the same key.
        request: id of the request that carries it out; None if there was nothing to do.
    """

    state: str
    request: str | None
    line: int | None = None


@dataclass(frozen=True)
class Deletion:
    """What a call of `delete` did, or in a dry run would have done.

    Attributes:
        request: id of the request, if there was exactly one.
        certificate: its certificate.
        already_deleted: how many of the subjects had been deleted before.
        records: how many went, each as often as it was stored.
        copies_elsewhere: records of other subjects with a text of the deleted ones, left alone.
        core_records: records of the subjects in the permanent core, which stay.
        near_duplicates: nearly the same text, held by others; left alone unless they were to be taken.
        outstanding_copies: known copies outside the run that hold deleted data.
        seconds: from the call to the certificate.
    """

    request: str | None
    subjects: int
    already_deleted: int
    records: int
    copies_elsewhere: int
    nodes_removed: int
    served: dict[int, int]
    seconds: float
    certificate: Path | None
    core_records: int = 0
    answers: tuple[Answer, ...] = ()
    outstanding_copies: tuple[outside.Copy, ...] = ()
    near_duplicates: tuple[NearDuplicate, ...] = ()

    @property
    def requests(self) -> list[str]:
        """Ids of all requests that this call made."""
        made = (
            answer for answer in self.answers if answer.state not in (DELETED_BEFORE, ASKED_BEFORE)
        )
        return [answer.request for answer in made if answer.request]

    def to_dict(self) -> dict[str, Any]:
        near = [found.to_dict() for found in self.near_duplicates]
        return asdict(replace(self, near_duplicates=())) | {"near_duplicates": near}


def delete(
    run: RunDirectory,
    subjects: Sequence[str],
    with_duplicates: bool = False,
    dry_run: bool = False,
) -> Deletion:
    """Delete subjects exactly, in one request; all of them, or none if one is unknown.

    Raises:
        UserError: no subject given, or as `delete_all`.
    """
    if not subjects:
        raise UserError("name at least one subject to delete")
    return delete_all(run, [Ask(tuple(subjects))], with_duplicates, dry_run)


def delete_all(
    run: RunDirectory,
    asks: Sequence[Ask],
    with_duplicates: bool = False,
    dry_run: bool = False,
    near: str | None = None,
) -> Deletion:
    """Delete exactly what is asked for, a request each; all, or nothing if one cannot be.

    Args:
        with_duplicates: also delete the records of other subjects that hold the same text.
        dry_run: only say what would go and how many copies others hold; nothing is changed.
        near: what is done about nearly the same text that others hold: `warn`, `refuse`, `take` or
            `ignore`; by default `warn`, in runs of up to `MOST_SEARCHED` records.

    Raises:
        UserError: a subject that the run does not know or holds in its permanent core alone, or an
            idempotency key that stood for another subject; nothing was changed.
        RunError: the run is busy or damaged, or others hold near copies and that was to be refused;
            nothing was acknowledged.
    """
    started = time.monotonic()
    with run.changing("deleting from it"):
        settle(run)
        before = asked_before(run, asks)
        new = [ask for ask in asks if ask.key not in before]
        found = find_subjects(run, new)
        held = _copies(run, found)
        similar = _near_copies(run, found, near)
        taken = _taken(run, found, held if with_duplicates else {}, similar if near == TAKE else [])
        requests = _make_requests(run, new, found, taken)
        made = [request for request in requests if request is not None]
        targets = [target for request in made for target in request.targets]
        core_records = _core_records(run, new, targets)
        if made and not dry_run:
            run.at_rest.ensure_usable()
            run.ledger.acknowledge(*made)
            settle(run)
        elsewhere = {record.id for part in held.values() for record in part}
        only = made[0].id if len(made) == 1 and not dry_run else None
        return Deletion(
            request=only,
            subjects=len({target.pseudonym for target in targets if target.kind == "subject"}),
            already_deleted=len(found.gone),
            records=sum(target.records for target in targets),
            copies_elsewhere=0 if with_duplicates else len(elsewhere),
            nodes_removed=len({key for request in made for key in request.nodes}),
            served=depths_served(run),
            seconds=time.monotonic() - started,
            certificate=certificate_path(run, only) if only else None,
            core_records=core_records,
            answers=() if dry_run else answers_to(asks, before, requests, DELETED),
            outstanding_copies=tuple(outside.outstanding(run)),
            near_duplicates=tuple(similar),
        )


def asked_before(run: RunDirectory, asks: Sequence[Ask]) -> dict[str | None, Request]:
    """The requests that were made under the asks' idempotency keys, by key.

    Raises:
        UserError: a key was used for something else.
    """
    names = {run.key.pseudonym("key", ask.key): ask for ask in asks if ask.key is not None}
    found: dict[str | None, Request] = {}
    for name, request in run.ledger.asked_under(list(names)).items():
        ask = names[name]
        if request.asked_for != ask.pseudonyms(run.key):
            where = f"line {ask.line}: " if ask.line else ""
            raise KeyUsedError(
                f"{where}the idempotency key {ask.key!r} was used for something else; nothing was done"
            )
        found[ask.key] = request
    return found


def answers_to(
    asks: Sequence[Ask],
    before: Mapping[str | None, Request],
    requests: Sequence[Request | None],
    state: str,
) -> tuple[Answer, ...]:
    """What became of each ask.

    Args:
        requests: those of the asks that are not in `before`, in order.
        state: of an ask that has a request.
    """
    new, answers = iter(requests), []
    for ask in asks:
        if ask.key in before:
            answers.append(Answer(ASKED_BEFORE, before[ask.key].id, ask.line))
        elif request := next(new):
            answers.append(Answer(state, request.id, ask.line))
        else:
            answers.append(Answer(DELETED_BEFORE, None, ask.line))
    return tuple(answers)


def _copies(run: RunDirectory, found: Found) -> dict[SliceName, list[Record]]:
    """Records of others with a text of those that go."""
    records = found.all_records()
    return run.slices.copies(records, holders=set(found.records)) if records else {}


def _near_copies(run: RunDirectory, found: Found, near: str | None) -> list[NearDuplicate]:
    """Nearly the same text, held by others; what is the same text is counted as a copy."""
    records = found.all_records()
    if near is None:
        held = sum(run.slices.header(name).records for name in run.slices.names)
        near = WARN if held <= MOST_SEARCHED else IGNORE
    if near == IGNORE or not records:
        return []
    similar = [copy for copy in find_near_duplicates(run, records) if not copy.is_exact]
    if similar and near == REFUSE:
        raise NearCopiesError(
            f"others hold {len(similar)} near copies of what is to be deleted (`llm-unlearn "
            f"near-duplicates {run.path} --subject NAME` lists them); nothing was deleted"
        )
    return similar


Taken = tuple[str, SliceName, Record]
"""A copy that goes too: the subject whose text it holds, its slice, and itself."""


def _taken(
    run: RunDirectory,
    found: Found,
    held: Mapping[SliceName, list[Record]],
    similar: Sequence[NearDuplicate],
) -> list[Taken]:
    """The copies that go, each with the subject whose deletion takes it. The permanent core stays."""
    owners: dict[bytes, str] = {}
    for subject, records in found.records.items() if held else ():
        for record in records.values():
            owners.setdefault(run.key.text_digest(record), subject)
    exact = [
        (owners[run.key.text_digest(record)], name, record)
        for name, records in held.items()
        for record in records
    ]
    return exact + [(n.record.subject, n.home, n.other) for n in similar if n.home != CORE]


def _make_requests(
    run: RunDirectory,
    asks: Sequence[Ask],
    found: Found,
    copies: Sequence[Taken],
) -> list[Request | None]:
    """A request for every ask; None where there is nothing to do.

    Each subject, and each copy that others hold, goes with the first that asks for it.
    """
    targets, taken = [], set[Target]()
    for ask in asks:
        own = [target for subject in ask.subjects for target in found.targets.get(subject, [])]
        copied = copy_targets(run, _copies_of(ask, copies))
        new = [target for target in dict.fromkeys(own + copied) if target not in taken]
        taken.update(new)
        targets.append(new)
    served = digest_of_served(run)
    dependent = dependents(run, {target.shard for target in taken})
    return [
        make_request(run, ask, group, nodes_of(group, dependent), served) if group else None
        for ask, group in zip(asks, targets, strict=True)
    ]


def make_request(
    run: RunDirectory,
    ask: Ask,
    targets: Sequence[Target],
    nodes: tuple[str, ...],
    served: str | None,
    inserted: tuple[Target, ...] = (),
) -> Request:
    """The request of an ask, for the ledger; a correction if something is inserted."""
    return Request(
        id=secrets.token_hex(8),
        targets=tuple(targets),
        nodes=nodes,
        served_before=served,
        kind="correct" if inserted else "delete",
        inserted=inserted,
        reason=ask.reason,
        deadline=ask.deadline,
        idempotency=run.key.pseudonym("key", ask.key) if ask.key else None,
        asked_for=ask.pseudonyms(run.key) if ask.key else (),
    )


def _copies_of(ask: Ask, copies: Sequence[Taken]) -> dict[SliceName, list[Record]]:
    """The copies of the ask's own texts, each once, by slice."""
    mine: dict[SliceName, dict[str, Record]] = defaultdict(dict)
    for subject, name, record in copies:
        if subject in ask.subjects:
            mine[name][record.id] = record
    return {name: list(records.values()) for name, records in mine.items()}


def _core_records(run: RunDirectory, asks: Sequence[Ask], targets: Sequence[Target]) -> int:
    """How many records of those who go are in the permanent core, and stay."""
    if run.core is None:
        return 0
    named = {run.key.pseudonym("subject", subject) for ask in asks for subject in ask.subjects}
    return run.slices.count_in_core(named | {target.pseudonym for target in targets})
