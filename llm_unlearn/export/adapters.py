"""Served adapters in the form that every loader reads: one rank, one scale, no patterns.

Loaders differ in the scale: vLLM (through 0.30) takes `lora_alpha` over the adapter's one rank, llama.cpp's converter
over each module's own, and knows no rank-stabilised scales; neither reads `rank_pattern`. Where all modules have
one rank and one plain scale, all agree. Modules of lower rank are filled up with zeros, which add zeros to their
output and nothing else. All in numpy, in float32.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_unlearn.exact.adapters import (
    CONFIG_NAME,
    LORA_A,
    LORA_B,
    PREFIX,
    WEIGHTS_NAME,
    Tensors,
    load_tensors,
    served_digest,
    to_bytes,
)

PATTERNS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in memory.

    Attributes:
        tensors: `lora_A` (rank, inputs) and `lora_B` (outputs, rank) of every module.
        config: as PEFT writes it.
    """

    tensors: Tensors
    config: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> "Adapter":
        config = json.loads((directory / CONFIG_NAME).read_bytes())
        return cls(load_tensors(directory / WEIGHTS_NAME), config)

    @property
    def rank(self) -> int:
        return self.config["r"]

    @property
    def digest(self) -> str:
        """What identifies it: its weights and the configuration that scales them."""
        return served_digest(to_bytes(self.tensors), self.config)

    @property
    def modules(self) -> list[str]:
        """Names of the modules that it changes, in the base model."""
        ends = len(LORA_A)
        return sorted(n[len(PREFIX) : -ends] for n in self.tensors if n.endswith(LORA_A))

    def scale(self, module: str) -> float:
        """What PEFT multiplies the module's `B A` by."""
        rank = self._of("rank_pattern", module) or self.config["r"]
        alpha = self._of("alpha_pattern", module) or self.config["lora_alpha"]
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _of(self, pattern: str, module: str) -> float | None:
        """PEFT's rule: the first key that is the end of the name, from a dot on."""
        held = self.config.get(pattern) or {}
        return next((held[key] for key in held if re.match(rf"(.*\.)?({key})$", module)), None)

    def write(self, directory: Path) -> None:
        """Into a new directory, as PEFT reads it."""
        directory.mkdir(parents=True)
        (directory / WEIGHTS_NAME).write_bytes(to_bytes(self.tensors))
        text = json.dumps(self.config, indent=2, sort_keys=True)
        (directory / CONFIG_NAME).write_text(text, encoding="utf-8")


def plain(adapter: Adapter) -> Adapter:
    """The same adapter with one rank and one scale for all modules."""
    return combine([adapter], [1.0])


def combine(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The weighted sum of adapters as one: their ranks side by side, filled up with zeros.

    Exact but for the rounding of one multiplication, where the scales or the weights make one needed.
    """
    bands: dict[str, list[tuple[np.ndarray, np.ndarray, float]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for module in adapter.modules:
            a, b = (adapter.tensors[PREFIX + module + end] for end in (LORA_A, LORA_B))
            bands.setdefault(module, []).append((a, b, weight * adapter.scale(module)))
    rank = max(sum(len(a) for a, _, _ in held) for held in bands.values())
    scale = max(scale for held in bands.values() for _, _, scale in held)
    tensors: Tensors = {}
    for module, held in bands.items():
        joined_a = np.concatenate([a for a, _, _ in held], axis=0)
        joined_b = np.concatenate(
            [b if own == scale else b * np.float32(own / scale) for _, b, own in held], axis=1
        )
        missing = rank - len(joined_a)
        tensors[PREFIX + module + LORA_A] = np.pad(joined_a, ((0, missing), (0, 0)))
        tensors[PREFIX + module + LORA_B] = np.pad(joined_b, ((0, 0), (0, missing)))
    config = {name: v for name, v in adapters[0].config.items() if name not in PATTERNS}
    layers = {layer for adapter in adapters for layer in adapter.config["layers_to_transform"]}
    targets = {name.rsplit(".", 1)[-1] for name in bands}
    alpha = scale * rank
    config |= {
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": False,
        "layers_to_transform": sorted(layers),
        "target_modules": sorted(targets),
    }
    return Adapter(tensors, config)
