"""Task vectors and Who's Harry Potter: what is made of a model that learnt the forget set harder."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.func import functional_call

from llm_unlearn.approximate.adapter_arithmetic import negate_adapter
from llm_unlearn.approximate.difference_model import DifferenceModel, difference
from llm_unlearn.approximate.methods.task_vector import negated
from llm_unlearn.approximate.methods.whp import REINFORCED
from llm_unlearn.approximate.tuning import tune
from llm_unlearn.approximate.unlearn import Watching, make_method, unlearn
from llm_unlearn.approximate.watch import Standing
from llm_unlearn.errors import UserError
from llm_unlearn.models import wrapped
from tests.approximate.known import (
    LORA,
    arguments,
    forget_and_retain,
    knowing_model,
    knowledge,
    read_result,
)
from tests.tiny import make_tiny_model, make_tiny_tokenizer

IDS = torch.tensor([[1, 40, 50, 60, 70], [1, 90, 80, 70, 33]])


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Weights with every adapter merged into them."""
    merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
    return {name: p.detach().clone() for name, p in merged.named_parameters()}


def filled(lora: LoraConfig, seed: int) -> PeftModel:
    """A model with an adapter that adds something."""
    model = get_peft_model(knowing_model(), copy.deepcopy(lora))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    return model  # pyright: ignore[reportReturnType]


def trained_by_hand(model: Any, seed: int) -> Any:
    """Chosen tensors, with noise on them for training."""
    tuned = tune(model, LORA, False, None, 0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.trainable.values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    return tuned


def test_a_task_vector_by_hand() -> None:
    start, trained = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0])
    assert negated(start, trained, 2.0).tolist() == [0.0, 4.0]
    assert negated(start, trained, 0.0).tolist() == [1.0, 2.0]


SHAPES = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
}


@pytest.mark.parametrize("is_fresh", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapter_is_negated_exactly(shape: str, is_fresh: bool, tmp_path: Path) -> None:
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **SHAPES[shape]
    )
    before = get_peft_model(knowing_model(), copy.deepcopy(lora)) if is_fresh else filled(lora, 1)
    before.save_pretrained(tmp_path / "before")
    tuned = trained_by_hand(before, 2)
    tuned.model.save_pretrained(tmp_path / "trained")
    negate_adapter(tuned, 3.0)
    tuned.model.save_pretrained(tmp_path / "out")

    def loaded(name: str) -> Any:
        return PeftModel.from_pretrained(knowing_model(), str(tmp_path / name)).eval()

    start, trained, out = (weights_of(loaded(name)) for name in ("before", "trained", "out"))
    for name, value in out.items():
        wanted = start[name] - 3.0 * (trained[name] - start[name])
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)
    moved = max(float((out[n] - start[n]).abs().max()) for n in out)
    assert moved > 1e-3, "it must do something"
    rank = loaded("out").peft_config["default"].r
    assert rank == (4 if is_fresh else 8)
    with torch.no_grad():  # as it is in memory, too
        torch.testing.assert_close(tuned.model.eval()(IDS).logits, loaded("out")(IDS).logits)


def test_dora_is_refused() -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
    with pytest.raises(UserError, match="DoRA"):
        negate_adapter(tune(filled(lora, 1), LORA, False, None, 0), 1.0)


@pytest.mark.parametrize("full", [True, False])
def test_a_task_vector_of_length_zero_is_the_model_before(full: bool, tmp_path: Path) -> None:
    forget, _ = forget_and_retain()
    config = arguments(tmp_path, "task_vector", full=full)
    method = make_method("task_vector", {"alpha": 0.0})
    unlearn(knowing_model(), make_tiny_tokenizer(), forget, (), config, method, lora=LORA)
    before, after = weights_of(knowing_model()), weights_of(read_result(tmp_path, full))
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ["task_vector", "whp"])
@pytest.mark.parametrize(
    "options", [{"keep": "best"}, {"stop_when": "utility_floor"}, {"stop_samples": "icu"}]
)
def test_nothing_looks_at_a_reinforced_model(
    name: str, options: dict[str, str], tmp_path: Path
) -> None:
    forget, _ = forget_and_retain()
    config = arguments(tmp_path, name, **options)
    watching = Watching(lambda *_: Standing(0.5, 0.5), Standing(0.0, 1.0))
    with pytest.raises(UserError, match="wrong model"):
        unlearn(
            knowing_model(), make_tiny_tokenizer(), forget, (), config, lora=LORA, watching=watching
        )


def test_the_logit_form_by_hand() -> None:
    before, reinforced = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 1.0])
    assert difference(before, reinforced, 2.0, "logits").tolist() == [-1.0, 2.0, 3.0]
    assert difference(before, reinforced, 0.0, "logits").tolist() == before.tolist()


def test_the_probability_form_by_hand() -> None:
    before, reinforced = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.6, 0.3, 0.1])
    lowered = difference(before.log(), reinforced.log(), 2.0, "probabilities").exp()
    torch.testing.assert_close(lowered, torch.tensor([0.3, 0.3, 0.4]))
    # 0.5 - 0.6 is below 0: cut, and the rest, 0.3 and 0.8, normalised.
    lowered = difference(before.log(), reinforced.log(), 6.0, "probabilities").exp()
    torch.testing.assert_close(lowered, torch.tensor([0.0, 3 / 11, 8 / 11]))
    assert torch.isfinite(difference(before.log(), reinforced.log(), 6.0, "probabilities")).all()


