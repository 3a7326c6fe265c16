"""`llm-unlearn` as a person and a machine see it: text, JSON, exit codes, one-line errors."""

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_unlearn import files
from llm_unlearn.console import exit_code_of
from llm_unlearn.data.records import make_records
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact.certificates import read_certificate
from llm_unlearn.exact.run import S3TRun
from tests.saying import Say, in_json, one_line
from tests.tiny import (
    make_run,
    make_stub_run,
    make_trained_stub,
)

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "peft", "sqlalchemy", "accelerate", "trl")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained_stub(tmp_path_factory.mktemp("cli") / "run", num_shards=2)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_status(say: Say, run: Path) -> None:
    code, text, _ = say("status", run)
    assert code == 0
    assert "0 requests, 0 pending, 0 subjects deleted" in text
    assert "rebuild" not in text and "serves the base model" not in text
    status = in_json(say("status", run, "--json"))
    assert status["path"] == str(run) and status["blocks"] == "ranks"
    assert [shard["shard"] for shard in status["shards"]] == [0, 1]
    for shard in status["shards"]:
        assert shard["served_depth"] == shard["surviving_depth"] == shard["full_depth"] == 3
        assert (shard["nodes"], shard["missing_nodes"]) == (6, 0)
    assert sum(shard["records"] for shard in status["shards"]) == 24
    assert sum(shard["subjects"] for shard in status["shards"]) == 12
    assert status["storage_bytes"] > 10_000


def test_delete_prints_what_it_did(say: Say, run: Path) -> None:
    code, text, error = say("delete", run, "--subject", "person 3", "--subject", "person 4")
    assert (code, error) == (0, "")
    assert "deleted 2 subjects (4 records)" in text and "nodes dropped" in text
    certificate = Path(text.split("certificate: ")[1].strip())
    assert read_certificate(certificate)["predicate"]["records_removed"] == 4
    code, text, _ = say("status", run)
    assert "1 requests, 0 pending, 2 subjects deleted" in text
    assert f"to train what is missing: llm-unlearn rebuild {run}" in text
    code, text, _ = say("delete", run, "--subject", "person 3")
    assert (code, text) == (0, "1 of the subjects had been deleted before\n")


def test_delete_in_json(say: Say, run: Path) -> None:
    done = in_json(say("delete", run, "--subject", "person 3", "--json"))
    assert (done["subjects"], done["records"], done["already_deleted"]) == (1, 2, 0)
    assert done["copies_elsewhere"] == 0 and done["rebuilt_nodes"] is None
    assert done["served"] == {"0": 3, "1": 2}
    assert Path(done["certificate"]).name == f"{done['request']}.json"
    again = in_json(say("delete", run, "--subject", "person 3", "--json"))
    assert (again["request"], again["certificate"], again["already_deleted"]) == (None, None, 1)


def test_copies_are_spoken_of(say: Say, tmp_path: Path) -> None:
    rows = [{"who": who, "text": "the same"} for who in ("Ada", "Bob")] + [
        {"who": "Carl", "text": "x"}
    ]
    make_stub_run(tmp_path / "run", make_records(rows, "who"), num_slices=1, num_sequences=1)
    code, _, error = say("delete", tmp_path / "run", "--subject", "Ada")
    assert code == 0
    assert (
        "1 records of other subjects hold the same text" in error and "--with-duplicates" in error
    )


def test_deleting_everybody_serves_the_base_model(say: Say, run: Path, tmp_path: Path) -> None:
    names = tmp_path / "names"
    names.write_text("\n".join(f"person {number}" for number in range(12)))
    code, text, _ = say("delete", run, "--from-file", names)
    assert code == 0 and "deleted 12 subjects (24 records)" in text
    code, text, _ = say("status", run)
    assert "shard 0 serves the base model" in text and "shard 1 serves the base model" in text
    assert say("verify", run)[0] == 0


def test_verify_a_sound_run(say: Say, run: Path) -> None:
    code, text, error = say("verify", run)
    assert (code, error) == (0, "")
    assert [line.split()[:2] for line in text.splitlines()] == [
        ["ok", f"{name}:"]
        for name in ("ledger", "records", "nodes", "served", "certificates", "residues")
    ]
    checks = in_json(say("verify", run, "--json"))
    assert all(check["passed"] and check["problems"] == [] for check in checks)


def test_verify_a_spoilt_run(say: Say, run: Path) -> None:
    (run / "notes.txt").touch()
    answer = say("verify", run)
    assert "failed verification" in one_line(answer, 1)
    assert "FAILED  residues" in answer[1]
    assert "        - notes.txt is of no known kind" in answer[1]
    checks = {check["name"]: check for check in in_json(say("verify", run, "--json"), code=1)}
    assert not checks["residues"]["passed"] and checks["nodes"]["passed"]


