"""Pull: what was signed arrives, and nothing else does."""

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_unlearn.data.records import canonical
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact.certificates import verify_certificate
from llm_unlearn.hub.content import PREDICATE_TYPE
from llm_unlearn.hub.pull import pull
from llm_unlearn.signing import Signer, statement
from tests.hub.published import BASE, NAME, World, published
from tests.loopback_hub import Entry


@pytest.fixture
def world(trained: Path, tmp_path: Path) -> Iterator[World]:
    with published(trained, tmp_path / "run") as made:
        made.run.delete(["person 1"])
        made.push()
        yield made


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def put(world: World, path: str, content: bytes | None) -> None:
    """Somebody changes a file on the Hub."""
    repository = world.repository()
    files = dict(world.head().files)
    if content is None:
        del files[path]
    else:
        files[path] = repository.blob(content)
    repository.commit("main", "edit", files)


def test_what_is_pulled_is_what_was_pushed(world: World, tmp_path: Path) -> None:
    pulled = pull(NAME, tmp_path / "here", hub=world.hub)
    fetched = contents(tmp_path / "here")
    assert fetched == {
        path: world.read(path) for path in world.head().files if path != ".gitattributes"
    }
    assert pulled.folders == ("shard-0", "shard-1") and pulled.base == BASE
    assert pulled.revision == world.head().oid and not pulled.is_trusted
    assert len(pulled.predicate["requests"]) == 1 and pulled.notes == []
    for shard in pulled.folders:
        served = world.run.directory.served / shard / "adapter_model.safetensors"
        assert fetched[f"{shard}/adapter_model.safetensors"] == served.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["run", "here"] or not any(
        path.name.startswith(".") for path in tmp_path.iterdir()
    )


def test_certificates_hold_for_what_was_pulled(trained: Path, tmp_path: Path) -> None:
    with published(trained, tmp_path / "named") as world:
        world.run.delete(["person 1"])
        world.hub.create("tester/base", private=False)
        world.loop.repositories["tiny"] = world.loop.repositories["tester/base"]
        world.push(base_model=None)  # the run's own name is the Hub's
        pull(NAME, tmp_path / "here", hub=world.hub)
        (certificate,) = (tmp_path / "here" / "certificates").glob("*.json")
        key = world.run.path / "signing.pub"
        adapters = [tmp_path / "here" / shard for shard in ("shard-0", "shard-1")]
        assert verify_certificate(certificate, key, adapters).passed
        world.push(base_model=BASE)
        pull(NAME, tmp_path / "here", hub=world.hub)
        (problem, _) = verify_certificate(certificate, key, adapters).problems
        assert "adapter_config.json" in problem  # the statement names that one


def test_a_pull_replaces_an_earlier_one(world: World, tmp_path: Path) -> None:
    pull(NAME, tmp_path / "here", hub=world.hub)
    before = contents(tmp_path / "here")
    world.run.delete(["person 3"])
    world.push()
    pull(NAME, tmp_path / "here", hub=world.hub)
    after = contents(tmp_path / "here")
    assert after != before and len(after) == len(before) + 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_key_can_come_from_elsewhere(world: World, tmp_path: Path) -> None:
    own = world.run.path / "signing.pub"
    pulled = pull(NAME, tmp_path / "here", key=own, hub=world.hub)
    assert pulled.is_trusted
    Signer.of(tmp_path)
    with pytest.raises(RunError, match=r"publication\.json: it was signed by .*, not by the key"):
        pull(NAME, tmp_path / "there", key=tmp_path / "signing.pub", hub=world.hub)
    assert not (tmp_path / "there").exists()


def test_a_repository_under_another_name_is_told(world: World, tmp_path: Path) -> None:
    world.loop.repositories["tester/mirror"] = world.repository()
    pulled = pull("tester/mirror", tmp_path / "here", hub=world.hub)
    assert pulled.notes == [f"it was published as {NAME}"]


def test_a_revision(world: World, tmp_path: Path) -> None:
    first = world.head().oid
    put(world, "README.md", b"edited")
    with pytest.raises(RunError, match=r"README\.md is not the file that was signed"):
        pull(NAME, tmp_path / "here", hub=world.hub)
    assert pull(NAME, tmp_path / "here", revision=first, hub=world.hub).revision == first
    with pytest.raises(UserError, match="has no such revision"):
        pull(NAME, tmp_path / "there", revision="0" * 40, hub=world.hub)