def two_models(family: str = "llama", alpha: float = 4.0, form: str = "logits") -> DifferenceModel:
    model = make_tiny_model(family, layers=2)
    generator = torch.Generator().manual_seed(0)
    other = {
        name: p.detach() + torch.randn(p.shape, generator=generator) * 0.5
        for name, p in model.named_parameters()
        if "layers.1." in name or "h.1." in name
    }
    assert other
    return DifferenceModel(model, other, alpha, form).eval()


@pytest.mark.parametrize("form", ["logits", "probabilities"])
def test_the_wrapper_answers_with_the_difference(form: str) -> None:
    wrapped = two_models(form=form)
    with torch.no_grad():
        v = wrapped.model(IDS).logits
        v_r = functional_call(wrapped.model, wrapped.reinforced, (IDS,)).logits
        answered = wrapped(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert float((v - v_r).abs().max()) > 0.1
    torch.testing.assert_close(answered, difference(v, v_r, 4.0, form))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_generation_with_caches_is_generation_without(family: str) -> None:
    """Left padding, several rows, each like itself alone, token by token from whole texts."""
    # With a weight below 0 the reinforced model decides, so an error in its cache would be heard.
    wrapped, new = two_models(family, alpha=-4.0), 8
    rows = [[1, 40, 50, 60, 70], [1, 90, 80]]
    ids = torch.tensor([rows[0], [0, 0, *rows[1]]])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    said = wrapped.generate(input_ids=ids, attention_mask=mask, **options)[:, 5:]
    slow = wrapped.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)[:, 5:]
    for row, answer, uncached in zip(rows, said.tolist(), slow.tolist(), strict=True):
        text = list(row)
        for _ in range(new):
            with torch.no_grad():
                logits = wrapped(input_ids=torch.tensor([text])).logits
            text.append(int(logits[0, -1].argmax()))
        assert answer == uncached == text[len(row) :]
    alone = wrapped.model.generate(input_ids=ids, attention_mask=mask, **options)[:, 5:]
    assert alone.tolist() != said.tolist(), "the difference must be seen"


def test_sampling_follows_the_difference() -> None:
    wrapped = two_models(alpha=-4.0)
    torch.manual_seed(0)
    drawn = wrapped.generate(
        input_ids=IDS[:1], attention_mask=torch.ones_like(IDS[:1]), do_sample=True, top_k=0,
        max_new_tokens=1, num_return_sequences=2000, pad_token_id=0, eos_token_id=None,
    )[:, -1]  # fmt: skip
    with torch.no_grad():
        p_V = wrapped(input_ids=IDS[:1]).logits[0, -1].softmax(-1)
        before_V = wrapped.model(input_ids=IDS[:1]).logits[0, -1].softmax(-1)
    found_V = torch.bincount(drawn, minlength=len(p_V)) / 2000
    assert float((found_V - p_V).abs().sum()) / 2 < 0.2
    assert float((found_V - before_V).abs().sum()) / 2 > 0.4
    with pytest.raises(ValueError, match="beams"):
        wrapped.generate(input_ids=IDS, num_beams=2, max_new_tokens=1)


@pytest.mark.parametrize("kind", ["fresh", "continued", "full"])
def test_whp_writes_the_model_before_and_the_reinforced_one(kind: str, tmp_path: Path) -> None:
    forget, _ = forget_and_retain()
    model = filled(LORA, 1) if kind == "continued" else knowing_model()
    with torch.no_grad():
        before = model(IDS).logits
    config = arguments(
        tmp_path, "whp", full=kind == "full", num_train_epochs=10, learning_rate=5e-4
    )
    method = make_method("whp", {"alpha": 256.0})
    unlearn(model, make_tiny_tokenizer(), forget, (), config, method, lora=LORA)
    written = read_result(tmp_path, kind == "full")
    with torch.no_grad():
        torch.testing.assert_close(written(IDS).logits, before, atol=1e-5, rtol=1e-5)
    answering = wrapped(written, make_tiny_tokenizer(), tmp_path)
    assert isinstance(answering, DifferenceModel)
    assert knowledge(answering, forget) < knowledge(written, forget) - 0.3
    known = knowledge(written, forget)
    with torch.no_grad():
        for name, p in written.named_parameters():
            if name in answering.reinforced:
                p.copy_(answering.reinforced[name])
    assert load_file(tmp_path / REINFORCED).keys() == answering.reinforced.keys()
    assert knowledge(written, forget) > known + 1e-4, (
        "it is the reinforced model that lies beside it"
    )
    assert "suppresses" in (tmp_path / "README.md").read_text()
    (tmp_path / REINFORCED).unlink()
    with pytest.raises(UserError, match="missing"):
        wrapped(written, make_tiny_tokenizer(), tmp_path)


def test_whp_says_which_forms_there_are() -> None:
    with pytest.raises(UserError, match="logits or probabilities"):
        make_method("whp", {"form": "both"})


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(UserError, match="another model"):
        DifferenceModel(make_tiny_model(layers=2), {"none.weight": torch.zeros(1)}, 1.0, "logits")
