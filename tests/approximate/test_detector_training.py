"""The trained backbone of O3's detector: its losses by hand, the key model, requests side by side."""

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from llm_unlearn.approximate.detector_training import (
    BackboneTraining,
    TunedEncoder,
    backbone_loss,
    contrastive_entropy,
    even_batches,
    follow,
    load_backbone,
    masked_loss,
    train_backbone,
)
from llm_unlearn.approximate.encoder import load_encoder, text_of
from llm_unlearn.approximate.tuning import copied
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError
from llm_unlearn.models import wrapped
from tests.approximate.known import LORA, arguments, forget_and_retain, knowing_model
from tests.tiny import VOCABULARY, make_tiny_tokenizer

FAMILIES = {
    "roberta": (RobertaConfig, RobertaForMaskedLM),
    "bert": (BertConfig, BertForMaskedLM),
}


def save_masked_model(directory: Path, family: str = "roberta") -> str:
    """A small random masked language model with a tokenizer that has a mask."""
    torch.manual_seed(0)
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=VOCABULARY + 1, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=130, pad_token_id=0,
    )  # fmt: skip
    model = model_class(config)
    with torch.no_grad():  # a random model's texts are all alike: spread them
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    model.save_pretrained(directory)
    tokenizer = copy.deepcopy(make_tiny_tokenizer())
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_the_entropy_of_one_text_is_0() -> None:
    assert float(contrastive_entropy(torch.randn(1, 3, 4), torch.randn(1, 3, 4))) == 0.0


def test_the_entropy_of_one_hot_rows_is_0() -> None:
    apart_NLD = 40.0 * torch.eye(4)[:, None].expand(4, 2, 4)
    assert float(contrastive_entropy(apart_NLD, apart_NLD)) == pytest.approx(0.0, abs=1e-6)


def test_the_entropy_of_like_texts_is_log_n_in_each_layer() -> None:
    alike_NLD = torch.ones(5, 3, 4)
    found = float(contrastive_entropy(torch.randn(5, 3, 4), alike_NLD))
    assert found == pytest.approx(3 * math.log(5), rel=1e-5)


