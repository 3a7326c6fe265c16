"""Every way in which the Hub or the network refuses is one line that says what to do."""

import socket
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact import copies
from llm_unlearn.hub import client
from llm_unlearn.hub.client import Hub
from llm_unlearn.hub.pull import pull
from tests.hub.published import BASE, NAME, World, make_trained
from tests.loopback_hub import TOKEN, Answer, Dropped, refusal


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained(tmp_path_factory.mktemp("client") / "run", num_shards=1)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own repetitions wait no time."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


def one_line(error: BaseException) -> str:
    said = str(error)
    assert "\n" not in said and TOKEN not in said and len(said) < 400
    return said


REFUSALS = {
    "no right to write": (refusal(403, "", "Forbidden"), UserError, "the token may not do this"),
    "token not valid": (refusal(401, "", "Invalid"), UserError, "does not accept the token"),
    "conflict": (refusal(412, "", "A commit has happened"), RunError, "changed by somebody else"),
    "too many": (refusal(429, "", "slow down"), RunError, r"busy or down \(429\)"),
    "down": (refusal(503, "", "down"), RunError, r"busy or down \(503\)"),
    "no sense": (Answer(200, b"<html>"), RunError, "answer makes no sense"),
    "gone": (refusal(404, "RepoNotFound", "no"), UserError, "is not on the Hub, or is private"),
    "strange": (refusal(418, "", "I am\na teapot"), RunError, r"refused \(418: I am a teapot"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("where", ["whoami", "/commit/"])
def test_refusals(world: World, case: str, where: str) -> None:
    answer, kind, message = REFUSALS[case]
    world.loop.before = lambda number, line: answer if where in line else None
    with pytest.raises(kind, match=message) as refused:
        world.push()
    one_line(refused.value)
    if where == "/commit/":  # it is known that something may have been sent
        assert len(copies.known(world.run.directory)) == 1
        assert world.told()[0].startswith(f"{NAME}: an upload was not finished: run `llm-unlearn ")
    world.loop.before = None
    assert world.push()[0].uploaded
    assert world.told() == [f"{NAME} serves revision {world.head().oid[:8]}: what is served here"]


@pytest.mark.parametrize("where", ["whoami", "/preupload/", "/commit/", "/store/"])
def test_hanging_up(world: World, where: str) -> None:
    def drop(number: int, line: str) -> None:
        if where in line:
            raise Dropped

    world.loop.before = drop
    with pytest.raises(RunError, match=r"cannot reach http://127\.0\.0\.1:\d+ \(") as refused:
        world.push()
    one_line(refused.value)
    world.loop.before = None
    world.push()


def test_nobody_there(world: World) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    hub = Hub(f"http://127.0.0.1:{port}", TOKEN)
    with pytest.raises(RunError, match="check the network") as refused:
        World(world.run, world.loop, hub).push()
    one_line(refused.value)


def test_no_answer_in_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(number: int, line: str) -> None:
        threading.Event().wait(0.5)

    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.2)
    world.loop.before = wait
    with pytest.raises(RunError, match="did not answer in time: run the same command again"):
        world.push()


def test_offline(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # Taken back here: what `monkeypatch` takes back after `world` would leave the client online.
    with monkeypatch.context() as patch, pytest.raises(UserError, match="HF_HUB_OFFLINE: unset it"):
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        world.push()


def test_nobody_logged_in(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    hub = Hub(world.loop.url)
    with pytest.raises(UserError, match="run `hf auth login` or set HF_TOKEN"):
        World(world.run, world.loop, hub).push()
    assert world.loop.log == []
    world.push()
    # Whoever only reads needs no token, where the repository is public.
    assert pull(NAME, tmp_path / "here", hub=hub).base == BASE


def test_a_private_repository_wants_a_token(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world.push(private=True)
    hub = Hub(world.loop.url, "hf_another")
    with pytest.raises(UserError, match="does not accept the token"):
        pull(NAME, tmp_path / "here", hub=hub)
    pull(NAME, tmp_path / "here", hub=world.hub)


def test_the_token_is_nowhere(world: World) -> None:
    world.push()
    for path in world.run.path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()
    assert all(TOKEN.encode() not in c for c in world.repository().downloads().values())


def test_a_file_that_goes_away_while_it_is_sent(world: World) -> None:
    """A deletion removes what was served."""
    weights = world.run.directory.served.resolve() / "shard-0" / "adapter_model.safetensors"
    world.loop.before = lambda number, line: (
        weights.unlink(missing_ok=True) if "objects/batch" in line else None
    )
    with pytest.raises(RunError, match="went away while it was being sent") as refused:
        world.push()
    one_line(refused.value)
