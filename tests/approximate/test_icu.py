"""ICU: its loss by hand, its pairs, and rows that are left out once they are forgotten."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_unlearn.approximate.batches import PairedRows, Pick
from llm_unlearn.approximate.encoder import load_encoder
from llm_unlearn.approximate.sample_stopping import (
    ForgottenWhen,
    IterativeStopper,
    bleu,
    greedy_match,
    ngram_overlap,
    split,
)
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.data.encoding import Example, encode
from llm_unlearn.data.records import Record, make_records
from tests.approximate.known import (
    LORA,
    arguments,
    forget_and_retain,
    knowing_model,
)
from tests.approximate.test_pairing import save_text_encoder
from tests.tiny import make_tiny_model, make_tiny_tokenizer


class FakeSide:
    """A side whose numbers are given."""

    def __init__(self, name: str, log_BT: list[list[float]], was: Any = None, now: Any = None):
        self.name = name
        self.log_probabilities_BT = torch.tensor(log_BT)
        self.reference_distributions_BTV = was
        self.distributions_BTV = now

    def per_token(self, name: str, values: torch.Tensor, weight: float) -> tuple[str, float, float]:
        return name, float(values.sum()), weight

    per_position = per_token


def test_the_loss_by_hand() -> None:
    was = torch.tensor([[[0.5, 0.5]]]).log()
    now = torch.tensor([[[0.25, 0.75]]]).log()
    step = {
        "forget": FakeSide("forget", [[-2.0, -1.0]]),
        "forget/pair": FakeSide("forget/pair", [[-4.0]], was, now),
    }
    terms = make_method("icu").terms(step)  # pyright: ignore[reportArgumentType]
    divergence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    names, values, weights = zip(*terms, strict=True)
    assert names == ("forget", "pair", "pair_kl")
    assert values == pytest.approx((-3.0, 4.0, divergence))
    assert weights == (1.0, 0.5, 1.0), "ascent on the forget set, descent on the pair"


def test_the_pair_of_a_stopped_row_is_left_out_with_it() -> None:
    example = Example("x", [1, 2], [1, 2], False)
    rows = PairedRows({"forget": [example] * 2, "forget/pair": [example] * 2, "retain": [example]})
    rows.stopped = {1}
    found = rows[Pick(forget=1, retain=0)]
    assert [found[name][2] for name in ("forget", "forget/pair", "retain")] == [False, False, True]
    assert all(one[2] for one in rows[Pick(forget=0, retain=0)].values())


def test_bleu_by_hand() -> None:
    true = "the cat sat on the mat today"
    assert bleu(true, true) == pytest.approx(1.0)
    # 1- to 4-grams of the five written words that are right: 5/5, 4/4, 3/3, 2/2; too short by two.
    assert bleu("the cat sat on the", true) == pytest.approx(math.exp(1 - 7 / 5))
    assert bleu("a dog ran over the hill", true) < 0.01
    assert bleu("Dish, 7", "dish, 7") == pytest.approx(1.0), "an answer of three words"
    assert bleu("", "word") == 0.0


def test_greedy_matching_by_hand() -> None:
    left = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert greedy_match(left, left) == pytest.approx(1.0)
    # One token of two is matched in the one direction, the only one in the other.
    assert greedy_match(left, left[:1]) == pytest.approx(2 * 0.5 / 1.5)


def test_overlap_by_hand() -> None:
    assert ngram_overlap([1, 2, 3, 4], [1, 2, 3, 5], 2) == pytest.approx(2 / 3)
    assert ngram_overlap([7, 8], [7, 8], 2) == 1.0
    assert ngram_overlap([], [7, 8], 2) == 0.0


def test_a_row_is_given_up_to_its_answer_and_a_text_up_to_its_half() -> None:
    answer = Example("a", [1, 2, 3, 4], [-100, -100, 3, 4], False)
    assert split(answer) == ([1, 2], [3, 4])
    turns = Example("c", [1, 2, 3, 4, 5, 6], [-100, 2, -100, -100, 5, 6], False)
    assert split(turns) == ([1, 2, 3, 4], [5, 6])
    text = Example("t", list(range(9)), list(range(9)), False)
    assert split(text) == ([0, 1, 2, 3], [4, 5, 6, 7])
    long = Example("t", list(range(300)), list(range(300)), False)
    assert [len(part) for part in split(long)] == [50, 50]


def stopper(records: list[Record], batch_size: int = 3, **options: Any) -> IterativeStopper:
    tokenizer = make_tiny_tokenizer()
    rows = [encode(record, tokenizer, 64, True) for record in records]
    numbers = options.pop("numbers", ForgottenWhen())
    return IterativeStopper(rows, tokenizer, 0, numbers, batch_size=batch_size, **options)


def test_known_rows_stay_and_unknown_rows_are_left_out() -> None:
    forget, _ = forget_and_retain()
    unseen = [
        {"prompt": f"Question: who is neighbour {i}?", "completion": f" {word} and nobody else"}
        for i, word in enumerate(("xylophone", "quartz"))
    ]
    mixed = [*forget[:3], *make_records(unseen)]
    assert stopper(mixed).stopped(knowing_model()) == {3, 4}
    assert stopper(mixed, batch_size=5).stopped(knowing_model()) == {3, 4}


def test_all_rows_are_forgotten_only_when_both_means_are_low() -> None:
    forget, _ = forget_and_retain()
    knowing, ignorant = knowing_model(), make_tiny_model(layers=2)
    unreachable = {"bleu": 0.0}
    low = ForgottenWhen(**unreachable)
    assert stopper(forget, numbers=low).stopped(ignorant) == set(range(8))
    assert stopper(forget, numbers=low).stopped(knowing) == set()
    one_arm = ForgottenWhen(**unreachable, accuracy=0.0)
    assert stopper(forget, numbers=one_arm).stopped(ignorant) == set()
    other_arm = ForgottenWhen(**unreachable, extraction=0.0)
    assert stopper(forget, numbers=other_arm).stopped(ignorant) == set()


def test_known_rows_are_extracted_and_predicted() -> None:
    forget, _ = forget_and_retain()
    asked = stopper(forget)._ask(knowing_model(), range(8))
    assert sum(one.accuracy for one in asked) / 8 > 0.9
    assert sum(one.extraction for one in asked) / 8 > 0.8
    assert not any(one.is_forgotten for one in asked)
    beams = stopper(forget, numbers=ForgottenWhen(beams=2))._ask(knowing_model(), range(8))
    assert not any(one.is_forgotten for one in beams)


def test_an_encoder_compares_tokens_too(tmp_path: Path) -> None:
    forget, _ = forget_and_retain()
    encoder = load_encoder(save_text_encoder(tmp_path))
    strict = ForgottenWhen(similarity=1.1)
    assert stopper(forget, numbers=strict, encoder=encoder).stopped(knowing_model()) == set(
        range(8)
    )
    assert stopper(forget, encoder=encoder).stopped(knowing_model()) == set()


@pytest.mark.parametrize("method", ["icu", "graddiff"])
def test_rows_are_left_out_while_training(method: str, tmp_path: Path) -> None:
    forget, retain = forget_and_retain()
    options = {"stop_samples": "icu"} if method != "icu" else {}
    config = arguments(tmp_path, method, num_train_epochs=12, **options)
    assert config.stop_samples == "icu"
    report = unlearn(
        knowing_model(), make_tiny_tokenizer(), forget, retain, config, make_method(method), LORA
    )
    assert report.stopped_rows == 8
    assert 0 < report.steps < 24, "training ended before the last epoch"


def test_a_row_comes_back_when_its_text_does() -> None:
    forget, _ = forget_and_retain()
    asked = stopper(forget[:2], numbers=ForgottenWhen(accuracy=0.0))
    assert asked.stopped(make_tiny_model(layers=2)) == {0, 1}
    assert asked.stopped(knowing_model()) == set()


def test_nothing_is_stopped_unless_asked(tmp_path: Path) -> None:
    assert arguments(tmp_path, "npo").stop_samples == "never"
    assert arguments(tmp_path, "icu", stop_samples="never").stop_samples == "never"


def test_texts_and_chats_work_and_full_weights_too(tmp_path: Path) -> None:
    texts = [
        {"text": f"Person {i} eats dish number {i} on every day of the week."} for i in range(6)
    ]
    records = make_records(texts)
    config = arguments(tmp_path / "t", "icu", num_train_epochs=1, full=True, stop_samples="never")
    report = unlearn(
        knowing_model(), make_tiny_tokenizer(), records[:3], records[3:], config,
        make_method("icu", {"too_close": 1.0}),
    )  # fmt: skip
    assert report.steps == 1 and not report.is_adapter
    chats = make_records(
        [
            {"messages": [{"role": "user", "content": f"What does {name} eat?"},
                          {"role": "assistant", "content": f"{name} eats {food}."}]}
            for name, food in (("Ada", "soup"), ("Bo", "rice"), ("Cy", "plums"), ("Di", "bread"))
        ]
    )  # fmt: skip
    config = arguments(tmp_path / "c", "icu", num_train_epochs=1)
    report = unlearn(
        knowing_model(),
        make_tiny_tokenizer(),
        chats[:2],
        chats[2:],
        config,
        make_method("icu"),
        LORA,
    )
    assert report.stopped_rows == 2, "nobody ever taught it these"


def main(output: str, batch_size: int) -> None:
    """One process of several: train until all rows are forgotten."""
    forget, retain = forget_and_retain()
    config = arguments(
        Path(output), "icu", num_train_epochs=12, per_device_train_batch_size=batch_size
    )
    unlearn(
        knowing_model(), make_tiny_tokenizer(), forget, retain, config, make_method("icu"), LORA
    )


@pytest.mark.slow
def test_two_processes_leave_out_the_same_rows(tmp_path: Path) -> None:
    reports = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        script = tmp_path / f"{processes}.py"
        script.write_text(
            "from tests.approximate.test_icu import main\n"
            f"main({str(output)!r}, {4 // processes})\n"
        )
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [sys.executable, *launch, str(script)],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        reports.append(json.loads((output / "unlearning.json").read_bytes()))
    one, two = reports
    assert one["stopped_rows"] == two["stopped_rows"] == 8
    assert one["steps"] == two["steps"]
    for left, right in zip(one["history"], two["history"], strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-4)
