"""O3: orthogonal requests, a detector by hand, and rows that are weighed one by one."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from sklearn.covariance import LedoitWolf

from llm_unlearn.approximate.detector import Calibration, Detector, highest, split_rows
from llm_unlearn.approximate.encoder import BaseEncoder
from llm_unlearn.approximate.methods.o3 import overlap_with_earlier
from llm_unlearn.approximate.soft_adapter import RowWeights, SoftAdapter, lower_layers
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.data.records import Record, make_records
from llm_unlearn.errors import UserError
from llm_unlearn.models import load_model, wrapped
from tests.approximate.known import LORA, arguments, forget_and_retain, knowing_model, knowledge
from tests.approximate.test_pairing import save_text_encoder
from tests.tiny import make_tiny_tokenizer


def test_the_overlap_by_hand() -> None:
    now = {"x": torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "y": torch.tensor([[0.0, 1.0]])}
    earlier = {"0/x": torch.tensor([[1.0, 0.0]]), "1/x": torch.tensor([[0.0, 1.0]])}
    # Request 0: 1 and 0; request 1: 2 and 1.
    assert float(overlap_with_earlier(now, earlier)) == pytest.approx(1.0 + 4.0 + 1.0)
    assert float(overlap_with_earlier(now, {"0/y": torch.tensor([[3.0, 0.0]])})) == 0.0


class FakeSide:
    """A side of three rows."""

    index_B = torch.arange(3)
    log_probabilities_BT = torch.tensor([[-1.0], [-2.0], [-3.0]])

    def per_token(self, name: str, values: torch.Tensor) -> tuple[str, float, float]:
        return name, float(values.sum()), 1.0

    def per_row(self, name: str, values: torch.Tensor, weight: float) -> tuple[str, float, float]:
        return name, float(values.sum() / len(self.index_B)), weight


def test_the_loss_by_hand_counts_the_overlap_once() -> None:
    method: Any = make_method("o3")
    step: Any = {"forget/answer": FakeSide()}
    assert method.terms(step) == [("answer", 6.0, 1.0)], "the first request has nothing to avoid"
    method._factors = {"x": torch.tensor([[1.0, 2.0]])}
    method._earlier = {"0/x": torch.tensor([[1.0, 1.0]])}
    assert method.terms(step) == [("answer", 6.0, 1.0), ("overlap", 9.0, 0.1)]


def test_the_distance_is_ledoit_and_wolfs() -> None:
    generator = torch.Generator().manual_seed(0)
    used = torch.randn(12, 1, 5, generator=generator) * torch.tensor([3.0, 1.0, 1.0, 0.5, 0.1])
    asked = torch.randn(4, 1, 5, generator=generator)
    detector = Detector.fit(used, asked, Calibration(gamma=0.0))
    expected = -0.5 * LedoitWolf().fit(used[:, 0].numpy()).mahalanobis(asked[:, 0].numpy())
    assert detector.layer_scores(asked)[:, 0].numpy() == pytest.approx(expected, rel=1e-3)


def test_with_fewer_texts_than_dimensions_it_is_ledoit_and_wolfs_too() -> None:
    used, asked = torch.randn(4, 1, 20), torch.randn(3, 1, 20)
    detector = Detector.fit(used, asked, Calibration(gamma=0.0))
    expected = -0.5 * LedoitWolf().fit(used[:, 0].numpy()).mahalanobis(asked[:, 0].numpy())
    assert detector.layer_scores(asked)[:, 0].numpy() == pytest.approx(expected, rel=1e-3)


def test_both_parts_of_the_score_rise_towards_the_forget_texts() -> None:
    used = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]])
    near, far = torch.tensor([[[0.9, 0.0]]]), torch.tensor([[[0.0, 0.9]]])
    for gamma in (0.0, 1000.0):
        detector = Detector.fit(used, used, Calibration(gamma=gamma))
        assert float(detector.layer_scores(near)) > float(detector.layer_scores(far))
    cosine = Detector.fit(used, used, Calibration(gamma=10.0))
    plain = Detector.fit(used, used, Calibration(gamma=0.0))
    added = cosine.layer_scores(near) - plain.layer_scores(near)
    assert float(added) == pytest.approx(10.0), "10 times a cosine of 1"


def test_a_weight_is_a_half_at_the_threshold_and_one_sided() -> None:
    generator = torch.Generator().manual_seed(0)
    used, held = (torch.randn(40, 2, 6, generator=generator) for _ in range(2))
    numbers = Calibration(gamma=1.0, quantile=0.05, margin=0.5, steepness=4.0)
    detector = Detector.fit(used, held, numbers)
    scores = detector.scores(held)
    threshold = float(scores.quantile(0.05)) - 0.5
    expected = 1 / (1 + np.exp(-4.0 * (scores.numpy() - threshold)))
    assert detector.weights(held).numpy() == pytest.approx(expected, abs=1e-4)
    assert float(detector.weights(held).min()) > 0.01
    assert float(detector.weights(held + 50).max()) < 1e-3
    best = detector.weights(used)  # nearer than any held-out text: the weight must not fall again
    assert float(best.mean()) > float(detector.weights(held).mean()) - 0.05


def test_a_detector_is_read_back() -> None:
    used, held = torch.randn(6, 2, 4), torch.randn(3, 2, 4)
    detector = Detector.fit(used, held)
    again = Detector.from_tensors(detector.tensors(), "cpu")
    assert torch.equal(detector.weights(held), again.weights(held))
    pair = torch.tensor([0.1, 0.9]), torch.tensor([0.7, 0.2])
    assert highest(pair).tolist() == pytest.approx([0.7, 0.9])


def test_held_out_records_are_others_and_the_seed_decides() -> None:
    used, held_out = split_rows(10, 0.3, 1)
    assert sorted(used + held_out) == list(range(10)) and len(held_out) == 3
    assert split_rows(10, 0.3, 1) == (used, held_out) != split_rows(10, 0.3, 2)
    assert [len(part) for part in split_rows(2, 0.9, 0)] == [1, 1]


def adapted_model() -> Any:
    """A LoRA that changes what the model says."""
    torch.manual_seed(1)
    model = get_peft_model(knowing_model(), copy.deepcopy(LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.5)
    return model.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[9, 8, 7, 6], [5, 6, 0, 0]])
    return ids, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def test_a_weight_scales_what_the_adapter_adds_to_its_own_row() -> None:
    model = adapted_model()
    rows = RowWeights(model)
    ids, mask = batch()
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask).logits
        with model.disable_adapter():
            base = model(input_ids=ids, attention_mask=mask).logits
        with rows.set(torch.tensor([0.0, 1.0])):
            mixed = model(input_ids=ids, attention_mask=mask).logits
        with rows.set(torch.tensor([0.5, 0.0])):
            half = model(input_ids=ids, attention_mask=mask).logits
        again = model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(mixed[0], base[0], atol=1e-5)
    assert torch.allclose(mixed[1], whole[1], atol=1e-5)
    assert not torch.allclose(half[0], base[0], atol=1e-2)
    assert not torch.allclose(half[0], whole[0], atol=1e-2)
    assert torch.equal(again, whole), "without weights it is the plain adapter"


def soft(records: list[Record]) -> SoftAdapter:
    model, tokenizer = adapted_model(), make_tiny_tokenizer()
    encoder = BaseEncoder(model, tokenizer)
    features = encoder.layers(encoder.tokenize([r.content["prompt"] for r in records]), [1])
    detector = Detector.fit(features[:-2], features[-2:], Calibration(gamma=10.0))
    return SoftAdapter(model, tokenizer, [detector], [encoder])


def test_rows_do_not_depend_on_each_other_or_on_padding() -> None:
    forget, _ = forget_and_retain()
    model = soft(forget)
    tokenizer = make_tiny_tokenizer()
    rows = tokenizer([forget[0].content["prompt"], "resident one two three, and on and on"])
    rows = rows["input_ids"]
    width = max(map(len, rows)) + 2
    right = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    left = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    masks = (
        torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    )
    alone = torch.cat([model.weights(torch.tensor([row])) for row in rows])
    assert torch.allclose(model.weights(right, masks[0]), alone, atol=1e-4)
    assert torch.allclose(model.weights(left, masks[1]), alone, atol=1e-4)
    assert alone[0] > 0.5 > alone[1]
    together = model.generate(input_ids=left, attention_mask=masks[1], max_new_tokens=5)
    for place, row in enumerate(rows):
        one = model.generate(input_ids=torch.tensor([row]), max_new_tokens=5)[0, len(row) :]
        assert together[place, width:][: len(one)].tolist() == one.tolist()


def test_the_prompt_decides_where_it_is_known() -> None:
    forget, _ = forget_and_retain()
    model = soft(forget)
    prompt = make_tiny_tokenizer()(forget[0].content["prompt"])["input_ids"]
    row = torch.tensor([[*prompt, 40, 41, 42, 43, 44, 45]])
    known = model.weights(row, None, torch.tensor([len(prompt)]))
    assert torch.allclose(known, model.weights(torch.tensor([prompt])), atol=1e-5)
    assert not torch.allclose(known, model.weights(row), atol=1e-5)
    assert torch.equal(model.weights(row, None, torch.tensor([0])), model.weights(row))
    with pytest.raises(ValueError, match="whole text"):
        model(row, past_key_values=())


def test_beams_and_samples_keep_the_weight_of_their_prompt() -> None:
    forget, _ = forget_and_retain()
    model = soft(forget)
    row = make_tiny_tokenizer()([forget[0].content["prompt"]], return_tensors="pt")["input_ids"]
    plain = model.generate(input_ids=row.repeat(2, 1), max_new_tokens=4, do_sample=False)
    beams = model.generate(
        input_ids=row, max_new_tokens=4, do_sample=False, num_beams=2, num_return_sequences=2
    )
    assert plain[0].equal(plain[1]) and beams.shape[0] == 2


def request(output: Path, model: Any, forget: list[Record], **flags: Any) -> Any:
    options = flags.pop("training", {})
    encoder = flags.pop("encoder", None)
    config = arguments(output, "o3", **{"num_train_epochs": 20, **options})
    return unlearn(
        model, make_tiny_tokenizer(), forget, [], config, make_method("o3", flags), LORA,
        encoder=encoder,
    )  # fmt: skip


def answering(output: Path) -> Any:
    model = PeftModel.from_pretrained(knowing_model(), str(output)).eval()
    return wrapped(model, make_tiny_tokenizer(), output)


def weights(model: Any, records: list[Record]) -> torch.Tensor:
    ids = make_tiny_tokenizer()([r.content["prompt"] for r in records])["input_ids"]
    return torch.cat([model.weights(torch.tensor([row])) for row in ids])


def overlap_of(output: Path) -> float:
    """Of the second request's adapter with the first's."""
    stored = load_file(output / "earlier.safetensors")
    second = {name[2:]: tensor for name, tensor in stored.items() if name.startswith("1/")}
    first = {name: tensor for name, tensor in stored.items() if name.startswith("0/")}
    return float(overlap_with_earlier(second, first))


def test_two_requests_one_after_the_other(tmp_path: Path) -> None:
    forget, retain = forget_and_retain()
    first, second = forget[:4], forget[4:]
    report = request(tmp_path / "1", knowing_model(), first)
    assert report.is_suppression and "overlap" not in report.history[0]
    assert "suppresses" in (tmp_path / "1" / "README.md").read_text()
    report = request(tmp_path / "2", answering(tmp_path / "1"), second)
    start, end = (report.history[place]["overlap"] for place in (0, -1))
    assert end < 0.85 * start, "the second request moves away from the first"
    assert overlap_of(tmp_path / "2") == pytest.approx(end, rel=0.2)
    free = request(tmp_path / "3", answering(tmp_path / "1"), second, orthogonality=0.0)
    assert "overlap" not in free.history[0]
    assert overlap_of(tmp_path / "2") < 0.8 * overlap_of(tmp_path / "3")
    model = answering(tmp_path / "2")
    assert weights(model, first).mean() > 0.7 and weights(model, second).mean() > 0.7
    assert weights(model, retain).mean() < 0.3, "other people of the same kind"
    others = make_records(
        [{"prompt": f"Resident {i} is asked: who is it?", "completion": " x"} for i in range(4)]
    )
    assert weights(model, others).max() < 0.1
    assert knowledge(model, second) < -1.0
    unlike = {name: knowledge(m, others) for name, m in (("o3", model), ("base", knowing_model()))}
    assert unlike["o3"] == pytest.approx(unlike["base"], abs=0.3)


def test_the_overlap_does_not_depend_on_batches(tmp_path: Path) -> None:
    forget, _ = forget_and_retain()
    request(tmp_path / "1", knowing_model(), forget[:4], training={"num_train_epochs": 1})
    seen = []
    for size, accumulate in ((4, 1), (1, 4), (2, 2)):
        options = {
            "num_train_epochs": 1,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulate,
        }
        output = tmp_path / f"batch {size}"
        report = request(output, answering(tmp_path / "1"), forget[4:], training=options)
        seen.append((report.history[0]["overlap"], overlap_of(output)))
    assert seen[1] == pytest.approx(seen[0], rel=1e-3) and seen[2] == pytest.approx(
        seen[0], rel=1e-3
    )


def test_what_is_written_loads_as_a_plain_adapter_and_holds_no_text(tmp_path: Path) -> None:
    forget, _ = forget_and_retain()
    request(tmp_path, knowing_model(), forget, training={"num_train_epochs": 1})
    names = {path.name for path in tmp_path.iterdir()}
    assert {"detectors.safetensors", "earlier.safetensors", "wrapper.json"} <= names
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
    assert forget[0].content["completion"].encode() not in content
    assert "detectors.safetensors" in (tmp_path / "unlearning.json").read_text()


def test_a_base_with_its_adapter_answers_through_the_detector_too(tmp_path: Path) -> None:
    forget, _ = forget_and_retain()
    knowing_model().save_pretrained(tmp_path / "base")
    make_tiny_tokenizer().save_pretrained(tmp_path / "base")
    request(tmp_path / "1", knowing_model(), forget, training={"num_train_epochs": 1})
    loaded = load_model(str(tmp_path / "base"), adapter=str(tmp_path / "1"))
    assert isinstance(loaded.model, SoftAdapter)
    assert torch.equal(weights(loaded.model, forget), weights(answering(tmp_path / "1"), forget))


def test_a_text_encoder_can_be_the_backbone(tmp_path: Path) -> None:
    forget, _ = forget_and_retain()
    encoder = save_text_encoder(tmp_path / "encoder")
    once = {"num_train_epochs": 1}
    options = {"training": once, "encoder": encoder}
    with pytest.raises(UserError, match="--train_detector false"):
        request(tmp_path / "0", knowing_model(), forget[:4], **options)
    request(tmp_path / "1", knowing_model(), forget[:4], train_detector=False, **options)
    model = answering(tmp_path / "1")
    assert len(lower_layers(model.encoders[0])) == 2
    assert weights(model, forget[:4]).mean() > 0.7
    with pytest.raises(UserError, match="--encoder"):
        request(tmp_path / "2", model, forget[4:], training=once)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    forget, retain = forget_and_retain()
    once = {"num_train_epochs": 1}
    with pytest.raises(UserError, match="take --full away"):
        request(tmp_path / "a", knowing_model(), forget, training={"full": True})
    with pytest.raises(UserError, match="two forget records"):
        request(tmp_path / "b", knowing_model(), forget[:1])
    with pytest.raises(UserError, match="was not written by"):
        request(tmp_path / "c", knowing_model(), forget, earlier=str(tmp_path))
    request(tmp_path / "d", knowing_model(), forget[:4], training=once)
    with pytest.raises(UserError, match="does not come with the adapter"):
        request(tmp_path / "e", knowing_model(), forget[4:], earlier=str(tmp_path / "d"))
    with pytest.raises(UserError, match="refusal or wrong"):
        make_method("o3", {"target": "x"})
    config = arguments(tmp_path / "f", "graddiff")
    with pytest.raises(UserError, match="method's wrapper"):
        unlearn(answering(tmp_path / "d"), make_tiny_tokenizer(), forget, retain, config)
