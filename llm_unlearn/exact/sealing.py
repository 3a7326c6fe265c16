"""The format of an encrypted file.

    magic (8) | id of its key (16) | nonce prefix (7) | length of the shown part (4) | shown part | chunks

with chunks of 64 MiB in AES-256-GCM under nonces prefix | number (4) | is last (1), which is STREAM (Hoang,
Reyhanitabar, Rogaway, Vizár, 2015): a chunk moved, dropped or added is found. Everything before the chunks and
the path below the run are associated data, so no file can stand in for another. The shown part is the header of
a slice (numbers and a keyed Merkle root): it is read without a key, and `verify` checks it as that of a plain run.
"""

import secrets
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llm_unlearn.errors import RunError

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


class Head(NamedTuple):
    """The beginning of an encrypted file; `size` is where the chunks begin."""

    key_id: bytes
    nonce: bytes
    shown: bytes
    size: int

    @classmethod
    def parse(cls, data: bytes) -> "Head":
        """The head of an encrypted file; ValueError if it has none."""
        if len(data) < HEADER.size or not data.startswith(MAGIC):
            raise ValueError("not encrypted")
        _, key_id, nonce, length = HEADER.unpack_from(data)
        return cls(key_id, nonce, data[HEADER.size : HEADER.size + length], HEADER.size + length)


def unseal(root: Path, path: Path, head: Head, data: bytes, key: bytes) -> bytes:
    """What is in a file.

    Args:
        data: the whole file, `head` included.

    Raises:
        RunError: a byte of it was changed, or it is another file's.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    cipher, body = AESGCM(key), memoryview(data)[head.size :]
    known, step = data[: head.size] + _name(root, path), CHUNK_BYTES + TAG_BYTES
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


def shown_part(path: Path) -> bytes:
    """What can be read of a file without a key; ValueError if it is not encrypted."""
    with path.open("rb") as stream:
        head = stream.read(HEADER.size)
        if len(head) == HEADER.size:
            head += stream.read(HEADER.unpack(head)[-1])
        return Head.parse(head).shown


def key_id_of(path: str | Path) -> bytes | None:
    """The key that a file names, None if it names none."""
    with open(path, "rb", buffering=0) as stream:
        head = stream.read(HEADER.size)
    try:
        return Head.parse(head).key_id
    except ValueError:
        return None


def _name(root: Path, path: Path) -> bytes:
    """What a file is, wherever the run lies."""
    return b"\0" + path.relative_to(root).as_posix().encode()


def _nonces(prefix: bytes, length: int, step: int) -> Iterator[tuple[int, bytes]]:
    """Where each chunk starts, and its nonce; at least one."""
    count = max(1, -(-length // step))
    for number in range(count):
        yield number * step, prefix + number.to_bytes(4) + bytes([number == count - 1])
