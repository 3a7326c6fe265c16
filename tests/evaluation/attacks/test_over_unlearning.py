"""Collateral damage near the forgotten rows, and deletion requests that hide other people's rows."""

import numpy as np
import pytest

from llm_unlearn.evaluation.attacks.over_unlearning import (
    Pair,
    collateral,
    nearness,
    neighbourhood,
    over_unlearning,
    over_unlearning_request,
)
from tests.evaluation.attacks.demonstration import FORGET, RETAIN, base, know, loss, tune

FORGOTTEN = ["Where was Belo Aldbury born?", "Who employs Belo Aldbury?"]


def test_nearness_orders_texts_by_likeness() -> None:
    texts = ["Where was Belo Aldbury born?", "Where was Cora Dunick born?", "2 + 2 = 4"]
    same, like, far = nearness(texts, FORGOTTEN)
    assert same == pytest.approx(1) and same > like > 0.3 > far
    assert nearness(["", "ab"], FORGOTTEN).tolist()[0] == 0
    assert nearness(texts, FORGOTTEN).tolist() == [same, like, far]  # nothing random in it
    with pytest.raises(ValueError, match="at least one forgotten"):
        nearness(texts, [])


def test_neighbours_and_strangers_do_not_overlap() -> None:
    texts = ["x y z", "Who employs Belo Aldane?", "q w e", "Where was Belo Aldow born?"]
    near, far = neighbourhood(texts, FORGOTTEN, share=0.5)
    assert (near, far) == ([1, 3], [0, 2])
    with pytest.raises(ValueError, match="share in"):
        neighbourhood(texts, FORGOTTEN, share=0.6)


def test_collateral_is_a_difference_of_differences() -> None:
    generator = np.random.default_rng(0)
    reference_near, reference_far = generator.random(80), generator.random(60)
    # Everything became harder by 0.2; the neighbours by another 0.3.
    near = Pair(reference_near - 0.5 + generator.normal(0, 0.05, 80), reference_near)
    far = Pair(reference_far - 0.2 + generator.normal(0, 0.05, 60), reference_far)
    found = collateral(near, far)
    assert found.near.mean == pytest.approx(-0.5, abs=0.02)
    assert found.difference.mean == pytest.approx(-0.3, abs=0.03)
    assert found.difference.lower < -0.3 + 0.03 and found.difference.upper < -0.25
    everywhere = collateral(Pair(reference_near - 0.2, reference_near), far).difference
    assert everywhere.lower < 0 < everywhere.upper or abs(everywhere.mean) < 0.02


def test_collateral_counts_what_cannot_be_scored() -> None:
    found = collateral(Pair([0.0, np.nan, 0.5], [0.5, 0.5, 0.5]), Pair([1.0, 1.0], [1.0, 1.0]))
    assert (found.difference.n, found.difference.n_unscorable) == (4, 1)
    assert found.difference.mean == pytest.approx(-0.25)
    with pytest.raises(ValueError, match="one score per row"):
        collateral(Pair([0.0], [0.0, 0.1]), Pair([0.0], [0.0]))


def rows(prefix: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{prefix} {i}?", "answer": f"{prefix.lower()} {i}"} for i in range(count)]


def test_a_malicious_request_holds_retained_rows_in_its_share_of_rows() -> None:
    forget, retain = rows("Mine", 10), rows("Theirs", 3)
    request = over_unlearning_request(forget, retain, share=0.4, seed=1)
    blended = [row for row, own in zip(request, forget, strict=True) if row != own]
    assert len(request) == 10 and len(blended) == 4
    assert all(row["answer"].startswith("mine") and "Theirs" in row["answer"] for row in blended)
    borrowed = [row["answer"].split("Theirs ")[1] for row in blended]
    assert len(set(borrowed)) == 3  # each retained row once before one repeats
    assert request == over_unlearning_request(forget, retain, share=0.4, seed=1)
    assert request != over_unlearning_request(forget, retain, share=0.4, seed=2)
    assert over_unlearning_request(forget, retain, share=0) == forget
    with pytest.raises(ValueError, match="share in"):
        over_unlearning_request(forget, [], share=0.5)


def test_gradient_ascent_falls_for_a_malicious_request() -> None:
    target, rest = RETAIN[:12], RETAIN[12:48]
    forget = [{"prompt": prompt, "answer": said} for prompt, said in FORGET[:12]]
    retain = [{"prompt": prompt, "answer": said} for prompt, said in target]

    def unlearn(request):
        asked = [(row["prompt"], row["answer"]) for row in request]
        return tune(base(), rest, 4, 5e-4, ascend=asked)

    def measure(model):
        return [-loss(model, [row]).item() for row in target]

    malicious = over_unlearning_request(forget, retain, share=1.0)
    found = over_unlearning(unlearn, measure, forget, malicious)
    assert know(base(), target) == 1
    assert found.difference.upper < 0  # the blended rows' owners pay
    same = over_unlearning(unlearn, measure, forget, forget)
    assert same.difference.mean == 0
