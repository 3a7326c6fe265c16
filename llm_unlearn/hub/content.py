"""What a repository is to hold, and the signed statement about it.

README.md                 the card
adapter_config.json, adapter_model.safetensors, lineage.json
                          of the one adapter; of several, in a subfolder each (shard-0, ..., core)
certificates/             of the requests that were carried out
signing.pub               the run's public key
publication.json          an in-toto statement about all other files, in a DSSE envelope
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_unlearn.exact.adapters import CONFIG_NAME, WEIGHTS_NAME, file_digest
from llm_unlearn.exact.served import LINEAGE_NAME
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.hub import state
from llm_unlearn.hub.client import RemoteFile
from llm_unlearn.hub.snapshot import Member, Snapshot, digest_of
from llm_unlearn.signing import PUBLIC_NAME, Signer, statement

PREDICATE_TYPE = "https://llm-unlearn.github.io/publication/v1"
STATEMENT_NAME, CARD_NAME = "publication.json", "README.md"
OF_THE_HUB = (".gitattributes",)  # files that the Hub itself writes

GUARANTEE = (
    "what is served is a deterministic function of data that contains no deleted record; the base model's "
    "own pre-training data is outside the guarantee"
)
CORE_EXCEPTION = (
    "so is the permanent core under all adapters: what was trained into it cannot be deleted"
)

# What purging a repository cannot reach; in every statement, and in the output of a purge.
OUT_OF_REACH = (
    "refs of pull requests and discussions on the Hub: only its web page can delete them",
    "caches and content delivery of the Hub, chunks in its Xet storage, and download links that it signed",
    "repositories that others duplicated or made from this one",
    "downloads, caches and servers of others (`hf cache rm` empties a cache of the Hub's client)",
)


@dataclass(frozen=True)
class Content:
    """The files of one repository.

    Attributes:
        members: served adapters by their folder in the repository, "" for its root.
        files: every file by its path: bytes, or where they lie.
        digests: SHA-256 of each, without the statement's own.
    """

    repository: str
    members: Mapping[str, Member]
    files: Mapping[str, bytes | Path]
    digests: Mapping[str, str]

    @property
    def weights(self) -> dict[str, dict[str, Any]]:
        """SHA-256 and size of every weight file."""
        return {
            f"{folder}{WEIGHTS_NAME}": {"sha256": member.sha256, "size": member.size}
            for folder, member in self.members.items()
        }

    @property
    def nodes(self) -> list[str]:
        return [key for member in self.members.values() for key in member.nodes]

    @property
    def digest(self) -> str:
        """One digest of all files but the statement."""
        return digest_of(self.digests)

    def changes(self, held: Mapping[str, RemoteFile]) -> tuple[list[str], list[str]]:
        """Paths to write and paths to remove, so that a repository that holds this holds that."""
        write = [path for path in self.files if not self._is_same(path, held.get(path))]
        remove = [path for path in held if path not in self.files and path not in OF_THE_HUB]
        return write, remove

    def _is_same(self, path: str, held: RemoteFile | None) -> bool:
        if held is None:
            return False
        if held.sha256 is not None:
            return held.sha256 == (self.digests.get(path) or _sha256(self.files[path]))
        content = self.files[path]
        data = content if isinstance(content, bytes) else content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == held.blob


def make_content(snapshot: Snapshot, repository: str, members: Sequence[Member]) -> Content:
    """The files of a repository but the card and the statement (`with_card`).

    Args:
        members: the served adapters that go there.
    """
    folders = {"" if len(members) == 1 else f"{member.name}/": member for member in members}
    contents: dict[str, bytes | Path] = {
        PUBLIC_NAME: Signer.of(snapshot.run.path).public.pem.encode()
    }
    digests: dict[str, str] = {}
    for folder, member in folders.items():
        contents[f"{folder}{WEIGHTS_NAME}"] = member.weights
        digests[f"{folder}{WEIGHTS_NAME}"] = member.sha256
        contents[f"{folder}{CONFIG_NAME}"] = member.config
        contents[f"{folder}{LINEAGE_NAME}"] = member.lineage
    contents |= {f"certificates/{name}": data for name, data in snapshot.certificates.items()}
    digests |= {path: _sha256(data) for path, data in contents.items() if path not in digests}
    return Content(repository, folders, contents, digests)


def with_card(snapshot: Snapshot, content: Content, card: str) -> Content:
    """The same with its card and the signed statement, which comes last since it names all others."""
    data = card.encode()
    digests = {**content.digests, CARD_NAME: hashlib.sha256(data).hexdigest()}
    told = statement(PREDICATE_TYPE, digests, _predicate(snapshot, content))
    signed = Signer.of(snapshot.run.path).sign(told)
    contents = {**content.files, CARD_NAME: data, STATEMENT_NAME: signed}
    return replace(content, files=contents, digests=digests)


def _predicate(snapshot: Snapshot, content: Content) -> dict[str, Any]:
    run = snapshot.run
    certificates = {
        request: content.digests.get(f"certificates/{request}.json")
        for request in snapshot.requests
    }
    return {
        "version": 1,
        "repository": content.repository,
        "run": run.key.salt_id,
        "served": snapshot.served,
        "members": {
            folder or ".": {
                "name": member.name,
                "digest": member.described.get("digest"),
                "blocks": member.depth,
            }
            for folder, member in content.members.items()
        },
        "guarantee": [GUARANTEE, *([CORE_EXCEPTION] if run.core else [])],
        "base_model": {
            "name": snapshot.base,
            "weights": run.shape.weights,
            "tokenizer": run.shape.tokenizer,
        },
        "requests": certificates,
        "purged": purged_entries(run, content.repository),
        "out_of_reach": list(OUT_OF_REACH),
    }


def purged_entries(run: RunDirectory, repository: str) -> list[dict[str, Any]]:
    """What a statement says was purged: what was asked for, when, and what each answered."""
    names = ("repository", "asked_at", "how", "revisions", "objects", "left")
    return [{name: purge[name] for name in names} for purge in state.purges(run, repository)]


def _sha256(content: bytes | Path) -> str:
    if isinstance(content, Path):
        return file_digest(content)
    return hashlib.sha256(content).hexdigest()
