"""Sampling with shared noise: it draws what it should, and a certified draw stands."""

import logging

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from llm_unlearn.serving.certificate import NO_VOTE, ScoreTally, certify_votes
from llm_unlearn.serving.sampling import (
    certify_draw,
    draw,
    gumbel,
    noise_key,
    nucleus,
    rival_of_draw,
    scores_of,
)

KEY = noise_key("query", 7)
LOG = logging.getLogger(__name__)  # counts: pytest --log-cli-level=info


def distributions(seed: int, *shape: int, sharpness: float = 1.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, generator=generator)).log_softmax(-1)


def noises(count: int, size: int) -> torch.Tensor:
    return torch.stack([gumbel(KEY, position, size) for position in range(count)])


def test_noise_depends_on_seed_position_and_token_alone() -> None:
    first = gumbel(KEY, 3, 50)
    gumbel(KEY, 4, 50)
    assert torch.equal(gumbel(KEY, 3, 50), first)
    assert torch.equal(gumbel(KEY, 3, 20), first[:20]), "a token's noise, whatever the vocabulary"
    first.zero_()
    assert gumbel(KEY, 3, 50).abs().sum() > 0, "what a caller does to its copy stays there"
    others = [gumbel(KEY, 4, 50), gumbel(noise_key("query", 8), 3, 50)]
    assert not any(torch.equal(other, gumbel(KEY, 3, 50)) for other in others)
    near = set(gumbel(KEY, 3, 50).tolist()) & set(gumbel(KEY, 4, 50).tolist())
    assert not near, "positions share no piece of the stream"
    assert noise_key("a") != noise_key("b") and noise_key("a", 1) == noise_key("b", 1)
    assert noise_key("1") != noise_key("x", 1), "the name of a query is not a seed"


def test_the_generator_stays_what_it_is() -> None:
    """Another stream would be another answer to the same seed."""
    expected = [-0.18536, -1.12212, -0.36646]
    assert gumbel(noise_key("query", 0), 0, 3).tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 0.8)])
def test_draws_from_an_average_have_its_distribution(temperature: float, top_p: float) -> None:
    shards, size, count = 3, 8, 20_000
    by_shard = scores_of(distributions(0, shards, size), top_p).by_shard
    scores = by_shard.sum(0)
    drawn = certify_draw(scores.expand(count, size), 0.0, temperature, noises(count, size)).winner
    expected = (scores / shards) ** (1 / temperature)
    expected = (expected / expected.sum()).numpy()
    found = np.bincount(drawn.numpy(), minlength=size)
    assert not found[expected == 0].any()
    is_possible = expected > 0
    assert chisquare(found[is_possible], count * expected[is_possible]).pvalue > 0.01


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.75)])
def test_votes_are_drawn_from_each_shards_own_distribution(
    temperature: float, top_p: float
) -> None:
    shards, size, count = 2, 8, 20_000
    log_probs = distributions(1, shards, size)
    drawn = draw(
        log_probs.expand(count, shards, size), temperature, noises(count, size)[:, None], top_p
    )
    for shard in range(shards):
        kept = nucleus(log_probs[shard], top_p).kept
        expected = (
            (log_probs[shard].double() / temperature).masked_fill(~kept, -torch.inf).softmax(-1)
        )
        found = np.bincount(drawn.tokens[:, shard].numpy(), minlength=size)
        assert not found[~kept.numpy()].any()
        assert chisquare(found[kept], count * expected[kept].numpy()).pvalue > 0.01
    # Noise that is shared makes shards agree more often than dice of their own would.
    p = log_probs.exp()
    alone = float((p[0] * p[1]).sum())
    assert temperature != 1.0 or (drawn.tokens[:, 0] == drawn.tokens[:, 1]).float().mean() > alone


def test_temperature_zero_is_greedy() -> None:
    log_probs = distributions(2, 5, 9)
    assert torch.equal(draw(log_probs, 0.0, gumbel(KEY, 0, 9), 0.5).tokens, log_probs.argmax(-1))


