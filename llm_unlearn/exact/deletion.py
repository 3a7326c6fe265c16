"""Deletion: acknowledge, drop what depended on the records, serve what is left, certify.

The order makes a crash harmless at every point. The request is on disk before anything is
changed; each later step can be repeated; `settle` carries out whatever a crash left undone.
"""

import json
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_unlearn import files
from llm_unlearn.data.partition import CORE, SliceName
from llm_unlearn.data.records import Record, digest
from llm_unlearn.errors import UserError
from llm_unlearn.exact import residues
from llm_unlearn.exact.environment import describe_software
from llm_unlearn.exact.ledger import Request, Target
from llm_unlearn.exact.served import depth_of, digest_of_served, read_lineage, serve
from llm_unlearn.exact.store import RunDirectory

EXACTNESS = (
    "structural: no served parameter was trained on a record that the request names, nor on "
    "anything that depended on one"
)


@dataclass(frozen=True)
class Deletion:
    """What a call of `delete` did.

    Attributes:
        request: id of the request, None if every subject had been deleted before, or if this
            was a dry run (the other values then say what would have been done).
        already_deleted: how many of the subjects had been deleted before.
        records: how many went, each as often as it was stored.
        copies_elsewhere: records of other subjects with a text of the deleted ones, left alone.
        core_records: records of the subjects in the permanent core, which stay.
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


def delete(
    run: RunDirectory,
    subjects: Sequence[str],
    with_duplicates: bool = False,
    dry_run: bool = False,
) -> Deletion:
    """Delete subjects exactly; all of them, or none if one is unknown.

    Args:
        with_duplicates: also delete the records of other subjects that hold the same text.
        dry_run: only say what would go and how many copies others hold; nothing is changed.

    Raises:
        UserError: no subject given, or one that the run does not know or holds in its permanent
            core alone; nothing was changed.
        RunError: the run is busy or damaged; nothing was acknowledged.
    """
    started = time.monotonic()
    if not subjects:
        raise UserError("name at least one subject to delete")
    with run.changing("deleting from it"):
        settle(run)
        targets, records, already = resolve(run, list(dict.fromkeys(subjects)))
        copies: dict[SliceName, list[Record]] = {}
        if records:
            copies = run.slices.copies(records, holders={record.subject for record in records})
        if with_duplicates:
            targets += copy_targets(run, copies)
        nodes = dependent_nodes(run, targets)
        named = {run.key.pseudonym("subject", subject) for subject in subjects}
        core_records = _in_core(run, named | {target.pseudonym for target in targets})
        request_id = None
        if targets and not dry_run:
            request_id = secrets.token_hex(8)
            run.ledger.acknowledge(request_id, targets, nodes, digest_of_served(run))
            settle(run)
        depths = depths_served(run)
    return Deletion(
        request=request_id,
        subjects=len({target.pseudonym for target in targets if target.kind == "subject"}),
        already_deleted=already,
        records=sum(target.records for target in targets),
        copies_elsewhere=0
        if with_duplicates
        else len({record.id for held in copies.values() for record in held}),
        nodes_removed=len(nodes),
        served=depths,
        seconds=time.monotonic() - started,
        certificate=certificate_path(run, request_id) if request_id else None,
        core_records=core_records,
    )


def resolve(run: RunDirectory, subjects: list[str]) -> tuple[list[Target], list[Record], int]:
    """Find where the subjects live: targets, their records, and how many were deleted before."""
    pseudonyms = {subject: run.key.pseudonym("subject", subject) for subject in subjects}
    gone = run.ledger.deleted(list(pseudonyms.values()))
    asked = [subject for subject in subjects if pseudonyms[subject] not in gone]
    records: dict[str, Record] = {}
    targets: list[Target] = []
    for name, here in run.slices.homes(asked).items():
        held = run.slices.read(name, here)
        records |= {record.id: record for record in held}
        counts = Counter(record.subject for record in held)
        targets += [
            Target("subject", pseudonyms[subject], *name, records=counts[subject])
            for subject in sorted(counts)
        ]
    unknown = set(asked) - {record.subject for record in records.values()}
    if unknown:
        _refuse_permanent(run, unknown)
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UserError(
            f"no such subject in {run.path}: {sorted(unknown)[0]!r}{more}. Nothing was deleted; "
            "a subject is spelled as in the column that the run was made with"
        )
    return targets, list(records.values()), len(gone)


def _refuse_permanent(run: RunDirectory, unknown: set[str]) -> None:
    held = run.slices.read(CORE, unknown) if run.core else []
    if held:
        raise UserError(
            f"{min(record.subject for record in held)!r} is in the permanent core, which cannot be "
            "deleted; it would need a new run. Nothing was deleted"
        )


def _in_core(run: RunDirectory, pseudonyms: set[str]) -> int:
    return run.slices.count_in_core(pseudonyms) if run.core else 0


def copy_targets(run: RunDirectory, copies: dict[SliceName, list[Record]]) -> list[Target]:
    """Targets for copies held by others.

    A subject of whom nothing else is held is named itself: asked for later, it counts as deleted.
    """
    targets: list[Target] = []
    for name, held in copies.items():
        taken = Counter(record.subject for record in held)
        counts = Counter(record.subject for record in run.slices.read(name, set(taken)))
        # With public keys a subject's other records can be anywhere: its copies go one by one.
        whole = sorted(
            subject
            for subject in taken
            if run.slices.is_keyed and taken[subject] == counts[subject]
        )
        targets += [
            Target("subject", run.key.pseudonym("subject", subject), *name, records=taken[subject])
            for subject in whole
        ]
        targets += [
            Target("record", run.key.pseudonym("record", record.id), *name, records=1)
            for record in held
            if record.subject not in whole
        ]
    return targets


def dependent_nodes(run: RunDirectory, targets: list[Target]) -> list[str]:
    """Keys of the trained nodes that saw, or stand on a node that saw, a slice of the targets."""
    hit = {(target.shard, target.slice) for target in targets}
    nodes = {
        node.key: node
        for shard in {target.shard for target in targets}
        for path in run.paths(shard)
        for node in path
    }
    return sorted(
        key
        for key, node in nodes.items()
        if run.nodes.exists(key) and any((node.shard, part) in hit for part in node.path)
    )


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
        residues.purge_temporary(run)  # what a crash left after it had finished the last request
        return
    _remove_records(run, pending)
    wanted = set(run.wanted())
    # Serve first, purge next: what is served never lacks a file, and the deleted data stops
    # being served as early as it can.
    lineages = serve(run)
    residues.purge_nodes(run, wanted)
    purged = residues.purge_emptied(run)
    residues.purge_temporary(run)
    clean = all(node["key"] in wanted for entry in lineages.values() for node in entry["nodes"])
    done = {
        "served_after": digest_of_served(run),
        "served_depth": {str(shard): depth for shard, depth in depths_served(run).items()},
        "purged": purged,
        "checks": {"served_lineage": clean},
    }
    for request in pending:
        text = _write_certificate(run, request, done)
        run.ledger.finish(
            request.id, {"certificate": digest(text), "served_after": done["served_after"]}
        )


def _remove_records(run: RunDirectory, pending: list[Request]) -> None:
    tombstones: dict[SliceName, set[str]] = defaultdict(set)
    for request in pending:
        for target in request.targets:
            tombstones[SliceName(target.shard, target.slice)].add(target.pseudonym)
    for name, gone in tombstones.items():
        run.slices.remove(name, gone)


def certificate_path(run: RunDirectory, request_id: str) -> Path:
    return run.path / "certificates" / f"{request_id}.json"


def _write_certificate(run: RunDirectory, request: Request, done: dict[str, Any]) -> str:
    """What was asked, what went, what is served now, and what was out of reach."""
    unknown = [str(path.relative_to(run.path)) for path in residues.unrecognised(run)]
    certificate = {
        "version": 1,
        "request": request.id,
        "acknowledged_at": request.acknowledged_at,
        "targets": [
            {"kind": target.kind, "pseudonym": target.pseudonym} for target in request.targets
        ],
        "exactness": EXACTNESS,
        "counterfactual": "dense retraining: the records never existed",
        "records_removed": sum(target.records for target in request.targets),
        "nodes_removed": list(request.nodes),
        "served_before": request.served_before,
        "answers_by": asdict(run.config.rule),
        **done,
        "retained_roots": {
            str(shard): [root for root in run.slices.roots(shard).values() if root]
            for shard in run.shards
        },
        **_core_entry(run, request),
        "out_of_reach": [
            *residues.OUT_OF_REACH,
            *(["the permanent core, on which all nodes stand"] if run.core else []),
            *(f"unrecognised file in the run: {name}" for name in unknown),
        ],
        "base_model": run.shape.weights,
        "software": describe_software(),
    }
    text = json.dumps(certificate, indent=2, sort_keys=True)
    path = certificate_path(run, request.id)
    path.parent.mkdir(exist_ok=True)
    files.write_bytes(path, text.encode())
    return text


def _core_entry(run: RunDirectory, request: Request) -> dict[str, Any]:
    """What a certificate says of the permanent core; nothing where there is none."""
    if run.core is None:
        return {}
    held = _in_core(run, {target.pseudonym for target in request.targets})
    return {
        "core": {
            "root": run.core_root,
            "guarantee": "outside it: what was trained into the core stays, whoever it is about",
            "records_of_the_deleted": held,
        }
    }
