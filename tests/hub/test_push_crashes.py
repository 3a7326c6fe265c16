"""Push and purge die at every request, before it is sent and before its answer comes, and after every entry in
the ledger; then they go on.

At no moment may the Hub serve what was deleted without `describe` saying so, and no ledger and no statement
may say that something is gone which is still served.
"""

import copy
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from llm_unlearn.exact import copies
from llm_unlearn.hub import publishing
from tests.hub.published import BASE, NAME, Killed, World, again, make_trained, published
from tests.loopback_hub import TOKEN, Hook, Repository


@dataclass
class Scene:
    """Where a command starts: a run, a Hub, and what must be gone afterwards."""

    world: World
    act: Callable[[World], object]
    old: set[str]
    run: Path
    repositories: dict[str, Repository]

    def fresh_world(self) -> World:
        return again(self.world, self.repositories, self.run)


Killing = Callable[[World, int], AbstractContextManager[None]]
KILLING: dict[str, Killing] = {
    "before": lambda world, number: world.killing(number, before=True),
    "after": lambda world, number: world.killing(number, before=False),
    "entry": World.killing_writes,
}


def first_push(world: World) -> Callable[[World], object]:
    """Nothing is on the Hub yet."""
    return World.push


def second_push(world: World) -> Callable[[World], object]:
    """Somebody was deleted; a branch and a tag hold what was there before."""
    world.push()
    repository = world.repository()
    repository.branches["experiment"] = repository.tags["v1"] = repository.branches["main"]
    world.run.delete(["person 3"])
    return World.push


def late_push(world: World) -> Callable[[World], object]:
    """An upload was broken off when its commit was there already, and then somebody was deleted."""
    with world.killing(10, before=False), pytest.raises(Killed):
        world.push()
    assert world.served() and not any(c.gone for c in copies.known(world.run.directory))
    world.run.delete(["person 3"])
    return World.push


def fresh_push(world: World) -> Callable[[World], object]:
    """A hard guarantee is wanted."""
    world.push()
    world.run.delete(["person 3"])
    return lambda w: w.push("tester/second") if _is_moved(w) else w.push(fresh="tester/second")


def _is_moved(world: World) -> bool:
    """`--fresh` may be repeated as long as the old one is there."""
    return NAME not in world.loop.repositories and not copies.outstanding(world.run.directory)


def taking_down(world: World) -> Callable[[World], object]:
    world.push()
    world.run.delete(["person 3"])
    return lambda w: publishing.purge(w.run.path, NAME, delete=True, hub=w.hub)


SCENES = [
    second_push,
    *(
        pytest.param(s, marks=pytest.mark.slow)
        for s in (first_push, late_push, fresh_push, taking_down)
    ),
]


