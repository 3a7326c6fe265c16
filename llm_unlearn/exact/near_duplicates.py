"""Who else holds nearly the same text as the records that are to be deleted?

The run's slices are read once and compared with the named records only. No sketch or index of anybody's
records is kept: it would be one more trace to purge.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm_unlearn.data.near_duplicates import THRESHOLD, NearDuplicates, normalised
from llm_unlearn.data.partition import CORE, SliceName
from llm_unlearn.data.records import Record
from llm_unlearn.exact.store import RunDirectory

LETTERS_AT_ONCE = 2**18


@dataclass(frozen=True)
class NearDuplicate:
    """A record that somebody else holds and that is similar to one of those asked about.

    Attributes:
        record: the one that was asked about.
        other: the one that stays when that goes.
        home: the slice that `other` is in; `CORE` for the permanent core.
        similarity: in [threshold, 1]; see `llm_unlearn.data.near_duplicates`.
        is_exact: the same text, part by part, as a deletion `--with-duplicates` takes it
            (`SliceStore.copies`).
    """

    record: Record
    other: Record
    home: SliceName
    similarity: float
    is_exact: bool

    @property
    def is_in_core(self) -> bool:
        """Is the other record in the permanent core, which nothing can be deleted from?"""
        return self.home == CORE

    def to_dict(self) -> dict[str, Any]:
        """Names and ids, for whoever works on the request; no text. Not for certificates or logs."""
        return {
            "subject": self.record.subject,
            "record": self.record.id,
            "held_by": self.other.subject,
            "other_record": self.other.id,
            "shard": self.home.shard,
            "slice": self.home.slice,
            "in_core": self.is_in_core,
            "similarity": self.similarity,
            "is_exact": self.is_exact,
        }


def find_near_duplicates(
    run: RunDirectory,
    records: Sequence[Record],
    threshold: float = THRESHOLD,
    progress: Callable[[int, int], None] | None = None,
) -> list[NearDuplicate]:
    """Near copies of some records that other subjects hold; the most similar first, record by record.

    Copies of the same text count, with a similarity of 1. Records of the subjects of `records`
    do not: they are asked to go themselves.

    Args:
        threshold: the least similarity, in (0, 1].
        progress: called with how many slices were read, and of how many.

    Raises:
        UserError: no such threshold.
        RunError: a slice cannot be read.
    """
    finder = NearDuplicates([normalised(record) for record in records], threshold)
    holders = {record.subject for record in records}
    found: dict[tuple[str, str], NearDuplicate] = {}
    for batch in _batches(run, holders, progress) if records else ():
        texts, others = [text for text, _, _ in batch], batch
        for match in finder.find(texts):
            record, (_, home, other) = records[match.known], others[match.row]
            digest = run.key.text_digest
            is_exact = match.is_exact and digest(record) == digest(other)
            # With public keys a record can be in several slices; it is one copy.
            found[record.id, other.id] = NearDuplicate(
                record, other, home, match.similarity, is_exact
            )
    return sorted(
        found.values(),
        key=lambda near: (near.record.subject, near.record.id, -near.similarity, near.other.id),
    )


def _batches(
    run: RunDirectory, holders: set[str], progress: Callable[[int, int], None] | None
) -> Iterator[list[tuple[str, SliceName, Record]]]:
    """The records of everybody else with their texts, of many small slices or a part of a large one."""
    names = [*run.slices.names, *([CORE] if run.core else [])]
    batch: list[tuple[str, SliceName, Record]] = []
    letters = 0
    for done, name in enumerate(names, start=1):
        for record in run.slices.read(name):
            if record.subject in holders:
                continue
            text = normalised(record)
            batch.append((text, name, record))
            letters += len(text)
            if letters >= LETTERS_AT_ONCE:
                yield batch
                batch, letters = [], 0
        if progress is not None:
            progress(done, len(names))
    yield batch
