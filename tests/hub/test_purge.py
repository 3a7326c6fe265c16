"""What a deletion takes from the Hub, what is asked for afterwards, and what is said if it is left."""

import re
from pathlib import Path

import pytest

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact import copies
from llm_unlearn.hub import publishing
from tests.hub.published import NAME, World, make_trained, published
from tests.loopback_hub import Answer, refusal


def add_references(world: World) -> None:
    """A branch and a tag that hold what is on main now."""
    repository = world.repository()
    repository.branches["experiment/one"] = repository.branches["main"]
    repository.tags["v1"] = repository.branches["main"]


def delete_and_push(world: World) -> tuple[set[str], object]:
    """Delete somebody and push again; returns the weights that must be gone, and what push said."""
    before = world.weights()
    world.run.delete(["person 3"])
    world.check_told(before - world.weights())
    (pushed,) = world.push()
    return before - world.weights(), pushed


@pytest.mark.parametrize("suffixes", [(".safetensors",), ()], ids=["lfs", "git"])
def test_after_a_deletion_nothing_serves_the_old(
    trained: Path, tmp_path: Path, suffixes: tuple[str, ...]
) -> None:
    with published(trained, tmp_path / "run", lfs_suffixes=suffixes) as world:
        (first,) = world.push()
        add_references(world)
        assert world.weights() <= world.served()
        old, pushed = delete_and_push(world)
        repository = world.repository()
        assert old and not world.served() & old and world.weights() <= world.served()
        assert repository.at(str(first.revision)) is None
        assert list(repository.branches) == ["main"] and repository.tags == {}
        purged = pushed.purged
        assert purged.left == [] and purged.references == ["experiment/one", "v1"]
        assert set(purged.revisions.values()) == {"404"} == set(purged.objects.values())
        assert first.revision in purged.revisions and set(purged.objects) == old
        assert copies.outstanding(world.run.directory) == []
        (told,) = world.told()
        assert told == f"{NAME} serves revision {pushed.revision[:8]}: what is served here"
        (entry,) = world.said()["predicate"]["purged"]
        assert entry["revisions"] == purged.revisions and entry["left"] == []
        world.check_told(old)
        assert all(check.passed for check in world.run.verify() if check.name == "ledger")


def test_a_purge_that_the_hub_does_not_carry_out_is_found(trained: Path, tmp_path: Path) -> None:
    with published(trained, tmp_path / "run", keeps_unreachable=True, keeps_objects=True) as world:
        (first,) = world.push()
        old, pushed = delete_and_push(world)
        assert world.served() & old
        assert f"revision {first.revision[:8]} still has shard-" in " ".join(pushed.purged.left)
        assert f"an old weight file still answers ({min(old)[:12]}: 200)" in pushed.purged.left
        with pytest.raises(RunError, match="still serves what was deleted"):
            publishing.check_purged([pushed.purged])
        world.check_told(old)
        assert any("asks again" in line and "--fresh" in line for line in world.told())
        (entry,) = world.said()["predicate"]["purged"]
        assert entry["left"] and entry["revisions"][first.revision] == "serves old weight files"
        # The Hub mends it: the next push asks again, and then it is gone.
        world.repository().keeps_unreachable = False
        for oid in old:
            del world.repository().objects[oid]
        (again,) = world.push()
        assert again.purged.left == [] and again.purged.revisions[first.revision] == "404"
        world.check_told(old)
        assert copies.outstanding(world.run.directory) == []


def test_commits_that_answer_without_their_files_are_no_leak(trained: Path, tmp_path: Path) -> None:
    with published(trained, tmp_path / "run", keeps_unreachable=True) as world:
        (first,) = world.push()
        old, pushed = delete_and_push(world)
        assert pushed.purged.left == [] and not world.served() & old
        assert pushed.purged.revisions[first.revision] == "its old weight files are refused"
        # What is current now is old after the next deletion, under a commit that still answers.
        before = world.weights()
        world.run.delete(["person 5"])
        (third,) = world.push()
        assert third.purged.left == [] and not world.served() & (before - world.weights())
        assert third.purged.revisions[pushed.revision] == "its old weight files are refused"


