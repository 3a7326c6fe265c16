"""The Hub as publishing uses it: the few calls that it needs.

The token is `huggingface_hub`'s (`hf auth login` or HF_TOKEN): nothing here reads, prints or stores it. The
endpoint is HF_ENDPOINT unless one is given.
"""

import hashlib
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.hub.refusals import explained

CONNECT_SECONDS, ANSWER_SECONDS = 20.0, 300.0
MAIN = "main"
MOST_OBJECTS = 500  # of one question about LFS objects
GONE = (403, 404, 410)  # what a file answers that is not served any more


@dataclass(frozen=True)
class Head:
    """Where the main branch of a repository is."""

    revision: str
    private: bool


@dataclass(frozen=True)
class RemoteFile:
    """A file of a revision: `sha256` of an LFS object, or the git `blob`."""

    blob: str
    sha256: str | None
    size: int


@dataclass(frozen=True)
class References:
    """Names of what points at commits."""

    branches: tuple[str, ...]
    tags: tuple[str, ...]
    pulls: tuple[str, ...]


class Hub:
    """One account on one Hub.

    Args:
        endpoint: HF_ENDPOINT by default.
        token: the saved one by default.
    """

    def __init__(self, endpoint: str | None = None, token: str | None = None):
        from huggingface_hub import HfApi, constants

        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._api = HfApi(endpoint=self.endpoint, token=token, library_name="llm-unlearn")

    def accounts(self) -> tuple[str, ...]:
        """Whose token it is, and the organisations that they are in.

        Raises:
            UserError: there is none, or it is not valid.
        """
        from huggingface_hub import get_token

        if self._api.token is None and get_token() is None:
            raise UserError("nobody is logged in to the Hub: run `hf auth login` or set HF_TOKEN")
        with self._asking("the account"):
            told = self._api.whoami()
            return (str(told["name"]), *(str(one["name"]) for one in told.get("orgs", [])))

    def head(self, repository: str) -> Head | None:
        """Where main is; None if there is no such repository (for this token)."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._asking(repository):
            try:
                found = self._api.model_info(repository)
            except RepositoryNotFoundError as error:
                if error.response.status_code == 404:
                    return None
                raise  # a token that is not valid proves nothing
        return Head(str(found.sha), bool(found.private))

    def create(self, repository: str, private: bool) -> None:
        with self._asking(repository):
            self._api.create_repo(repository, private=private or None, exist_ok=True)

    def delete(self, repository: str) -> None:
        """Delete a repository with everything in it; one that is not there any more is no error."""
        with self._asking(repository):
            self._api.delete_repo(repository, missing_ok=True)

    def files(self, repository: str, revision: str) -> dict[str, RemoteFile]:
        """What a revision holds, by path."""
        from huggingface_hub.hf_api import RepoFile

        with self._asking(repository):
            listed = list(self._api.list_repo_tree(repository, recursive=True, revision=revision))
        return {
            one.path: RemoteFile(one.blob_id, one.lfs.sha256 if one.lfs else None, one.size)
            for one in listed
            if isinstance(one, RepoFile)
        }

    def commit(
        self,
        repository: str,
        add: Mapping[str, bytes | Path],
        remove: Sequence[str],
        message: str,
        parent: str,
    ) -> str:
        """One commit on main; returns the revision. Refused where main is not at `parent` any more."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # ours says what is done
        with self._asking(repository):
            operations: list[Any] = [
                CommitOperationDelete(path, is_folder=False) for path in sorted(remove)
            ]
            operations += [CommitOperationAdd(path, add[path]) for path in sorted(add)]
            made = self._api.create_commit(
                repository, operations, commit_message=message, parent_commit=parent
            )
        return str(made.oid)

    def references(self, repository: str) -> References:
        with self._asking(repository):
            found = self._api.list_repo_refs(repository, include_pull_requests=True)
        others = [*(found.pull_requests or []), *found.converts]
        return References(
            tuple(one.name for one in found.branches),
            tuple(one.name for one in found.tags),
            tuple(one.ref for one in others),
        )

    def history(self, repository: str, reference: str) -> list[str]:
        """Revisions that a branch, tag or pull request reaches, the newest first."""
        with self._asking(repository):
            listed = self._api.list_repo_commits(repository, revision=reference)
        return [one.commit_id for one in listed]

    def squash(self, repository: str) -> None:
        """Make main one commit, without a history."""
        with self._asking(repository):
            self._api.super_squash_history(repository, branch=MAIN, commit_message="Publish")

    def delete_branch(self, repository: str, name: str) -> None:
        with self._asking(repository):
            self._api.delete_branch(repository, branch=name)

    def delete_tag(self, repository: str, name: str) -> None:
        with self._asking(repository):
            self._api.delete_tag(repository, tag=name)

    def delete_objects(self, repository: str, keep: Container[str]) -> int:
        """Delete all LFS objects for good, referenced or not; returns how many went.

        Args:
            keep: SHA-256 of those that stay.
        """
        with self._asking(repository):
            listed = self._api.list_lfs_files(repository)
            doomed = [one for one in listed if one.oid not in keep]
            self._api.permanently_delete_lfs_files(repository, doomed)
        return len(doomed)

    def is_gone(self, repository: str, revision: str) -> bool:
        """Does a revision answer 404? A refusal of another kind proves nothing, and is an error."""
        from huggingface_hub.errors import RevisionNotFoundError

        with self._asking(repository):
            try:
                self._api.model_info(repository, revision=revision)
            except RevisionNotFoundError:
                return True
        return False

    def status_of_file(self, repository: str, revision: str, path: str) -> int:
        """What a download of a file answers, after all redirections."""
        where = f"{self.endpoint}/{repository}/resolve/{quote(revision, safe='')}/{quote(path)}"
        return self._status(repository, where, self._headers())

    def statuses_of_objects(self, repository: str, sizes: Mapping[str, int]) -> dict[str, int]:
        """What downloads of LFS objects answer, by SHA-256.

        Args:
            sizes: their sizes in bytes.
        """
        found: dict[str, int] = {}
        oids = sorted(sizes)
        for start in range(0, len(oids), MOST_OBJECTS):
            part = oids[start : start + MOST_OBJECTS]
            for one in self._batch(repository, {oid: sizes[oid] for oid in part}):
                if "error" in one:
                    found[one["oid"]] = int(one["error"].get("code", 404))
                elif "actions" in one:
                    link = one["actions"]["download"]
                    found[one["oid"]] = self._status(
                        repository, link["href"], link.get("header", {})
                    )
        missing = sizes.keys() - found.keys()
        if missing:
            raise RunError(
                f"{repository}: the Hub did not say whether it still serves {len(missing)} old files; "
                "run the same command again"
            )
        return found

    def _batch(self, repository: str, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
        from huggingface_hub.utils import get_session, hf_raise_for_status

        with self._asking(repository):
            kind = "application/vnd.git-lfs+json"
            answer = get_session().post(
                f"{self.endpoint}/{repository}.git/info/lfs/objects/batch",
                headers=self._headers() | {"Accept": kind, "Content-Type": kind},
                json={
                    "operation": "download",
                    "transfers": ["basic"],
                    "hash_algo": "sha256",
                    "objects": [{"oid": oid, "size": size} for oid, size in sizes.items()],
                },
            )
            hf_raise_for_status(answer)
            return list(answer.json()["objects"])

    def _status(self, repository: str, where: str, headers: Mapping[str, str]) -> int:
        from huggingface_hub.utils import get_session

        with self._asking(repository):
            first_byte = {"Range": "bytes=0-0"}
            with get_session().stream("GET", where, headers={**headers, **first_byte}) as answer:
                return answer.status_code

    def read(self, repository: str, revision: str, path: str) -> bytes:
        """The content of a file."""
        from huggingface_hub.utils import get_session, hf_raise_for_status

        where = f"{self.endpoint}/{repository}/resolve/{quote(revision, safe='')}/{quote(path)}"
        with self._asking(repository):
            answer = get_session().get(where, headers=self._headers())
            hf_raise_for_status(answer)
            return answer.content

    def sha256_of(self, repository: str, revision: str, path: str, file: RemoteFile) -> str:
        """SHA-256 of a file; what is no LFS object is read."""
        if file.sha256 is not None:
            return file.sha256
        return hashlib.sha256(self.read(repository, revision, path)).hexdigest()

    def download(
        self, repository: str, revision: str, paths: Sequence[str], directory: Path
    ) -> None:
        """Fetch files of a revision (a commit) into a directory, past any cache."""
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        with self._asking(repository):
            self._api.snapshot_download(
                repository,
                revision=revision,
                local_dir=directory,
                allow_patterns=[*paths],
                max_workers=4,
            )

    def revision(self, repository: str, name: str) -> str:
        """The commit that a branch, tag or commit is."""
        with self._asking(repository):
            return str(self._api.model_info(repository, revision=name).sha)

    def _headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(token=self._api.token)

    def _asking(self, about: str) -> AbstractContextManager[None]:
        import httpx2
        from huggingface_hub.utils import get_session

        session = get_session()
        if session.timeout == httpx2.Timeout(None):  # the client would wait for ever
            session.timeout = httpx2.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
        return explained(self.endpoint, about)
