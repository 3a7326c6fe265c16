"""`probe URL`: a server that lies is caught where a lie shows, and nothing unseen counts as clean."""

import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact.adapters import (
    WEIGHTS_NAME,
    adapter_name,
    load_tensors,
    merged_name,
    tensors_digest,
)
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.served import read_lineage
from llm_unlearn.serving.outside import http_client
from llm_unlearn.serving.outside.http_client import Server, read_token
from llm_unlearn.serving.outside.vllm import Follower
from llm_unlearn.serving.probe.looks import Probe
from llm_unlearn.serving.probe.probe import probe, probe_run
from tests.saying import Say, in_json, one_line
from tests.serving.loopback import Question, Said, running
from tests.serving.loopback_vllm import LoopbackVllm
from tests.tiny import (
    core_records,
    make_trained_stub,
    stubbed_training,
    train_stub,
)

OPTIONS: dict[str, Any] = {"num_shards": 2, "num_slices": 2, "num_sequences": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("asking") / "run"
    return make_trained_stub(path, core=core_records(), **OPTIONS)


def report_of(run: S3TRun) -> dict[str, Any]:
    """What an honest server says that serves a run."""
    residents, memory = [], {}
    for path in sorted(run.directory.served.iterdir()):
        lineage = read_lineage(path)
        assert lineage is not None
        name = adapter_name(path.name, lineage["digest"])
        memory[name] = tensors_digest(load_tensors(path / WEIGHTS_NAME))
        residents.append({
            "name": name, "shard": None if path.name == "core" else int(path.name[6:]), "digest": lineage["digest"],
            "nodes": [node["key"] for node in lineage["nodes"]], "state": "whole",
            "epoch": run.directory.ledger.count(), "in_flight": 0,
        })  # fmt: skip
    return {
        "epoch": run.directory.ledger.count(), "residents": residents, "memory": memory,
        "loaded": list(memory), "prefix_caches": [], "running": 1, "waiting": 0, "held": 0,
    }  # fmt: skip


class Ours:
    """One of our servers, which says what a test tells it to."""

    def __init__(self, report: dict[str, Any]):
        self.report = report
        self.said: dict[str, Said] = {}
        self.answering: set[str] = set()
        self.listed: list[str] | None = None
        self.questions: list[Question] = []

    def __call__(self, question: Question) -> Said:
        self.questions.append(question)
        if question.path in self.said:
            return self.said[question.path]
        names = [resident["name"] for resident in self.report["residents"]]
        if question.path == "/v1/residue":
            return Said(200, self.report)
        if question.path == "/v1/models":
            listed = names if self.listed is None else self.listed
            return Said(200, {"data": [{"id": "ensemble"}, *({"id": name} for name in listed)]})
        if question.path == "/v1/completions":
            model = question.body["model"]
            if model in {"ensemble", *names, *self.answering}:
                return Said(200, {"choices": [{"text": f" {question.body['prompt']}!"}]})
        return Said(404, {"error": {"message": "no such model"}})


@pytest.fixture
def ours(run: S3TRun) -> Ours:
    return Ours(report_of(run))


@pytest.fixture
def url(ours: Ours) -> Iterator[str]:
    with running(ours) as address:
        yield address


def found(seen: Probe) -> dict[str, list[str]]:
    return {look.place: look.problems for look in seen.looks if look.problems}


def unseen(seen: Probe) -> dict[str, list[str]]:
    return {look.place: look.unseen for look in seen.looks if look.unseen}


def test_an_honest_server(run: S3TRun, ours: Ours, url: str) -> None:
    seen = probe(url, run.path)
    assert seen.is_clean and found(seen) == unseen(seen) == {}
    assert [a.name for a in seen.adapters] == [r["name"] for r in ours.report["residents"]]
    assert {look.place: look.examined for look in seen.looks}["its memory"] == 3
    run.delete(["person 3"])
    hit = f"shard-{run.directory.slices.place('person 3').shard}@"
    problems = found(probe(url, run.path))
    assert "deleted by request" in problems["adapters of the server"][0]
    assert "entries of the ledger" in problems["its epoch"][0]
    old = next(r["name"] for r in ours.report["residents"] if r["name"].startswith(hit))
    assert problems["names served before"] == [f"{old} still answers"]
    ours.report = report_of(run)
    assert found(probe(url, run.path)) == {}
    ours.answering.add(old)
    assert found(probe(url, run.path)) == {"names served before": [f"{old} still answers"]}


Change = Callable[[dict[str, Any]], Any]
LIES: dict[str, tuple[Change, str, str]] = {
    "wrong tensors": (
        lambda r: r["memory"].update({r["loaded"][0]: "0" * 64}),
        "its memory",
        "has other weights",
    ),
    "one more in memory": (
        lambda r: r["memory"].update({"shard-0@aaaaaaaaaaaa": "0" * 64}),
        "its memory",
        "not among its adapters",
    ),
    "one more loaded": (
        lambda r: r["loaded"].append("shard-0@aaaaaaaaaaaa"),
        "its memory",
        "is loaded, and not among",
    ),
    "in memory, not loaded": (
        lambda r: r["loaded"].pop(),
        "its memory",
        "not among those that it calls loaded",
    ),
    "another digest": (
        lambda r: r["residents"][1].update(digest=r["residents"][1]["digest"][:12] + "0" * 52),
        "adapters of the server",
        "another digest or other nodes",
    ),
    "other nodes": (
        lambda r: r["residents"][1]["nodes"].pop(),
        "adapters of the server",
        "other nodes",
    ),
    "unknown nodes": (
        lambda r: r["residents"].append(
            r["residents"][1]
            | {"name": "shard-0@" + "b" * 12, "digest": "b" * 64, "nodes": ["c" * 64]}
        ),
        "adapters of the server",
        "does not hold (any more)",
    ),
    "no digest in the name": (
        lambda r: r["residents"][1].update(name="shard-0"),
        "adapters of the server",
        "does not have its digest in its name",
    ),
    "a digest of another": (
        lambda r: r["residents"][1].update(name="shard-0@" + "b" * 12),
        "adapters of the server",
        "does not have its digest in its name",
    ),
    "another shard": (
        lambda r: r["residents"][1].update(shard=7),
        "adapters of the server",
        "called otherwise than its shard",
    ),
    "behind": (lambda r: r.update(epoch=2), "its epoch", "it knows 2 entries of the ledger"),
    "ahead": (lambda r: r.update(epoch=999), "its epoch", "it serves another run"),
    "an old cache": (
        lambda r: r["prefix_caches"].append({"adapter": "shard-0@aaaaaaaaaaaa"}),
        "its prefix caches",
        "a cache of shard-0@aaaaaaaaaaaa",
    ),
    "withdrawn, not zero": (
        lambda r: r["residents"][1].update(state="withdrawn"),
        "its memory",
        "its weights are not zeros",
    ),
    "withdrawn, still read": (
        lambda r: r["residents"][1].update(state="withdrawn", in_flight=2),
        "answers in flight",
        "2 running answers read",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(run: S3TRun, ours: Ours, url: str, lie: str) -> None:
    change, place, told = LIES[lie]
    change(ours.report)
    seen = probe(url, run.path)
    assert not seen.is_clean
    assert any(told in line for line in found(seen).get(place, [])), found(seen)


def test_zeros_are_told_from_weights(run: S3TRun, ours: Ours, url: str) -> None:
    for resident in ours.report["residents"]:
        name = resident["name"]
        path = run.directory.served / name.split("@")[0] / WEIGHTS_NAME
        zeros = {n: np.zeros_like(t) for n, t in load_tensors(path).items()}
        ours.report["memory"][name] = tensors_digest(zeros)
        resident["state"] = "withdrawn"
    assert found(probe(url, run.path)) == {}


def test_what_a_server_does_not_say_is_not_seen(run: S3TRun, ours: Ours, url: str) -> None:
    ours.report["memory"].clear()
    ours.report["prefix_caches"].append("cache of I know not whom")
    seen = probe(url, run.path)
    assert seen.is_clean and set(unseen(seen)) == {"its memory", "its prefix caches"}
    assert len(unseen(seen)["its memory"]) == 3


def test_an_adapter_that_is_clean_and_replaced(run: S3TRun, ours: Ours, url: str) -> None:
    """A server that has not yet taken what a rebuild published holds nothing deleted."""
    run.delete(["person 3"])
    ours.report = report_of(run)
    with stubbed_training():
        train_stub(run)
    ours.report["epoch"] = run.directory.ledger.count()
    seen = probe(url, run.path)
    assert "is not what the run serves now" in unseen(seen)["its memory"][0]
    assert found(seen) == {}, "nothing that was deleted"
    (missing,) = unseen(seen)["adapters of the server"]
    assert "the server does not name it" in missing


def test_an_adapter_that_the_server_does_not_name(run: S3TRun, ours: Ours, url: str) -> None:
    """The run serves it, so nothing deleted is in it: what the server has of it is not known."""
    gone = ours.report["residents"].pop()["name"]
    del ours.report["memory"][gone]
    ours.report["loaded"].remove(gone)
    seen = probe(url, run.path)
    assert seen.is_clean and found(seen) == {}
    (told,) = unseen(seen)["adapters of the server"]
    assert gone in told and "does not name it" in told


def test_all_adapters_in_one(run: S3TRun, ours: Ours, url: str) -> None:
    """A server of a run that merges holds none of them alone; no other name may stand for that."""
    names = [resident["name"] for resident in ours.report["residents"]]
    merged = merged_name((name, False) for name in names)
    ours.report["memory"], ours.report["loaded"] = {merged: "0" * 64}, [merged]
    seen = probe(url, run.path)
    assert found(seen) == {} and merged in unseen(seen)["its memory"][0]
    ours.report["residents"][0]["state"] = "withdrawn"
    assert merged in found(probe(url, run.path))["its memory"][0], "it is made of all of them"


def test_a_hidden_adapter_in_the_list_of_models(run: S3TRun, ours: Ours, url: str) -> None:
    ours.listed = ["shard-0@aaaaaaaaaaaa"]
    assert "its list of models" in found(probe(url, run.path))


def test_a_server_that_answers_to_any_name(run: S3TRun, ours: Ours, url: str) -> None:
    ours.answering.add("shard-0@000000000000")
    assert "refusals tell nothing" in unseen(probe(url, run.path))["names served before"][0]


def endless() -> Iterator[bytes]:
    while True:
        yield b'{"epoch": 1, "residents": [' + b" " * 2**20


def dripping() -> Iterator[bytes]:
    while True:
        yield b" "
        time.sleep(0.05)


BROKEN: dict[str, tuple[Callable[[], Said], str]] = {
    "HTML": (lambda: Said(200, b"<html>welcome</html>"), "something else than JSON"),
    "another form": (lambda: Said(200, {"residents": "all"}), "another form"),
    "a list": (lambda: Said(200, [1]), "another form"),
    "no numbers": (lambda: Said(200, {"epoch": True, "residents": []}), "another form"),
    "deep": (lambda: Said(200, b"[" * 100_000), "something else than JSON"),
    "empty": (lambda: Said(200, b""), "something else than JSON"),
    "not UTF-8": (lambda: Said(200, b"\xff\xfe\x00"), "something else than JSON"),
    "an error": (
        lambda: Said(500, {"error": {"message": "boom\nTraceback \x1b[31m"}}),
        r"500 boom Traceback \[31m",
    ),
    "endless": (lambda: Said(200, chunks=endless()), "without end"),
    "dripping": (lambda: Said(200, chunks=dripping()), "no answer within 1 s"),
    "unauthorised": (lambda: Said(401, {"error": "who are you"}), "401 who are you"),
    "forbidden": (lambda: Said(403, b""), "give a token that may"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_answers_are_one_line(
    run: S3TRun, ours: Ours, url: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, told = BROKEN[case]
    monkeypatch.setattr(http_client, "MOST_BYTES", 2**22)
    ours.said["/v1/residue"] = said()
    began = time.monotonic()
    with pytest.raises(UserError, match=told) as caught:
        probe(url, run.path, seconds=1.0)
    assert time.monotonic() - began < 5 and "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_redirect_is_not_followed_and_gets_no_token(
    run: S3TRun, ours: Ours, url: str, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("geheim\n")
    thief = Ours(report_of(run))
    with running(thief) as elsewhere:
        ours.said["/v1/residue"] = Said(307, b"", {"Location": f"{elsewhere}/v1/residue"})
        with pytest.raises(RunError, match="leads elsewhere"):
            probe(url, run.path, token_file=tmp_path / "token")
    assert not thief.questions and ours.questions[0].token == "Bearer geheim"


def test_tokens(run: S3TRun, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="in clear"):
        Server("http://example.org", "geheim")
    for address in (
        "ftp://x",
        "http://",
        "http://a:b@c",
        "http://x:y",
        "http://x?y",
        "http://[::1",
    ):
        with pytest.raises(UserError):
            Server(address)
    monkeypatch.setenv("LLM_UNLEARN_TOKEN", "from-there")
    assert read_token(None) == "from-there"
    (tmp_path / "two").write_text("a b")
    for path in (tmp_path / "two", tmp_path / "none"):
        with pytest.raises(UserError, match="--token_file"):
            read_token(path)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert probe(url, run.path).is_clean, "no proxy sees the token"


def test_a_server_that_is_not_there(run: S3TRun) -> None:
    with pytest.raises(RunError, match=r"cannot be asked: Connection refused"):
        probe("http://127.0.0.1:9", run.path)


def test_from_another_machine(run: S3TRun, ours: Ours, url: str, tmp_path: Path) -> None:
    """What `probe RUN --json` wrote stands for the run."""
    file = tmp_path / "served.json"
    file.write_text(json.dumps(probe_run(run.path).to_dict()))
    assert found(probe(url, served=file)) == {}
    old = copy.deepcopy(ours.report)
    run.delete(["person 3"])
    file.write_text(json.dumps(probe_run(run.path).to_dict()))
    seen = probe(url, served=file)
    assert "which is not served now" in found(seen)["adapters of the server"][0]
    ours.report = report_of(run)
    assert found(probe(url, served=file)) == {}
    ours.report["residents"].append(
        old["residents"][0] | {"state": "withdrawn", "name": "core@" + "a" * 12, "digest": "a" * 64}
    )
    ours.report["memory"]["core@" + "a" * 12] = "0" * 64
    ours.report["loaded"].append("core@" + "a" * 12)
    assert "zeros cannot be told" in unseen(probe(url, served=file))["its memory"][0]
    for text in ("[]", "{", '{"served": [{}]}'):
        file.write_text(text)
        with pytest.raises(UserError, match="is not what"):
            probe(url, served=file)


def test_one_of_both(run: S3TRun, url: str, tmp_path: Path) -> None:
    for arguments in ((None, None), (run.path, tmp_path / "x")):
        with pytest.raises(UserError, match="give --run RUN, or --served FILE"):
            probe(url, *arguments)


@pytest.fixture
def vllm() -> LoopbackVllm:
    return LoopbackVllm()


@pytest.fixture
def stock(vllm: LoopbackVllm) -> Iterator[str]:
    with running(vllm) as address:
        yield address


def test_a_stock_vllm(run: S3TRun, vllm: LoopbackVllm, stock: str) -> None:
    Follower.of(run.path, stock).sync()
    seen = probe(stock, run.path)
    assert found(seen) == {} and set(unseen(seen)) == {"its memory", "its prefix cache"}
    assert (
        "54839" in unseen(seen)["its memory"][0] and "is on" in unseen(seen)["its prefix cache"][0]
    )
    assert {a.name for a in seen.adapters} == set(vllm.adapters)
    run.delete(["person 3"])
    seen = probe(stock, run.path)
    names = found(seen)["adapters of the server, by name"]
    assert len(names) == 1 and "is not what the run serves now" in names[0]
    assert "still answers" in found(seen)["names served before"][0]
    Follower.of(run.path, stock).sync()
    seen = probe(stock, run.path)
    assert set(found(seen)) == {"its memory"}, "unloaded, and in memory until a restart"
    assert "no restart of the server since is known" in found(seen)["its memory"][0]
    vllm.restart()
    Follower.of(run.path, stock).sync()
    assert found(probe(stock, run.path)) == {}


def test_a_stock_vllm_that_hides_an_adapter(run: S3TRun, vllm: LoopbackVllm, stock: str) -> None:
    Follower.of(run.path, stock).sync()
    run.delete(["person 3"])
    vllm.unload_lies = "hidden"
    with pytest.raises(RunError, match="still answers"):
        Follower.of(run.path, stock).sync()
    assert "still answers" in found(probe(stock, run.path))["names served before"][0]


def test_names_without_digests_and_requests_in_flight(
    run: S3TRun, vllm: LoopbackVllm, stock: str
) -> None:
    vllm.adapters["mine"] = "/x"
    vllm.running = "shard-0@aaaaaaaaaaaa,mine"
    problems = found(probe(stock, run.path))
    assert "mine has no digest in its name" in problems["adapters of the server, by name"][0]
    assert len(problems["answers in flight"]) == 2, (
        "the newest sample counts, and not the older one"
    )
    vllm.has_metrics = False
    assert {"answers in flight", "its prefix cache"} <= set(unseen(probe(stock, run.path)))


@pytest.mark.parametrize("failure", ["caches_by_name", "mixes"])
def test_known_failures_show_in_the_answers(
    run: S3TRun, vllm: LoopbackVllm, stock: str, failure: str, tmp_path: Path, say: Say
) -> None:
    """Issues 42125 and 47724: nothing is listed wrongly, and the texts are another adapter's."""
    Follower.of(run.path, stock).sync()
    name = next(iter(vllm.adapters))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "who?"}\n\n"what now?"\n')
    fresh = LoopbackVllm(memory=dict(vllm.memory), adapters=dict(vllm.adapters))
    with running(fresh) as reference:
        words = [
            "probe",
            stock,
            "--run",
            run.path,
            "--prompts",
            prompts,
            "--model",
            name,
            "--reference",
            reference,
        ]
        told = in_json(say(*words, "--json"))
        (look,) = [look for look in told["looks"] if look["place"] == "answers"]
        assert (
            look["notes"][0] == "2 of 2 answers are equal"
            and "not shown by that" in look["notes"][1]
        )
        if failure == "caches_by_name":
            setattr(vllm, failure, True)
            vllm.memory[name] = "0" * 64
            in_json(say(*words, "--json"), 1)  # asked under the old content
            vllm.memory[name] = fresh.memory[name]
        else:
            setattr(vllm, failure, True)
        told = in_json(say(*words, "--json"), 1)
        (look,) = [look for look in told["looks"] if look["place"] == "answers"]
        assert look["problems"] == ["2 answers differ, the first in row 1"]
        assert "says" not in json.dumps(look)
        code, text, _ = say(*words, "--show_text")
        assert code == 1 and " says 4' instead of ' " in text


def test_prompts_that_are_none(run: S3TRun, url: str, tmp_path: Path, say: Say) -> None:
    prompts = tmp_path / "prompts.jsonl"
    for text, told in (
        ("", "holds 0 prompts"),
        ('{"text": "a"}', "line 1: expected"),
        ("[", "line 1"),
        ('""', "line 1"),
    ):
        prompts.write_text(text)
        assert told in one_line(say("probe", url, "--run", run.path, "--prompts", prompts), 2)
    assert "go with --prompts" in one_line(say("probe", url, "--run", run.path, "--model", "a"), 2)
    assert "cannot be read" in one_line(
        say("probe", url, "--run", run.path, "--prompts", tmp_path), 2
    )


def test_the_command(say: Say, run: S3TRun, ours: Ours, url: str) -> None:
    code, text, _ = say("probe", url, "--run", run.path)
    assert code == 0 and "Nothing deleted was found." in text and " its memory " in text
    ours.report["memory"][ours.report["loaded"][0]] = "0" * 64
    code, text, _ = say("probe", url, "--run", run.path)
    assert code == 1 and "RESIDUE: its memory: core@" in text
    assert "give --run RUN" in one_line(say("probe", url), 2)


def test_random_reports_never_crash(run: S3TRun, ours: Ours, url: str) -> None:
    """Any JSON in any field: one line, or a finding, and never silence about what is served."""
    honest = ours.report
    values: list[Any] = [
        None,
        -1,
        "",
        "x" * 300,
        [],
        {},
        [None],
        {"a": 1},
        [[1]],
        True,
        1.5,
        "\x1b[2J",
    ]
    for field, value in itertools.product(honest, values):
        ours.report = honest | {field: value}
        try:
            Probe.to_dict(probe(url, run.path))
        except UserError as error:
            assert "\n" not in str(error)
    for field, value in itertools.product(honest["residents"][0], values):
        ours.report = honest | {"residents": [honest["residents"][0] | {field: value}]}
        try:
            assert not probe(url, run.path).is_clean
        except UserError as error:
            assert "another form" in str(error)
