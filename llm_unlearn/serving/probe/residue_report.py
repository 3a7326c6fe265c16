"""What one of our servers says about itself (`/v1/residue`), and whether it may hold that."""

import json
from dataclasses import dataclass
from typing import Any

from llm_unlearn.errors import RunError
from llm_unlearn.exact.adapters import NAME, merged_name
from llm_unlearn.serving.probe.expected import Expected
from llm_unlearn.serving.probe.looks import LiveAdapter, Look
from llm_unlearn.serving.queries import Resident

WITHDRAWN = "withdrawn"


@dataclass(frozen=True)
class Report:
    """The answer of `/v1/residue`, checked for its form and believed in nothing else."""

    epoch: int
    residents: tuple[Resident, ...]
    memory: dict[str, str]
    loaded: tuple[str, ...]
    prefix_caches: tuple[Any, ...]
    counts: dict[str, int]

    @classmethod
    def read(cls, told: Any) -> "Report":
        """
        Raises:
            RunError: it has another form.
        """
        try:
            return cls(
                epoch=_number(told["epoch"]),
                residents=tuple(map(_resident, told["residents"])),
                memory={_text(name): _text(sha) for name, sha in told["memory"].items()},
                loaded=tuple(map(_text, told["loaded"])),
                prefix_caches=tuple(told["prefix_caches"]),
                counts={n: _number(told[n]) for n in ("running", "waiting", "held")},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"/v1/residue answers in another form: {error!r}") from None


def _resident(entry: Any) -> Resident:
    shard = entry["shard"]
    return Resident(
        name=_text(entry["name"]),
        shard=None if shard is None else _number(shard),
        digest=_text(entry["digest"]),
        nodes=tuple(map(_text, entry["nodes"])),
        epoch=_number(entry["epoch"]),
        state=_text(entry["state"]),  # pyright: ignore[reportArgumentType]
        in_flight=_number(entry["in_flight"]),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
        raise TypeError(f"expected a short text, got {str(value)[:40]!r}")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"expected a number, got {str(value)[:40]!r}")
    return value


def look_at_report(
    report: Report, expected: Expected, place: str
) -> tuple[list[Look], list[LiveAdapter]]:
    """Everything that a server names, against what the run serves now."""
    residents = Look("adapters of the server")
    stale = _residents(residents, report, expected)
    adapters = [
        LiveAdapter(r.name, place, r.digest, report.memory.get(r.name), r.nodes, stale.get(r.name))
        for r in report.residents
    ]
    looks = [
        residents,
        _memory(report, expected),
        _prefix_caches(report, expected),
        _in_flight(report, stale),
        _epoch(report, expected),
    ]
    return looks, adapters


def _residents(look: Look, report: Report, expected: Expected) -> dict[str, str]:
    """Returns, by name, what is wrong with an adapter."""
    stale: dict[str, str] = {}
    for resident in report.residents:
        look.examined += 1
        problem = _problem_of(resident, expected)
        if problem is not None:
            stale[resident.name] = problem
            look.problems.append(f"{resident.name} {problem}")
        elif resident.name not in expected.adapters and resident.state != WITHDRAWN:
            look.notes.append(f"{resident.name} is clean, and not what the run serves now")
    named = {resident.name for resident in report.residents}
    look.unseen += [
        f"{name} is served by the run, and the server does not name it"
        for name, adapter in expected.adapters.items()
        if adapter.nodes and name not in named
    ]
    return stale


def _problem_of(resident: Resident, expected: Expected) -> str | None:
    name = NAME.fullmatch(resident.name)
    if name is None or not resident.digest.startswith(name[2]):
        return (
            "does not have its digest in its name: caches under that name can outlive its content"
        )
    if resident.shard is not None and name[1] != f"shard-{resident.shard}":
        return f"is called otherwise than its shard, {resident.shard}"
    if resident.state == WITHDRAWN:
        return None  # what it was made of is gone from its weights: `_memory` looks whether it is
    known = expected.adapters.get(resident.name)
    if known is not None and known.problem is None:
        is_same = (resident.digest, resident.nodes) == (known.digest, known.nodes)
        return (
            None
            if is_same
            else "has another digest or other nodes than the run serves by that name"
        )
    return expected.problem_of(resident.nodes)


def _memory(report: Report, expected: Expected) -> Look:
    look = Look("its memory")
    residents = {resident.name: resident for resident in report.residents}
    merged = merged_name((r.name, r.state == WITHDRAWN) for r in report.residents)
    for name, sha in report.memory.items():
        look.examined += 1
        if name == merged:
            look.unseen.append(f"{name} is all of them in one: its weights are unknown here")
        elif name not in residents:
            look.problems.append(f"{name} is in memory, and not among its adapters")
        else:
            _weights(look, residents[name], sha, expected)
    for name in report.loaded:
        if name == merged:
            continue
        if name not in residents:
            look.problems.append(f"{name} is loaded, and not among its adapters")
        elif name not in report.memory:
            look.unseen.append(
                f"{name} is loaded, and the server does not say what is in its memory"
            )
    for name in sorted(report.memory.keys() - set(report.loaded)):
        look.problems.append(f"{name} is in memory, and not among those that it calls loaded")
    look.notes.append(
        "the digests are the server's own word; memory that it has freed is not in them"
    )
    return look


def _weights(look: Look, resident: Resident, sha: str, expected: Expected) -> None:
    known = expected.adapters.get(resident.name)
    if resident.state == WITHDRAWN:
        is_zero = expected.is_zero(sha, len(resident.nodes))
        if is_zero is None:
            look.unseen.append(
                f"{resident.name} is withdrawn; without the run, zeros cannot be told"
            )
        elif not is_zero:
            look.problems.append(f"{resident.name} is withdrawn, and its weights are not zeros")
    elif known is not None:
        if sha != known.tensors:
            look.problems.append(f"{resident.name} has other weights in memory than the run serves")
    elif expected.clean is not None and sha in expected.clean.weights:
        look.problems.append(f"{resident.name} has the weights of a deleted node in memory")
    else:
        look.unseen.append(
            f"{resident.name} is not what the run serves now: its weights are unknown here"
        )


def _prefix_caches(report: Report, expected: Expected) -> Look:
    look = Look("its prefix caches", examined=len(report.prefix_caches))
    served = {r.name for r in report.residents if r.name in expected.adapters}
    for entry in report.prefix_caches:
        names = {found.group() for found in NAME.finditer(json.dumps(entry))}
        if not names:
            look.unseen.append(f"a cache that names no adapter: {json.dumps(entry)[:80]}")
        look.problems += [
            f"a cache of {name} is kept, which is not served" for name in names - served
        ]
    return look


def _in_flight(report: Report, stale: dict[str, str]) -> Look:
    look = Look("answers in flight", examined=sum(report.counts.values()))
    for resident in report.residents:
        is_gone = resident.name in stale or resident.state == WITHDRAWN
        if resident.in_flight and is_gone:
            look.problems.append(f"{resident.in_flight} running answers read {resident.name}")
    look.notes.append(", ".join(f"{count} {name}" for name, count in report.counts.items()))
    return look


def _epoch(report: Report, expected: Expected) -> Look:
    look = Look("its epoch", examined=1)
    now = expected.run.ledger.count() if expected.run is not None else None
    if expected.epoch is not None and report.epoch < expected.epoch:
        look.problems.append(
            f"it knows {report.epoch} entries of the ledger, which had {expected.epoch}"
        )
    elif now is not None and report.epoch > now:
        look.problems.append(
            f"it knows {report.epoch} entries of a ledger, and that of the run has {now}: it serves another run"
        )
    return look
