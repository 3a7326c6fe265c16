"""Sampling with shared noise, so that what would be drawn after a deletion can be certified now.

Gumbel's trick: the token with the largest log p / T + g, with g from a Gumbel distribution for each token,
is a draw from p^(1/T). The noise is a function of a seed, the position in the answer and the token's id alone,
the same for every shard, now and after an execution. So drawing is as deterministic as greedy
decoding, and the rules of `certificate.py` hold:

* Votes: each shard votes for the token that it draws; `certify_votes` is unchanged.
* Averages: the draw from S^(1/T), S the sum of the shards' scores, is t for certain iff for every j != t
  log(S_t) / T + g_t > log(S_j + W) / T + g_j  (equal and t < j also will do), since score and rival end between
  S and S + W and the logarithm keeps order. Tight as the rule without noise. It rarely holds: an affected shard
  might put all its weight on a token that the noise favours, however unlikely. Votes are certified far more often.

top_p is applied to each shard's own distribution, at temperature 1, before the shards are put together: whatever a
shard does to its own distribution, it still gives between 0 and its weight. (`transformers` applies the temperature
first and knows one distribution only.)
"""

import hashlib
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from llm_unlearn.serving.certificate import CLOSE, Rival, Verdict, is_close

Key = tuple[int, int]


def noise_key(query_id: str, seed: int | None = None) -> Key:
    """The key of a query's noise: of its seed where it gives one, so that it can be asked again."""
    source = f"query:{query_id}" if seed is None else f"seed:{seed}"
    first, second = np.frombuffer(hashlib.sha256(source.encode()).digest()[:16], "<u8")
    return int(first), int(second)


@lru_cache(maxsize=64)
def _gumbel(key: Key, position: int, size: int) -> NDArray[np.float32]:
    bits = np.random.Philox(key=np.array(key, np.uint64), counter=[0, position, 0, 0])
    uniform = ((bits.random_raw(size) >> np.uint64(11)) + 0.5) * 2.0**-53
    return (-np.log(-np.log(uniform))).astype(np.float32)


def gumbel(key: Key, position: int, size: int) -> torch.Tensor:
    """Noise for one position of one answer, (V,), on the CPU.

    Philox (Salmon et al., SC 2011) is a function of key and counter, so nothing that was drawn before, no other
    row of the batch and no device matters. (The logarithm may differ in its last bit between machines; that is
    within what `is_close` allows for.)

    Args:
        position: tokens of the answer before this one.
        size: V.
    """
    return torch.from_numpy(_gumbel(key, position, size).copy())


class Nucleus(NamedTuple):
    """Which tokens of a distribution top_p keeps, (..., V) each.

    Attributes:
        kept: the likeliest tokens, until they have at least top_p of the mass.
        sure: those that are kept however rounding moves the probabilities.
        possible: those that might be.
    """

    kept: torch.Tensor
    sure: torch.Tensor
    possible: torch.Tensor


def nucleus(log_probs: torch.Tensor, top_p: float, tolerance: float = CLOSE) -> Nucleus:
    """The tokens that have less than top_p of the mass before them; of equal ones the lowest id first.

    Args:
        log_probs: (..., V), normalised.
        tolerance: nats by which two log-probabilities may change places, and the part of the mass
            by which a sum may be off.
    """
    ranked, order = log_probs.double().sort(stable=True, dim=-1, descending=True)
    mass = torch.nn.functional.pad(ranked.exp().cumsum(-1), (1, 0))
    rising = -ranked  # searchsorted wants an ascending row
    before_least = torch.searchsorted(rising, rising - tolerance)
    before_most = torch.searchsorted(rising, rising + tolerance, right=True) - 1
    is_first = torch.arange(log_probs.shape[-1], device=log_probs.device) == 0
    kept = (mass[..., :-1] < top_p) | is_first
    possible = kept | (mass.gather(-1, before_least) - tolerance < top_p)
    sure = kept & ((mass.gather(-1, before_most) + tolerance < top_p) | (before_most == 0))
    return Nucleus(*(torch.zeros_like(m).scatter(-1, order, m) for m in (kept, sure, possible)))


class Draw(NamedTuple):
    """What each shard draws.

    Attributes:
        tokens: (..., m).
        is_close: whose draw rounding could change, (..., m): these count as affected.
    """

    tokens: torch.Tensor
    is_close: torch.Tensor


