"""How records, nodes and caches lie on disk: as they are, or encrypted, each under a key of its own.

    RUN/encryption.json     the run's id among the keys, and where they are kept
    RUN/slice.keys          the keys, unless they are kept elsewhere (key_stores.py)

A deletion replaces or removes files, and then destroys every key that no file names. Which those are
is derived from the files, so that step can be repeated, and a crash anywhere before it leaves nothing behind.
"""

import hashlib
import json
import os
import secrets
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from safetensors.numpy import load

from llm_unlearn import files
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact.adapters import Tensors, file_digest, load_tensors
from llm_unlearn.exact.key_stores import (
    HOW_TO_NAME_ANOTHER,
    SERVICE_PREFIX,
    KeyMissing,
    KeyStore,
    open_key_store,
)
from llm_unlearn.exact.sealing import Head, KeySeal, Seal, key_id_of, shown_part, unseal

SETTINGS_NAME = "encryption.json"
KEY_FILE_NAME = "slice.keys"
ENCRYPTED = ("records", "nodes", "cache", "memorization")
"""Directories of a run whose files are encrypted, if the run is."""


class AtRest:
    """Files as they are: a run without encryption."""

    is_encrypted = False

    def ensure_same(self, encrypt: bool, key_store: str | None) -> None:
        """Refuse to go on with other flags than the run was made with; not to repeat them is fine.

        Raises:
            UserError: says what cannot be.
        """
        if encrypt:
            raise UserError(
                "this run was made without --encrypt, and what was written in clear cannot be taken back: "
                "choose another --output_dir"
            )

    @property
    def place(self) -> str | None:
        """Where the keys are; None without encryption."""
        return None

    def warnings(self) -> list[str]:
        """What a person should know about where the keys are."""
        return []

    def seals(self, count: int = 1) -> list[Seal]:
        """One for each object that will be written now, under the lock that it is written under."""
        return [Seal()] * count

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def first_line(self, path: Path) -> bytes:
        with path.open("rb") as stream:
            return stream.readline()

    def digest(self, path: Path) -> str:
        """SHA-256 of what is in a file."""
        return file_digest(path)

    def tensors(self, path: Path) -> Tensors:
        """The tensors in a file; RunError if it is missing or damaged."""
        return load_tensors(path)

    def discard(self, path: Path) -> None:
        """Remove a file for good."""
        files.remove(path)

    def ensure_usable(self) -> None:
        """Raises `KeysUnavailable` if keys cannot be made and destroyed now."""

    def destroy_keys(self) -> dict[str, int]:
        """Destroy every key that no file names; how many, under a name for certificates."""
        return {}

    def problems(self) -> tuple[int, list[str]]:
        """How many files were opened, and what is wrong with them or with their keys."""
        return 0, []


