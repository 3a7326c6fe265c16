"""One encrypted file: what opens it, and that no byte of it can be changed."""

import os
from pathlib import Path

import pytest

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact import sealing
from llm_unlearn.exact.encryption import SETTINGS_NAME, Encrypted
from llm_unlearn.exact.key_stores import KeyMissing
from llm_unlearn.exact.sealing import HEADER

SHOWN = b'{"records":2}'
TEXT = b'{"records":2}\nAda was here\nso was Bela\n'


@pytest.fixture
def at_rest(tmp_path: Path) -> Encrypted:
    (tmp_path / "records").mkdir()
    return Encrypted.create(tmp_path, "slice.keys")


def write(at_rest: Encrypted, name: str, data: bytes = TEXT, shown: bytes = SHOWN) -> Path:
    path = at_rest.root / "records" / name
    path.write_bytes(at_rest.seals()[0](path, data, shown))
    return path


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 200])
def test_what_is_written_is_read_whatever_its_size(
    at_rest: Encrypted, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(sealing, "CHUNK_BYTES", 64)
    data = os.urandom(size)
    path = write(at_rest, "a", data)
    assert at_rest.read(path) == data
    assert at_rest.first_line(path) == SHOWN
    chunks = max(1, -(-size // 64))
    assert path.stat().st_size == HEADER.size + len(SHOWN) + size + 16 * chunks
    assert size < 16 or data[:16] not in path.read_bytes()


def test_every_change_of_a_single_byte_is_found(
    at_rest: Encrypted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every position, every bit of it; the positive control is the file as it was."""
    monkeypatch.setattr(sealing, "CHUNK_BYTES", 16)
    path = write(at_rest, "a")
    data = path.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises((RunError, KeyMissing)):
                at_rest.read(path)
    path.write_bytes(data)
    assert at_rest.read(path) == TEXT


@pytest.mark.parametrize("size", [0, 10, 30, 34, 35, 40, 48, 64, 100, -1])
def test_a_file_cut_short_or_continued_is_found(
    at_rest: Encrypted, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(sealing, "CHUNK_BYTES", 16)
    path = write(at_rest, "a")
    data = path.read_bytes()
    for changed in (data[:size], data + data[size:], data + b"\0" * (size + 1) + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(RunError, match="damaged"):
            at_rest.read(path)


def test_chunks_cannot_be_moved_dropped_or_doubled(
    at_rest: Encrypted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "CHUNK_BYTES", 16)
    path = write(at_rest, "a", bytes(64))
    data = path.read_bytes()
    start = HEADER.size + len(SHOWN)
    head, chunks = data[:start], [data[at : at + 32] for at in range(start, len(data), 32)]
    assert len(chunks) == 4
    a, b, c, d = chunks
    for order in ([b, a, c, d], [a, b, d], [a, b, c], [a, b, c, c, d], [d], [a, b, c, d, d], []):
        path.write_bytes(b"".join([head, *order]))
        with pytest.raises(RunError, match="damaged"):
            at_rest.read(path)


def test_no_file_stands_in_for_another(at_rest: Encrypted) -> None:
    (seal,) = at_rest.seals()
    one, other = (at_rest.root / "records" / name for name in ("one", "other"))
    one.write_bytes(seal(one, TEXT))
    other.write_bytes(one.read_bytes())
    with pytest.raises(RunError, match="another file's"):
        at_rest.read(other)
    assert at_rest.read(one) == TEXT


def test_a_run_that_is_moved_can_be_opened(at_rest: Encrypted, tmp_path: Path) -> None:
    write(at_rest, "a")
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    assert Encrypted(moved, at_rest.identity).read(moved / "records" / "a") == TEXT


def test_equal_texts_look_different_and_every_object_has_its_own_key(at_rest: Encrypted) -> None:
    paths = [write(at_rest, name) for name in "abc"]
    bodies = [path.read_bytes()[HEADER.size :] for path in paths]
    assert len(set(bodies)) == 3
    assert len(at_rest.store.ids()) == 3


def test_keys_that_no_file_names_are_destroyed_and_no_other(at_rest: Encrypted) -> None:
    paths = [write(at_rest, name) for name in "abc"]
    old = paths[0].read_bytes()
    write(at_rest, "a", b"new")
    paths[1].unlink()
    at_rest.seals(5)
    assert at_rest.destroy_keys() == {"keys": 7}
    assert at_rest.destroy_keys() == {"keys": 0}
    assert at_rest.read(paths[0]) == b"new"
    assert at_rest.read(paths[2]) == TEXT
    paths[0].write_bytes(old)
    with pytest.raises(KeyMissing):
        at_rest.read(paths[0])


def test_an_old_copy_of_a_run_destroys_no_key(at_rest: Encrypted) -> None:
    """Its files name keys that are gone, so the others are those of the run that went on."""
    path = write(at_rest, "a")
    old = path.read_bytes()
    write(at_rest, "a", b"new")
    at_rest.destroy_keys()
    alive = at_rest.store.ids()
    path.write_bytes(old)
    with pytest.raises(KeyMissing, match="old copy"):
        at_rest.destroy_keys()
    assert at_rest.store.ids() == alive


@pytest.mark.parametrize("linked", ["file", "folder", "everything"])
def test_no_key_is_destroyed_of_what_is_on_a_disk_that_is_not_mounted(
    at_rest: Encrypted, tmp_path: Path, linked: str
) -> None:
    folder = at_rest.root / "records" / "shard-0"
    folder.mkdir()
    path = write(at_rest, "shard-0/a")
    moved = {"file": path, "folder": folder, "everything": at_rest.root / "records"}[linked]
    disk = tmp_path.with_name(f"{tmp_path.name}-disk")
    moved.rename(disk)
    moved.symlink_to(disk)
    assert at_rest.destroy_keys() == {"keys": 0}
    assert at_rest.read(path) == TEXT
    disk.rename(disk.with_name(f"{disk.name}-gone"))
    with pytest.raises(OSError):
        at_rest.destroy_keys()
    assert len(at_rest.store.ids()) == 1


def test_a_discarded_file_takes_its_key_along(at_rest: Encrypted) -> None:
    path, kept = write(at_rest, "a"), write(at_rest, "b")
    at_rest.discard(path)
    at_rest.discard(path)
    assert not path.exists() and len(at_rest.store.ids()) == 1
    assert at_rest.read(kept) == TEXT


def test_a_reader_follows_a_file_that_is_written_anew_meanwhile(
    at_rest: Encrypted, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(at_rest, "a")
    read_bytes, calls = Path.read_bytes, 0

    def read_then_rewrite(self: Path) -> bytes:
        nonlocal calls
        data = read_bytes(self)
        if self == path:
            calls += 1
            if calls == 1:
                write(at_rest, "a", b"new")
                at_rest.destroy_keys()
        return data

    monkeypatch.setattr(Path, "read_bytes", read_then_rewrite)
    assert at_rest.read(path) == b"new"
    assert calls == 2


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"id": "zz", "key_store": "x"}', None])
def test_damaged_settings_are_one_line(at_rest: Encrypted, damage: bytes | None) -> None:
    path = at_rest.root / SETTINGS_NAME
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    with pytest.raises(RunError, match=r"encryption\.json is damaged or missing"):
        Encrypted(at_rest.root, at_rest.identity).seals()


@pytest.mark.parametrize("place", ["nowhere/keys", "inside"])
def test_a_key_store_that_cannot_be_is_refused(tmp_path: Path, place: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UserError, match="outside the run directory"):
        Encrypted.create(run, str(run / "keys") if place == "inside" else str(tmp_path / place))
    assert list(run.iterdir()) == []
