"""recipes/unlearn.py as a person uses it: flags in; an adapter, plain words and one line a mistake out."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llm_unlearn.approximate.methods import METHODS, load_method
from llm_unlearn.approximate.request_detectors import DETECTORS
from llm_unlearn.console import exit_code_of
from llm_unlearn.demonstration import MODEL_PATH, UNLEARNING
from llm_unlearn.models import load_model
from tests.evaluation.folders import make_muse_folder
from tests.test_evaluation_commands import run as evaluate
from tests.test_recipes import ROOT, load_recipe
from tests.tiny import load_tiny, make_rows, make_run, make_tiny_model, make_tiny_tokenizer

main = load_recipe("unlearn")
REPORT = "unlearning.json"
ROWS = make_rows()
LAYOUTS = {
    "prompt and completion": lambda row: {k: row[k] for k in ("prompt", "completion")},
    "question and answer": lambda row: {"question": row["prompt"], "answer": row["completion"]},
    "text": lambda row: {"text": row["prompt"] + row["completion"]},
    "messages": lambda row: {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    },
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is written without --output_dir is seen, and does no harm."""
    monkeypatch.chdir(tmp_path)
    yield


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def forget(tmp_path: Path) -> Path:
    return write(tmp_path / "forget.jsonl", ROWS[:4])


@pytest.fixture
def retain(tmp_path: Path) -> Path:
    return write(tmp_path / "retain.jsonl", ROWS[4:12])


