"""What an S3T set-up will cost and survive, before anything is trained.

Source: arXiv 2406.16257, section 4 (deletion rate) and appendix C (cost). The accounting of compute
is ours, because the paper's leaves out the forward pass:

* one forward pass over a share of the data costs that share; the backward pass of all LoRA blocks
  costs the same again, so a plain LoRA fine-tune costs 2 per epoch over all data;
* stage i of L sees ``i/L`` of its shard (``cumulative``) or ``1/L`` (``disjoint``);
* with ``layers`` its backward pass stops below the top ``i/L`` of the layers, with ``ranks`` it
  runs through all of them: ``1 + i/L`` or 2 per share of data;
* a node, that is a distinct prefix of the sequences of a shard, is trained once.

Costs are reported in plain LoRA fine-tunes of all data for the same number of epochs per stage. The
number of shards cancels out: m shards, each 1/m of the data.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_unlearn.exact.sequences import check_at_least_one, select_sequences
from llm_unlearn.exact.simulation import simulate_deletions, simulate_depth
from llm_unlearn.exact.theory import expected_deletions, sisa_expected_deletions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAIN_LORA_EPOCH = 2.0
"""Units of one plain LoRA epoch: one forward and one backward pass over the data."""

SLICE_DATA = ("cumulative", "disjoint")
BLOCKS = ("layers", "ranks")


@dataclass(frozen=True)
class Estimate:
    """A simulated mean and its standard error."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} +/- {self.standard_error:.1f}"


@dataclass(frozen=True)
class Plan:
    """Expected deletions, cost and storage of one set-up; made by `make_plan`."""

    num_shards: int
    num_slices: int
    num_sequences: int
    method: str
    slice_data: str
    blocks: str
    runs: int
    seed: int

    deletions_until_retraining: float
    """Closed form: expected requests until no shard has a surviving stage."""

    sisa_deletions_until_retraining: float
    """The same for SISA with these shards."""

    simulated_deletions: Estimate
    """Simulated `deletions_until_retraining`."""

    deletions_until_first_shard_dead: Estimate

    deletions_until_half_depth: Estimate
    """Until the mean retained prefix is shorter than half of the slices: the honest moment to
    retrain, as the last shard dies long after the quality is gone."""

    aimed_deletions_first_shard: int
    """Requests that kill one shard if aimed at the first slices of its sequences."""

    aimed_deletions_all_shards: int
    """Requests that kill everything if aimed."""

    training_cost: float
    """Plain LoRA fine-tunes of all data, for all nodes."""

    training_cost_per_deletion: float
    """`training_cost` by `deletions_until_retraining`: what one served request costs if nothing is
    rebuilt. More sequences buy availability, not compute: this rises with B."""

    num_nodes: int
    """Blocks trained and stored, all shards together."""

    storage_bytes: int | None
    """Of all nodes; the served adapters (one per shard) come on top. None if not asked for."""

    records_per_slice: float | None
    """Mean size of a slice: a request takes its whole slice out of service until a rebuild. None
    if the number of records is not given."""

    forward_passes_per_token: int
    """One per shard, while all live: their answers are combined."""

    kv_caches: int
    """Key-value caches held while decoding, one per shard."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return asdict(self)


def make_plan(  # noqa: PLR0913 - every argument is one choice of the person who plans
    num_shards: int,
    num_slices: int,
    num_sequences: int,
    method: str = "cyclic",
    num_records: int | None = None,
    adapter_bytes: int | None = None,
    slice_data: str = "cumulative",
    blocks: str = "layers",
    runs: int = 2000,
    seed: int = 0,
) -> Plan:
    """Work out deletions, cost and storage for requests that are uniform over all slices.

    Args:
        num_shards: m.
        num_slices: L per shard.
        num_sequences: B per shard.
        method: a method of `select_sequences` that takes no prior; ``cyclic`` or ``random``.
        num_records: records in total.
        adapter_bytes: size of one full adapter; a block is 1/L of it.
        slice_data: ``cumulative`` or ``disjoint``.
        blocks: ``layers`` or ``ranks``.
        runs: simulated systems; the standard errors shrink with its square root.
        seed: of the simulation and of ``random``.

    Raises:
        ValueError: an argument outside what is said above.
    """
    _check_choice("method", method, ("cyclic", "random"))
    check_at_least_one(
        num_shards=num_shards, runs=runs, num_records=num_records, adapter_bytes=adapter_bytes
    )
    sequences = select_sequences(num_slices, num_sequences, method, seed=seed)
    # Random sequences can begin with the same slice, and only different first slices count.
    num_first_slices = len({sequence[0] for sequence in sequences})
    deletions = expected_deletions(num_shards, num_slices, num_first_slices)
    simulated = simulate_deletions(num_shards, sequences, runs, seed)
    cost = training_cost(sequences, slice_data, blocks)
    num_nodes = num_shards * sum(count_nodes(sequences))
    return Plan(
        num_shards=num_shards,
        num_slices=num_slices,
        num_sequences=num_sequences,
        method=method,
        slice_data=slice_data,
        blocks=blocks,
        runs=runs,
        seed=seed,
        deletions_until_retraining=deletions,
        sisa_deletions_until_retraining=sisa_expected_deletions(num_shards, num_slices),
        simulated_deletions=estimate(simulated.all_shards_dead),
        deletions_until_first_shard_dead=estimate(simulated.first_shard_dead),
        deletions_until_half_depth=estimate(simulated.half_depth),
        aimed_deletions_first_shard=num_first_slices,
        aimed_deletions_all_shards=num_shards * num_first_slices,
        training_cost=cost,
        training_cost_per_deletion=cost / deletions,
        num_nodes=num_nodes,
        # Rounded up: a plan must not promise less disk than it takes.
        storage_bytes=None
        if adapter_bytes is None
        else -(-num_nodes * adapter_bytes // num_slices),
        records_per_slice=None if num_records is None else num_records / (num_shards * num_slices),
        forward_passes_per_token=num_shards,
        kv_caches=num_shards,
    )


def count_nodes(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Different prefixes of length 1, 2, ..., L: the nodes of one shard, by stage."""
    num_slices = len(sequences[0])
    return [
        len({tuple(sequence[:length]) for sequence in sequences})
        for length in range(1, num_slices + 1)
    ]


