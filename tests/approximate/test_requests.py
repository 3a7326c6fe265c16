"""Requests one after the other: what the second is given of the first."""

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from llm_unlearn.approximate.difference_model import DifferenceModel
from llm_unlearn.approximate.soft_adapter import SoftAdapter
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError
from llm_unlearn.models import load_model
from llm_unlearn.unlearning import Request, RequestArguments, answer_requests, load_trainable
from tests.approximate.known import LORA, arguments, forget_and_retain, knowing_model, knowledge
from tests.approximate.test_detector_training import save_masked_model
from tests.tiny import make_tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows every record, as a user has it."""
    path = tmp_path_factory.mktemp("knowing") / "base"
    model = knowing_model()
    model.save_pretrained(path)
    make_tiny_tokenizer().save_pretrained(path)
    return path


def answer(output: Path, base: Path, method: str, encoder: str | None = None, **training: Any):
    """Two requests in a row, as the recipe answers them."""
    forget, retain = forget_and_retain()
    requests = [Request("request-1", forget[:4], retain), Request("request-2", forget[4:], retain)]
    config = arguments(output, method, **{"num_train_epochs": 20, **training})
    model_arguments = ModelConfig(
        model_name_or_path=str(base), lora_r=8, lora_alpha=16, lora_dropout=0.0
    )
    given = RequestArguments(sequential=True, encoder=encoder)
    return answer_requests(given, config, model_arguments, make_method(method), requests, False)


def weights(model: SoftAdapter, records: list[Record]) -> Any:
    rows = make_tiny_tokenizer()(
        [record.content["prompt"] for record in records],
        padding=True,
        return_tensors="pt",
    )
    return model.weights(rows["input_ids"], rows["attention_mask"])


@pytest.mark.parametrize("trained", [False, True])
def test_o3_goes_on_where_the_first_request_ended(
    tmp_path: Path, base: Path, trained: bool
) -> None:
    forget, retain = forget_and_retain()
    encoder = save_masked_model(tmp_path / "encoder") if trained else None
    epochs = 1 if trained else 20
    first, second = answer(tmp_path / "out", base, "o3", encoder, num_train_epochs=epochs)
    assert "overlap" not in first.history[0] and "overlap" in second.history[0]
    stored = load_file(tmp_path / "out" / "request-2" / "earlier.safetensors")
    assert {name.split("/")[0] for name in stored} == {"0", "1"}
    model = load_model(str(tmp_path / "out" / "request-2")).model
    assert len(model.detectors) == 2
    assert weights(model, forget[:4]).mean() > 0.7 and weights(model, forget[4:]).mean() > 0.7
    if not trained:
        assert max(knowledge(model, forget[:4]), knowledge(model, forget[4:])) < -1.0
        assert knowledge(model, retain) > knowledge(model, forget) + 0.5


def test_npo_goes_on_training_the_first_requests_adapter(tmp_path: Path, base: Path) -> None:
    """A second request that learns nothing leaves the first one's adapter."""
    answer(tmp_path / "1", base, "npo", num_train_epochs=1)
    source = tmp_path / "1" / "request-2"
    model, tokenizer = load_trainable(str(source), None, False, ModelConfig())
    forget, retain = forget_and_retain()
    config = arguments(tmp_path / "2", "npo", num_train_epochs=1, learning_rate=1e-12)
    unlearn(model, tokenizer, forget, retain, config)
    one, other = (load_file(p / "adapter_model.safetensors") for p in (source, tmp_path / "2"))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-6
    assert max(float(t.abs().max()) for name, t in one.items() if "lora_B" in name) > 1e-3


def test_a_wrapper_is_not_left_behind(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UserError, match="method's wrapper"):
        answer(tmp_path / "out", base, "whp", num_train_epochs=1)
    written = str(tmp_path / "out" / "request-1")
    model, tokenizer = load_trainable(written, None, False, ModelConfig())
    assert isinstance(model, DifferenceModel)
    forget, retain = forget_and_retain()
    for method in ("npo", "o3"):
        with pytest.raises(UserError, match="method's wrapper"):
            unlearn(model, tokenizer, forget, retain, arguments(tmp_path / "other", method))


def o3(output: Path, model: Any, forget: list[Record]) -> Any:
    config = arguments(output, "o3", num_train_epochs=1)
    return unlearn(model, make_tiny_tokenizer(), forget, [], config, lora=LORA)


def test_the_same_model_goes_on_in_one_process(tmp_path: Path, base: Path) -> None:
    """An adapter is trained in place: the second call knows where the first one wrote."""
    forget, _ = forget_and_retain()
    o3(tmp_path / "start", AutoModelForCausalLM.from_pretrained(base), forget[:2])
    model = load_model(str(tmp_path / "start")).model.adapted
    o3(tmp_path / "1", model, forget[2:4])
    o3(tmp_path / "2", model, forget[4:])
    stored = load_file(tmp_path / "2" / "earlier.safetensors")
    assert {name.split("/")[0] for name in stored} == {"0", "1", "2"}


def test_an_adapter_inside_a_plain_model_is_refused(tmp_path: Path, base: Path) -> None:
    forget, _ = forget_and_retain()
    model = AutoModelForCausalLM.from_pretrained(base)
    o3(tmp_path / "1", model, forget[:4])
    assert not isinstance(model, PeftModel)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    for given in (model, loaded):
        with pytest.raises(UserError, match="has an adapter inside"):
            o3(tmp_path / "2", given, forget[4:])
