"""The run directory: where everything of a run lives, and the nodes in it.

    RUN/run.json            configuration and base model, written once and last
    RUN/secret.key          the partition key, mode 0600
    RUN/encryption.json     where the keys of an encrypted run are: slice.keys beside it, or elsewhere
    RUN/keys.safetensors    the public keys of LegoNet, where they place the records
    RUN/ledger.sqlite       requests, tombstones, events; or ledger.url, which says on what server
    RUN/ledger.head         remembers the end of the ledger's chain; ledger.lock guards it
    RUN/records/            the records, slice by slice, and those of the permanent core
    RUN/nodes/<key>/        adapter_model.safetensors and manifest.json of one trained block, and
                            words.safetensors, by which prompts find their subjects
    RUN/served              link to the directory in generations/ that is served now
    RUN/cache/, trainer/    residues of training: purged when it ends and by every deletion
    RUN/memorization/       what training showed of each record, where it was tracked (record_scores.py)
    RUN/certificates/       one file per request, signed with signing.key; signing.pub verifies
    RUN/policy.toml         what follows a deletion, if somebody chose; rebuild.log of the last in background
    RUN/serving/            of servers: tokens.json, and the audit logs, which hold no name and no text

What is wanted is always derived from run.json and the records; nothing is believed twice.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_unlearn import files
from llm_unlearn.data.partition import CORE, KEY_BYTES, PartitionKey, merkle_root
from llm_unlearn.data.records import Record, canonical
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact.adapters import WEIGHTS_NAME, Tensors, to_bytes
from llm_unlearn.exact.blocks import Block, make_blocks
from llm_unlearn.exact.config import ModelShape, RunConfig
from llm_unlearn.exact.database import Database
from llm_unlearn.exact.encryption import KEY_FILE_NAME, SETTINGS_NAME, AtRest, Encrypted
from llm_unlearn.exact.ledger import Ledger
from llm_unlearn.exact.postgresql import ADDRESS_NAME, Address
from llm_unlearn.exact.slices import Placement, SliceStore
from llm_unlearn.exact.trie import Node, core_node, wanted_paths

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
WORDS_NAME = "words.safetensors"
KEYS_NAME = "keys.safetensors"
OWN_ENTRIES = (
    "run.json", "secret.key", KEYS_NAME, "ledger.sqlite", "ledger.sqlite-journal", "ledger.url", "ledger.head",
    "ledger.head.part", "ledger.lock", "records", "nodes",
    SETTINGS_NAME, KEY_FILE_NAME, "memorization",
    "served", "generations", "cache", "trainer", "certificates", "signing.key", "signing.pub", "policy.toml",
    "rebuild.log", "serving", "state.lock", "train.lock", "export.lock",
)  # fmt: skip


class NodeStore:
    """Trained nodes by key. A node exists whole or not at all.

    Args:
        at_rest: how the files lie on disk; as they are by default.
    """

    def __init__(self, directory: Path, at_rest: AtRest | None = None):
        self.directory = directory
        self.at_rest = at_rest or AtRest()

    def exists(self, key: str) -> bool:
        return (self.directory / key / MANIFEST_NAME).is_file()

    def keys(self) -> list[str]:
        """Keys of all node directories, damaged ones too."""
        if not self.directory.is_dir():
            return []
        return sorted(
            p.name
            for p in self.directory.iterdir()
            if not p.name.startswith(files.TEMPORARY_PREFIX)
        )

    def manifest(self, key: str) -> dict[str, Any]:
        path = self.directory / key / MANIFEST_NAME
        try:
            return json.loads(self.at_rest.read(path))
        except (OSError, ValueError):
            raise RunError(
                f"{path} is damaged or missing: `llm-unlearn rebuild` trains the node again"
            ) from None

    def is_intact(self, key: str) -> bool:
        """Are weights and index those that the manifest names? Reads the whole node."""
        try:
            manifest = self.manifest(key)
            if "words" in manifest and self.digest(key, WORDS_NAME) != manifest["words"]:
                return False
            return self.digest(key, WEIGHTS_NAME) == manifest["weights"]
        except (RunError, OSError, KeyError, TypeError):
            return False

    def digest(self, key: str, name: str) -> str:
        """SHA-256 of what is in a file of a node."""
        return self.at_rest.digest(self.directory / key / name)

    def load(self, key: str) -> Tensors:
        return self.at_rest.tensors(self.directory / key / WEIGHTS_NAME)

    def words(self, key: str) -> bytes | None:
        """The node's index as a file, None for one that was trained without."""
        path = self.directory / key / WORDS_NAME
        return self.at_rest.read(path) if path.is_file() else None

    def publish(
        self,
        node: Node,
        tensors: Tensors,
        details: dict[str, Any],
        words: Tensors | None = None,
        before: Callable[[dict[str, str]], None] | None = None,
    ) -> None:
        """Write a node beside and rename it.

        Args:
            details: what else the manifest says (environment); nothing of the moment, so that
                two runs with the same data write the same bytes.
            words: the index of the node's own slice (`words.py`).
            before: called with the digests of both files just before the node becomes visible.
        """
        self.directory.mkdir(exist_ok=True)
        final = self.directory / node.key
        temporary = files.temporary_name(final)
        temporary.mkdir()
        contents = {WEIGHTS_NAME: to_bytes(tensors)}
        weights = hashlib.sha256(contents[WEIGHTS_NAME]).hexdigest()
        manifest = {"version": FORMAT_VERSION, **node.to_dict(), "weights": weights, **details}
        if words is not None:
            contents[WORDS_NAME] = to_bytes(words)
            manifest["words"] = hashlib.sha256(contents[WORDS_NAME]).hexdigest()
        contents[MANIFEST_NAME] = canonical(manifest)
        (seal,) = self.at_rest.seals()
        for name, data in contents.items():
            (temporary / name).write_bytes(seal(final / name, data))
        if before is not None:
            described = hashlib.sha256(contents[MANIFEST_NAME]).hexdigest()
            before({"weights": weights, "manifest": described})
        files.publish_directory(temporary, final)

    def remove(self, key: str) -> None:
        """Drop a node: out of sight by a rename first, so that a crash leaves no half of it."""
        doomed = files.temporary_name(self.directory / key)
        (self.directory / key).rename(doomed)
        files.remove(doomed)


