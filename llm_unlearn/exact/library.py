"""The served adapters of a run on one base model, of which only the last used stay loaded."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from safetensors.numpy import load_file
from transformers import PreTrainedModel

from llm_unlearn.errors import UserError
from llm_unlearn.exact.adapters import CONFIG_NAME, MERGED, Tensors
from llm_unlearn.exact.mixing import PARTS
from llm_unlearn.exact.routing import BASE
from llm_unlearn.exact.served import depth_of, read_lineage, words_path
from llm_unlearn.exact.trie import CORE_STAGE

CAPACITY = 64


class ServedChangedError(OSError):
    """Somebody changed what is served: `update`, and ask again."""


class Library:
    """Adapters by name, loaded into slots of a PEFT model when they are asked for.

    Args:
        base: the base model, which adapters are put on.
        served: `RUN/served`.
        capacity: how many stay loaded; a batch that needs more has them all. None: all of them.

    Attributes:
        nobody: who answers for nobody: `__base__`, or the adapter of the permanent core.
        names: of every shard's adapter; `nobody` where nothing is left of it.
        contents: by the name of a loaded adapter, the digest of what is loaded.
        loads: how often layers may have been added to the model.
        changes: how often a slot has got other weights.

    Raises:
        UserError: nothing is served there.
    """

    def __init__(self, base: PreTrainedModel, served: str | Path, capacity: int | None = CAPACITY):
        self.served = Path(served)
        self._room = capacity
        self._indexes: dict[str, list[dict]] = {}
        alive = self._read()
        if not self.directories:
            raise UserError(
                f"{served} holds no served adapter: train the run first (where every subject has a shard "
                "of its own, there is none when all are deleted)"
            )
        # PEFT needs an adapter to begin with; where nothing is left, one of zeros does no harm.
        first = alive[0] if alive else next(iter(self.directories))
        # Slots by the adapter that is in them, the one used last at the end.
        self.slots: dict[str, str] = {}
        self.contents: dict[str, str | None] = {}
        self._configs: dict[str, Any] = {}  # by slot
        self.spare: dict[str, Any] = {}  # slots of zeros, with the configuration they have
        self._hold(first, _slot(0), self._config(first))
        self.loads, self.changes = 1, 0
        self.model = PeftModel.from_pretrained(
            base, str(self.directories[first]), adapter_name=_slot(0)
        ).eval()
        if self.nobody != BASE:
            self.model.load_adapter(str(self.served / self.nobody), adapter_name=self.nobody)
        self.require(alive[: self.capacity])

    def _read(self, withdrawn: Collection[str] = ()) -> list[str]:
        """Look what is served; returns whose adapters are not those of nobody."""
        generation = None
        while generation != (generation := self.served.resolve()):  # all of it of one generation
            self.directories = {
                path.name: path
                for path in sorted(self.served.glob("shard-*"), key=lambda p: int(p.name[6:]))
            }
            self.lineages = {name: read_lineage(path) for name, path in self.directories.items()}
            core = self.served / "core"
            self.nobody = core.name if core.is_dir() else BASE
        self.names = [
            name if depth_of(lineage) and name not in withdrawn else self.nobody
            for name, lineage in self.lineages.items()
        ]
        alive = [name for name in self.names if name != self.nobody]
        self.capacity = len(alive) if self._room is None else self._room
        return alive

    def _digest(self, name: str) -> str | None:
        return (self.lineages.get(name) or {}).get("digest")

    def update(self, withdrawn: Collection[str] = ()) -> None:
        """Follow what is served now: what is loaded and not served any more becomes zeros.

        Args:
            withdrawn: adapters that nobody may read, though they are still served.
        """
        self._read(withdrawn)
        for name in list(self.slots):
            if name not in self.names or self._digest(name) != self.contents[name]:
                self.withdraw(name)
        current = {f"{name} {self._digest(name)}" for name in self.names}
        self._indexes = {known: held for known, held in self._indexes.items() if known in current}

    def withdraw(self, name: str) -> None:
        """Overwrite a loaded adapter with zeros. Its slot takes the next one."""
        slot = self.slots.pop(name)
        del self.contents[name]
        self.changes += 1
        self._zero(slot)
        self.spare[slot] = self._configs.pop(slot)

    def _zero(self, slot: str) -> None:
        for layer in self._layers(slot):
            for part in PARTS:
                getattr(layer, part)[slot].weight.data.zero_()

    def _layers(self, slot: str) -> list[LoraLayer]:
        layers = (layer for layer in self.model.modules() if isinstance(layer, LoraLayer))
        return [layer for layer in layers if slot in layer.lora_A]

    def tensors(self, name: str) -> Tensors:
        """A loaded adapter's factors as they are in memory, named as in its file."""
        slot = self.slots.get(name, name)  # the core and the merged adapter have names of their own
        return {
            f"{module}.{part}.weight": getattr(layer, part)[slot]
            .weight.detach()
            .float()
            .cpu()
            .numpy()
            for module, layer in self.model.named_modules()
            if isinstance(layer, LoraLayer) and slot in layer.lora_A
            for part in PARTS
        }

    def require(self, names: Sequence[str]) -> list[str]:
        """Load what is missing in the place of what was not used for longest.

        Returns:
            For each name that of its slot, by which the model knows it.
        """
        fixed = (BASE, self.nobody, MERGED)
        wanted = dict.fromkeys(name for name in names if name not in fixed)
        for name in wanted:
            if name in self.slots:
                self.slots[name] = self.slots.pop(name)  # now the last in order
            else:
                self._load(name, wanted)
        return [name if name in fixed else self.slots[name] for name in names]

    def _load(self, name: str, wanted: Iterable[str]) -> None:
        unused = next((other for other in self.slots if other not in set(wanted)), None)
        if unused is not None and len(self.slots) >= self.capacity:
            self.withdraw(unused)
        try:
            config = self._config(name)
            slot = next((slot for slot, held in self.spare.items() if held == config), None)
            if slot is not None:
                self._swap_into(slot, name)
            else:
                slot = self._add(name)
            self._hold(name, slot, config)
        except Exception:
            self._ensure_same(name)
            raise
        self.changes += 1
        try:
            self._ensure_same(name)
        except ServedChangedError:
            self.withdraw(name)
            raise

    def _swap_into(self, slot: str, name: str) -> None:
        """Load an adapter into a slot of zeros, which is one again if that fails."""
        try:
            hotswap_adapter(self.model, str(self.directories[name]), adapter_name=slot)
        except Exception:
            self._zero(slot)
            raise
        del self.spare[slot]

    def _add(self, name: str) -> str:
        """Load an adapter into a slot of its own, and do without those that are spare."""
        taken = {*self.slots.values(), *self.spare}
        slot = next(s for s in map(_slot, range(len(taken) + 1)) if s not in taken)
        self.loads += 1
        try:
            self.model.load_adapter(str(self.directories[name]), adapter_name=slot)
        except Exception:
            if slot in self.model.peft_config:
                self._delete(slot)
            raise
        for old in self.spare:  # after the new one: PEFT does not do without any
            self._delete(old)
        self.spare = {}
        return slot

    def _ensure_same(self, name: str) -> None:
        """
        Raises:
            ServedChangedError: what is served under a name is not what was looked at last.
        """
        if (read_lineage(self.directories[name]) or {}).get("digest") != self._digest(name):
            raise ServedChangedError(f"what is served as {name} changed while it was loaded")

    def _delete(self, slot: str) -> None:
        # Which one is active means nothing, as every row names its own; but PEFT fails where that one is gone.
        self.model.set_adapter(next(name for name in self.model.peft_config if name != slot))
        self.model.delete_adapter(slot)

    def _hold(self, name: str, slot: str, config: Any) -> None:
        self.slots[name], self.contents[name] = slot, self._digest(name)
        self._configs[slot] = config

    def _config(self, name: str) -> Any:
        return json.loads((self.directories[name] / CONFIG_NAME).read_bytes())

    def words(self) -> list[list[dict]] | None:
        """For every shard the indexes of the nodes that it serves; None if one has none.

        Raises:
            ServedChangedError: one is not there any more.
        """
        shards = []
        for name, served in zip(self.lineages, self.names, strict=True):
            known = f"{name} {self._digest(name)}"
            if known not in self._indexes:
                lineage = self.lineages[name] if served == name else None
                nodes = lineage["nodes"] if lineage else []
                stages = [node["stage"] for node in nodes if node["stage"] != CORE_STAGE]
                paths = [words_path(self.directories[name], stage) for stage in stages]
                try:
                    self._indexes[known] = [load_file(path) for path in paths]
                except FileNotFoundError:
                    self._ensure_same(name)
                    return None
            shards.append(self._indexes[known])
        return shards

    def merge(self) -> str:
        """Put all adapters into one with weight 1/m each, side by side: exact, with all their ranks."""
        counts = Counter(name for name in self.names if name != BASE)
        if set(counts) <= {self.nobody}:
            return self.nobody
        slots = self.require(list(counts))
        weights = [count / len(self.names) for count in counts.values()]
        if MERGED in self.model.peft_config:  # after the others: PEFT does not do without any
            self._delete(MERGED)
        self.model.add_weighted_adapter(slots, weights, MERGED, combination_type="cat")
        self.model.set_adapter(MERGED)
        for slot in set(slots) - {self.nobody}:
            self.model.delete_adapter(slot)
        self.slots, self.contents = {}, {}
        return MERGED

    def unmerge(self) -> None:
        """Overwrite the merged adapter with zeros: it was made of what may be withdrawn."""
        self._zero(MERGED)


def _slot(number: int) -> str:
    """Names of one length: PEFT finds the tensors of a slot by a part of their names."""
    return f"slot-{number:06d}"
