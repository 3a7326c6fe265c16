"""Names from outside: refused before anything is sent."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_unlearn.errors import UserError
from llm_unlearn.hub import names, publishing
from llm_unlearn.hub.pull import pull
from tests.hub.published import BASE, World, make_trained, published

HOSTILE = [
    "", " ", "/", "a/", "/a", "a/b/c", "../a", "a/..", "a/../../etc/passwd", "..", ".", "./a", "~/a", "a\\b", "a b/c",
    "a/b\n", "a/b\x00", "a/b?x=1", "a/b#c", "a/b%2f..", "https://huggingface.co/a/b", "a/b@main", "a:b/c", "a/.b",
    "a/-b", "a/b-", "a/b--c", "a/b..c", "a/b.git",
    "\u0430dmin/model", "a/\u217f", "a/b\u200b", "a/\uff42", "tester/\u2024\u2024",
    "a/" + "b" * 97, "a" * 97 + "/b", "a" * 1_000_000, "a/" * 100_000, "datasets/a/b",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    place = tmp_path_factory.mktemp("names")
    with published(make_trained(place / "trained", num_shards=1), place / "run") as made:
        yield made


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name[:30]))
def test_hostile_repositories(world: World, name: str) -> None:
    for attempt in (
        lambda: world.push(name),
        lambda: world.push("tester/x", fresh=name or "/"),
        lambda: world.push("tester/x", base_model=name),
        lambda: pull(name, hub=world.hub),
        lambda: publishing.purge(world.run.path, name, hub=world.hub),
    ):
        with pytest.raises(UserError, match="is no repository on the Hub") as refused:
            attempt()
        said = str(refused.value)
        assert "\n" not in said and len(said) < 400 and said.isascii()
    assert world.loop.log == []


@pytest.mark.parametrize("name", ["a/b", "name", "A-1_b.c/x.y-z_0", "a/" + "b" * 96, "_a/b_"])
def test_names_that_are_fine(name: str) -> None:
    assert names.check_repository(name) == name


@pytest.mark.parametrize(
    "name", ["..", "a..b", "-x", "a b", "a\n", "\u0430", "a//b", "x" * 300, "/a"]
)
def test_hostile_revisions(world: World, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is no revision"):
        pull("tester/x", tmp_path / "here", revision=name, hub=world.hub)
    assert world.loop.log == []


@pytest.mark.parametrize("name", ["main", "v1.0", "refs/pr/3", "experiment/one", "0" * 40])
def test_revisions_that_are_fine(name: str) -> None:
    assert names.check_revision(name) == name


def test_a_base_model_is_never_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for local in (str(tmp_path), "models/llama", "./models/llama", "../x", "C:\\models", "a/b/c"):
        with pytest.raises(UserError, match="say what it is called on the Hub with --base_model"):
            names.check_base(local, None)
        assert names.check_base(local, BASE) == BASE
    assert names.check_base("gpt2", None) == "gpt2"
    assert names.check_base("org/model", None) == "org/model"


def test_a_base_model_that_the_hub_does_not_have(world: World) -> None:
    with pytest.raises(UserError, match="base model tiny is not on the Hub"):
        world.push("tester/x", base_model=None)
    assert "tester/x" not in world.loop.repositories
    world.hub.create("tester/base", private=False)
    world.loop.repositories["tiny"] = world.loop.repositories.pop("tester/base")
    assert world.push("tester/x", base_model=None)[0].uploaded
    assert b'"base_model_name_or_path": "tiny"' in world.read("adapter_config.json", "tester/x")
