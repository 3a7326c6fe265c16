"""Exports: they answer as what is served does, carry their lineage, and none is left behind unknown."""

import errno
import json
import math
import os
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llm_unlearn.data.partition import SliceName
from llm_unlearn.digests import tensors_digest, tokenizer_digest
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact import copies
from llm_unlearn.exact.adapters import (
    CONFIG_NAME,
    LORA_A,
    LORA_B,
    PREFIX,
    WEIGHTS_NAME,
    file_digest,
)
from llm_unlearn.exact.arguments import make_config, make_shape
from llm_unlearn.exact.copies import known, outstanding, statuses
from llm_unlearn.exact.copy_actions import UNFINISHED, delete_export
from llm_unlearn.exact.ensemble import ShardEnsemble
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.served import LINEAGE_NAME, read_lineage
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.export import making, merged
from llm_unlearn.export.adapters import Adapter, combine, plain
from llm_unlearn.export.making import KINDS, RANKS, Export, export
from tests.exact.killing import in_child, kill_at
from tests.tiny import (
    core_records,
    load_tiny,
    make_run,
    make_stub_run,
    make_tiny_model,
    make_tiny_tokenizer,
    make_trained_stub,
    stubbed_training,
    tiny_arguments,
    tiny_model_arguments,
    tiny_records,
)