def test_no_adversary_moves_a_certified_draw_and_one_moves_the_others() -> None:
    generator = torch.Generator().manual_seed(4)
    certified = attacked = cases = 0
    for case in range(500):
        shards, affected, size = 8, 1 + case % 2, 6
        temperature = (0.3, 0.7, 1.0)[case % 3]
        log_probs = distributions(case, 1, size, sharpness=4.0) + 0.3 * distributions(
            case + 9999, shards, size
        )
        own = scores_of(log_probs.log_softmax(-1), (1.0, 0.9)[case % 2]).by_shard[affected:].sum(0)
        noise = gumbel(KEY, case, size).double()
        verdict = certify_draw(own, float(affected), temperature, noise)
        random = (4 * torch.randn(20, affected, size, generator=generator)).softmax(-1).double()
        ends = torch.cat([own + random.sum(1), own + affected * torch.eye(size), own[None]])
        cases += len(ends)
        drawn = {int(token) for token in (ends.log() / temperature + noise).argmax(-1)}
        if verdict.is_certified:
            certified += 1
            assert drawn == {int(verdict.winner)} and verdict.margin >= 0
        else:
            attacked += 1
            assert drawn != {int(verdict.winner)}, "all the weight on one token changes the draw"
    LOG.info(f"{cases} ends: {certified} draws certified, {attacked} attacked")
    assert cases > 10_000 and certified > 50 and attacked > 50


def test_a_draw_of_votes_is_certified_as_votes_are() -> None:
    """Shards 0 and 1 of seven replaced by anything: a certified draw is the later ensemble's."""
    certified = 0
    for case in range(400):
        log_probs = (
            distributions(case, 1, 6, sharpness=2.0) + 0.2 * distributions(case + 999, 7, 6)
        ).log_softmax(-1)
        noise = gumbel(KEY, case, 6)
        votes, close = draw(log_probs, 0.9, noise, 0.9)
        verdict = certify_votes(votes.masked_fill(close | (torch.arange(7) < 2), NO_VOTE))
        later = log_probs.clone()
        for other in range(6):
            later[:2] = distributions(100 * case + other, 2, 6, sharpness=3.0)
            tally = torch.bincount(draw(later, 0.9, noise, 0.9).tokens, minlength=6)
            assert not verdict.is_certified or int(tally.argmax()) == int(verdict.winner)
        certified += bool(verdict.is_certified)
    assert 100 < certified < 400


def test_votes_are_certified_more_often_than_averages() -> None:
    votes_certified = averages_certified = 0
    for case in range(300):
        log_probs = (
            distributions(case, 1, 200, sharpness=3.0) + 0.2 * distributions(case + 999, 7, 200)
        ).log_softmax(-1)
        noise = gumbel(KEY, case, 200)
        votes = draw(log_probs, 1.0, noise)
        marked = votes.tokens.masked_fill(votes.is_close | (torch.arange(7) < 1), NO_VOTE)
        votes_certified += bool(certify_votes(marked).is_certified)
        scores = scores_of(log_probs[1:]).by_shard.sum(0)
        averages_certified += bool(certify_draw(scores, 1.0, 1.0, noise).is_certified)
    LOG.info(f"of 300 draws: votes {votes_certified}, averages {averages_certified}")
    assert votes_certified > 2 * averages_certified


def test_the_nucleus_is_the_fewest_tokens_with_enough_mass() -> None:
    log_probs = torch.tensor([0.4, 0.1, 0.3, 0.1, 0.1]).log()
    assert nucleus(log_probs, 0.65).kept.tolist() == [True, False, True, False, False]
    assert nucleus(log_probs, 0.75).kept.tolist() == [True, True, True, False, False]
    assert nucleus(log_probs, 0.0).kept.tolist() == [True, False, False, False, False]
    found = nucleus(log_probs, 0.75)  # any of three equal tokens might be the one that is kept
    assert found.sure.tolist() == [True, False, True, False, False]
    assert found.possible.tolist() == [True] * 5
    edge = nucleus(log_probs, 0.7)  # two have 0.7, or a little less
    assert edge.sure.tolist() == [True, False, True, False, False] and edge.possible.all()