@pytest.fixture(scope="session")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the base, as fine-tuning writes it."""
    path = tmp_path_factory.mktemp("adapter") / "fine-tuned"
    data = write(path.with_suffix(".jsonl"), ROWS)
    assert unlearn(tiny_base, path, "--method", "ga", "--forget", data, "--lora_r", 3) == 0
    (path / REPORT).unlink()
    return path


def unlearn(base: Path, output: Path, *more: object) -> int:
    """Two steps of a LoRA; flags that come later win."""
    given = [
        "--model_name_or_path", base, "--output_dir", output, "--max_steps", 2, "--lora_r", 4,
        "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_length", 64,
        "--learning_rate", 1e-3, "--use_cpu", *more,
    ]  # fmt: skip
    return exit_code_of(lambda: main([str(part) for part in given]))


def report_of(output: Path) -> dict[str, Any]:
    return json.loads((output / REPORT).read_bytes())


def refused(capfd: Any) -> str:
    """The one line that a mistake is told in."""
    shown = capfd.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), shown.err
    assert "Traceback" not in shown.err and not shown.out
    return lines[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_in_an_adapter_out(
    layout: str, tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    forget = write(tmp_path / "forget.jsonl", [LAYOUTS[layout](row) for row in ROWS[:4]])
    retain = tmp_path / "retain.json"
    retain.write_text(json.dumps([LAYOUTS[layout](row) for row in ROWS[4:9]]))
    out = tmp_path / "out"
    assert unlearn(tiny_base, out, "--forget", forget, "--retain", retain, "--max_length", 128) == 0
    shown = capfd.readouterr()
    assert f"{out}: 4 records unlearned with npo, 2 steps" in shown.out
    assert "no guarantee" in shown.out and not shown.err
    model = PeftModel.from_pretrained(load_tiny(tiny_base)[0], str(out))
    assert any(bool(p.any()) for name, p in model.named_parameters() if ".lora_B." in name)
    assert "carries no guarantee" in (out / "README.md").read_text()
    report = report_of(out)
    assert (report["forget_records"], report["retain_records"]) == (4, 5)
    assert not (out / "checkpoints").exists(), "they are made of what is to be forgotten"


def test_full_weights_come_out(tiny_base: Path, tmp_path: Path, forget: Path, retain: Path) -> None:
    given = ("--forget", forget, "--retain", retain, "--full")
    assert unlearn(tiny_base, tmp_path / "out", *given) == 0
    before, after = load_tiny(tiny_base)[0], load_tiny(tmp_path / "out")[0]
    assert any(
        not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    )


def test_several_files_are_one_request(
    tiny_base: Path, tmp_path: Path, forget: Path, retain: Path
) -> None:
    more = write(tmp_path / "more.jsonl", ROWS[12:15])
    for name, given in {
        "a": ["--forget", forget, more],
        "b": ["--forget", forget, "--forget", more],
    }.items():
        assert unlearn(tiny_base, tmp_path / name, *given, "--retain", retain) == 0
        assert report_of(tmp_path / name)["forget_records"] == 7


def test_an_adapter_goes_on_being_trained(
    tiny_base: Path, adapter: Path, tmp_path: Path, forget: Path, retain: Path
) -> None:
    """Given beside its base, or alone: the same bits, of its own rank."""
    data = ("--forget", forget, "--retain", retain)
    assert unlearn(tiny_base, tmp_path / "a", "--adapter", adapter, *data) == 0
    assert unlearn(adapter, tmp_path / "b", *data) == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()
    assert (tmp_path / "a" / weights).read_bytes() != (adapter / weights).read_bytes()
    model: Any = PeftModel.from_pretrained(load_tiny(tiny_base)[0], str(tmp_path / "a"))
    assert model.peft_config["default"].r == 3, "not the 4 of a fresh one"
    assert unlearn(adapter, tmp_path / "c", *data, "--full") == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert not (tmp_path / "c" / "adapter_config.json").exists()


def test_an_adapter_of_another_base(
    tiny_base: Path, adapter: Path, tmp_path: Path, forget: Path, capfd: Any
) -> None:
    twin, other = tmp_path / "twin", tmp_path / "other"
    for path, width in ((twin, 32), (other, 16)):
        make_tiny_model(width=width).save_pretrained(path)
        make_tiny_tokenizer().save_pretrained(path)
    capfd.readouterr()
    given = ("--adapter", adapter, "--forget", forget, "--method", "ga")
    assert unlearn(twin, tmp_path / "out", *given) == 2
    said = refused(capfd)
    assert f"was trained on {tiny_base}, not on {twin}" in said and "--any_base" in said
    assert unlearn(twin, tmp_path / "out", *given, "--any_base") == 0
    capfd.readouterr()
    assert unlearn(other, tmp_path / "none", *given, "--any_base") == 2
    assert "the shapes do not fit" in refused(capfd)
    assert not (tmp_path / "none").exists()


def test_an_exact_runs_own_records(
    tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", tiny_base, num_slices=2, max_steps=1)
    model = (run.path / "served" / "shard-0").resolve()
    given = ("--run", run.path, "--subject", "person 1")
    assert unlearn(model, tmp_path / "out", *given) == 0
    assert (
        report_of(tmp_path / "out")["forget_records"],
        report_of(tmp_path / "out")["retain_records"],
    ) == (2, 22)
    # Repeated or not, all who are named are forgotten.
    both = (*given, "--subject", "person 2", "person 1")
    assert unlearn(model, tmp_path / "both", *both) == 0
    assert report_of(tmp_path / "both")["forget_records"] == 4
    assert unlearn(model, tmp_path / "rows", *both, "--growing") == 0
    sizes = [report_of(tmp_path / "rows" / f"request-{i}")["forget_records"] for i in (1, 2)]
    assert sizes == [2, 4]
    capfd.readouterr()
    assert unlearn(model, tmp_path / "none", *given, "--subject", "nobody") == 2
    assert f"{run.path} holds no records of 'nobody'" in refused(capfd)
    assert len(run.directory.slices.names) == 2 and run.status().shards[0].records == 24


def test_a_run_of_copies_and_a_core(tiny_base: Path, tmp_path: Path) -> None:
    """A record that lies in two shards is one record; the core is kept, or forgotten, as all else."""
    from llm_unlearn.unlearning import RequestArguments, requests_of
    from tests.tiny import core_records, placed_by_id

    copies = make_run(
        tmp_path / "copies", tiny_base, train=False, placement=placed_by_id(3, 2),
        exact_method="lego", num_shards=3, num_slices=1, num_sequences=1,
    )  # fmt: skip
    (one,) = requests_of(RequestArguments(run=str(copies.path), subject=["person 1"]))
    assert (len(one.forget), len(one.retain)) == (2, 22)
    core = core_records()
    with_core = make_run(tmp_path / "core", tiny_base, train=False, core=core)
    subject = core[-1].subject
    (one,) = requests_of(RequestArguments(run=str(with_core.path), subject=[subject]))
    assert (len(one.forget), len(one.retain)) == (3, 22 + len(core) - 1)


def test_overlap_is_refused_or_dropped(
    tiny_base: Path, tmp_path: Path, forget: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    retain = write(tmp_path / "retain.jsonl", ROWS[3:10])
    given = ("--forget", forget, "--retain", retain)
    assert unlearn(tiny_base, tmp_path / "out", *given) == 2
    assert "1 of 7 retain records are in the forget set too" in refused(capfd)
    assert unlearn(tiny_base, tmp_path / "out", *given, "--drop_overlap") == 0
    assert report_of(tmp_path / "out")["retain_records"] == 6


MISTAKES: list[tuple[list[str], str]] = [
    (["--method", "magic"], "unknown --method 'magic': one of ga, graddiff, npo"),
    (["--method"], "unknown --method ''"),
    (["--method", "npo", "--delta", "1"], "unknown flag: --delta 1"),
    (["--method", "idk_dpo", "--retain_los", "kl"], "unknown flag: --retain_los kl"),
    (["--retain_loss", "magic"], "--retain_loss is nll or kl"),
    (["--beta", "warm"], "invalid float value: 'warm'"),
    (["--forget", "nowhere.jsonl"], "no such dataset file: nowhere.jsonl"),
    (["--forget", "empty.jsonl"], "the dataset is empty"),
    (["--forget", "."], "expected a file of kind"),
    (["--forget"], "expected at least one argument"),
    (["--retain", "other.jsonl"], "no known columns among ['poem']"),
    (["--model_name_or_path", "nowhere/at-all"], "cannot load the model 'nowhere/at-all'"),
    (["--model_name_or_path", "."], "cannot load the directory '.'"),
    (["--adapter", "nowhere"], "cannot put the adapter 'nowhere' on the model"),
    (["--run", "nowhere"], "--run brings its own records"),
    (["--subject", "me"], "--subject is for --run"),
    (["--sequential", "--growing"], "not both"),
    (["--growing", "--forget", "retain.jsonl"], "forget set 2 does not hold the one"),
    (["--stop_when", "utility_floor"], "give --eval_suite"),
    (["--keep", "best"], "give --eval_suite"),
    (["--keep", "first"], "--keep must be one of last, best"),
    (["--retrain_scores", "x.json"], "give --eval_suite"),
    (["--eval_suite", "nowhere"], "no such suite"),
    (["--eval_suite", "demo", "--retrain_scores", "nowhere"], "cannot read nowhere"),
    (["--eval_suite", "demo", "--stop_when", "utility_floor"], "needs --utility_floor or --retrain_scores"),
    (["--eval_strategy", "epoch"], "say --eval_suite"),
    (["--load_best_model_at_end"], "say --keep best"),
    (["--per_device_train_batch_size", "0"], "at least 1"),
    (["--learning_rate", "0"], "above 0"),
    (["--warmup_steps", "-1"], "warmup_steps"),
    (["--lr_scheduler_type", "magic"], "not a valid SchedulerType"),
    (["--dtype", "magic"], "'magic'"),
    (["--max_length", "3"], "no token left to learn"),
    (["--lora_target_modules", "magic"], "magic"),
    (["--trainable", "magic"], "--trainable 'magic'"),
    (["--method", "ssd"], "say --full"),
    (["--config", "nowhere.yaml"], "cannot read --config nowhere.yaml"),
    (["--config", "forget.jsonl"], "cannot read --config forget.jsonl"),
    (["--config", "list.yaml"], "expected a flag and its value on each line"),
    (["--config", "odd.yaml"], "unknown flag: --colour red"),
    (["--config"], "needs the name of a YAML file"),
    (["--output_dir", "forget.jsonl"], "is a file"),
    (["--output_dir", "forget.jsonl/below"], "is a file"),
    (["--output_dir", "model"], "holds another model"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), MISTAKES, ids=[" ".join(m) for m, _ in MISTAKES])
def test_a_mistake_is_one_line_and_in_nobodys_way(
    more: list[str],
    message: str,
    tiny_base: Path,
    tmp_path: Path,
    forget: Path,
    retain: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    write(tmp_path / "other.jsonl", [{"poem": "roses"}])
    (tmp_path / "list.yaml").write_text("- beta\n")
    (tmp_path / "odd.yaml").write_text("colour: red\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    given = ("--forget", forget, "--retain", retain)
    assert unlearn(tiny_base, tmp_path / "out", *given, *more) == 2
    assert message in refused(capfd)
    assert {path: path.read_bytes() for path in before} == before
    # What is right after a mistake is not held up by it.
    assert unlearn(tiny_base, tmp_path / "out", *given) == 0


def test_the_model_that_is_to_forget_is_not_written_over(
    tiny_base: Path, tmp_path: Path, forget: Path, retain: Path, capfd: Any
) -> None:
    data = ("--forget", forget, "--retain", retain)
    assert unlearn(tiny_base, tmp_path / "out", *data) == 0
    capfd.readouterr()
    weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert unlearn(tmp_path / "out", tmp_path / "out", *data) == 2
    assert "holds the model that is to forget" in refused(capfd)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == weights


def test_a_result_takes_the_place_of_an_earlier_one(
    tiny_base: Path, tmp_path: Path, forget: Path, retain: Path
) -> None:
    """Nothing of it is left that would be loaded with the new one: here a wrapper, then a LoRA."""
    out, data = tmp_path / "out", ("--forget", forget, "--retain", retain)
    assert unlearn(tiny_base, out, "--method", "whp", *data) == 0
    assert (out / "wrapper.json").exists()
    assert unlearn(tiny_base, out, "--method", "npo", *data) == 0
    assert isinstance(load_model(str(out)).model, PeftModel)
    assert unlearn(tiny_base, out, "--method", "npo", "--full", *data) == 0
    assert not isinstance(load_model(str(out)).model, PeftModel)


def test_requests_in_a_row(
    tiny_base: Path, tmp_path: Path, forget: Path, retain: Path, capfd: Any
) -> None:
    suite = make_muse_folder(tmp_path / "suite", n=3)
    more = write(tmp_path / "more.jsonl", ROWS[14:20])
    out, data = tmp_path / "out", ("--forget", forget, more, "--retain", retain)
    assert unlearn(tiny_base, out, *data, "--sequential", "--eval_suite", suite) == 0
    shown = capfd.readouterr().out
    curve = json.loads((out / "curve.json").read_bytes())
    assert [(row["request"], row["forgotten"]) for row in curve] == [
        ("request-1", 4),
        ("request-2", 10),
    ]
    for row in curve:
        assert f"{out / row['request']}: " in shown
        assert f"{row['forget']:.3f}" in shown and f"{row['utility']:.3f}" in shown
    second = json.loads((out / "request-2" / REPORT).read_bytes())["travelled"]
    assert set(second) == {"requests", "distance", "at_most"} and second["requests"] == 2
    assert f"after 2 requests at most {second['at_most']:.3g} from the first model" in shown
    # The second request went on with what the first left; alone it ends elsewhere.
    assert (
        unlearn(out / "request-1", tmp_path / "by-hand", "--forget", more, "--retain", retain) == 0
    )
    assert unlearn(tiny_base, tmp_path / "alone", "--forget", more, "--retain", retain) == 0
    second, by_hand, alone = (
        (path / "adapter_model.safetensors").read_bytes()
        for path in (out / "request-2", tmp_path / "by-hand", tmp_path / "alone")
    )
    assert second == by_hand != alone
    # A single request has no curve, and shows none that was there.
    capfd.readouterr()
    assert unlearn(tiny_base, out, "--forget", forget, "--retain", retain) == 0
    assert "After each request" not in capfd.readouterr().out


def test_growing_requests_each_start_from_the_model(
    tiny_base: Path, tmp_path: Path, forget: Path, retain: Path
) -> None:
    more, suite = write(tmp_path / "more.jsonl", [*ROWS[14:20], *ROWS[:4]]), "demo"
    out, data = tmp_path / "out", ("--forget", forget, more, "--retain", retain)
    assert unlearn(tiny_base, out, *data, "--growing", "--eval_suite", suite) == 0
    curve = json.loads((out / "curve.json").read_bytes())
    assert [row["forgotten"] for row in curve] == [4, 10]
    assert unlearn(tiny_base, tmp_path / "alone", "--forget", more, "--retain", retain) == 0
    assert (out / "request-2" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "alone" / "adapter_model.safetensors"
    ).read_bytes()


def test_o3_remembers_its_earlier_requests(
    tiny_base: Path, tmp_path: Path, forget: Path, capfd: Any
) -> None:
    from safetensors import safe_open

    more = write(tmp_path / "more.jsonl", ROWS[14:20])
    given = ("--method", "o3", "--forget", forget, more, "--sequential")
    assert unlearn(tiny_base, tmp_path / "out", *given) == 0
    assert "guard them as those" in capfd.readouterr().err
    for number in (1, 2):
        with safe_open(tmp_path / "out" / f"request-{number}" / DETECTORS, "pt") as stored:
            assert {name.split("/")[0] for name in stored.keys()} == set("01"[:number])
    # Another method would leave O3's wrapper behind, and says so.
    last = tmp_path / "out" / "request-2"
    assert unlearn(last, tmp_path / "none", "--method", "ga", "--forget", forget) == 2
    assert "answers through a method's wrapper" in refused(capfd)


def test_evaluation_on_the_way_stops_and_keeps(
    tiny_base: Path, tmp_path: Path, forget: Path, retain: Path, capfd: Any
) -> None:
    suite = make_muse_folder(tmp_path / "suite", n=3)
    scores = tmp_path / "scores"
    asked = ("--model", tiny_base, "--suite", suite, "--output_dir", scores)
    assert evaluate("muse", *asked) == 0
    watch = (
        "--forget", forget, "--retain", retain, "--eval_suite", suite, "--retrain_scores", scores,
        "--max_steps", -1, "--num_train_epochs", 3,
    )  # fmt: skip
    # The "retrained" model knows of the forget set what the model knows: reached at once.
    stop = ("--stop_when", "forget_at_retrain", "--keep", "best", "--learning_rate", 1e-9)
    assert unlearn(tiny_base, tmp_path / "out", *watch, *stop) == 0
    report = report_of(tmp_path / "out")
    assert (list(report["standings"]), report["kept_epoch"]) == (["1"], 1)
    assert "On the way" in (tmp_path / "out" / "README.md").read_text()
    # A floor that is given goes before the retrained model's.
    for floor, epochs in ((0.0, ["1", "2", "3"]), (1.0, ["1"])):
        stop = ("--stop_when", "utility_floor", "--utility_floor", floor)
        assert unlearn(tiny_base, tmp_path / str(floor), *watch, *stop) == 0
        assert list(report_of(tmp_path / str(floor))["standings"]) == epochs
    # Scores of another suite say nothing here.
    capfd.readouterr()
    given = ("--forget", forget, "--retain", retain, "--eval_suite", "demo")
    assert unlearn(tiny_base, tmp_path / "none", *given, "--retrain_scores", scores) == 2
    assert "was made with another data" in refused(capfd)


def test_json_is_all_that_is_printed(
    tiny_base: Path, tmp_path: Path, forget: Path, retain: Path, capfd: Any
) -> None:
    suite = make_muse_folder(tmp_path / "suite", n=3)
    more = write(tmp_path / "more.jsonl", ROWS[14:20])
    data = ("--forget", forget, more, "--sequential", "--retain", retain, "--eval_suite", suite)
    assert unlearn(tiny_base, tmp_path / "out", *data, "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    assert [one["forget_records"] for one in printed] == [4, 6]
    assert printed[1] == report_of(tmp_path / "out" / "request-2")
    texts = json.dumps(printed) + (tmp_path / "out" / "request-2" / "README.md").read_text()
    assert not any(row["prompt"] in texts or row["subject"] in texts for row in ROWS)


def test_a_file_of_flags(tiny_base: Path, tmp_path: Path, forget: Path, retain: Path) -> None:
    """The command line wins over the file, the file over the method's paper."""
    config, out = tmp_path / "flags.yaml", tmp_path / "out"
    config.write_text(
        f"method: simnpo\nforget: {forget}\nretain: {retain}\nmodel_name_or_path: {tiny_base}\n"
        f"output_dir: {out}\nbeta: 3.5\ndelta: 0.25\nweight_decay: 5e-2\nlearning_rate: 1e-3\n"
        "max_steps: 2\nmax_length: 64\nuse_cpu: true\n"
    )
    assert load_method("simnpo").preset["learning_rate"] != 1e-3
    assert exit_code_of(lambda: main(["--config", str(config), "--delta", "0.75"])) == 0
    report = report_of(out)
    assert report["method"] == "simnpo"
    assert (report["flags"]["beta"], report["flags"]["delta"]) == (3.5, 0.75)
    training = report["training"]
    assert (training["weight_decay"], training["learning_rate"]) == (0.05, 1e-3)
    # A list on the command line replaces the file's, and so does a method.
    more = write(tmp_path / "more.jsonl", ROWS[14:17])
    config.write_text(config.read_text().replace("beta: 3.5\ndelta: 0.25\n", ""))
    given = ["--config", str(config), "--forget", str(more), "--method", "npo"]
    assert exit_code_of(lambda: main(given)) == 0
    assert (report_of(out)["forget_records"], report_of(out)["method"]) == (3, "npo")