def test_the_entropy_by_hand() -> None:
    """Query 1 with products (log 3, 0), query 2 with (0, 0); the other layer is sure of itself."""
    queries = torch.tensor([[[1.0, 0.0], [50.0, 0.0]], [[0.0, 1.0], [0.0, 50.0]]])
    keys = torch.tensor([[[math.log(3.0), 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    first = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(contrastive_entropy(queries, keys)) == pytest.approx((first + math.log(2)) / 2)


def test_keys_get_no_gradient() -> None:
    queries, keys = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    contrastive_entropy(queries.requires_grad_(), keys.requires_grad_()).backward()
    assert keys.grad is None and queries.grad is not None and queries.grad.abs().max() > 0


def test_the_masked_loss_is_a_mean_over_masked_tokens() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [9.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    labels = torch.tensor([[1, -100], [0, -100]])
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert float(masked_loss(logits, labels)) == pytest.approx(expected)
    assert float(masked_loss(logits, torch.full((2, 2), -100))) == 0.0


def test_the_key_model_follows_by_its_momentum() -> None:
    keys, trained = {"a": torch.tensor([1.0])}, {"a": torch.tensor([3.0])}
    follow(keys, trained, 0.75)
    assert keys["a"].item() == pytest.approx(1.5)
    follow(keys, trained, 1.0)
    assert keys["a"].item() == pytest.approx(1.5), "frozen"


@pytest.mark.parametrize("count", [1, 2, 8, 9, 17, 23, 25, 41])
def test_no_batch_is_a_single_text(count: int) -> None:
    batches = even_batches(count, 8, "x")
    assert Counter(n for batch in batches for n in batch) == Counter(range(count))
    assert len(batches) == math.ceil(count / 8)
    assert max(map(len, batches)) <= 8 and (min(map(len, batches)) > 1 or count == 1)
    assert count < 8 or even_batches(count, 8, "y") != batches


def texts() -> list[str]:
    return [text_of(record) for record in forget_and_retain()[0]]


UNLIKE = [
    "dish dish dish", "aaaa bbbb", "what what", "person 7 7 7", "Question", "zzzzz", "12345", "## #",
]  # fmt: skip


def test_the_query_sees_masks_and_the_key_does_not(tmp_path: Path) -> None:
    """With dropout off and the key model at the start, the loss is that of two plain passes."""
    tuned, tokenizer = load_backbone(save_masked_model(tmp_path))
    rows = tokenizer(texts()[:3], padding=True, return_tensors="pt")
    ids, mask = rows["input_ids"], rows["attention_mask"]
    labels = torch.full_like(ids, -100)
    labels[:, 1] = ids[:, 1]
    masked = ids.clone()
    masked[:, 1] = tokenizer.mask_token_id
    tuned.model.eval()
    batch = {"input_ids": masked, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        for parameter in tuned.trainable.values():  # the trained model is not the key model
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert tuned.start is not None
        found = float(backbone_loss(tuned, batch, tuned.start, [1, 2]))
        outputs = tuned.model(masked, mask, output_hidden_states=True)
        with tuned.model.disable_adapter():
            before = tuned.model(ids, mask, output_hidden_states=True)
    expected = -float(outputs.logits[:, 1].log_softmax(-1).gather(1, ids[:, 1:2]).mean())
    for layer in (1, 2):
        query, key = (
            torch.stack([s[layer][i, : int(mask[i].sum())].mean(0) for i in range(3)])
            for s in (outputs.hidden_states, before.hidden_states)
        )
        shares = (query @ key.T).softmax(-1)
        expected -= float((shares * shares.log()).sum(1).mean())
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_entropy_and_depends_on_the_seed_alone(
    tmp_path: Path, family: str
) -> None:
    name = save_masked_model(tmp_path, family)
    how = BackboneTraining(learning_rate=1e-2, epochs=30)

    def train(seed: int) -> tuple[Any, Any, dict[str, torch.Tensor]]:
        tuned, tokenizer = load_backbone(name, seed=1)
        return tuned, tokenizer, train_backbone(tuned, tokenizer, UNLIKE, [1, 2], how, seed)

    torch.manual_seed(5)
    tuned, tokenizer, trained = train(3)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1)), "the caller's random numbers are left alone"
    again, other = train(3)[2], train(4)[2]
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    assert any(not torch.equal(trained[name], other[name]) for name in trained)
    assert all("lora" in name and "attention" in name for name in trained)
    start, end = (
        TunedEncoder(tuned, tokenizer, tensors).layers(tokenizer(UNLIKE)["input_ids"], [1, 2])
        for tensors in (tuned.start, trained)
    )
    before, after = (float(contrastive_entropy(queries, start)) for queries in (start, end))
    assert after < 0.85 * before


def test_an_untrained_backbone_is_the_text_encoder(tmp_path: Path) -> None:
    name = save_masked_model(tmp_path)
    tuned, tokenizer = load_backbone(name)
    plain = load_encoder(name)
    rows = plain.tokenize(texts())
    assert tuned.start is not None
    before = TunedEncoder(tuned, tokenizer, tuned.start).layers(rows, [1, 2, 4])
    assert torch.allclose(before, plain.layers(rows, [1, 2, 4]), atol=1e-6)
    moved = {name: tensor + 0.3 for name, tensor in tuned.start.items()}
    after = TunedEncoder(tuned, tokenizer, moved).layers(rows, [1, 2, 4])
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.equal(
        copied(tuned.trainable)[next(iter(moved))], tuned.start[next(iter(moved))]
    ), "the shared model is as it was"


def request(output: Path, model: Any, forget: list[Record], encoder: str, **flags: Any) -> Any:
    config = arguments(output, "o3", num_train_epochs=1)
    flags = {"detector_learning_rate": 1e-2, "detector_epochs": 5, **flags}
    method = make_method("o3", flags)
    unlearn(model, make_tiny_tokenizer(), forget, [], config, method, LORA, encoder=encoder)
    return answering(output)


def answering(output: Path) -> Any:
    model = PeftModel.from_pretrained(knowing_model(), str(output)).eval()
    return wrapped(model, make_tiny_tokenizer(), output)


def scores(model: Any, number: int, records: list[Record]) -> torch.Tensor:
    """What one request's detector says."""
    encoder = model.encoders[number]
    rows = encoder.tokenize([record.content["prompt"] for record in records])
    return model.detectors[number].scores(encoder.layers(rows, [1, 2]))


def test_every_request_has_a_backbone_of_its_own(tmp_path: Path) -> None:
    forget, retain = forget_and_retain()
    encoder = save_masked_model(tmp_path / "encoder")
    first = request(tmp_path / "1", knowing_model(), forget[:4], encoder)
    alone = scores(first, 0, forget)
    second = request(tmp_path / "2", first, forget[4:], encoder)
    stored = load_file(tmp_path / "2" / "backbones.safetensors")
    mine, theirs = ({n[2:]: t for n, t in stored.items() if n[0] == head} for head in "01")
    assert mine.keys() == theirs.keys() and any(not mine[n].equal(theirs[n]) for n in mine)
    assert torch.allclose(scores(second, 0, forget), alone, atol=1e-4), "the first is as it was"
    assert second.encoders[0] is not second.encoders[1]
    assert second.encoders[0].model is second.encoders[1].model, "one model for both"
    swapped = copy.copy(second)
    swapped.encoders = second.encoders[::-1]
    assert not torch.allclose(scores(swapped, 0, forget), alone, atol=1e-2)
    third = request(tmp_path / "3", second, retain[:4], encoder, train_detector=False)
    assert torch.allclose(scores(third, 1, forget), scores(second, 1, forget), atol=1e-4)
    assert not isinstance(third.encoders[2], TunedEncoder)
    ids = make_tiny_tokenizer()([r.content["prompt"] for r in forget])["input_ids"]
    weights = torch.cat([third.weights(torch.tensor([row])) for row in ids])
    assert weights.mean() > 0.7


def test_the_note_and_the_files_say_what_is_kept(tmp_path: Path) -> None:
    forget, _ = forget_and_retain()
    request(tmp_path / "1", knowing_model(), forget, save_masked_model(tmp_path / "encoder"))
    report = json.loads((tmp_path / "1" / "unlearning.json").read_bytes())
    assert any("backbones.safetensors" in note and "guard" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"detector_momentum": 1.5}, "between 0 and 1"),
        ({"held_out": 1.0}, "between 0 and 1"),
        ({"detector_epochs": 0}, "above 0"),
    ],
)
def test_flags_out_of_range_are_one_line(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_method("o3", flags)
