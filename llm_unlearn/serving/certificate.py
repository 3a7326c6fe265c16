"""Is an answer also what the ensemble will say once every pending deletion is executed?

The rule, ERASER-style (arXiv 2311.16136, whose own theorem was not available to us; the counting is that of
DPA, arXiv 2006.14768). Scores add up over shards, and a shard of weight w gives between 0 and w to every
label: a vote (w to one label, 0 to the others), probabilities times w, or nothing at all where the shard is
gone. P is the set of affected shards, W the sum of their weights, S_j what the *unaffected* ones give to j,
t the label of the largest S (ties: the lowest). Then

    certified  <=>  for every j != t:  S_t > S_j + W,  or  S_t = S_j + W and t < j.

*Sound.* Let affected shard k give a_k(j) in the end. The final scores are F_j = S_j + sum_k a_k(j), with
S_j <= F_j <= S_j + W. So F_t >= S_t, and F_t > F_j, or F_t >= F_j and t < j: t wins, whatever they give.
*Tight.* If the condition fails for j, let every affected shard give all it has to j: F_j = S_j + W and
F_t = S_t, so t loses to j. For votes that is one of the possible ends; a softmax comes as close to it as one likes.
*Blind.* Answer and certificate are functions of the unaffected shards and of W: neither can tell anything
of the deleted data (the full tally, with a margin of 2W, could).
*Monotone.* With more shards affected there are more possible ends: what is certified under the larger P
is certified under the smaller, with the same answer.
*Texts.* Decoding asks the next token given the text so far. If the first token is certified, the later
ensemble begins with it, so at the second token all shards see the same text as now: by induction the
certified tokens from the first on, the end of the text included, are those of the later ensemble. The
first token without a certificate ends this.

Certify votes or probabilities, never logits: those have no bound, so no margin is enough. A shard's scores
must not depend on what it shares a batch with; `is_close` and `slack` are for what rounding leaves of that.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

NO_VOTE = -1
"""Stands for the vote of a shard that is affected, or whose vote rounding could change."""

CLOSE = 1e-3
"""Nats within which two tokens of one shard may change places with another batch composition.

