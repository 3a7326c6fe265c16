"""What is outside the run: copies that it knows of, and what nobody can reach from here."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath

from llm_unlearn.exact import residues
from llm_unlearn.exact.copies import HUB, known, outstanding
from llm_unlearn.exact.ledger import Event
from llm_unlearn.exact.store import RunDirectory

HOLDS, CURRENT, GONE, UNKNOWN = "holds deleted data", "up to date", "gone", "cannot be told"
# Events that have a place of their own on the page.
SHOWN_ELSEWHERE = {"created", "request", "deleted", "trained", "served", "copied", "copy gone"}


@dataclass(frozen=True)
class CopyRow:
    """A copy that is registered.

    Attributes:
        place: a repository and revision, or the name of a file without the folders above it.
        how: who says that it is gone.
    """

    id: str
    kind: str
    place: str
    made_at: float
    state: str
    how: str | None


@dataclass(frozen=True)
class Happened:
    """Events of one further kind in the ledger (publications, purges, ...)."""

    kind: str
    times: int
    last: float


def copy_rows(run: RunDirectory, wanted: Container[str] | None) -> tuple[CopyRow, ...]:
    """All registered copies, those that hold deleted data first.

    Args:
        wanted: keys of the nodes that the run wants; None if not all are known, because it is damaged.
    """
    stale = set() if wanted is None else {copy.id for copy in outstanding(run, wanted)}
    rows = []
    for copy in known(run):
        state = CURRENT if copy.id not in stale else HOLDS
        how = copy.gone
        if copy.gone is not None:
            state = GONE
        elif wanted is None:
            state = UNKNOWN
        elif copy.id not in stale and copy.is_stale(wanted):
            state, how = GONE, "it is not there any more"
        rows.append(
            CopyRow(
                copy.id, copy.kind, shown_place(copy.kind, copy.place), copy.made_at, state, how
            )
        )
    order = (HOLDS, UNKNOWN, CURRENT, GONE)
    return tuple(sorted(rows, key=lambda row: (order.index(row.state), row.made_at)))


def shown_place(kind: str, place: str) -> str:
    """A place without the folders of this machine."""
    if kind == HUB:
        return place
    for flavour in (PurePosixPath(place.removeprefix("file://")), PureWindowsPath(place)):
        if flavour.is_absolute():
            return f"…/{flavour.name}"
    return place


def other_events(events: Sequence[Event]) -> tuple[Happened, ...]:
    """How often, and when last, each kind of event happened that is shown nowhere else."""
    kinds = dict.fromkeys(event.kind for event in events if event.kind not in SHOWN_ELSEWHERE)
    moments = {kind: [event.time for event in events if event.kind == kind] for kind in kinds}
    return tuple(Happened(kind, len(times), max(times)) for kind, times in moments.items())


def out_of_reach(run: RunDirectory) -> tuple[str, ...]:
    """What no deletion from this run reaches. Unknown files are counted, not named."""
    unknown = len(residues.unrecognised(run))
    return (
        *residues.out_of_reach(run),
        *(["the permanent core, on which all nodes stand"] if run.core else []),
        *(
            [f"{unknown} files of no known kind in the run (`verify` names them)"]
            if unknown
            else []
        ),
    )
