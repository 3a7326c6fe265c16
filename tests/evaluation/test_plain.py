"""The oracles themselves, on cases worked out by hand."""

import math
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.evaluation import plain_muse, plain_open_unlearning
from tests.evaluation.folders import make_muse_folder, make_tofu_folder
from tests.evaluation.plain_open_unlearning import IGNORED, Encoded
from tests.tiny import make_tiny_model, make_tiny_tokenizer

MUSE_METRICS = {
    "forget_verbmem", "forget_knowmem", "retain_knowmem", "privleak", "extraction_strength", "exact_memorization",
    "mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_gradnorm",
}  # fmt: skip


class Bigram(torch.nn.Module):
    """After token i, token i + 1 has the probability `forward_probability`; the other three share the
    rest. Greedy decoding counts up, or from a probability below 1/4 does not."""

    device = torch.device("cpu")

    def __init__(self, forward_probability: float = 0.5) -> None:
        super().__init__()
        table = torch.full((4, 4), (1 - forward_probability) / 3)
        for i in range(4):
            table[i, (i + 1) % 4] = forward_probability
        self.table = torch.nn.Parameter(table.log())

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def row(ids: list[int], prompt: int) -> Encoded:
    return Encoded(ids, ids[:prompt], [IGNORED] * prompt + ids[prompt:])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tiny_tokenizer()


@pytest.fixture(scope="module")
def muse_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_muse_folder(tmp_path_factory.mktemp("muse"), n=3)


def memorise(tokenizer: Any, texts: list[str], steps: int = 120) -> Any:
    """A tiny model trained to repeat the texts."""
    model = make_tiny_model()
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


def test_likelihood_metrics_by_hand() -> None:
    model = Bigram(0.5)
    counted = row([0, 1, 2, 3, 0], prompt=1)  # every step has p = 1/2
    assert plain_open_unlearning.mia_loss(model, counted) == pytest.approx(math.log(2))
    assert plain_open_unlearning.probability(model, counted) == pytest.approx(0.5)
    # Steps of 1/2, 1/6, 1/2, 1/2: the mean log is that of the fourth root of 1/48.
    broken = row([0, 1, 1, 2, 3], prompt=1)
    assert plain_open_unlearning.probability(model, broken) == pytest.approx((1 / 48) ** 0.25)
    assert plain_open_unlearning.probability_w_options(
        model, counted, [broken, broken]
    ) == pytest.approx(0.5 / (0.5 + 2 * (1 / 48) ** 0.25))
    assert plain_open_unlearning.truth_ratio(model, [counted], [broken]) == pytest.approx(
        (1 / 48) ** 0.25 / 0.5
    )
    # Two wrong answers: the geometric mean of their probabilities.
    assert plain_open_unlearning.truth_ratio(model, [counted], [broken, counted]) == pytest.approx(
        math.sqrt((1 / 48) ** 0.25 * 0.5) / 0.5
    )


def test_memorisation_by_hand() -> None:
    model = Bigram(0.5)
    memorised, strength = (
        plain_open_unlearning.exact_memorization,
        plain_open_unlearning.extraction_strength,
    )
    # Labels 1, 1, 2, 3, (0): hit, miss, hit, hit; the last label does not count.
    mixed = row([0, 1, 1, 2, 3, 0], prompt=1)
    assert memorised(model, mixed) == 3 / 4
    assert strength(model, mixed) == 1 - 2 / 4
    counted = row([0, 1, 2, 3, 0], prompt=1)
    assert (memorised(model, counted), strength(model, counted)) == (1, 1)
    # Nothing is hit: the floor is 1/m.
    never = row([0, 0, 0, 0, 0], prompt=1)
    assert (memorised(model, never), strength(model, never)) == (0, pytest.approx(1 / 3))
    assert math.isnan(memorised(model, row([0, 1], prompt=1)))


def test_membership_scores_by_hand(tokenizer: Any) -> None:
    model = Bigram(0.5)
    mixed = row([0, 1, 1, 2, 3, 0], prompt=1)  # logs of 1/2, 1/6, 1/2, 1/2 and the last
    assert plain_open_unlearning.mia_min_k(model, mixed, 0.4) == pytest.approx(math.log(6))
    assert plain_open_unlearning.mia_min_k(model, mixed, 0.5) == pytest.approx(math.log(12) / 2)
    mean_log = 0.5 * math.log(0.5) + 0.5 * math.log(1 / 6)
    variance = 0.5 * math.log(0.5) ** 2 + 0.5 * math.log(1 / 6) ** 2 - mean_log**2
    assert plain_open_unlearning.mia_min_k_plus_plus(model, mixed) == pytest.approx(
        -(math.log(1 / 6) - mean_log) / math.sqrt(variance)
    )
    flat = Bigram(0.25)  # no deviation at all: the floor of 1e-6 keeps it finite
    assert plain_open_unlearning.mia_min_k_plus_plus(flat, mixed) == pytest.approx(0, abs=1e-3)
    text = tokenizer.decode([1, 1, 2, 3, 0], skip_special_tokens=True)
    assert plain_open_unlearning.mia_zlib(model, tokenizer, mixed) == pytest.approx(
        plain_open_unlearning.mia_loss(model, mixed) / len(zlib.compress(text.encode()))
    )
    assert plain_open_unlearning.mia_reference(model, flat, mixed) == pytest.approx(
        (4 * math.log(2) + math.log(6)) / 5 - math.log(4)
    )
    # d/dlogits of the mean -log p: (softmax - one-hot) / 4 a step. Table row 1 is met twice.
    before, after = [0, 1, 1, 2], [1, 1, 2, 3]
    gradient = torch.zeros(4, 4)
    for i, j in zip(before, after, strict=True):
        gradient[i] += model.table[i].detach().exp() / 4
        gradient[i, j] -= 1 / 4
    assert plain_open_unlearning.mia_gradnorm(model, mixed) == pytest.approx(float(gradient.norm()))
    assert model.table.grad is None


