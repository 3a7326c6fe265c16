"""Who may ask, delete and operate: bearer tokens, of which only the digests are kept.

The file is JSON, mode 0600: for each token its name, the SHA-256 of it, its rights, the subjects it
may delete (as pseudonyms under the run's key, or `*`), and limits of its own. It is read again
whenever it changes, so that a token that was revoked is refused by the next request.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_unlearn import files
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.serving.http.audit import FOLDER

ASK, DELETE, OPERATE = "ask", "delete", "operate"
RIGHTS = (ASK, DELETE, OPERATE)
EVERYBODY = "*"
TOKENS_NAME = "tokens.json"
PREFIX = "lu-"
VERSION = 1


@dataclass(frozen=True)
class Token:
    """What one token may do.

    Attributes:
        sha256: of the token itself, which is not kept.
        subjects: pseudonyms of those it may delete and follow; `*` for all.
        asks_per_minute: another limit than the server's; 0 for none.
        deletions_per_hour: likewise, in subjects.
    """

    name: str
    sha256: str
    rights: tuple[str, ...]
    subjects: tuple[str, ...] = ()
    created: str = ""
    asks_per_minute: float | None = None
    deletions_per_hour: float | None = None

    def may(self, right: str) -> bool:
        return right in self.rights

    @property
    def reach(self) -> str:
        """Whom it may delete, in words."""
        if EVERYBODY in self.subjects:
            return "everybody"
        return "1 subject" if len(self.subjects) == 1 else f"{len(self.subjects)} subjects"

    def may_delete(self, pseudonyms: Sequence[str]) -> bool:
        if not self.may(DELETE):
            return False
        return EVERYBODY in self.subjects or set(pseudonyms) <= set(self.subjects)


ANYBODY = Token("anybody", "", RIGHTS, (EVERYBODY,))
"""Who asks a server that has no tokens and listens on this machine alone."""


def tokens_path(run: Path) -> Path:
    """Where the tokens of a run's servers are, unless somebody says otherwise."""
    return run / FOLDER / TOKENS_NAME


class Tokens:
    """The tokens of a file, as it is now.

    Args:
        path: mode 0600.
        is_optional: there need not be such a file yet; once there was one, it has to stay.

    Raises:
        UserError: it cannot be read, others may read it, or it is not understood.
    """

    def __init__(self, path: Path, is_optional: bool = False):
        self.path = path
        self.is_optional = is_optional
        self.lock = threading.Lock()
        self._seen: object = None
        self._tokens: tuple[Token, ...] = ()
        if not self.are_missing:
            self.read()

    @property
    def are_missing(self) -> bool:
        """Whether no file is needed, and there never was one: then anybody may do everything."""
        return self.is_optional and self._seen is None and not os.path.lexists(self.path)

    def read(self) -> tuple[Token, ...]:
        """All tokens; from memory where the file did not change.

        Raises:
            UserError: as when it was opened.
        """
        with self.lock:
            try:
                found = os.stat(self.path)
            except OSError as error:
                raise UserError(f"cannot read {self.path}: {error.strerror}") from None
            seen = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
            if seen != self._seen:
                self._tokens = read_tokens(self.path)
                self._seen = seen
            return self._tokens

    def holder(self, presented: str) -> Token | None:
        """Whose token this is. Every digest is compared, so the time says nothing of which.

        Raises:
            UserError: the file cannot be used any more.
        """
        given = hashlib.sha256(presented.encode("utf-8", "surrogatepass")).hexdigest()
        found = None
        for token in self.read():
            if hmac.compare_digest(token.sha256, given):
                found = token
        return found