class RunDirectory:
    """A run on disk. Opening it reads run.json and the key; everything else when asked."""

    def __init__(self, path: Path, description: dict[str, Any], key: PartitionKey):
        self.path = path
        encryption: str | None = description.get("encryption")
        self.at_rest = Encrypted(path, encryption) if encryption else AtRest()
        self.config = RunConfig.from_dict(description["config"])
        self.shape = ModelShape.from_dict(description["model"])
        self.key = key
        self.core_root: str | None = description.get("core")
        self.slices = SliceStore(
            path / "records",
            key,
            self.config.num_shards,
            self.config.num_slices,
            is_keyed=self.config.keys is None,
            at_rest=self.at_rest,
        )
        self.nodes = NodeStore(path / "nodes", self.at_rest)

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """Open an existing run.

        Raises:
            UserError: there is no run at `path`.
            RunError: run.json or secret.key is damaged.
        """
        path = Path(path)
        if not (path / "run.json").is_file():
            raise UserError(
                f"{path} is not a run: it has no run.json (make one with recipes/s3t.py --output_dir {path})"
            )
        try:
            description = json.loads((path / "run.json").read_bytes())
            if description["version"] != FORMAT_VERSION:
                raise RunError(
                    f"{path} was written by another version of the format ({description['version']})"
                )
            if not any((path / name).is_file() for name in ("ledger.sqlite", ADDRESS_NAME)):
                raise RunError(f"{path}/ledger.sqlite is missing: restore it from a backup")
            return cls(path, description, PartitionKey((path / "secret.key").read_bytes()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path} is damaged ({error}): restore run.json and secret.key from a backup"
            ) from None

    @classmethod
    def create(  # noqa: PLR0913 - what a run is made of, and most of it has a default
        cls,
        path: str | Path,
        records: Iterable[Record],
        config: RunConfig,
        shape: ModelShape,
        key: PartitionKey | None = None,
        source: dict[str, Any] | None = None,
        core: Sequence[Record] = (),
        placement: Placement | None = None,
        ledger: Address | None = None,
        key_store: str | None = None,
    ) -> "RunDirectory":
        """Partition the records and write a new run. run.json comes last: a crash leaves no run.

        Args:
            core: records that can never be deleted, trained under all others.
            key: the partition key; a fresh random one by default.
            source: where the records came from, for the record only.
            placement: where public keys and not the run's key place the records.
            ledger: where on a PostgreSQL server the ledger goes; by default it is a file of the run.
            key_store: where the keys are kept that the run is encrypted with; it is not, without one.

        Raises:
            RunError: the server of the ledger cannot be used.
            UserError: the directory already holds a run or files that are not ours.
        """
        path = Path(path)
        if (path / "run.json").exists():
            raise UserError(f"{path} already holds a run")
        foreign = [p.name for p in path.iterdir() if not _is_ours(p)] if path.is_dir() else []
        if foreign:
            raise UserError(
                f"{path} is not empty (it holds {sorted(foreign)[0]!r}): choose another --output_dir"
            )
        make_blocks(config.blocks, config.num_slices, shape.num_layers, config.lora.rank)
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
        with files.locked(path / "state.lock", "creating it"):
            key = key or PartitionKey.random()
            return cls._create(
                path, records, config, shape, key, source, core, placement, ledger, key_store
            )

    @classmethod
    def _create(  # noqa: PLR0913
        cls,
        path: Path,
        records: Iterable[Record],
        config: RunConfig,
        shape: ModelShape,
        key: PartitionKey,
        source: dict[str, Any] | None,
        core: Sequence[Record],
        placement: Placement | None,
        ledger: Address | None,
        key_store: str | None,
    ) -> "RunDirectory":
        if (path / "run.json").exists():
            raise UserError(f"{path} already holds a run")
        if ledger is not None and (abandoned := Address.read(path)) and abandoned.url == ledger.url:
            Database(abandoned).drop()
        Encrypted.abandon(path)
        for entry in path.iterdir():
            if not entry.name.endswith(".lock"):
                files.remove(entry)  # what a killed creation left
        files.write_bytes(path / "secret.key", key.secret, mode=0o600)
        description = {
            "version": FORMAT_VERSION,
            "config": config.to_dict(),
            "model": asdict(shape),
            "salt_id": key.salt_id,
            "source": source or {},
        }
        permanent = {"core": merkle_root([key.leaf(r.to_line()) for r in core])} if core else {}
        description |= permanent
        if key_store is not None:
            description["encryption"] = Encrypted.create(path, key_store).identity
        run = cls(path, json.loads(canonical(description)), key)
        if ledger is not None:
            ledger.write(path)
        run.ledger.create()
        if placement is not None:
            files.write_bytes(path / KEYS_NAME, placement.keys)
        run.slices.write_all(records, placement.shards_of if placement else None)
        if core:
            run.slices.write_core(core)
        created = {"config": run.config.identity(run.shape), "salt_id": key.salt_id}
        run.ledger.append("created", created | permanent)
        files.write_bytes(
            path / "run.json", json.dumps(description, indent=2, sort_keys=True).encode()
        )
        return run

    def ensure_same(self, config: RunConfig, shape: ModelShape) -> None:
        """Refuse to go on with another configuration or base model than the run's.

        Raises:
            UserError: names the first differing setting with both values.
        """
        if shape.weights != self.shape.weights:
            raise UserError(
                f"{self.path} was made from another base model ({self.shape.name_or_path}) than "
                f"{shape.name_or_path}: the weights differ. Choose another --output_dir"
            )
        if shape.tokenizer != self.shape.tokenizer:
            raise UserError(
                f"{self.path} was made with another tokenizer: choose another --output_dir"
            )
        ignored = {"runtime": None, "num_threads": None, "keys": None}
        theirs: dict[str, Any] = config.to_dict() | ignored
        ours: dict[str, Any] = self.config.to_dict() | ignored
        for group in ("training", "lora", "model"):
            theirs |= {f"{group}.{name}": value for name, value in theirs.pop(group).items()}
            ours |= {f"{group}.{name}": value for name, value in ours.pop(group).items()}
        for name in sorted(theirs.keys() | ours.keys()):
            if canonical(theirs.get(name)) != canonical(ours.get(name)):
                raise UserError(
                    f"{self.path} was made with another configuration: {name} is {ours.get(name)} there and "
                    f"{theirs.get(name)} now. Use the same flags, or another --output_dir"
                )

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger.of(self.path)

    @cached_property
    def identity(self) -> str:
        return self.config.identity(self.shape)

    @cached_property
    def blocks(self) -> list[Block]:
        return make_blocks(
            self.config.blocks, self.config.num_slices, self.shape.num_layers, self.config.lora.rank
        )

    @property
    def shards(self) -> Sequence[int]:
        """Numbers of the shards; where each subject has one, of those that hold records."""
        return self.slices.shards

    @cached_property
    def core(self) -> Node | None:
        """The node of the permanent core, under all others; None if the run has none."""
        if self.core_root is None:
            return None
        every_layer = tuple(range(self.shape.num_layers))
        return core_node(self.identity, every_layer, self.config.lora.rank, self.core_root)

    @property
    def served(self) -> Path:
        return self.path / "served"

    @property
    def members(self) -> list[int]:
        """What is served, an adapter each: the shards, and the core (`CORE.shard`) if there is one."""
        return [*self.shards, *([CORE.shard] if self.core else [])]

    def member_name(self, shard: int) -> str:
        """Name of a member's directory in `served/`."""
        return "core" if shard == CORE.shard else f"shard-{shard}"

    def paths(self, shard: int) -> list[list[Node]]:
        """The nodes that the sequences of a member want, given the records it holds now."""
        if self.core is not None and shard == CORE.shard:
            return [[self.core]]
        roots = self.slices.roots(shard)
        sequences = list(self.config.sequences)
        return wanted_paths(self.identity, shard, sequences, self.blocks, roots, self.core)

    def wanted(self) -> dict[str, Node]:
        """Every node of the complete run, by key."""
        return {
            node.key: node for shard in self.members for path in self.paths(shard) for node in path
        }

    def wants(self, node: Node) -> bool:
        """Is the node one of the complete run? Reads its own shard only."""
        return node.shard in self.members and any(node in path for path in self.paths(node.shard))

    def changing(self, holder: str) -> AbstractContextManager[None]:
        """Lock for whatever changes records, nodes or what is served; held for moments only."""
        return files.locked(self.path / "state.lock", holder)

    def training(self, timeout: float = 1.0) -> AbstractContextManager[None]:
        """Lock of the one process (group) that trains; a deletion does not wait for it."""
        return files.locked(self.path / "train.lock", "training it", timeout=timeout)

    @property
    def is_training(self) -> bool:
        """Whether a process trains it at this moment."""
        try:
            with self.training(timeout=0.0):
                return False
        except RunError:
            return True


def _is_ours(entry: Path) -> bool:
    return entry.name in OWN_ENTRIES or entry.name.startswith(files.TEMPORARY_PREFIX)


def read_key(path: str | Path) -> PartitionKey:
    """The partition key of another run, to reproduce its slices and bits.

    Raises:
        UserError: the file is missing or is not a key.
    """
    try:
        return PartitionKey(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read a key of {KEY_BYTES} bytes from {path}: {error}") from None
