"""eval/*.py as a person runs them: one table, two files, no texts, and one line for a mistake."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.console import exit_code_of
from llm_unlearn.data import world
from llm_unlearn.demonstration import MODEL_PATH
from llm_unlearn.evaluation.results import read_results
from llm_unlearn.evaluation.scorer import Scorer
from tests.evaluation.folders import make_muse_folder, make_tofu_folder
from tests.tiny import make_run

ROOT = Path(__file__).parents[1]


def load(name: str) -> Callable[[list[str]], None]:
    spec = importlib.util.spec_from_file_location(f"eval_{name}", ROOT / "eval" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run(name: str, *arguments: object) -> int:
    return exit_code_of(lambda: load(name)([str(argument) for argument in arguments]))


def test_muse_on_a_folder(tmp_path: Path, tiny_base: Path, capfd: Any) -> None:
    folder, out = make_muse_folder(tmp_path / "muse"), tmp_path / "out"
    given = ("--model", tiny_base, "--suite", folder, "--output_dir", out)
    assert run("muse", *given, "--retrain", tiny_base, "--before", tiny_base) == 0
    shown = capfd.readouterr().out
    assert "forget_verbmem" in shown and "verdict: no baseline" in shown
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json"]
    results = read_results(out)
    assert results.model.values["privleak"].value == 0
    row = json.loads((folder / "knowmem/forget_qa.json").read_text())[0]
    for path in out.iterdir():
        assert row["question"] not in path.read_text(), f"{path.name} holds a text"
    # Saved rows serve as well as the model.
    again = tmp_path / "again"
    given = ("--model", tiny_base, "--suite", folder, "--output_dir", again)
    assert run("muse", *given, "--retrain_scores", out, "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["values"]["privleak"]["value"] == 0
    assert list(printed["others"]) == ["retrained"]


def test_tofu_on_a_folder_with_texts_and_curves(tmp_path: Path, tiny_base: Path) -> None:
    folder, out = make_tofu_folder(tmp_path / "tofu"), tmp_path / "out"
    given = ("--model", tiny_base, "--suite", folder, "--output_dir", out, "--show_text")
    assert run("tofu", *given, "--scalability", tiny_base, tiny_base) == 0
    results = read_results(out)
    assert results.model.texts
    curve = results.curves["scalability"]
    assert [v.value for v in curve] == [results.model.values["model_utility"].value] * 2


def test_a_run_is_asked_about_whom_it_deleted(tmp_path: Path, capfd: Any) -> None:
    from llm_unlearn.data.records import make_records

    people = world.private_people()
    records = make_records(world.records(people), subject_column="subject")
    run_ = make_run(tmp_path / "run", MODEL_PATH, records, num_sequences=1, max_length=64)
    gone = people[5].name
    run_.delete([gone])
    out = tmp_path / "out"
    assert run("muse", "--model", run_.path, "--output_dir", out, "--show_text") == 0
    asked = {t.prompt for t in read_results(out).model.texts if t.section == "knowmem/forget_qa"}
    assert len(asked) == 6 and all(gone in prompt for prompt in asked)
    capfd.readouterr()
    # A served adapter is a model like any other, and so is the directory of all shards.
    shard = (run_.path / "served" / "shard-0").resolve()
    for path in (shard, run_.path / "served"):
        given = ("--model", path, "--forget_subject", gone, "--output_dir", tmp_path / path.name)
        assert run("muse", *given) == 0
        found = read_results(tmp_path / path.name).model.values
        expected = read_results(out).model.values
        assert found["retain_knowmem"].value == pytest.approx(expected["retain_knowmem"].value)


def test_attacks(tmp_path: Path, tiny_base: Path, capfd: Any) -> None:
    folder, out = make_tofu_folder(tmp_path / "tofu", unicode=False), tmp_path / "out"
    models = ("--model", tiny_base, "--retrain", tiny_base, "--before", tiny_base)
    quick = ("--steps", 0, 2, "--seeds", 2, "--samples", 2, "--bits", 4)
    assert run("attacks", *models, "--suite", folder, "--output_dir", out, *quick) == 0
    results = read_results(out)
    assert {"relearned", "leak_at_2", "quantized_4_bit", "prompt_worst"} <= set(
        results.model.values
    )
    assert len(results.checks) == 6 and "failed" not in {c.verdict for c in results.checks}
    assert "no attack surely got more" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("muse", ["--suite", "nowhere"], "no such suite"),
        ("muse", ["--profile", "best"], "unknown profile"),
        ("muse", ["--template", "poem"], "unknown template"),
        ("muse", ["--template", "chat", "--profile", "muse"], "no chats"),
        ("muse", ["--batch_size", "0"], "--batch_size"),
        ("muse", ["--model", "nowhere/at-all"], "cannot load"),
        ("muse", ["--adapter", "nowhere"], "cannot put the adapter"),
        ("muse", ["--forget_subject", "Nobody"], "no private person"),
        ("muse", ["--decoys"], "give --before"),
        ("muse", ["--retrain", "x", "--retrain_scores", "y"], "not both"),
        ("muse", ["--retrain_scores", "nowhere"], "cannot read"),
        ("tofu", ["--suite", ".", "--forget_split", "forget33"], "unknown --forget_split"),
        ("tofu", ["--suite", "."], "no forget10_perturbed"),
        ("attacks", ["--attack", "prayer"], "unknown --attack"),
        ("attacks", ["--steps", "5", "2"], "rising steps"),
        ("attacks", ["--bits", "1"], "--bits"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    capfd: Any,
    monkeypatch: Any,
    name: str,
    arguments: list[str],
    message: str,
) -> None:
    def asked(*_: Any) -> None:
        raise AssertionError("a model was asked before the mistake was found")

    monkeypatch.setattr(Scorer, "likelihoods", asked)
    model = [] if "--model" in arguments else ["--model", str(MODEL_PATH)]
    assert run(name, *model, *arguments, "--output_dir", tmp_path / "out") == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]


def test_without_a_model_it_says_how_to_make_one(
    tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("muse") == 2
    assert "recipes/s3t.py" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["muse", "tofu", "attacks", "capabilities"])
def test_help_imports_nothing_heavy(name: str) -> None:
    command = (
        "import sys, runpy\n"
        f"sys.argv = ['{name}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path(r'{ROOT / 'eval' / (name + '.py')}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'scipy', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--output_dir" in done.stdout


@pytest.mark.slow
def test_processes_share_the_work_and_change_no_value(tmp_path: Path, tiny_base: Path) -> None:
    folder = make_muse_folder(tmp_path / "muse", n=12)
    given = ["eval/muse.py", "--model", str(tiny_base), "--suite", str(folder), "--batch_size", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(processes),
        ]
        done = subprocess.run(
            [*command, *given, "--output_dir", str(out)],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("verdict:") == 1, "every process printed"
        found.append(json.loads((out / "results.json").read_text()))
    one, two = found
    assert one["records"] == two["records"] and one["values"] == two["values"]
