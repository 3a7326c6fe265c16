"""Certificates: signed statements of what a request removed and what is served since.

    RUN/certificates/<request>.json     an in-toto statement in a DSSE envelope (signing.py)
    RUN/signing.key, signing.pub        the run's Ed25519 key; the second half goes to whoever verifies

A certificate names the request by pseudonyms that only the run's key can make, and what is served by
the digests of its files, so that anyone with the public key and the adapter can check it.
"""

import hashlib
import platform
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn.data.partition import SliceName, merkle_root
from llm_unlearn.errors import UserError
from llm_unlearn.exact import copies, residues
from llm_unlearn.exact.adapters import file_digest
from llm_unlearn.exact.environment import describe_software
from llm_unlearn.exact.ledger import Request
from llm_unlearn.exact.served import digest_of_served, read_lineage
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.signing import (
    PUBLIC_NAME,
    PublicKey,
    SignatureError,
    Signer,
    statement,
    unverified,
)

if TYPE_CHECKING:
    from llm_unlearn.exact.verification import Check

PREDICATE_TYPE = "https://llm-unlearn.github.io/deletion/v1"
SERVED = "served"
"""Name of everything that is served, as a subject of a statement."""

MOST_LISTED = 64  # members whose files a certificate names; above, one digest stands for all

# From the strongest to the weakest.
CLASSES = {
    "dense": "dense retraining without the record, byte-equal: every served block was trained again "
    "without it, and the bits are the same",
    "structural": "the served parameters never saw the record, nor anything that depended on it",
    "replay": "training was replayed with the record's slots left empty",
    "behavioural": "the answers look as if it were gone; nothing more is claimed",
    "none": "something that is served saw the record",
}


def weakest(components: Mapping[str, str]) -> str:
    """The class of exactness of a whole: that of its weakest component."""
    order = list(CLASSES)
    return max(components.values(), key=order.index)


@dataclass(frozen=True)
class Outcome:
    """What the settled requests have in common.

    Attributes:
        wanted: keys of the nodes that the run wants now.
        served_nodes: keys of those that are served.
        depths: blocks served, by shard.
        purged: files that went, by kind.
        remaining: how many records of the requests' targets are left, by slice.
    """

    wanted: frozenset[str]
    served_nodes: tuple[str, ...]
    depths: Mapping[int, int]
    purged: Mapping[str, int]
    remaining: Mapping[SliceName, int]


CERTIFIED = "certified"
"""Kind of the event that logs a certificate that was made anew."""


def certificates_logged(run: RunDirectory) -> dict[str, list[str]]:
    """By request, SHA-256 of its certificates as the ledger knows them, the present one last."""
    logged: dict[str, list[str]] = defaultdict(list)
    for event in [*run.ledger.events("deleted"), *run.ledger.events(CERTIFIED)]:
        logged[event.payload["request"]].append(event.payload["certificate"])
    return logged


def certificate_path(run: RunDirectory, request_id: str) -> Path:
    return run.path / "certificates" / f"{request_id}.json"


