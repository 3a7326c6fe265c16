"""How far requests in a row took the weights: measured rightly, carried on, and shown."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from trl import ModelConfig

from llm_unlearn.approximate.travelled import NOTHING, describe, read_ledger
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.errors import UserError
from llm_unlearn.unlearning import Request, RequestArguments, answer_requests, load_trainable
from tests.approximate.known import LORA, arguments, forget_and_retain, knowing_model
from tests.tiny import make_tiny_tokenizer

REPORT = "unlearning.json"
ADAPTER = "adapter_model.safetensors"


def run(output: Path, name: str, model: Any, flags: Any = None, **options: Any) -> Any:
    forget, retain = forget_and_retain()
    method = make_method(name, flags)
    config = arguments(output, name, num_train_epochs=1, **options)
    kept = retain if method.uses_retain else []
    return unlearn(model, make_tiny_tokenizer(), forget, kept, config, method, LORA)


def known_adapter(seed: int = 3) -> PeftModel:
    """The model with a LoRA that does something already."""
    model = get_peft_model(knowing_model(), copy.deepcopy(LORA))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model  # pyright: ignore[reportReturnType]


def merged(model: Any) -> dict[str, torch.Tensor]:
    """All weights as the model uses them."""
    model = copy.deepcopy(model)
    plain = model.merge_and_unload() if isinstance(model, PeftModel) else model
    return {name: p.detach().double() for name, p in plain.named_parameters()}


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


CASES: list[tuple[str, str, bool, dict[str, Any]]] = [
    ("a fresh LoRA", "ga", False, {}),
    ("a given LoRA", "npo", True, {}),
    ("twice the rank", "task_vector", True, {}),
    ("merged first", "npo", True, {"full": True}),
    ("full weights", "ga", False, {"full": True}),
    ("a negated model", "task_vector", False, {"full": True}),
    ("masks that are made permanent", "balanced_subnet", False, {"full": True}),
    ("no gradients", "ssd", True, {}),
    ("steps of its own", "scurenewton", True, {}),
]


@pytest.mark.parametrize(("what", "name", "is_given", "options"), CASES)
def test_the_distance_is_that_of_the_weights_as_they_are_used(
    what: str, name: str, is_given: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    model = known_adapter() if is_given else knowing_model()
    before = merged(model)
    flags = {"return_noop": False, "outer_steps": 1} if name == "scurenewton" else None
    report = run(tmp_path, name, model, flags, **options)
    is_full = options.get("full", False)
    if is_full:
        after = {k: v.double() for k, v in load_file(tmp_path / "model.safetensors").items()}
        after |= {k: before[k] for k in before.keys() - after.keys()}  # tied weights
    else:
        after = merged(PeftModel.from_pretrained(knowing_model(), str(tmp_path)))
    expected = apart(after, before)
    assert expected > 1e-4
    assert report.travelled["distance"] == pytest.approx(expected, rel=1e-3), what
    assert report.travelled["at_most"] == report.travelled["distance"]
    assert report.travelled["requests"] == 1
    written = (tmp_path / REPORT).read_text()
    assert json.loads(written)["travelled"] == report.travelled
    assert not (tmp_path / "checkpoints").exists()


def test_what_only_hides_moved_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, "whp", known_adapter()).travelled["distance"] == 0.0


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    knowing_model().save_pretrained(path)
    make_tiny_tokenizer().save_pretrained(path)
    return path


def load(place: Path) -> tuple[Any, Any]:
    return load_trainable(str(place), None, False, ModelConfig())


def answer(base: Path, output: Path, **which: bool) -> list[Any]:
    """Two requests, as the recipe answers them."""
    forget, retain = forget_and_retain()
    requests = [Request("one", forget[:4], retain), Request("two", forget, retain)]
    config = arguments(output, "npo", num_train_epochs=4)
    settings = ModelConfig(model_name_or_path=str(base), lora_r=8, lora_dropout=0.0)
    given = RequestArguments(forget=["-"], **which)
    return answer_requests(given, config, settings, make_method("npo"), requests, False)


def test_requests_in_a_row_add_up(base: Path, tmp_path: Path) -> None:
    one, two = answer(base, tmp_path / "out", sequential=True)
    first, second = one.travelled, two.travelled
    assert (first["requests"], second["requests"]) == (1, 2)
    assert second["at_most"] == pytest.approx(first["distance"] + second["distance"])
    model, _ = load(tmp_path / "out" / "two")
    exact = apart(merged(model), merged(knowing_model()))
    assert max(first["distance"], second["distance"]) < exact <= second["at_most"]
    card = (tmp_path / "out" / "two" / "README.md").read_text()
    assert f"after 2 requests at most {second['at_most']:.3g} from the first model" in card
    # A third by other means goes on with it: merged, and all weights trained.
    third = run(tmp_path / "three", "ga", model, full=True).travelled
    assert third["requests"] == 3
    assert third["at_most"] == pytest.approx(second["at_most"] + third["distance"])
    # A fourth on the weights of the third, with a LoRA again.
    fourth = run(tmp_path / "four", "npo", load(tmp_path / "three")[0]).travelled
    assert fourth["requests"] == 4 and fourth["at_most"] > third["at_most"]


def test_growing_requests_each_begin_at_the_first_model(base: Path, tmp_path: Path) -> None:
    assert [one.travelled["requests"] for one in answer(base, tmp_path, growing=True)] == [1, 1]


def test_an_interrupted_request_counts_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done before the interruption is part of the distance: the start is the model's, not the
    checkpoint's.
    """
    from llm_unlearn.approximate.trainer import UnlearningTrainer

    def twice(output: Path, **options: Any) -> Any:
        forget, retain = forget_and_retain()
        config = arguments(output, "npo", num_train_epochs=3, save_strategy="epoch", **options)
        return unlearn(knowing_model(), make_tiny_tokenizer(), forget, retain, config, lora=LORA)

    original = UnlearningTrainer.training_step

    def break_off(self: Any, *given: Any, **named: Any) -> Any:
        if int(self.state.epoch or 0) >= 2:
            raise KeyboardInterrupt
        return original(self, *given, **named)

    for full in (False, True):
        whole = twice(tmp_path / f"whole-{full}", full=full)
        with monkeypatch.context() as patch:
            patch.setattr(UnlearningTrainer, "training_step", break_off)
            with pytest.raises(KeyboardInterrupt):
                twice(tmp_path / f"parts-{full}", full=full)
        assert twice(tmp_path / f"parts-{full}", full=full).travelled == whole.travelled


