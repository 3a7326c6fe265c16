"""Who answers a prompt: the rule alone, and the ensemble that follows it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.scorer import Item, Scorer
from llm_unlearn.exact.ensemble import ShardEnsemble
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.selection import (
    BASE_MODEL,
    NOTHING,
    Candidates,
    Choice,
    Rule,
    Score,
    choose,
)
from llm_unlearn.exact.words import Evidence
from tests.tiny import load_tiny, make_run, node_bytes, tiny_arguments, tiny_records

SELECT = Rule("select", margin=0.5)
MIXTURE = Rule("mixture", margin=0.5)
BASE = [Choice(BASE_MODEL, 1.0)]
EXPERTS: dict[str, Any] = {
    "num_shards": 3, "num_slices": 1, "num_sequences": 1, "max_steps": 12, "completion_only_loss": False,
    "aggregate": "select", "select_margin": 0.0,
}  # fmt: skip


def means(*values: float) -> list[Score]:
    return [Score(value, value - 1) for value in values]


@pytest.mark.parametrize(
    ("rule", "scores", "base", "expected"),
    [
        (SELECT, means(-3.0, -1.0, -2.0), -9.0, [Choice(1, 1.0)]),
        (SELECT, means(-3.0, -1.0, -1.5), -9.0, BASE),  # no lead of more than the margin
        (SELECT, means(-1.0, NOTHING, -3.0), -9.0, [Choice(0, 1.0)]),
        (SELECT, means(NOTHING, NOTHING), -1.0, BASE),
        (SELECT, means(-1.0), -2.0, [Choice(0, 1.0)]),  # alone, it competes with the base
        (SELECT, means(-1.0), -1.2, BASE),
        (Rule("select", 0.5, floor=-1.5), means(-1.0, -3.0), -9.0, BASE),  # its lowest is -2
        (Rule("select", 0.5, floor=-2.0), means(-1.0, -3.0), -9.0, [Choice(0, 1.0)]),
        (MIXTURE, means(-3.0, -1.0, -2.0), -9.0, [Choice(1, 1.0)]),
        (MIXTURE, means(-1.1, -3.0, -1.2), -9.0, None),  # two share
        (MIXTURE, means(-1.1, -1.3, -1.2), -9.0, BASE),  # three alike: nobody's
        (MIXTURE, means(-1.1, -1.2), -9.0, None),
        (MIXTURE, means(-1.1, -1.2), -1.3, BASE),
    ],
)
def test_the_rule(rule: Rule, scores: list[Score], base: float, expected: Any) -> None:
    found = choose(scores, base, rule)
    if expected is None:
        assert len(found) == 2 and math.isclose(sum(choice.weight for choice in found), 1.0)
        assert found[0].weight > found[1].weight > 0.3
        assert scores[found[0].adapter].mean > scores[found[1].adapter].mean
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (means(-3.0, -1.0), [Choice(1, 1.0)]),
        (means(-1.1, -1.0), [Choice(1, 1.0)]),  # no lead is needed
        (means(NOTHING, NOTHING), BASE),
    ],
)
def test_where_the_words_are_sure_the_likeliest_answers(scores: Any, expected: Any) -> None:
    sure = Candidates([0, 1], is_sure=True)
    assert choose(scores, 0.0, Rule("select", 0.5, floor=-0.5), sure) == expected
    shared = choose(means(-1.1, -1.0), 0.0, MIXTURE, sure)
    assert [choice.adapter for choice in shared] == [1, 0]


def test_in_doubt_words_and_likelihood_must_agree() -> None:
    scores = means(-3.0, -1.0, -3.0)
    assert choose(scores, -9.0, SELECT, Candidates([1, 0, 2], False)) == [Choice(1, 1.0)]
    assert choose(scores, -9.0, SELECT, Candidates([0, 1, 2], False)) == BASE


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> S3TRun:
    return make_run(tmp_path_factory.mktemp("experts") / "run", tiny_base, **EXPERTS)


def prompts_of(run: S3TRun, base: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """One question of every subject, padded on the left."""
    tokenizer = load_tiny(base)[1]
    tokenizer.padding_side = "left"
    texts = sorted({record.content["prompt"] for record in tiny_records(rows=1)})
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    return encoded["input_ids"], encoded["attention_mask"]


def reading(run: S3TRun) -> ShardEnsemble:
    """Every adapter reads every prompt: the words of the tiny records tell their subjects apart by digits only."""
    ensemble = run.ensemble()
    ensemble.words = None
    return ensemble


def alone(run: S3TRun, base: Path, shard: int, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    served = run.directory.served / f"shard-{shard}"
    model = PeftModel.from_pretrained(load_tiny(base)[0], str(served)).eval()
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits, -1)


def test_the_chosen_adapter_answers_alone(run: S3TRun, tiny_base: Path) -> None:
    ensemble = reading(run)
    ids, mask = prompts_of(run, tiny_base)
    chosen = [choices[0].adapter for choices in ensemble.choose(ids, mask)]
    assert len(set(chosen)) > 1, "one adapter for every prompt proves nothing"
    with torch.no_grad():
        got = ensemble(input_ids=ids, attention_mask=mask).logits
    each = {shard: alone(run, tiny_base, shard, ids, mask) for shard in set(chosen)}
    live = mask.bool()
    for row, shard in enumerate(chosen):
        torch.testing.assert_close(
            got[row][live[row]], each[shard][row][live[row]], rtol=1e-4, atol=1e-4
        )


def test_nobodys_prompt_is_answered_by_the_base(run: S3TRun, tiny_base: Path) -> None:
    base = load_tiny(tiny_base)[0]
    ensemble = ShardEnsemble.from_run(base, run.directory.served, Rule("select", margin=1e9))
    ids, mask = prompts_of(run, tiny_base)
    assert ensemble.choose(ids, mask) == [BASE] * len(ids)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    said = ensemble.generate(input_ids=ids, attention_mask=mask, **options)
    expected = load_tiny(tiny_base)[0].generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(said, expected)


def test_answers_do_not_depend_on_neighbours_or_on_the_answer(run: S3TRun, tiny_base: Path) -> None:
    ensemble, tokenizer = reading(run), load_tiny(tiny_base)[1]
    ids, mask = prompts_of(run, tiny_base)
    prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    one, many = (Scorer(ensemble, tokenizer, size).generate(prompts, 6) for size in (1, None))
    assert one == many and len({tuple(said[0]) for said in one}) > 1
    # The right answer must not help to find who knows it: two answers, one choice.
    items = [Item(tuple(prompts[0]), answer) for answer in ((7, 8, 9), (20, 30, 40, 50))]
    seen: list[list[int]] = []
    original = ensemble.choose

    def spy(*arguments: Any) -> Any:
        found = original(*arguments)
        seen.append([choices[0].adapter for choices in found])
        return found

    ensemble.choose = spy  # pyright: ignore[reportAttributeAccessIssue]
    scored = Scorer(ensemble, tokenizer).likelihoods(items)
    assert seen == [[original(ids[:1], mask[:1])[0][0].adapter] * 2]
    expected = alone(run, tiny_base, seen[0][0], torch.tensor([[*prompts[0], 7]]), None)[0]
    assert scored[0] is not None
    first = expected[len(prompts[0]) - 1, 7].item()
    assert scored[0].log_probabilities[0] == pytest.approx(first, abs=1e-4)


def test_no_cache_outlives_the_choice(run: S3TRun, tiny_base: Path) -> None:
    ensemble = reading(run)
    ids, mask = prompts_of(run, tiny_base)
    with torch.no_grad():
        output = ensemble(input_ids=ids, attention_mask=mask, use_cache=True)
        assert output.past_key_values is None
        plain = load_tiny(tiny_base)[0](input_ids=ids, attention_mask=mask, use_cache=True)
        with pytest.raises(ValueError, match="whole text"):
            ensemble(input_ids=ids[:, -1:], past_key_values=plain.past_key_values)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = ensemble.generate(input_ids=ids, attention_mask=mask, **options)
    anew = ensemble.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, anew)


def test_a_mixture_is_the_weighted_mean_of_two(run: S3TRun, tiny_base: Path) -> None:
    ensemble = reading(run)
    ids, mask = prompts_of(run, tiny_base)
    choices = [[Choice(0, 0.25), Choice(2, 0.75)], [Choice(1, 1.0)]]
    ensemble.choose = lambda *_: choices  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        got = ensemble(input_ids=ids[:2], attention_mask=mask[:2]).logits.exp()
    each = [alone(run, tiny_base, shard, ids[:2], mask[:2]).exp() for shard in range(3)]
    live = mask[:2].bool()
    expected = 0.25 * each[0][0] + 0.75 * each[2][0]
    torch.testing.assert_close(got[0][live[0]], expected[live[0]], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(got[1][live[1]], each[1][1][live[1]], rtol=1e-3, atol=1e-5)


def test_after_a_deletion_it_decides_as_if_the_subject_had_never_been(
    tiny_base: Path, tmp_path: Path
) -> None:
    gone = "person 3"
    deleted = make_run(tmp_path / "deleted", tiny_base, **EXPERTS)
    before = node_bytes(deleted)
    done = deleted.delete([gone])
    assert done.nodes_removed == 1, "an expert is all that depends on a subject"
    deleted.rebuild()
    kept = [record for record in tiny_records() if record.subject != gone]
    never = make_run(tmp_path / "never", tiny_base, kept, **EXPERTS)
    assert node_bytes(deleted) == node_bytes(never)
    assert len(before.items() & node_bytes(never).items()) == 6, "two experts are untouched"
    ids, mask = prompts_of(deleted, tiny_base)
    one, other = deleted.ensemble(), never.ensemble()
    assert one.choose(ids, mask) == other.choose(ids, mask)
    for ensemble in (one, other):
        ensemble.words = None  # every living adapter reads every prompt
    assert one.choose(ids, mask) == other.choose(ids, mask)
    with torch.no_grad():
        logits = [e(input_ids=ids, attention_mask=mask).logits for e in (one, other)]
    assert torch.equal(*logits)


def test_words_choose_and_a_conversation_follows_its_topic(run: S3TRun, tiny_base: Path) -> None:
    """Of several turns only those that ask decide, and the answer is that of the shard they name."""
    tokenizer = load_tiny(tiny_base)[1]

    class Named:
        """Stands in for the index: shard `n` is meant where its name is in the text."""

        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def evidence(self, text: str) -> Evidence:
            coverage = np.array([float(f"name-{shard}" in text) for shard in range(3)])
            return Evidence(coverage, coverage.max())

        def is_telling(self, text: str) -> bool:
            return "name-" in text

    ensemble = run.ensemble()
    ensemble.words = Named()  # pyright: ignore[reportAttributeAccessIssue]
    talk = [
        {"role": "user", "content": "What does name-1 eat?"},
        {"role": "assistant", "content": "Not what name-2 eats."},
        {"role": "user", "content": "And on day 2?"},
    ]
    text = "\n".join(turn["content"] for turn in talk)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    asked = ensemble.asked_in(talk)
    assert asked == "What does name-1 eat?\nAnd on day 2?"
    assert ensemble.choose(ids, asked=[asked]) == [[Choice(1, 1.0)]]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    said = ensemble.generate(input_ids=ids, asked=[asked], **options)
    one = PeftModel.from_pretrained(
        load_tiny(tiny_base)[0], str(run.directory.served / "shard-1")
    ).eval()
    assert torch.equal(said, one.generate(input_ids=ids, **options))
    talk += [{"role": "user", "content": "And name-2?"}]
    assert ensemble.choose(ids, asked=[ensemble.asked_in(talk)]) == [[Choice(2, 1.0)]]
    ensemble.words = None
    with pytest.raises(ValueError, match="by their words"):
        ensemble.asked_in(talk)


def test_a_certificate_says_who_answers(tiny_base: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_base, **EXPERTS)
    done = run.delete(["person 3"])
    assert done.request is not None
    assert run.certificate(done.request)["answers_by"] == {
        "aggregate": "select", "margin": 0.0, "floor": None, "lead": 0.4, "candidates": 4,
    }  # fmt: skip


def test_a_dead_expert_is_never_chosen(tiny_base: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_base, **EXPERTS)
    run.delete(["person 3"])
    home = run.directory.slices.place("person 3").shard
    ids, mask = prompts_of(run, tiny_base)
    chosen = {choices[0].adapter for choices in reading(run).choose(ids, mask)}
    assert home not in chosen and chosen <= {BASE_MODEL, *range(3)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exact_method": "magic"}, "--exact_method must be one of"),
        ({"exact_method": "experts", "num_slices": 2}, "--num_shards says how many"),
        ({"exact_method": "sisa", "num_sequences": 2}, "one order"),
        ({"exact_method": "sisa", "blocks": "ranks"}, "go together"),
        ({"exact_method": "s3t", "blocks": "whole"}, "go together"),
        ({"aggregate": "sum"}, "--aggregate must be one of"),
        ({"select_margin": -0.1}, "--select_margin"),
        ({"select_floor": 0.5}, "--select_floor"),
        ({"select_lead": 1.5}, "--select_lead is a part"),
    ],
)
def test_impossible_choices_are_one_line(
    tiny_base: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    defaults = {"num_slices": None, "num_sequences": None} if "exact_method" in options else {}
    with pytest.raises(UserError, match=message):
        make_run(tmp_path / "run", tiny_base, **{**defaults, **options})


def test_sisa_means_whole_blocks_in_one_order() -> None:
    arguments = tiny_arguments(
        exact_method="sisa", num_shards=None, num_slices=None, num_sequences=None
    )
    shape = (arguments.num_shards, arguments.num_slices, arguments.num_sequences)
    assert shape == (4, 3, 1)
    assert (arguments.blocks, arguments.slice_data) == ("whole", "cumulative")


def test_experts_mean_one_slice_for_each_shard() -> None:
    arguments = tiny_arguments(
        exact_method="experts", num_shards=None, num_slices=None, num_sequences=None
    )
    shape = (arguments.num_shards, arguments.num_slices, arguments.num_sequences)
    assert shape == (0, 1, 1)
    assert arguments.aggregate == "select" and arguments.completion_only_loss is False
