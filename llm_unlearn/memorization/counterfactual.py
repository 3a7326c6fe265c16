"""The reference that proxies are held against: would the model know a record that it never saw?

    mem_i = mean(accuracy on i | trained on i) - mean(accuracy on i | not trained on i)

over runs that each train on a random 70 % of the records (Feldman and Zhang, 2020, arXiv 2008.03703), here LoRA
runs, with the share of a record's tokens that are right as accuracy. A keyed hash of the record draws for it
whether it is in a run, so that nobody else's deletion changes that.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.data.records import Record, digest
from llm_unlearn.errors import UserError
from llm_unlearn.memorization.agreement import spearman
from llm_unlearn.memorization.orientation import Floats
from llm_unlearn.record_tables import RECORD, RecordTable, TableFolder, make_table

PREFIX = "counterfactual-"
RESAMPLES, SPLITS = 999, 20
Outcome = Mapping[str, NDArray[Any]]
"""What a run's model gave every record, as `probing.probe` tells it."""


@dataclass(frozen=True)
class Subsampling:
    """How many runs there are, and what part of the records each trains on.

    Raises:
        UserError: too few runs, or no part.
    """

    runs: int = 16
    fraction: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        if self.runs < 2 or not 0 < self.fraction < 1:
            raise UserError(
                "a counterfactual needs two runs or more, each on a part of the records between 0 and 1"
            )

    def members(self, pseudonyms: Sequence[str], run: int) -> NDArray[np.bool_]:
        """Which records a run trains on."""
        told = [f"{self.seed} {run} {name}".encode() for name in pseudonyms]
        drawn = [int.from_bytes(hashlib.sha256(one).digest()[:8], "big") / 2**64 for one in told]
        return np.array(drawn) < self.fraction


def run_counterfactual(
    tables: TableFolder,
    records: Sequence[Record],
    train_and_probe: Callable[[list[Record], int], Outcome],
    plan: Subsampling,
    about: Mapping[str, Any],
    say: Callable[[int, int], None] = lambda _done, _total: None,
    keep: Callable[[str, RecordTable], None] | None = None,
) -> float:
    """Train the runs that are missing. Killed anywhere, the next call goes on with the run it was in.

    Args:
        train_and_probe: trains a fresh adapter on some records, with a seed, and says what the model gives to
            each of `records`.
        about: what the runs must have in common: base, flags.
        keep: writes a table (by default into `tables`).

    Returns:
        Seconds that all runs took.

    Raises:
        UserError: the tables hold runs of another plan or model.
    """
    told = {"plan": asdict(plan) | {"runs": None}, **about}
    names = [tables.key.pseudonym("record", record.id) for record in records]
    seconds, held = 0.0, set(tables.names())
    for run in range(plan.runs):
        name = f"{PREFIX}{run:03d}"
        if name in held:
            seconds += _check_same(tables.read(name, "seconds"), told)
        else:
            is_in, start = plan.members(names, run), time.monotonic()
            chosen = [one for one, taken in zip(records, is_in, strict=True) if taken]
            if not chosen:
                raise UserError(f"run {run} would train on no record: raise the fraction")
            outcome = train_and_probe(chosen, plan.seed + run)
            took = time.monotonic() - start
            columns = {"is_in": is_in, **{n: outcome[n] for n in ("accuracy", "confidence")}}
            table = make_table(tables.key, records, columns, {**told, "seconds": took})
            (keep or tables.write)(name, table)
            seconds += took
        say(run + 1, plan.runs)
    return seconds


def _check_same(table: RecordTable, told: Mapping[str, Any]) -> float:
    for name, value in told.items():
        if digest(table.about.get(name)) != digest(value):
            raise UserError(
                f"the counterfactual runs that are there differ in {name}: remove them, or ask for the same"
            )
    return float(table.about["seconds"])