def read_tokens(path: Path) -> tuple[Token, ...]:
    """The tokens of a file.

    Raises:
        UserError: it cannot be read, others may read it, or it is not understood.
    """
    try:
        with path.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            if mode & 0o077:
                raise UserError(
                    f"{path} can be read by others (mode {mode & 0o777:o}): chmod 600 {path}"
                )
            told = json.loads(stream.read())
        if told["version"] != VERSION:
            raise ValueError("another version of the format")
        tokens = tuple(_parse(entry) for entry in told["tokens"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a file of tokens ({type(error).__name__}): "
            "`llm-unlearn token add` makes one"
        ) from None
    if len({token.name for token in tokens}) < len(tokens):
        raise UserError(f"{path} names a token twice: give every token a name of its own")
    return tokens


def _parse(entry: dict[str, Any]) -> Token:
    known = {**entry, "rights": tuple(entry["rights"]), "subjects": tuple(entry["subjects"])}
    token = Token(**known)
    texts = (token.name, token.sha256, token.created, *token.rights, *token.subjects)
    if not all(isinstance(text, str) for text in texts) or len(token.sha256) != 64:
        raise ValueError
    if not set(token.rights) <= set(RIGHTS):
        raise ValueError
    for limit in (token.asks_per_minute, token.deletions_per_hour):
        if limit is not None and not float(limit) >= 0:
            raise ValueError
    return token


def add_token(
    path: Path,
    name: str,
    rights: Sequence[str],
    subjects: Sequence[str] = (),
    pseudonym: Callable[[str, str], str] | None = None,
    asks_per_minute: float | None = None,
    deletions_per_hour: float | None = None,
) -> str:
    """Add a token to a file, which is made where there is none; returns it, this once.

    Args:
        subjects: names of those it may delete, or `*`.
        pseudonym: that of the run's key.

    Raises:
        UserError: no such right, a name that is taken, or subjects without the right `delete`.
    """
    rights = tuple(dict.fromkeys(rights))
    _check(name, rights, subjects)
    given = PREFIX + secrets.token_urlsafe(32)
    held = [subject for subject in dict.fromkeys(subjects) if subject != EVERYBODY]
    if held and pseudonym is None:
        raise UserError("subjects are kept under a run's key: name the run")
    owned = [pseudonym("subject", subject) for subject in held] if pseudonym else []
    everybody = [EVERYBODY] if EVERYBODY in subjects else []
    token = Token(
        name,
        hashlib.sha256(given.encode()).hexdigest(),
        rights,
        (*everybody, *owned),
        datetime.now(UTC).isoformat(timespec="seconds"),
        asks_per_minute,
        deletions_per_hour,
    )
    with _changing(path) as tokens:
        if any(other.name == name for other in tokens):
            raise UserError(f"{path} has a token {name!r}: revoke it first, or choose another name")
        _write(path, (*tokens, token))
    return given


def _check(name: str, rights: Sequence[str], subjects: Sequence[str]) -> None:
    if not name or not name.isprintable() or len(name) > 100:
        raise UserError(f"--name {name!r}: expected 1 to 100 printable characters")
    if not rights or not set(rights) <= set(RIGHTS):
        raise UserError(
            f"--right is {', '.join(rights) or 'missing'}, expected {', '.join(RIGHTS)}"
        )
    if bool(subjects) != (DELETE in rights):
        raise UserError(
            "the right `delete` and --subject go together: name whom the token may delete "
            "(--subject NAME, or --subject '*' for everybody)"
        )


def revoke_token(path: Path, name: str) -> None:
    """Take a token out of a file; a server that reads it refuses the token from then on.

    Raises:
        UserError: no such token.
    """
    with _changing(path) as tokens:
        kept = tuple(token for token in tokens if token.name != name)
        if len(kept) == len(tokens):
            raise UserError(f"{path} has no token {name!r}: `llm-unlearn token list` names them")
        _write(path, kept)


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[tuple[Token, ...]]:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with files.locked(path.with_name(f"{path.name}.lock"), "changing its tokens"):
            yield read_tokens(path) if path.exists() else ()
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from None


def _write(path: Path, tokens: Sequence[Token]) -> None:
    told = {"version": VERSION, "tokens": [asdict(token) for token in tokens]}
    files.write_bytes(path, json.dumps(told, indent=2).encode(), mode=0o600)