Kernels round differently for batches of other sizes: the demonstration's float32 log-probabilities move by
1e-5. One step of a bfloat16 logit between 8 and 16 is 0.06, so a model in that format should vote with a
larger tolerance, or be asked one row at a time.
"""


class Verdict(NamedTuple):
    """What can be said of one answer, or of each of several.

    Attributes:
        winner: label with the highest score of the unaffected shards, (...); `NO_VOTE` without any.
        is_certified: whether it wins whatever the affected shards give, (...).
        margin: min over j of S_t - S_j - W, in scores, (...). Certified if above 0, and at 0 by order.
    """

    winner: torch.Tensor
    is_certified: torch.Tensor
    margin: torch.Tensor


def certify(
    scores: torch.Tensor, affected_weight: torch.Tensor | float, slack: torch.Tensor | float = 0.0
) -> Verdict:
    """The rule above, for any scores that add up over shards.

    Args:
        scores: (..., C), summed over the unaffected shards.
        affected_weight: the sum of the weights of the affected shards, a number or (...).
        slack: how far rounding may move any one score, a number or (...).
    """
    scores = scores.double()  # in which counts are exact
    reach = _reach(scores, affected_weight, slack)
    winner = scores.argmax(-1)
    best = scores.gather(-1, winner[..., None])
    gaps = best - scores - reach[..., None]
    labels = torch.arange(scores.shape[-1], device=scores.device)
    itself = labels == winner[..., None]
    is_beaten = (gaps > 0) | ((gaps == 0) & (labels > winner[..., None])) | itself
    others = gaps.masked_fill(itself, float("inf"))
    return Verdict(winner, is_beaten.all(-1), others.min(-1).values)


def _reach(
    scores: torch.Tensor, affected_weight: torch.Tensor | float, slack: torch.Tensor | float
) -> torch.Tensor:
    """How far a label may rise above the winner: by all that is affected, and rounding of both scores."""
    weight, rounding = (
        torch.as_tensor(value, dtype=torch.float64, device=scores.device)
        for value in (affected_weight, slack)
    )
    return weight + 2 * rounding


def certify_votes(votes: torch.Tensor) -> Verdict:
    """The rule for one vote each, without a tally of the whole vocabulary.

    Only labels with a vote can be the winner. A label without one is beaten if the winner has more votes than
    shards are affected, or as many and is label 0: any other winner t > 0 has labels before it, and
    those with votes ask for more still. (With a single label in all, `certify` says more.)

    Args:
        votes: (..., m), label of each shard; `NO_VOTE` for the affected.
    """
    has_voted = votes != NO_VOTE
    affected = (~has_voted).sum(-1)
    same = (votes[..., :, None] == votes[..., None, :]) & has_voted[..., None, :]
    counts = same.sum(-1).masked_fill(~has_voted, 0)
    most = counts.max(-1).values
    last = torch.iinfo(votes.dtype).max
    winner = votes.masked_fill((counts < most[..., None]) | ~has_voted, last).min(-1).values
    gaps = (most - affected)[..., None] - counts
    is_rival = has_voted & (votes != winner[..., None])
    beaten = (gaps > 0) | ((gaps == 0) & (votes > winner[..., None])) | ~is_rival
    unvoted = most - affected
    is_certified = beaten.all(-1) & ((unvoted > 0) | ((unvoted == 0) & (winner == 0)))
    margin = torch.minimum(gaps.masked_fill(~is_rival, last).min(-1).values, unvoted)
    is_empty = ~has_voted.any(-1)
    return Verdict(winner.masked_fill(is_empty, NO_VOTE), is_certified & ~is_empty, margin.double())


def is_close(scores: torch.Tensor, tolerance: float = CLOSE) -> torch.Tensor:
    """Whose vote rounding could change: the two best tokens lie within a tolerance.

    A vote jumps where the two best change places, and the other rows of a batch, which differ between now
    and later, decide the last bits of the scores. If rounding moves each score by less than half the
    tolerance, a vote with a larger lead stands. The others count as affected (`NO_VOTE`), which allows for
    any vote: the certificate then holds for every batch composition. Probabilities do not jump: `slack`.

    Args:
        scores: (..., m, V), by which every shard chooses its token: logarithms of probabilities, with the
            noise of sampling if there is any.
        tolerance: in the unit of the scores.

    Returns:
        (..., m).
    """
    if scores.shape[-1] == 1:
        return torch.zeros(scores.shape[:-1], dtype=torch.bool, device=scores.device)
    first, second = scores.topk(2, dim=-1).values.unbind(-1)
    return ~(first - second > tolerance)  # also where the scores are no numbers


def ballot_scores(log_probs: torch.Tensor, shards: int) -> torch.Tensor:
    """Scores of the `vote` aggregation: a vote each, and the mean of the probabilities breaks ties.

    `exact/routing.py: ballot` ranks tokens by (votes + sum_k p_k / m): a shard gives at most 1 + 1/m to a
    token, so `certify(ballot_scores(...), ballot_weight(u, m))` is the general rule. It does not depend on m, which
    may shrink when a shard vanishes: a shard that votes t gives t at least the probability it gives j, so
    with one vote more, t leads by at least 1 - (m - 1)/m > 0; with equal votes the sums of probabilities decide.

    Args:
        log_probs: (..., n, V) of the unaffected shards.
        shards: m, the affected ones included.

    Returns:
        (..., V).
    """
    votes = torch.nn.functional.one_hot(log_probs.argmax(-1), log_probs.shape[-1]).sum(-2)
    return votes.double() + log_probs.double().exp().sum(-2) / shards


def ballot_weight(affected: int, shards: int) -> float:
    """The weight of some affected shards in `ballot_scores`."""
    return affected * (1 + 1 / shards)


class Count(NamedTuple):
    """One token's tally for the audit log: numbers without labels, since token ids would be text.

    Attributes:
        winner: what the unaffected shards give to the token.
        rival: the most that any other can end with: its score and all of the affected weight.
        affected: weight of the shards that count as affected.
    """

    winner: float
    rival: float
    affected: float


class ScoreTally:
    """The scores behind one answer, kept so that it can be certified again when more shards are affected.

    What a withdrawn shard gave is dropped for good: it came from what has to be forgotten, and when it answers
    again after the execution, it is with other weights. Of each token are kept what every shard gave it (m
    numbers), and R = max over j != t of S_j + W, the most that a rival could end with. When shards Q are affected
    too, S'_j + W' <= S_j + W + w(Q), because scores are not negative: S'_j <= S_j. So S'_t > R + w(Q) is sound. It
    asks for more than the exact rule, which knows what Q gave the best rival, by at most that: sum over Q of w_k
    p_k(j). With noise, where certified means S_t > (S_j + W) h_j for every j (`sampling.py`), R = max (S_j + W) h_j
    grows by w(Q) max h_j.

    Args:
        weights: (m,).

    Attributes:
        certified: how many tokens from the first are certified.
    """

    def __init__(self, weights: Sequence[float]):
        self.certified = 0
        self._weights = np.asarray(weights, np.float64)
        self._own: list[NDArray[np.float64]] = []
        self._affected: list[NDArray[np.bool_]] = []
        self._rivals: list[Rival] = []

    def append(
        self,
        own: Sequence[float] | NDArray[Any],
        affected: Sequence[bool] | NDArray[Any],
        rival: "Rival",
        is_certified: bool,
    ) -> bool:
        """One more token of the answer; is it certified, and everything before it?

        Args:
            own: (m,), what each shard gives the token, times its weight; of affected shards not read.
            affected: (m,).
            rival: of the token over the unaffected shards.
            is_certified: what `certify` said of this token.
        """
        is_affected = np.array(affected, bool)
        self._own.append(np.where(is_affected, 0.0, np.array(own, np.float64)))
        self._affected.append(is_affected)
        self._rivals.append(rival)
        self.certified += is_certified and self.certified == len(self._own) - 1
        return self.certified == len(self._own)

    def withdraw(self, shards: Iterable[int]) -> int:
        """More shards are affected; how many tokens from the first are certified now."""
        gone = list(shards)
        for step, (own, affected, rival) in enumerate(
            zip(self._own, self._affected, self._rivals, strict=True)
        ):
            fresh = [shard for shard in gone if not affected[shard]]
            rise = float(self._weights[fresh].sum()) * rival.rise
            own[fresh], affected[fresh] = 0.0, True
            self._rivals[step] = rival._replace(reach=rival.reach + rise)
            if fresh and own.sum() <= self._rivals[step].reach:
                self.certified = min(self.certified, step)
        return self.certified

    def counts(self) -> list[Count]:
        return [
            Count(float(own.sum()), rival.reach, float(self._weights[affected].sum()))
            for own, affected, rival in zip(self._own, self._affected, self._rivals, strict=True)
        ]


class Rival(NamedTuple):
    """How much a token must have to win for certain.

    Attributes:
        reach: more than this, from the unaffected shards.
        rise: by how much that grows for each unit of weight that becomes affected.
    """

    reach: float
    rise: float = 1.0


def rival_of(
    scores: torch.Tensor, affected_weight: float, winner: int, slack: float = 0.0
) -> Rival:
    """The best rival of one token.

    Args:
        scores: (C,), as for `certify`.
    """
    others = scores.double().clone()
    others[winner] = float("-inf")
    return Rival(float(others.max() + _reach(others, affected_weight, slack)))