def draw(
    log_probs: torch.Tensor,
    temperature: float = 0.0,
    noise: torch.Tensor | None = None,
    top_p: float = 1.0,
    tolerance: float = CLOSE,
) -> Draw:
    """The token that each shard votes for.

    Args:
        log_probs: (..., m, V), normalised.
        temperature: 0 for the likeliest token; noise and top_p then have no part in it.
        noise: of this position, (V,) or (..., 1, V).
        tolerance: nats by which rounding may move the difference of two log-probabilities.
    """
    if temperature == 0 or noise is None:
        return Draw(log_probs.argmax(-1), is_close(log_probs, tolerance))
    scores = log_probs.double() / temperature + noise
    if top_p >= 1:
        return Draw(scores.argmax(-1), is_close(scores, tolerance / temperature))
    kept, sure, possible = nucleus(log_probs, top_p, tolerance)
    nothing = float("-inf")
    tokens = scores.masked_fill(~kept, nothing).argmax(-1)
    at_token = tokens[..., None]
    # The draw stands if it is kept for certain and leads all others that might be kept.
    rivals = scores.masked_fill(~possible, nothing).scatter(-1, at_token, nothing).max(-1).values
    leads = scores.gather(-1, at_token).squeeze(-1) - rivals > tolerance / temperature
    return Draw(tokens, ~(leads & sure.gather(-1, at_token).squeeze(-1)))


class Scores(NamedTuple):
    """What some shards give to every token, one weight each, (..., n, V), and how far rounding may move it.

    Attributes:
        slack: of any one shard's score, (..., n).
    """

    by_shard: torch.Tensor
    slack: torch.Tensor


def scores_of(log_probs: torch.Tensor, top_p: float = 1.0, tolerance: float = CLOSE) -> Scores:
    """Each shard's probabilities, within its own nucleus: `certify(by_shard.sum(-2), W, slack.sum(-1))`.

    Let L be the tokens that are kept for certain and U those that might be. With N between them,
    p(x) / p(N) is between p(x) / p(U) (0 outside L) and p(x) / p(L), so no score moves by more than
    p(U - L) / p(L), besides the tolerance itself.

    Args:
        log_probs: (..., n, V), normalised.
    """
    probs = log_probs.double().exp()
    if top_p >= 1:
        return Scores(probs, probs.new_full(probs.shape[:-1], tolerance))
    kept, sure, possible = nucleus(log_probs, top_p, tolerance)
    own = probs.masked_fill(~kept, 0.0)
    certain = probs.masked_fill(~sure, 0.0).sum(-1)
    doubtful = probs.masked_fill(~(possible & ~sure), 0.0).sum(-1)
    moved = torch.where(certain > 0, doubtful / certain, 1.0).clamp(max=1.0)
    return Scores(own / own.sum(-1, keepdim=True), (moved + tolerance).clamp(max=1.0))


def certify_draw(
    scores: torch.Tensor,
    affected_weight: torch.Tensor | float,
    temperature: float,
    noise: torch.Tensor,
    slack: torch.Tensor | float = 0.0,
) -> Verdict:
    """The rule above for averages; the margin is in nats.

    Args:
        scores: (..., V), summed over the unaffected shards.
        affected_weight: a number or (...).
        temperature: above 0.
        noise: of this position, (V,) or (..., V).
        slack: how far rounding may move any one score, a number or (...).
    """
    scores, noise = scores.double(), noise.to(scores.device).double()
    weight, rounding = (
        torch.as_tensor(value, dtype=torch.float64, device=scores.device)[..., None]
        for value in (affected_weight, slack)
    )
    winner = (scores.log() / temperature + noise).argmax(-1)
    at_winner = winner[..., None]
    lowest = (scores - rounding).clamp(min=0).log() / temperature + noise
    highest = (scores + weight + rounding).log() / temperature + noise
    gaps = lowest.gather(-1, at_winner) - highest
    labels = torch.arange(scores.shape[-1], device=scores.device)
    is_beaten = (gaps > 0) | ((gaps == 0) & (labels > at_winner)) | (highest == -math.inf)
    others = torch.where(highest == -math.inf, math.inf, gaps).masked_fill(
        labels == at_winner, math.inf
    )
    has_score = scores.gather(-1, at_winner).squeeze(-1) > 0
    is_certified = (is_beaten | (labels == at_winner)).all(-1) & has_score
    return Verdict(winner, is_certified, others.min(-1).values)


def rival_of_draw(
    scores: torch.Tensor,
    affected_weight: float,
    winner: int,
    temperature: float,
    noise: torch.Tensor,
    slack: float = 0.0,
) -> Rival:
    """What a drawn token must have to stay, for `certificate.ScoreTally`.

    With h_j = exp(T (g_j - g_t)), the rule above is S_t - slack > (S_j + W + slack) h_j.

    Args:
        scores: (V,), summed over the unaffected shards.
    """
    advantage = (temperature * (noise.double() - noise[winner].double())).exp()
    reach = (scores.double() + affected_weight + slack) * advantage
    is_other = torch.arange(len(scores)) != winner
    return Rival(float(reach[is_other].max()) + slack, float(advantage[is_other].max()))
