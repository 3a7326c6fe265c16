"""Where the keys of an encrypted run are kept: a key file (here) or a key service (`key_service.py`).

A key file is made of slots of 64 bytes, the first of which names the run. A key is destroyed by
overwriting its slot in place with zeros, so its bytes are not left in a freed block as they would be if the
file were written anew; what flash wear-levelling, copy-on-write file systems and snapshots keep is out of
reach. A slot lies within one sector, so a crash leaves the key there or not, and its neighbours alone.
"""

import hashlib
import os
import secrets
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import numpy as np

from llm_unlearn import files
from llm_unlearn.errors import UserError

KEY_BYTES = 32
ID_BYTES = 16
SERVICE_PREFIX = "vault+"

SLOT_BYTES = 64
INDEX_BYTES = 4  # the beginning of an id says in which slot its key lies; the rest is random
MAGIC = b"llm-unlearn keys"

assert len(MAGIC) == ID_BYTES


class KeysUnavailable(UserError):
    """The keys cannot be reached, or are not those of this run. Nothing was changed for it."""

    exit_code = 1


class KeyMissing(KeysUnavailable):
    """One key is not in the store: it was destroyed, or the store is not the newest."""


class KeyStore(Protocol):
    """Keys by id. What changes a store is called under the lock of its run.

    Every method raises `KeysUnavailable` when the store cannot be used.

    Attributes:
        place: where it is, for messages.
    """

    place: str

    def prepare(self) -> None:
        """Make an empty store for a new run; never over the keys of another."""
        ...

    def abandon(self) -> None:
        """Destroy what a run left that was killed while it was created."""
        ...

    def create(self, count: int) -> list[tuple[bytes, bytes]]:
        """New random keys with their ids. They are durable when this returns."""
        ...

    def key(self, key_id: bytes) -> bytes:
        """A key by its id; `KeyMissing` if it is not there."""
        ...

    def ids(self) -> set[bytes]:
        """Ids of all keys that live."""
        ...

    def destroy(self, ids: Collection[bytes]) -> None:
        """Destroy keys for good; those that are gone are no error."""
        ...

    def problems(self) -> list[str]:
        """What is wrong with how the store itself is kept, for `verify`."""
        ...


def open_key_store(place: str, root: Path, identity: str) -> KeyStore:
    """The key store that a run names.

    Args:
        place: a path, relative to the run or absolute, or `vault+https://HOST/MOUNT/PATH`.
        identity: the run's id among the keys, 32 hexadecimal digits.

    Raises:
        UserError: the place is none.
    """
    if place.startswith(SERVICE_PREFIX):
        from llm_unlearn.exact.key_service import KeyService

        return KeyService(place, identity)
    return KeyFile(root / place, bytes.fromhex(identity))


class KeyFile:
    """Keys in a file of one run, readable by its owner alone."""

    def __init__(self, path: Path, identity: bytes):
        self.path = path
        self.place = str(path)
        self._head = _slot(MAGIC, identity.ljust(KEY_BYTES, b"\0"))

    def prepare(self) -> None:
        if self.path.exists():
            raise KeysUnavailable(
                f"{self.path} exists already: name another file for the keys of a new run, or remove it if "
                "its run is no more"
            )
        try:
            files.write_bytes(self.path, self._head, mode=0o600)
        except OSError as error:
            raise self._unusable(error) from None

    def abandon(self) -> None:
        if self.path.exists() and self.path.read_bytes().startswith(self._head):
            self.destroy(self.ids())
            self.path.unlink()

    def create(self, count: int) -> list[tuple[bytes, bytes]]:
        slots = self._slots()
        free = np.flatnonzero(~slots.any(axis=1))[:count].tolist()
        indexes = [*free, *range(len(slots), len(slots) + count - len(free))]
        made = {
            index: (index.to_bytes(INDEX_BYTES) + secrets.token_bytes(ID_BYTES - INDEX_BYTES),
                    secrets.token_bytes(KEY_BYTES))
            for index in indexes
        }  # fmt: skip
        self._overwrite({index: _slot(*entry) for index, entry in made.items()})
        return list(made.values())

    def key(self, key_id: bytes) -> bytes:
        try:
            with self.path.open("rb") as stream:
                self._check(stream.read(SLOT_BYTES))
                stream.seek(_offset(int.from_bytes(key_id[:INDEX_BYTES])))
                slot = stream.read(SLOT_BYTES)
        except OSError as error:
            raise self._unusable(error) from None
        if slot[:ID_BYTES] != key_id:
            raise KeyMissing(f"its key is not in {self.path}")
        key = slot[ID_BYTES : ID_BYTES + KEY_BYTES]
        if slot != _slot(key_id, key):
            raise KeysUnavailable(f"{self.path} is damaged: restore its newest copy")
        return key

    def ids(self) -> set[bytes]:
        slots = self._slots()
        return {slot[:ID_BYTES].tobytes() for slot in slots[slots.any(axis=1)]}

    def destroy(self, ids: Collection[bytes]) -> None:
        slots = self._slots() if ids else np.zeros((0, SLOT_BYTES), np.uint8)
        doomed = [
            index
            for index in np.flatnonzero(slots.any(axis=1)).tolist()
            if slots[index, :ID_BYTES].tobytes() in ids
        ]
        self._overwrite(dict.fromkeys(doomed, bytes(SLOT_BYTES)))

    def problems(self) -> list[str]:
        try:
            mode = stat.S_IMODE(self.path.stat().st_mode)
        except OSError as error:
            raise self._unusable(error) from None
        if mode & 0o077:
            return [f"{self.path} is readable by others (mode {mode:o}): chmod 600 it"]
        return []

    def _slots(self) -> np.ndarray:
        """All slots after the first: (N, 64) bytes. What a crash left of another is not one."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise self._unusable(error) from None
        self._check(data[:SLOT_BYTES])
        whole = np.frombuffer(data, np.uint8, len(data) // SLOT_BYTES * SLOT_BYTES)
        return whole.reshape(-1, SLOT_BYTES)[1:]

    def _overwrite(self, slots: dict[int, bytes]) -> None:
        try:
            descriptor = os.open(self.path, os.O_WRONLY)
            try:
                for index, slot in slots.items():
                    os.pwrite(descriptor, slot, _offset(index))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._unusable(error) from None

    def _check(self, head: bytes) -> None:
        if head == self._head:
            return
        whose = "holds the keys of another run" if head.startswith(MAGIC) else "is no key file"
        raise KeysUnavailable(f"{self.path} {whose}: {HOW_TO_NAME_ANOTHER}")

    def _unusable(self, error: OSError) -> KeysUnavailable:
        return KeysUnavailable(
            f"the key file {self.path} cannot be used ({error.strerror}); nothing was changed. "
            f"If it is elsewhere: {HOW_TO_NAME_ANOTHER}. Without it nothing of the run can be opened"
        )


HOW_TO_NAME_ANOTHER = 'say where the run\'s own keys are as "key_store" in its encryption.json'


def _slot(key_id: bytes, key: bytes) -> bytes:
    return key_id + key + hashlib.sha256(key_id + key).digest()[: SLOT_BYTES - ID_BYTES - KEY_BYTES]


def _offset(index: int) -> int:
    return SLOT_BYTES * (index + 1)
