"""EUL's objective by hand, what it adapts, and the fusion of several requests against numpy."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from llm_unlearn.approximate.fusion import (
    Factors,
    fuse,
    fused_change,
    read_adapter,
    refactored,
)
from llm_unlearn.approximate.grams import input_grams
from llm_unlearn.approximate.methods.eul import EUL, away_from
from llm_unlearn.approximate.step import Step
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.cli import app
from llm_unlearn.data.encoding import encode
from llm_unlearn.errors import UserError
from tests.approximate.known import (
    LORA,
    arguments,
    forget_and_retain,
    knowing_model,
    read_result,
)
from tests.tiny import make_tiny_model, make_tiny_tokenizer


class Answers:
    """Stands in for a model: the same two-token distributions for any row."""

    def __init__(self, probabilities_TV: list[list[float]]):
        self.logits = torch.tensor([probabilities_TV]).log()

    def __call__(self, **_: Any) -> "Answers":
        return self


class Teacher:
    def distributions(self, side: Any) -> torch.Tensor:
        return torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()


def terms_of(method: EUL, epoch: int) -> dict[str, tuple[float, float, str]]:
    """One row of three tokens whose first is the prompt and whose last is the answer."""
    batch = {
        "input_ids": torch.tensor([[0, 1, 0]]), "labels": torch.tensor([[-100, -100, 0]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long), "index": torch.tensor([0]),
        "active": torch.tensor([True]),
    }  # fmt: skip
    model = Answers([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    step = Step(model, {"forget": batch, "retain": batch}, Teacher(), epoch)  # pyright: ignore
    return {t.name: (float(t.total), t.weight, t.unit) for t in method.terms(step)}


def test_epochs_take_turns_and_their_losses_are_the_paper_s() -> None:
    """The teacher says 0.5 and 0.5; the student 0.2 and 0.8 where the answer (token 0) is due."""
    kl = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    text = -math.log(0.1) - math.log(0.2)
    retain = terms_of(EUL(), 0)
    assert retain == terms_of(EUL(), 2) and retain.keys() == {"retain", "task"}
    assert retain["retain"] == (pytest.approx(kl), 0.8, "tokens")
    assert retain["task"] == (pytest.approx(-math.log(0.2)), 1.0, "tokens")
    forget = terms_of(EUL(), 1)
    assert forget["forget"] == (pytest.approx(-kl), 1.0, "tokens")
    assert forget["text"] == (pytest.approx(-text), 0.2, "positions")
    clamped = terms_of(EUL(most=2.0), 1)
    assert clamped["text"][0] == pytest.approx(-(2.0 + -math.log(0.2)))


def test_beyond_the_most_nothing_pushes() -> None:
    values = torch.tensor([1.0, 5.0], requires_grad=True)
    away_from(values, 3.0).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [-1.0, 0.0]
    assert away_from(values, 0.0).tolist() == [-1.0, -5.0]


def request(output: Path, records: list[Any], model: Any = None, **flags: Any) -> Any:
    _, retain = forget_and_retain()
    config = arguments(output, "eul", num_train_epochs=4, learning_rate=1e-2)
    method = make_method("eul", flags)
    return unlearn(
        model or knowing_model(), make_tiny_tokenizer(), records, retain, config, method, lora=LORA
    )


@pytest.mark.parametrize(("family", "layer"), [("llama", "down_proj"), ("gpt2", "mlp.c_proj")])
def test_only_the_blocks_output_projections_are_adapted(
    family: str, layer: str, tmp_path: Path
) -> None:
    forget, _ = forget_and_retain()
    report = request(tmp_path, forget[:4], make_tiny_model(family, layers=2))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert len(weights) == 4 and all(layer in name for name in weights)
    assert "tells about it" in report.notes[0]


def test_the_gram_is_that_of_the_unlearned_model_on_the_forget_set(tmp_path: Path) -> None:
    forget, _ = forget_and_retain()
    request(tmp_path / "with", forget[:4])
    model = read_result(tmp_path / "with", full=False)
    examples = [encode(r, make_tiny_tokenizer(), 64, True) for r in forget[:4]]
    name = "base_model.model.model.layers.1.mlp.down_proj"
    wanted = input_grams(model, {name}, examples, 0)[name]
    found = load_file(tmp_path / "with" / "gram.safetensors")
    assert found.keys() == {name, name.replace("layers.1", "layers.0")}
    assert torch.allclose(found[name].double(), wanted, rtol=1e-4, atol=1e-5)
    request(tmp_path / "without", forget[:4], gram=False)
    assert not (tmp_path / "without" / "gram.safetensors").exists()


def test_fusion_is_numpy_s_least_squares() -> None:
    """argmin over W of sum |X_i W - X_i W_i|^2, by `lstsq` on the stacked inputs."""
    random = np.random.default_rng(0)
    inputs = [random.normal(size=(n, 6)) for n in (9, 5, 20)]
    factors = [(random.normal(size=(4, 2)), random.normal(size=(2, 6))) for _ in inputs]
    targets = [x @ (b @ a).T for x, (b, a) in zip(inputs, factors, strict=True)]
    wanted = np.linalg.lstsq(np.vstack(inputs), np.vstack(targets), rcond=None)[0].T
    changes = [Factors(torch.tensor(b), torch.tensor(a)) for b, a in factors]
    grams = [torch.tensor(x.T @ x) for x in inputs]
    found = fused_change(changes, grams, ridge=1e-13)
    assert np.allclose(found.b_RK @ found.a_KD, wanted, atol=1e-9)
    best, error = refactored(found, 6)
    assert error < 1e-12 and best.b_RK.shape == (4, 6)
    assert np.allclose(best.b_RK @ best.a_KD, wanted, atol=1e-9)
    best, error = refactored(found, 2)
    left, values, right = np.linalg.svd(wanted, full_matrices=False)
    assert np.allclose(best.b_RK @ best.a_KD, left[:, :2] * values[:2] @ right[:2], atol=1e-9)
    assert error == pytest.approx(np.linalg.norm(values[2:]) / np.linalg.norm(values))


def test_where_no_forget_set_looks_the_changes_are_averaged() -> None:
    changes = [
        Factors(torch.eye(2).double(), torch.tensor([[value, 0.0], [0.0, value]]).double())
        for value in (2.0, 4.0)
    ]
    grams = [torch.diag(torch.tensor(d)).double() for d in ([3.0, 0.0], [1.0, 0.0])]
    found = fused_change(changes, grams, ridge=1e-9)
    assert torch.allclose(found.b_RK @ found.a_KD, torch.diag(torch.tensor([2.5, 3.0])).double())


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    forget, _ = forget_and_retain()
    root = tmp_path_factory.mktemp("requests")
    for number in range(3):
        request(root / str(number), forget[2 * number : 2 * number + 2])
    return [root / str(number) for number in range(3)]


def change(directory: Path) -> dict[str, torch.Tensor]:
    return {name: f.b_RK @ f.a_KD for name, f in read_adapter(directory).factors.items()}


def test_one_adapter_stays_as_it_is(requests: list[Path], tmp_path: Path) -> None:
    done = fuse(requests[:1], tmp_path / "fused")
    assert (done.adapters, done.layers, done.rank) == (1, 2, LORA.r) and done.error < 1e-6
    before, after = change(requests[0]), change(tmp_path / "fused")
    for name in before:
        assert before[name].abs().max() > 1e-3
        assert torch.allclose(after[name], before[name], atol=1e-6), name


def test_a_fused_adapter_is_an_ordinary_one_and_can_be_fused_on(
    requests: list[Path], tmp_path: Path
) -> None:
    """All at once, or one after another: the same answers on every forget set."""
    once = CliRunner().invoke(
        app, ["fuse", *map(str, requests), "--output", str(tmp_path / "all"), "--json"]
    )
    assert once.exit_code == 0, once.output
    assert json.loads(once.stdout)["rank"] == 3 * LORA.r
    fuse(requests[:2], tmp_path / "two")
    fuse([tmp_path / "two", requests[2]], tmp_path / "then")
    at_once, in_turn = change(tmp_path / "all"), change(tmp_path / "then")
    for name, wanted in at_once.items():
        grams = [read_adapter(path).grams[name] for path in requests]
        targets = [change(path)[name] @ gram for path, gram in zip(requests, grams, strict=True)]
        total, size = torch.stack(grams).sum(0), torch.stack(targets).abs().max()
        for found in (wanted, in_turn[name]):  # the normal equations
            assert (found @ total - torch.stack(targets).sum(0)).abs().max() < 1e-3 * size
        assert (wanted - change(requests[0])[name]).abs().max() > 1e-2
    model: Any = PeftModel.from_pretrained(knowing_model(), str(tmp_path / "all"))
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    name = "base_model.model.model.layers.0.mlp.down_proj"
    assert torch.allclose(layer.get_delta_weight("default").double(), at_once[name], atol=1e-5)
    assert "carries no guarantee" in (tmp_path / "all" / "README.md").read_text()


def test_mistakes_are_told(requests: list[Path], tmp_path: Path) -> None:
    forget, retain = forget_and_retain()
    with pytest.raises(UserError, match="not empty"):
        fuse(requests[:2], requests[2])
    with pytest.raises(UserError, match=r"no gram\.safetensors"):
        request(tmp_path / "bare", forget[:2], gram=False)
        fuse([requests[0], tmp_path / "bare"], tmp_path / "out")
    with pytest.raises(UserError, match="other layers"):
        request(tmp_path / "short", forget[:2], make_tiny_model(layers=1))
        fuse([requests[0], tmp_path / "short"], tmp_path / "out")
    for options, message in (({"full": True}, "leave out --full"), ({}, "2 or more")):
        config = arguments(tmp_path / "run", "eul", num_train_epochs=1, **options)
        with pytest.raises(UserError, match=message):
            unlearn(knowing_model(), make_tiny_tokenizer(), forget, retain, config)
        (tmp_path / "run" / "checkpoints" / "request.json").unlink()
