"""The trainer: bits, batches, accumulation, resume, divergence, evaluation on the way."""

import copy
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from llm_unlearn.approximate import unlearn as unlearning
from llm_unlearn.approximate.arguments import COMMON, LORA_FACTOR, UnlearningConfig
from llm_unlearn.approximate.batches import PairCollator, PairedRows, PairSampler, Pick
from llm_unlearn.approximate.method import Method
from llm_unlearn.approximate.methods import METHODS, load_method
from llm_unlearn.approximate.methods.gradient_difference import GradientDifference
from llm_unlearn.approximate.methods.npo import NPO
from llm_unlearn.approximate.reference import Reference
from llm_unlearn.approximate.session import Session
from llm_unlearn.approximate.step import Step, count_units
from llm_unlearn.approximate.trainer import UnlearningTrainer
from llm_unlearn.approximate.tuning import Tuned, copied, tune
from llm_unlearn.approximate.unlearn import Watching, make_method, unlearn
from llm_unlearn.approximate.watch import Standing
from llm_unlearn.errors import RunError, UserError
from tests.approximate.known import LORA, arguments, forget_and_retain, knowing_model
from tests.tiny import make_tiny_tokenizer

WEIGHTS = "adapter_model.safetensors"


def run(output: Path, method: Method | str = "npo", **options: Any) -> dict[str, torch.Tensor]:
    """Unlearn, and read the tensors that were written."""
    forget, retain = forget_and_retain()
    given = make_method(method) if isinstance(method, str) else method
    name = method if isinstance(method, str) else "npo"
    config = arguments(output, name, **options)
    unlearn(knowing_model(), make_tiny_tokenizer(), forget, retain, config, given, lora=LORA)
    name = "model.safetensors" if options.get("full") else WEIGHTS
    return load_file(output / name)


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("full", [False, True])
def test_equal_seeds_give_equal_bits(tmp_path: Path, full: bool) -> None:
    torch.manual_seed(1)
    first = run(tmp_path / "a", full=full)
    torch.manual_seed(2)  # the global state of a caller decides nothing
    second = run(tmp_path / "b", full=full)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = run(tmp_path / "c", full=full, seed=43)
    assert furthest(first, other) > 0


# SGD: Adam divides by the gradient's size, which makes rounding visible where a gradient vanishes.
STEADY = {"optim": "sgd", "learning_rate": 1e-2, "num_train_epochs": 2}


@pytest.mark.parametrize("method", ["npo", "graddiff"])
def test_accumulation_changes_nothing_but_rounding(tmp_path: Path, method: str) -> None:
    """Rows of 6 to 9 labels: a mean of micro-batch means would not agree."""
    whole = run(tmp_path / "a", method, per_device_train_batch_size=4, **STEADY)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    halves = run(tmp_path / "b", method, **parts, **STEADY)
    untouched = run(tmp_path / "c", method, **{**STEADY, "learning_rate": 1e-12})
    assert furthest(whole, halves) < 1e-4 * furthest(whole, untouched)


def test_a_step_divides_by_all_of_its_units() -> None:
    """Two micro-batches of unlike lengths give what one of both gives, in value and gradient."""
    forget, retain = forget_and_retain()
    session = _session(forget, retain, Path("unused"))
    rows = PairedRows(session.sides)
    collator = PairCollator(session.pad_token_id)
    picks = [Pick(0, 0), Pick(1, 1), Pick(2, 2)]
    reference = Reference(session.tuned, Path("unused"), session.pad_token_id)
    method = GradientDifference(forget_weight=3.0)  # or both losses would cancel

    def loss(groups: list[list[Pick]]) -> float:
        batches = [collator([rows[pick] for pick in group]) for group in groups]
        counts: dict[str, torch.Tensor] = {}
        for batch in batches:
            for name, units in count_units(batch).items():
                counts[name] = counts.get(name, torch.zeros_like(units)) + units
        total = 0.0
        for batch in batches:
            for term in method.terms(Step(session.model, batch, reference)):
                total += term.weight * term.total.item() / int(counts[term.side][1])
        return total

    assert loss([picks]) == pytest.approx(loss([picks[:1], picks[1:]]), rel=1e-6)