def training_cost(
    sequences: Sequence[Sequence[int]], slice_data: str = "cumulative", blocks: str = "layers"
) -> float:
    """Cost of training all nodes, in plain LoRA fine-tunes of the data for as many epochs.

    One sequence of 4 slices, cumulative, in layers: (4.375 units per epoch) / 2 = 2.1875.

    Raises:
        ValueError: an unknown ``slice_data`` or ``blocks``.
    """
    _check_choice("slice_data", slice_data, SLICE_DATA)
    _check_choice("blocks", blocks, BLOCKS)
    num_slices = len(sequences[0])
    units = 0.0
    for stage, nodes in enumerate(count_nodes(sequences), start=1):
        share_of_data = (stage if slice_data == "cumulative" else 1) / num_slices
        backward = stage / num_slices if blocks == "layers" else 1.0
        units += nodes * share_of_data * (1.0 + backward)
    return units / PLAIN_LORA_EPOCH


def plan_table(plan: Plan) -> list[tuple[str, str]]:
    """The plan as (label, value) rows for printing, in the order in which a person asks."""
    set_up = f"{plan.num_shards} x {plan.num_slices}, {plan.num_sequences} ({plan.method})"
    rows = [
        ("shards x slices, sequences per shard", set_up),
        ("deletions until retraining, expected", f"{plan.deletions_until_retraining:.1f}"),
        ("deletions until retraining, simulated", str(plan.simulated_deletions)),
        ("the same for SISA, expected", f"{plan.sisa_deletions_until_retraining:.1f}"),
        ("deletions until the first shard is dead", str(plan.deletions_until_first_shard_dead)),
        ("deletions until half the depth is gone", str(plan.deletions_until_half_depth)),
        ("aimed deletions that kill one shard", str(plan.aimed_deletions_first_shard)),
        ("aimed deletions that kill everything", str(plan.aimed_deletions_all_shards)),
        ("training data and blocks of a stage", f"{plan.slice_data}, {plan.blocks}"),
        ("training cost (plain LoRA fine-tunes)", f"{plan.training_cost:.2f}"),
        ("training cost per deletion until retraining", f"{plan.training_cost_per_deletion:.3f}"),
        ("nodes to train and store", str(plan.num_nodes)),
    ]
    if plan.storage_bytes is not None:
        rows.append(("storage of the nodes", f"{plan.storage_bytes / 1e6:,.1f} MB"))
    if plan.records_per_slice is not None:
        rows.append(("records in a slice, on average", f"{plan.records_per_slice:.1f}"))
    rows.append(("forward passes per token", str(plan.forward_passes_per_token)))
    return [*rows, ("KV caches while decoding", str(plan.kv_caches))]


