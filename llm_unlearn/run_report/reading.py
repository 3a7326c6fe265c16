"""Reads a run for its page: under the run's lock, changing nothing, going past whatever is damaged."""

import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_unlearn.data.partition import CORE
from llm_unlearn.exact.environment import describe_software
from llm_unlearn.exact.ledger import Event, Request
from llm_unlearn.exact.outlook import by_slice, by_subject
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.exact.trie import CORE_STAGE
from llm_unlearn.exact.verification import check_certificates
from llm_unlearn.run_report import outside
from llm_unlearn.run_report.contents import About, Chain, Contents, Expectation, Moment
from llm_unlearn.run_report.costs import Storage, Training, read_storage, read_training
from llm_unlearn.run_report.damage import Damage
from llm_unlearn.run_report.evaluations import compare
from llm_unlearn.run_report.outside import CopyRow
from llm_unlearn.run_report.requests import Counts, RequestRow, request_rows
from llm_unlearn.run_report.tries import Past, ShardTrie, read_tries


@dataclass
class _Read:
    """What is read while the run is held still."""

    events: Sequence[Event] = ()
    requests: Sequence[Request] = ()
    rows: tuple[RequestRow, ...] = ()
    chain: Chain | None = None
    tries: Sequence[ShardTrie] = ()
    core_state: str | None = None
    core_records: int | None = None
    storage: tuple[Storage, ...] = ()
    copies: tuple[CopyRow, ...] = ()
    out_of_reach: tuple[str, ...] = ()


def read_contents(
    path: Path, before: Path | None = None, after: Path | None = None, now: float | None = None
) -> Contents:
    """Read a run, changing nothing. What is damaged is named in `problems`, and the rest is read.

    Args:
        before, after: directories of evaluations, to be shown side by side.
        now: the clock, seconds since the epoch.

    Raises:
        UserError: there is no run, or an evaluation cannot be read.
        RunError: run.json or the key is damaged, or the run is busy.
    """
    now = time.time() if now is None else now
    evaluation = compare(before, after)
    run = RunDirectory.open(path)
    damage = Damage(run.path)
    with run.changing("reading it for a report"):
        read = _read(run, damage, now)
        is_served = run.served.exists()
    wanted, held = _wanted(run, read)
    training = Training(0.0, 0, 0.0, 0, None)
    with damage.noting("training events in the ledger"):
        training = read_training(read.events, wanted, held)
    stale = [
        f"shard {trie.shard} serves node {key[:12]}, which depends on deleted or unknown data"
        for trie in read.tries
        for key in trie.stale
    ]
    return Contents(
        made_at=now,
        about=_about(run, read),
        chain=read.chain,
        problems=(*stale, *damage.problems),
        is_served=is_served,
        counts=Counts.of(read.rows),
        requests=read.rows,
        shards=tuple(read.tries),
        core_state=read.core_state,
        expectations=_expectations(run, read.tries),
        storage=read.storage,
        training=training,
        copies=read.copies,
        other_events=outside.other_events(read.events),
        out_of_reach=read.out_of_reach,
        evaluation=evaluation,
        moments=_moments(read),
        software={
            "llm-unlearn": importlib.metadata.version("llm-unlearn"),
            **describe_software(),
        },
    )


def _read(run: RunDirectory, damage: Damage, now: float) -> _Read:
    """Read what can be read, part by part. The caller holds the run's lock."""
    read = _Read()
    with damage.noting("ledger"):
        _read_ledger(run, read, damage, now)
    with damage.noting("shards"):
        read.tries = read_tries(run, Past.of(read.events, read.requests), damage)
    if run.core is not None:
        read.core_state = "trained" if run.nodes.exists(run.core.key) else "missing"
        with damage.noting("permanent core"):
            read.core_records = run.slices.header(CORE).records
    if read.chain is not None:
        with damage.noting("copies"):
            read.copies = _read_copies(run, read)
    with damage.noting("files of the run"):
        read.storage = read_storage(run.path)
        read.out_of_reach = outside.out_of_reach(run)
    return read


def _read_ledger(run: RunDirectory, read: _Read, damage: Damage, now: float) -> None:
    events = run.ledger.events()
    read.requests = run.ledger.requests()
    read.rows = request_rows(run, read.requests, now)
    read.events = events
    problems = ["the ledger's chain cannot be followed"]
    with damage.noting("ledger"):
        problems = run.ledger.check_chain()
    for problem in problems:
        damage.say(problem)
    read.chain = Chain(len(events), events[-1].digest if events else None, holds=not problems)
    with damage.noting("certificates"):
        for problem in check_certificates(run).problems:
            damage.add("certificates", problem)


def _read_copies(run: RunDirectory, read: _Read) -> tuple[CopyRow, ...]:
    wanted, _ = _wanted(run, read)
    return outside.copy_rows(run, wanted if all(trie.rows for trie in read.tries) else None)


def _wanted(run: RunDirectory, read: _Read) -> tuple[dict[str, int], set[str]]:
    """The stage of every node that the run wants, by key, and the keys of those that can be used."""
    wanted: dict[str, int] = {}
    held: set[str] = set()
    if run.core is not None:
        wanted[run.core.key] = CORE_STAGE
        held |= {run.core.key} if run.nodes.exists(run.core.key) else set()
    for trie in read.tries:
        for row in trie.rows:
            for stage, cell in enumerate(row.cells):
                if cell.node is not None:
                    wanted[cell.node] = stage
                    held |= {cell.node} if cell.is_usable else set()
    return wanted, held


def _about(run: RunDirectory, read: _Read) -> About:
    config = run.config
    return About(
        name=run.path.resolve().name,
        base_model=outside.shown_place("base model", run.shape.name_or_path),
        blocks=config.blocks,
        slice_data=config.slice_data,
        shards=len(read.tries),
        slices=config.num_slices,
        sequences=len(config.sequences),
        a_shard_each=not config.num_shards,
        copies=config.copies,
        aggregate=config.rule.aggregate,
        core_records=read.core_records,
    )


def _expectations(run: RunDirectory, tries: Sequence[ShardTrie]) -> tuple[Expectation, ...]:
    """From here and from what a rebuild would leave; who asks next is drawn in two ways.

    Where every subject has a shard nobody can hit a slice twice; where public keys place the
    records (LegoNet) a request hits several shards at once, which slices alone can tell.
    """
    readable = [trie for trie in tries if trie.rows]
    states = {"as it stands": [trie.standing() for trie in readable]}
    rebuilt = [trie.standing(complete=True) for trie in readable]
    if rebuilt != states["as it stands"]:
        states["after a rebuild"] = rebuilt
    found = []
    for state, standings in states.items():
        if run.config.keys is None:
            found.append(Expectation(state, "by subject", by_subject(standings)))
        if run.config.num_shards:
            outlook = by_slice(standings, fan_out=run.config.copies)
            found.append(Expectation(state, "by slice", outlook))
    return tuple(found)


def _moments(read: _Read) -> tuple[Moment, ...]:
    """Trainings, requests and copies in the order of time."""
    lanes = {"trained": "trained", "copied": "copies"}
    found = [Moment(lanes[e.kind], e.time) for e in read.events if e.kind in lanes]
    for row in read.rows:
        found.append(Moment("acknowledged", row.acknowledged_at))
        if row.finished_at is not None:
            found.append(Moment("carried out", row.finished_at))
        elif row.deadline is not None:
            found.append(Moment("open deadlines", row.deadline))
    return tuple(sorted(found, key=lambda moment: (moment.time, moment.kind)))
