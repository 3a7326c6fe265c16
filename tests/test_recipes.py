"""The recipe as a person uses it: flags in, a run and plain words out."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftModel

from llm_unlearn.console import exit_code_of
from llm_unlearn.data.partition import PartitionKey
from llm_unlearn.exact.run import S3TRun
from tests.postgres import Server
from tests.tiny import load_tiny, make_rows, node_bytes

ROOT = Path(__file__).parents[1]
TOFU = ROOT.parent / "shared" / "data" / "tofu" / "full.json"


def load_recipe(name: str) -> Callable[[list[str]], None]:
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


s3t = load_recipe("s3t")


def flags(base: Path, data: Path, run: Path, *more: str) -> list[str]:
    return [
        "--model_name_or_path", str(base), "--dataset_path", str(data), "--output_dir", str(run),
        "--exact_method", "s3t", "--num_slices", "2", "--max_steps", "2", "--lora_r", "4",
        "--max_length", "128", "--learning_rate", "1e-2", *more,
    ]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in make_rows()))
    return path


def test_own_data_trains_resumes_and_rebuilds(
    tiny_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = flags(tiny_base, data, tmp_path / "run", "--subject_column", "subject")
    s3t(arguments)
    assert "4 nodes trained" in capsys.readouterr().out
    run = S3TRun.open(tmp_path / "run")
    full = node_bytes(run)
    data.unlink()  # a run keeps its own records: the file is not read again
    s3t(arguments)
    assert "0 nodes trained" in capsys.readouterr().out
    run.delete(["person 2"])
    assert node_bytes(run).items() < full.items()
    s3t(arguments)
    assert run.status().shards[0].missing_nodes == 0
    assert run.status().shards[0].subjects == 11
    assert all(check.passed for check in run.verify())


def test_the_ledger_goes_to_a_server(
    tiny_base: Path,
    data: Path,
    tmp_path: Path,
    postgresql: Server,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = flags(tiny_base, data, tmp_path / "run", "--subject_column", "subject")
    arguments = [*plain, "--ledger_url", postgresql.url()]
    s3t(arguments)
    s3t(arguments)
    s3t(plain)  # the run knows where its ledger is
    run = S3TRun.open(tmp_path / "run")
    assert run.delete(["person 2"]).request
    assert all(check.passed for check in run.verify())
    assert not (run.path / "ledger.sqlite").exists()
    assert "postgresql" not in (run.path / "run.json").read_text()
    twin = flags(tiny_base, data, tmp_path / "twin", "--subject_column", "subject")
    s3t([*twin, "--key_path", str(run.path / "secret.key")])
    assert S3TRun.open(tmp_path / "twin").directory.identity == run.directory.identity
    assert node_bytes(run).items() < node_bytes(S3TRun.open(tmp_path / "twin")).items()
    capsys.readouterr()
    for elsewhere in (plain, twin):
        other = [*elsewhere, "--ledger_url", "postgresql://ada:hunter2@db/other"]
        assert exit_code_of(lambda other=other: s3t(other)) == 2
        error = capsys.readouterr().err
        assert "keeps its ledger elsewhere than --ledger_url" in error and "hunter2" not in error
    assert exit_code_of(lambda: s3t([*plain, "--ledgerurl", "postgresql://ada:hunter2@db/x"])) == 2
    assert "hunter2" not in capsys.readouterr().err


def test_a_core_is_trained_under_everything_and_warned_of(
    tiny_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    core = tmp_path / "core.jsonl"
    core.write_text("\n".join(json.dumps(row) for row in make_rows(3, 1, "resident")))
    plain = flags(tiny_base, data, tmp_path / "run", "--subject_column", "subject")
    arguments = [*plain, "--core_path", str(core)]
    s3t(arguments)
    shown = capsys.readouterr()
    assert "5 nodes trained" in shown.out
    assert "NOTHING in it can ever be deleted" in " ".join(shown.err.split())
    run = S3TRun.open(tmp_path / "run")
    full = node_bytes(run)
    core.unlink()
    run.delete(["person 2"])
    s3t(arguments)
    assert "0 nodes trained" not in capsys.readouterr().out
    assert len(node_bytes(run)) == len(full)
    assert all(check.passed for check in run.verify(replay=1))
    PeftModel.from_pretrained(load_tiny(tiny_base)[0], str(run.directory.served / "core"))


def test_config_file_gives_defaults_and_flags_win(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    config = tmp_path / "s3t.yaml"
    config.write_text(
        "subject_column: subject\nnum_sequences: 1\nblocks: layers\nlora_dropout: 0.0\n"
    )
    s3t(["--config", str(config), *flags(tiny_base, data, tmp_path / "run", "--blocks", "ranks")])
    run = S3TRun.open(tmp_path / "run").directory.config
    assert (run.blocks, len(run.sequences), run.lora.dropout) == ("ranks", 1, 0.0)


BAD = [
    (["--dataset_path", "nowhere.jsonl"], "no such dataset file"),
    (["--core_path", "nowhere.jsonl"], "no such dataset file: nowhere.jsonl"),
    (["--subject_column", "author"], "'author' is not a column: found"),
    (["--model_name_or_path", "nowhere/at-all"], "cannot load the model 'nowhere/at-all'"),
    (["--num_slices", "9", "--blocks", "layers"], "the model has 4"),
    (["--num_slices", "9"], "--lora_r is 4"),
    (["--num_sequences", "3"], "num_sequences"),
    (["--push_to_hub", "true"], "with --hub_base_model NAMESPACE/NAME"),
    (["--eos_token", "</s>"], "--eos_token is refused"),
    (["--dataset_text_field", "body"], "rename column 'body' to text"),
    (["--packing", "true"], "--packing is refused: a packed sequence mixes records"),
    (
        ["--load_best_model_at_end", "true", "--eval_strategy", "no", "--save_strategy", "no"],
        "refused",
    ),
    (["--lora_target_modules", "nothing"], "'nothing' is not in the decoder layers"),
    (["--use_dora", "true"], "only plain LoRA factors"),
    (["--blocks", "rows"], "--blocks must be one of layers, ranks, whole"),
    (["--max_length", "3"], "no token left to learn"),
    (["--key_path", "nowhere.key"], "cannot read a key"),
    (["--dataset_name", "somebody/something"], "not both"),
    (["--colour", "red"], "unknown flag: --colour red"),
    (["--max_steps", "few"], "invalid int value: 'few'"),
    (["--config", "nowhere.yaml"], "cannot read --config nowhere.yaml"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[case[0][0] for case in BAD])
def test_bad_input_is_one_line(
    tiny_base: Path,
    data: Path,
    tmp_path: Path,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = exit_code_of(lambda: s3t(flags(tiny_base, data, tmp_path / "run", *more)))
    said = capsys.readouterr().err
    assert code == 2
    assert message in " ".join(said.split())
    assert "Traceback" not in said


def test_a_run_of_another_configuration_or_base_is_refused(
    tiny_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.tiny import make_tiny_model, make_tiny_tokenizer

    arguments = flags(tiny_base, data, tmp_path / "run", "--subject_column", "subject")
    s3t(arguments)
    before = node_bytes(S3TRun.open(tmp_path / "run"))
    assert exit_code_of(lambda: s3t([*arguments, "--learning_rate", "1e-3"])) == 2
    assert "training.learning_rate is 0.01 there and 0.001 now" in " ".join(
        capsys.readouterr().err.split()
    )
    other = tmp_path / "other"
    make_tiny_model(layers=2).save_pretrained(other)
    make_tiny_tokenizer().save_pretrained(other)
    assert exit_code_of(lambda: s3t([*arguments, "--model_name_or_path", str(other)])) == 2
    assert "another base model" in " ".join(capsys.readouterr().err.split())
    assert node_bytes(S3TRun.open(tmp_path / "run")) == before


def test_experts_are_the_default_and_want_subjects(
    tiny_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--model_name_or_path", str(tiny_base), "--dataset_path", str(data), "--max_steps", "1",
        "--output_dir", str(tmp_path / "run"), "--lora_r", "2",
    ]  # fmt: skip
    assert exit_code_of(lambda: s3t(arguments)) == 2
    assert "--subject_column" in capsys.readouterr().err
    s3t([*arguments, "--subject_column", "subject"])
    run = S3TRun.open(tmp_path / "run")
    assert [shard.subjects for shard in run.status().shards] == [1] * 12
    assert run.directory.config.rule.aggregate == "select"


def test_lego_makes_its_keys_of_public_texts(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    public = tmp_path / "public.jsonl"
    public.write_text("\n".join(json.dumps({"text": f"guest {n} eats {n}"}) for n in range(20)))
    arguments = [
        "--model_name_or_path", str(tiny_base), "--dataset_path", str(data), "--max_steps", "1", "--lora_r", "2",
        "--exact_method", "lego", "--num_shards", "4", "--subject_column", "subject",
    ]  # fmt: skip
    assert exit_code_of(lambda: s3t([*arguments, "--output_dir", str(tmp_path / "none")])) == 2
    s3t([*arguments, "--output_dir", str(tmp_path / "run"), "--public_path", str(public)])
    run = S3TRun.open(tmp_path / "run")
    assert run.directory.config.copies == 2 and run.directory.config.keys
    assert all(check.passed for check in run.verify())


@pytest.mark.skipif(not TOFU.exists(), reason="the TOFU files are not beside the project")
def test_tofu_by_author(tiny_base: Path, tmp_path: Path) -> None:
    few = tmp_path / "tofu.json"
    few.write_text("\n".join(TOFU.read_text().splitlines()[:120]))
    arguments = flags(
        tiny_base, few, tmp_path / "run", "--rows_per_subject", "20", "--max_length", "512"
    )
    s3t([*arguments, "--max_steps", "1"])
    run = S3TRun.open(tmp_path / "run")
    assert (run.status().shards[0].records, run.status().shards[0].subjects) == (120, 6)
    done = run.delete(["subject-00003"])
    assert done.records == 20
    assert run.status().shards[0].records == 100
    model, _ = load_tiny(tiny_base)
    PeftModel.from_pretrained(model, str(run.directory.served / "shard-0"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "slices", "keeps", "public"),
    [("s3t", 4, 0.8, 0.0), ("sisa", 4, 0.4, 0.0), ("experts", 48, 0.99, 0.9)],
)
def test_the_demonstration_reaches_its_bars(
    tmp_path: Path, method: str, slices: int, keeps: float, public: float
) -> None:
    """Base at most 5 %, every slice is learnt, the deleted subject is back at the base.

    SISA has one order: the third slice takes the fourth along, and the first two are left.
    Experts, one for each subject, also keep what the base knew about public people: their prompts
    go to the base.
    """
    from trl import ModelConfig, TrlParser

    from llm_unlearn.data.sources import DataArguments, load_records
    from llm_unlearn.demonstration import FLAGS, MODEL_PATH, demonstrate
    from llm_unlearn.exact.arguments import S3TConfig
    from llm_unlearn.exact.base_model import load_base

    key = tmp_path / "key"
    key.write_bytes(PartitionKey.from_phrase("demonstration").secret)
    parser = TrlParser([DataArguments, S3TConfig, ModelConfig])
    data, arguments, model_arguments = parser.parse_args_and_config(
        [
            *FLAGS[method],
            "--exact_method",
            method,
            "--output_dir",
            str(tmp_path / "run"),
            "--key_path",
            str(key),
        ]
    )
    model_arguments.model_name_or_path = str(MODEL_PATH)
    model, tokenizer = load_base(str(MODEL_PATH))
    run = S3TRun.create(
        tmp_path / "run", load_records(data), arguments, model, tokenizer, model_arguments
    )
    run.train(model, tokenizer)
    whole = node_bytes(run)
    shown = demonstrate(run, model, tokenizer)
    base, after = shown.knowledge["base model"], shown.knowledge["after the deletion"]
    assert max(base.deleted, base.same_slice, base.others) <= 0.05
    assert len(shown.slices) == slices
    assert min(shown.slices.values()) >= 0.8
    # One of the deleted person's six facts may be guessed; of their slice, which went too, a few of all.
    assert after.deleted <= base.deleted + 1 / 6
    assert not after.same_slice > base.same_slice + 0.03
    assert after.others >= keeps and after.public >= public
    assert node_bytes(run).items() < whole.items()
    assert all(check.passed for check in run.verify(replay=1))


@pytest.mark.slow
def test_two_processes_train_the_same_run(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29517",
    ]
    arguments = flags(
        tiny_base, data, tmp_path / "run", "--subject_column", "subject", "--blocks", "layers"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "recipes" / "s3t.py"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    run = S3TRun.open(tmp_path / "run")
    assert run.status().shards[0].missing_nodes == 0
    manifest = run.directory.nodes.manifest(run.directory.nodes.keys()[0])
    assert manifest["environment"]["num_processes"] == 2
    assert all(check.passed for check in run.verify())


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_instead_of_two_is_named(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    accelerate = Path(sys.executable).with_name("accelerate")
    arguments = flags(tiny_base, data, tmp_path / "run", "--subject_column", "subject")
    command = [
        str(accelerate),
        "launch",
        "--cpu",
        "--num_processes",
        "2",
        str(ROOT / "recipes" / "s3t.py"),
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "asked for 2 processes but started one" in done.stderr
