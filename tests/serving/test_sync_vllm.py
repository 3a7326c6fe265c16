"""`sync-vllm`: what is deleted stops answering first, and every step can be killed and repeated."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact.adapters import NAME, adapter_name
from llm_unlearn.exact.copies import known, mark_gone, outstanding
from llm_unlearn.exact.ledger import Ledger
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.served import read_lineage
from llm_unlearn.serving.outside import vllm as module
from llm_unlearn.serving.outside.http_client import Server
from llm_unlearn.serving.outside.vllm import Follower, Synced
from llm_unlearn.serving.outside.vllm_server import MEMORY
from llm_unlearn.serving.probe.clean import Clean
from tests.exact.killing import CHANGES, in_child, kill_at
from tests.saying import Say, in_json, one_line
from tests.serving.loopback import running
from tests.serving.loopback_vllm import LoopbackVllm, error
from tests.tiny import (
    core_records,
    make_stub_run,
    make_trained_stub,
    stubbed_training,
    tiny_records,
    train_stub,
)

pytestmark = pytest.mark.usefixtures("without_fsync")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained_stub(
        tmp_path_factory.mktemp("vllm") / "run", num_shards=2, num_slices=2, num_sequences=1
    )


@pytest.fixture
def vllm() -> LoopbackVllm:
    return LoopbackVllm()


@pytest.fixture
def url(vllm: LoopbackVllm) -> Iterator[str]:
    with running(vllm) as address:
        yield address


def follow(run: S3TRun, url: str, seconds: float = 20.0) -> Follower:
    return Follower.of(run.path, url, seconds=seconds)


def served_names(run: S3TRun) -> set[str]:
    """Names of what is served, from the lineages."""
    lineages = {path.name: read_lineage(path) for path in run.directory.served.iterdir()}
    return {
        adapter_name(n, entry["digest"])
        for n, entry in lineages.items()
        if entry and entry["nodes"]
    }


def shard_of(run: S3TRun, subject: str = "person 3") -> int:
    return run.directory.slices.place(subject).shard


def rebuild(run: S3TRun) -> None:
    with stubbed_training():
        train_stub(run)


def assert_in_step(run: S3TRun, vllm: LoopbackVllm, done: Synced) -> None:
    """The server serves what the run serves, from files of ours, and nothing else of ours is left."""
    wanted = served_names(run)
    assert set(vllm.adapters) == {*done.loaded, *done.kept} == wanted
    home = run.path.with_name(f"{run.path.name}-vllm")
    assert {path.name for path in home.iterdir()} == wanted
    for name, path in vllm.adapters.items():
        lineage = read_lineage(Path(path))
        assert lineage is not None and adapter_name(name.split("@")[0], lineage["digest"]) == name
    live = [copy for copy in known(run.directory) if copy.gone is None]
    assert {Path(c.place).name for c in live if c.kind == "vllm"} == wanted
    assert wanted <= {c.place.split(" ")[1] for c in live if c.kind == MEMORY}
    assert not any(copy.is_half_written for copy in known(run.directory))


def test_from_training_to_a_deletion(run: S3TRun, vllm: LoopbackVllm, url: str) -> None:
    first = follow(run, url).sync()
    assert_in_step(run, vllm, first)
    assert len(first.loaded) == 2 and not first.unloaded and not first.in_memory
    again = follow(run, url).sync()
    assert (again.loaded, again.unloaded) == ((), ()) and set(again.kept) == set(first.loaded)
    run.delete(["person 3"])
    (hit,) = [name for name in first.loaded if name.startswith(f"shard-{shard_of(run)}@")]
    assert {c.kind for c in outstanding(run.directory)} == {"vllm", MEMORY}
    done = follow(run, url).sync()
    assert_in_step(run, vllm, done)
    assert done.unloaded == (hit,) and hit not in vllm.adapters
    assert done.in_memory == (hit,), "unloading left the weights there"
    assert hit in vllm.memory and [c.kind for c in outstanding(run.directory)] == [MEMORY]
    rebuild(run)
    last = follow(run, url).sync()
    assert_in_step(run, vllm, last)
    assert last.in_memory == (hit,)


def test_many_adapters_take_no_more_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the server and of the register does not grow with what is loaded, or kept."""
    looks: list[int] = []
    monkeypatch.setattr(module, "known", lambda run: looks.append(1) or known(run))

    def count(shards: int) -> tuple[int, int]:
        held, server = (
            make_stub_run(tmp_path / f"{shards}", tiny_records(), num_shards=shards),
            LoopbackVllm(),
        )
        with stubbed_training():
            train_stub(held)
        with running(server) as url:
            first = follow(held, url).sync()
            lists = sum(question.path == "/v1/models" for question in server.asked)
            looks.clear()
            assert set(first.loaded) == set(follow(held, url).sync().kept) == served_names(held)
        assert len(first.loaded) > shards // 2
        return lists, len(looks)

    assert count(1) == count(6)


