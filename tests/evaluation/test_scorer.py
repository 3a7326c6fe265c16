"""Batches, padding, memory and interruptions change no number and no text."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_unlearn.data import world
from llm_unlearn.demonstration import MODEL_PATH
from llm_unlearn.evaluation.cache import BatchCache, forget_batches
from llm_unlearn.evaluation.scorer import Item, Scorer, TokenScores, answer, tokenize_open
from llm_unlearn.exact.base_model import load_base
from tests.tiny import CORPUS, load_tiny, make_tiny_model, make_tiny_tokenizer


def items(tokenizer: Any, texts: Sequence[str] = CORPUS) -> list[Item]:
    """Prompts and targets of many different lengths."""
    found = []
    for number, text in enumerate(texts):
        ids = tokenize_open(tokenizer, " ".join([text] * (1 + number % 3)))
        found.append(Item(tuple(ids[: 1 + number % 7]), tuple(ids[1 + number % 7 :])))
    return found


def assert_same(first: Sequence[Any], second: Sequence[Any], tolerance: float = 1e-6) -> None:
    for one, other in zip(first, second, strict=True):
        assert (one is None) == (other is None)
        for left, right in zip(one or (), other or (), strict=True):
            assert np.allclose(left, right, atol=tolerance, rtol=0)


def by_hand(model: Any, item: Item) -> TokenScores:
    """One row, no padding, in double precision after the model."""
    logits = model(input_ids=torch.tensor([[*item.prompt, *item.target]])).logits[0].double()
    log_p = torch.log_softmax(logits, -1)[len(item.prompt) - 1 : -1]
    p, target = log_p.exp(), torch.tensor(item.target)
    mean = (p * log_p).sum(-1)
    own = log_p[torch.arange(len(target)), target]
    deviation = ((p * log_p.square()).sum(-1) - mean.square()).sqrt()
    hits = (log_p.argmax(-1) == target).double()
    return TokenScores(*(x.detach().numpy() for x in (own, -mean, deviation, hits)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_batches_change_no_likelihood(family: str) -> None:
    model, tokenizer = make_tiny_model(family), make_tiny_tokenizer()
    rows = items(tokenizer)
    with torch.no_grad():
        expected = [by_hand(model, row) for row in rows]
    for batch_size in (1, 3, None):
        assert_same(Scorer(model, tokenizer, batch_size).likelihoods(rows), expected, 2e-6)


def test_the_next_token_is_the_one_after_the_prompt_whatever_the_batch() -> None:
    model, tokenizer = make_tiny_model("llama"), make_tiny_tokenizer()
    rows = items(tokenizer)
    prompts = [[*row.prompt, *row.target[:-1]] for row in rows if row.target]
    last = [row.target[-1] for row in rows if row.target]
    expected = [by_hand(model, row).log_probabilities[-1] for row in rows if row.target]
    for batch_size in (1, 3, None):
        found = Scorer(model, tokenizer, batch_size).next_token_distributions(prompts)
        assert np.allclose(np.exp(found).sum(axis=1), 1, atol=1e-5)
        assert np.allclose(found[np.arange(len(last)), last], expected, atol=1e-5)
    with pytest.raises(ValueError, match="at least one token"):
        Scorer(model, tokenizer).next_token_distributions([[]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_batches_change_no_answer(family: str) -> None:
    model, tokenizer = make_tiny_model(family), make_tiny_tokenizer()
    prompts = [row.prompt for row in items(tokenizer)]
    expected = Scorer(model, tokenizer, 1).generate(prompts, 12)
    assert len({tuple(said[0]) for said in expected}) > 3, "they all say the same"
    for batch_size in (7, None):
        assert Scorer(model, tokenizer, batch_size).generate(prompts, 12) == expected


def test_demonstration_answers_do_not_depend_on_the_batch() -> None:
    model, tokenizer = load_base(str(MODEL_PATH))
    rows = world.questions(world.public_people()[:20])
    prompts = [tokenize_open(tokenizer, row["prompt"]) for row in rows]
    one, many = (Scorer(model, tokenizer, size).generate(prompts, 8) for size in (1, None))
    assert one == many
    said = answer(model, tokenizer, [row["prompt"] for row in rows], 8)
    assert np.mean([s.strip() == r["answer"] for s, r in zip(said, rows, strict=True)]) > 0.9


def test_padding_token_may_be_the_end_of_sequence(tiny_base: Path) -> None:
    model, tokenizer = load_tiny(tiny_base)
    rows = items(tokenizer)
    # Ends of turns within the prompt are seen by the model, whatever the padding token is.
    rows = [Item((2, *row.prompt), row.target) for row in rows]
    expected = Scorer(model, tokenizer).likelihoods(rows)
    answers = Scorer(model, tokenizer).generate([row.prompt for row in rows], 6)
    tokenizer.pad_token = tokenizer.eos_token
    assert_same(Scorer(model, tokenizer, 4).likelihoods(rows), expected)
    assert Scorer(model, tokenizer, 4).generate([row.prompt for row in rows], 6) == answers


def test_half_precision_is_scored(tiny_base: Path) -> None:
    model, tokenizer = load_tiny(tiny_base)
    rows = items(tokenizer)
    expected = Scorer(model, tokenizer).likelihoods(rows)
    found = Scorer(model.bfloat16(), tokenizer).likelihoods(rows)
    gaps = [abs(a[0].mean() - b[0].mean()) for a, b in zip(found, expected, strict=True) if a and b]
    assert 0 < max(gaps) < 0.5
    assert all(row is None or row.log_probabilities.dtype == np.float64 for row in found)


class Scarce(torch.nn.Module):
    """A model in a machine that has memory for few rows."""

    def __init__(self, model: Any, rows: int):
        super().__init__()
        self.model, self.rows, self.batches = model, rows, []
        self.config, self.device = model.config, model.device

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        self.batches.append(len(input_ids))
        if len(input_ids) > self.rows:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_batches_that_do_not_fit_are_halved() -> None:
    model, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    rows = items(tokenizer)
    scarce = Scarce(model, rows=6)
    found = Scorer(scarce, tokenizer).likelihoods(rows)
    assert_same(found, Scorer(model, tokenizer).likelihoods(rows))
    assert scarce.batches[0] > 6
    with pytest.raises(RuntimeError, match="out of memory"):
        Scorer(Scarce(model, rows=0), tokenizer).likelihoods(rows)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    model = make_tiny_model()
    broken = Item((1,), (model.config.vocab_size,))
    with pytest.raises(IndexError):
        Scorer(model, make_tiny_tokenizer()).likelihoods([broken, Item((1,), (2,))])


def test_what_is_longer_than_the_context_is_not_scored() -> None:
    model, tokenizer = make_tiny_model("gpt2"), make_tiny_tokenizer()
    context = model.config.max_position_embeddings
    fits, too_long = (5,) * (context - 1), (5,) * context
    scorer = Scorer(model, tokenizer)
    found = scorer.likelihoods([Item(fits, (6,)), Item(too_long, (6,)), Item((5,), ())])
    assert found[0] is not None and found[1] is None and found[2] is None
    answers = scorer.generate([fits, too_long, (5, 6)], 8)
    assert len(answers[0][0]) <= 1, "it goes on past the context"
    assert answers[1] == [] and 0 < len(answers[2][0]) <= 8
    assert scorer.generate([(5, 6)], 8)[0] == answers[2], "neighbours changed the answer"


def test_nothing_to_do() -> None:
    scorer = Scorer(make_tiny_model(), make_tiny_tokenizer())
    assert scorer.likelihoods([]) == [] and scorer.generate([], 3) == []
    with pytest.raises(ValueError, match="one token before"):
        scorer.likelihoods([Item((), (1, 2))])
    with pytest.raises(ValueError, match="at least one row"):
        Scorer(make_tiny_model(), make_tiny_tokenizer(), 0)


def test_the_models_own_generation_settings_do_not_count() -> None:
    model, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    prompts = [row.prompt for row in items(tokenizer)]
    expected = Scorer(model, tokenizer).generate(prompts, 10)
    config = model.generation_config
    config.repetition_penalty, config.do_sample, config.temperature, config.top_k = (
        3.0,
        True,
        0.3,
        2,
    )
    assert Scorer(model, tokenizer).generate(prompts, 10) == expected


def test_samples_are_seeded_and_leave_the_generator_alone() -> None:
    model, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    prompts = [row.prompt for row in items(tokenizer)[:6]]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (
        Scorer(model, tokenizer).generate(prompts, 5, samples=4, temperature=1.0, seed=seed)
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
    assert all(len(said) == 4 for said in first)
    assert any(len({tuple(s) for s in said}) > 1 for said in first), "the samples are all the same"


def test_gradient_norms_are_those_of_the_loss() -> None:
    model, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    model.requires_grad_(False)
    row = items(tokenizer)[3]
    [found, none] = Scorer(model, tokenizer).gradient_norms([row, Item((1,), ())])
    assert math.isnan(none) and not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    ids = torch.tensor([[*row.prompt, *row.target]])
    labels = ids.clone()
    labels[0, : len(row.prompt)] = -100
    model(input_ids=ids, labels=labels).loss.backward()
    norms = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
    assert found == pytest.approx(np.mean(norms), rel=1e-5)


class Interrupted(Exception):
    pass


class Counting(torch.nn.Module):
    """Counts batches, and is interrupted at one of them."""

    def __init__(self, model: Any, at: int | None = None):
        super().__init__()
        self.model, self.at, self.count = model, at, 0
        self.config, self.device = model.config, model.device

    def forward(self, **inputs: Any) -> Any:
        self.count += 1
        if self.count == self.at:
            raise Interrupted
        return self.model(**inputs)


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    model, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    rows = items(tokenizer)

    def scorer(asked: Any, binding: str = "this model") -> Scorer:
        return Scorer(asked, tokenizer, 5, BatchCache(tmp_path, binding))

    with pytest.raises(Interrupted):
        scorer(Counting(model, at=4)).likelihoods(rows)
    going_on = Counting(model)
    found = scorer(going_on).likelihoods(rows)
    whole = Scorer(model, tokenizer, 5).likelihoods(rows)
    assert all((a[0] == b[0]).all() for a, b in zip(found, whole, strict=True) if a and b)
    assert going_on.count == len(rows) // 5 - 3
    # Another model finds nothing; other batches neither.
    other = Counting(model)
    scorer(other, "another model").likelihoods(rows)
    assert other.count == len(rows) // 5
    scorer(other).likelihoods([row._replace(prompt=(7, *row.prompt)) for row in rows])
    assert other.count == 2 * len(rows) // 5
    # Entries are private, survive damage, and go at the end.
    entries = list((tmp_path / ".partial").iterdir())
    assert entries and all(entry.stat().st_mode & 0o077 == 0 for entry in entries)
    for entry in entries:
        entry.write_text("{")
    assert_same(scorer(model).likelihoods(rows), whole)
    forget_batches(tmp_path)
    assert not list(tmp_path.iterdir())
