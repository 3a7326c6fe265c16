"""What a run serves at one moment, as others may have it: no key, no record, no index of words."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.data.records import digest
from llm_unlearn.errors import RunError
from llm_unlearn.exact.adapters import CONFIG_NAME, WEIGHTS_NAME, file_digest
from llm_unlearn.exact.served import LINEAGE_NAME, depth_of, digest_of_served, read_lineage
from llm_unlearn.exact.settling import settle
from llm_unlearn.exact.store import RunDirectory

CERTIFICATE = re.compile(r"([0-9a-f]{16})\.json(\.tsr)?")
CHANGED = "a deletion came in between: run the same command again, which publishes what is left"


@dataclass(frozen=True)
class Member:
    """One served adapter.

    Attributes:
        name: of its directory in `served/`.
        weights: the file, with its `sha256` and `size` in bytes.
        config: adapter_config.json, which names the base model as the Hub knows it.
        lineage: lineage.json as it is served.
    """

    name: str
    weights: Path
    sha256: str
    size: int
    config: bytes
    lineage: bytes
    described: dict[str, Any]

    @property
    def depth(self) -> int:
        return depth_of(self.described)

    @property
    def nodes(self) -> list[str]:
        return [node["key"] for node in self.described["nodes"]]


@dataclass(frozen=True)
class Snapshot:
    """All that may be published of a run.

    Attributes:
        served: digest of what is served; a deletion changes it.
        base: the base model's name on the Hub.
        certificates: files by name, of requests that were carried out.
        requests: ids of those requests, in their order.
    """

    run: RunDirectory
    base: str
    served: str
    members: tuple[Member, ...]
    certificates: Mapping[str, bytes]
    requests: tuple[str, ...]

    def check_current(self) -> None:
        """Raises RunError where a deletion changed what is served since; the caller holds the lock."""
        if digest_of_served(self.run) != self.served or self.run.ledger.requests(pending=True):
            raise RunError(CHANGED)


def take_snapshot(run: RunDirectory, base: str) -> Snapshot:
    """Carry out what is pending, and look at what is served then.

    Args:
        base: the base model's name on the Hub.

    Raises:
        RunError: nothing is served yet, a served file is not the one that was assembled, or a
            deletion came in between.
    """
    with run.changing("reading what it serves"):
        settle(run)
        served = digest_of_served(run)
        if served is None:
            raise RunError(f"{run.path} serves nothing yet: train it first")
        names = [run.member_name(member) for member in run.members]
        lineages = {name: read_lineage(run.served / name) or {} for name in names}
        wanted = run.wanted()
        directory = run.served.resolve()
        requests = tuple(event.payload["request"] for event in run.ledger.events("deleted"))
        certificates = _certificates(run, requests)
    stale = [
        name
        for name, described in lineages.items()
        if any(node["key"] not in wanted for node in described["nodes"])
    ]
    if stale:
        raise RunError(f"{stale[0]} holds what was deleted: {_mend(run)}")
    try:  # outside the lock: files may be large
        members = tuple(_member(run, directory / name, lineages[name], base) for name in names)
    except FileNotFoundError:
        raise RunError(CHANGED) from None
    return Snapshot(run, base, served, members, certificates, requests)


def _certificates(run: RunDirectory, requests: tuple[str, ...]) -> dict[str, bytes]:
    folder, finished = run.path / "certificates", set(requests)
    if not folder.is_dir():
        return {}
    found = {path.name: CERTIFICATE.fullmatch(path.name) for path in sorted(folder.iterdir())}
    return {
        name: (folder / name).read_bytes()
        for name, match in found.items()
        if match and match[1] in finished
    }


def _member(run: RunDirectory, directory: Path, described: dict[str, Any], base: str) -> Member:
    weights = directory / WEIGHTS_NAME
    sha256, config = file_digest(weights), (directory / CONFIG_NAME).read_bytes()
    told = described.get("files", {}).get(WEIGHTS_NAME, sha256)
    if told != sha256:
        raise RunError(f"{weights} is not the file that was assembled: {_mend(run)}")
    return Member(
        name=directory.name,
        weights=weights,
        sha256=sha256,
        size=weights.stat().st_size,
        config=_on_base(config, run.shape.name_or_path, base),
        lineage=(directory / LINEAGE_NAME).read_bytes(),
        described=described,
    )


def _mend(run: RunDirectory) -> str:
    return (
        f"nothing was published; run `llm-unlearn verify {run.path}`, then `llm-unlearn rebuild "
        f"{run.path}`"
    )


def _on_base(config: bytes, name: str, base: str) -> bytes:
    """The configuration of an adapter on a base model of that name; unchanged if that is its name."""
    if name == base:
        return config
    renamed = {**json.loads(config), "base_model_name_or_path": base, "revision": None}
    return json.dumps(renamed, indent=2, sort_keys=True).encode()


def digest_of(digests: Mapping[str, str]) -> str:
    """One digest of many files, by their names and their SHA-256."""
    return digest(sorted(digests.items()))
