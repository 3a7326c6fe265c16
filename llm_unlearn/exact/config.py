"""What a run is made of: frozen values that are written once, hashed, and read back.

No torch here: `status`, `delete` and `verify` start quickly. The dataclass that people fill in
from the command line is `S3TConfig` in `exact/arguments.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from llm_unlearn.data.records import digest
from llm_unlearn.exact.blocks import BlockKind
from llm_unlearn.exact.selection import Rule
from llm_unlearn.exact.trie import NUMERICS_VERSION

SliceData = Literal["cumulative", "disjoint"]


class Module(NamedTuple):
    """A linear module that carries LoRA: full name in the base model, layer index, sizes."""

    name: str
    layer: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class ModelShape:
    """What has to be known of the base model without loading it.

    Attributes:
        weights: digest of all parameters and buffers (names, types, shapes, bytes).
        layers_pattern: name of the list of decoder layers, as PEFT wants it (`layers`, `h`).
    """

    name_or_path: str
    revision: str | None
    weights: str
    tokenizer: str
    num_layers: int
    layers_pattern: str
    fan_in_fan_out: bool
    modules: tuple[Module, ...]

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "ModelShape":
        return cls(**{**value, "modules": tuple(Module(*module) for module in value["modules"])})


@dataclass(frozen=True)
class LoraSettings:
    """LoRA of the complete adapter; a block with fewer ranks keeps the same scale."""

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def alpha_for(self, rank: int) -> float:
        """The `lora_alpha` under which an adapter of another rank has the same scale."""
        alpha = self.scale * (math.sqrt(rank) if self.use_rslora else rank)
        return int(alpha) if alpha == int(alpha) else alpha


@dataclass(frozen=True)
class RunConfig:
    """Everything chosen for a run. None of it may be chosen by looking at deletable data.

    Attributes:
        num_shards: 0 for one for each subject.
        sequences: the sequences of slices, the same for every shard.
        completion_only: loss on the completion only, where records have one.
        prefix_cache: replay the hidden states of the frozen layers below a block.
        training: the Transformers and TRL arguments that decide bits.
        model: how the base model is loaded (`dtype`, `attn_implementation`).
        runtime: arguments that decide no bits (number of data loader workers, ...).
        num_threads: CPU threads of training; like the hardware, part of a node's environment.
        copies: how many shards learn each record: one, or (`--exact_method lego`) the nearest k.
        keys: digest of the public keys that place the records; None where the run's key does.
        rule: how the served adapters answer as one model; it decides no bits of a node.
    """

    num_shards: int
    num_slices: int
    sequences: tuple[tuple[int, ...], ...]
    blocks: BlockKind
    slice_data: SliceData
    max_length: int
    completion_only: bool
    prefix_cache: bool
    lora: LoraSettings
    training: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)
    runtime: Mapping[str, Any] = field(default_factory=dict)
    num_threads: int = 1
    copies: int = 1
    keys: str | None = None
    rule: Rule = field(default_factory=Rule)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sequences": [list(sequence) for sequence in self.sequences]}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "RunConfig":
        return cls(
            **{
                **value,
                "lora": LoraSettings(**value["lora"]),
                "rule": Rule(**value.get("rule", {})),
                "sequences": tuple(tuple(sequence) for sequence in value["sequences"]),
            }
        )

    def identity(self, shape: ModelShape) -> str:
        """Digest of what every node of the run depends on beside its data, block and parent.

        How many shards, slices or sequences there are is not part of it: a node neither knows
        nor needs that.
        """
        return digest(
            {
                "base": shape.weights,
                "tokenizer": shape.tokenizer,
                "modules": [list(module) for module in shape.modules],
                "numerics": NUMERICS_VERSION,
                "slice_data": self.slice_data,
                "max_length": self.max_length,
                "completion_only": self.completion_only,
                "prefix_cache": self.prefix_cache,
                "lora": asdict(self.lora),
                "training": dict(self.training),
                "model": dict(self.model),
            }
        )
