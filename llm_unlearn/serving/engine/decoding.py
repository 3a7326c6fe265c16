"""The next token of an answer, and whether it is certain.

Every reader of a text (a shard, or the one that the prompt is for) adds something to every token; the answer is
the token with the most. Which tokens are certain, and why, is in `certificate.py` and `sampling.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llm_unlearn.serving.certificate import (
    CLOSE,
    Rival,
    ScoreTally,
    ballot_weight,
    certify,
    rival_of,
)
from llm_unlearn.serving.engine.batch import Row
from llm_unlearn.serving.queries import Query
from llm_unlearn.serving.sampling import (
    Key,
    certify_draw,
    draw,
    gumbel,
    noise_key,
    rival_of_draw,
    scores_of,
)


@dataclass(frozen=True)
class Decoding:
    """How a query's tokens are chosen.

    Attributes:
        is_vote: each reader votes, and the mean of their probabilities breaks ties; else the mean decides.
    """

    is_vote: bool
    temperature: float
    top_p: float
    key: Key

    @classmethod
    def of(cls, query: Query, aggregate: str) -> "Decoding":
        key = noise_key(query.id, query.seed)
        return cls(aggregate == "vote", query.temperature, query.top_p, key)

    def weights(self, shares: Sequence[float]) -> list[float]:
        """The most that each reader can add to a token."""
        return [ballot_weight(1, len(shares))] * len(shares) if self.is_vote else list(shares)


@dataclass(frozen=True)
class Readers:
    """Who reads a text.

    Attributes:
        members: as the ensemble calls them (a shard, the core, or the base model).
        names: of the adapters, with their digests.
        shares: their weights in the answer, which sum to 1.
        affected: whose part a pending request may change.
        is_certain: whether they will be the readers after the execution too.
    """

    members: tuple[str, ...]
    names: tuple[str, ...]
    shares: tuple[float, ...]
    affected: tuple[bool, ...]
    is_certain: bool


@dataclass(frozen=True)
class Parts:
    """What the readers add to every token.

    Attributes:
        by_reader: (m, V).
        most: (m,), the most that each can add to a token.
        slack: how far rounding may move the sum.
        is_close: (m,), whose vote rounding could change.
    """

    by_reader: torch.Tensor
    most: torch.Tensor
    slack: float
    is_close: torch.Tensor


def _parts(
    log_probs_mV: torch.Tensor,
    shares: torch.Tensor,
    decoding: Decoding,
    noise: torch.Tensor | None,
) -> Parts:
    count = len(log_probs_mV)
    most = torch.tensor(decoding.weights(shares.tolist())).double()
    if decoding.is_vote:
        votes = draw(log_probs_mV, decoding.temperature, noise, decoding.top_p)
        by_reader = log_probs_mV.double().exp() / count
        by_reader[torch.arange(count), votes.tokens] += 1.0
        return Parts(by_reader, most, CLOSE, votes.is_close)
    top_p = decoding.top_p if decoding.temperature else 1.0
    scores = scores_of(log_probs_mV, top_p)
    weighted = scores.by_shard * shares[:, None]
    slack = float((scores.slack * shares).sum())
    return Parts(weighted, most, slack, torch.zeros(count).bool())


@dataclass(frozen=True)
class Token:
    """The next token; `is_certified`: whatever the affected readers will say."""

    id: int
    is_certified: bool


def next_token(
    rows: Sequence[Row],
    readers: Readers,
    decoding: Decoding,
    position: int,
    tally: ScoreTally | None,
) -> Token:
    """Choose a token.

    Args:
        rows: of every reader.
        position: tokens of the answer before this one.
        tally: remembers what is needed to certify the token again; a single reader needs none.
    """
    is_greedy = decoding.temperature == 0
    if len(rows) == 1 and is_greedy:
        return Token(rows[0].best, not readers.affected[0])
    log_probs_mV = torch.stack([row.log_probs for row in rows]).cpu()
    noise = None if is_greedy else gumbel(decoding.key, position, log_probs_mV.shape[1])
    parts = _parts(log_probs_mV, torch.tensor(readers.shares).double(), decoding, noise)
    if decoding.is_vote:
        noise = None  # it is in the votes
    scores = parts.by_reader.sum(0)
    if noise is not None:
        scores = scores.log() / decoding.temperature + noise
    token = int(scores.argmax())
    is_affected = any(readers.affected)
    if tally is None:
        return Token(token, not is_affected)
    is_out = torch.tensor(readers.affected) | parts.is_close
    told = (parts, is_out, decoding.temperature, noise, token)
    # Where nothing is affected the answer is what it is, close or not.
    is_certified = not is_affected or _is_certain(*told)
    rival = _rival(*told)
    tally.append(parts.by_reader[:, token].numpy(), is_out.numpy(), rival, is_certified)
    return Token(token, is_certified)


def _rival(
    parts: Parts,
    is_out: torch.Tensor,
    temperature: float,
    noise: torch.Tensor | None,
    token: int,
) -> Rival:
    """What the token must have to stay."""
    certain = parts.by_reader[~is_out].sum(0)
    weight = float(parts.most[is_out].sum())
    if noise is None:
        return rival_of(certain, weight, token, parts.slack)
    return rival_of_draw(certain, weight, token, temperature, noise, parts.slack)


def _is_certain(
    parts: Parts,
    is_out: torch.Tensor,
    temperature: float,
    noise: torch.Tensor | None,
    token: int,
) -> bool:
    """Whether the token wins whatever the readers give that are out."""
    certain = parts.by_reader[~is_out].sum(0)
    weight = float(parts.most[is_out].sum())
    if noise is None:
        verdict = certify(certain, weight, parts.slack)
    else:
        verdict = certify_draw(certain, weight, temperature, noise, parts.slack)
    return bool(verdict.is_certified) and int(verdict.winner) == token
