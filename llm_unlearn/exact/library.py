"""The served adapters of a run on one base model, of which only the last used stay loaded."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel

from llm_unlearn.errors import UserError
from llm_unlearn.exact.routing import BASE
from llm_unlearn.exact.served import depth_of, read_lineage, words_path
from llm_unlearn.exact.trie import CORE_STAGE

CAPACITY = 64
MERGED = "merged"


class Library:
    """Adapters by name, loaded when they are asked for.

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
            raise UserError(f"{served} holds no served adapter: train the run first")
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
        self.model = PeftModel.from_pretrained(
            base, str(self.directories[first]), adapter_name=first
        ).eval()
        self._used = dict.fromkeys([first])
        if self.nobody != BASE:
            self.model.load_adapter(str(core), adapter_name=self.nobody)
        self.require(alive[: self.capacity])

    def require(self, names: Iterable[str]) -> None:
        """Load what is missing, and drop what was not used for longest."""
        wanted = dict.fromkeys(name for name in names if name not in (BASE, self.nobody))
        for name in wanted:
            if name in self._used:
                self._used[name] = self._used.pop(name)  # now the last in order
                continue
            self._make_room(wanted)
            self.model.load_adapter(str(self.directories[name]), adapter_name=name)
            self._used[name] = None

    def _make_room(self, wanted: dict[str, None]) -> None:
        for name in [name for name in self._used if name not in wanted]:
            if len(self._used) < self.capacity:
                return
            self.model.delete_adapter(name)
            del self._used[name]

    @property
    def loaded(self) -> list[str]:
        """Names of the adapters in memory, the one used last at the end."""
        return list(self._used)

    def words(self) -> list[list[dict]] | None:
        """For every shard the indexes of the nodes that it serves; None if one has none."""
        from safetensors.numpy import load_file

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
        self.require(counts)
        weights = [count / len(self.names) for count in counts.values()]
        self.model.add_weighted_adapter(list(counts), weights, MERGED, combination_type="cat")
        self.model.set_adapter(MERGED)
        for name in counts.keys() - {self.nobody}:
            self.model.delete_adapter(name)
        self._used = {MERGED: None}
        return MERGED

    @property
    def base(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model.get_base_model())
