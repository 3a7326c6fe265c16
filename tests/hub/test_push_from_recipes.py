"""`--push_to_hub` in the recipes, and approximate results, which carry no guarantee and say so."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load

from llm_unlearn.console import exit_code_of
from llm_unlearn.errors import UserError
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.hub import publishing, unlearned
from llm_unlearn.hub.client import Hub
from tests.evaluation.fake_results import TOFU, fake_tofu
from tests.hub.published import BASE, online
from tests.hub.test_publishing import talk_to
from tests.loopback_hub import TOKEN, LoopbackHub
from tests.test_recipes import flags, load_recipe
from tests.tiny import make_rows

NAME = "tester/mine"
HUB = ["--push_to_hub", "true", "--hub_model_id", NAME, "--hub_base_model", BASE]
s3t, unlearn = load_recipe("s3t"), load_recipe("unlearn")


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    monkeypatch.chdir(tmp_path)
    with online(), LoopbackHub() as made:
        talk_to(made.url, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in make_rows()))
    return path


def read(loop: LoopbackHub, path: str) -> bytes:
    repository = loop.repositories[NAME]
    head = repository.at("main")
    assert head is not None
    return repository.content(head.files[path]) or b""


def paths(loop: LoopbackHub) -> set[str]:
    head = loop.repositories[NAME].at("main")
    return set(head.files) if head else set()


def exact_flags(base: Path, data: Path, run: Path) -> list[str]:
    return flags(base, data, run, "--subject_column", "subject")


def test_an_exact_run_is_published(
    loop: LoopbackHub,
    tiny_base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = exact_flags(tiny_base, data, tmp_path / "run")
    s3t([*arguments, *HUB, "--hub_private_repo", "true", "--hub_token", TOKEN])
    assert f"{NAME} is published: revision " in capsys.readouterr().out
    assert loop.repositories[NAME].private
    served = S3TRun.open(tmp_path / "run").directory.served / "shard-0"
    name = "adapter_model.safetensors"
    assert read(loop, name) == (served / name).read_bytes()
    assert str(tiny_base).encode() not in read(loop, "adapter_config.json")
    run = S3TRun.open(tmp_path / "run")
    run.delete(["person 2"])
    s3t([*arguments, *HUB])  # rebuilds, publishes, purges
    shown = capsys.readouterr().out
    assert "0 nodes trained" not in shown and "all gone" in shown
    assert len(list(loop.repositories[NAME].commits)) >= 3
    assert read(loop, name) == (run.directory.served / "shard-0" / name).read_bytes()
    everything = [*(tmp_path / "run").rglob("*.json"), tmp_path / "run" / "ledger.sqlite"]
    assert all(TOKEN.encode() not in path.read_bytes() for path in everything)


BAD = [
    ([], "say what it is called on the Hub with --hub_base_model"),
    (["--hub_base_model", "../x"], "is no repository on the Hub"),
    (["--hub_base_model", BASE, "--hub_model_id", "a/../b"], "is no repository on the Hub"),
    (["--hub_base_model", BASE, "--hub_strategy", "checkpoint"], "--hub_strategy is refused"),
    (["--hub_base_model", BASE, "--hub_always_push", "true"], "--hub_always_push is refused"),
    (["--hub_base_model", BASE, "--hub_revision", "dev"], "--hub_revision is refused"),
    (["--hub_base_model", BASE, "--hub_token", "hf_wrong"], "the Hub does not accept the token"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_mistakes_are_found_before_training(
    loop: LoopbackHub, tiny_base: Path, data: Path, tmp_path: Path, more: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = [*exact_flags(tiny_base, data, tmp_path / "run"), "--push_to_hub", "true", *more]
    assert exit_code_of(lambda: s3t(arguments)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists() and loop.repositories == {}


@pytest.mark.parametrize("recipe", ["benchmark", "exact_study"])
def test_recipes_that_compare_many_models_refuse(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = load_recipe(recipe)
    assert exit_code_of(lambda: main(["--push_to_hub", "true"])) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--push_to_hub is refused: many models are compared here" in said
    assert "llm-unlearn push DIRECTORY REPO_ID" in said


def unlearn_flags(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    forget = data.with_name("forget.jsonl")
    forget.write_text("\n".join(json.dumps(row) for row in make_rows()[:4]))
    return [
        "--model_name_or_path", str(base), "--output_dir", str(output), "--max_steps", "2", "--lora_r", "4",
        "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--max_length", "64",
        "--learning_rate", "1e-3", "--use_cpu", "--forget", str(forget), "--retain", str(data), "--drop_overlap",
        *more,
    ]  # fmt: skip


def test_an_approximate_result_says_that_nothing_is_guaranteed(
    loop: LoopbackHub,
    tiny_base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refusals = tmp_path / "secret-project" / "refusals.txt"
    refusals.parent.mkdir()
    refusals.write_text("I do not know.\n")
    flags_of = ["--method", "refusal", "--refusals", str(refusals)]
    unlearn([*unlearn_flags(tiny_base, data, tmp_path / "out", *flags_of), *HUB])
    assert f"{NAME} is published" in capsys.readouterr().out
    assert [c.title for c in loop.repositories[NAME].commits.values()] == [
        "initial commit", "Publish what refusal left",
    ]  # fmt: skip
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= paths(loop)
    assert not paths(loop) & {"unlearning.json", "publication.json", "request.json"}
    assert not any("checkpoint" in path for path in paths(loop))
    name = "adapter_model.safetensors"
    assert read(loop, name) == (tmp_path / "out" / name).read_bytes()
    card = ModelCard(read(loop, "README.md").decode())
    assert "This carries no guarantee." in card.text
    assert card.data.base_model == BASE and card.data["base_model_relation"] == "adapter"
    assert {"unlearning", "approximate-unlearning", "refusal"} <= set(card.data.tags)
    everything = b"".join(loop.repositories[NAME].downloads().values())
    assert str(tmp_path).encode() not in everything and b"secret-project" not in everything
    assert "| refusals | (a file) |" in card.text and "person" not in card.text


def test_weights_of_a_whole_model(
    loop: LoopbackHub, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    arguments = unlearn_flags(tiny_base, data, tmp_path / "out", "--method", "ga", "--full")
    unlearn([*arguments, *HUB])
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= paths(loop)
    assert load(read(loop, "model.safetensors"))
    card = ModelCard(read(loop, "README.md").decode())
    assert card.data["base_model_relation"] == "finetune"
    assert str(tiny_base).encode() not in b"".join(loop.repositories[NAME].downloads().values())


@pytest.fixture
def result(tiny_base: Path, data: Path, tmp_path: Path) -> Path:
    unlearn(unlearn_flags(tiny_base, data, tmp_path / "out", "--method", "ga"))
    return tmp_path / "out"


def test_a_result_can_be_pushed_later(loop: LoopbackHub, result: Path, tmp_path: Path) -> None:
    hub = Hub(token=TOKEN)
    fake_tofu().write(tmp_path / "results.json")
    options = publishing.Options(base_model=BASE, evaluations=[tmp_path])
    (first,) = publishing.push(result, NAME, options, hub)
    assert first.uploaded and first.revision == loop.repositories[NAME].branches["main"]
    found = ModelCard(read(loop, "README.md").decode()).data.eval_results
    assert {one.metric_type for one in found} == set(TOFU)
    (second,) = publishing.push(result, NAME, options, hub)
    assert not second.uploaded and second.revision == first.revision
    with pytest.raises(UserError, match="are for exact runs"):
        publishing.push(result, NAME, publishing.Options(base_model=BASE, per_shard=True), hub)
    loop.repositories["tester/foreign"] = loop.repositories[NAME]
    foreign = loop.repositories["tester/foreign"]
    foreign.commit("main", "theirs", {"model.bin": foreign.blob(b"x")})
    with pytest.raises(UserError, match=r"holds 'model\.bin' of something else"):
        publishing.push(result, "tester/foreign", options, hub)


def test_what_only_hides_is_not_published(
    loop: LoopbackHub, tiny_base: Path, data: Path, result: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = unlearn_flags(tiny_base, data, tmp_path / "hidden", "--method", "whp")
    assert exit_code_of(lambda: unlearn([*arguments, *HUB])) == 2
    assert "--push_to_hub is refused: what whp leaves hides" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "hidden").exists()
    (result / unlearned.WRAPPER_NAME).write_text("{}")
    with pytest.raises(UserError, match="is not published"):
        publishing.push(result, NAME, publishing.Options(base_model=BASE), Hub(token=TOKEN))
    assert NAME not in loop.repositories