def test_without_data_it_is_the_demonstration(tmp_path: Path, capfd: Any) -> None:
    """The file wins over what the demonstration is started with."""
    config = tmp_path / "flags.yaml"
    config.write_text("max_steps: 1\nmethod: graddiff\nlearning_rate: 1e-7\n")
    given = ["--config", str(config), "--model_name_or_path", str(MODEL_PATH), "--max_length", "32"]
    assert exit_code_of(lambda: main(given)) == 0
    report = report_of(tmp_path / "runs" / "unlearned")
    training = report["training"]
    assert (training["max_steps"], training["learning_rate"], training["max_length"]) == (
        1,
        1e-7,
        32,
    )
    assert training["per_device_train_batch_size"] == UNLEARNING["per_device_train_batch_size"]
    assert report["forget_records"] == 72 and report["method"] == "graddiff"
    shown = capfd.readouterr().out
    assert "Facts answered right" in shown and "public people" in shown


def test_a_loss_that_is_no_number(
    tiny_base: Path, tmp_path: Path, forget: Path, retain: Path, capfd: Any
) -> None:
    out, data = tmp_path / "out", ("--forget", forget, "--retain", retain)
    wild = ("--learning_rate", 1e30, "--max_grad_norm", 0, "--max_steps", 4)
    assert unlearn(tiny_base, out, *data, *wild) == 1
    said = refused(capfd)
    assert "the loss was no number at step" in said and "lower --learning_rate" in said
    model = PeftModel.from_pretrained(load_tiny(tiny_base)[0], str(out))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert "Training diverged" in (out / "README.md").read_text()
    # The same place is free for another try.
    assert unlearn(tiny_base, out, *data) == 0
    assert report_of(out)["diverged_at"] is None


