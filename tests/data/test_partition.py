"""Placement, pseudonyms and Merkle roots: what they depend on, and what they do not."""

import hashlib
import itertools
from collections import Counter

import pytest

from llm_unlearn.data.partition import (
    KEY_BYTES,
    PartitionKey,
    SliceName,
    describe_sizes,
    merkle_root,
)
from llm_unlearn.data.records import Record, make_records

KEY = PartitionKey.from_phrase("one")
SUBJECTS = [f"person {number}" for number in range(4800)]


def place(key: PartitionKey, subject: str, shards: int = 4, slices: int = 4) -> SliceName:
    return key.place(key.pseudonym("subject", subject), shards, slices)


def test_placement_depends_on_subject_and_key_alone() -> None:
    """Nothing of the others goes in; a second key object with the same secret agrees."""
    again = PartitionKey(KEY.secret)
    assert [place(KEY, s) for s in SUBJECTS[:50]] == [place(again, s) for s in SUBJECTS[:50]]
    other = PartitionKey.from_phrase("two")
    moved = sum(place(KEY, s) != place(other, s) for s in SUBJECTS)
    assert moved / len(SUBJECTS) == pytest.approx(15 / 16, abs=0.02)


@pytest.mark.parametrize(("shards", "slices"), [(1, 1), (1, 7), (3, 1), (4, 4), (5, 3)])
def test_placement_is_roughly_even_and_within_bounds(shards: int, slices: int) -> None:
    counts = Counter(place(KEY, subject, shards, slices) for subject in SUBJECTS)
    assert set(counts) == {SliceName(d, s) for d in range(shards) for s in range(slices)}
    mean = len(SUBJECTS) / (shards * slices)
    assert all(abs(count - mean) < 5 * mean**0.5 for count in counts.values())


def test_keys() -> None:
    for length in (0, KEY_BYTES - 1, KEY_BYTES + 1):
        with pytest.raises(ValueError, match=f"32 bytes, got {length}"):
            PartitionKey(b"x" * length)
    assert PartitionKey.random().secret != PartitionKey.random().secret
    assert KEY.salt_id != PartitionKey.from_phrase("two").salt_id
    assert KEY.secret.hex() not in KEY.salt_id and len(KEY.salt_id) == 32


def test_pseudonyms_differ_by_kind_name_and_key() -> None:
    names = ["a", "b", "a ", "A", "", "é", "e\u0301", "\ud800"]
    keys = [KEY, PartitionKey.from_phrase("two")]
    made = [k.pseudonym(kind, n) for k in keys for kind in ("subject", "record") for n in names]
    assert len(set(made)) == len(made)
    assert all(len(bytes.fromhex(pseudonym)) == 32 for pseudonym in made)
    assert KEY.pseudonym("subject", "a") == PartitionKey(KEY.secret).pseudonym("subject", "a")


def inner(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def outer(leaf: bytes) -> bytes:
    return hashlib.sha256(b"\0" + leaf).digest()


A, B, C = outer(b"a"), outer(b"b"), outer(b"c")


@pytest.mark.parametrize(
    ("leaves", "root"),
    [
        ([], hashlib.sha256(b"").digest()),
        ([b"a"], A),
        ([b"a", b"b"], inner(A, B)),
        ([b"a", b"b", b"c"], inner(inner(A, B), C)),
        ([b"a", b"a", b"b", b"c"], inner(inner(A, A), inner(B, C))),
        ([b"a", b"a", b"a", b"b", b"c"], inner(inner(inner(A, A), inner(A, B)), C)),
    ],
    ids=range(6),
)
def test_roots_worked_out_by_hand(leaves: list[bytes], root: bytes) -> None:
    assert {merkle_root(list(order)) for order in itertools.permutations(leaves)} == {root.hex()}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_every_leaf_moves_the_root(count: int) -> None:
    leaves = [bytes([number]) for number in range(count)]
    variants = [leaves, [*leaves, b"new"], [*leaves, leaves[-1]]]
    for index in range(count):
        variants += [leaves[:index] + leaves[index + 1 :]]
        variants += [[*leaves[:index], b"edited", *leaves[index + 1 :]]]
    assert len({merkle_root(variant) for variant in variants}) == len(variants)


def test_no_other_shape_has_the_same_root() -> None:
    """A leaf that spells an inner node, or the children of one, is not taken for it."""
    target = merkle_root([b"a", b"b", b"c"])
    forged: list[list[bytes]] = [
        [A, B, C],
        [inner(A, B), C],
        [inner(A, B), b"c"],
        [A + B, b"c"],
        [b"\1" + A + B, b"c"],
        [b"a", b"b", b"c", b"c"],
        [b"ab", b"c"],
        [b"abc"],
        [inner(A, B) + C],
        [b"\1" + inner(A, B) + C],
    ]
    assert target not in {merkle_root(leaves) for leaves in forged}


def record(text: str, subject: str = "s") -> Record:
    return make_records([{"who": subject, "text": text}], "who")[0]


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ("The Cat", "the  cat\n", True),
        ("straße", "STRASSE", True),
        ("the cat", "thecat", False),
        ("the cat", "the cat.", False),
    ],
)
def test_text_digests_meet_up_to_case_and_space(left: str, right: str, equal: bool) -> None:
    digests = KEY.text_digest(record(left, "Ada")), KEY.text_digest(record(right, "Bob"))
    assert (digests[0] == digests[1]) is equal
    assert digests[0] != PartitionKey.from_phrase("two").text_digest(record(left))


def sizes(*counts: int) -> dict[SliceName, int]:
    return {SliceName(0, index): count for index, count in enumerate(counts)}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((5, 5, 6), []),
        ((7,), []),
        ((0,), ["1 of 1 slices are empty (shard/slice 0/0)"]),
        ((4, 0, 5, 0), ["2 of 4 slices are empty (shard/slice 0/1, 0/3)"]),
        ((1, 1, 1, 1, 20), ["very uneven: from 1 to 20 records"]),
        ((0, 1, 1, 1, 1, 20), ["1 of 6 slices are empty", "very uneven: from 1 to 20"]),
        ((1, 1, 1, 1, 4), []),
    ],
)
def test_warnings_about_sizes(counts: tuple[int, ...], expected: list[str]) -> None:
    warnings = describe_sizes(sizes(*counts))
    assert len(warnings) == len(expected)
    assert all(part in warning for part, warning in zip(expected, warnings, strict=True))


def test_many_empty_slices_are_not_all_named() -> None:
    (warning,) = describe_sizes(sizes(*[0] * 20, 3))
    assert "20 of 21" in warning and "0/7)" in warning and "0/8" not in warning