@pytest.fixture(scope="module", params=SCENES, ids=lambda scene: scene.__name__)
def scene(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    place = tmp_path_factory.mktemp("crashes")
    with published(make_trained(place / "trained"), place / "run") as world:
        weights = world.weights()
        act = request.param(world)
        shutil.copytree(world.run.path, place / "before", symlinks=True)
        saved = copy.deepcopy(world.loop.repositories)
        yield Scene(world, act, weights - world.weights(), place / "before", saved)


def kill_and_go_on(scene: Scene, killing: Killing, number: int) -> bool:
    """One death and one repetition; False where the command ended before its n-th step."""
    world = scene.fresh_world()
    world.check_told(scene.old)
    try:
        with killing(world, number):
            scene.act(world)
    except Killed:
        world.check_told(scene.old)
    else:
        return False
    if scene.old & world.served():
        assert copies.outstanding(world.run.directory)
    scene.act(world)
    world.check_told(scene.old)
    assert not world.served() & scene.old
    assert copies.outstanding(world.run.directory) == []
    assert world.run.directory.ledger.check_chain() == []
    if world.loop.repositories:
        assert world.weights() <= world.served()
        assert all(line.endswith("what is served here") for line in world.told()), world.told()
        (name,) = world.loop.repositories
        assert list(world.repository(name).branches) == ["main"]
        assert world.repository(name).tags == {}
    return True


@pytest.mark.parametrize(
    "moment", ["after", pytest.param("before", marks=pytest.mark.slow), "entry"]
)
def test_death_at_every_step(scene: Scene, moment: str) -> None:
    """Before every request, before every answer, and after every entry in the ledger."""
    points = 0
    while kill_and_go_on(scene, KILLING[moment], points):
        points += 1
    assert points >= 2


@pytest.mark.slow
def test_two_deaths(scene: Scene) -> None:
    """The repetition dies too, further on."""
    for number in range(0, 30, 4):
        world = scene.fresh_world()
        for more in (0, 3):
            try:
                with world.killing(number + more, before=False):
                    scene.act(world)
            except Killed:
                world.check_told(scene.old)
        scene.act(world)
        assert not world.served() & scene.old
        assert copies.outstanding(world.run.directory) == []


def lose_the_answer(world: World, wanted: str) -> None:
    """Push, and die when the Hub has done something, before its answer comes."""

    def die(line: str) -> bool:
        return wanted in line

    with world.killing_where(die), pytest.raises(Killed):
        world.push()


def test_a_commit_whose_answer_was_lost(tmp_path: Path) -> None:
    with published(make_trained(tmp_path / "trained"), tmp_path / "run") as world:
        lose_the_answer(world, "/commit/")
        old = world.weights()
        assert old <= world.served()
        (told,) = world.told()
        assert told.startswith(f"{NAME}: an upload was not finished: run `llm-unlearn push ")
        world.run.delete(["person 3"])
        old -= world.weights()
        assert any("may serve what an upload that was broken off left" in t for t in world.told())
        assert len(copies.outstanding(world.run.directory)) == 1
        world.push()
        world.check_told(old)
        assert not world.served() & old and not copies.outstanding(world.run.directory)


def test_what_was_asked_for_before_a_squash_is_not_forgotten(tmp_path: Path) -> None:
    """The commit of an upload that was broken off is known from the history alone, until that is
    squashed; this Hub goes on serving it.
    """
    trained = make_trained(tmp_path / "trained")
    with published(trained, tmp_path / "run", keeps_unreachable=True, lfs_suffixes=()) as world:
        lose_the_answer(world, "/commit/")
        lost, old = world.head().oid, world.weights()
        world.run.delete(["person 3"])
        lose_the_answer(world, "/super-squash/")
        (pushed,) = world.push()
        assert any(f"revision {lost[:8]} still has" in line for line in pushed.purged.left)
        assert world.served() & (old - world.weights())
        world.check_told(old - world.weights())
        assert copies.outstanding(world.run.directory)


def push_in_a_process(world: World, home: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "HF_ENDPOINT": world.loop.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    code = "from llm_unlearn.cli import main; main()"
    command = [sys.executable, "-c", code, "push", str(world.run.path), NAME, "--base_model", BASE]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def killer(process: subprocess.Popen[str], wanted: str) -> Hook:
    """Kill when the Hub has done what was asked, before it answers."""

    def kill(number: int, line: str) -> None:
        if wanted in line:
            process.send_signal(signal.SIGKILL)
            process.wait()

    return kill


def test_kill_9(tmp_path: Path) -> None:
    """A real process, killed while the Hub handles its request."""
    with published(make_trained(tmp_path / "trained"), tmp_path / "run") as world:
        weights = world.weights()
        world.push()
        world.run.delete(["person 3"])
        old = weights - world.weights()
        for wanted in ("/commit/", "/super-squash/", "/lfs-files/batch"):
            process = push_in_a_process(world, tmp_path / "home")
            world.loop.after = killer(process, wanted)
            process.communicate(timeout=60)
            assert process.returncode == -signal.SIGKILL
            world.check_told(old)
        world.loop.after = None
        done = push_in_a_process(world, tmp_path / "home")
        out, error = done.communicate(timeout=60)
        assert done.returncode == 0, error
        assert "all gone" in out and "out of reach:" in out and TOKEN not in out + error
        assert not world.served() & old and copies.outstanding(world.run.directory) == []