class Certifier:
    """Makes the certificates of the requests that are settled together.

    Args:
        replayed: what training every served node again found, if that was done.
    """

    def __init__(self, run: RunDirectory, outcome: Outcome, replayed: "Check | None" = None):
        self.run = run
        self.replayed = replayed
        self.signer = Signer.of(run.path)
        self.outcome = outcome
        self.subject = served_files(run)
        self.outstanding = copies.outstanding(run, outcome.wanted)
        self.common = self._common()

    def certificate(self, request: Request) -> bytes:
        """The signed certificate of one request."""
        core = _core_entry(self.run, request)
        proven = "dense" if self._is_dense() else "structural"
        components = {"parameters": proven, "who answers": proven}
        if core:
            kept = core["core"]["records_of_the_deleted"]
            components["permanent core"] = "none" if kept else proven
        checks = [*self.common["checks"], self._records_check(request)]
        if not all(check["passed"] for check in checks):
            components["checks"] = "none"
        predicate = self.common | core | _request_entry(request)
        predicate["checks"] = checks
        predicate["exactness"] = {
            "class": weakest(components),
            "meaning": CLASSES[weakest(components)],
            "components": components,
        }
        return self.signer.sign(statement(PREDICATE_TYPE, self.subject, predicate))

    def _is_dense(self) -> bool:
        """Was every served node trained again, with the same bits?"""
        examined = self.replayed.examined if self.replayed and self.replayed.passed else 0
        return 0 < examined == len(self.outcome.served_nodes)

    def _common(self) -> dict[str, Any]:
        run, outcome = self.run, self.outcome
        # Their names may name people, and a certificate leaves the run.
        unknown = len(residues.unrecognised(run))
        stale_nodes = [key for key in run.nodes.keys() if key not in outcome.wanted]
        clean = all(key in outcome.wanted for key in outcome.served_nodes)
        return {
            "version": 2,
            "run": run.key.salt_id,
            "certified_at": time.time(),
            "counterfactual": "dense retraining: the records never existed",
            "served_after": digest_of_served(run),
            "served_depth": {str(shard): depth for shard, depth in outcome.depths.items()}
            if len(outcome.depths) <= MOST_LISTED
            else {"all": sum(outcome.depths.values())},
            "answers_by": asdict(run.config.rule),
            "retained_root": retained_root(run),
            "checks": [
                {"name": "served lineage holds wanted nodes only", "passed": clean},
                {"name": "no node that depends on deleted data is left", "passed": not stale_nodes},
                *self._replay_check(),
            ],
            "purged": dict(outcome.purged),
            "outstanding_copies": {
                "known": len(self.outstanding),
                "kinds": sorted({copy.kind for copy in self.outstanding}),
            },
            "out_of_reach": [
                *residues.out_of_reach(run),
                *(["the permanent core, on which all nodes stand"] if run.core else []),
                *([f"{unknown} files of unknown kinds in the run directory"] if unknown else []),
            ],
            "base_model": run.shape.weights,
            "software": describe_software(),
            "hardware": {"machine": platform.machine(), "system": platform.system()},
        }

    def _replay_check(self) -> list[dict[str, Any]]:
        if self.replayed is None:
            return []
        name = f"{self.replayed.examined} of {len(self.outcome.served_nodes)} served nodes trained again: equal bits"
        return [{"name": name, "passed": self.replayed.passed}]

    def _records_check(self, request: Request) -> dict[str, Any]:
        places = {SliceName(target.shard, target.slice) for target in request.targets}
        left = sum(self.outcome.remaining.get(place, 0) for place in places)
        return {"name": "no record of a deleted subject is left in its slice", "passed": left == 0}


def _request_entry(request: Request) -> dict[str, Any]:
    """What a certificate says of the request itself: pseudonyms and numbers; no reason, no text."""
    return {
        "request": request.id,
        "kind": request.kind,
        "acknowledged_at": request.acknowledged_at,
        "deadline": request.deadline,
        "targets": [
            {"kind": target.kind, "pseudonym": target.pseudonym} for target in request.targets
        ],
        "inserted": [target.pseudonym for target in request.inserted],
        "records_removed": sum(target.records for target in request.targets),
        "nodes_removed": list(request.nodes),
        "served_before": request.served_before,
    }


def _core_entry(run: RunDirectory, request: Request) -> dict[str, Any]:
    """What a certificate says of the permanent core; nothing where there is none."""
    if run.core is None:
        return {}
    held = run.slices.count_in_core({target.pseudonym for target in request.targets})
    return {
        "core": {
            "root": run.core_root,
            "guarantee": "outside it: what was trained into the core stays, whoever it is about",
            "records_of_the_deleted": held,
        }
    }


def served_files(run: RunDirectory) -> dict[str, str]:
    """SHA-256 of what is served: all of it, and file by file where there are not too many.

    Taken from the lineages, which were written with the files: nothing is hashed again.
    """
    found = {SERVED: digest_of_served(run) or merkle_root([])}
    if len(run.members) <= MOST_LISTED:
        for member in run.members:
            name = run.member_name(member)
            entry = read_lineage(run.served / name) or {}
            found |= {f"{name}/{file}": sha for file, sha in entry.get("files", {}).items()}
    return found


def retained_root(run: RunDirectory) -> str:
    """Merkle root over the roots of all slices that hold records."""
    roots = [root for shard in run.shards for root in run.slices.roots(shard).values() if root]
    return merkle_root([bytes.fromhex(root) for root in roots])