IDS = torch.tensor([[5, 9, 44, 100, 7, 200, 31, 2], [3, 3, 61, 8, 250, 19, 77, 12]])
SMALL: dict[str, Any] = {"num_slices": 2, "num_sequences": 1}


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def load(path: Path | str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


def base_of(run: S3TRun) -> PreTrainedModel:
    return load(run.directory.shape.name_or_path)


def with_served(run: S3TRun, member: str = "shard-0") -> torch.Tensor:
    """What a user of PEFT gets from the run itself."""
    return logits_of(PeftModel.from_pretrained(base_of(run), str(run.directory.served / member)))


def assert_same(got: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> None:
    """Equal but for rounding, where the adapter makes a difference a thousand times as large."""
    scale = expected.abs().max()
    assert (got - expected).abs().max() < 1e-4 * scale
    assert (expected - base).abs().max() > 1e-2 * scale


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained_stub(tmp_path_factory.mktemp("export") / "run", num_shards=2, **SMALL)


@pytest.fixture
def run(stub: Path, tmp_path: Path) -> RunDirectory:
    shutil.copytree(stub, tmp_path / "run", symlinks=True)
    return RunDirectory.open(tmp_path / "run")


def trained(tmp_path: Path, family: str = "llama", **options: Any) -> S3TRun:
    """A run on a model of a family."""
    base = tmp_path / "base"
    make_tiny_model(family).save_pretrained(base)
    make_tiny_tokenizer().save_pretrained(base)
    return make_run(tmp_path / "run", base, **{**SMALL, **options})


def delete_last(run: S3TRun) -> None:
    """Delete somebody whose slice comes last in its shard, so that a block is left."""
    last = run.directory.config.sequences[0][-1]
    run.delete([min(run.directory.slices.subjects(SliceName(0, last)))])


CASES: dict[str, dict[str, Any]] = {
    "ranks": {},
    "layers": {"blocks": "layers"},
    "rank-stabilised": {"lora": {"use_rslora": True, "lora_r": 5}},
    "layers on a core": {"blocks": "layers", "core": core_records()},
    "odd scale": {"lora": {"lora_r": 6, "lora_alpha": 7}},
    "gpt2": {"family": "gpt2"},
    "gpt_neox": {"family": "gpt_neox"},
    "phi3": {"family": "phi3"},
    "qwen3": {"family": "qwen3"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_exports_answer_as_what_is_served(tmp_path: Path, case: str) -> None:
    run = trained(tmp_path, **CASES[case])
    delete_last(run)
    base, served = logits_of(base_of(run)), with_served(run)
    one = export(run.directory, "merged", tmp_path / "one")
    assert_same(logits_of(load(one.place)), served, base)
    ready = export(run.directory, "gguf-ready", tmp_path / "ready")
    assert_same(logits_of(load(ready.place)), served, base)
    several = export(run.directory, "vllm", tmp_path / "several")
    (adapter,) = [name for name in several.adapters if name.startswith("shard-0@")]
    for place in (several.place / adapter, *(ready.place / name for name in ready.adapters)):
        assert_same(logits_of(PeftModel.from_pretrained(base_of(run), str(place))), served, base)
    assert ready.adapters == ([] if case == "gpt2" else ["lora"])


def strict_updates(directory: Path, own_rank: bool = False) -> dict[str, np.ndarray]:
    """What a loader adds that knows no pattern: vLLM, or (by each module's own rank) llama.cpp."""
    config = json.loads((directory / CONFIG_NAME).read_text())
    tensors = load_file(directory / WEIGHTS_NAME)
    names = [name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)]
    updates = {}
    for name in names:
        a, b = tensors[name + LORA_A], tensors[name + LORA_B]
        scale = config["lora_alpha"] / (len(a) if own_rank else config["r"])
        updates[name.removeprefix(PREFIX)] = scale * (b @ a)
    return updates


def peft_updates(run: S3TRun, member: str) -> dict[str, np.ndarray]:
    model = PeftModel.from_pretrained(base_of(run), str(run.directory.served / member))
    return {
        name.removeprefix(PREFIX): module.get_delta_weight("default").detach().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("case", ["layers on a core", "rank-stabilised"])
def test_loaders_without_patterns_get_it_right(tmp_path: Path, case: str) -> None:
    run = trained(tmp_path, **CASES[case])
    delete_last(run)
    expected = peft_updates(run, "shard-0")
    served = strict_updates(run.directory.served / "shard-0", own_rank=True)
    assert any(not np.allclose(served[name], expected[name], rtol=1e-3) for name in expected)
    done = export(run.directory, "vllm", tmp_path / "out", shard=0)
    for own_rank in (False, True):
        got = strict_updates(done.place / done.adapters[0], own_rank)
        assert got.keys() == expected.keys()
        for name, update in expected.items():
            most = 1e-6 * np.abs(update).max()
            np.testing.assert_allclose(got[name], update, rtol=1e-5, atol=most)
    config = json.loads((done.place / done.adapters[0] / CONFIG_NAME).read_text())
    tensors = load_file(done.place / done.adapters[0] / WEIGHTS_NAME)
    ranks = {len(held) if LORA_A in name else held.shape[1] for name, held in tensors.items()}
    assert ranks == {config["r"]}
    assert not config["use_rslora"] and not config["use_dora"] and config["bias"] == "none"
    assert not {"rank_pattern", "alpha_pattern", "modules_to_save"} & {
        k for k in config if config[k]
    }


def test_filling_up_with_zeros_changes_no_bit_of_the_rest() -> None:
    generator = np.random.default_rng(0)
    sizes = {"layers.0.up": 4, "layers.1.up": 2}
    tensors = {
        PREFIX + name + end: generator.standard_normal(shape).astype(np.float32)
        for name, rank in sizes.items()
        for end, shape in ((LORA_A, (rank, 8)), (LORA_B, (6, rank)))
    }
    config = {
        "r": 4, "lora_alpha": 8, "use_rslora": False, "layers_to_transform": [0, 1], "target_modules": ["up"],
        "rank_pattern": {"layers.1.up": 2}, "alpha_pattern": {"layers.1.up": 4},
    }  # fmt: skip
    filled = plain(Adapter(tensors, config))
    assert (filled.rank, filled.config["lora_alpha"]) == (4, 8)
    for name, tensor in tensors.items():
        assert np.array_equal(filled.tensors[name][: tensor.shape[0], : tensor.shape[1]], tensor)
        assert filled.tensors[name].size == 4 * (8 if name.endswith(LORA_A) else 6)
        assert filled.tensors[name].sum(dtype=float) == tensor.sum(dtype=float)
    other = plain(Adapter(tensors, config | {"alpha_pattern": {"layers.1.up": 6}}))
    assert other.scale("layers.1.up") == other.scale("layers.0.up") == 3.0
    for name, factor in (("layers.0.up", 2 / 3), ("layers.1.up", 1.0)):
        held = other.tensors[PREFIX + name + LORA_B][:, : sizes[name]]
        assert np.array_equal(held, tensors[PREFIX + name + LORA_B] * np.float32(factor))
    halves = combine([Adapter(tensors, config)] * 2, [0.5, 0.5])
    assert halves.rank == 8 and halves.scale("layers.0.up") == 1.0


def test_merging_rounds_once(tmp_path: Path) -> None:
    """In a model of bfloat16 the sum is made in float32; each weight is the nearest that there is."""
    base = tmp_path / "base"
    make_tiny_model().to(torch.bfloat16).save_pretrained(base)
    make_tiny_tokenizer().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    arguments = tiny_model_arguments(base, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(base)
    run = S3TRun(
        RunDirectory.create(
            tmp_path / "run",
            tiny_records(),
            make_config(tiny_arguments(prefix_cache=False, **SMALL), arguments),
            make_shape(model, tokenizer, arguments),
        )
    )
    with stubbed_training():
        run.train(model, tokenizer)
    updates = strict_updates(run.directory.served / "shard-0")
    done = load(export(run.directory, "merged", tmp_path / "out").place)
    assert done.dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (
        "--outtype bf16"
        in (export(run.directory, "gguf-ready", tmp_path / "g").place / "README.md").read_text()
    )
    moved, others, twice = 0, 0, 0
    for name, parameter in model.named_parameters():
        update = updates.get(name.removesuffix(".weight"), 0.0)
        exact = parameter.double() + torch.as_tensor(update, dtype=torch.float64)
        nearest = exact.to(torch.bfloat16)
        others += int((done.get_parameter(name) != nearest).sum())  # ties, in float32
        twice += int((parameter + torch.as_tensor(update).to(torch.bfloat16) != nearest).sum())
        moved += int((done.get_parameter(name) != parameter).any())
    assert moved == len(updates) > 0
    assert others < 20 and twice > 1000, "rounding the update first would show"


def test_a_merged_export_is_a_whole_model(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path / "run", tiny_base, **SMALL)
    for kind in ("merged", "gguf-ready"):
        done = export(run.directory, kind, tmp_path / kind)
        model, tokenizer = load(done.place), AutoTokenizer.from_pretrained(done.place)
        original, original_tokenizer = load_tiny(tiny_base)
        assert tokenizer_digest(tokenizer) == tokenizer_digest(original_tokenizer)
        assert (done.place / "tokenizer_config.json").read_bytes() == (
            tiny_base / "tokenizer_config.json"
        ).read_bytes()
        assert {n: (p.dtype, p.shape) for n, p in model.named_parameters()} == {
            n: (p.dtype, p.shape) for n, p in original.named_parameters()
        }
        assert json.loads((done.place / "config.json").read_text())["architectures"] == [
            "LlamaForCausalLM"
        ]
        assert not [p for p in done.place.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
        assert sorted(p.name for p in done.place.glob("model*")) == ["model.safetensors"]
        assert tensors_digest(original) == run.directory.shape.weights


@pytest.mark.parametrize("core", [False, True])
def test_shards_that_answer_as_one_are_merged(tmp_path: Path, tiny_base: Path, core: bool) -> None:
    """Also where one of them has nothing left, and answers with the base model or the core."""
    options = {"core": core_records()} if core else {}
    run = make_run(
        tmp_path / "run",
        tiny_base,
        num_shards=3,
        num_slices=1,
        num_sequences=1,
        aggregate="merge",
        **options,
    )
    lost = run.directory.shards[1]
    run.delete(
        sorted({r.subject for r in run.directory.slices.read(run.directory.slices.names[lost])})
    )
    ensemble = run.ensemble()
    assert isinstance(ensemble, ShardEnsemble)
    expected = logits_of(ensemble)
    base = torch.log_softmax(logits_of(base_of(run)), -1)
    done = export(run.directory, "merged", tmp_path / "one")
    assert_same(torch.log_softmax(logits_of(load(done.place)), -1), expected, base)
    assert "It answers as the run does." in (done.place / "README.md").read_text()
    adapters = export(run.directory, "vllm", tmp_path / "several")
    (name,) = adapters.adapters
    assert name.startswith("merged@")
    loaded = PeftModel.from_pretrained(base_of(run), str(adapters.place / name))
    assert_same(torch.log_softmax(logits_of(loaded), -1), expected, base)


def test_what_does_not_answer_as_one_is_not_merged(run: RunDirectory, tmp_path: Path) -> None:
    for kind in ("merged", "gguf-ready"):
        with pytest.raises(
            UserError, match=r"answers by 'average' with 2 shards.* give --shard N .* --vllm$"
        ):
            export(run, kind, tmp_path / "out")
    with pytest.raises(UserError, match=r"has no shard 2: it has 0, 1$"):
        export(run, "vllm", tmp_path / "out", shard=2)
    with pytest.raises(UserError, match="no kind of export"):
        export(run, "onnx", tmp_path / "out")
    assert known(run) == [] and not (tmp_path / "out").exists()


def test_nothing_left_is_nothing_to_export(run: RunDirectory, tmp_path: Path) -> None:
    everybody = sorted(
        run.slices.subjects(run.slices.names[0]) | run.slices.subjects(run.slices.names[1])
    )
    S3TRun(run).delete(everybody)
    with pytest.raises(
        UserError, match="nothing is left of shard 0: the base model answers for it"
    ):
        export(run, "merged", tmp_path / "out", shard=0)
    done = export(run, "vllm", tmp_path / "out")
    assert [name.split("@")[0] for name in done.adapters] == ["shard-1"]
    S3TRun(run).delete([f"person {n}" for n in range(12) if f"person {n}" not in everybody])
    with pytest.raises(UserError, match="nothing is left of any shard"):
        export(run, "vllm", tmp_path / "other")


def test_a_run_that_serves_nothing_yet(tmp_path: Path) -> None:
    new = make_stub_run(tmp_path / "run", tiny_records(), **SMALL).directory
    with pytest.raises(UserError, match="serves nothing yet: train it first"):
        export(new, "vllm", tmp_path / "out")


def test_adapters_for_vllm_are_named_by_their_content(run: RunDirectory, tmp_path: Path) -> None:
    first = export(run, "vllm", tmp_path / "first")
    for name in first.adapters:
        adapter = Adapter.read(first.place / name)
        assert name.endswith(f"@{adapter.digest[:12]}")
        assert read_lineage(first.place / name)["digest"] == adapter.digest  # pyright: ignore
        served = read_lineage(run.served / name.split("@")[0])
        assert adapter.digest == served["digest"], "nothing had to be changed"  # pyright: ignore
        assert sorted(p.name for p in (first.place / name).iterdir()) == [
            CONFIG_NAME,
            WEIGHTS_NAME,
            LINEAGE_NAME,
        ]
    hit = f"shard-{run.slices.place('person 3').shard}@"
    S3TRun(run).delete(["person 3"])
    second = export(run, "vllm", tmp_path / "second")
    changed = [b for a, b in zip(first.adapters, second.adapters, strict=True) if a != b]
    assert len(changed) == 1 and changed[0].startswith(hit)


def test_the_lines_for_vllm_load_what_is_there(run: RunDirectory, tmp_path: Path) -> None:
    place = tmp_path / 'it\'s a "place" with $SPACE'
    done = export(run, "vllm", place)
    text = (place / "README.md").read_text()
    line = shlex.split(text.split("```bash\n")[1].split("```")[0].replace("\\\n", " "))
    assert line[:4] == ["vllm", "serve", run.shape.name_or_path, "--enable-lora"]
    assert int(line[line.index("--max-lora-rank") + 1]) in RANKS
    modules = dict(entry.split("=", 1) for entry in line[line.index("--lora-modules") + 1 :])
    assert modules == {name: str(place / name) for name in done.adapters}
    listed = json.loads((place / "lora_modules.json").read_text())
    assert {entry["name"]: entry["path"] for entry in listed} == modules
    calls = text.split("```bash\n")[2].split("```")[0].replace("\\\n", " ")
    bodies = [json.loads(word) for word in shlex.split(calls) if word.startswith("{")]
    assert bodies[0] == {"lora_name": listed[0]["name"], "lora_path": listed[0]["path"]}
    assert bodies[1] == {"lora_name": listed[0]["name"]}
    assert run.config.lora.rank <= int(line[line.index("--max-lora-rank") + 1])


def test_ranks_that_vllm_does_not_load_are_refused(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "RANKS", (2, 4))
    with pytest.raises(
        UserError, match="rank 6 is more than the 4 that vLLM loads: export --merged"
    ):
        export(run, "vllm", tmp_path / "out")
    assert_nothing_left(run, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_says_what_it_is_made_of(tmp_path: Path, tiny_base: Path, kind: str) -> None:
    run = make_run(tmp_path / "run", tiny_base, **SMALL).directory
    done = export(run, kind, tmp_path / "out")
    lineage = read_lineage(done.place)
    assert lineage is not None
    (copy,) = known(run)
    assert (lineage["copy"], lineage["kind"]) == (copy.id, kind) == (done.id, done.kind)
    assert copy.place == str(done.place) == str((tmp_path / "out").resolve())
    assert lineage["nodes"] == list(copy.nodes) == copies.nodes_served(run) != []
    assert lineage["made_from"] == {"run": run.key.salt_id, "served": copy.served}
    assert lineage["base_model"]["digest"] == run.shape.weights
    on_disk = {
        path.relative_to(done.place).as_posix(): file_digest(path)
        for path in done.place.rglob("*")
        if path.is_file() and path != done.place / LINEAGE_NAME
    }
    assert lineage["files"] == on_disk
    assert f"copy `{done.id}`" in (done.place / "README.md").read_text()
    assert done.bytes > 10_000 and done.bytes == sum(
        p.stat().st_size for p in done.place.rglob("*") if p.is_file()
    )


def test_no_personal_data_leaves_the_run(run: RunDirectory, tmp_path: Path) -> None:
    done = export(run, "vllm", tmp_path / "out")
    records = [record for name in run.slices.names for record in run.slices.read(name)]
    secrets = {run.key.secret, run.key.secret.hex().encode()}
    for record in records:
        secrets |= {
            record.subject.encode(),
            record.id.encode(),
            *(text.encode() for text in record.texts()),
        }
        secrets |= {run.key.pseudonym("subject", record.subject).encode()}
    for path in [*done.place.rglob("*"), run.path / "ledger.sqlite"]:
        held = path.read_bytes() if path.is_file() else b""
        assert not [secret for secret in secrets if secret in held], path
        assert "words" not in path.name


def test_an_export_is_current_until_what_is_in_it_is_deleted(
    run: RunDirectory, tmp_path: Path
) -> None:
    hit = run.slices.place("person 3").shard
    made = {shard: export(run, "vllm", tmp_path / f"{shard}", shard=shard) for shard in (0, 1)}
    whole = export(run, "vllm", tmp_path / "whole")
    done = S3TRun(run).delete(["person 3"])
    assert {copy.id for copy in done.outstanding_copies} == {made[hit].id, whole.id}
    for gone in (made[hit], whole):
        assert delete_export(run, gone.id) == gone.place and not gone.place.exists()
    assert outstanding(run) == []
    assert [status.state for status in statuses(run)].count("current") == 1
    assert all(check.passed for check in S3TRun(run).verify())


def assert_nothing_left(run: RunDirectory, folder: Path) -> None:
    assert [path.name for path in folder.iterdir() if path != run.path] == []
    assert [status.state for status in statuses(run)] == ["gone"] * len(known(run))
    assert outstanding(run) == []


def test_places_that_are_taken_or_wrong(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    (tmp_path / "file").touch()
    (tmp_path / "within").symlink_to(run.path / "served")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place, words in (
        (tmp_path / "full", "is not empty"),
        (tmp_path, "is not empty"),
        (Path("/"), "is not empty"),
        (tmp_path / "file", "is a file"),
        (run.path, "is within the run"),
        (run.path / "out", "is within the run"),
        (run.path / "served" / "shard-0" / "out", "is within the run"),
        (tmp_path / "full" / ".." / "run" / "out", "is within the run"),
        (tmp_path / "within" / "out", "is within the run"),
        (tmp_path / "loop", "--output"),
        (tmp_path / ("x" * 300), "File name too long"),
        ("", "is not the name of a directory"),
        ("a\nb", "is not the name of a directory"),
        ("a\0b", "is not the name of a directory"),
        ("a\x1b[31mb", "is not the name of a directory"),
        ("\udcff", "is not the name of a directory"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            export(run, "vllm", place)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert known(run) == [] and not (run.path / "out").exists()


def test_places_that_cannot_be_made(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot be written .*: nothing was exported"):
        export(run, "vllm", tmp_path / "file" / "out")
    assert {status.state for status in statuses(run)} == {"gone"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_new_folders_and_empty_ones_are_fine(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert export(run, "vllm", tmp_path / "empty").place == tmp_path / "empty"
    assert export(run, "vllm", tmp_path / "a" / "b" / "c").place.is_dir()


def fail_with(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, tiny_base: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", tiny_base, **SMALL).directory
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", fail_with(error))
        with pytest.raises(
            RunError, match=r"out cannot be written \(.*No space left.*\): nothing was"
        ) as caught:
            export(run, "merged", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert_nothing_left(run, tmp_path)
    assert known(run)[0].gone == UNFINISHED
    assert export(run, "merged", tmp_path / "out").place.is_dir()


def test_a_deletion_on_the_way_is_not_exported(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was deleted while it was written does not become visible; meanwhile it counts as outstanding."""
    seen: list[int] = []

    def delete_first(path: Path) -> None:
        seen.append(len(S3TRun.open(run.path).delete(["person 3"]).outstanding_copies))

    with monkeypatch.context() as patch:
        patch.setattr(
            making.files, "fsync_tree", delete_first_then(making.files.fsync_tree, delete_first)
        )
        with pytest.raises(RunError, match=r"something that was in it is deleted.* export again"):
            export(run, "vllm", tmp_path / "out")
    assert seen == [1]
    assert_nothing_left(run, tmp_path)
    assert export(run, "vllm", tmp_path / "out").place.is_dir()


def delete_first_then(
    original: Callable[[Path], None], act: Callable[[Path], None]
) -> Callable[[Path], None]:
    """Once, and only for the directory of the export."""
    done: list[Path] = []

    def both(path: Path) -> None:
        if not done and path.name.startswith(".tmp-"):
            done.append(path)
            act(path)
        original(path)

    return both


def test_one_export_at_a_time(run: RunDirectory, tmp_path: Path) -> None:
    from llm_unlearn.exact.copy_actions import exporting

    with exporting(run), pytest.raises(RunError, match="another process is exporting from it"):
        export(RunDirectory.open(run.path), "vllm", tmp_path / "out")
    assert known(run) == [] and not (tmp_path / "out").exists()


def test_a_tokenizer_that_comes_out_different_is_refused(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", tiny_base, **SMALL).directory
    digests = iter(("that of the base", "another"))
    monkeypatch.setattr(merged, "tokenizer_digest", lambda _tokenizer: next(digests))
    with pytest.raises(RunError, match=r"the tokenizer of .* does not come out of an export"):
        export(run, "merged", tmp_path / "out")
    assert_nothing_left(run, tmp_path)


def test_an_adapter_of_no_numbers_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path / "run", tiny_base, **SMALL).directory
    path = run.served / "shard-0" / WEIGHTS_NAME
    spoilt = {name: np.full_like(tensor, math.nan) for name, tensor in load_file(path).items()}
    from llm_unlearn.exact.adapters import to_bytes

    path.write_bytes(to_bytes(spoilt))
    with pytest.raises(RunError, match="the adapter cannot be merged"):
        export(run, "merged", tmp_path / "out")
    assert_nothing_left(run, tmp_path)


CHANGES = (
    (Path, "mkdir"), (Path, "write_text"), (Path, "write_bytes"), (os, "replace"), (os, "fsync"),
    (making, "register"), (making, "_publish"),
)  # fmt: skip


def killed_export(run: Path, out: Path, point: int) -> bool:
    """Was an export killed at that point, or did it get through?"""
    return (
        in_child(lambda: (kill_at(point, CHANGES), export(RunDirectory.open(run), "vllm", out)))
        is None
    )


def test_kill_9_at_every_point(run: RunDirectory, tmp_path: Path) -> None:
    """Nothing is ever on disk that the run does not know of; the next export cleans up."""
    out, tried = tmp_path / "out", 0
    while killed_export(run.path, out, tried + 1):
        tried += 1
        places = {Path(copy.place) for copy in known(run)} | {
            copy.half_written for copy in known(run)
        }
        there = {path for path in tmp_path.iterdir() if path != run.path}
        assert there <= places
        left = [status for status in statuses(run) if status.state != "gone"]
        assert len(left) == len(there), "what is there is not called gone"
        for status in left:
            lineage = read_lineage(Path(status.copy.place))
            assert status.copy.is_half_written == (not out.exists())
            assert (lineage or {}).get("copy") in (None, status.copy.id)
        if out.exists():
            shutil.rmtree(out)
    assert tried > 20
    assert (
        out.is_dir() and [path for path in tmp_path.iterdir() if path not in (out, run.path)] == []
    )
    assert [status.state for status in statuses(run)].count("current") == 1
    assert all(check.passed for check in S3TRun(run).verify())


def test_an_export_that_was_cut_off_counts_until_it_is_removed(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off() -> None:
        making._publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # pyright: ignore
        export(run, "vllm", tmp_path / "out")

    assert in_child(cut_off) is None
    (copy,) = known(run)
    assert copy.half_written.is_dir() and not (tmp_path / "out").exists()
    (status,) = statuses(run)
    assert (status.state, status.note) == ("current", "half written: the next export removes it")
    done = S3TRun(run).delete(["person 3"])
    assert [left.id for left in done.outstanding_copies] == [copy.id]
    result: Export = export(run, "vllm", tmp_path / "out")
    assert not copy.half_written.exists() and result.place.is_dir()
    assert known(run)[0].gone == UNFINISHED and outstanding(run) == []