def test_rounding_changes_no_draw_that_is_not_close_and_no_score_beyond_the_slack() -> None:
    generator = torch.Generator().manual_seed(6)
    flipped = moved = 0
    for case in range(600):
        log_probs = distributions(case, 4, 12).mul(50).round().div(50).log_softmax(-1)
        shaken = log_probs + 4e-3 * (torch.rand(4, 12, generator=generator) - 0.5)
        shaken = shaken.log_softmax(-1)
        noise, tolerance = gumbel(KEY, case, 12), 1e-2
        now = draw(log_probs, 0.8, noise, 0.7, tolerance)
        later = draw(shaken, 0.8, noise, 0.7, tolerance)
        is_other = now.tokens != later.tokens
        assert not (is_other & ~now.is_close).any()
        flipped += int(is_other.sum())
        scores, slack = scores_of(log_probs, 0.7, tolerance)
        after = scores_of(shaken, 0.7, tolerance).by_shard
        largest = (scores - after).abs().max(-1).values
        assert (largest <= slack).all()
        moved += int((largest > tolerance).sum())
    assert flipped > 0 and moved > 0, "rounding did change some draws and nuclei"


def test_a_token_at_the_edge_of_the_nucleus_that_the_noise_favours_makes_a_draw_close() -> None:
    log_probs = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    favours_last = torch.tensor([0.0, 0.0, 9.0, 0.0])
    now = draw(log_probs, 1.0, favours_last, 0.65)  # token 1 or token 2, by their last bits
    assert now.tokens.tolist() == [0] and now.is_close.tolist() == [True]
    other_way = log_probs + torch.tensor([[0.0, -1e-5, 1e-5, 0.0]])
    assert draw(other_way, 1.0, favours_last, 0.65).tokens.tolist() == [2]
    favours_first = torch.tensor([9.0, 0.0, 0.0, 0.0])
    assert not draw(log_probs, 1.0, favours_first, 0.65).is_close.any()
    favours_outside = torch.tensor([3.0, 0.0, 0.0, 9.0])  # out of the question, whatever the bits
    assert not draw(log_probs, 1.0, favours_outside, 0.65).is_close.any()


def test_rounding_of_either_score_is_allowed_for() -> None:
    scores, noise = torch.tensor([2.0, 0.9]), torch.zeros(2)
    assert certify_draw(scores, 1.0, 1.0, noise, slack=0.04).is_certified
    assert not certify_draw(scores, 1.0, 1.0, noise, slack=0.06).is_certified
    nothing = certify_draw(torch.zeros(2), 0.0, 1.0, noise)
    assert not nothing.is_certified


def test_kept_scores_certify_draws_again_soundly() -> None:
    kept = exact = 0
    for case in range(1500):
        log_probs = (
            distributions(case, 1, 5, sharpness=3.0) + 0.5 * distributions(case + 7777, 8, 5)
        ).log_softmax(-1)
        given = scores_of(log_probs).by_shard
        noise, temperature = gumbel(KEY, case, 5), 0.6
        first = certify_draw(given.sum(0), 0.0, temperature, noise)
        token = int(first.winner)
        rival = rival_of_draw(given.sum(0), 0.0, token, temperature, noise)
        tally = ScoreTally([1.0] * 8)
        assert tally.append(given[:, token].tolist(), [False] * 8, rival, bool(first.is_certified))
        truth = certify_draw(given[1:].sum(0), 1.0, temperature, noise)
        is_kept = tally.withdraw([0]) == 1
        assert not is_kept or (truth.is_certified and int(truth.winner) == token)
        kept, exact = kept + is_kept, exact + bool(truth.is_certified)
    assert 0.3 * exact < kept <= exact