class Encrypted(AtRest):
    """Files under keys of their own, which a deletion destroys.

    Args:
        root: the run directory.
        identity: the run's id among the keys.
    """

    is_encrypted = True

    def __init__(self, root: Path, identity: str):
        self.root = root
        self.identity = identity

    @classmethod
    def create(cls, root: Path, key_store: str) -> "Encrypted":
        """Settle where the keys of a new run are kept, and make the store.

        Args:
            key_store: `KEY_FILE_NAME` for a file in the run, another path, or the address of a service.

        Raises:
            UserError: the place is none, or is taken; nothing was written there.
        """
        made = cls(root, secrets.token_hex(16))
        place = _place(root, key_store)
        store = open_key_store(place, root, made.identity)
        files.write_bytes(
            root / SETTINGS_NAME,
            json.dumps({"id": made.identity, "key_store": place}, indent=2).encode(),
        )
        try:
            store.prepare()
        except UserError:
            files.remove(root / SETTINGS_NAME)  # nothing is there, and another place may be tried
            raise
        return made

    @staticmethod
    def abandon(root: Path) -> None:
        """Destroy the keys of a run at `root` that was killed while it was created, if any."""
        if (root / SETTINGS_NAME).exists():
            identity, place = _settings(root)
            open_key_store(place, root, identity).abandon()

    def ensure_same(self, encrypt: bool, key_store: str | None) -> None:
        if key_store is not None and _place(self.root, key_store) != self._held_in:
            raise UserError(
                f"the keys of {self.root} are in {self.place}, not in {key_store}: leave --key_store out; if "
                f"they were moved, {HOW_TO_NAME_ANOTHER}"
            )

    @property
    def _held_in(self) -> str:
        return _settings(self.root)[1]

    @property
    def place(self) -> str:
        return self.store.place

    def warnings(self) -> list[str]:
        open_ones = "generations/ (what is served, in clear)"
        if self._held_in == KEY_FILE_NAME:
            open_ones += f" and {KEY_FILE_NAME} (or choose --key_store elsewhere)"
        return [
            f"leave {open_ones} out of backups of the run: with them they open what is deleted later"
        ]

    @cached_property
    def store(self) -> KeyStore:
        """Where the keys are, by encryption.json: they may be moved."""
        identity, place = _settings(self.root)
        if identity != self.identity:
            raise RunError(f"{self.root / SETTINGS_NAME} is that of another run: restore its own")
        return open_key_store(place, self.root, identity)

    def seals(self, count: int = 1) -> list[Seal]:
        return [KeySeal(self.root, key_id, key) for key_id, key in self.store.create(count)]

    def read(self, path: Path) -> bytes:
        data = path.read_bytes()
        try:
            return self._open(path, data)
        except KeyMissing:
            # Another process may have written the file anew meanwhile, and destroyed the old key.
            if (again := path.read_bytes()) == data:
                raise
            return self._open(path, again)

    def _open(self, path: Path, data: bytes) -> bytes:
        try:
            head = Head.parse(data)
        except ValueError:
            raise RunError(
                f"{path} is damaged: it is not encrypted, as this run's files are"
            ) from None
        return unseal(self.root, path, head, data, self._key_of(path, head.key_id))

    def _key_of(self, path: Path, key_id: bytes) -> bytes:
        try:
            return self.store.key(key_id)
        except KeyMissing as error:
            raise KeyMissing(
                f"{path} cannot be opened: {error}. Is this an old copy of the run, or that an old copy of "
                f"the keys? Go on with the newest of both, or {HOW_TO_NAME_ANOTHER}"
            ) from None

    def first_line(self, path: Path) -> bytes:
        return shown_part(path)

    def digest(self, path: Path) -> str:
        return hashlib.sha256(self.read(path)).hexdigest()

    def tensors(self, path: Path) -> Tensors:
        try:
            return load(self.read(path))
        except OSError as error:
            raise RunError(
                f"{path} is missing ({error.strerror}): `llm-unlearn rebuild` the run"
            ) from None

    def discard(self, path: Path) -> None:
        """Remove a file that is an object of its own, then destroy its key."""
        key_id = key_id_of(path) if path.exists() else None
        files.remove(path)
        if key_id is not None:
            self.store.destroy({key_id})

    def ensure_usable(self) -> None:
        made = self.store.create(1)
        self.store.destroy({key_id for key_id, _ in made})

    def destroy_keys(self) -> dict[str, int]:
        """Destroy every key that no file names. The caller holds the run's lock.

        Raises:
            KeyMissing: a file names a key that is not there, so this is not the run whose keys
                these are, but an old copy of it: nothing was destroyed.
        """
        named = {key_id: path for path, key_id in self._key_ids() if key_id is not None}
        living = self.store.ids()
        for key_id in named.keys() - living:
            self._key_of(Path(named[key_id]), key_id)
        doomed = living - named.keys()
        self.store.destroy(doomed)
        return {"keys": len(doomed)}

    def _key_ids(self) -> Iterator[tuple[str, bytes | None]]:
        """Every file that is to be encrypted, with the id of its key; None if it is not.

        What cannot be looked into (a disk that is not mounted) is an `OSError`: its keys are needed.
        """
        held = [self.root / kind for kind in ENCRYPTED if os.path.lexists(self.root / kind)]
        for top in held:
            for folder, _, names in os.walk(top, onerror=_fail, followlinks=True):
                for name in names:
                    path = os.path.join(folder, name)  # there may be very many
                    yield path, key_id_of(path)

    def problems(self) -> tuple[int, list[str]]:
        found, objects = self.store.problems(), defaultdict[bytes, set[str]](set)
        examined = 0
        for name, key_id in self._key_ids():
            path = Path(name)
            examined += 1
            try:
                self.read(path)
            except UserError as error:
                found.append(str(error))
            if key_id is not None:
                objects[key_id].add(_object_of(path.relative_to(self.root)))
        found += [
            f"{' and '.join(sorted(shared))} are under the same key"
            for shared in objects.values()
            if len(shared) > 1
        ]
        if idle := self.store.ids() - objects.keys():
            found.append(
                f"{len(idle)} keys in {self.store.place} open nothing that is left: run `llm-unlearn rebuild`"
            )
        return examined, found


def _fail(error: OSError) -> None:
    raise error


def _place(root: Path, key_store: str) -> str:
    """A key store as encryption.json names it."""
    if key_store == KEY_FILE_NAME or key_store.startswith(SERVICE_PREFIX):
        return key_store
    path = Path(key_store).expanduser().resolve()
    if path.is_relative_to(root.resolve()) or not path.parent.is_dir():
        raise UserError(
            f"--key_store {key_store!r}: name a file in a directory that exists, outside the run directory"
        )
    return str(path)


def _settings(root: Path) -> tuple[str, str]:
    """Id among the keys, and where they are."""
    try:
        held = json.loads((root / SETTINGS_NAME).read_bytes())
        bytes.fromhex(held["id"])
        return str(held["id"]), str(held["key_store"])
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(
            f"{root / SETTINGS_NAME} is damaged or missing: restore it, it says where the keys are"
        ) from None


def _object_of(path: Path) -> str:
    """Files under one key: those of a node, or of a slice."""
    return str(path.parent if path.parts[0] == "nodes" else path.with_name(path.name.split(".")[0]))
