"""Whose records are scored: a run's, or those that a model with its tables beside it learnt."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_unlearn.data.records import Record, digest
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.models import LoadedModel, load_model, run_of, with_adapter
from llm_unlearn.record_tables import (
    FOLDER,
    RECORD,
    SUBJECT,
    RecordTable,
    TableFolder,
    make_table,
)

Group = tuple[Any, Any, list[int]]
"""A model, its tokenizer, and the numbers of the records that it is asked about."""


class Target:
    """A model beside which tables are kept, and the records that it learnt.

    Attributes:
        path: the model's directory.
        max_length, completion_only: how records are encoded; `learning_rate`: what it was trained with.
    """

    max_length, completion_only, learning_rate = 1024, True, 2e-4

    def __init__(self, path: Path, records: Sequence[Record]):
        self.path = path
        self.records = list(records)
        self.tables = TableFolder(path / FOLDER)

    @property
    def label(self) -> str:
        return str(self.path)

    @cached_property
    def loaded(self) -> LoadedModel:
        return load_model(str(self.path))

    def groups(self) -> Iterator[Group]:
        yield self.loaded.model, self.loaded.tokenizer, list(range(len(self.records)))

    def state(self) -> str:
        """What measured numbers depend on beside the records."""
        from llm_unlearn.digests import tensors_digest

        return tensors_digest(self.loaded.model)

    def about(self) -> dict[str, str]:
        return {"model": self.state()}

    def pseudonyms(self) -> list[str]:
        return [self.tables.key.pseudonym("record", record.id) for record in self.records]

    def keep(self, name: str, columns: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Write a table with a row for each record."""
        self.write(name, make_table(self.tables.key, self.records, columns, about))

    def write(self, name: str, table: RecordTable) -> None:
        self.tables.write(name, table)


class LoadedTarget(Target):
    """A model in memory, beside which nothing is kept."""

    def __init__(self, model: Any, tokenizer: Any, records: Sequence[Record]):
        super().__init__(Path("nowhere"), records)
        self.loaded = LoadedModel(model, tokenizer, "")

    def keep(self, name: str, columns: Mapping[str, Any], about: Mapping[str, Any]) -> None: ...


class RunTarget(Target):
    """A run: each shard's served adapter is asked about the shard's own records.

    Public keys put a record into several shards; it is one record, and its numbers are means over them.
    """

    def __init__(self, path: Path):
        from llm_unlearn.exact.record_scores import RunTables
        from llm_unlearn.exact.run import S3TRun
        from llm_unlearn.exact.settling import settle

        self.run: S3TRun = S3TRun.open(path)
        directory = self.run.directory
        with directory.changing("reading its records"):
            settle(directory)  # nobody is shown whose deletion is acknowledged
            by_shard = {
                shard: [
                    r for n in directory.slices.names_in(shard) for r in directory.slices.read(n)
                ]
                for shard in directory.shards
            }
        unique = {record.id: record for held in by_shard.values() for record in held}
        if not unique:
            raise UserError(f"{path} holds no records any more: there is nothing to score")
        super().__init__(path, list(unique.values()))
        self.tables = RunTables(directory)
        number = {name: place for place, name in enumerate(unique)}
        self.numbers = {shard: [number[r.id] for r in held] for shard, held in by_shard.items()}
        config = directory.config
        self.max_length, self.completion_only = config.max_length, config.completion_only
        self.learning_rate = float(config.training["learning_rate"])

    def groups(self) -> Iterator[Group]:
        from llm_unlearn.exact.base_model import load_base_of

        directory = self.run.directory
        if not directory.served.exists():
            raise UserError(f"{self.path} serves nothing yet: train it first")
        base, tokenizer = load_base_of(directory)
        for shard, numbers in self.numbers.items():
            if numbers:
                place = directory.served / directory.member_name(shard)
                model = with_adapter(base, str(place), trainable=True)
                yield model, tokenizer, numbers
                model.unload()

    def state(self) -> str:
        from llm_unlearn.exact.served import digest_of_served

        return str(digest_of_served(self.run.directory))

    def about(self) -> dict[str, str]:
        from llm_unlearn.exact.record_scores import digests

        return {"model": self.state(), **digests(self.run.directory)}

    def write(self, name: str, table: RecordTable) -> None:
        """Without what has been deleted while it was measured.

        Raises:
            RunError: something was; what is left is kept.
        """
        from llm_unlearn.exact import residues
        from llm_unlearn.exact.settling import settle

        directory = self.run.directory
        with directory.changing("keeping what was measured"):
            settle(directory)
            gone = directory.ledger.tombstones() & {
                name for column in (RECORD, SUBJECT) for name in table.columns[column].tolist()
            }
            self.tables.write(name, table.without(gone))
            residues.destroy_keys(directory)  # that of a table which this one replaces
        if gone:
            raise RunError(
                f"{self.path} was changed by a deletion meanwhile: run the command again"
            )


def open_target(path: Path, records: Sequence[Record] | None = None) -> Target:
    """A run, or a model with the records it learnt.

    Raises:
        UserError: it is neither, or a model without records.
    """
    if run := run_of(path):
        if records is not None:
            raise UserError("a run knows its own records: leave --records out")
        return RunTarget(run)
    if inside := next(
        (one for one in path.resolve().parents if (one / "run.json").is_file()), None
    ):
        raise UserError(f"{path} is a part of the run {inside}: give the run")
    if not path.is_dir():
        raise UserError(f"{path} is no run and no model's directory")
    if not records:
        raise UserError("which records did the model learn? Give --records FILE")
    return Target(path, named_by_content(records))


def named_by_content(records: Sequence[Record]) -> list[Record]:
    """Records under ids that the same text has in every file, whatever its subject is called there."""
    return [replace(record, id=digest(record.content)) for record in records]
