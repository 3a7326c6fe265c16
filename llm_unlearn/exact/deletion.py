"""Deletion: acknowledge, drop what depended on the records, serve what is left, certify.

The order makes a crash harmless at every point. The requests are on disk before anything is
changed; each later step can be repeated; `settle` carries out whatever a crash left undone.
"""

import hashlib
import secrets
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn import files
from llm_unlearn.data.partition import CORE, SliceName
from llm_unlearn.data.records import Record
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact import copies as outside
from llm_unlearn.exact import residues
from llm_unlearn.exact.asks import Ask
from llm_unlearn.exact.certificates import CERTIFIED, Certifier, Outcome, certificate_path
from llm_unlearn.exact.ledger import Request, Target
from llm_unlearn.exact.near_duplicates import NearDuplicate, find_near_duplicates
from llm_unlearn.exact.resolving import Found, copy_targets, dependents, find_subjects, nodes_of
from llm_unlearn.exact.served import depth_of, digest_of_served, read_lineage, serve
from llm_unlearn.exact.store import RunDirectory

if TYPE_CHECKING:
    from llm_unlearn.exact.verification import Check

MOST_SEARCHED = 20_000  # records; above, near copies are looked for when somebody asks
WARN, REFUSE, TAKE, IGNORE = "warn", "refuse", "take", "ignore"
NEAR = (WARN, REFUSE, TAKE, IGNORE)
"""What is done about near copies that others hold."""

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
            raise UserError(
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
        raise RunError(
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


def depths_served(run: RunDirectory) -> dict[int, int]:
    """How many blocks each shard is served with; 0 before anything is."""
    lineages = {shard: read_lineage(run.served / f"shard-{shard}") for shard in run.shards}
    return {shard: depth_of(entry) for shard, entry in lineages.items()}


def settle(run: RunDirectory) -> None:
    """Carry out every acknowledged request that is not finished.

    The caller holds the run's lock. Repeatable: killed anywhere, the next call finishes.
    """
    pending = run.ledger.requests(pending=True)
    if not pending:
        run.slices.drop_pending()
        if residues.purge_temporary(run):  # what a crash left, before or after the last request
            residues.destroy_keys(run)
        return
    remaining = _change_records(run, pending)
    wanted = frozenset(run.wanted())
    # Serve first, purge next: what is served never lacks a file, and the deleted data stops
    # being served as early as it can.
    lineages = serve(run)
    residues.purge_nodes(run, wanted)
    purged = residues.purge_emptied(run)
    residues.purge_temporary(run)
    run.slices.drop_pending(keep={request.id for request in pending})
    purged |= residues.destroy_keys(run)
    served = tuple(node["key"] for entry in lineages.values() for node in entry["nodes"])
    outcome = Outcome(wanted, served, depths_served(run), purged, remaining)
    _certify(run, pending, outcome)
    run.slices.drop_pending()


def _change_records(run: RunDirectory, pending: Sequence[Request]) -> dict[SliceName, int]:
    """Take out what goes and put in what comes; returns how many deleted records are left, by slice."""
    tombstones: dict[SliceName, set[str]] = defaultdict(set)
    inserted: dict[SliceName, list[Record]] = defaultdict(list)
    for request in pending:
        for target in request.targets:
            tombstones[SliceName(target.shard, target.slice)].add(target.pseudonym)
        records = run.slices.read_pending(request.id) if request.inserted else []
        for target, record in zip(request.inserted, records, strict=True):
            inserted[SliceName(target.shard, target.slice)].append(record)
    for name in sorted(tombstones.keys() | inserted.keys()):
        run.slices.rewrite(name, tombstones[name], inserted[name])
    return count_remaining(run, pending)


def count_remaining(run: RunDirectory, requests: Sequence[Request]) -> dict[SliceName, int]:
    """By slice, how many records are there that some requests have deleted."""
    gone: dict[SliceName, dict[str, set[str]]] = defaultdict(
        lambda: {"subject": set(), "record": set()}
    )
    for request in requests:
        for target in request.targets:
            gone[SliceName(target.shard, target.slice)][target.kind].add(target.pseudonym)
    return {
        name: run.slices.count_of(name, kinds["subject"], kinds["record"])
        for name, kinds in gone.items()
    }


def _certify(run: RunDirectory, pending: Sequence[Request], outcome: Outcome) -> None:
    """Write the certificates of all requests, then finish them in one transaction."""
    certifier = Certifier(run, outcome)
    signed = {request.id: certifier.certificate(request) for request in pending}
    _write_certificates(run, signed)
    served = digest_of_served(run)
    run.ledger.finish(
        {
            name: {"certificate": hashlib.sha256(data).hexdigest(), "served_after": served}
            for name, data in signed.items()
        }
    )


def _write_certificates(run: RunDirectory, signed: Mapping[str, bytes]) -> None:
    folder = run.path / "certificates"
    files.write_many(folder, {f"{name}.json": data for name, data in signed.items()})


def renew(
    run: RunDirectory, request_ids: Sequence[str], replayed: "Check | None" = None
) -> list[Path]:
    """Certify requests again, as things are now: after a rebuild, a replay, a purge of copies.

    What did not change is not hashed again: digests come from headers and lineages.

    Args:
        replayed: what training every served node again found.

    Raises:
        UserError: no such request, or one that is not carried out yet.
    """
    with run.changing("certifying what it deleted"):
        settle(run)
        known = {request.id: request for request in run.ledger.requests()}
        if missing := [name for name in request_ids if name not in known]:
            raise UserError(
                f"{run.path} knows no request {missing[0]!r}: `llm-unlearn report` lists them"
            )
        chosen = [known[name] for name in request_ids]
        outcome = Outcome(
            wanted=frozenset(run.wanted()),
            served_nodes=tuple(outside.nodes_served(run)),
            depths=depths_served(run),
            purged={},
            remaining=count_remaining(run, chosen),
        )
        certifier = Certifier(run, outcome, replayed)
        signed = {request.id: certifier.certificate(request) for request in chosen}
        # Logged first: killed in between, the older one still stands, and is known as well.
        for name, data in signed.items():
            sha = hashlib.sha256(data).hexdigest()
            run.ledger.append(CERTIFIED, {"request": name, "certificate": sha})
        _write_certificates(run, signed)
    return [certificate_path(run, request.id) for request in chosen]
