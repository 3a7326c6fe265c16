"""How records, nodes and caches lie on disk: as they are, or encrypted, each under a key of its own.

    RUN/encryption.json     the run's id among the keys, and where they are kept
    RUN/slice.keys          the keys, unless they are kept elsewhere (key_stores.py)

An encrypted file is

    magic (8) | id of its key (16) | nonce prefix (7) | length of the shown part (4) | shown part | chunks

with chunks of 64 MiB in AES-256-GCM under nonces prefix | number (4) | is last (1), which is STREAM (Hoang,
Reyhanitabar, Rogaway, Vizár, 2015): a chunk moved, dropped or added is found. Everything before the chunks and
the path below the run are associated data, so no file can stand in for another. The shown part is the header of
a slice (numbers and a keyed Merkle root): it is read without a key, and `verify` checks it as that of a plain run.

A deletion replaces or removes files, and then destroys every key that no file names. Which those are
is derived from the files, so that step can be repeated, and a crash anywhere before it leaves nothing behind.
"""

import hashlib
import json
import os
import secrets
import struct
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

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

SETTINGS_NAME = "encryption.json"
KEY_FILE_NAME = "slice.keys"
ENCRYPTED = ("records", "nodes", "cache")
"""Directories of a run whose files are encrypted, if the run is."""

MAGIC = b"sealed-1"
HEADER = struct.Struct(">8s16s7sI")
CHUNK_BYTES, TAG_BYTES = 2**26, 16


class Seal:
    """Makes of what is to be written the bytes that are written: the same."""

    def __call__(self, path: Path, data: bytes, shown: bytes = b"") -> bytes:
        """The bytes of a file.

        Args:
            path: where the file will be in the end.
            shown: what can be read without a key.
        """
        return data


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


class _Head(NamedTuple):
    key_id: bytes
    nonce: bytes
    shown: bytes
    size: int

    @classmethod
    def parse(cls, data: bytes) -> "_Head":
        """The head of an encrypted file; ValueError if it has none."""
        if len(data) < HEADER.size or not data.startswith(MAGIC):
            raise ValueError("not encrypted")
        _, key_id, nonce, length = HEADER.unpack_from(data)
        return cls(key_id, nonce, data[HEADER.size : HEADER.size + length], HEADER.size + length)


class KeySeal(Seal):
    """Encrypts the files of one object under its key."""

    def __init__(self, root: Path, key_id: bytes, key: bytes):
        self._root = root
        self._key_id = key_id
        self._key = key

    def __call__(self, path: Path, data: bytes, shown: bytes = b"") -> bytes:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        prefix = secrets.token_bytes(7)
        head = HEADER.pack(MAGIC, self._key_id, prefix, len(shown)) + shown
        cipher, known = AESGCM(self._key), head + _name(self._root, path)
        view = memoryview(data)
        chunks = [
            cipher.encrypt(nonce, view[start : start + CHUNK_BYTES], known)
            for start, nonce in _nonces(prefix, len(data), CHUNK_BYTES)
        ]
        return b"".join([head, *chunks])


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
        store.prepare()
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
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        try:
            head = _Head.parse(data)
        except ValueError:
            raise RunError(
                f"{path} is damaged: it is not encrypted, as this run's files are"
            ) from None
        cipher = AESGCM(self._key_of(path, head.key_id))
        known, body = data[: head.size] + _name(self.root, path), memoryview(data)[head.size :]
        step = CHUNK_BYTES + TAG_BYTES
        try:
            chunks = [
                cipher.decrypt(nonce, body[start : start + step], known)
                for start, nonce in _nonces(head.nonce, len(body), step)
            ]
        except InvalidTag:
            raise RunError(
                f"{path} is damaged: a byte of it was changed, or it is another file's"
            ) from None
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _key_of(self, path: Path, key_id: bytes) -> bytes:
        try:
            return self.store.key(key_id)
        except KeyMissing as error:
            raise KeyMissing(
                f"{path} cannot be opened: {error}. Is this an old copy of the run, or that an old copy of "
                f"the keys? Go on with the newest of both, or {HOW_TO_NAME_ANOTHER}"
            ) from None

    def first_line(self, path: Path) -> bytes:
        with path.open("rb") as stream:
            head = stream.read(HEADER.size)
            return _Head.parse(head + stream.read(_shown_length(head))).shown

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
        key_id = _key_id_of(path)
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
            self._key_of(named[key_id], key_id)
        doomed = living - named.keys()
        self.store.destroy(doomed)
        return {"keys": len(doomed)}

    def _key_ids(self) -> Iterator[tuple[Path, bytes | None]]:
        """Every file that is to be encrypted, with the id of its key; None if it is not."""
        for kind in ENCRYPTED:
            for folder, _, names in os.walk(self.root / kind):
                for name in names:
                    path = Path(folder, name)
                    yield path, _key_id_of(path)

    def problems(self) -> tuple[int, list[str]]:
        found, objects = self.store.problems(), defaultdict[bytes, set[str]](set)
        examined = 0
        for path, key_id in self._key_ids():
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


def _name(root: Path, path: Path) -> bytes:
    """What a file is, wherever the run lies."""
    return b"\0" + path.relative_to(root).as_posix().encode()


def _object_of(path: Path) -> str:
    """Files under one key: those of a node, or of a slice."""
    return str(path.parent if path.parts[0] == "nodes" else path.with_name(path.name.split(".")[0]))


def _nonces(prefix: bytes, length: int, step: int) -> Iterator[tuple[int, bytes]]:
    """Where each chunk starts, and its nonce; at least one."""
    count = max(1, -(-length // step))
    for number in range(count):
        yield number * step, prefix + number.to_bytes(4) + bytes([number == count - 1])


def _shown_length(head: bytes) -> int:
    """How long the shown part is; 0 where there is no head."""
    return HEADER.unpack(head)[-1] if len(head) == HEADER.size and head.startswith(MAGIC) else 0


def _key_id_of(path: Path) -> bytes | None:
    """The key that a file names, None if it names none."""
    try:
        with path.open("rb") as stream:
            return _Head.parse(stream.read(HEADER.size)).key_id
    except (FileNotFoundError, ValueError):
        return None