def plot_plan(plan: Plan, path: str | PathLike[str]) -> None:
    """Draw retained depth against requests, and deletions until retraining against B, to a file.

    The format follows the file's ending. Needs matplotlib.
    """
    from matplotlib.figure import Figure  # optional, and slow to import

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    depth_axes, deletions_axes = figure.subplots(1, 2)
    _draw_depth(plan, depth_axes)
    _draw_deletions(plan, deletions_axes)
    figure.savefig(path, dpi=120)


def _draw_depth(plan: Plan, axes: "Axes") -> None:
    # Shows the whole descent without its long flat tail.
    num_requests = max(5, int(np.ceil(2.5 * plan.deletions_until_half_depth.mean)))
    # 1, 2, 4, ... up to the plan's own; curves beyond L lie too close to be told apart.
    doublings = [2**i for i in range(plan.num_slices.bit_length()) if 2**i < plan.num_sequences]
    for budget in [*doublings[:: 1 + len(doublings) // 5], plan.num_sequences]:
        sequences = select_sequences(plan.num_slices, budget, plan.method, seed=plan.seed)
        depth = simulate_depth(plan.num_shards, sequences, num_requests, plan.runs, plan.seed)
        axes.plot(range(num_requests + 1), 100 * depth, label=f"B = {budget}")
    axes.axhline(50, color="grey", linestyle=":", linewidth=1)
    axes.set(
        xlabel="deletion requests",
        ylabel="mean retained depth (% of stages)",
        title=f"What is left (m = {plan.num_shards} shards, L = {plan.num_slices} slices)",
        xlim=(0, num_requests),
        ylim=(0, 102),
    )
    axes.grid(alpha=0.3)
    axes.legend(title="sequences per shard")


def _draw_deletions(plan: Plan, axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    counts = range(1, plan.num_slices + 1)
    expected = [expected_deletions(plan.num_shards, plan.num_slices, count) for count in counts]
    axes.plot(counts, expected, marker="o", markersize=4, label="S3T, expected")
    axes.errorbar(
        [plan.aimed_deletions_first_shard],
        [plan.simulated_deletions.mean],
        yerr=[4 * plan.simulated_deletions.standard_error],
        fmt="ks",
        capsize=4,
        label=f"this plan (B = {plan.num_sequences}), simulated, 4 standard errors",
    )
    axes.axhline(expected[0], color="grey", linestyle="--", linewidth=1, label="SISA, expected")
    axes.set(xlabel="different first slices per shard, min(B, L)", ylabel="deletion requests")
    axes.set(title="Requests until retraining", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def estimate(values: np.ndarray) -> Estimate:
    """Mean and standard error of simulated values, shape (runs,)."""
    # One run has no spread to estimate from: NaN, not a confident zero.
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return Estimate(mean=float(values.mean()), standard_error=float(error))


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
