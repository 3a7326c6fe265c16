"""The key file: durable before it is used, gone when it is said to be."""

import os
from pathlib import Path

import pytest

from llm_unlearn.exact.key_stores import SLOT_BYTES, KeyFile, KeyMissing, KeysUnavailable

IDENTITY = bytes(range(16))


@pytest.fixture
def store(tmp_path: Path) -> KeyFile:
    made = KeyFile(tmp_path / "slice.keys", IDENTITY)
    made.prepare()
    return made


def test_keys_are_kept_and_others_are_not_found(store: KeyFile) -> None:
    made = store.create(20)
    assert len({key for _, key in made}) == len({key_id for key_id, _ in made}) == 20
    again = KeyFile(store.path, IDENTITY)
    assert [again.key(key_id) for key_id, _ in made] == [key for _, key in made]
    assert again.ids() == {key_id for key_id, _ in made}
    for foreign in (bytes(16), b"\xff" * 16, made[0][0][:15] + b"?"):
        with pytest.raises(KeyMissing):
            again.key(foreign)


def test_a_destroyed_key_is_nowhere_in_the_file(store: KeyFile) -> None:
    made = store.create(10)
    inode = store.path.stat().st_ino
    gone, kept = made[2:5], made[:2] + made[5:]
    store.destroy({key_id for key_id, _ in gone})
    data = store.path.read_bytes()
    assert not [1 for key_id, key in gone if key in data or key_id in data]
    assert [store.key(key_id) for key_id, _ in kept] == [key for _, key in kept]
    assert store.path.stat().st_ino == inode, "overwritten in place, not written elsewhere"


def test_slots_are_used_again_and_old_ids_do_not_open_new_keys(store: KeyFile) -> None:
    first = store.create(8)
    store.destroy({key_id for key_id, _ in first[:5]})
    second = store.create(6)
    assert store.path.stat().st_size == SLOT_BYTES * (1 + 9)
    for key_id, _ in first[:5]:
        with pytest.raises(KeyMissing):
            store.key(key_id)
    assert [store.key(key_id) for key_id, _ in second] == [key for _, key in second]


def test_only_its_owner_can_read_it(store: KeyFile) -> None:
    store.create(1)
    assert store.path.stat().st_mode & 0o777 == 0o600
    assert store.problems() == []
    store.path.chmod(0o640)
    assert "chmod 600" in store.problems()[0]


def test_what_a_crash_left_of_a_slot_is_no_key(store: KeyFile) -> None:
    made = store.create(3)
    with store.path.open("ab") as stream:
        stream.write(b"x" * 20)
    assert store.ids() == {key_id for key_id, _ in made}
    (new,) = store.create(1)
    assert store.key(new[0]) == new[1]
    assert store.path.stat().st_size == SLOT_BYTES * 5


def test_a_damaged_key_is_never_used_and_can_be_destroyed(store: KeyFile) -> None:
    made = store.create(2)
    data = bytearray(store.path.read_bytes())
    data[SLOT_BYTES + 20] ^= 1
    store.path.write_bytes(data)
    with pytest.raises(KeysUnavailable, match="damaged"):
        store.key(made[0][0])
    assert store.key(made[1][0]) == made[1][1]
    store.destroy({made[0][0]})
    assert store.ids() == {made[1][0]}


def test_the_file_of_another_run_is_never_touched(store: KeyFile) -> None:
    made = store.create(3)
    before = store.path.read_bytes()
    other = KeyFile(store.path, os.urandom(16))
    for use in (
        lambda: other.key(made[0][0]), lambda: other.create(1), other.ids, other.prepare,
        lambda: other.destroy({made[0][0]}),
    ):  # fmt: skip
        with pytest.raises(KeysUnavailable):
            use()
    other.abandon()
    assert store.path.read_bytes() == before


@pytest.mark.parametrize("damage", ["missing", "directory", "garbage", "empty"])
def test_a_file_that_cannot_be_used_is_one_line(store: KeyFile, damage: str) -> None:
    ((key_id, _),) = store.create(1)
    store.path.unlink()
    if damage == "directory":
        store.path.mkdir()
    elif damage != "missing":
        store.path.write_bytes(b"garbage" * 50 if damage == "garbage" else b"")
    for use in (lambda: store.key(key_id), lambda: store.create(1), store.ids):
        with pytest.raises(KeysUnavailable) as raised:
            use()
        assert "\n" not in str(raised.value) and str(store.path) in str(raised.value)
        assert "encryption.json" in str(raised.value)


def test_an_abandoned_store_is_gone(store: KeyFile) -> None:
    store.create(3)
    store.abandon()
    store.abandon()
    assert not store.path.exists()
