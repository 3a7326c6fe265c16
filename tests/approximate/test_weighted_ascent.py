"""WGA, SatImp and NegGrad+ against numbers computed by hand."""

import math

import pytest
import torch

from llm_unlearn.approximate.methods.neggrad_plus import NegGradPlus
from llm_unlearn.approximate.methods.satimp import SatImp, satimp_loss
from llm_unlearn.approximate.methods.wga import WGA, wga_loss
from llm_unlearn.errors import UserError
from tests.approximate.fixed import Fixed, logits_of, make_batch, make_step, means


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log().requires_grad_()


def test_wga_weighs_a_token_by_a_power_of_its_probability() -> None:
    log_BT = logs(0.5, 0.25)
    loss_BT = wga_loss(log_BT, beta=2.0)
    assert loss_BT[0].tolist() == pytest.approx([0.25 * math.log(0.5), 0.0625 * math.log(0.25)])


def test_wga_weights_have_no_gradient() -> None:
    log_BT = logs(0.5)
    wga_loss(log_BT, beta=2.0).sum().backward()
    assert log_BT.grad is not None
    assert log_BT.grad.item() == pytest.approx(0.25)  # with one: 0.25 * (1 + 2 log 0.5) = -0.097


def test_wga_without_a_power_is_gradient_ascent() -> None:
    log_BT = logs(0.5, 0.01)
    assert torch.equal(wga_loss(log_BT, beta=0.0), log_BT)


def test_satimp_weighs_by_both_powers() -> None:
    loss_BT = satimp_loss(logs(0.25), beta1=2.0, beta2=1.0)
    assert loss_BT.item() == pytest.approx(0.0625 * 0.75 * math.log(0.25))


def test_satimp_limits() -> None:
    log_BT = logs(0.9, 0.3, 1.0)
    assert torch.allclose(satimp_loss(log_BT, 0.0, 0.0), log_BT), "gradient ascent"
    assert torch.allclose(satimp_loss(log_BT, 3.0, 0.0), wga_loss(log_BT, 3.0)), "WGA"


def test_satimp_leaves_certain_and_forgotten_tokens() -> None:
    log_BT = logs(1.0, 1e-6, 0.8)
    satimp_loss(log_BT, 5.0, 1.0).sum().backward()
    assert log_BT.grad is not None
    assert log_BT.grad[0].tolist() == pytest.approx([0.0, 0.0, 0.8**5 * 0.2])


BATCHES = {
    "forget": make_batch([[-100, -100, 0, 1], [-100, 0, 0, -100]], "forget", [True, False]),
    "retain": make_batch([[-100, 0, -100, -100], [-100, -100, 1, 0]], "retain"),
}
ROW = [[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]
FIXED = Fixed({"forget": logits_of(ROW, ROW), "retain": logits_of(ROW, ROW)})


def test_only_labels_of_rows_that_count_are_averaged() -> None:
    """The first forget row's labels have 0.25 and 0.1; the second row is stopped."""
    terms = WGA(beta=1.0).terms(make_step(FIXED, BATCHES))
    wanted = (0.25 * math.log(0.25) + 0.1 * math.log(0.1)) / 2
    assert means(terms, BATCHES)["forget"] == pytest.approx(wanted)
    retain = -(math.log(0.5) + math.log(0.75) + math.log(0.9)) / 3
    assert means(terms, BATCHES)["retain"] == pytest.approx(retain)


def test_satimp_default_weights_are_those_of_the_configuration() -> None:
    terms = SatImp().terms(make_step(FIXED, BATCHES))
    assert {term.name: term.weight for term in terms} == {"forget": 0.1, "retain": 1.0}


def test_neggrad_plus_shares_one_between_both_losses() -> None:
    terms = NegGradPlus(alpha=0.75).terms(make_step(FIXED, BATCHES))
    assert {term.name: term.weight for term in terms} == {"forget": 0.25, "retain": 0.75}
    found = means(terms, BATCHES)
    assert found["forget"] == pytest.approx((math.log(0.25) + math.log(0.1)) / 2), "ascent"
    assert found["retain"] > 0, "descent"


def test_neggrad_plus_refuses_a_share_that_is_none() -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        NegGradPlus(alpha=1.5)
