"""The served adapters of a run on one base model, of which only the last used stay loaded."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.numpy import load_file
from transformers import PreTrainedModel

from llm_unlearn.errors import UserError
from llm_unlearn.exact.adapters import CONFIG_NAME
from llm_unlearn.exact.routing import BASE
from llm_unlearn.exact.served import depth_of, read_lineage, words_path
from llm_unlearn.exact.trie import CORE_STAGE

CAPACITY = 64
MERGED = "merged"


class Library:
    """Adapters by name, loaded into slots of a PEFT model when they are asked for.

    Args:
        base: the base model, which adapters are put on.
        served: `RUN/served`.
        capacity: how many stay loaded; a batch that needs more has them all. None: all of them.

    Attributes:
        nobody: who answers for nobody: `__base__`, or the adapter of the permanent core.
        names: of every shard's adapter; `nobody` where nothing is left of it.

    Raises:
        UserError: nothing is served there.
    """

    def __init__(self, base: PreTrainedModel, served: str | Path, capacity: int | None = CAPACITY):
        self.directories = {
            path.name: path
            for path in sorted(Path(served).glob("shard-*"), key=lambda p: int(p.name[6:]))
        }
        if not self.directories:
            raise UserError(
                f"{served} holds no served adapter: train the run first (where every subject has a shard "
                "of its own, there is none when all are deleted)"
            )
        self.lineages = {name: read_lineage(path) for name, path in self.directories.items()}
        core = Path(served) / "core"
        self.nobody = core.name if core.is_dir() else BASE
        self.names = [
            name if depth_of(lineage) else self.nobody for name, lineage in self.lineages.items()
        ]
        alive = [name for name in self.names if name != self.nobody]
        self.capacity = len(alive) if capacity is None else capacity
        # PEFT needs an adapter to begin with; where nothing is left, one of zeros does no harm.
        first = alive[0] if alive else next(iter(self.directories))
        # Slots by the adapter that is in them, the one used last at the end.
        self.slots = {first: _slot(0)}
        self.model = PeftModel.from_pretrained(
            base, str(self.directories[first]), adapter_name=_slot(0)
        ).eval()
        if self.nobody != BASE:
            self.model.load_adapter(str(core), adapter_name=self.nobody)
        self.require(alive[: self.capacity])

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
        if unused is None or len(self.slots) < self.capacity:
            taken = set(self.slots.values())
            slot = next(s for s in map(_slot, range(len(taken) + 1)) if s not in taken)
            self.model.load_adapter(str(self.directories[name]), adapter_name=slot)
        else:
            slot = self.slots.pop(unused)
            self._swap(slot, unused, name)
        self.slots[name] = slot

    def _swap(self, slot: str, old: str, new: str) -> None:
        """Put an adapter in the place of another: in place where their shapes agree."""
        if self._config(old) == self._config(new):
            hotswap_adapter(self.model, str(self.directories[new]), adapter_name=slot)
        else:
            self.model.delete_adapter(slot)
            self.model.load_adapter(str(self.directories[new]), adapter_name=slot)

    def _config(self, name: str) -> Any:
        return json.loads((self.directories[name] / CONFIG_NAME).read_bytes())

    def words(self) -> list[list[dict]] | None:
        """For every shard the indexes of the nodes that it serves; None if one has none."""
        shards = []
        for name, lineage in self.lineages.items():
            nodes = lineage["nodes"] if lineage else []
            stages = [node["stage"] for node in nodes if node["stage"] != CORE_STAGE]
            paths = [words_path(self.directories[name], stage) for stage in stages]
            if not all(path.is_file() for path in paths):
                return None
            shards.append([load_file(path) for path in paths])
        return shards

    def merge(self) -> str:
        """Put all adapters into one with weight 1/m each, side by side: exact, with all their ranks."""
        counts = Counter(name for name in self.names if name != BASE)
        if set(counts) <= {self.nobody}:
            return self.nobody
        slots = self.require(list(counts))
        weights = [count / len(self.names) for count in counts.values()]
        self.model.add_weighted_adapter(slots, weights, MERGED, combination_type="cat")
        self.model.set_adapter(MERGED)
        for slot in set(slots) - {self.nobody}:
            self.model.delete_adapter(slot)
        self.slots = {}
        return MERGED


def _slot(number: int) -> str:
    """Names of one length: PEFT finds the tensors of a slot by a part of their names."""
    return f"slot-{number:06d}"