def test_padding_is_never_counted() -> None:
    forget, retain = forget_and_retain()
    session = _session(forget, retain, Path("unused"))
    reference = Reference(session.tuned, Path("unused"), session.pad_token_id)
    collator = PairCollator(session.pad_token_id)
    longest = max(session.sides["forget"], key=lambda e: len(e.input_ids))
    extended = longest._replace(
        input_ids=[*longest.input_ids, *longest.input_ids],
        labels=[*longest.labels, *longest.labels],
    )
    for wide in (False, True):
        rows = [(session.sides["forget"][0], 0, True)]
        rows += [(extended, 1, False)] if wide else []  # a filler, which makes the batch wider
        side = Step(
            session.model, {"forget": collator([{"forget": r} for r in rows])["forget"]}, reference
        )["forget"]
        term = side.per_position("x", torch.ones_like(side.log_probabilities_BT))
        values = (float(side.per_token("x", side.log_probabilities_BT).total), float(term.total))
        known = values if not wide else known  # noqa: F821 - the first round sets it
        assert values == pytest.approx(known, rel=1e-5)
    assert known[1] == len(session.sides["forget"][0].input_ids) - 1


def _session(forget: Any, retain: Any, work: Path, full: bool = False) -> Session:
    tuned = tune(knowing_model(), LORA, full, None, 0)
    session = Session(
        tuned, make_tiny_tokenizer(), forget, retain, arguments(work, "npo", full=full), work
    )
    session.sides["forget"], session.sides["retain"] = (
        session.encode(forget),
        session.encode(retain),
    )
    return session


def test_an_epoch_goes_through_the_anchor_once_and_fills_up_with_nothing() -> None:
    sampler = PairSampler({"forget": 5, "retain": 3}, "forget", 4, seed=0)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        picks = list(sampler)
        assert len(picks) == len(sampler) == 8
        assert sorted(p.forget for p in picks if p.counts) == list(range(5))
        epochs.append(picks)
    assert epochs[0] != epochs[1], "every epoch has an order of its own"
    partners = Counter(p.retain for picks in epochs for p in picks if p.counts)
    assert set(partners.values()) == {5}, "15 places, 3 retain rows, gone through 5 times"


def test_the_order_does_not_depend_on_processes() -> None:
    alone = PairSampler({"forget": 6, "retain": 9}, "forget", 2, seed=3)
    shared = PairSampler({"forget": 6, "retain": 9}, "forget", 4, seed=3)
    assert list(alone) == [pick for pick in shared if pick.counts]


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"save_strategy": "epoch", "num_train_epochs": 4}
    whole = run(tmp_path / "whole", **options)
    original = UnlearningTrainer.training_step

    def break_off(self: Any, *given: Any, **named: Any) -> Any:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *given, **named)

    monkeypatch.setattr(UnlearningTrainer, "training_step", break_off)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", **options)
    assert list((tmp_path / "parts" / "checkpoints").glob("checkpoint-*"))
    monkeypatch.setattr(UnlearningTrainer, "training_step", original)
    parts = run(tmp_path / "parts", **options)
    assert furthest(whole, parts) == 0
    report = json.loads((tmp_path / "parts" / "unlearning.json").read_bytes())
    assert [step["step"] for step in report["history"]] == list(range(1, 9))
    assert not (tmp_path / "parts" / "checkpoints").exists(), "they are made of forget data"


def test_checkpoints_of_another_request_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(UnlearningTrainer, "training_step", break_off)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    with pytest.raises(UserError, match="another request"):
        run(tmp_path / "out", learning_rate=1e-5)


