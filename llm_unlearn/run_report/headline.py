"""The first lines of the page: is everything that was asked for done?"""

from dataclasses import dataclass
from typing import Literal

from llm_unlearn.run_report.contents import Contents
from llm_unlearn.run_report.words import duration, many

DONE, OPEN, WRONG = "done", "open", "wrong"


@dataclass(frozen=True)
class Headline:
    """One sentence, and what else a person should know at once.

    Attributes:
        verdict: `wrong` if anything contradicts what the run claims, `open` if something remains
            to be done, `done` otherwise.
        actions: what is left to do, each with its command.
    """

    verdict: Literal["done", "open", "wrong"]
    sentence: str
    served: str
    chain: str
    actions: tuple[str, ...]


def headline(contents: Contents) -> Headline:
    counts = contents.counts
    open_copies = len(contents.outstanding)
    if contents.problems:
        verdict, sentence = WRONG, "Something is wrong with this run: see below."
    elif counts.pending:
        overdue = f", {counts.overdue} of them overdue" if counts.overdue else ""
        verdict = OPEN
        sentence = f"{counts.pending} of {many(counts.acknowledged, 'request')} not carried out yet{overdue}."
    elif open_copies:
        verdict = OPEN
        sentence = (
            f"Everything that was asked for is done in the run, but {many(open_copies, 'copy', 'copies')} "
            f"outside still hold{'s' * (open_copies == 1)} deleted data."
        )
    elif counts.acknowledged:
        verdict = DONE
        sentence = (
            f"Everything that was asked for is done: {_all(counts.acknowledged)} carried out."
        )
    else:
        verdict, sentence = DONE, "Nothing has been asked for yet."
    return Headline(verdict, sentence, _served(contents), _chain(contents), _actions(contents))


def _all(number: int) -> str:
    return "the one request was" if number == 1 else f"all {number:,} requests were"


def _served(contents: Contents) -> str:
    if not contents.is_served:
        return "Nothing is served yet."
    depth, full, shards = contents.served_depth, contents.full_depth, contents.shards
    if not shards:
        return f"No shard is left: the {_ground(contents)} answers alone."
    said = f"Served now: {depth:,} of {many(full, 'block')} in {many(len(shards), 'shard')}"
    bare = sum(trie.served_depth == 0 for trie in shards)
    if bare:
        said += f"; {bare:,} of the shards serve{'s' * (bare == 1)} the {_ground(contents)} alone"
    return f"{said}."


def _ground(contents: Contents) -> str:
    return "base model" if contents.core_state is None else "permanent core"


def _chain(contents: Contents) -> str:
    chain = contents.chain
    if chain is None:
        return "The ledger cannot be read: nothing is known of any request."
    holds = "holds" if chain.holds else "does NOT hold"
    return f"The ledger's chain of {many(chain.entries, 'entry', 'entries')} {holds}."


def _actions(contents: Contents) -> tuple[str, ...]:
    name, found = contents.about.name, []
    if contents.counts.pending:
        found.append(
            f"carry out what is pending: `llm-unlearn rebuild {name}` (or any `llm-unlearn delete`)"
        )
    if contents.problems:
        found.append(f"look at every file: `llm-unlearn verify {name}`")
    if contents.outstanding:
        found.append("remove the copies that hold deleted data, or say that they are gone")
    missing = contents.training.missing
    if missing:
        took = contents.training.rebuild
        about = "" if took is None else f", about {duration(took)}"
        found.append(
            f"train what is missing ({many(missing, 'node')}{about}): `llm-unlearn rebuild {name}`"
        )
    return tuple(found)
