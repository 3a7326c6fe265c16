"""The records of a run on disk: one file per slice, in an order that says nothing.

    RUN/records/shard-0/slice-2.jsonl        a header line, then one canonical line per record
    RUN/records/shard-0/slice-2.<root>.texts digests of the texts, to find copies held by others
    RUN/records/pending/<request>.jsonl      what a correction that is being carried out will insert
    RUN/records/core.jsonl                   likewise the records of the permanent core, if any

The lines are sorted by their keyed leaf, so the bytes of a slice are a function of its records
and the key: a run that never held a deleted record has the very same file. Where every subject has a shard
of its own, only shards with records have files at all.
"""

import json
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm_unlearn import files
from llm_unlearn.data.partition import (
    CORE,
    TEXT_DIGEST_BYTES,
    PartitionKey,
    SliceName,
    merkle_root,
)
from llm_unlearn.data.records import Record, canonical
from llm_unlearn.errors import RunError
from llm_unlearn.exact.encryption import AtRest
from llm_unlearn.exact.sealing import Seal

DIGEST_TYPE = np.dtype("<u8")
assert DIGEST_TYPE.itemsize == TEXT_DIGEST_BYTES


@dataclass(frozen=True)
class SliceHeader:
    """First line of a slice file: what the trie needs to know without reading the records."""

    shard: int
    slice: int
    records: int
    subjects: int
    root: str


Entry = tuple[bytes, bytes, bytes]
"""What a slice keeps of a record: its leaf, its line, the digest of its text."""


class Placement(NamedTuple):
    """Records placed by public keys: the shards that each goes to, and the keys as a file."""

    shards_of: Callable[[Record], list[int]]
    keys: bytes


SUBJECT_KEY = b',"subject":'


def _quoted_subject(line: bytes) -> bytes:
    """The subject of a stored line as JSON, without parsing the line.

    The keys of a canonical line are sorted, so `subject` is the last; and within a JSON string a
    quote has a backslash before it, so no subject and no text can imitate the key.
    """
    return line[line.rindex(SUBJECT_KEY) + len(SUBJECT_KEY) : -1]