def test_a_restart_takes_what_was_in_memory(run: S3TRun, vllm: LoopbackVllm, url: str) -> None:
    follow(run, url).sync()
    run.delete(["person 3"])
    assert follow(run, url).sync().in_memory
    vllm.restart()
    done = follow(run, url).sync()
    assert_in_step(run, vllm, done)
    assert done.in_memory == () and not outstanding(run.directory)


def test_no_restart_is_made_up(run: S3TRun, vllm: LoopbackVllm, url: str) -> None:
    """A server that does not say when it was started has not been, until somebody says so."""
    follow(run, url).sync()
    run.delete(["person 3"])
    vllm.restart()
    vllm.has_metrics = False
    done = follow(run, url).sync()
    assert len(done.in_memory) == 1
    (held,) = outstanding(run.directory)
    mark_gone(run.directory, held.id, "declared by the operator")
    assert follow(run, url).sync().in_memory == ()


def test_a_name_loaded_again_after_a_restart_is_in_memory_again(
    run: S3TRun, vllm: LoopbackVllm, url: str
) -> None:
    follow(run, url).sync()
    vllm.restart()
    follow(run, url).sync()
    vllm.started = time.time() - 100  # as it would be seen later on
    run.delete(["person 3"])
    assert len(follow(run, url).sync().in_memory) == 1


def test_what_is_deleted_goes_before_anything_is_written_or_loaded(
    run: S3TRun, vllm: LoopbackVllm, url: str
) -> None:
    follow(run, url).sync()
    run.delete(["person 3"])
    vllm.asked.clear()
    follow(run, url).sync()
    changes = [q.path for q in vllm.asked if q.path.endswith("lora_adapter")]
    assert changes == ["/v1/unload_lora_adapter", "/v1/load_lora_adapter"]


def test_what_is_only_replaced_answers_until_the_new_one_does(
    run: S3TRun, vllm: LoopbackVllm, url: str
) -> None:
    run.delete(["person 3"])
    follow(run, url).sync()
    rebuild(run)
    vllm.asked.clear()
    done = follow(run, url).sync()
    changes = [q.path for q in vllm.asked if q.path.endswith("lora_adapter")]
    assert changes == ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
    assert len(done.loaded) == len(done.unloaded) == 1 and not done.in_memory


