"""`S3TRun`: the one object that a program needs, thin over the rest of `exact`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn import files
from llm_unlearn.data.near_duplicates import THRESHOLD
from llm_unlearn.data.partition import CORE, SliceName, describe_sizes
from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError
from llm_unlearn.exact.asks import Ask, Correction
from llm_unlearn.exact.blocks import describe_split
from llm_unlearn.exact.certificates import certificate_path, read_certificate
from llm_unlearn.exact.copies import Copy, nodes_served, outstanding
from llm_unlearn.exact.correction import Corrected, correct
from llm_unlearn.exact.deletion import Deletion, delete, delete_all
from llm_unlearn.exact.encryption import KEY_FILE_NAME
from llm_unlearn.exact.ledger import Request
from llm_unlearn.exact.near_duplicates import NearDuplicate, find_near_duplicates
from llm_unlearn.exact.postgresql import ADDRESS_NAME, Address
from llm_unlearn.exact.settling import depths_served, renew, settle
from llm_unlearn.exact.slices import Placement
from llm_unlearn.exact.store import RunDirectory, read_key
from llm_unlearn.exact.trie import Node, longest_surviving_prefix
from llm_unlearn.exact.verification import Check, choose_nodes, replay_nodes, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig

    from llm_unlearn.exact.arguments import S3TConfig
    from llm_unlearn.exact.ensemble import ShardEnsemble
    from llm_unlearn.exact.training import Progress, TrainingReport
    from llm_unlearn.observing import Observer


@dataclass(frozen=True)
class ShardStatus:
    """One shard: how deep it is served, how deep it could be, and what a rebuild would train."""

    shard: int
    served_depth: int
    surviving_depth: int
    full_depth: int
    nodes: int
    missing_nodes: int
    records: int
    subjects: int
    slice_records: list[int]


@dataclass(frozen=True)
class Deadline:
    """A request that has a deadline, soonest first in a status.

    Attributes:
        deadline: seconds since the epoch, like `finished_at` (None while it is pending).
        state: `met`, `missed`; or, while it is pending or a copy outside holds what it deleted,
            `open` or `overdue`.
    """

    request: str
    reason: str | None
    deadline: float
    finished_at: float | None
    state: str


@dataclass(frozen=True)
class RunStatus:
    """What a run holds now. `to_dict` is what `--json` prints."""

    path: str
    base_model: str
    blocks: str
    slice_data: str
    shards: list[ShardStatus]
    is_served: bool
    requests: int
    pending_requests: int
    deleted_subjects: int
    storage_bytes: int
    warnings: list[str]
    core_records: int | None = None
    deadlines: list[Deadline] = field(default_factory=list)
    outstanding_copies: list[Copy] = field(default_factory=list)
    key_store: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class S3TRun:
    """An exact run: train it, delete from it, rebuild it, verify it, serve it.

    Example:
        >>> run = S3TRun.create("runs/mine", records, S3TConfig(), model, tokenizer)
        >>> run.train(model, tokenizer)
        >>> run.delete(["Ada Lovelace"])
    """

    def __init__(self, directory: RunDirectory):
        self.directory = directory

    @classmethod
    def open(cls, path: str | Path) -> "S3TRun":
        """Open an existing run; UserError if there is none."""
        return cls(RunDirectory.open(path))

    @classmethod
    def create(  # noqa: PLR0913 - what a run is made of, and most of it has a default
        cls,
        path: str | Path,
        records: Sequence[Record],
        arguments: "S3TConfig",
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        model_arguments: "ModelConfig | None" = None,
        source: dict[str, Any] | None = None,
        public_texts: Sequence[str] = (),
        core: Sequence[Record] = (),
    ) -> "S3TRun":
        """Partition records into a new run, or go on with the one at `path` if it fits.

        An existing run keeps its own records, without what was deleted from it: the records given
        here are not looked at again.

        Args:
            public_texts: what the keys of `--exact_method lego` are made of; nobody's records.
            source: where the records came from, for the record.
            core: the permanent core: records trained under all others that can NEVER be deleted.

        Raises:
            UserError: impossible flags, or a run of another configuration or base model.
        """
        from trl import ModelConfig

        from llm_unlearn.exact.arguments import make_config, make_shape

        model_arguments = model_arguments or ModelConfig()
        config = make_config(arguments, model_arguments)
        shape = make_shape(model, tokenizer, model_arguments)
        key = read_key(arguments.key_path) if arguments.key_path else None
        ledger = Address.new(arguments.ledger_url) if arguments.ledger_url else None
        if (Path(path) / "run.json").exists():
            directory = RunDirectory.open(path)
            directory.ensure_same(config, shape)
            if key is not None and key.salt_id != directory.key.salt_id:
                raise UserError(f"{path} was made with another key than {arguments.key_path}")
            if directory.core is None and (core or (source or {}).get("core_path")):
                raise UserError(
                    f"{path} was made without a permanent core: choose another --output_dir"
                )
            if ledger is not None and not ledger.is_that_of(directory.path):
                raise UserError(
                    f"{path} keeps its ledger elsewhere than --ledger_url: leave the flag out (when the "
                    f"server has moved, edit {path}/{ADDRESS_NAME})"
                )
            directory.at_rest.ensure_same(arguments.encrypt, arguments.key_store)
            return cls(directory)
        key_store = (arguments.key_store or KEY_FILE_NAME) if arguments.encrypt else None
        if arguments.exact_method != "lego":
            return cls(
                RunDirectory.create(
                    path,
                    records,
                    config,
                    shape,
                    key,
                    source,
                    core,
                    ledger=ledger,
                    key_store=key_store,
                )
            )
        if core:
            raise UserError("--exact_method lego has no permanent core")
        from llm_unlearn.exact.keys import Keys

        keys = Keys.make(model, tokenizer, public_texts, config)
        config = replace(config, keys=keys.digest)
        placement = Placement(keys.placement(model, tokenizer, config.max_length), keys.to_bytes())
        directory = RunDirectory.create(
            path, records, config, shape, key, source, placement=placement,
            ledger=ledger, key_store=key_store,
        )  # fmt: skip
        return cls(directory)

    @property
    def path(self) -> Path:
        return self.directory.path

    def train(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        progress: "Progress | None" = None,
        track: "Callable[[], Observer] | None" = None,
    ) -> "TrainingReport":
        """Train every missing node: all of a new run, or what a deletion or a crash took.

        Args:
            track: makes what watches each node (`memorization.observations.Observations`).
        """
        from llm_unlearn.exact.training import train

        return train(self.directory, model, tokenizer, progress, track)

    def warnings(self) -> list[str]:
        """What a person should know about the data before training: sizes, splits, shared texts."""
        directory = self.directory
        sizes = {name: directory.slices.header(name).records for name in directory.slices.names}
        found = [*self._core_warnings(), *describe_sizes(sizes), *directory.at_rest.warnings()]
        if split := describe_split(directory.config.blocks, directory.blocks):
            found.append(split)
        texts, records = directory.slices.shared_texts()
        if texts:
            found.append(
                f"{texts} texts are held by more than one subject ({records} records): a deletion of one "
                "subject leaves the others' copies unless it is asked for --with-duplicates"
            )
        return found

    def _core_warnings(self) -> list[str]:
        slices = self.directory.slices
        if self.directory.core is None:
            return []
        found = [
            f"the permanent core has {slices.header(CORE).records} records: NOTHING in it can ever be "
            "deleted from this run, at nobody's request; every node stands on it, so taking out one "
            "record means a new run"
        ]
        subjects, texts = slices.shared_with_core()
        if subjects or texts:
            found.append(
                f"{subjects} subjects and {texts} texts are in the permanent core and among the deletable "
                "records too: a deletion takes the deletable ones, and the core still knows the others"
            )
        return found

    def rebuild(self, progress: "Progress | None" = None) -> "TrainingReport":
        """Load the base model and train what is missing, without the deleted data."""
        from llm_unlearn.exact.base_model import load_base_of

        self.settle()
        return self.train(*load_base_of(self.directory), progress=progress)

    def delete(
        self, subjects: Sequence[str], with_duplicates: bool = False, dry_run: bool = False
    ) -> Deletion:
        """Delete subjects exactly, all or none; see `llm_unlearn.exact.deletion.delete`."""
        return delete(self.directory, subjects, with_duplicates, dry_run)

    def delete_all(
        self,
        asks: Sequence[Ask],
        with_duplicates: bool = False,
        dry_run: bool = False,
        near: str | None = None,
    ) -> Deletion:
        """Delete what is asked for, a request each; see `llm_unlearn.exact.deletion.delete_all`."""
        return delete_all(self.directory, asks, with_duplicates, dry_run, near)

    def correct(self, corrections: Sequence[Correction]) -> Corrected:
        """Replace records, all or none; see `llm_unlearn.exact.correction.correct`."""
        return correct(self.directory, corrections)

    def records_of(self, subject: str) -> list[Record]:
        """A subject's records.

        Raises:
            UserError: nobody of that name is held.
        """
        slices = self.directory.slices
        held = {
            record.id: record
            for name, here in slices.homes([subject]).items()
            for record in slices.read(name, here)
        }
        if not held:
            raise UserError(f"no such subject in {self.path}: {subject!r}")
        return list(held.values())

    def near_duplicates(
        self,
        subjects: Sequence[str],
        threshold: float = THRESHOLD,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[NearDuplicate]:
        """Who else holds nearly the same text as some subjects' records.

        Raises:
            UserError: nobody of that name is held, or no such threshold.
        """
        records = [record for name in dict.fromkeys(subjects) for record in self.records_of(name)]
        return find_near_duplicates(self.directory, records, threshold, progress)

    def settle(self) -> None:
        """Carry out requests that a crash left acknowledged but unfinished."""
        with self.directory.changing("finishing a deletion in it"):
            settle(self.directory)

    def verify(self, replay: int = 0) -> list[Check]:
        """All file checks, and `replay` random nodes trained again and compared."""
        checks = verify(self.directory)
        if not replay:
            return checks
        return [*checks, replay_nodes(self.directory, choose_nodes(self.directory, replay))]

    def status(self) -> RunStatus:
        """What the run holds now, derived from its files, all of one moment."""
        with self.directory.changing("changing it"):
            return self._status()

    def _status(self) -> RunStatus:
        directory = self.directory
        requests = directory.ledger.requests()
        copies = outstanding(directory)
        return RunStatus(
            path=str(directory.path),
            base_model=directory.shape.name_or_path,
            blocks=directory.config.blocks,
            slice_data=directory.config.slice_data,
            shards=[
                self._shard_status(shard, depth)
                for shard, depth in depths_served(directory).items()
            ],
            is_served=directory.served.exists(),
            requests=len(requests),
            pending_requests=sum(request.finished_at is None for request in requests),
            deleted_subjects=len(
                {t.pseudonym for r in requests for t in r.targets if t.kind == "subject"}
            ),
            storage_bytes=files.tree_bytes(directory.path),
            warnings=self.warnings(),
            core_records=directory.slices.header(CORE).records if directory.core else None,
            deadlines=_deadlines(requests, copies),
            outstanding_copies=copies,
            key_store=directory.at_rest.place,
        )

    def _shard_status(self, shard: int, served_depth: int) -> ShardStatus:
        directory = self.directory
        paths = directory.paths(shard)
        headers = [
            directory.slices.header(SliceName(shard, part))
            for part in range(directory.config.num_slices)
        ]
        wanted = {node.key for path in paths for node in path if not node.is_core}
        present = {key for key in wanted if directory.nodes.exists(key)}
        return ShardStatus(
            shard=shard,
            served_depth=served_depth,
            surviving_depth=_depth(longest_surviving_prefix(paths, directory.nodes.exists)),
            full_depth=max(map(_depth, paths)),
            nodes=len(present),
            missing_nodes=len(wanted) - len(present),
            records=sum(header.records for header in headers),
            subjects=sum(header.subjects for header in headers),
            slice_records=[header.records for header in headers],
        )

    def training_seconds(self) -> float:
        """What training all nodes of the complete run took, as far as the ledger knows."""
        events = self.directory.ledger.events("trained")
        seconds = {event.payload["node"]: event.payload["seconds"] for event in events}
        return sum(seconds.get(key, 0.0) for key in self.directory.wanted())

    def renew(self, requests: Sequence[str], replay: bool = False) -> list[Path]:
        """Certify requests again, as things are now; returns the certificates.

        Args:
            replay: train every served node again first and compare bits, which is what the class
                `dense` needs.

        Raises:
            UserError: no such request.
        """
        self.settle()
        found = replay_nodes(self.directory, nodes_served(self.directory)) if replay else None
        return renew(self.directory, requests, found)

    def certificate(self, request: str) -> dict[str, Any]:
        """What the certificate of a request says."""
        return read_certificate(certificate_path(self.directory, request))["predicate"]

    def ensemble(self) -> "ShardEnsemble":
        """The served adapters of all shards as one model with `forward` and `generate`."""
        from llm_unlearn.exact.base_model import load_base_of
        from llm_unlearn.exact.ensemble import ShardEnsemble

        model, tokenizer = load_base_of(self.directory)
        rule = self.directory.config.rule
        return ShardEnsemble.from_run(model, self.directory.served, rule, tokenizer)


def _deadlines(requests: Sequence[Request], copies: Sequence[Copy]) -> list[Deadline]:
    stale = {node for copy in copies for node in copy.nodes}
    found = []
    for request in requests:
        if request.deadline is None:
            continue
        if request.finished_at is not None and stale.isdisjoint(request.nodes):
            state = "met" if request.finished_at <= request.deadline else "missed"
        else:
            state = "open" if time.time() <= request.deadline else "overdue"
        found.append(
            Deadline(request.id, request.reason, request.deadline, request.finished_at, state)
        )
    return sorted(found, key=lambda entry: entry.deadline)


def _depth(path: list[Node]) -> int:
    """How many blocks a path has; the core is under them and does not count."""
    return sum(not node.is_core for node in path)