@pytest.mark.parametrize("suffixes", [(".safetensors",), ()], ids=["lfs", "git"])
def test_pull_requests_are_out_of_reach_and_said_to_be(
    trained: Path, tmp_path: Path, suffixes: tuple[str, ...]
) -> None:
    with published(trained, tmp_path / "run", lfs_suffixes=suffixes) as world:
        world.push()
        world.repository().pulls["refs/pr/1"] = world.head().oid
        old, pushed = delete_and_push(world)
        assert any("pull requests" in line for line in pushed.purged.out_of_reach)
        world.check_told(old)
        if suffixes:  # the commit answers, its weights do not
            assert pushed.purged.left == [] and not world.served() & old
            return
        assert any(line.endswith("kept by refs/pr/1") for line in pushed.purged.left)
        assert world.served() & old
        assert any("kept by refs/pr/1" in line for line in world.told())
        del world.repository().pulls["refs/pr/1"]  # on its web page
        (again,) = world.push()
        assert again.purged.left == [] and copies.outstanding(world.run.directory) == []


def test_a_pull_request_on_what_is_current_becomes_old(trained: Path, tmp_path: Path) -> None:
    with published(trained, tmp_path / "run", lfs_suffixes=()) as world:
        world.push()
        delete_and_push(world)
        world.repository().pulls["refs/pr/2"] = world.head().oid
        (told,) = publishing.purge(world.run.path, NAME, hub=world.hub)
        assert told.left == []
        before = world.weights()
        world.run.delete(["person 5"])
        (pushed,) = world.push()
        assert any(line.endswith("kept by refs/pr/2") for line in pushed.purged.left)
        world.check_told(before - world.weights())


def test_fresh_publishes_elsewhere_and_deletes(world: World) -> None:
    world.push()
    world.repository().pulls["refs/pr/1"] = world.head().oid
    old = world.weights()
    world.run.delete(["person 3"])
    old -= world.weights()
    new, gone = world.push(fresh="tester/second")
    assert list(world.loop.repositories) == ["tester/second"] and not world.served() & old
    assert (new.repository, gone.repository) == ("tester/second", NAME)
    assert gone.purged.how == "deleted" and gone.purged.left == [] and gone.revision is None
    assert new.revision == world.head("tester/second").oid
    (entry,) = world.said("tester/second")["predicate"]["purged"]
    assert (entry["repository"], entry["how"]) == (NAME, "deleted")
    assert copies.outstanding(world.run.directory) == []
    assert world.told() == [
        f"tester/second serves revision {new.revision[:8]}: what is served here"
    ]
    world.check_told(old)
    assert world.push("tester/second")[0].uploaded is False


def test_fresh_needs_something_to_replace(world: World) -> None:
    with pytest.raises(UserError, match="never published to tester/adapters"):
        world.push(fresh="tester/second")
    world.push()
    with pytest.raises(UserError, match="another repository than"):
        world.push(fresh=NAME)
    assert list(world.loop.repositories) == [NAME]


def test_the_repository_of_a_shard_that_is_no_more_is_deleted(tmp_path: Path) -> None:
    trained = make_trained(
        tmp_path / "trained", exact_method="experts", num_shards=0, num_slices=1, num_sequences=1
    )
    with published(trained, tmp_path / "run") as world:
        world.push(per_shard=True)
        assert len(world.loop.repositories) == 12
        before = world.weights()
        world.run.delete(["person 3"])
        world.check_told(before - world.weights())
        done = world.push(per_shard=True)
        (gone,) = [one for one in done if one.revision is None]
        assert gone.purged.how == "deleted" and gone.repository not in world.loop.repositories
        assert len(world.loop.repositories) == 11
        assert world.served() == world.weights() != before
        assert copies.outstanding(world.run.directory) == []