def test_an_acknowledged_request_counts(
    run: S3TRun, vllm: LoopbackVllm, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after its acknowledgement, a deletion is in the ledger and nowhere else."""
    follow(run, url).sync()
    places = ((Ledger, "acknowledge"),)
    assert (
        in_child(lambda: (kill_at(2, places), S3TRun.open(run.path).delete(["person 3"]))) is None
    )
    clean = Clean.of(run.directory)
    assert clean.is_pending and clean.deleted
    done = follow(run, url).sync()
    assert_in_step(run, vllm, done)
    assert len(done.unloaded) == 1 and not run.directory.ledger.requests(pending=True)


MOST_CHANGES = 130  # more than one sync after a deletion makes


@pytest.mark.parametrize("point", range(1, MOST_CHANGES, 26))
def test_killed_here_and_there_it_is_repeated(
    run: S3TRun, vllm: LoopbackVllm, url: str, point: int
) -> None:
    kill_and_repeat(run, vllm, url, point)


@pytest.mark.slow
@pytest.mark.parametrize("point", range(1, MOST_CHANGES))
def test_killed_anywhere_it_is_repeated(
    run: S3TRun, vllm: LoopbackVllm, url: str, point: int
) -> None:
    kill_and_repeat(run, vllm, url, point)


def test_all_changes_are_counted(run: S3TRun, vllm: LoopbackVllm, url: str) -> None:
    follow(run, url).sync()
    run.delete(["person 3"])
    done = in_child(lambda: (kill_at(MOST_CHANGES, CHANGES), follow(run, url).sync()))
    assert done == 0, "raise MOST_CHANGES"


def kill_and_repeat(run: S3TRun, vllm: LoopbackVllm, url: str, point: int) -> None:
    """Killed at a change of the disk, before or after it, a sync is repeated by the next."""
    follow(run, url).sync()
    run.delete(["person 3"])
    (hit,) = set(vllm.adapters) - served_names(run)
    killed = in_child(lambda: (kill_at(point, CHANGES), follow(run, url).sync()))
    assert killed in (None, 0)
    if vllm.adapters.keys() >= served_names(run):
        assert hit not in vllm.adapters
    done = follow(run, url).sync()
    assert_in_step(run, vllm, done)
    assert done.in_memory == (hit,)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("number", range(1, 10))
@pytest.mark.parametrize("is_before", [pytest.param(True, marks=pytest.mark.slow), False])
def test_cut_off_at_any_question_it_is_repeated(
    run: S3TRun,
    vllm: LoopbackVllm,
    url: str,
    number: int,
    is_before: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    follow(run, url).sync()
    run.delete(["person 3"])
    original, count = Server._ask, 0

    def ask(server: Server, method: str, path: str, body: bytes | None) -> object:
        nonlocal count
        count += 1
        if count == number and is_before:
            raise Killed
        reply = original(server, method, path, body)
        if count == number:
            raise Killed
        return reply

    with monkeypatch.context() as patched:
        patched.setattr(Server, "_ask", ask)
        with pytest.raises(Killed):
            follow(run, url).sync()
    assert_in_step(run, vllm, follow(run, url).sync())


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda v: v.fails.update({"/v1/models": error(500, "X", "boom")}), r"/v1/models cannot be asked: 500 boom"),
        (lambda v: v.fails.update({"/v1/unload_lora_adapter": error(500, "X", "boom")}), "does not unload .*boom"),
        (lambda v: setattr(v, "unload_lies", "listed"), "still answers: restart it"),
        (lambda v: setattr(v, "unload_lies", "hidden"), "still answers: restart it"),
        (lambda v: setattr(v, "allows_updating", False), "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        (lambda v: setattr(v, "token", "x"), "give a token that may"),
        (lambda v: setattr(v, "seconds", 1.0), "no answer within 0.4 s"),
        (lambda v: v.fails.update({"/v1/completions": error(429, "X", "later")}), "does not tell whether"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_unload_is_named_and_tried_again(
    run: S3TRun,
    vllm: LoopbackVllm,
    url: str,
    break_it: Callable[[LoopbackVllm], None],
    message: str,
) -> None:
    follow(run, url).sync()
    run.delete(["person 3"])
    break_it(vllm)
    with pytest.raises(UserError, match=message):
        follow(run, url, 0.4).sync()
    assert {c.kind for c in outstanding(run.directory)} == {"vllm", MEMORY}, "nothing is confirmed"
    vllm.unload_lies, vllm.allows_updating, vllm.token, vllm.seconds = "", True, None, 0.0
    vllm.fails.clear()
    vllm.hidden.clear()
    assert_in_step(run, vllm, follow(run, url).sync())


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda v: setattr(v, "max_rank", 2), "does not load .*: 400 LoRA rank 3 is greater than max_lora_rank 2"),
        (lambda v: setattr(v, "load_lies", True), "says that it loaded .*, and does not list it"),
        (lambda v: v.fails.update({"/v1/load_lora_adapter": error(500, "X", "out of memory")}), "500 out of memory"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_load_still_loses_what_is_deleted(
    run: S3TRun,
    vllm: LoopbackVllm,
    url: str,
    break_it: Callable[[LoopbackVllm], None],
    message: str,
) -> None:
    follow(run, url).sync()
    run.delete(["person 3"])
    (hit,) = set(vllm.adapters) - served_names(run)
    break_it(vllm)
    with pytest.raises(RunError, match=message):
        follow(run, url).sync()
    assert hit not in vllm.adapters
    vllm.max_rank, vllm.load_lies = 64, False
    vllm.fails.clear()
    assert_in_step(run, vllm, follow(run, url).sync())


def test_a_refused_load_leaves_no_deleted_file_and_no_claim(
    run: S3TRun, vllm: LoopbackVllm, url: str
) -> None:
    follow(run, url).sync()
    run.delete(["person 3"])
    vllm.max_rank = 2
    with pytest.raises(RunError, match="max_lora_rank 2"):
        follow(run, url).sync()
    assert [copy.kind for copy in outstanding(run.directory)] == [MEMORY]
    new = served_names(run) - set(vllm.adapters)
    claimed = {
        c.place.split(" ")[-1] for c in known(run.directory) if c.kind == MEMORY and not c.gone
    }
    assert len(new) == 1 and not new & claimed


def test_a_server_that_is_down(run: S3TRun) -> None:
    with pytest.raises(
        RunError, match=r"http://127.0.0.1:9/v1/\S+ cannot be asked: Connection refused"
    ):
        follow(run, "http://127.0.0.1:9").sync()
    assert not known(run.directory)


def test_adapters_of_others_are_left_alone(run: S3TRun, vllm: LoopbackVllm, url: str) -> None:
    vllm.adapters["sql"] = "/models/sql"
    vllm.adapters["shard-0@aaaaaaaaaaaa"] = "/of/another/run"
    done = follow(run, url).sync()
    assert done.others == ("sql", "shard-0@aaaaaaaaaaaa") and set(done.others) <= set(vllm.adapters)


def test_exports_loaded_by_hand_are_unloaded_too(
    run: S3TRun, vllm: LoopbackVllm, url: str, tmp_path: Path
) -> None:
    """Under any name, from any registered export: a deletion reaches it."""
    from llm_unlearn.export.making import export

    made = export(run.directory, "vllm", tmp_path / "by hand")
    for number, name in enumerate(made.adapters):
        vllm.adapters[f"mine-{number}"] = str(made.place / name)
    run.delete(["person 3"])
    done = follow(run, url).sync()
    assert {"mine-0", "mine-1"} & set(done.unloaded) and set(vllm.adapters) == served_names(run)


def test_a_name_from_elsewhere_is_loaded_again_from_ours(
    run: S3TRun, vllm: LoopbackVllm, url: str
) -> None:
    name = sorted(served_names(run))[0]
    vllm.adapters[name] = "/somewhere/else"
    done = follow(run, url).sync()
    assert name in done.unloaded and name in done.loaded
    assert Path(vllm.adapters[name]).is_dir()


def test_a_server_that_sees_the_files_elsewhere(
    run: S3TRun, vllm: LoopbackVllm, url: str, tmp_path: Path
) -> None:
    vllm.prefix = ("/adapters", str(tmp_path / "out"))
    follower = Follower.of(run.path, url, tmp_path / "out", "/adapters/")
    follower.sync()
    assert all(path.startswith("/adapters/shard-") for path in vllm.adapters.values())
    run.delete(["person 3"])
    done = follower.sync()
    assert len(done.unloaded) == len(done.loaded) == 1 and set(vllm.adapters) == served_names(run)


def test_the_core_and_what_is_left_of_nothing(tmp_path: Path, vllm: LoopbackVllm, url: str) -> None:
    options = {"num_slices": 1, "num_sequences": 1}
    with stubbed_training():
        train_stub(
            one := make_stub_run(tmp_path / "one", tiny_records(1), core_records(), **options)
        )
    done = follow(one, url).sync()
    assert sorted(name.split("@")[0] for name in done.loaded) == ["core", "shard-0"]
    one.delete(["person 0"])
    assert [name.split("@")[0] for name in follow(one, url).sync().kept] == ["core"]
    with stubbed_training():
        train_stub(bare := make_stub_run(tmp_path / "bare", tiny_records(1), **options))
    vllm.restart()
    assert len(follow(bare, url).sync().loaded) == 1
    bare.delete(["person 0"])
    done = follow(bare, url).sync()
    assert len(done.unloaded) == 1 and not vllm.adapters and not done.kept


def test_nothing_is_served_yet(tmp_path: Path, url: str) -> None:
    make_stub_run(tmp_path / "run", tiny_records())
    with pytest.raises(UserError, match="serves nothing yet"):
        follow(S3TRun.open(tmp_path / "run"), url).sync()


def test_watching(run: S3TRun, vllm: LoopbackVllm, url: str) -> None:
    """A deletion reaches the server by itself, past an outage that is told once."""
    told: list[Synced] = []
    warned: list[str] = []
    over = threading.Event()
    arguments = (0.05, told.append, warned.append, over.is_set)
    thread = threading.Thread(target=follow(run, url).watch, args=arguments)
    thread.start()
    try:
        wait_for(lambda: len(told) == 1)
        vllm.fails["/v1/models"] = error(500, "X", "boom")
        run.delete(["person 3"])
        wait_for(lambda: len(warned) == 1)
        time.sleep(0.5)
        assert len(warned) == 1
        vllm.fails.clear()
        wait_for(lambda: len(told) == 2)
        assert len(told[1].unloaded) == 1 and set(vllm.adapters) == served_names(run)
    finally:
        over.set()
        thread.join()


def wait_for(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_the_command(say: Say, run: S3TRun, vllm: LoopbackVllm, url: str) -> None:
    code, text, _ = say("sync-vllm", run.path, url)
    assert code == 0 and ": 2 adapters loaded, 0 unloaded, 0 kept" in text
    run.delete(["person 3"])
    code, _, told = say("sync-vllm", run.path, url)
    assert code == 0 and "1 deleted adapters can still be in the server's memory" in told
    done = in_json(say("sync-vllm", run.path, url, "--json"))
    assert len(done["kept"]) == 2 and all(NAME.fullmatch(name) for name in done["in_memory"])
    vllm.unload_lies = "hidden"
    run.delete(["person 4"])
    assert "still answers: restart it" in one_line(say("sync-vllm", run.path, url), 1)
    assert "is within the run" in one_line(
        say("sync-vllm", run.path, url, "--export", run.path / "x"), 2
    )
    assert "is not the address of a server" in one_line(
        say("sync-vllm", run.path, "localhost:1"), 2
    )


def test_interrupting_a_watch_is_no_traceback(run: S3TRun, url: str) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "llm_unlearn", "sync-vllm", str(run.path), url, "--watch"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # not by a job of the background
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    )
    assert started.stdout is not None
    try:
        assert "in step at epoch" in started.stdout.readline()
        started.send_signal(signal.SIGINT)
        _, told = started.communicate(timeout=20)
    finally:
        started.kill()
    assert started.returncode == 130 and "Traceback" not in told