class SliceStore:
    """Reads and rewrites the slices of a run. Callers hold the run's lock for what writes.

    Args:
        num_shards: 0 for one for each subject, numbered by its keyed hash.
        is_keyed: whether the key places subjects; if not, they can be anywhere.
        at_rest: how the files lie on disk; as they are by default.
    """

    def __init__(
        self,
        directory: Path,
        key: PartitionKey,
        num_shards: int,
        num_slices: int,
        is_keyed: bool = True,
        at_rest: AtRest | None = None,
    ):
        self.directory = directory
        self.key = key
        self.is_keyed = is_keyed
        self.at_rest = at_rest or AtRest()
        self._shape = (num_shards, num_slices)

    @property
    def shards(self) -> Sequence[int]:
        """Numbers of the shards, in order."""
        num_shards, _ = self._shape
        if num_shards:
            return range(num_shards)
        return sorted(int(path.name.split("-")[1]) for path in self.directory.glob("shard-*"))

    @property
    def names(self) -> list[SliceName]:
        return [name for shard in self.shards for name in self.names_in(shard)]

    def names_in(self, shard: int) -> list[SliceName]:
        return [SliceName(shard, part) for part in range(self._shape[1])]

    def path(self, name: SliceName) -> Path:
        if name == CORE:
            return self.directory / "core.jsonl"
        return self.directory / f"shard-{name.shard}" / f"slice-{name.slice}.jsonl"

    def place(self, subject: str) -> SliceName:
        return self.key.place(self.key.pseudonym("subject", subject), *self._shape)

    def homes(self, subjects: Iterable[str]) -> dict[SliceName, set[str]]:
        """Where each subject would be, or is: one slice, or with public keys all that hold some of it."""
        found: dict[SliceName, set[str]] = {}
        if self.is_keyed:
            for subject in subjects:
                found.setdefault(self.place(subject), set()).add(subject)
            return found
        quoted = {canonical(subject): subject for subject in subjects}
        for name in self.names:
            here = {_quoted_subject(line) for line in self.lines(name)} & quoted.keys()
            if here:
                found[name] = {quoted[line] for line in here}
        return found

    def write_all(
        self, records: Iterable[Record], places: Callable[[Record], list[int]] | None = None
    ) -> None:
        """Place every record by its subject and write all slices, the empty ones too.

        Args:
            places: the shards that a record goes to, where its subject does not decide.
        """
        entries: dict[SliceName, list[Entry]] = {name: [] for name in self.names}
        place = lru_cache(maxsize=2**20)(self.place)
        for record in records:
            homes = [SliceName(d, 0) for d in places(record)] if places else [place(record.subject)]
            entry = self._entry(record)
            for home in homes:
                entries.setdefault(home, []).append(entry)
        seals = self.at_rest.seals(len(entries))
        for name, seal in zip(sorted(entries), seals, strict=True):
            self._write(name, entries.pop(name), seal)

    def write_core(self, records: Iterable[Record]) -> None:
        self._write(CORE, [self._entry(record) for record in records])

    def _entry(self, record: Record) -> Entry:
        line = record.to_line()
        return self.key.leaf(line), line, self.key.text_digest(record)

    def _write(
        self, name: SliceName, entries: list[Entry], seal: Seal | None = None
    ) -> SliceHeader:
        entries = sorted(entries)
        seal = seal or self.at_rest.seals()[0]
        lines = [line for _, line, _ in entries]
        header = SliceHeader(
            shard=name.shard,
            slice=name.slice,
            records=len(lines),
            subjects=len(set(map(_quoted_subject, lines))),
            root=merkle_root([leaf for leaf, _, _ in entries]),
        )
        path, texts, shown = self.path(name), self._texts_path(header), canonical(asdict(header))
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(texts, seal(texts, b"".join(text for _, _, text in entries)))
        files.write_bytes(path, seal(path, b"\n".join([shown, *lines, b""]), shown))
        self._remove_stale_texts(header)
        return header

    def _remove_stale_texts(self, header: SliceHeader) -> None:
        for stale in self.stale_texts(header):
            files.remove(stale)

    def stale_texts(self, header: SliceHeader) -> list[Path]:
        """Files with digests of what a slice held before."""
        path = self.path(SliceName(header.shard, header.slice))
        current = self._texts_path(header)
        return [found for found in path.parent.glob(f"{path.stem}.*.texts") if found != current]

    def _texts_path(self, header: SliceHeader) -> Path:
        path = self.path(SliceName(header.shard, header.slice))
        return path.with_name(f"{path.stem}.{header.root[:16]}.texts")

    def _digests(self, records: Iterable[Record]) -> np.ndarray:
        return np.frombuffer(b"".join(map(self.key.text_digest, records)), dtype=DIGEST_TYPE)

    def header(self, name: SliceName) -> SliceHeader:
        """Reads one line. `verify` checks that it tells the truth about the others."""
        path = self.path(name)
        try:
            return SliceHeader(**json.loads(self.at_rest.first_line(path)))
        except FileNotFoundError:
            raise RunError(f"{path} is missing: restore the run directory from a backup") from None
        except (ValueError, TypeError):
            raise RunError(f"{path} is damaged: its first line is not a header") from None

    def roots(self, shard: int) -> dict[int, str | None]:
        """Merkle root of every slice of a shard; None where the slice is empty."""
        headers = [self.header(name) for name in self.names_in(shard)]
        return {header.slice: header.root if header.records else None for header in headers}

    def lines(self, name: SliceName) -> Iterator[bytes]:
        path = self.path(name)
        try:
            return iter(self.at_rest.read(path).removesuffix(b"\n").split(b"\n")[1:])
        except FileNotFoundError:
            raise RunError(f"{path} is missing: restore the run directory from a backup") from None

    def subjects(self, name: SliceName) -> set[str]:
        """Whose records a slice holds."""
        return {json.loads(subject) for subject in set(map(_quoted_subject, self.lines(name)))}

    def read(self, name: SliceName, subjects: set[str] | None = None) -> list[Record]:
        """The records of a slice, all or those of some subjects, in the order of their leaves.

        Raises:
            RunError: a line is not a record.
        """
        if self._is_gone(name):
            return []
        lines = self.lines(name)
        try:
            if subjects is not None:
                wanted = set(map(canonical, subjects))
                lines = (line for line in lines if _quoted_subject(line) in wanted)
            return [Record.from_line(line) for line in lines]
        except (ValueError, TypeError):
            raise self._damaged(name) from None

    def _is_gone(self, name: SliceName) -> bool:
        """Is it a subject's own shard of which nothing is held (any more)?"""
        return not self._shape[0] and not self.path(name).parent.exists()

    def _damaged(self, name: SliceName) -> RunError:
        path = self.path(name)
        return RunError(f"{path} is damaged: a line is not a record; run `llm-unlearn verify`")

    def rewrite(
        self, name: SliceName, tombstones: set[str], inserted: Sequence[Record] = ()
    ) -> int:
        """Rewrite a slice without the tombstoned subjects and records, and with some new ones.

        Repeatable: what is inserted twice is held once.

        Returns:
            How many records went.

        Raises:
            RunError: a line is not a record; nothing was rewritten.
        """
        entries = [] if self._is_gone(name) else self._entries(name)
        try:
            gone = self._are_gone([line for _, line, _ in entries], tombstones)
        except (ValueError, TypeError):
            raise self._damaged(name) from None
        kept = [entry for entry, is_gone in zip(entries, gone, strict=True) if not is_gone]
        removed, held = len(entries) - len(kept), {leaf for leaf, _, _ in kept}
        new = [entry for entry in map(self._entry, inserted) if entry[0] not in held]
        if not kept and not new and not self._shape[0]:
            self._remove_shard(name)
        elif removed or new:
            self._write(name, kept + new)
        elif not self._is_gone(name):
            self._remove_stale_texts(self.header(name))  # a crash may have come before that
        return removed

    def _remove_shard(self, name: SliceName) -> None:
        if not self._is_gone(name):
            # Out of sight by a rename first, so that a crash leaves no half of it.
            doomed = files.temporary_name(self.path(name).parent)
            self.path(name).parent.rename(doomed)
            files.remove(doomed)

    def count_of(self, name: SliceName, subjects: set[str], records: set[str]) -> int:
        """How many records of a slice the tombstones of some subjects and records name."""
        if self._is_gone(name):
            return 0
        try:
            lines = list(self.lines(name))
            held = self._pseudonyms(lines)
            counts = Counter(map(_quoted_subject, lines))
            left = sum(counts[subject] for subject, name in held.items() if name in subjects)
            if records:
                left += sum(self._are_gone(lines, records))
            return left
        except (ValueError, TypeError):
            raise self._damaged(name) from None

    def write_pending(self, request: str, records: Sequence[Record]) -> None:
        """Keep what a request will insert, before it is acknowledged."""
        path = self._pending_path(request)
        path.parent.mkdir(exist_ok=True)
        (seal,) = self.at_rest.seals()
        files.write_bytes(path, seal(path, b"\n".join(record.to_line() for record in records)))

    def read_pending(self, request: str) -> list[Record]:
        """What `write_pending` kept.

        Raises:
            RunError: it is missing or damaged.
        """
        path = self._pending_path(request)
        try:
            return [Record.from_line(line) for line in self.at_rest.read(path).split(b"\n")]
        except (OSError, ValueError, TypeError):
            raise RunError(f"{path} is missing or damaged: restore it from a backup") from None

    def drop_pending(self, keep: Container[str] = ()) -> None:
        """Remove what was kept for requests that are carried out or were never acknowledged."""
        for path in (self.directory / "pending").glob("*.jsonl"):
            if path.stem not in keep:
                self.at_rest.discard(path)

    def _pending_path(self, request: str) -> Path:
        return self.directory / "pending" / f"{request}.jsonl"

    def _entries(self, name: SliceName) -> list[Entry]:
        """What the slice holds now: its lines as they are, each with its leaf and text digest.

        Digests filed under the header's root are taken if there is one for every line; whether
        lines, root and digests belong together is for `verify` to say.
        """
        lines = list(self.lines(name))
        texts = self._text_digests(name).tobytes()
        if len(texts) != len(lines) * TEXT_DIGEST_BYTES:
            return [self._entry(record) for record in self.read(name)]
        digests = [
            texts[row : row + TEXT_DIGEST_BYTES] for row in range(0, len(texts), TEXT_DIGEST_BYTES)
        ]
        return list(zip(map(self.key.leaf, lines), lines, digests, strict=True))

    def _are_gone(self, lines: list[bytes], tombstones: set[str]) -> list[bool]:
        """Which lines the tombstones name; one by one only if some name no subject held here."""
        subjects = [_quoted_subject(line) for line in lines]
        pseudonyms = self._pseudonyms(lines)
        if tombstones.issubset(pseudonyms.values()):
            return [pseudonyms[subject] in tombstones for subject in subjects]
        is_gone = self.matcher(tombstones)
        return [is_gone(Record.from_line(line)) for line in lines]

    def _pseudonyms(self, lines: list[bytes]) -> dict[bytes, str]:
        """The pseudonyms of the lines' subjects, by the subject as it is written there."""
        return {
            subject: self.key.pseudonym("subject", json.loads(subject))
            for subject in set(map(_quoted_subject, lines))
        }

    def matcher(self, tombstones: set[str]) -> Callable[[Record], bool]:
        """Predicate: is the record, or its subject, named by one of the tombstones?"""
        subjects: dict[str, bool] = {}

        def is_gone(record: Record) -> bool:
            if record.subject not in subjects:
                subjects[record.subject] = (
                    self.key.pseudonym("subject", record.subject) in tombstones
                )
            return subjects[record.subject] or self.key.pseudonym("record", record.id) in tombstones

        return is_gone

    def copies(self, records: list[Record], holders: set[str]) -> dict[SliceName, list[Record]]:
        """Records of other subjects with the same text as one of `records`.

        Args:
            holders: subjects whose records do not count, since they go anyway.
        """
        wanted = np.unique(self._digests(records))
        found: dict[SliceName, list[Record]] = {}
        for name in self.names:
            positions = np.flatnonzero(np.isin(self._text_digests(name), wanted))
            if positions.size == 0:
                continue
            lines = list(self.lines(name))
            others = [Record.from_line(lines[position]) for position in positions]
            others = [record for record in others if record.subject not in holders]
            if others:
                found[name] = others
        return found

    def _text_digests(self, name: SliceName) -> np.ndarray:
        header = self.header(name)
        path = self._texts_path(header)
        held = self.at_rest.read(path) if path.is_file() else None
        if held is not None and len(held) == header.records * TEXT_DIGEST_BYTES:
            return np.frombuffer(held, dtype=DIGEST_TYPE)
        return self._digests(self.read(name))

    def has_texts_of(self, name: SliceName, records: list[Record]) -> bool:
        """Are the digests on file those of the slice's records? For `verify`."""
        return np.array_equal(self._text_digests(name), self._digests(records))

    def count_in_core(self, tombstones: set[str]) -> int:
        """How many records of the core belong to subjects that the tombstones name.

        Raises:
            RunError: a line is not a record.
        """
        try:
            held = Counter(map(_quoted_subject, self.lines(CORE)))
            names = {
                subject: self.key.pseudonym("subject", json.loads(subject)) for subject in held
            }
        except (ValueError, TypeError, AttributeError):
            raise self._damaged(CORE) from None
        return sum(count for subject, count in held.items() if names[subject] in tombstones)

    def shared_with_core(self) -> tuple[int, int]:
        """How many subjects, and how many texts, are in the core and in a slice as well."""
        in_core = set(map(_quoted_subject, self.lines(CORE)))
        subjects: set[bytes] = set()
        for name in self.names:
            subjects |= in_core.intersection(map(_quoted_subject, self.lines(name)))
        digests = np.concatenate([self._text_digests(name) for name in self.names])
        return len(subjects), len(np.intersect1d(digests, self._text_digests(CORE)))

    def shared_texts(self) -> tuple[int, int]:
        """How many texts are held by more than one subject, and in how many records.

        Reads the digests of all records, and the records themselves only where digests meet.
        """
        digests = [self._text_digests(name) for name in self.names]
        joined = np.concatenate([np.zeros(0, DIGEST_TYPE), *digests])
        values, counts = np.unique(joined, return_counts=True)
        repeated = values[counts > 1]
        holders: dict[bytes, set[tuple[str, str]]] = {}
        for name, held in zip(self.names, digests, strict=True):
            positions = set(np.flatnonzero(np.isin(held, repeated)).tolist())
            for position, line in enumerate(self.lines(name) if positions else ()):
                if position in positions:
                    record = Record.from_line(line)
                    held_by = holders.setdefault(self.key.text_digest(record), set())
                    held_by.add((record.subject, record.id))
        shared = [held for held in holders.values() if len({subject for subject, _ in held}) > 1]
        return len(shared), sum(map(len, shared))