class Reference(NamedTuple):
    """Memorization of each record, with the ends of its 95 % interval over runs.

    Attributes:
        records: pseudonyms, (n,).
        memorization, lower, upper: in [-1, 1]; NaN for a record that was in all runs, or in none.
        reliability: correlation that a second reference of as many runs would have with this one
            (split halves, Spearman and Brown); a score without any noise reaches about its square root.
    """

    records: NDArray[Any]
    memorization: Floats
    lower: Floats
    upper: Floats
    runs: int
    reliability: float
    seconds: float

    def of(self, records: Sequence[str]) -> Floats:
        """Memorization of some records by their pseudonyms; NaN for one that no run was asked about."""
        known = dict(zip(self.records.tolist(), self.memorization.tolist(), strict=True))
        return np.array([known.get(name, np.nan) for name in records], np.float64)


def runs_of(tables: TableFolder) -> list[str]:
    """Names of the tables that runs left."""
    return [name for name in tables.names() if name.startswith(PREFIX)]


def read_reference(tables: TableFolder, measure: str = "accuracy") -> Reference | None:
    """The reference of the runs that are there; None with fewer than two."""
    found = [tables.read(name, "is_in", measure, "seconds") for name in runs_of(tables)]
    if len(found) < 2:
        return None
    records = sorted(set.intersection(*(set(one.columns[RECORD].tolist()) for one in found)))
    is_in, values = [], []
    for one in found:
        place = {name: number for number, name in enumerate(one.columns[RECORD].tolist())}
        rows = [place[name] for name in records]
        is_in.append(one.columns["is_in"][rows].astype(bool))
        values.append(one.columns[measure][rows].astype(np.float64))
    return estimate(
        np.array(records), np.stack(is_in), np.stack(values), [o.about["seconds"] for o in found]
    )


def estimate(
    records: NDArray[Any], is_in: NDArray[np.bool_], values: Floats, seconds: Sequence[float] = ()
) -> Reference:
    """Memorization from the outcomes of R runs on n records, (R, n) each."""
    runs = len(values)
    generator = np.random.default_rng(0)
    draws = generator.multinomial(runs, np.full(runs, 1 / runs), size=RESAMPLES)
    drawn = difference(is_in, values, draws)
    with np.errstate(all="ignore"):
        lower, upper = _quantiles(drawn)
    return Reference(
        records, difference(is_in, values, np.ones((1, runs)))[0], lower, upper, runs,
        reliability(is_in, values), float(sum(seconds)),
    )  # fmt: skip


def difference(is_in: NDArray[np.bool_], values: Floats, weights: NDArray[Any]) -> Floats:
    """`mean(values | in) - mean(values | out)` with each run counted `weights` times, (draws, n)."""
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)

    def mean(chosen: NDArray[np.bool_]) -> Floats:
        count = weights @ (chosen & known)
        total = weights @ (filled * chosen)
        return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)

    return mean(is_in) - mean(~is_in)


def _quantiles(drawn: Floats) -> tuple[Floats, Floats]:
    """Of each column, without draws in which a record was never in or never out."""
    lower, upper = (np.full(drawn.shape[1], np.nan) for _ in range(2))
    known = ~np.isnan(drawn).all(axis=0)
    if known.any():
        lower[known], upper[known] = np.nanquantile(drawn[:, known], [0.025, 0.975], axis=0)
    return lower, upper


def reliability(is_in: NDArray[np.bool_], values: Floats) -> float:
    """`2 r / (1 + r)` with r the mean correlation of random halves of the runs; NaN with fewer than four.

    At r of 0 or less nothing is reliable, and r itself is told.
    """
    runs = len(values)
    if runs < 4:
        return float("nan")
    generator = np.random.default_rng(0)
    found = []
    for _ in range(SPLITS):
        half = np.zeros((1, runs))
        half[0, generator.permutation(runs)[: runs // 2]] = 1
        one, other = difference(is_in, values, half)[0], difference(is_in, values, 1 - half)[0]
        found.append(spearman(one, other, resamples=1).rho)
    known = [r for r in found if r == r]
    mean = float(np.mean(known)) if known else float("nan")
    return 2 * mean / (1 + mean) if mean > 0 else mean
