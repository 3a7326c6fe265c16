"""Curvature against a plain computation, one record at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llm_unlearn.data.encoding import IGNORED, Example
from llm_unlearn.memorization.curvature import STEP, curvature
from llm_unlearn.memorization.probing import probe, token_counts
from tests.tiny import FAMILIES, load_tiny, make_tiny_model

EXAMPLES = [
    Example("a", [5, 6, 7, 8, 9], [IGNORED, IGNORED, 7, 8, 9], False),
    Example("b", [10, 11, 12], [10, 11, 12], False),
    Example("c", [5, 9, 20, 21, 22, 23, 24], [IGNORED] * 5 + [23, 24], False),
]


def plainly(model: torch.nn.Module, example: Example) -> float:
    """The formula, in the words of the paper, for one record without padding."""
    ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
    start = model.get_input_embeddings()(ids).detach()  # pyright: ignore

    def gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        logits = model(inputs_embeds=x, use_cache=False).logits[0, :-1]
        targets = labels[0, 1:]
        kept = targets != IGNORED
        loss = -logits.log_softmax(-1)[kept, targets[kept]].mean()
        loss.backward()
        assert x.grad is not None
        return x.grad

    first = gradient(start)
    direction = first.sign() / first.sign().norm()
    return float((gradient(start + STEP * direction) - first).norm())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt2"])
def test_curvature_is_the_papers(family: str) -> None:
    assert family in {*FAMILIES, "gpt2"}
    model = make_tiny_model(family)
    found = curvature(model, EXAMPLES, pad_token_id=0)
    assert found == pytest.approx([plainly(model, one) for one in EXAMPLES], rel=2e-3)
    assert (found > 0).all()


def test_it_changes_nothing(tiny_base: Path) -> None:
    model, _ = load_tiny(tiny_base)
    model.train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    curvature(model, EXAMPLES, 0)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_probe_is_the_same_in_any_batch(tiny_base: Path) -> None:
    model, _ = load_tiny(tiny_base)
    together = probe(model, EXAMPLES, 0)
    assert together["tokens"].tolist() == token_counts(EXAMPLES).tolist() == [3, 2, 2]
    for number, example in enumerate(EXAMPLES):
        alone = probe(model, [example], 0)
        for name in alone:
            assert alone[name][0] == pytest.approx(together[name][number], rel=1e-4)
    logits = model(torch.tensor([EXAMPLES[1].input_ids])).logits[0, :-1].log_softmax(-1)
    plain = float(torch.stack([logits[0, 11], logits[1, 12]]).mean().exp().detach())
    assert together["confidence"][1] == pytest.approx(plain, rel=1e-4)
    assert np.isfinite(together["el2n"]).all()