def test_loss_agrees_with_transformers(tokenizer: Any) -> None:
    model = make_tiny_model()
    encoded = plain_open_unlearning.encode_tags(tokenizer, "who eats?", "person 3.")
    with torch.no_grad():
        loss = model(torch.tensor([encoded.ids]), labels=torch.tensor([encoded.labels])).loss
    assert plain_open_unlearning.mia_loss(model, encoded) == pytest.approx(float(loss), rel=1e-5)
    text = "what does person 3 eat?"
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    found = plain_muse.privleak_values(model, tokenizer, text)
    assert found["PPL"] == pytest.approx(float(loss), rel=1e-5)
    assert found["PPL/zlib"] == found["PPL"] / len(zlib.compress(text.encode()))


def test_aggregates_by_hand() -> None:
    assert plain_open_unlearning.closer_to_1_better([0.5, 2.0, 1.0]) == pytest.approx(2 / 3)
    assert plain_open_unlearning.true_better([0.5, 2.0, 0.0]) == pytest.approx(0.5)
    assert plain_open_unlearning.hm_aggregate([0.5, 1.0]) == pytest.approx(2 / 3)
    assert plain_open_unlearning.hm_aggregate([0.5, 0.0]) == 0
    assert plain_open_unlearning.ks_test([1, 2, 3], [1, 2, 3]) == 1
    # Two samples of three that do not overlap: 2 of the 20 orders are as far apart.
    assert plain_open_unlearning.ks_test([1, 2, 3], [4, 5, 6]) == pytest.approx(0.1)


def test_orientations_mirror_each_other() -> None:
    forget, holdout = [1.0, 2.0, 3.0], [2.0, 4.0, 5.0]  # -log p: forget texts are better known
    # 9 pairs: holdout is lower in one (2 < 3), tied in one.
    assert plain_muse.auc(forget, holdout) == pytest.approx(1.5 / 9)
    assert plain_open_unlearning.auc(forget, holdout) == pytest.approx(7.5 / 9)
    assert plain_open_unlearning.auc([*forget, math.nan], holdout) == pytest.approx(7.5 / 9)
    assert plain_open_unlearning.privleak(1.0) == pytest.approx(-100)
    # The AUCs that MUSE publishes for Books: 0.2313 of the target, 0.5393 of the retrained model.
    assert plain_open_unlearning.privleak(1 - 0.2313, 1 - 0.5393) == pytest.approx(-57.11, abs=0.01)


def test_few_shot_answers_are_cut_at_the_first_stop() -> None:
    assert plain_muse.cut_at_stop(" rice \n\nQuestion: who") == " rice "
    assert plain_muse.cut_at_stop("riceQuestion: who\n\n") == "rice"
    assert plain_muse.cut_at_stop(" rice") == " rice"
    assert plain_muse.knowmem_prompt("c", [{"question": "a", "answer": "b"}]) == (
        "Question: a\nAnswer: b\n\nQuestion: c\nAnswer: "
    )


def test_rouge_by_hand() -> None:
    # Longest common subsequence "the people eat": 3 of 4 words wanted, 3 of 5 given.
    wanted, given = "the people eat rice", "the hungry people eat noodles"
    assert plain_muse.rouge_l(wanted, given) == pytest.approx(2 * 3 / (4 + 5))
    assert plain_muse.rouge_l("dishes", "dish") == 0  # no stemming
    assert plain_muse.rouge_l("", "dish") == 0


def test_tags_lose_the_first_token_of_the_answer(tokenizer: Any) -> None:
    encoded = plain_open_unlearning.encode_tags(tokenizer, "who?", "dish number 3.", [("a", "b")])
    text = tokenizer.decode(encoded.ids)
    assert text == "Question: a\nAnswer: b\n\nQuestion: who?\nAnswer: dish number 3.</s>"
    # "Answer: " ends in a lone space, which the whole text merges into " dish".
    assert tokenizer.decode(encoded.prompt).endswith("Answer: ")
    assert tokenizer.decode(encoded.target) == " number 3.</s>"
    assert plain_open_unlearning.ground_truth(tokenizer, encoded) == "number 3."