def test_an_adapter_that_is_more_than_products_is_not_measured(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
    report = run(tmp_path, "ga", get_peft_model(knowing_model(), lora))
    assert report.travelled == {"requests": 1, "distance": None, "at_most": None}
    assert describe(report.travelled) == "weights moved"


def test_a_result_from_before_there_was_a_ledger(base: Path, tmp_path: Path) -> None:
    one, _ = answer(base, tmp_path / "out", sequential=True)
    place = tmp_path / "out" / "one"
    report = json.loads((place / REPORT).read_bytes())
    del report["travelled"]
    (place / REPORT).write_text(json.dumps(report))
    later = run(tmp_path / "next", "npo", load(place)[0]).travelled
    assert later["requests"] == 2 and later["distance"] > 0 and later["at_most"] is None
    assert "2 requests an unknown distance from the first model" in describe(later)
    assert one.travelled["at_most"] is not None


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"travelled": {}}', '{"travelled": 7}',
     '{"travelled": {"requests": "many", "distance": 1, "at_most": 1}}',
     '{"travelled": {"requests": 1, "distance": [1], "at_most": 1}}'],
)  # fmt: skip
def test_a_report_that_is_none_is_told_in_a_line(content: str, tmp_path: Path) -> None:
    (tmp_path / REPORT).write_text(content)
    with pytest.raises(UserError, match="is no report of an earlier request") as caught:
        read_ledger(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_report_is_a_first_request(tmp_path: Path) -> None:
    assert read_ledger(tmp_path) == read_ledger(Path("someone/on-the-hub")) == NOTHING
    (tmp_path / "file").write_text("")
    assert read_ledger(tmp_path / "file") == NOTHING


def test_factors_that_are_turned_have_not_moved(tmp_path: Path, base: Path) -> None:
    """B G^-1 and G A are the same product: it is the model that counts."""
    from llm_unlearn.approximate.session import Session
    from llm_unlearn.approximate.travelled import Start
    from llm_unlearn.approximate.tuning import tune

    tuned = tune(known_adapter(), LORA, False, None, 0)
    config = arguments(tmp_path, "npo")
    start = Start(Session(tuned, make_tiny_tokenizer(), [], [], config, tmp_path))
    with torch.no_grad():
        for name, parameter in tuned.trainable.items():
            parameter.mul_(4.0 if "lora_A" in name else 0.25)
    assert start.distance() == pytest.approx(0.0, abs=1e-6)