def test_a_change_between_commit_and_purge_is_not_blessed(world: World) -> None:
    world.push()
    repository, old = world.repository(), world.head()
    weights = world.weights()

    def meddle(number: int, line: str) -> None:
        if "super-squash" in line:
            repository.commit("main", "put it back", dict(old.files))

    world.run.delete(["person 3"])
    world.loop.before = meddle
    with pytest.raises(RunError, match="was changed by somebody else meanwhile"):
        world.push()
    world.loop.before = None
    world.check_told(weights - world.weights())
    world.push()
    assert not world.served() & (weights - world.weights())


def test_purge_asks_again_for_everything(world: World) -> None:
    (first,) = world.push()
    old, _ = delete_and_push(world)
    add_references(world)
    (told,) = publishing.purge(world.run.path, None, hub=world.hub)
    assert told.left == [] and told.revisions[first.revision] == "404" and old <= set(told.objects)
    assert told.references == ["experiment/one", "v1"]
    assert list(world.repository().branches) == ["main"]
    world.run.delete(["person 5"])
    with pytest.raises(RunError, match=f"run `llm-unlearn push {re.escape(str(world.run.path))} "):
        publishing.purge(world.run.path, NAME, hub=world.hub)
    (told,) = publishing.purge(world.run.path, NAME, delete=True, hub=world.hub)
    assert told.how == "deleted" and world.loop.repositories == {}
    assert copies.outstanding(world.run.directory) == [] and world.told() == []
    assert publishing.purge(world.run.path, hub=world.hub) == []


def test_purge_knows_only_what_was_published(world: World) -> None:
    with pytest.raises(UserError, match="never published to tester/other"):
        publishing.purge(world.run.path, "tester/other", hub=world.hub)
    with pytest.raises(UserError, match="Give its REPO_ID with --delete"):
        publishing.purge(world.run.path, delete=True, hub=world.hub)


def test_a_repository_that_does_not_answer_is_not_believed_gone(world: World) -> None:
    """To another account a private repository of somebody else answers 404."""
    world.hub.create("company/adapters", private=False)
    world.push("company/adapters")
    hidden = world.loop.repositories.pop("company/adapters")
    with pytest.raises(RunError, match="whether it is gone or private cannot be told"):
        publishing.purge(world.run.path, "company/adapters", delete=True, hub=world.hub)
    assert not copies.known(world.run.directory)[0].gone
    world.loop.repositories["company/adapters"] = hidden
    publishing.purge(world.run.path, "company/adapters", delete=True, hub=world.hub)
    assert copies.known(world.run.directory)[0].gone


UNCLEAR = {
    "no access": refusal(403, "", "Forbidden"),
    "no token": refusal(401, "", "Invalid"),
    "no such repository": refusal(404, "RepoNotFound", "Repository not found"),
    "down": refusal(500, "", "oops"),
    "not found, without a reason": Answer(404, {}),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_an_answer_that_proves_nothing_is_no_proof(world: World, case: str) -> None:
    world.push()
    old = world.weights()
    world.run.delete(["person 3"])
    old -= world.weights()
    world.loop.before = lambda number, line: UNCLEAR[case] if "/revision/" in line else None
    with pytest.raises(UserError):
        world.push()
    assert copies.outstanding(world.run.directory)
    assert any("still serves" in line for line in world.told())
    world.loop.before = None
    assert world.push()[0].purged.left == []
    world.check_told(old)


def test_an_object_whose_state_the_hub_does_not_tell(world: World) -> None:
    world.push()
    world.run.delete(["person 3"])

    def mute(number: int, line: str) -> Answer | None:
        is_asked = line.endswith("objects/batch") and "squash" in " ".join(world.loop.log)
        return Answer(body={"objects": []}) if is_asked else None

    world.loop.before = mute
    with pytest.raises(RunError, match="did not say whether it still serves 1 old files"):
        world.push()
    assert copies.outstanding(world.run.directory)
    world.loop.before = None
    world.push()
    assert not copies.outstanding(world.run.directory)