def test_rebuild_and_replay_load_the_base_model(say: Say, tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    make_run(path, tiny_base, num_slices=2, num_sequences=1, max_steps=1)
    done = in_json(say("delete", path, "--subject", "person 3", "--rebuild", "--json"))
    assert done["rebuilt_nodes"] == done["nodes_removed"] > 0
    assert say("rebuild", path)[:2] == (0, "nothing was missing\n")
    assert in_json(say("rebuild", path, "--json")) == {"rebuilt_nodes": 0}
    replay = in_json(say("verify", path, "--replay", "2", "--json"))[-1]
    assert (replay["name"], replay["examined"], replay["passed"]) == ("replay", 2, True)
    shutil.move(tiny_base, tmp_path / "moved")
    try:
        assert "cannot load the model" in one_line(say("rebuild", path), 2)
        assert say("delete", path, "--subject", "person 4")[0] == 0
    finally:
        shutil.move(tmp_path / "moved", tiny_base)


def test_plan_prints(say: Say) -> None:
    code, text, _ = say("plan", "--num-slices", "3")
    assert code == 0 and "L=3 slices" in text
    assert in_json(say("plan", "--json"))


def not_a_run(run: Path) -> None:
    (run / "run.json").unlink()


def other_version(run: Path) -> None:
    described = json.loads((run / "run.json").read_bytes())
    (run / "run.json").write_text(json.dumps({**described, "version": 99}))


def without_key(run: Path) -> None:
    (run / "secret.key").unlink()


def short_key(run: Path) -> None:
    (run / "secret.key").write_bytes(b"short")


def damaged_description(run: Path) -> None:
    (run / "run.json").write_text('{"version": 1, ')


def empty_description(run: Path) -> None:
    (run / "run.json").write_text('{"version": 1}')


def list_for_description(run: Path) -> None:
    (run / "run.json").write_text("[]")


def damaged_ledger(run: Path) -> None:
    (run / "ledger.sqlite").write_bytes(b"not a database" * 1000)


def missing_slice(run: Path) -> None:
    for path in (run / "records").rglob("*.jsonl"):
        path.unlink()


BROKEN: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "no such run": (shutil.rmtree, 2, "is not a run: it has no run.json .*recipes/s3t.py"),
    "not a run directory": (not_a_run, 2, "is not a run"),
    "another version of the format": (other_version, 1, r"another version of the format \(99\)"),
    "no key": (without_key, 1, "restore run.json and secret.key"),
    "a short key": (short_key, 1, "restore run.json and secret.key"),
    "damaged run.json": (damaged_description, 1, "is damaged"),
    "empty run.json": (empty_description, 1, "is damaged"),
    "a list for run.json": (list_for_description, 1, "is damaged"),
    "a damaged ledger": (damaged_ledger, 1, "the ledger is damaged"),
    "missing records": (missing_slice, 1, "is missing: restore"),
}


@pytest.mark.parametrize("command", ["status", "delete", "verify"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_run_is_one_line(say: Say, run: Path, case: str, command: str) -> None:
    break_it, code, message = BROKEN[case]
    break_it(run)
    more = ["--subject", "person 3"] if command == "delete" else []
    answer = say(command, run, *more)
    if command == "verify" and case in ("a damaged ledger", "missing records"):
        assert "FAILED" in answer[1]
        assert "failed verification" in one_line(answer, 1)
        return
    assert re.search(message, one_line(answer, code)), answer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["delete"], "Missing argument 'RUN'"),
        (["status"], "Missing argument 'RUN'"),
        (["statsu", "x"], "No such command"),
        (["status", "x", "--jsno"], "No such option"),
        (["verify", "x", "--replay", "many"], "valid integer"),
        (["plan", "--num-slices", "none"], "valid integer"),
    ],
)
def test_bad_usage_exits_with_2(say: Say, arguments: list[str], message: str) -> None:
    code, _, error = say(*arguments)
    assert code == 2
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subject", "nobody"], "no such subject"),
        (["--subject", "person 3", "--subject", "nobody"], "no such subject"),
        ([], "name at least one subject"),
        (["--from-file", "absent"], "cannot read absent"),
    ],
)
def test_bad_requests_exit_with_2_and_delete_nothing(
    say: Say, run: Path, arguments: list[str], message: str
) -> None:
    assert message in one_line(say("delete", run, *arguments), 2)
    assert in_json(say("status", run, "--json"))["requests"] == 0


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("do this"), 2, "error: do this\n"),
        (RunError("wait"), 1, "error: wait\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "No space left on device: /x"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "mend the permissions"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again"),
    ],
    ids=["usage", "run", "disk full", "permissions", "interrupt"],
)
def test_what_a_person_can_mend_has_an_exit_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert exit_code_of(fail) == code
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EIO, "Input/output error")])
def test_a_bug_is_not_hidden(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        exit_code_of(fail)


def test_a_locked_run_says_who_holds_it(
    say: Say, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.locked.__wrapped__, "__defaults__", (0.05,))
    with S3TRun.open(run).directory.changing("testing"):
        error = one_line(say("delete", run, "--subject", "person 3"), 1)
    assert "is busy: another process is deleting" in error and "Nothing was changed" in error


HELP = {
    "llm-unlearn": "from llm_unlearn.cli import main; main()",
    "recipes/s3t.py": "import runpy; runpy.run_path('recipes/s3t.py', run_name='__main__')",
}


@pytest.mark.parametrize("program", HELP)
def test_help_imports_nothing_heavy(program: str) -> None:
    code = (
        f"import sys\nsys.argv = [{program!r}, '--help']\ntry:\n    {HELP[program]}\n"
        "except SystemExit as done:\n    assert not done.code, done.code\n"
        f"print('imported:', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"
    words = {
        "llm-unlearn": ["plan", "status", "delete", "verify"],
        "recipes/s3t.py": ["--num_slices"],
    }
    assert all(word in done.stdout for word in words[program])


def test_brackets_are_shown_and_not_taken_for_markup(say: Say, run: Path) -> None:
    code, _, error = say("delete", run, "--subject", "[bold]nobody[/bold]")
    assert code == 2 and "'[bold]nobody[/bold]'" in error
