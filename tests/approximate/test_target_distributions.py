"""UNDIAL, CE-U and SCRUB against distributions computed by hand."""

import math

import pytest
import torch

from llm_unlearn.approximate.methods.ceu import CEU, ceu_loss, later_tokens, without_label
from llm_unlearn.approximate.methods.scrub import SCRUB, disobedience, disobeys
from llm_unlearn.approximate.methods.undial import UNDIAL, adjusted_distributions, undial_loss
from tests.approximate.fixed import Fixed, logits_of, make_batch, make_step, means


def log_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([[probabilities]]).log()


def test_undial_turns_down_the_label_alone() -> None:
    target_BTV = adjusted_distributions(
        log_of(0.5, 0.25, 0.25), torch.tensor([[0]]), beta=math.log(2)
    )
    assert target_BTV[0, 0].tolist() == pytest.approx([1 / 3] * 3)


def test_undial_without_a_label_keeps_the_old_distribution() -> None:
    """-100 is no index: in a vocabulary of 300 it would turn down token 200."""
    log_BTV = torch.randn(1, 1, 300, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    target_BTV = adjusted_distributions(log_BTV, torch.tensor([[-100]]), beta=10.0)
    assert torch.allclose(target_BTV, log_BTV.exp())


def test_undial_is_least_at_its_target() -> None:
    before, label = log_of(0.5, 0.25, 0.25), torch.tensor([[0]])
    logits = adjusted_distributions(before, label, 2.0).log().requires_grad_()
    undial_loss(logits.log_softmax(-1), before, label, 2.0).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6
    even = undial_loss(log_of(1 / 3, 1 / 3, 1 / 3), before, label, math.log(2))
    assert even.item() == pytest.approx(math.log(3))


def test_undial_looks_at_labels_only() -> None:
    batches = {"forget": make_batch([[-100, -100, 0]], "forget")}
    before = logits_of([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    now = logits_of([[0.98, 0.01, 0.01], [1 / 3, 1 / 3, 1 / 3]])
    method = UNDIAL(beta=math.log(2))
    terms = method.terms(make_step(Fixed({"forget": now}, {"forget": before}), batches))
    assert means(terms, batches) == {"forget": pytest.approx(math.log(3))}


def test_undial_asks_for_retain_data_only_where_it_weighs() -> None:
    assert not UNDIAL().uses_retain
    assert UNDIAL(retain_weight=0.5).uses_retain
    assert not UNDIAL.uses_retain


def test_ceu_target_excludes_the_label_and_sums_to_one() -> None:
    target_BTV = without_label(log_of(0.5, 0.3, 0.2), torch.tensor([[0]]))
    assert target_BTV[0, 0].tolist() == pytest.approx([0.0, 0.6, 0.4])


def test_ceu_gradient_is_the_labels_probability_taken_away() -> None:
    logits = log_of(0.5, 0.3, 0.2).requires_grad_()
    ceu_loss(logits.log_softmax(-1), torch.tensor([[0]])).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].tolist() == pytest.approx([0.5, -0.3, -0.2])  # -p p_v / (1 - p)


def test_ceu_leaves_the_first_tokens_of_an_answer() -> None:
    labels_BT = torch.tensor([[-100, 5, 6, -100, 7], [-100, -100, -100, -100, 3]])
    assert later_tokens(labels_BT, 1).tolist() == [
        [False, False, True, False, True], [False] * 5,
    ]  # fmt: skip
    assert torch.equal(later_tokens(labels_BT, 0), labels_BT >= 0)


def test_ceu_terms() -> None:
    batches = {"forget": make_batch([[-100, 1, 0]], "forget")}
    fixed = Fixed({"forget": logits_of([[0.1, 0.9, 0.0001], [0.5, 0.3, 0.2]])})
    wanted = -(0.6 * math.log(0.3) + 0.4 * math.log(0.2))
    found = means(CEU().terms(make_step(fixed, batches)), batches)["forget"]
    assert found == pytest.approx(wanted / 2, rel=1e-4), "two labels, the first left out"
    assert not CEU.uses_retain


def test_scrub_moves_away_from_its_teacher() -> None:
    away = disobedience(log_of(0.5, 0.5), log_of(0.25, 0.75), clamp=0.0)
    assert away.item() == pytest.approx(-(0.5 * math.log(2) + 0.5 * math.log(2 / 3)))
    assert disobedience(log_of(0.5, 0.5), log_of(0.5, 0.5), clamp=0.0).item() == 0


def test_scrub_bound_ends_the_push() -> None:
    logits = log_of(0.001, 0.999).requires_grad_()
    away = disobedience(log_of(0.5, 0.5), logits.log_softmax(-1), clamp=1.0)
    away.sum().backward()
    assert away.item() == -1.0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


def test_scrub_takes_turns_and_ends_with_repair() -> None:
    assert [epoch for epoch in range(10) if disobeys(epoch, 3)] == [1, 3, 5]


def test_scrub_terms_by_turn() -> None:
    batches = {name: make_batch([[-100, 0, -100]], name) for name in ("forget", "retain")}
    now = dict.fromkeys(batches, logits_of([[0.25, 0.75], [0.5, 0.5]]))
    before = dict.fromkeys(batches, logits_of([[0.5, 0.5], [0.9, 0.1]]))
    kl = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    method, fixed = SCRUB(alpha=0.5, gamma=2.0), Fixed(now, before)
    obeying = method.terms(make_step(fixed, batches, epoch=0))
    assert means(obeying, batches) == {
        "retain": pytest.approx(-math.log(0.25)), "retain kl": pytest.approx(kl),
    }  # fmt: skip
    assert [term.weight for term in obeying] == [2.0, 0.5]
    disobeying = method.terms(make_step(fixed, batches, epoch=1))
    assert means(disobeying, batches) == {"forget": pytest.approx(-kl)}