@dataclass
class Breaks(NPO):
    """NPO whose loss is no number from the third step on."""

    def terms(self, step: Step) -> list[Any]:
        found = super().terms(step)
        broken = getattr(self, "_steps", 0) >= 2
        self._steps = getattr(self, "_steps", 0) + 1
        if broken:
            found[0] = type(found[0])("forget", found[0].total * math.nan, 1.0, "forget", "rows")
        return found


@pytest.mark.parametrize("full", [False, True])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(
    tmp_path: Path, full: bool
) -> None:
    """Two good losses: the weights of the second are the last that are known to give a number."""
    options = {"save_strategy": "epoch", "full": full, "lr_scheduler_type": "constant"}
    with pytest.raises(RunError, match=r"step 3.*last good state"):
        run(tmp_path / "broken", Breaks(), **options)
    name = "model.safetensors" if full else WEIGHTS
    kept = load_file(tmp_path / "broken" / name)
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    report = json.loads((tmp_path / "broken" / "unlearning.json").read_bytes())
    assert report["diverged_at"] == 3
    assert "diverged at step 3" in (tmp_path / "broken" / "README.md").read_text()
    steps = 2 if full else 1  # in full training the weights on disk are those after the epoch
    assert furthest(kept, run(tmp_path / "good", max_steps=steps, **options)) == 0


def test_full_tuning_and_lora_have_the_same_reference(tmp_path: Path) -> None:
    """Stored on disk, or the adapter swapped out: distributions and hidden states agree."""
    forget, retain = forget_and_retain()
    found = []
    for full in (False, True):
        session = _session(forget, retain, tmp_path / str(full), full)
        reference = Reference(session.tuned, session.work, session.pad_token_id, batch_size=3)
        needs = {"forget": {"distributions", "hidden", "log_probabilities"}}
        reference.prepare(needs, session.sides)
        with torch.no_grad():  # training moves the weights; the reference must not follow
            for parameter in session.tuned.trainable.values():
                parameter.add_(0.05)
        batch = PairCollator(0)([{"forget": (session.sides["forget"][i], i, True)} for i in (4, 1)])
        side = Step(session.model, batch, reference)["forget"]
        found.append(
            [side.reference_distributions_BTV * side.positions_BT[..., None],
             side.reference_hidden_BTD(1) * side.positions_BT[..., None],
             side.reference_log_probabilities_BT]
        )  # fmt: skip
        moved = side.log_probabilities_BT - side.reference_log_probabilities_BT
        assert moved.abs().max() > 1e-2
    for lora, stored in zip(*found, strict=True):
        assert torch.allclose(lora, stored, atol=1e-4)


def test_no_second_copy_of_the_base_is_made() -> None:
    forget, retain = forget_and_retain()
    session = _session(forget, retain, Path("unused"))
    assert session.tuned.start is not None
    aside = sum(tensor.numel() for tensor in session.tuned.start.values())
    everything = sum(p.numel() for p in session.model.parameters())
    assert aside == sum(p.numel() for p in session.tuned.trainable.values()) < everything / 2


class Looks:
    """Stands in for a suite: knowledge falls, and so does utility."""

    def __init__(self) -> None:
        self.epoch = 0

    def __call__(self, model: Any, tokenizer: Any) -> Standing:
        self.epoch += 1
        assert not model.training
        return Standing(forget=1 - 0.2 * self.epoch, utility=1 - 0.05 * self.epoch**2)