@dataclass(frozen=True)
class Verdict:
    """What the verification of a certificate found.

    Attributes:
        problems: why it does not hold; empty if it does.
        notes: what a reader should know all the same.
    """

    statement: dict[str, Any]
    fingerprint: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems


def read_certificate(path: Path) -> dict[str, Any]:
    """The statement of a certificate, without asking who signed it.

    Raises:
        UserError: there is no such file.
        SignatureError: it is no certificate.
    """
    try:
        _, said = unverified(_bytes_of(path))
    except SignatureError as error:
        raise SignatureError(f"{path}: {error}") from None
    return said


def verify_certificate(
    path: Path, key: Path | None = None, adapters: Sequence[Path] = (), run: Path | None = None
) -> Verdict:
    """Check a certificate: by its signature, against adapters, against a run.

    Args:
        key: the public key, PEM; by default the one beside the certificates, which proves that
            nothing was changed since, but not who signed.
        adapters: directories of served adapters that must be those that it names.
        run: the run that must have issued it.

    Raises:
        UserError: a file is missing, or no key is given and none lies beside.
        SignatureError: a byte of it was changed, or another key signed it.
    """
    signed = _bytes_of(path)
    source = key or _key_beside(path, run)
    public = PublicKey.open(source)
    try:
        said = public.read(signed)
    except SignatureError as error:
        raise SignatureError(f"{path} does not hold: {error}") from None
    verdict = Verdict(said, public.fingerprint)
    if key is None:
        verdict.notes.append(
            f"the key was taken from {source}: compare its fingerprint with one that you trust"
        )
    predicate = said.get("predicate", {})
    verdict.problems.extend(
        f"a check had failed when it was written: {check['name']}"
        for check in predicate.get("checks", [])
        if not check["passed"]
    )
    digests = {entry["name"]: entry["digest"]["sha256"] for entry in said["subject"]}
    for adapter in adapters:
        verdict.problems.extend(_compare_adapter(adapter, digests))
    if run is not None:
        verdict.problems.extend(_compare_run(run, signed, predicate))
    return verdict


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _key_beside(path: Path, run: Path | None) -> Path:
    for folder in (run, path.resolve().parent.parent, path.resolve().parent):
        if folder is not None and (folder / PUBLIC_NAME).is_file():
            return folder / PUBLIC_NAME
    raise UserError(f"no public key lies beside {path}: give the signer's with --key signing.pub")


def _compare_adapter(adapter: Path, digests: Mapping[str, str]) -> list[str]:
    """Are the files of an adapter, together, those of one member that the statement names?"""
    members: dict[str, dict[str, str]] = {}
    for name, sha in digests.items():
        if name != SERVED:
            member, _, file = name.rpartition("/")
            members.setdefault(member, {})[file] = sha
    if not members:
        return [
            "the certificate names no single files (the run serves too many adapters): verify it "
            "with the run, or with the statement published with the adapters"
        ]
    names = {file for files in members.values() for file in files}
    held = {name: file_digest(adapter / name) for name in names if (adapter / name).is_file()}
    if held in members.values():
        return []
    if missing := names - held.keys():
        return [f"{adapter / min(missing)} is missing"]
    known = {sha for files in members.values() for sha in files.values()}
    wrong = [name for name in sorted(held) if held[name] not in known] or sorted(held)
    return [
        f"{adapter / name} is not what the certificate names: it was changed, or is served since "
        "another deletion"
        for name in wrong
    ]


def _compare_run(path: Path, signed: bytes, predicate: Mapping[str, Any]) -> list[str]:
    run = RunDirectory.open(path)
    if predicate.get("run") != run.key.salt_id:
        return [f"it is the certificate of another run than {path}"]
    held = certificate_path(run, str(predicate.get("request")))
    logged = certificates_logged(run).get(str(predicate.get("request")), [])
    if hashlib.sha256(signed).hexdigest() not in logged:
        return [f"{path} has issued no such certificate"]
    is_last = hashlib.sha256(signed).hexdigest() == logged[-1]
    return [] if is_last else [f"{path} has issued a newer certificate of this request: {held}"]
