"""simulate-serving."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_unlearn import console
from llm_unlearn.cli.application import RUNS, Json, app

if TYPE_CHECKING:
    from llm_unlearn.serving.simulation.numbers import Latency, Outcome
    from llm_unlearn.serving.simulation.plan import Simulated

COLUMNS = (
    "policy",
    "mean s",
    "p50",
    "p99",
    "wait saved",
    "retrains",
    "certified",
    "clean",
    "refused",
    "differ",
    "unsafe",
    "late",
    "right",
)
MEANING = (
    "wait saved, and (of retrains): percent against oblivious; certified: percent at once; clean: percent "
    "by clean shards without a certificate; differ: answers that the target's ensemble would not give; "
    "unsafe: answers with a vote of shards that held deleted data; late: deletions; right: percent of answers"
)


@app.command(rich_help_panel=RUNS)
def simulate_serving(  # noqa: PLR0913 - typer makes an option of every argument
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Shards, subjects and seconds of a run.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="JSON lines: time, kind (query, delete), shard or subject.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Queries per second (2).")] = None,
    deletions_per_hour: Annotated[float | None, typer.Option(help="Deletions (60).")] = None,
    hours: Annotated[float | None, typer.Option(help="How long (2).")] = None,
    shards: Annotated[int | None, typer.Option(help="Shards, without a run (20).")] = None,
    seconds_per_shard: Annotated[
        float | None, typer.Option(help="To rebuild one; the run's, or 20.")
    ] = None,
    seconds_per_answer: Annotated[
        float, typer.Option(help="Of a query that need not wait.")
    ] = 0.05,
    labels: Annotated[int, typer.Option(help="Answers to choose from.")] = 10,
    accuracy: Annotated[float, typer.Option(help="Mean accuracy of the shards.")] = 20 / 21,
    by_shard: Annotated[
        bool, typer.Option("--by-shard", help="Publish each shard as soon as it is rebuilt.")
    ] = False,
    policy: Annotated[
        str | None, typer.Option(help="Only this policy (docs/serving_policies.md lists them).")
    ] = None,
    target: Annotated[str, typer.Option(help="deactivated, retrained or both.")] = "both",
    threshold: Annotated[
        int | None, typer.Option(help="Of the threshold policies; a quarter of the shards.")
    ] = None,
    deadline_hours: Annotated[float | None, typer.Option(help="Of a deletion (24).")] = None,
    seed: Annotated[int, typer.Option(help="Of what is invented.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this PNG file.")] = None,
    as_json: Json = False,
) -> None:
    """What each serving policy would cost: latency, retrains, certified answers, exposures."""
    from llm_unlearn.serving.simulation.numbers import Setting
    from llm_unlearn.serving.simulation.plan import Arrivals, simulate_serving

    setting = Setting(
        seconds_per_answer=seconds_per_answer,
        labels=labels,
        accuracy=accuracy,
        by_shard=by_shard,
        seed=seed,
    )
    with console.steps_progress("policies", enabled=not as_json) as progress:
        simulated = simulate_serving(
            Arrivals(run, trace, rate, deletions_per_hour, hours, shards),
            setting,
            seconds_per_shard,
            policy,
            target,
            threshold,
            deadline_hours,
            progress,
        )
    if plot is not None:
        from llm_unlearn.serving.simulation.plot import plot_outcomes

        plot_outcomes(simulated.outcomes, plot)
    if as_json:
        console.print_json(simulated.to_dict())
    else:
        _print(simulated)
        if plot is not None:
            print(f"plot: {plot}")


def _print(simulated: "Simulated") -> None:
    from llm_unlearn.serving.simulation.numbers import headline

    for note in simulated.notes:
        console.warn(note)
    print(simulated.sentence)
    for chosen, rows in simulated.by_target().items():
        console.print_table(f"target: {chosen}", COLUMNS, [_row(outcome) for outcome in rows])
        print(headline(rows))
    print(MEANING)


def _row(outcome: "Outcome") -> tuple[str, ...]:
    return (
        outcome.policy + (" (UNSAFE)" if outcome.is_unsafe else ""),
        *_latency(outcome.latency),
        _number(outcome.waiting_saved, 1),
        f"{outcome.retrains} ({_number(outcome.retrains_saved, 0)})",
        _number(outcome.certified, 2),
        _number(outcome.clean, 2),
        _number(outcome.refused, 2),
        str(outcome.different),
        str(outcome.unsafe),
        str(outcome.missed),
        _number(outcome.right, 1),
    )


def _latency(latency: "Latency | None") -> tuple[str, str, str]:
    if latency is None:
        return "-", "-", "-"
    return f"{latency.mean:.3f}", f"{latency.p50:.2f}", f"{latency.p99:.2f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
