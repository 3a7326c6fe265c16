"""The certificate, against every possible end of small ensembles."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from llm_unlearn.exact.routing import Routing
from llm_unlearn.exact.selection import everybody
from llm_unlearn.serving.certificate import (
    NO_VOTE,
    Rival,
    ScoreTally,
    ballot_scores,
    ballot_weight,
    certify,
    certify_votes,
    is_close,
    rival_of,
)

MOST_SHARDS, MOST_LABELS = 6, 3
LOG = logging.getLogger(__name__)  # counts: pytest --log-cli-level=info


def winner_of(votes: Sequence[int], labels: int) -> int:
    """The rule of `ShardEnsemble.vote`: a tie goes to the label listed first."""
    tally = [votes.count(label) for label in range(labels)] if votes else [0] * labels
    return tally.index(max(tally))


def cases() -> Iterator[tuple[int, tuple[int, ...], int]]:
    """Every ensemble with something affected: labels, votes of the unaffected, how many are affected."""
    for labels in range(2, MOST_LABELS + 1):
        for shards in range(1, MOST_SHARDS + 1):
            for affected in range(1, shards + 1):
                for votes in itertools.product(range(labels), repeat=shards - affected):
                    yield labels, votes, affected


def ends_of(votes: tuple[int, ...], affected: int, labels: int) -> set[int]:
    """What the ensemble can say in the end: every way in which the affected shards can vote."""
    return {
        winner_of((*votes, *again), labels)
        for again in itertools.product(range(labels), repeat=affected)
    }


def test_votes_are_certified_exactly_when_every_end_is_the_same() -> None:
    certified, total, ends_seen = 0, 0, 0
    for labels, votes, affected in cases():
        ends = ends_of(votes, affected, labels)
        tally = torch.tensor([votes.count(label) for label in range(labels)])
        by_tally = certify(tally, affected)
        by_votes = certify_votes(torch.tensor([*votes, *[NO_VOTE] * affected]))
        for verdict in (by_tally, by_votes):
            assert bool(verdict.is_certified) == (len(ends) == 1), (labels, votes, affected)
            assert not verdict.is_certified or ends == {int(verdict.winner)}
        # The margin is exact: one vote less would not do, whatever the order.
        assert not by_tally.is_certified or by_tally.margin >= 0
        certified, total = certified + (len(ends) == 1), total + 1
        ends_seen += labels**affected
    LOG.info(f"{total} cases, {ends_seen} ends, {certified} certified, 0 unsound, 0 not tight")
    assert (total, certified) == (663, 248)


def test_which_shards_are_affected_does_not_matter_but_how_many_does() -> None:
    """Every vote of K <= 6 shards with every affected set, each against all its ends."""
    total, certified = 0, 0
    for labels in range(2, MOST_LABELS + 1):
        for shards in range(1, MOST_SHARDS + 1):
            for votes in itertools.product(range(labels), repeat=shards):
                rows = [
                    [NO_VOTE if number >> shard & 1 else vote for shard, vote in enumerate(votes)]
                    for number in range(2**shards)
                ]
                verdict = certify_votes(torch.tensor(rows))
                for row, is_certified, winner in zip(
                    rows, verdict.is_certified.tolist(), verdict.winner.tolist(), strict=True
                ):
                    left = tuple(vote for vote in row if vote != NO_VOTE)
                    ends = _ends(left, shards - len(left), labels)
                    assert is_certified == (len(ends) == 1)
                    assert not is_certified or ends == {winner}
                    total, certified = total + 1, certified + is_certified
    LOG.info(f"{total} ensembles and affected sets, {certified} certified")
    assert (total, certified) == (61_446, 8127)


_KNOWN: dict[Any, set[int]] = {}


def _ends(votes: tuple[int, ...], affected: int, labels: int) -> set[int]:
    key = (tuple(sorted(votes)), affected, labels)
    if key not in _KNOWN:
        _KNOWN[key] = ends_of(key[0], affected, labels)
    return _KNOWN[key]


def test_votes_for_tokens_without_a_vote_count_too() -> None:
    """Two shards for token 7 beat two affected ones nowhere: those could meet at token 3."""
    assert not certify_votes(torch.tensor([7, 7, NO_VOTE, NO_VOTE])).is_certified
    assert certify_votes(torch.tensor([0, 0, NO_VOTE, NO_VOTE])).is_certified  # first of all ids
    assert certify_votes(torch.tensor([7, 7, 7, NO_VOTE, NO_VOTE])).is_certified
    nobody = certify_votes(torch.tensor([[NO_VOTE, NO_VOTE]]))
    assert nobody.winner.tolist() == [NO_VOTE] and not nobody.is_certified.any()


def test_one_vote_each_is_the_tally_of_the_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    votes = torch.randint(-1, 4, (4000, 7), generator=generator)
    votes = votes[(votes >= 0).any(-1)]
    tally = torch.nn.functional.one_hot(votes + 1, 9)[..., 1:].sum(-2)
    full = certify(tally, (votes == NO_VOTE).sum(-1))
    short = certify_votes(votes)
    assert torch.equal(full.is_certified, short.is_certified)
    assert torch.equal(full.winner, short.winner)
    assert torch.equal(full.margin, short.margin)
    assert 0.05 < full.is_certified.float().mean() < 0.95


def softmaxes(generator: np.random.Generator, *shape: int) -> np.ndarray:
    sharp = generator.choice([0.5, 2.0, 6.0], size=(*shape[:-1], 1))
    raw = np.exp(sharp * generator.standard_normal(shape))
    return raw / raw.sum(-1, keepdims=True)


def test_no_adversary_moves_certified_probabilities_and_one_moves_the_others() -> None:
    generator = np.random.default_rng(1)
    certified = attacked = 0
    for _ in range(2000):
        shards, labels = int(generator.integers(2, 9)), int(generator.integers(2, 6))
        affected = int(generator.integers(1, shards))
        weights = generator.uniform(0.2, 2.0, shards)
        own = (weights[:, None] * softmaxes(generator, shards, labels))[affected:].sum(0)
        weight = float(weights[:affected].sum())
        verdict = certify(torch.from_numpy(own), weight)
        winner = int(verdict.winner)
        ends = own + (weights[:affected, None] * softmaxes(generator, 10, affected, labels)).sum(1)
        one_hot = own + weight * np.eye(labels)  # the worst: all of it to one label
        answers = {int(end.argmax()) for end in (*ends, *one_hot)}
        if verdict.is_certified:
            certified += 1
            assert answers == {winner}
        else:
            attacked += 1
            assert answers != {winner}, "the adversary's best re-vote changes the answer"
        gone = own  # the affected shards may vanish as well
        assert int(gone.argmax()) == winner
    LOG.info(f"probabilities: {certified} certified and safe, {attacked} not, each with its attack")
    assert certified > 200 and attacked > 200


def test_ties_go_to_the_lowest_label() -> None:
    even = torch.tensor([1.5, 0.5])
    assert certify(even, 1.0).is_certified and not certify(even.flip(0), 1.0).is_certified
    assert not certify(even, 1.0 + 1e-12).is_certified
    assert certify(torch.tensor([[3.0], [0.0]]), 9).is_certified.all()  # nothing to choose


def test_rounding_of_either_score_is_allowed_for() -> None:
    scores = torch.tensor([2.0, 0.9])
    assert certify(scores, 1.0, slack=0.04).is_certified
    assert not certify(scores, 1.0, slack=0.06).is_certified


def test_close_votes_are_told_apart() -> None:
    scores = torch.tensor([[0.0, -5.0, -5.0], [0.0, -0.0005, -9.0], [float("nan")] * 3])
    assert is_close(scores).tolist() == [False, True, True]
    assert is_close(scores, 6.0).tolist() == [True, True, True]
    assert not is_close(scores[:, :1]).any(), "a single label has no rival"


def test_what_rounding_can_flip_is_never_certified_wrongly() -> None:
    generator = torch.Generator().manual_seed(3)
    now = torch.randn(3000, 5, 4, generator=generator).round(decimals=2)
    noise = 0.0049 * (2 * torch.rand(now.shape, generator=generator) - 1)
    votes = now.argmax(-1).masked_fill(is_close(now, 0.01), NO_VOTE)
    affected = torch.arange(5) < 1
    verdict = certify_votes(votes.masked_fill(affected, NO_VOTE))
    later = (now + noise).argmax(-1)
    assert (later != now.argmax(-1)).any(), "the noise flips some votes"
    tally = torch.nn.functional.one_hot(later, 4).sum(-2)
    assert torch.equal(tally.argmax(-1)[verdict.is_certified], verdict.winner[verdict.is_certified])
    assert verdict.is_certified.any()


@pytest.mark.parametrize("shards", [3, 5])
def test_the_ensembles_ballot_is_the_general_rule(shards: int) -> None:
    """Certified by `ballot_scores` means the same token by `Routing.ballot`, whatever the affected say."""
    generator = np.random.default_rng(shards)
    certified = broken = 0
    for _ in range(400):
        affected = int(generator.integers(1, shards))
        p = softmaxes(generator, shards, 5)
        if generator.random() < 0.5:  # ties of votes, which the mean breaks
            p[1] = p[0][generator.permutation(5)]
        own = torch.from_numpy(p[affected:]).log()
        verdict = certify(ballot_scores(own, shards), ballot_weight(affected, shards))
        routing = Routing.of([everybody(shards)], [f"shard-{k}" for k in range(shards)])
        ends = set()
        for end in (*softmaxes(generator, 6, affected, 5), *_all_to_one(affected, 5)):
            rows = torch.cat([torch.from_numpy(end).log(), own])
            ends.add(int(routing.ballot(rows[:, None]).argmax(-1)))
        # A shard less, as where every subject has its own: the mean is over the others.
        fewer = Routing.of([everybody(shards - affected)], ["left"] * (shards - affected))
        ends.add(int(fewer.ballot(own[:, None]).argmax(-1)))
        if verdict.is_certified:
            certified += 1
            assert ends == {int(verdict.winner)}
        else:
            broken += len(ends) > 1
    LOG.info(f"ballots of {shards}: {certified} certified, {broken} others changed by an attack")
    assert certified > 20 and broken > 20
    assert certified + broken == 400


def _all_to_one(affected: int, labels: int) -> np.ndarray:
    sure = np.full((labels, affected, labels), 1e-13)
    for label in range(labels):
        sure[label, :, label] = 1.0
    return sure


def test_what_a_withdrawn_shard_said_never_comes_back() -> None:
    everybody = [1.0] * 5, [False] * 5, Rival(0.0), True
    tally = ScoreTally([1.0] * 5)
    assert tally.append(*everybody)
    assert tally.withdraw([0]) == 1 and tally.withdraw([0]) == 1
    assert tally.counts() == [(4, 1, 1)]
    # Shard 0 was trained again and has a say; what it said before stays forgotten.
    assert tally.append(*everybody)
    assert tally.withdraw([1]) == 2
    assert tally.withdraw([2]) == 0  # of the first step two shards are left, of the second three
    assert tally.counts() == [(2, 3, 3), (3, 2, 2)]


def test_what_a_caller_gave_is_not_changed() -> None:
    scores, given, affected = ScoreTally([1.0] * 3), np.ones(3), np.zeros(3, bool)
    scores.append(given, affected, Rival(0.0), True)
    scores.withdraw([0])
    assert given.tolist() == [1.0] * 3 and not affected.any()


def test_one_token_without_a_certificate_ends_it() -> None:
    tally = ScoreTally([1.0] * 3)
    assert not tally.append([1.0] * 3, [False] * 3, Rival(0.0), False)
    assert not tally.append([1.0] * 3, [False] * 3, Rival(0.0), True)
    assert tally.certified == 0


def test_kept_scores_certify_again_soundly() -> None:
    generator = np.random.default_rng(6)
    kept = exact = 0
    for _ in range(1500):
        shards, labels = 8, 5
        weights = generator.uniform(0.5, 1.5, shards)
        given = weights[:, None] * softmaxes(generator, shards, labels)
        given[:, 1] += weights * generator.random()  # mostly agreeing
        given *= (weights / given.sum(-1))[:, None]
        before, after = {0}, {0, *generator.integers(0, shards, 2).tolist()}
        mask = np.isin(np.arange(shards), list(before))
        scores = torch.from_numpy(given[~mask].sum(0))
        first = certify(scores, float(weights[mask].sum()))
        token = int(first.winner)
        tally = ScoreTally(weights.tolist())
        rival = rival_of(scores, float(weights[mask].sum()), token)
        assert bool(first.is_certified) == tally.append(
            given[:, token].tolist(), mask.tolist(), rival, bool(first.is_certified)
        )
        later = np.isin(np.arange(shards), list(after))
        truth = certify(torch.from_numpy(given[~later].sum(0)), float(weights[later].sum()))
        is_kept = tally.withdraw(after - before) == 1
        assert not is_kept or (bool(truth.is_certified) and int(truth.winner) == token)
        kept, exact = kept + is_kept, exact + bool(truth.is_certified)
    LOG.info(f"of {exact} still certified, kept scores show {kept} ({kept / exact:.0%})")
    assert 0.5 * exact < kept < exact


def test_kept_scores_know_ties_and_every_unit_of_weight() -> None:
    tally = ScoreTally([1.0, 1.0, 1.0, 1.0])
    assert tally.append([1.0, 1.0, 1.0, 1.0], [False] * 4, Rival(0.0), True)
    assert tally.withdraw([0]) == 1  # 3 > 1
    assert tally.counts() == [(3.0, 1.0, 1.0)]
    assert tally.withdraw([1]) == 0  # 2 = 2: strictly more is asked for
    assert tally.withdraw([1]) == 0 and tally.counts() == [(2.0, 2.0, 2.0)]


def test_a_certified_text_is_the_text_of_every_later_ensemble() -> None:
    """Token induction: shards are functions of the text so far; the affected ones are replaced at will."""
    tokens, steps, shards = 6, 8, 7
    certified_tokens = texts = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        common = generator.integers(0, tokens, 997)
        own = generator.integers(0, tokens, (shards, 997))
        strays = generator.random((shards, 997)) < 0.25

        def vote(
            shard: int,
            text: tuple[int, ...],
            own: Any = own,
            strays: Any = strays,
            common: Any = common,
        ) -> int:
            place = hash((text, 17)) % 997
            return int(own[shard, place] if strays[shard, place] else common[place])

        def decode(votes: Any) -> tuple[int, ...]:
            text: tuple[int, ...] = ()
            while len(text) < steps and (not text or text[-1] != 0):  # token 0 ends a text
                text += (winner_of(votes(text), tokens),)
            return text

        affected = {int(shard) for shard in generator.permutation(shards)[: 1 + seed % 2]}
        text: tuple[int, ...] = ()
        certified = 0
        while len(text) < steps and (not text or text[-1] != 0):
            votes = [NO_VOTE if k in affected else vote(k, text) for k in range(shards)]
            verdict = certify_votes(torch.tensor(votes))
            certified += bool(verdict.is_certified) and certified == len(text)
            text += (int(verdict.winner),)
        for _ in range(20):  # other shards in their place, a new function each
            other = generator.integers(0, tokens, (shards, 997))
            replaced = decode(
                lambda text, other=other, affected=affected, vote=vote: [
                    int(other[k, hash((text, 17)) % 997]) if k in affected else vote(k, text)
                    for k in range(shards)
                ]
            )
            assert replaced[:certified] == text[:certified]
            assert certified < len(text) or replaced == text
        certified_tokens += certified
        texts += certified == len(text)
    LOG.info(f"{certified_tokens} certified tokens, {texts} of 60 whole texts")
    assert certified_tokens > 60 and 5 < texts < 60
