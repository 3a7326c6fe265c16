"""Scores of records: what training showed of them, and what a model shows when it is asked."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.data.records import Record, digest
from llm_unlearn.errors import UserError
from llm_unlearn.exact.record_scores import is_of_node
from llm_unlearn.memorization.holdout_retraining import check_holdout
from llm_unlearn.memorization.orientation import LEARNING, REFERENCE, SCORES, Floats, oriented
from llm_unlearn.memorization.scores import learning_scores, means_by_record, with_ties_broken
from llm_unlearn.memorizing.targets import Target, named_by_content
from llm_unlearn.record_tables import (
    FOLDER,
    RECORD,
    SUBJECT,
    TableFolder,
    make_table,
)

if TYPE_CHECKING:
    from llm_unlearn.approximate.arguments import UnlearningConfig
    from llm_unlearn.observing import Observer

TRAINING, MEASURED = "training", "scores"
Advance = Callable[[str, int, int], None]


def keep_observations(
    place: Path,
    records: Sequence[Record],
    observer: "Observer",
    model: Any,
    config: "UnlearningConfig",
) -> None:
    """Write what was seen of records beside a model. Every process takes part; the main one writes."""
    from accelerate import PartialState

    from llm_unlearn.approximate.claim import training_flags
    from llm_unlearn.digests import base_digest

    seen = observer.collect()
    if not PartialState().is_main_process:
        return
    named = named_by_content(records)
    rows = [named[number] for number in seen.pop("index")]
    told = digest([config.method, training_flags(config)])
    about = {"kind": TRAINING, "config": told, "base": base_digest(model)}
    tables = TableFolder(place / FOLDER)
    tables.write(TRAINING, make_table(tables.key, rows, seen, about))


def seen_in_training(target: Target) -> dict[str, NDArray[Any]]:
    """What all tracked trainings of a target saw of its records, as an observation's columns; {} without."""
    names = [name for name in target.tables.names() if name == TRAINING or is_of_node(name)]
    number = {name: place for place, name in enumerate(target.pseudonyms() if names else ())}
    parts: list[dict[str, NDArray[Any]]] = []
    for name in names:
        table = target.tables.read(name, "epoch", "tokens")
        known = table.where(np.array([one in number for one in table.columns[RECORD]], bool))
        index = np.array([number[one] for one in known.columns[RECORD]], np.int64)
        run = np.full(len(index), len(parts))
        parts.append({**known.columns, "index": index, "run": run})
    common = set.intersection(*(set(part) for part in parts)) if parts else set()
    columns = {name: np.concatenate([part[name] for part in parts]) for name in common}
    return columns if parts and len(columns["index"]) else {}


def observed(target: Target) -> dict[str, Floats]:
    """Oriented learning scores of a target's records from all its tracked trainings, by name."""
    return _learnt(target, seen_in_training(target))


def _learnt(target: Target, seen: Mapping[str, NDArray[Any]]) -> dict[str, Floats]:
    found = learning_scores(seen, len(target.records)) if seen else {}
    return {name: values for name, values in found.items() if not np.isnan(values).all()}


@dataclass(frozen=True)
class Scored:
    """Oriented scores of records, by name, (n,) each, and what else is known of each record.

    Attributes:
        tokens: supervised tokens; NaN where nothing was measured.
        base_confidence: what the base model gave them, if it was asked.
        notes: what a reader should know.
    """

    scores: dict[str, Floats]
    tokens: Floats
    base_confidence: Floats | None = None
    notes: list[str] = field(default_factory=list)


def score(
    target: Target,
    wanted: Sequence[str] = (),
    holdout: Sequence[Record] = (),
    advance: Advance = lambda _what, _done, _total: None,
) -> Scored:
    """Scores of a target's records: what training showed, and what is wanted beside, measured now and kept.

    Args:
        wanted: names; all that training showed by default, or else those of the finished model.

    Raises:
        UserError: an unknown score, or one that needs what is not there.
    """
    if unknown := set(wanted) - set(SCORES):
        raise UserError(f"unknown score {min(unknown)!r}: one of {', '.join(SCORES)}")
    if "holdout" in wanted:
        check_holdout(target.records, holdout)
    columns = seen_in_training(target)
    seen = _learnt(target, columns)
    names = [name for name in wanted if name not in REFERENCE] or list(seen) or list(LEARNING)
    missing = [name for name in names if name not in seen]
    if not missing:
        tokens = means_by_record(columns["index"], columns["tokens"], len(target.records))
        return Scored({name: seen[name] for name in names}, tokens)
    measured = _measured(target, missing, holdout, advance)
    scores = {name: seen[name] for name in names if name in seen}
    scores |= {name: oriented(name, measured[name]) for name in missing}
    if "strict_accuracy" in missing:
        by = oriented("confidence", measured["confidence"])
        scores["strict_accuracy"] = with_ties_broken(scores["strict_accuracy"], by)
    notes = []
    if late := [name for name in missing if name in LEARNING]:
        notes.append(
            f"{', '.join(late)}: of the finished model, since no training with --track_memorization is known; "
            "means over training rank records better"
        )
    base = measured.get("base_confidence")
    return Scored({name: scores[name] for name in names}, measured["tokens"], base, notes)


