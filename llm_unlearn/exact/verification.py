"""Verification: does the run hold what it says, and is nothing of what was deleted left?

The checks read files only. Replay trains nodes again and compares bits; it needs the base model
and the hardware that the nodes were trained on.
"""

import hashlib
import json
import random
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from llm_unlearn.data.partition import CORE, SliceName, merkle_root
from llm_unlearn.data.records import Record
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact import record_scores, residues
from llm_unlearn.exact.adapters import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Tensors,
    adapter_config,
    assemble,
    empty_adapter,
    expected_shapes,
    file_digest,
    load_tensors,
    served_digest,
    split,
    to_bytes,
)
from llm_unlearn.exact.certificates import certificate_path, certificates_logged
from llm_unlearn.exact.postgresql import ADDRESS_NAME
from llm_unlearn.exact.served import members_served, read_lineage, words_path
from llm_unlearn.exact.store import KEYS_NAME, MANIFEST_NAME, RunDirectory
from llm_unlearn.exact.trie import Node, live, node_key
from llm_unlearn.signing import PRIVATE_NAME, PUBLIC_NAME, PublicKey, SignatureError


@dataclass
class Check:
    """One check: what it looked at, and what is wrong (nothing, if it passed)."""

    name: str
    examined: int = 0
    problems: list[str] = field(default_factory=list)
    skipped: str | None = None

    @property
    def passed(self) -> bool:
        return not self.problems


def check_ledger(run: RunDirectory) -> Check:
    """The hash chain is whole, nothing was cut off its end, and no request is left half done."""
    check = Check("ledger", examined=run.ledger.count(), problems=run.ledger.check_chain())
    check.problems += [
        f"request {request.id} was acknowledged but not carried out: run `llm-unlearn delete` or `rebuild`"
        for request in run.ledger.requests(pending=True)
    ]
    return check


def check_records(run: RunDirectory) -> Check:
    """Every record lies where the key puts it, under the root its slice claims, and none is deleted."""
    check = Check("records")
    is_deleted = run.slices.matcher(run.ledger.tombstones())
    copies: Counter[str] = Counter()
    for name in run.slices.names:
        where = f"records of shard {name.shard}, slice {name.slice}"
        records = _read_and_check(run, name, where, check)
        copies.update(record.id for record in records)
        subjects = {record.subject for record in records}
        if run.slices.is_keyed and any(run.slices.place(subject) != name for subject in subjects):
            check.problems.append(f"{where}: a subject is in the wrong slice")
        if any(is_deleted(record) for record in records):
            check.problems.append(f"{where}: a deleted subject is still there")
    if wrong := sum(count != run.config.copies for count in copies.values()):
        check.problems.append(f"{wrong} records are not held {run.config.copies} times")
    if run.config.keys and file_digest(run.path / KEYS_NAME) != run.config.keys:
        check.problems.append(f"{KEYS_NAME} does not hold the keys that the run was made with")
    if run.core is not None:
        _read_and_check(run, CORE, "records of the permanent core", check)
        if run.slices.header(CORE).root != run.core_root:
            check.problems.append("records of the permanent core: they are not those of run.json")
    if any(event.payload.get("core") != run.core_root for event in run.ledger.events("created")):
        check.problems.append("run.json names another permanent core than the ledger")
    return check


def _read_and_check(run: RunDirectory, name: SliceName, where: str, check: Check) -> list[Record]:
    """The records of a file, compared with its header."""
    header = run.slices.header(name)
    lines = list(run.slices.lines(name))
    records = [Record.from_line(line) for line in lines]
    check.examined += len(records)
    root = merkle_root([run.key.leaf(line) for line in lines])
    if root != header.root or len(lines) != header.records:
        check.problems.append(f"{where}: they are not the ones their header names")
    elif run.slices.stale_texts(header):
        check.problems.append(f"{where}: digests of what it held before are left")
    elif not run.slices.has_texts_of(name, records):
        check.problems.append(f"{where}: the digests of their texts are not theirs")
    return records


