"""Settling: what was acknowledged is carried out and certified, whatever a crash left of it."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_unlearn import files
from llm_unlearn.data.partition import SliceName
from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError
from llm_unlearn.exact import copies as outside
from llm_unlearn.exact import record_scores, residues
from llm_unlearn.exact.certificates import CERTIFIED, Certifier, Outcome, certificate_path
from llm_unlearn.exact.ledger import Request
from llm_unlearn.exact.served import depth_of, digest_of_served, read_lineage, serve
from llm_unlearn.exact.store import RunDirectory

if TYPE_CHECKING:
    from llm_unlearn.exact.verification import Check


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
    purged = residues.purge_emptied(run) | record_scores.drop_deleted(run, wanted, pending)
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