def test_interrupted_it_goes_on(
    tiny_base: Path, tmp_path: Path, forget: Path, retain: Path, capfd: Any, monkeypatch: Any
) -> None:
    from llm_unlearn.approximate.trainer import UnlearningTrainer

    original = UnlearningTrainer.training_step

    def break_off(self: Any, *given: Any, **named: Any) -> Any:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return original(self, *given, **named)

    given = ("--forget", forget, "--retain", retain, "--max_steps", -1, "--num_train_epochs", 3)
    assert unlearn(tiny_base, tmp_path / "whole", *given) == 0
    monkeypatch.setattr(UnlearningTrainer, "training_step", break_off)
    assert unlearn(tiny_base, tmp_path / "parts", *given) == 130
    assert "run the same command again" in capfd.readouterr().err
    assert not (tmp_path / "parts" / REPORT).exists()
    monkeypatch.setattr(UnlearningTrainer, "training_step", original)
    # Another request does not throw away what it has done.
    assert unlearn(tiny_base, tmp_path / "parts", *given, "--seed", 7) == 2
    assert "another request that was interrupted" in refused(capfd)
    assert unlearn(tiny_base, tmp_path / "parts", *given) == 0
    whole, parts = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert whole == parts


@pytest.mark.parametrize("name", METHODS)
def test_flags_of_every_method_can_be_given(name: str) -> None:
    """None has the name of another flag, and help can be printed."""
    from trl import ModelConfig, TrlParser

    from llm_unlearn.approximate.arguments import UnlearningConfig
    from llm_unlearn.unlearning import RequestArguments

    method = load_method(name)
    types: Any = [RequestArguments, UnlearningConfig, ModelConfig, method]
    parser = TrlParser(types, allow_abbrev=False)
    shown = parser.format_help()
    assert all(f"--{one.name}" in shown and one.metadata["help"] for one in fields(method))


def test_help_is_quick_for_every_method() -> None:
    """It imports nothing heavy, and shows what the method is and its own flags."""
    command = (
        "import runpy, sys\n"
        "from llm_unlearn.approximate.methods import METHODS\n"
        "for given in ([], *(['--method', name] for name in METHODS)):\n"
        "    sys.argv = ['unlearn.py', *given, '--help']\n"
        "    try:\n"
        f"        runpy.run_path(r'{ROOT / 'recipes' / 'unlearn.py'}', run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, given\n"
        "    print('=' * 9)\n"
        "    heavy = {'torch', 'transformers', 'trl', 'peft', 'scipy', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, (given, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    general, *shown = done.stdout.split("=" * 9 + "\n")[:-1]
    assert len(shown) == len(METHODS) and "--help_all" in general
    for name, told in zip(METHODS, shown, strict=True):
        method = load_method(name)
        assert f"    {name} " in general and method.card.title in general
        flat = " ".join(told.split())
        for part in (method.card.title, method.card.fails_when, method.card.source):
            assert " ".join(part.split()) in flat
        for one in fields(method):
            assert f"--{one.name} " in told and " ".join(one.metadata["help"].split()) in flat
        assert max(map(len, told.splitlines())) <= 100
