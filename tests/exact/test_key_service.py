"""Keys in a key service, through the real client, over HTTP."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.exact.key_service import KeyService
from llm_unlearn.exact.key_stores import KeyMissing, KeysUnavailable, open_key_store
from llm_unlearn.exact.run import S3TRun
from tests.exact.key_value_service import TOKEN, KeyValueService, serving
from tests.tiny import (
    make_stub_run,
    node_bytes,
    served_bytes,
    stubbed_training,
    tiny_records,
    train_stub,
)

pytestmark = pytest.mark.usefixtures("without_fsync")

IDENTITY = "0123456789abcdef" * 2


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyValueService]:
    monkeypatch.setenv("VAULT_TOKEN", TOKEN)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "VAULT_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    with serving() as running:
        yield running


@pytest.fixture
def store(service: KeyValueService) -> KeyService:
    return KeyService(service.address, IDENTITY)


def test_keys_are_kept_found_and_destroyed(service: KeyValueService, store: KeyService) -> None:
    made = store.create(5)
    again = KeyService(service.address, IDENTITY)
    assert [again.key(key_id) for key_id, _ in made] == [key for _, key in made]
    assert again.ids() == {key_id for key_id, _ in made}
    again.destroy([key_id for key_id, _ in made[:2]])
    assert again.ids() == {key_id for key_id, _ in made[2:]}
    assert len(service.values()) == 3
    for reader in (again, KeyService(service.address, IDENTITY)):
        for key_id, _ in made[:2]:
            with pytest.raises(KeyMissing):
                reader.key(key_id)
        assert reader.key(made[2][0]) == made[2][1]


def test_a_key_is_asked_for_once(service: KeyValueService, store: KeyService) -> None:
    ((key_id, _),) = store.create(1)
    reader = KeyService(service.address, IDENTITY)
    before = len(service.asked)
    for _ in range(5):
        reader.key(key_id)
    assert len(service.asked) == before + 1


def test_runs_at_one_place_do_not_see_each_other(service: KeyValueService) -> None:
    one, other = (KeyService(service.address, character * 32) for character in "ab")
    ((key_id, key),) = one.create(1)
    assert other.ids() == set()
    other.create(2)
    other.abandon()
    assert one.ids() == {key_id} and one.key(key_id) == key
    assert len(service.values()) == 1


def test_the_token_is_only_taken_from_the_environment(
    service: KeyValueService, store: KeyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VAULT_TOKEN")
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(KeysUnavailable, match="set VAULT_TOKEN"):
        store.create(1)
    monkeypatch.setenv("VAULT_TOKEN", "wrong")
    with pytest.raises(KeysUnavailable, match="refuses the token") as raised:
        store.create(1)
    assert "wrong" not in str(raised.value)
    assert service.secrets == {}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("sealed", "cannot be used .*sealed"),
        ("garbage", "not a key service"),
        ("mount", "no handler"),
        ("gone", "cannot be used"),
    ],
)
def test_whatever_it_answers_is_one_line(
    service: KeyValueService, broken: str, message: str
) -> None:
    ((key_id, _),) = KeyService(service.address, IDENTITY).create(1)
    address = service.address
    if broken == "mount":
        service.mount = "other"
    elif broken == "gone":
        address = "vault+http://127.0.0.1:1/secret/runs"
    else:
        service.broken = broken
    store = KeyService(address, IDENTITY)
    for use in (
        lambda: store.key(key_id), lambda: store.create(1), store.ids, lambda: store.destroy({key_id}),
    ):  # fmt: skip
        with pytest.raises(KeysUnavailable, match=message) as raised:
            use()
        assert "\n" not in str(raised.value) and not isinstance(raised.value, KeyMissing)
        assert TOKEN not in str(raised.value)


def test_another_place_can_be_tried_after_one_that_is_none(
    service: KeyValueService, tmp_path: Path
) -> None:
    service.broken = "sealed"
    with pytest.raises(KeysUnavailable, match="sealed"):
        make_stub_run(tmp_path / "run", tiny_records(), encrypt=True, key_store=service.address)
    run = make_stub_run(tmp_path / "run", tiny_records(), encrypt=True)
    assert run.directory.at_rest.place == str(tmp_path / "run" / "slice.keys")


def test_a_deletion_that_can_be_undone_is_not_believed(
    service: KeyValueService, store: KeyService
) -> None:
    ((key_id, _),) = store.create(1)
    service.broken = "soft"
    with pytest.raises(KeysUnavailable, match="version 2"):
        store.destroy({key_id})


@pytest.mark.parametrize(
    "address",
    [
        "vault+https://", "vault+https://host", "vault+https://host/mount", "vault+https://host/mount/",
        "vault+https://user:password@host/mount/path", "vault+https://host/mount/path?list=true",
        "vault+http://vault.example.org/mount/path", "vault+ftp://host/mount/path", "vault+file:///etc/keys",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="key_store"):
        open_key_store(address, Path(), IDENTITY)


def backup_opens(backup: Path, run: S3TRun) -> dict[str, bool]:
    """Which files of a copy of the run can be opened with the keys that live now."""
    at_rest = S3TRun.open(backup).directory.at_rest
    opened = {}
    for kind in ("records", "nodes"):
        for path in sorted(p for p in (backup / kind).rglob("*") if p.is_file()):
            try:
                at_rest.read(path)
                opened[str(path.relative_to(backup))] = True
            except KeyMissing:
                opened[str(path.relative_to(backup))] = False
    return opened


def test_a_run_whose_keys_are_in_the_service(service: KeyValueService, tmp_path: Path) -> None:
    options = {"encrypt": True, "key_store": service.address}
    with stubbed_training():
        plain = make_stub_run(tmp_path / "plain", tiny_records())
        train_stub(plain)
        run = make_stub_run(tmp_path / "run", tiny_records(), **options)
        train_stub(run)
    assert node_bytes(run) == node_bytes(plain) and served_bytes(run) == served_bytes(plain)
    backup = tmp_path / "backup"
    shutil.copytree(run.path, backup, symlinks=True)
    assert all(backup_opens(backup, run).values())
    keys = len(service.values())
    done = S3TRun.open(run.path).delete(["person 3"])
    assert len(service.values()) == keys - done.nodes_removed
    run = S3TRun.open(run.path)
    assert all(check.passed for check in run.verify())
    place = run.directory.slices.place("person 3")
    opened = backup_opens(backup, run)
    lost = {name for name, is_open in opened.items() if not is_open}
    assert {name for name in opened if f"slice-{place.slice}." in name} <= lost
    kept = {f"nodes/{key}" for key in run.directory.nodes.keys()}
    assert {name for name in opened if name.startswith("nodes/")} - lost == {
        name for name in opened if name.rpartition("/")[0] in kept
    }
    everything = b"".join(path.read_bytes() for path in run.path.rglob("*") if path.is_file())
    assert TOKEN.encode() not in everything
    for value in service.values():
        assert value.encode() not in everything


@pytest.mark.parametrize("broken", ["sealed", "refuses create", "refuses delete", "no token"])
def test_a_deletion_without_the_service_changes_nothing(
    service: KeyValueService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    with stubbed_training():
        run = make_stub_run(
            tmp_path / "run", tiny_records(), encrypt=True, key_store=service.address
        )
        train_stub(run)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    if broken == "sealed":
        service.broken = broken
    elif broken == "no token":
        monkeypatch.delenv("VAULT_TOKEN")
    else:
        service.refuses = {broken.split()[1]}
    with pytest.raises(KeysUnavailable):
        S3TRun.open(run.path).delete(["person 3"])
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    service.broken, service.refuses = None, set()
    monkeypatch.setenv("VAULT_TOKEN", TOKEN)
    S3TRun.open(run.path).delete(["person 3"])
    assert all(check.passed for check in S3TRun.open(run.path).verify())


def test_a_service_that_fails_at_any_request_is_gone_on_with(
    service: KeyValueService, tmp_path: Path
) -> None:
    """The n-th request of a deletion and all after it fail; then the service is back."""
    with stubbed_training():
        run = make_stub_run(
            tmp_path / "reference",
            tiny_records(),
            num_slices=2,
            encrypt=True,
            key_store=service.address,
        )
        train_stub(run)
    held = {name: list(versions) for name, versions in service.secrets.items()}
    acknowledged, point = 0, 0
    while True:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(run.path, tmp_path / "run", symlinks=True)
        service.secrets = {name: list(versions) for name, versions in held.items()}
        service.answers_left = point
        doomed = S3TRun.open(tmp_path / "run")
        try:
            doomed.delete(["person 3"])
        except KeysUnavailable:
            pass
        else:
            break
        service.answers_left = None
        again = S3TRun.open(tmp_path / "run")
        if pending := again.directory.ledger.requests(pending=True):
            acknowledged += 1
            again.settle()
        assert bool(again.delete(["person 3"]).request) is not bool(pending)
        assert all(check.passed for check in again.verify()), [c.problems for c in again.verify()]
        assert len(again.directory.ledger.requests()) == 1
        assert again.delete(["person 3"]).already_deleted == 1
        point += 1
    assert point > 5 and acknowledged > 2