@pytest.mark.parametrize("suffixes", [(".safetensors",), ()], ids=["lfs", "git"])
def test_one_changed_byte_of_any_file(
    trained: Path, tmp_path: Path, suffixes: tuple[str, ...]
) -> None:
    with published(trained, tmp_path / "run", lfs_suffixes=suffixes) as world:
        world.push()
        for path in sorted(set(world.head().files) - {".gitattributes"}):
            content = bytearray(world.read(path))
            content[len(content) // 2] ^= 1
            before = world.head()
            put(world, path, bytes(content))
            with pytest.raises(RunError) as refused:
                pull(NAME, tmp_path / "here", hub=world.hub)
            assert "nothing was kept" in str(refused.value) or "signing.pub" in str(refused.value)
            assert {path.name for path in tmp_path.iterdir()} == {"run"}, path
            world.repository().branches["main"] = before.oid
        pull(NAME, tmp_path / "here", hub=world.hub)


def test_an_object_that_is_not_what_the_hub_lists(world: World, tmp_path: Path) -> None:
    """The Hub lists the right SHA-256 and sends other bytes."""
    (entry,) = [e for p, e in world.head().files.items() if p.startswith("shard-0/adapter_model")]
    content = world.repository().objects[entry.oid]
    world.repository().objects[entry.oid] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(RunError, match="is not the file that was signed; nothing was kept"):
        pull(NAME, tmp_path / "here", hub=world.hub)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    other = Entry("lfs", next(oid for oid in world.repository().objects if oid != entry.oid))
    files = world.head().files | {"shard-0/adapter_model.safetensors": other}
    world.repository().commit("main", "swap", files)
    with pytest.raises(RunError, match=r"shard-0/adapter_model\.safetensors is not the file"):
        pull(NAME, tmp_path / "here", hub=world.hub)


def test_files_that_nobody_signed(world: World, tmp_path: Path) -> None:
    put(world, "adapter_config.json", b"{}")
    with pytest.raises(
        RunError, match=r"holds 'adapter_config\.json', which its statement does not"
    ):
        pull(NAME, tmp_path / "here", hub=world.hub)
    put(world, "adapter_config.json", None)
    put(world, "shard-1/lineage.json", None)
    with pytest.raises(RunError, match=r"lacks 'shard-1/lineage\.json'"):
        pull(NAME, tmp_path / "here", hub=world.hub)


def test_a_repository_that_is_not_ours(world: World, tmp_path: Path) -> None:
    world.hub.create("tester/other", private=False)
    with pytest.raises(UserError, match=r"has no publication\.json: it was not made by"):
        pull("tester/other", tmp_path / "here", hub=world.hub)
    with pytest.raises(UserError, match="is not on the Hub, or is private"):
        pull("tester/nothing", tmp_path / "here", hub=world.hub)
    put(world, "signing.pub", None)
    with pytest.raises(UserError, match=r"has no signing\.pub: give the signer's key with --key"):
        pull(NAME, tmp_path / "here", hub=world.hub)


def signed_by(world: World, subject: dict[str, str], predicate: object, kind: str) -> bytes:
    """What a hostile repository signs with a key of its own (here: the run's)."""
    return Signer.of(world.run.path).sign(statement(kind, subject, predicate))  # pyright: ignore


SOUND = {"base_model": {"name": BASE}, "repository": NAME, "requests": {}, "purged": []}
HOSTILE: dict[str, Callable[[World], bytes]] = {
    "no JSON": lambda _: b"hello",
    "deep": lambda _: b"[" * 100_000,
    "a list": lambda _: b"[]\n",
    "another predicate": lambda w: signed_by(w, {}, SOUND, "https://example.org/v1"),
    "no predicate": lambda w: signed_by(w, {}, {}, PREDICATE_TYPE),
    "strange predicate": lambda w: signed_by(w, {}, {**SOUND, "requests": 3}, PREDICATE_TYPE),
    "strange digest": lambda w: signed_by(w, {"a.json": 3}, SOUND, PREDICATE_TYPE),  # pyright: ignore
    **{
        name: lambda w, name=name: signed_by(w, {name: "0" * 64}, SOUND, PREDICATE_TYPE)
        for name in (
            "../../escaped.json", "/etc/escaped.json", "a/../../escaped.json", ".bashrc.json", "a/.git/x.json",
            "run.py", "model.bin", "x.json\n", "a\\b.json", "shard-0/adapter_model.safetensors/../../x.json",
            "\u0430dapter_config.json", f"{'a' * 200}.json", "C:/x.json", "*.json",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_statements(world: World, tmp_path: Path, case: str) -> None:
    put(world, "publication.json", HOSTILE[case](world))
    with pytest.raises((RunError, UserError)) as refused:
        pull(NAME, tmp_path / "deep" / ".." / "here", hub=world.hub)
    assert "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "deep"}


def test_a_statement_whose_payload_was_changed(world: World, tmp_path: Path) -> None:
    envelope = json.loads(world.read("publication.json"))
    said = json.loads(b64decode(envelope["payload"]))
    said["predicate"]["requests"] = {}
    envelope["payload"] = b64encode(canonical(said)).decode()
    put(world, "publication.json", canonical(envelope) + b"\n")
    with pytest.raises(RunError, match="the signature does not fit"):
        pull(NAME, tmp_path / "here", hub=world.hub)


def test_places_that_are_taken(world: World, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").touch()
    for place, message in (
        ("mine", "holds something else"),
        ("file", "is a file"),
        ("no/where", "is no directory"),
    ):
        before = len(world.loop.log)
        with pytest.raises(UserError, match=message):
            pull(NAME, tmp_path / place, hub=world.hub)
        assert len(world.loop.log) == before
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_an_interrupted_pull_goes_on(world: World, tmp_path: Path) -> None:
    from tests.hub.published import Killed

    number = 0
    while True:
        try:
            with world.killing(number, before=False):
                pull(NAME, tmp_path / "here", hub=world.hub)
            break
        except Killed:
            assert not (tmp_path / "here").exists()
            number += 3
    assert number >= 6 and "publication.json" in contents(tmp_path / "here")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
