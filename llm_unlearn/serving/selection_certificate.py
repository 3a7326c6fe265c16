"""Who answers a prompt, certified while deletions are pending: `select`, `mixture` and `nearest`.

Where the words of a prompt decide (`exact/words.py`, `exact/selection.py`), the rest is easy: if the candidates are
the same now and after the execution and no affected shard is among them, everything that follows (reading the prompt
under them and the base model, the choice, the answer) is a function of unaffected shards and constants, so the whole
answer is certified as it stands, token by token, greedy or sampled. So what has to be certified are the candidates.

**What is known.** Row r (a subject in a slice) covers x_r of the prompt's weight. Rows of unaffected shards are fixed.
Of an affected shard nothing is read that was deleted: its rows lie between 0 (a node that is gone now, or for good) and
what the records that are *retained* would give (`retained_indexes`). A row's value only falls when words
leave it, in floating point too, since sums of the same terms without some are not larger. So the states of the system
now, at the end and at every moment between are points of a box, low <= x <= high.

**What does not hold.** "Who is not picked now cannot be picked later." True of one row: it covers no more later than
now. False of the decision, which depends on others: the *lead* is that of the best row over the third best (or a
stranger, 0.2), so it rises when the third vanishes. Rows of 0.9, 0.85 and 0.8 in three shards have a lead of 0.1: the
base answers. Without the other two, the lead of the first is 0.7, and it answers unread. Likewise the fifth of four
candidates moves up when one leaves.

**What does hold.** With M the largest row and T the third largest, lead = M - max(T, 0.2).

*Least lead of the box*: M0 - max(min(T(high), M0), 0.2) with M0 = max(low). It is reached by x_r = min(high_r, M0), at
least low_r. No state has less: T <= min(T(high), M), so lead >= M - max(min(T(high), M), 0.2), which does not fall
when M rises, and M >= M0.
*Greatest lead*: the largest, over rows r, of the lead with r at high and all others at low. Each is a state. And from
any state whose best row is r, putting the others to low and then r to high leaves r the best, does not lower M and
does not raise the second best of the others, which is T: the lead does not fall.
The leads of the box are all between the two, so if both are on the same side of 0.1 and of `select_lead`, every state
decides alike between nobody, in doubt, and sure.
*Nobody*: the list is empty, whoever is affected; the base model answers.
*In doubt*: the list is the first c shards by coverage, of those above 0. An affected shard k gets into it in
some state if and only if its coverage at high, H_k, is above 0 and fewer than c unaffected shards come before
(H_k, k): put k to high and the other affected to low; the first of the affected in that state is beaten by
unaffected ones only, fewer than c. If none can, the list is that of the unaffected alone, the same in every state.
*Sure*: the list is the first c, of those above max - 0.1. With M the largest coverage of the unaffected: an
affected shard with H_k <= M - 0.1, or with c unaffected ones before it, can neither enter nor change the largest;
with any other some affected shard enters, as before.
So `certify_candidates` is sound, and misses nothing that holds in the whole box.

Under `nearest`, keys and encoder are constants: which k shards are nearest cannot change, only which of them are
left. The mean over those left is their sum by a common factor, which decides nothing, and an affected shard gives
between 0 (it is gone) and 1: that is the rule of `certificate.py`, also for those of the k of which nothing is left.

Without an index of words every living shard reads every prompt, and one that is trained again may like it more than
any other: certified only when no shard is affected. A `merge` adds all adapters up, in weights and not in scores,
so one affected shard may change anything: never certified while one is affected.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.data.partition import PartitionKey, SliceName
from llm_unlearn.data.records import Record
from llm_unlearn.errors import RunError
from llm_unlearn.exact.selection import DOUBT, Candidates, Rule, candidates
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.exact.words import STRANGER, Index, Words, coverage, index_records, lead

Rows = NDArray[np.float64]


class CertifiedCandidates(NamedTuple):
    """Whom a prompt may be for; if certified, in every state of the box, and nobody affected."""

    found: Candidates
    is_certified: bool


def certify_candidates(
    low: Rows,
    high: Rows,
    shards: NDArray[np.int64],
    rule: Rule,
    affected: Collection[int],
) -> CertifiedCandidates:
    """Would `selection.candidates` say the same in every state between `low` and `high`?

    Args:
        low: of every row the least part of the prompt that it covers in any state, (R,).
        high: the most; the same for rows of unaffected shards.
        shards: whose row it is, (R,): places of the shards in the order in which ties are broken. A shard that
            vanishes keeps its place.
        affected: shards that must have no part in the answer, whether their rows move or not.

    Returns:
        Certified: what holds in every state. Otherwise what `low` says, which may not hold.
    """
    if not len(low):
        return CertifiedCandidates(Candidates([], False), True)
    count = int(shards.max()) + 1
    found = candidates(coverage(low, shards, count), lead(low), rule)
    least, greatest = leads(low, high)
    if _side(least, rule) != _side(greatest, rule):
        return CertifiedCandidates(found, False)
    can_enter = _can_enter(coverage(high, shards, count), affected, found.is_sure, rule)
    return CertifiedCandidates(found, greatest <= DOUBT or not can_enter)


def _side(lead: float, rule: Rule) -> tuple[bool, bool]:
    return lead > DOUBT, lead > DOUBT and lead > rule.lead


def leads(low: Rows, high: Rows) -> tuple[float, float]:
    """The least and the greatest lead of the states between `low` and `high`, as `words.lead` rounds them."""
    best = float(low.max())
    third = np.partition(high, -3)[-3] if len(high) > 2 else 0.0
    least = float(best - max(min(third, best), STRANGER))
    greatest = lead(low)
    top = np.argsort(-low, kind="stable")[:4]  # the first three without any one row
    for row in np.flatnonzero(high > best):  # any other stays behind, and at most raises the third
        others = [low[other] for other in top if other != row][:3]
        greatest = max(greatest, lead(np.array([high[row], *others])))
    return least, greatest


def _can_enter(high: Rows, affected: Collection[int], is_sure: bool, rule: Rule) -> bool:
    """Can an affected shard be a candidate in some state? `high`: the most that each shard covers."""
    is_affected = np.isin(np.arange(len(high)), list(affected))
    unaffected = np.where(is_affected, 0.0, high)
    least = unaffected.max() - DOUBT if is_sure else 0.0
    for shard in np.flatnonzero(is_affected & (high > least)):
        is_before = (unaffected > high[shard]) | (
            (unaffected == high[shard]) & (np.arange(len(high)) < shard)
        )
        if (is_before & ~is_affected).sum() < rule.candidates:
            return True
    return False


class IndexBounds:
    """The indexes of all shards, as far as they are known while deletions are pending.

    Args:
        served: for every shard the indexes that it serves; those of affected shards are not looked at.
        retained: for every affected shard, by its place in `served`, the indexes of the records that stay.
    """

    def __init__(
        self,
        served: Sequence[Sequence[Mapping[str, Any]]],
        retained: Mapping[int, Sequence[Mapping[str, Any]]],
        key: PartitionKey,
        tokenizer: Any,
    ):
        self.affected = frozenset(retained)
        fixed = [[] if shard in retained else own for shard, own in enumerate(served)]
        self._fixed = Words(fixed, key, tokenizer)
        moving = [retained.get(shard, []) for shard in range(len(served))]
        self._moving = Words(moving, key, tokenizer)

    def certify(self, text: str, rule: Rule) -> CertifiedCandidates:
        """Whom a prompt may be for, now and after the execution."""
        fixed, moving = self._fixed.by_row(text), self._moving.by_row(text)
        return certify_candidates(
            np.concatenate([fixed, np.zeros_like(moving)]),
            np.concatenate([fixed, moving]),
            np.concatenate([self._fixed.shards, self._moving.shards]),
            rule,
            self.affected,
        )


def retained_indexes(run: RunDirectory, shards: Iterable[int]) -> dict[int, list[Index]]:
    """The indexes that some shards have once every acknowledged request is executed, slice by slice.

    They are made of records that stay and of those that corrections bring: a function of what a run that
    never held the others would hold, so nothing of them is told. May be called at any time; no lock is needed.

    Args:
        shards: numbers of shards of the run.
    """
    coming = _coming(run)  # before the slices are read: what is put into them is not missed
    is_gone = run.slices.matcher(run.ledger.tombstones())

    def index(name: SliceName) -> Index:
        records = [*run.slices.read(name), *coming.get(name, [])]
        return index_records((record for record in records if not is_gone(record)), run.key)

    return {shard: [index(name) for name in run.slices.names_in(shard)] for shard in shards}


def _coming(run: RunDirectory) -> dict[SliceName, list[Record]]:
    """Records that pending corrections will insert."""
    coming: dict[SliceName, list[Record]] = defaultdict(list)
    for request in run.ledger.requests(pending=True):
        if not request.inserted:
            continue
        try:
            records = run.slices.read_pending(request.id)
        except RunError:
            if request.id in {left.id for left in run.ledger.requests(pending=True)}:
                raise
            continue  # it was carried out meanwhile: its slices hold them
        for target, record in zip(request.inserted, records, strict=True):
            coming[SliceName(target.shard, target.slice)].append(record)
    return coming
