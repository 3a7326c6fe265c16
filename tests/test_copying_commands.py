"""`llm-unlearn export`, `copies` and `near-duplicates`, as a person and a machine see them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_unlearn.data.records import make_records
from tests.saying import Say, in_json, one_line
from tests.tiny import make_stub_run, make_trained_stub


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained_stub(
        tmp_path_factory.mktemp("copying") / "run", num_shards=2, num_slices=2, num_sequences=1
    )


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_from_an_export_to_its_deletion(say: Say, run: Path, tmp_path: Path) -> None:
    code, text, _ = say("export", run, "--output", tmp_path / "out", "--vllm")
    assert code == 0 and f"wrote {tmp_path / 'out'} (vllm, 2 adapters, " in text
    assert f"how to load it: {tmp_path / 'out' / 'README.md'}" in text
    (listed,) = in_json(say("copies", run, "--json"))
    assert (listed["state"], listed["kind"], listed["nodes"]) == ("current", "vllm", 4)
    file = tmp_path / "q4.gguf"
    file.touch()
    code, text, _ = say(
        "copies", run, "--add", file, "--kind", "quantised", "--parent", listed["id"]
    )
    assert code == 0 and text == (
        f"registered {file} as copy {text.split()[4].strip(',')}, made from copy {listed['id']}\n"
    )
    code, text, error = say("delete", run, "--subject", "person 3")
    assert code == 0 and error.count("a copy outside holds deleted data") == 2
    code, text, error = say("copies", run)
    assert code == 0 and text.count(" stale ") == 2 and "quantised" in text
    assert "2 of them hold deleted data: `--delete ID` removes an export" in error
    said = in_json(say("copies", run, "--delete", listed["id"], "--json"))
    assert [copy["state"] for copy in said] == ["gone", "stale"] and not (tmp_path / "out").exists()
    child = said[1]["id"]
    assert "is still there: delete it first" in one_line(say("copies", run, "--gone", child), 2)
    file.unlink()
    assert say("copies", run, "--gone", child)[1] == f"noted that copy {child} is gone\n"
    code, text, error = say("copies", run)
    assert (code, error) == (0, "") and text.count(" gone ") == 2
    assert say("verify", run)[0] == 0


def test_an_export_in_json(say: Say, run: Path, tmp_path: Path) -> None:
    told = in_json(
        say("export", run, "--output", tmp_path / "out", "--vllm", "--shard", 1, "--json")
    )
    assert told["kind"] == "vllm" and len(told["adapters"]) == 1 and told["bytes"] > 1000
    assert told["id"] == json.loads((tmp_path / "out" / "lineage.json").read_text())["copy"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["export", "RUN", "--output", "OUT"], "give one of --merged, --gguf-ready and --vllm"),
        (["export", "RUN", "--output", "OUT", "--vllm", "--merged"], "give one of --merged"),
        (["export", "RUN", "--output", "OUT", "--merged"], "answers by 'average' with 2 shards"),
        (["export", "RUN", "--output", "OUT", "--vllm", "--shard", "9"], "has no shard 9: it has 0, 1"),
        (["export", "RUN", "--output", "RUN/served/x", "--vllm"], "is within the run"),
        (["export", "OUT", "--output", "OUT", "--vllm"], "is not a run"),
        (["copies", "RUN", "--gone", "nobody"], "no copy 'nobody' is known"),
        (["copies", "RUN", "--delete", "../run"], "no copy '../run' is known"),
        (["copies", "RUN", "--gone", "a", "--delete", "b"], "give one of --add, --gone and --delete"),
        (["copies", "RUN", "--add", "tape"], "--add and --kind belong together"),
        (["copies", "RUN", "--kind", "gguf"], "--add and --kind belong together"),
        (["copies", "RUN", "--parent", "x"], "--add and --kind belong together"),
        (["near-duplicates", "RUN", "--subject", "Zoe"], "no such subject"),
        (["near-duplicates", "RUN", "--subject", "person 3", "--threshold", "80"], "--threshold must be"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    say: Say,
    run: Path,
    tmp_path: Path,
    words: list[str],
    error: str,
) -> None:
    place = {"RUN": str(run), "OUT": str(tmp_path / "out")}
    given = [place.get(word, word.replace("RUN/", f"{run}/")) for word in words]
    assert error in one_line(say(*given), 2)
    assert not (tmp_path / "out").exists()


def test_no_copies(say: Say, run: Path) -> None:
    assert "no copies are known" in say("copies", run)[1]
    assert in_json(say("copies", run, "--json")) == []


def test_words_of_a_person_are_no_markup(say: Say, run: Path) -> None:
    place = "[red]shelf[/nothing] 3"
    assert say("copies", run, "--add", place, "--kind", "tape")[0] == 0
    code, text, _ = say("copies", run)
    assert code == 0 and "[red]shelf[/nothing]" in text


ROWS = [
    {"who": "[bold]Ada", "text": "she keeps seven grey cats and a parrot in the old lighthouse"},
    {"who": "Bob [x]", "text": "she keeps seven grey cats and a parrot in the odd lighthouse"},
    {"who": "Cleo", "text": "She keeps  seven grey cats and a parrot in the old lighthouse"},
    {"who": "Dan", "text": "the ferry leaves at noon"},
]


def test_near_duplicates(say: Say, tmp_path: Path) -> None:
    make_stub_run(tmp_path / "run", make_records(ROWS, "who"), num_slices=1, num_sequences=1)
    code, text, error = say("near-duplicates", tmp_path / "run", "--subject", "[bold]Ada")
    assert (code, error) == (0, "")
    assert "2 near-duplicates of 1 records, held by 2 others" in text
    assert (
        "[bold]Ada" in text
        and "Bob [x]" in text
        and "same text" in text
        and "lighthouse" not in text
    )
    told = in_json(say("near-duplicates", tmp_path / "run", "--subject", "[bold]Ada", "--json"))
    assert [(near["held_by"], near["is_exact"]) for near in told] == [
        ("Cleo", True),
        ("Bob [x]", False),
    ]
    assert 0.8 <= told[1]["similarity"] < told[0]["similarity"] == 1
    code, text, _ = say("near-duplicates", tmp_path / "run", "--subject", "Dan")
    assert (code, text) == (0, "nobody else holds a text that is similar by 0.8 or more\n")
    code, text, _ = say("near-duplicates", tmp_path / "run", "--subject", "Cleo", "--threshold", 1)
    assert "1 near-duplicates of 1 records, held by 1 others" in text


@pytest.mark.parametrize("words", [["copies", "RUN"], ["near-duplicates", "RUN", "--subject", "person 3"],
                                   ["export", "RUN", "--vllm", "--output", "OUT"]])  # fmt: skip
def test_none_of_them_waits_for_torch(run: Path, tmp_path: Path, words: list[str]) -> None:
    place = {"RUN": str(run), "OUT": str(tmp_path / "out")}
    code = (
        "import sys; from llm_unlearn.cli import app\n"
        f"app({[place.get(word, word) for word in words]!r}, standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
