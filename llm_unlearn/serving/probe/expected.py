"""What a server may hold: from a run, or from what a probe of it wrote on another machine."""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from llm_unlearn.errors import UserError
from llm_unlearn.exact.adapters import adapter_name, empty_adapter, expected_shapes, tensors_digest
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.exact.trie import Node, live
from llm_unlearn.export.choosing import Part, choose, is_empty
from llm_unlearn.serving.probe.clean import Clean, retired_names, served_now
from llm_unlearn.serving.probe.looks import LiveAdapter

MOST_SHAPES = 64  # that a withdrawn adapter of some number of blocks can have


@dataclass(frozen=True)
class Expected:
    """What may be served.

    Attributes:
        adapters: by name, what the run serves now.
        retired: names that must not answer any more.
        run: None where only a file about it is at hand.
    """

    adapters: dict[str, LiveAdapter]
    retired: tuple[str, ...]
    epoch: int | None
    run: RunDirectory | None = None
    clean: Clean | None = None

    @classmethod
    def of(cls, run: RunDirectory) -> "Expected":
        clean = Clean.of(run)
        held = {adapter.name: adapter for adapter in served_now(run, clean)}
        return cls(held, tuple(retired_names(run, held)), clean.epoch, run, clean)

    @classmethod
    def from_file(cls, path: Path) -> "Expected":
        """What `probe RUN --json` printed.

        Raises:
            UserError: the file is missing or is something else.
        """
        try:
            told = json.loads(path.read_bytes())
            adapters = [
                LiveAdapter(**{**entry, "nodes": tuple(entry["nodes"])}) for entry in told["served"]
            ]
            retired, epoch = tuple(map(str, told["retired"])), int(told["epoch"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--served {path} is not what `llm-unlearn probe RUN --json` prints: {error}"
            ) from None
        return cls({adapter.name: adapter for adapter in adapters}, retired, epoch)

    @cached_property
    def nodes(self) -> frozenset[str]:
        return frozenset(key for adapter in self.adapters.values() for key in adapter.nodes)

    @cached_property
    def exported(self) -> frozenset[str]:
        """Names as exports give them; the same as here where an export changes nothing."""
        return frozenset(self.adapters) if self.run is None else frozenset(exported_names(self.run))

    def problem_of(self, nodes: Iterable[str]) -> str | None:
        """Why something made of these nodes must not be served."""
        if self.clean is not None:
            return self.clean.problem_of(nodes)
        strange = next((key for key in nodes if key not in self.nodes), None)
        return (
            None if strange is None else f"is made of node {strange[:12]}, which is not served now"
        )

    def is_zero(self, digest: str, blocks: int) -> bool | None:
        """Is it the digest of an adapter of that many nodes with nothing but zeros in it?

        Returns:
            None where that cannot be told.
        """
        if self.run is None:
            return None
        return digest in itertools.islice(_digests_of_zeros(self.run, blocks), MOST_SHAPES)


def exported_names(run: RunDirectory, names: dict[str, str] | None = None) -> dict[str, Part]:
    """What an export for vLLM holds now, by the names that it gives.

    Args:
        names: by what an adapter is made of, its name, as far as it was computed before; filled here.

    Raises:
        UserError: nothing is served yet.
    """
    if is_empty(run):
        return {}
    names, found = {} if names is None else names, {}
    for part in choose(run, None, as_one=False):
        made_of = json.dumps([part.name, [lineage["digest"] for lineage in part.lineages]])
        if made_of not in names:
            names[made_of] = adapter_name(part.name, part.read().digest)
        found[names[made_of]] = part
    return found


def _digests_of_zeros(run: RunDirectory, count: int) -> Iterator[str]:
    """Digests of zeros in the shape of each adapter that can be made of `count` nodes."""
    yield tensors_digest({n: np.zeros_like(t) for n, t in empty_adapter(run.shape).items()})
    core = [run.core] if run.core else []
    for held in (count, count - len(core)):
        for blocks in itertools.combinations(run.blocks, max(held, 0)):
            nodes = [Node("", 0, block, (), (), None) for block in blocks]
            path = live([*core, *nodes] if held != count else nodes)
            ranks: dict[str, tuple[int, ...]] = {}
            for node in path:
                for name, shape in expected_shapes(node, run.shape).items():
                    ranks[name] = _joined(ranks.get(name), shape, name)
            if ranks:
                yield tensors_digest({n: np.zeros(size, np.float32) for n, size in ranks.items()})


def _joined(before: tuple[int, ...] | None, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Shape of two bands of one module side by side (`adapters.assemble`)."""
    if before is None:
        return shape
    axis = 0 if ".lora_A." in name else 1
    return tuple(
        b + s if at == axis else s for at, (b, s) in enumerate(zip(before, shape, strict=True))
    )