def test_a_prompt_beyond_the_cut_has_an_empty_ground_truth(tokenizer: Any) -> None:
    encoded = plain_open_unlearning.encode_tags(tokenizer, "who?", "dish.", [("a", "b")] * 60)
    assert len(encoded.prompt) == 512
    assert encoded.target == [tokenizer.eos_token_id]
    assert plain_open_unlearning.ground_truth(tokenizer, encoded) == ""


def test_completions_and_chats(tokenizer: Any) -> None:
    encoded = plain_open_unlearning.encode_completion(tokenizer, "dish", "number 3", True)
    assert tokenizer.decode(encoded.target) == " number 3"
    assert tokenizer.decode(encoded.ids) == "dish number 3"
    text = plain_open_unlearning.encode_text(tokenizer, "dish number 3")
    assert (text.prompt, text.labelled[0]) == ([], 1)
    assert (
        len(plain_open_unlearning.encode_completion(tokenizer, "dish", "x" * 3000, True).target)
        == 2048
    )
    assert plain_open_unlearning.encode_text(tokenizer, "") == Encoded([], [], [])
    chat = plain_open_unlearning.encode_chat(tokenizer, "who?", "dish.")
    assert tokenizer.decode(chat.ids) == "<s>user\nwho?</s><s>assistant\ndish.</s>"
    assert tokenizer.decode(chat.target) == "dish.</s>"


def test_a_model_that_repeats_the_texts_scores_high(tokenizer: Any, muse_folder: Path) -> None:
    verbatim = plain_open_unlearning.read_rows(muse_folder / "verbmem" / "forget.json")
    forget = plain_open_unlearning.read_texts(muse_folder / "privleak" / "forget.json")
    holdout = plain_open_unlearning.read_texts(muse_folder / "privleak" / "holdout.json")
    texts = [f"{row['prompt']} {row['gt']}</s>" for row in verbatim]
    model = memorise(tokenizer, texts + forget)
    scores = plain_muse.verbmem(model, tokenizer, verbatim)
    assert min(scores) > 0.9
    assert max(plain_muse.verbmem(make_tiny_model(), tokenizer, verbatim)) < 0.2
    found = plain_muse.privleak(model, tokenizer, forget, holdout, auc_retrain=0.5)
    assert found["auc"]["Min-40%"] == 0
    assert found["privleak"] == -100
    assert plain_muse.privleak(model, tokenizer, forget, holdout)["privleak"] is None
    peer = plain_open_unlearning.muse(model, tokenizer, muse_folder)
    assert set(peer.values) == MUSE_METRICS
    assert peer.values["mia_min_k"] == 1
    assert peer.values["privleak"] == pytest.approx(-100)
    assert peer.values["exact_memorization"] > 0.9
    # With itself for the retrained model nothing leaks and every reference score is tied.
    same = plain_open_unlearning.muse(model, tokenizer, muse_folder, retrain=model)
    assert same.values["mia_reference"] == 0.5
    # AUC 1 of the reference: nothing is left to divide by but 1e-10, and 0 over it is 0.
    assert same.values["privleak"] == 0


@pytest.mark.parametrize("chat", [False, True])
def test_tofu_driver(tokenizer: Any, tmp_path: Path, chat: bool) -> None:
    folder = make_tofu_folder(tmp_path, n=2, empty_answer=True, long_texts=True)
    model = make_tiny_model(layers=1)
    scores = plain_open_unlearning.tofu(model, tokenizer, folder, retrain=model, chat=chat)
    assert scores.values["forget_quality"] == 1
    assert scores.values["mia_reference"] == 0.5
    assert 0 <= scores.values["model_utility"] <= 1
    for split in ("forget", "retain", "real_authors", "world_facts"):
        for kind in ("probability", "rouge", "truth_ratio"):
            assert len(scores.rows[f"{split}_{kind}"]) == 2
    (tmp_path / "holdout10.json").unlink()
    without = plain_open_unlearning.tofu(model, tokenizer, folder, chat=chat)
    assert set(scores.values) - set(without.values) == {
        "forget_quality", "privleak", "mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_gradnorm",
        "mia_reference",
    }  # fmt: skip
    assert without.values["model_utility"] == scores.values["model_utility"]


def test_folders_hold_what_they_promise(tokenizer: Any, tmp_path: Path) -> None:
    folder = make_muse_folder(tmp_path / "a", n=2, empty_answer=True, long_texts=True, lines=True)
    rows = plain_open_unlearning.read_rows(folder / "knowmem" / "forget_qa.json")
    assert rows[0]["answer"] == "" and "東京" in rows[1]["answer"]
    verbatim = plain_open_unlearning.read_rows(folder / "verbmem" / "forget.json")
    assert len(tokenizer(verbatim[1]["gt"])["input_ids"]) > 128
    texts = plain_open_unlearning.read_texts(folder / "privleak" / "holdout.json")
    assert min(len(tokenizer(text)["input_ids"]) for text in texts) > 512
    again = make_muse_folder(tmp_path / "b", n=2, plain_strings=False)
    assert plain_open_unlearning.read_rows(again / "privleak" / "retain.json")[0]["text"]
    first = (again / "verbmem" / "forget.json").read_bytes()
    make_muse_folder(again, n=2, plain_strings=False)
    assert (again / "verbmem" / "forget.json").read_bytes() == first