def check_nodes(run: RunDirectory) -> Check:
    """Every node is wanted, its key follows from its manifest, and its weights are those logged."""
    check = Check("nodes")
    logged = {event.payload["node"]: event.payload for event in run.ledger.events("trained")}
    wanted = run.wanted()
    for key in run.nodes.keys():
        check.examined += 1
        try:
            manifest = run.nodes.manifest(key)
            node = Node.from_dict({name: manifest[name] for name in Node.__dataclass_fields__})
        except (RunError, KeyError, TypeError):
            check.problems.append(f"node {key[:12]}: its manifest is damaged")
            continue
        if key not in wanted:
            check.problems.append(
                f"node {key[:12]}: depends on data that the run does not hold (any more)"
            )
        elif (
            node != wanted[key]
            or node_key(run.identity, node.block, node.parent, node.roots[-1]) != key
        ):
            check.problems.append(f"node {key[:12]}: its key does not follow from its manifest")
        if not run.nodes.is_intact(key):
            check.problems.append(
                f"node {key[:12]}: its weights or words are not those of its manifest"
            )
        elif logged.get(key, {}).get("weights") != manifest["weights"]:
            check.problems.append(
                f"node {key[:12]}: its weights are not those that the ledger logged"
            )
        elif logged[key]["manifest"] != run.nodes.digest(key, MANIFEST_NAME):
            check.problems.append(
                f"node {key[:12]}: its manifest is not the one that the ledger logged"
            )
    return check


def check_certificates(run: RunDirectory) -> Check:
    """Every request that was carried out has its certificate, as it was written and signed."""
    check = Check("certificates")
    public = run.path / PUBLIC_NAME
    logged = certificates_logged(run)
    check.examined = len(logged)
    for request, issued in logged.items():
        path = certificate_path(run, request)
        if not path.is_file():
            check.problems.append(f"{path.name} is missing")
            continue
        signed = path.read_bytes()
        if hashlib.sha256(signed).hexdigest() not in issued:
            check.problems.append(f"{path.name} is not the one that the ledger logged")
        try:
            PublicKey.open(public).read(signed)
        except (SignatureError, UserError) as error:
            check.problems.append(f"{path.name}: {error}")
    return check


def check_served(run: RunDirectory) -> Check:
    """Every served tensor is base, or belongs to exactly one node, and no served node is stale."""
    check = Check("served")
    if not run.served.exists():
        check.skipped = "nothing is served yet"
        return check
    known = {run.member_name(member) for member in run.members}
    check.problems += [
        f"{name} is served, but the run holds no records of it"
        for name in sorted(members_served(run) - known)
    ]
    for member in run.members:
        label = run.member_name(member).replace("-", " ")
        try:
            check.problems += [f"{label}: {problem}" for problem in _served_problems(run, member)]
        except RunError as error:
            check.problems.append(f"{label}: {error}")
        check.examined += 1
    return check


def _served_problems(run: RunDirectory, shard: int) -> list[str]:
    directory = run.served / run.member_name(shard)
    lineage = read_lineage(directory)
    if lineage is None:
        return ["lineage.json is missing or damaged"]
    wanted, problems, nodes = run.wanted(), [], []
    for entry in lineage["nodes"]:
        if entry["key"] not in wanted or wanted[entry["key"]].shard not in (shard, CORE.shard):
            return [
                f"it is served from node {entry['key'][:12]}, which depends on deleted or unknown data"
            ]
        nodes.append(wanted[entry["key"]])
    if [node.key for node in nodes] not in [
        [node.key for node in path[: len(nodes)]] for path in [*run.paths(shard), []]
    ]:
        problems.append("its nodes are not the beginning of one sequence")
    for node in nodes:
        path = words_path(directory, node.block.stage)
        if (path.read_bytes() if path.is_file() else None) != run.nodes.words(node.key):
            problems.append(f"its words are not those of node {node.key[:12]}")
    tensors = load_tensors(directory / WEIGHTS_NAME)
    problems += _tensor_problems(run, live(nodes), tensors)
    try:
        config = json.loads((directory / CONFIG_NAME).read_bytes())
    except (OSError, ValueError):
        return [*problems, "adapter_config.json is missing or damaged"]
    if config != adapter_config(tensors, run.config.lora, run.shape):
        problems.append("adapter_config.json is not the one that belongs to these tensors")
    if served_digest((directory / WEIGHTS_NAME).read_bytes(), config) != lineage["digest"] or any(
        file_digest(directory / name) != lineage["files"].get(name)
        for name in (WEIGHTS_NAME, CONFIG_NAME)
    ):
        problems.append("lineage.json names another digest than the files have")
    return problems