def _measured(
    target: Target, names: Sequence[str], holdout: Sequence[Record], advance: Advance
) -> dict[str, Floats]:
    """Raw values, of an earlier call with the same model where they are there."""
    about = {"kind": MEASURED, **target.about()}
    held = _held(target, about)
    if "holdout" in names:
        told = digest([record.content for record in holdout])
        if about.get("holdout") != told:
            held.pop("holdout", None)
        about["holdout"] = told
    if set(names) <= held.keys():
        return held
    index: list[int] = []
    done: Counter[str] = Counter()
    parts: dict[str, list[Floats]] = defaultdict(list)
    for model, tokenizer, numbers in target.groups():
        asked = _Asking(
            target, model, tokenizer, [target.records[n] for n in numbers], advance, done
        )
        index += numbers
        for name, values in asked.measure(names, holdout).items():
            parts[name].append(values)
    place, count = np.array(index), len(target.records)
    found = {
        name: means_by_record(place, np.concatenate(values), count)
        for name, values in parts.items()
    }
    found = {**held, **found}
    target.keep(MEASURED, found, about)
    return found


def _held(target: Target, about: dict[str, Any]) -> dict[str, Floats]:
    """What was measured of the same model and records; `about` learns of which held-out text."""
    if MEASURED not in target.tables.names():
        return {}
    table = target.tables.read(MEASURED, "tokens", "confidence")
    same = all(table.about.get(name) == value for name, value in about.items())
    if not same or table.columns[RECORD].tolist() != target.pseudonyms():
        return {}
    about["holdout"] = table.about.get("holdout")
    return {name: table.columns[name] for name in table.columns if name not in (RECORD, SUBJECT)}


@dataclass(frozen=True)
class _Asking:
    """One model and the records that it is asked about; `done` counts those of all models."""

    target: Target
    model: Any
    tokenizer: Any
    records: list[Record]
    advance: Advance
    done: Counter[str]

    def encode(self, records: Sequence[Record]) -> list[Any]:
        from llm_unlearn.data.encoding import check_lengths, encode

        length, completion_only = self.target.max_length, self.target.completion_only
        examples = [encode(r, self.tokenizer, length, completion_only) for r in records]
        check_lengths(examples, length)
        return examples

    def measure(self, names: Sequence[str], holdout: Sequence[Record]) -> dict[str, Any]:
        from llm_unlearn.memorization.controls import gain
        from llm_unlearn.memorization.curvature import curvature
        from llm_unlearn.memorization.holdout_retraining import Retraining, holdout_retraining
        from llm_unlearn.memorization.probing import probe

        examples, pad = self.encode(self.records), pad_of(self.tokenizer)
        found = dict(probe(self.model, examples, pad, self._say("confidence")))
        if hasattr(self.model, "disable_adapter"):
            with self.model.disable_adapter():
                found["base_confidence"] = probe(self.model, examples, pad)["confidence"]
        if "gain" in names:
            if "base_confidence" not in found:
                raise UserError("gain needs an adapter, without which the base model can be asked")
            found["gain"] = gain(found["confidence"], found["base_confidence"])
        if "curvature" in names:
            say = self._say("curvature")
            found["curvature"] = curvature(self.model, examples, pad, advance=say)
        if "holdout" in names:
            options, kept = Retraining(self.target.learning_rate), self.encode(holdout)
            found["holdout"] = holdout_retraining(
                self.model, examples, kept, pad, options, self._say("holdout")
            )
        return found

    def _say(self, what: str) -> Callable[[int], None]:
        def advance(count: int) -> None:
            self.done[what] += count
            self.advance(what, self.done[what], len(self.target.records))

        return advance


def pad_of(tokenizer: Any) -> int:
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    return next(token for token in (pad, end, 0) if token is not None)
