"""Hessian products of a model's loss: right, cheap to repeat, and checked before they are trusted."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from llm_unlearn.approximate import curvature
from llm_unlearn.approximate.curvature import (
    Curvature,
    check_products,
    flat,
    parts_of,
    put,
    total_loss,
)
from llm_unlearn.approximate.session import Session
from llm_unlearn.approximate.subproblem import unit_noise
from llm_unlearn.approximate.tuning import tune
from llm_unlearn.errors import UserError
from tests.approximate.known import LORA, arguments, forget_and_retain, knowing_model
from tests.tiny import make_tiny_tokenizer


def session_of(tmp_path: Path, dtype: torch.dtype = torch.float32) -> Session:
    forget, retain = forget_and_retain()
    tuned = tune(knowing_model().to(dtype), LORA, False, None, 0)
    tuned.model.eval()
    session = Session(
        tuned, make_tiny_tokenizer(), forget, retain, arguments(tmp_path, "ga"), tmp_path
    )
    session.sides = {"forget": session.encode(forget), "retain": session.encode(retain)}
    return session


def parameters_of(session: Session) -> list[Any]:
    return list(session.tuned.trainable.values())


def parts(session: Session, rows: int, count: int = 6, weight: float = 1.0) -> list[Any]:
    return parts_of(session.sides["retain"][:count], rows, session.pad_token_id, weight, "cpu")


def test_loss_and_gradient_are_transformers_own(tmp_path: Path) -> None:
    """The mean over all labelled tokens, however the rows are cut into micro-batches."""
    session = session_of(tmp_path)
    parameters = parameters_of(session)
    (whole,) = parts(session, 6)
    out = session.model(**{n: whole.batch[n] for n in ("input_ids", "attention_mask", "labels")})
    expected_D = flat(torch.autograd.grad(out.loss, parameters))
    for rows in (1, 4, 6):
        local = Curvature(session.model, parameters, parts(session, rows))
        assert local.loss == pytest.approx(float(out.loss.detach()), rel=1e-4)
        assert torch.allclose(local.gradient_D, expected_D, rtol=1e-3, atol=1e-6)
        assert local.present_loss() == pytest.approx(local.loss, rel=1e-4)


def test_products_are_linear_symmetric_and_the_same_however_they_are_made(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    parameters = parameters_of(session)
    start_D = flat(parameters)
    put(parameters, start_D + 0.3 * unit_noise(start_D, 9))  # off B = 0
    kept = Curvature(session.model, parameters, parts(session, 6))
    again = Curvature(session.model, parameters, parts(session, 2), keep_graphs=False)
    u_D, v_D = unit_noise(start_D, 1), unit_noise(start_D, 2)
    hu_D, hv_D = kept.product(u_D), kept.product(v_D)
    assert float(v_D @ hu_D) == pytest.approx(float(u_D @ hv_D), rel=1e-3, abs=1e-7)
    assert torch.allclose(kept.product(2 * u_D - v_D), 2 * hu_D - hv_D, rtol=1e-3, atol=1e-5)
    assert (again.product(u_D) - hu_D).norm() < 1e-3 * hu_D.norm()
    assert kept.products == 3 and again.products == 1
    assert torch.equal(kept.product(u_D), hu_D), "the graph is kept"


def test_rows_of_their_own_for_the_hessian(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    parameters = parameters_of(session)
    few, many = parts(session, 2, count=2), parts(session, 6)
    split = Curvature(session.model, parameters, many, few)
    alone = Curvature(session.model, parameters, few)
    v_D = unit_noise(split.gradient_D, 0)
    assert torch.equal(split.product(v_D), alone.product(v_D))
    assert not torch.allclose(split.gradient_D, alone.gradient_D)


def test_a_forget_part_counts_against(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    plus, minus = parts(session, 6), parts(session, 6, weight=-0.5)
    half = Curvature(session.model, parameters_of(session), [*plus, *minus])
    assert half.loss == pytest.approx(0.5 * total_loss(session.model, plus), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_passes_and_leaves_the_model_as_it_was(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    session = session_of(tmp_path, dtype)
    before = {name: p.detach().clone() for name, p in session.model.named_parameters()}
    (part,) = parts(session, 1, count=1)
    error = check_products(session.model, parameters_of(session), part)
    assert 0 < error < (1e-3 if dtype == torch.float32 else 3e-2)
    for name, parameter in session.model.named_parameters():
        assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name]), name


class _Softmax(torch.autograd.Function):
    """Right once, wrong twice: its backward pass forgets that what it saved depends on the input."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        ctx.weights = scores.softmax(-1)
        return ctx.weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        weights = ctx.weights.detach()
        return weights * (grads[0] - (grads[0] * weights).sum(-1, keepdim=True))


def broken_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = _Softmax.apply(scores.masked_fill(future, -1e9))
    return (weights @ value).transpose(1, 2).contiguous(), None  # pyright: ignore


def test_the_check_catches_a_kernel_whose_second_derivative_is_wrong(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    parameters = parameters_of(session)
    (part,) = parts(session, 1, count=1)
    right_D = Curvature(session.model, parameters, [part]).gradient_D
    AttentionInterface.register("broken", broken_attention)
    session.model.config._attn_implementation = "broken"
    wrong_D = Curvature(session.model, parameters, [part]).gradient_D
    assert torch.allclose(wrong_D, right_D, rtol=1e-3, atol=1e-6), "its gradients are right"
    for how in ("double", "same"):
        with pytest.raises(UserError, match=r"products are wrong.*--attn_implementation eager"):
            check_products(session.model, parameters, part, how)
    assert check_products(session.model, parameters, part, "none") != 0


def test_the_check_catches_a_kernel_without_a_second_derivative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused kernel that torch would choose: this is why the plain one is asked for."""
    session = session_of(tmp_path)
    (part,) = parts(session, 1, count=1)
    assert session.model.config._attn_implementation == "sdpa"
    check_products(session.model, parameters_of(session), part)
    monkeypatch.setattr(curvature, "plain_attention", contextlib.nullcontext)
    with pytest.raises(UserError, match="cannot be differentiated twice") as caught:
        check_products(session.model, parameters_of(session), part)
    assert "\n" not in str(caught.value)


def test_eager_attention_passes_too(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    session.model.set_attn_implementation("eager")
    (part,) = parts(session, 1, count=1)
    assert check_products(session.model, parameters_of(session), part, "same") < 1e-2