@pytest.mark.parametrize(
    ("options", "epochs", "kept"),
    [
        ({"stop_when": "utility_floor"}, 4, None),
        ({"stop_when": "forget_at_retrain"}, 3, None),
        ({"stop_when": "utility_floor", "utility_floor": 0.65}, 3, None),
        ({"keep": "best"}, 5, 2),
    ],
)
def test_evaluation_stops_training_and_keeps_the_best_state(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    epochs: int,
    kept: int | None,
) -> None:
    saved: dict[int, dict[str, torch.Tensor]] = {}
    looks, original = Looks(), Tuned.save

    def watched(self: Tuned, path: Path) -> None:
        saved[looks.epoch] = copied(self.trainable)
        original(self, path)

    monkeypatch.setattr(Tuned, "save", watched)
    forget, retain = forget_and_retain()
    config = arguments(tmp_path / "out", "npo", **options)
    watching = Watching(looks, Standing(forget=0.4, utility=0.3))
    report = unlearn(
        knowing_model(), make_tiny_tokenizer(), forget, retain, config, lora=LORA, watching=watching
    )
    assert list(report.standings) == list(range(1, epochs + 1))
    assert report.kept_epoch == kept
    if kept is not None:
        monkeypatch.setattr(Tuned, "save", original)
        best = load_file(tmp_path / "out" / WEIGHTS)
        for name, tensor in saved[kept].items():
            assert torch.equal(tensor, best[name.replace(".default", "")])


def test_a_stopping_rule_without_an_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--eval_suite"):
        run(tmp_path / "out", keep="best")


def test_forgotten_rows_no_longer_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopper that leaves one row: the others' losses move nothing, and nothing is NaN."""

    class Stops:
        def stopped(self, model: Any) -> set[int]:
            return set(range(1, 8))

    monkeypatch.setattr(unlearning, "make_stopper", lambda *_: Stops())
    kept = run(tmp_path / "a", "ga", num_train_epochs=1, **{"weight_decay": 0.0})
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    report = json.loads((tmp_path / "a" / "unlearning.json").read_bytes())
    assert report["stopped_rows"] == 7
    assert 0.0 in [step["forget"] for step in report["history"]], "a step without a row that counts"


@pytest.mark.parametrize(
    ("forget", "retain", "message"),
    [
        (slice(0, 0), slice(8, 24), "forget set is empty"),
        (slice(0, 8), slice(0, 0), "give --retain"),
        (slice(0, 8), slice(6, 24), "2 of 18 retain records are in the forget set too"),
    ],
)
def test_sets_that_cannot_be_are_refused(
    tmp_path: Path, forget: slice, retain: slice, message: str
) -> None:
    records = [record for group in forget_and_retain() for record in group]
    with pytest.raises(UserError, match=message):
        unlearn(
            knowing_model(), make_tiny_tokenizer(), records[forget], records[retain],
            arguments(tmp_path / "out", "npo"),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_is_taken_where_no_flag_is_given(name: str) -> None:
    method = load_method(name)
    wanted = {**COMMON, **method.preset}
    for full in (True, False):
        config = UnlearningConfig(method=name, full=full, use_cpu=True, bf16=False)
        factor = 1.0 if full else LORA_FACTOR
        assert config.learning_rate == pytest.approx(wanted["learning_rate"] * factor)
        assert config.num_train_epochs == wanted["num_train_epochs"]
    assert UnlearningConfig(method=name, learning_rate=7e-3, use_cpu=True).learning_rate == 7e-3


def test_the_card_says_that_nothing_is_guaranteed(tmp_path: Path) -> None:
    run(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "no guarantee" in card and "2404.05868" in card
    assert "person 0" not in card + (tmp_path / "out" / "unlearning.json").read_text()


def test_an_example_is_cut_and_said(tmp_path: Path) -> None:
    forget, retain = forget_and_retain()
    config = arguments(tmp_path / "out", "ga", max_length=22)
    report = unlearn(knowing_model(), make_tiny_tokenizer(), forget, retain, config, lora=LORA)
    assert any("are cut" in note for note in report.notes)


def test_an_adapter_under_another_name_is_refused(tmp_path: Path) -> None:
    """It would be written into a directory of that name, where nothing looks for it."""
    forget, retain = forget_and_retain()
    model = get_peft_model(knowing_model(), copy.deepcopy(LORA), adapter_name="mine")
    with pytest.raises(UserError, match="called mine"):
        unlearn(model, make_tiny_tokenizer(), forget, retain, arguments(tmp_path / "out", "npo"))