def _tensor_problems(run: RunDirectory, nodes: list[Node], tensors: Tensors) -> list[str]:
    """Are the served tensors those of these live nodes, bit for bit, and nothing beside?"""
    expected = {name for node in nodes for name in expected_shapes(node, run.shape)}
    if set(tensors) != (expected or set(empty_adapter(run.shape))):
        return ["it holds tensors that belong to no node, or lacks some"]
    if not nodes and any(tensor.any() for tensor in tensors.values()):
        return ["no block is left, but the adapter is not zero"]
    parts, problems = split(tensors, nodes, run.shape), []
    if any(tensor.shape != tensors[name].shape for name, tensor in assemble(parts).items()):
        problems.append("it holds ranks that belong to no node, or lacks some")
    for node, part in zip(nodes, parts, strict=True):
        held = run.nodes.load(node.key)
        if any(
            not np.array_equal(part[name].view(np.uint8), held[name].view(np.uint8))
            for name in part
        ):
            problems.append(
                f"a tensor differs from node {node.key[:12]}, which it should come from"
            )
    return problems


def check_residues(run: RunDirectory) -> Check:
    """No half-written file, no unknown file, and the key is readable by its owner alone."""
    check = Check("residues")
    for path in run.path.rglob(".tmp-*"):
        check.problems.append(
            f"{path.relative_to(run.path)} was left by a crash: run `llm-unlearn rebuild`"
        )
    for path in residues.unrecognised(run):
        shown = path.relative_to(run.path)
        check.problems.append(f"{shown} is of no known kind: a deletion would not purge it")
    check.problems += record_scores.problems(run)
    for name in ("secret.key", PRIVATE_NAME, ADDRESS_NAME):
        mode = stat.S_IMODE((run.path / name).stat().st_mode) if (run.path / name).exists() else 0
        if mode & 0o077:
            check.problems.append(f"{name} is readable by others (mode {mode:o}): chmod 600 it")
    check.examined = sum(1 for path in run.path.rglob("*") if path.is_file())
    return check


def check_encryption(run: RunDirectory) -> Check:
    """Every file that is to be encrypted is, opens with a living key of its own, and no other key is left."""
    return Check("encryption", *run.at_rest.problems())


CHECKS: tuple[Callable[[RunDirectory], Check], ...] = (
    check_ledger,
    check_records,
    check_nodes,
    check_served,
    check_certificates,
    check_residues,
)


def verify(run: RunDirectory) -> list[Check]:
    """All checks that need no model, in the order in which a person would want to read them."""
    with run.changing("changing it"):
        more = (check_encryption,) if run.at_rest.is_encrypted else ()
        return [_guarded(check, run) for check in (*CHECKS, *more)]


def _guarded(check: Callable[[RunDirectory], Check], run: RunDirectory) -> Check:
    """A check that stumbles over damage reports it as a problem; the other checks still run."""
    try:
        return check(run)
    except (UserError, OSError, ValueError, TypeError, KeyError) as error:
        name = check.__name__.removeprefix("check_")
        return Check(name, problems=[f"cannot be checked: {error}"])


def choose_nodes(run: RunDirectory, count: int, seed: int | None = None) -> list[str]:
    """Keys of `count` random nodes, or of all, if there are fewer."""
    wanted = run.wanted()
    keys = [key for key in run.nodes.keys() if key in wanted]
    return random.Random(seed).sample(keys, min(count, len(keys)))


def replay_nodes(run: RunDirectory, chosen: Sequence[str]) -> Check:
    """Train nodes again and compare their bits.

    Nodes that were trained in another environment (versions, processor, threads, processes) are
    not compared; the check says so.

    Args:
        chosen: their keys.
    """
    from llm_unlearn.exact.base_model import load_base_of
    from llm_unlearn.exact.environment import describe_environment
    from llm_unlearn.exact.training import index_of, train_again

    check = Check("replay")
    wanted = run.wanted()
    if not chosen:
        check.skipped = "no node has been trained"
        return check
    base, tokenizer = load_base_of(run)
    elsewhere = 0
    here = describe_environment(_device(run), 1, run.config.num_threads)
    for key in chosen:
        if run.nodes.manifest(key)["environment"] != here:
            elsewhere += 1
            continue
        check.examined += 1
        again = train_again(run, base, tokenizer, wanted[key])
        held = run.nodes.load(key)
        if any(again[name].tobytes() != held[name].tobytes() for name in held):
            check.problems.append(f"node {key[:12]}: training it again gives other bits")
        index = index_of(run, wanted[key])
        if run.nodes.words(key) not in (None, to_bytes(index) if index else None):
            check.problems.append(f"node {key[:12]}: its words are not those of its records")
    if elsewhere:
        check.skipped = (
            f"{elsewhere} nodes were trained in another environment and cannot be compared here"
        )
    return check


def _device(run: RunDirectory) -> str:
    """Where training this run would compute here."""
    import torch

    use_cpu = run.config.runtime.get("use_cpu") or not torch.cuda.is_available()
    return "cpu" if use_cpu else "cuda"
