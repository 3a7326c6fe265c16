"""Pull: fetch what a run published, and believe no byte of it that the statement does not name."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_unlearn import files
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact.adapters import WEIGHTS_NAME, file_digest
from llm_unlearn.hub.client import MAIN, Hub, RemoteFile
from llm_unlearn.hub.content import OF_THE_HUB, PREDICATE_TYPE, STATEMENT_NAME
from llm_unlearn.hub.names import check_repository, check_revision
from llm_unlearn.hub.purge import Say, silent
from llm_unlearn.signing import PUBLIC_NAME, PublicKey, SignatureError

MOST_STATEMENT_BYTES = 64 * 1024**2
# Nothing hidden, nothing above the directory, nothing that runs.
_PATH = re.compile(
    r"(?:[A-Za-z0-9_-][A-Za-z0-9_.-]{0,95}/){0,4}[A-Za-z0-9_-][A-Za-z0-9_.-]{0,95}"
    r"\.(?:safetensors|json|json\.tsr|md|pub)"
)


@dataclass(frozen=True)
class Pulled:
    """What was fetched.

    Attributes:
        key: fingerprint of the key that signed the statement.
        is_trusted: was the key given? The repository's own proves that nothing was changed since it was
            signed, but not by whom.
        folders: those that hold an adapter, "" for the directory itself.
        predicate: what the statement says.
    """

    repository: str
    revision: str
    directory: Path
    key: str
    is_trusted: bool
    folders: tuple[str, ...]
    predicate: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def base(self) -> str:
        return str(self.predicate["base_model"]["name"])


def pull(
    repository: str,
    output: Path | None = None,
    revision: str | None = None,
    key: Path | None = None,
    hub: Hub | None = None,
    say: Say = silent,
) -> Pulled:
    """Download a published run and check every byte of it against its signed statement.

    Args:
        output: where it goes; by default a directory here, named as the repository. An earlier pull is
            replaced.
        revision: a branch, tag or commit; main by default.
        key: the public key of whoever must have signed, PEM; by default the repository's own.

    Raises:
        UserError: an impossible name, an occupied directory, no such repository, or one that
            `llm-unlearn push` did not make.
        RunError: something in it is not what was signed; nothing is left on this machine.
    """
    check_repository(repository)
    check_revision(revision or MAIN)
    trusted = PublicKey.open(key) if key else None
    output = output or Path(repository.rsplit("/", 1)[-1])
    _check_output(output)
    hub = hub or Hub()
    commit = hub.revision(repository, revision or MAIN)
    held = hub.files(repository, commit)
    signed, public = _signed(hub, repository, commit, held, trusted)
    try:
        said = public.read(signed)
    except SignatureError as error:
        raise RunError(f"{repository}: {STATEMENT_NAME}: {error}; nothing was kept") from None
    digests, predicate = _check_statement(repository, said)
    _check_listed(repository, held, digests)
    say(f"downloading {len(digests)} files of {repository}")
    partial = output.with_name(f".{output.name}.partial")
    hub.download(repository, commit, sorted(digests), partial)
    _check_files(repository, partial, digests)
    files.write_bytes(partial / STATEMENT_NAME, signed, mode=0o644)
    _publish(partial, output)
    notes = []
    if predicate["repository"] != repository:
        notes.append(f"it was published as {predicate['repository']}")
    return Pulled(
        repository, commit, output, public.fingerprint, trusted is not None,
        _folders(digests), predicate, notes,
    )  # fmt: skip


def _check_output(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()) and not (output / STATEMENT_NAME).is_file():
        raise UserError(f"{output} holds something else: choose another --output")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: choose another --output")
    if not output.absolute().parent.is_dir():
        raise UserError(f"{output.parent} is no directory: choose another --output")


def _signed(
    hub: Hub,
    repository: str,
    commit: str,
    held: Mapping[str, RemoteFile],
    trusted: PublicKey | None,
) -> tuple[bytes, PublicKey]:
    """The signed statement, and the key to read it with."""
    if STATEMENT_NAME not in held:
        raise UserError(
            f"{repository} has no {STATEMENT_NAME}: it was not made by `llm-unlearn push`, and nothing in it "
            "can be checked"
        )
    if held[STATEMENT_NAME].size > MOST_STATEMENT_BYTES:
        raise RunError(f"{repository}: {STATEMENT_NAME} is too large to be a statement")
    signed = hub.read(repository, commit, STATEMENT_NAME)
    if trusted is not None:
        return signed, trusted
    if PUBLIC_NAME not in held or held[PUBLIC_NAME].size > MOST_STATEMENT_BYTES:
        raise UserError(f"{repository} has no {PUBLIC_NAME}: give the signer's key with --key")
    try:
        return signed, PublicKey.from_pem(hub.read(repository, commit, PUBLIC_NAME))
    except ValueError as error:
        raise RunError(f"{repository}: {PUBLIC_NAME} is no public key: {error}") from None


def _check_statement(
    repository: str, said: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Any]]:
    """The files that a statement names, and what it says of them."""
    try:
        if said["predicateType"] != PREDICATE_TYPE:
            raise RunError(f"{repository}: {STATEMENT_NAME} is a statement about something else")
        digests = {one["name"]: one["digest"]["sha256"] for one in said["subject"]}
        predicate = said["predicate"]
        texts = (predicate["base_model"]["name"], predicate["repository"], *digests.values())
        is_sound = all(isinstance(text, str) for text in texts) and all(
            isinstance(predicate[name], kind)
            for name, kind in (("requests", dict), ("purged", list))
        )
    except (KeyError, TypeError):
        is_sound, digests, predicate = False, {}, {}
    if not is_sound:
        raise RunError(f"{repository}: {STATEMENT_NAME} lacks what a publication must say")
    if strange := [name for name in digests if not _PATH.fullmatch(name)]:
        raise RunError(f"{repository} names a file that is not taken: {strange[0][:80]!a}")
    return digests, predicate


def _check_listed(
    repository: str, held: Mapping[str, RemoteFile], digests: Mapping[str, str]
) -> None:
    """Compare what the repository lists with what was signed, before anything is fetched."""
    extra = held.keys() - digests.keys() - {STATEMENT_NAME, *OF_THE_HUB}
    if extra:
        raise RunError(f"{repository} holds {min(extra)!r}, which its statement does not name")
    if missing := digests.keys() - held.keys():
        raise RunError(f"{repository} lacks {min(missing)!r}, which its statement names")
    for name, digest in digests.items():
        if held[name].sha256 not in (None, digest):
            raise RunError(_differs(repository, name))


def _check_files(repository: str, directory: Path, digests: Mapping[str, str]) -> None:
    """Every byte that was fetched; nothing is kept where one differs."""
    shutil.rmtree(directory / ".cache", ignore_errors=True)  # notes of the Hub's client
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in digests:
            path.unlink()  # of an earlier attempt
    for name, digest in digests.items():
        path = directory / name
        if not path.is_file() or path.is_symlink() or file_digest(path) != digest:
            shutil.rmtree(directory)
            raise RunError(_differs(repository, name))


def _differs(repository: str, name: str) -> str:
    return f"{repository}: {name} is not the file that was signed; nothing was kept"


def _publish(partial: Path, output: Path) -> None:
    """Put what was checked in the place of an earlier pull."""
    doomed = files.temporary_name(output)
    if output.exists():
        output.rename(doomed)
    files.publish_directory(partial, output)
    files.remove(doomed)


def _folders(digests: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(
        sorted(
            name.removesuffix(WEIGHTS_NAME).rstrip("/")
            for name in digests
            if name.rsplit("/", 1)[-1] == WEIGHTS_NAME
        )
    )
