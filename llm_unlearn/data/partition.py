"""Keyed placement: which slice a subject lives in depends on the subject and the key alone."""

import hashlib
import secrets
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from llm_unlearn.data.records import Record

KEY_BYTES = 32
# Numbers among which every subject of a run with a shard for each draws its own. Two that draw the
# same share a shard: of 10,000 subjects, one pair in forty runs.
SUBJECT_SHARDS = 2**31
TEXT_DIGEST_BYTES = 8


class SliceName(NamedTuple):
    """Address of a slice: shard and slice within it, both counted from 0."""

    shard: int
    slice: int


CORE = SliceName(-1, 0)
"""Where the records of the permanent core are: in no slice, so no deletion reaches them."""


class PartitionKey:
    """The run's secret. Everything that could name a person leaves the run only through it.

    The same key and data give the same run, bit for bit; another key gives another partition.
    """

    def __init__(self, secret: bytes):
        if len(secret) != KEY_BYTES:
            raise ValueError(f"a partition key has {KEY_BYTES} bytes, got {len(secret)}")
        self.secret = secret
        # HMAC-SHA256 (RFC 2104, section 4): the key is hashed in once, not for every record.
        block = secret.ljust(hashlib.sha256().block_size, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def __deepcopy__(self, memo: object) -> "PartitionKey":
        return self  # it never changes, and states of hash functions cannot be copied

    @classmethod
    def random(cls) -> "PartitionKey":
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def from_phrase(cls, phrase: str) -> "PartitionKey":
        """A key that anybody can derive: for public demonstrations and tests only."""
        return cls(hashlib.sha256(phrase.encode()).digest())

    @property
    def salt_id(self) -> str:
        """Names the key without telling it."""
        return self._keyed("salt", b"")[:16].hex()

    def _keyed(self, purpose: str, data: bytes) -> bytes:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(purpose.encode() + b"\0" + data)
        outer.update(inner.digest())
        return outer.digest()

    def pseudonym(self, kind: str, name: str) -> str:
        """Tombstone of a `subject` or a `record`: 64 hexadecimal digits, the same every time."""
        return self._keyed(kind, name.encode("utf-8", errors="surrogatepass")).hex()

    def place(self, pseudonym: str, num_shards: int, num_slices: int) -> SliceName:
        """The slice of a subject. It reads nothing of the other subjects, so it never moves.

        Args:
            num_shards: 0 for a shard of its own.
        """
        number = int.from_bytes(self._keyed("place", bytes.fromhex(pseudonym))[:8], "big")
        num_shards = num_shards or SUBJECT_SHARDS
        return SliceName(*divmod(number % (num_shards * num_slices), num_slices))

    def leaf(self, line: bytes) -> bytes:
        """Leaf of the Merkle tree for a stored record; says nothing without the key."""
        return self._keyed("leaf", line)

    def word(self, word: str) -> int:
        """32 bits for a word of the index by which prompts find their subjects."""
        data = word.encode("utf-8", errors="surrogatepass")
        return int.from_bytes(self._keyed("word", data)[:4], "big")

    def text_digest(self, record: Record) -> bytes:
        """Equal for records of the same text, up to case and white space, whoever holds them."""
        text = "\n".join(" ".join(part.split()).casefold() for part in record.texts())
        return self._keyed("text", text.encode("utf-8", errors="surrogatepass"))[:TEXT_DIGEST_BYTES]


def merkle_root(leaves: list[bytes]) -> str:
    """Root of a binary hash tree over the sorted leaves (domain-separated as in RFC 6962)."""
    level = [hashlib.sha256(b"\0" + leaf).digest() for leaf in sorted(leaves)]
    if not level:
        return hashlib.sha256(b"").hexdigest()
    while len(level) > 1:
        paired = [
            hashlib.sha256(b"\1" + level[i] + level[i + 1]).digest()
            for i in range(0, len(level) - 1, 2)
        ]
        level = paired + level[2 * len(paired) :]
    return level[0].hex()


def describe_sizes(sizes: Mapping[SliceName, int]) -> list[str]:
    """Warnings about a partition: empty slices, and slices far from the mean.

    Args:
        sizes: number of records in every slice, the empty ones included.
    """
    warnings = []
    empty = [name for name, size in sizes.items() if size == 0]
    if empty:
        named = ", ".join(f"{name.shard}/{name.slice}" for name in empty[:8])
        warnings.append(
            f"{len(empty)} of {len(sizes)} slices are empty (shard/slice {named}): "
            "use fewer shards or slices, or more subjects"
        )
    filled = [size for size in sizes.values() if size]
    if len(filled) > 1 and max(filled) > 3 * statistics.fmean(filled):
        warnings.append(
            f"slices are very uneven: from {min(filled)} to {max(filled)} records; "
            "a subject with many records makes its slice heavy"
        )
    return warnings
